"""The virtual GPU (src/) for tests: the C API's CUDA ops on it, and kernels of one's own from PTX text.

    gpu = vgpu.Gpu(arch=90, seed=3)
    module = gpu.module(vgpu.compile("kernel.cu", arch="90a"))
    module.launch("scale", grid=2, block=128, args=[x, np.int32(len(x))])     # x: a numpy array, "device memory" as it is
    gpu.counters[-1]["global_load_bytes"]

A launch that goes wrong raises Failure, whose reports say what, where and who. The same modules run on an NVIDIA GPU through
silicon.Gpu.
"""
import collections.abc
import ctypes
import functools
import hashlib
import json
import operator
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/virtual_gpu"
sys.path.insert(0, str(ROOT / "tests"))
import c_api  # noqa: E402
from one_at_a_time import one_at_a_time  # noqa: E402

CSRC = ROOT / "csrc"


class LaunchError(Exception):
    """A launch or module that the driver would refuse."""


class Failure(AssertionError):
    """What the virtual GPU reports of a launch: a list of dicts with kind, kernel, where, thread, text, statement, times. Its text also
    has what ptxas says of the kernels' wgmma, asked when it is shown."""

    def __init__(self, reports, ptx_of):
        super().__init__(reports)
        self.reports, self.ptx_of = reports, ptx_of

    def __str__(self):
        lines = [f"{r['kind']} in {r['kernel']} at {r['where']} ({r['thread']}, {r['times']}x): {r['text']}\n    {r['statement']}"
                 for r in self.reports]
        for kernel in dict.fromkeys(r["kernel"] for r in self.reports):
            if "wgmma" in (ptx := self.ptx_of(kernel)):
                try:
                    lines += resources(ptx)[kernel]["wgmma_warnings"]
                except LaunchError as refusal:
                    lines.append(str(refusal))
        return "\n".join(lines)


class Counters(dict):
    """What a launch cost. What ptxas says of its kernel (resources) is an entry too, asked when it is read."""

    def __init__(self, counts, ptx_of):
        super().__init__(counts)
        self.ptx_of = ptx_of

    def __missing__(self, name):
        return resources(self.ptx_of(self["kernel"]))[self["kernel"]][name]


def missing():
    """Why the virtual GPU cannot be built here, or None."""
    if shutil.which("nvcc") is None:
        return "the virtual GPU runs kernels as nvcc compiles them, and no nvcc was found"
    return None


@functools.cache
def library():
    """The library's sources over the virtual GPU, built if need be."""
    source = Path(__file__).parent
    with one_at_a_time():
        for arguments in (["-S", source, "-B", BUILD, "-G", "Ninja"], ["--build", BUILD, "--parallel", "2"]):
            done = subprocess.run(["cmake", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout
    lib = c_api.Library(BUILD / "libmixtral_ext_virtual.so")
    c = lib.c
    for name, restype, argtypes in [
            ("vgpu_set", ctypes.c_int, [ctypes.c_char_p, ctypes.c_int64]),
            ("vgpu_map", None, [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]),
            ("vgpu_unmap", ctypes.c_int, [ctypes.c_void_p]),
            ("vgpu_reports", ctypes.c_char_p, []), ("vgpu_counters", ctypes.c_char_p, []), ("vgpu_clear", None, []),
            ("vgpu_error", ctypes.c_char_p, []), ("vgpu_load", ctypes.c_void_p, [ctypes.c_char_p]), ("vgpu_unload", None, [ctypes.c_void_p]),
            ("vgpu_launch", ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, *3 * [ctypes.POINTER(ctypes.c_uint32)], ctypes.c_uint64,
                                           ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p)]),
            ("vgpu_encode_tiled", ctypes.c_int, [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
                                                 ctypes.c_void_p, ctypes.c_void_p, *4 * [ctypes.c_int]]),
            ("vgpu_describe", ctypes.c_char_p, [ctypes.c_void_p]), ("vgpu_library_modules", ctypes.c_int, []),
            ("vgpu_library_module", ctypes.c_void_p, [ctypes.c_int]), ("vgpu_text", ctypes.c_char_p, [ctypes.c_void_p])]:
        function = getattr(c, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


@functools.cache
def compile(source, arch, *options):
    """PTX of a CUDA source file next to this one ("80", "90", "90a"). It is kept in build/, for machines that have a GPU and no nvcc."""
    path = Path(__file__).parent / source
    # All that it may include is among these; the system's headers change with nvcc.
    text = "".join(p.read_text() for folder in (path.parent, CSRC) for p in sorted(folder.rglob("*")) if p.suffix in (".cu", ".cuh", ".h", ".inc"))
    if shutil.which("nvcc"):
        text += subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    kept = ROOT / "build/ptx" / f"{path.stem}.{arch}.{hashlib.sha256((text + repr(options)).encode()).hexdigest()[:16]}.ptx"
    if not kept.exists():
        command = ["nvcc", "-std=c++17", "-O3", "-lineinfo", "-ptx", "-I", CSRC, f"-arch=compute_{arch}", *options, "-o", "-", path]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")  # two processes may make it, none sees half of it
        part.write_text(done.stdout)
        part.replace(kept)
    return kept.read_text()


def kernels_of(ptx):
    """{kernel: [(kind of type: b, u, s or f, bytes) of each parameter]} of a PTX text."""
    found = {}
    for name, params in re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)", ptx):
        types = re.findall(r"\.([bsuf])(\d+)\s[^,[]*(?:\[(\d+)\])?", params)
        found[name] = [(kind, int(bits) // 8 * int(count or 1)) for kind, bits, count in types]
    return found


def one_kernel(kernels, name):
    """The kernel of that name, or the one whose mangled name contains it."""
    names = [k for k in kernels if k == name] or [k for k in kernels if name and name in k]
    if len(names) != 1:
        raise LaunchError(f"expected the name of one kernel, got {name!r}: it names {names} of {list(kernels)}")
    return names[0]


def values_of(args, params, pointer, encoder):
    """What is passed for arguments: the address of an array, 0 for None (a null pointer), a TensorMap's 128 bytes, else the value itself.
    ValueError if a parameter has another size, or is of floats and the value is not (nvcc writes .f, .u for all else; .b says nothing)."""
    if len(args) != len(params):
        raise ValueError(f"the kernel takes {len(params)} arguments, got {len(args)}")
    values = []
    for i, (x, (kind, size)) in enumerate(zip(args, params)):
        if isinstance(x, TensorMap):
            value = encode(encoder, x, pointer(x.array))
        else:
            value = np.array(np.uint64(0 if x is None else pointer(x)) if x is None or isinstance(x, np.ndarray) else x)
        if value.dtype.kind not in "biufcV" or value.dtype.hasobject:
            raise ValueError(f"argument {i}: expected an array, a number, a tensor map or None, got {x!r}")
        if value.nbytes != size or (kind != "b" and (kind == "f") != (value.dtype.kind == "f")):
            raise ValueError(f"argument {i}: the kernel takes {size} bytes of type .{kind}, got {value.nbytes} of {value.dtype}")
        values.append(value)
    return values


def whole(name, x, end=2**63):
    """An integer from 0 to end - 1."""
    try:
        value = operator.index(x)
    except TypeError:
        value = -1
    if not 0 <= value < end:
        raise ValueError(f"{name}: expected an integer from 0 to {end - 1}, got {x!r}")
    return value


def shape_of(grid, block, cluster):
    """Three numbers each; a cluster of zeros if there is none."""
    shape = []
    for name, x in (("grid", grid), ("block", block), ("cluster", cluster or (0, 0, 0))):
        x = (x,) if np.ndim(x) == 0 else tuple(x)
        if not 1 <= len(x) <= 3:
            raise ValueError(f"{name}: expected one to three dimensions, got {x}")
        shape.append(tuple(whole(name, n, 2**32) for n in (*x, *[1] * (3 - len(x)))))
    return shape


def arrays_of(args, written, fresh):
    """The memory of a launch's arguments, for mapped()."""
    arrays = [(i, x.array if isinstance(x, TensorMap) else x) for i, x in enumerate(args)]
    arrays = {i: x for i, x in arrays if isinstance(x, np.ndarray)}
    written = arrays.keys() if written is None else written
    if not all(isinstance(indices, collections.abc.Collection) for indices in (written, fresh)):
        raise ValueError(f"written and fresh: expected sets of indices, got {written!r} and {fresh!r}")
    for i in {*written, *fresh} - arrays.keys():
        raise ValueError(f"written and fresh: expected indices of array arguments, got {i}")
    for i, x in arrays.items():
        if x.dtype.hasobject or not x.dtype.isnative:
            raise ValueError(f"argument {i}: expected plain numbers in this machine's byte order, got {x.dtype}")
        if i in written and not x.flags.writeable:
            raise ValueError(f"argument {i}: a read-only array, and the kernel may write it")
    return [(f"argument {i}", x, i in written, i not in fresh) for i, x in arrays.items()]


def memory_of(array):
    """(address, bytes) from the first to the last element of an array in its own strides."""
    low = sum((n - 1) * s for n, s in zip(array.shape, array.strides) if s < 0)
    high = sum((n - 1) * s for n, s in zip(array.shape, array.strides) if s > 0)
    return array.ctypes.data + low, high - low + array.itemsize if array.size else 0


def ranges_of(arrays, present):
    """[[address, bytes, name, writable, initialised]] of the memory of (name, array, writable, initialised): arrays that overlap are one,
    writable and initialised if one of them is. `present`, {address: bytes}, is there already; ValueError if an array is so in part."""
    found = []
    for name, array, writable, initialised in sorted(arrays, key=lambda a: memory_of(a[1])[0]):
        address, size = memory_of(array)
        over = [(a, n) for a, n in present.items() if a < address + size and address < a + n]
        if not size or any(a <= address and address + size <= a + n for a, n in over):
            continue
        if over:
            raise ValueError(f"{name}: a part of this array is mapped already, and a part is not")
        if found and address < found[-1][0] + found[-1][1]:
            last = found[-1]
            last[1:] = max(last[1], address + size - last[0]), f"{last[2]} and {name}", last[3] or writable, last[4] or initialised
        else:
            found.append([address, size, name, writable, initialised])
    return found


class TensorMap:
    """A CUtensorMap of an array; `box` and the array's shape outermost first. swizzle: 0, 32, 64 or 128 bytes."""
    TYPES = {"uint8": 0, "uint16": 9, "float16": 6, "float32": 7, "int32": 3}  # uint16 holds bfloat16

    def __init__(self, array, box, swizzle=0):
        if not isinstance(array, np.ndarray) or array.ndim < 1 or array.dtype.name not in self.TYPES or not array.dtype.isnative:
            raise ValueError(f"a tensor map: expected an array of one of {list(self.TYPES)}, got {getattr(array, 'dtype', array)!r}")
        if np.ndim(box) != 1 or len(box) != array.ndim:
            raise ValueError(f"a tensor map's box: expected {array.ndim} dimensions, got {box}")
        if swizzle not in (0, 32, 64, 128):
            raise ValueError(f"a tensor map's swizzle: expected 0, 32, 64 or 128, got {swizzle}")
        if array.strides[-1] != array.itemsize:
            raise ValueError(f"a tensor map's innermost dimension is contiguous: expected a stride of {array.itemsize} bytes, "
                             f"got {array.strides[-1]}")
        self.array, self.box, self.swizzle = array, tuple(whole("a tensor map's box", n, 2**32) for n in box), swizzle


def encode(function, tensor, pointer):
    """The 128 bytes that `function` (cuTensorMapEncodeTiled) makes; LaunchError if it refuses."""
    a, memory = tensor.array, np.zeros(192, np.uint8)
    memory = memory[-memory.ctypes.data % 64:][:128]
    dims, strides = (ctypes.c_uint64 * a.ndim)(*a.shape[::-1]), (ctypes.c_uint64 * a.ndim)(*a.strides[-2::-1])
    box, ones = (ctypes.c_uint32 * a.ndim)(*tensor.box[::-1]), (ctypes.c_uint32 * a.ndim)(*[1] * a.ndim)
    status = function(ctypes.c_void_p(memory.ctypes.data), TensorMap.TYPES[a.dtype.name], a.ndim, ctypes.c_void_p(pointer), dims, strides, box,
                      ones, 0, {0: 0, 32: 1, 64: 2, 128: 3}[tensor.swizzle], 0, 0)
    if status:
        raise LaunchError(f"cuTensorMapEncodeTiled refused a box of {tensor.box} of shape {a.shape}")
    return memory


class Gpu:
    """The virtual GPU's settings. There is one device: the last Gpu made is the one that runs.

    arch: 80 or 90 (sm_90a). seed: of the schedule; under 0 diverged lanes always come together again. random_completion:
    asynchronous work completes at random moments, not at the last legal one. sm_count: few, so that persistent kernels loop."""
    virtual = True

    def __init__(self, arch=90, seed=0, random_completion=False, sm_count=4, **options):
        self.lib, self.arch = library(), arch
        self.settings = dict(architecture=arch, seed=seed, random_completion=random_completion, sm_count=sm_count,
                             instruction_limit=20_000_000_000, max_reports=20) | options
        self.counters = []

    def start(self):
        for name, value in self.settings.items():
            if self.lib.c.vgpu_set(name.encode(), whole(name, value)):
                raise ValueError(f"{name}: there is no such setting of {value!r}; architecture is 80 or 90, counts are positive")
        self.lib.c.vgpu_clear()

    def finish(self, ptx_of=None):
        """Takes the counters; raises Failure if there are reports. ptx_of: the text that a kernel comes from, else the library's."""
        ptx_of = ptx_of or self.library_ptx_of
        self.counters += [Counters(c, ptx_of) for c in json.loads(self.lib.c.vgpu_counters())]
        reports = json.loads(self.lib.c.vgpu_reports())
        self.lib.c.vgpu_clear()
        if reports:
            raise Failure(reports, ptx_of)

    def mapped(self, arrays):
        """Context in which these (name, array, writable, initialised) are device memory, through all launches in it; what is mapped
        already stays as it is."""
        return _Mapped(self.lib.c, arrays)

    def module(self, ptx):
        return Module(self, ptx)

    @staticmethod
    @functools.cache
    def library_ptx():
        """The PTX texts of the library's own kernels, for resources()."""
        c = library().c
        return [c.vgpu_text(c.vgpu_library_module(i)).decode() for i in range(c.vgpu_library_modules())]

    def library_ptx_of(self, kernel):
        """The text of one of them that runs on this architecture."""
        target = {ptx: int(re.search(r"\.target sm_(\d+)", ptx)[1]) for ptx in self.library_ptx() if kernel in kernels_of(ptx)}
        return max((ptx for ptx in target if target[ptx] <= self.arch), key=target.get)

    def call(self, op, outputs=(), **fields):
        """An op of the C API on numpy arrays. outputs: names of the fields that it only writes; they may be strided."""
        arrays = [(name, x, name in outputs or name in MUTATED.get(op, ()), name not in outputs)
                  for name, x in fields.items() if isinstance(x, np.ndarray)]
        self.start()
        context = self.lib.context(arch={80: "sm80", 90: "sm90"}[self.arch], device="cuda")
        size = self.lib.workspace_size(op, context, **fields)
        workspace = np.full(max(size, 1), 0xFF, np.uint8)
        with self.mapped(arrays + [("workspace", workspace, True, False)]):
            self.lib.call(op, context, workspace=workspace[:size], **fields)
            self.finish()


MUTATED = {"apply_rope": ("q", "k"), "rolling_attention": ("k_cache", "v_cache")}


class _Mapped:
    now = {}  # address: bytes

    def __init__(self, c, arrays):
        self.c, self.ranges = c, ranges_of(arrays, self.now)

    def __enter__(self):
        for address, size, name, writable, initialised in self.ranges:
            self.c.vgpu_map(address, size, name.encode(), writable, initialised)
            self.now[address] = size

    def __exit__(self, *error):
        for address, *_ in self.ranges:
            self.c.vgpu_unmap(address)
            del self.now[address]


class Module:
    """Kernels from PTX text."""

    def __init__(self, gpu, ptx):
        self.gpu, self.c, self.ptx, self.kernels = gpu, gpu.lib.c, ptx, kernels_of(ptx)
        self.handle = self.c.vgpu_load(ptx.encode())
        if not self.handle:
            raise LaunchError(self.c.vgpu_error().decode())

    @property
    def resources(self):
        return resources(self.ptx)

    def __del__(self):
        if getattr(self, "handle", None):
            self.c.vgpu_unload(self.handle)

    def launch(self, kernel, grid=1, block=32, args=(), shared=0, cluster=(), written=None, fresh=(), programmatic=False,
               cooperative=False):
        """Runs a kernel. kernel: its name, or a part of its mangled name that one kernel has. args: numpy arrays (device memory),
        numpy scalars, TensorMaps. written: indices of the arrays that it may write (None: all). fresh: indices of those whose
        contents are undefined when it starts. programmatic: it may start before the launch before it ends (griddepcontrol).
        cooperative: its blocks may wait for each other (cooperative_groups' grid sync); a grid that is not resident as a whole is refused."""
        name = one_kernel(self.kernels, kernel)
        values = values_of(args, self.kernels[name], lambda array: array.ctypes.data, self.c.vgpu_encode_tiled)
        shape, shared = [(ctypes.c_uint32 * 3)(*x) for x in shape_of(grid, block, cluster)], whole("shared", shared)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(value.ctypes.data for value in values))
        self.gpu.start()
        with self.gpu.mapped(arrays_of(args, written, fresh)):
            if self.c.vgpu_launch(self.handle, name.encode(), *shape, shared, programmatic, cooperative, pointers):
                raise LaunchError(self.c.vgpu_error().decode())
            self.gpu.finish(lambda kernel: self.ptx)


@functools.cache
def resources(ptx):
    """What ptxas says of each kernel: {name: dict(registers, spills: bytes, shared_bytes: static ones, wgmma_warnings)}."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    done = subprocess.run(["ptxas", "-v", f"-arch={arch}", "-o", "/dev/null", "/dev/stdin"], input=ptx, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(done.stderr)
    found, name = {}, None
    warnings = [line for line in done.stderr.splitlines() if re.search(r"\(C\d+\)|warning", line)]  # C75xx: what ptxas does to wgmma
    for line in done.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
            found[name] = dict(registers=0, spills=0, shared_bytes=0, wgmma_warnings=[w for w in warnings if f"'{name}'" in w])
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found[name]["spills"] = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(match[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                found[name]["shared_bytes"] = int(shared[1])
    return found
