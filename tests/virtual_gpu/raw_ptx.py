"""Kernels from a few lines of PTX, for tests of the virtual GPU.

A body is text; its lines count from 1 and are what reports call "k.cu:<line>". Before it runs, %t is the thread in the block, %b
the block, %g the thread in the grid (x only), %lane the lane and %warp the warp (64-bit: %gl, %tl), %rank the rank in the cluster
(sm_90), %smem the address of `memory`, if there is any. Argument i is in the register of its name, the generic address if it is a
tensor map. Without names it is in %a<i> if it is an array or has 64 bits, else in %n<i>; %x<i> is argument i plus 4 %g, %y<i> plus
16 %g. Registers %p, %h (16 bits), %r, %l (64 bits), %f and %d are declared. The line at which a planted bug must be reported ends
in "// caught", or is the one with a text that the test names.
"""
import re

import numpy as np
import pytest

import vgpu

REGISTERS = """.reg .pred %p<32>; .reg .b16 %h<64>; .reg .b32 %r<300>; .reg .b64 %l<64>; .reg .f32 %f<64>; .reg .f64 %d<16>;
.reg .b32 %t, %b, %g, %lane, %warp, %blockdim, %rank, %smem; .reg .b64 %gl, %tl;"""


def size_of(argument):
    return 8 if isinstance(argument, np.ndarray) else argument.nbytes


def kernel(body, args, arch=80, variables="", module_variables="", names="", memory=0, directives=""):
    """PTX of a kernel k with this body. variables: declarations of the kernel; module_variables: of the module; names: of the
    arguments; memory: bytes of shared memory of that name; directives: of the kernel, such as .maxntid."""
    params, load = [], ["mov.u32 %rank, %cluster_ctarank;"] * (int(str(arch)[:2]) >= 90)
    if memory:
        load.append(f".shared .align 1024 .b8 memory[{memory}]; mov.u32 %smem, memory;")
    for i, (x, name) in enumerate(zip(args, names.split() or [""] * len(args), strict=True)):
        if isinstance(x, vgpu.TensorMap):
            params.append(f".param .align 128 .b8 q{i}[128]")
            load.append(f".reg .b64 {name}; mov.b64 {name}, q{i}; cvta.param.u64 {name}, {name};")
        elif size_of(x) in (4, 8):
            bits, register = f"b{8 * size_of(x)}", name or f"%{'a' if size_of(x) == 8 else 'n'}{i}"
            params.append(f".param .{bits} q{i}")
            load.append(f".reg .{bits} {register}; ld.param.{bits} {register}, [q{i}];")
            if bits == "b64" and not name:
                load.append(f".reg .b64 %x{i}, %y{i}; mad.wide.u32 %x{i}, %g, 4, {register}; mad.wide.u32 %y{i}, %g, 16, {register};")
        else:
            params.append(f".param .align 16 .b8 q{i}[{size_of(x)}]")
    lines = [f".loc 1 {n} 1\n{line}" for n, line in enumerate(body.split("\n"), 1)]
    return "\n".join([".version 8.7", f".target sm_{arch}", ".address_size 64", '.file 1 "k.cu"', module_variables,
                      f".visible .entry k({', '.join(params)}) {directives} {{", REGISTERS, variables, ".loc 1 1000 1",
                      "mov.u32 %t, %tid.x; mov.u32 %b, %ctaid.x; mov.u32 %blockdim, %ntid.x; mad.lo.u32 %g, %b, %blockdim, %t;",
                      "mov.u32 %lane, %laneid; shr.u32 %warp, %t, 5; cvt.u64.u32 %gl, %g; cvt.u64.u32 %tl, %t;", *load, *lines,
                      ".loc 1 1001 1", "ret;", "}"])


def run(body, *args, arch=80, variables="", module_variables="", names="", memory=0, directives="", seed=0, random_completion=False,
        options=None, **launch):
    """Launches the kernel once and returns its counters (None on an NVIDIA GPU)."""
    gpu = vgpu.Gpu(arch=int(str(arch)[:2]), seed=seed, random_completion=random_completion, **dict(instruction_limit=10**8) | (options or {}))
    gpu.module(kernel(body, args, arch, variables, module_variables, names, memory, directives)).launch("k", args=args, **launch)
    return gpu.counters[-1] if gpu.virtual else None


def lines_with(text, body):
    return {f"k.cu:{n}" for n, line in enumerate(body.split("\n"), 1) if text in line}


def caught(kind, body, *args, also=(), **more):
    """Runs a kernel that must be reported with this kind at a line marked "// caught" (of several: at any of them; a race is found
    by whoever comes second), and otherwise only with what is in `also`: (kind, line) pairs. kind: of several, one|another."""
    lines = lines_with("// caught", body)
    with pytest.raises(vgpu.Failure) as failure:
        run(body, *args, **more)
    found = {(r["kind"], r["where"]) for r in failure.value.reports} - {(k, f"k.cu:{line}") for k, line in also}
    assert lines and found and found <= {(k, line) for k in kind.split("|") for line in lines}, str(failure.value)
    return failure.value.reports


def twins(body):
    """The two kernels of a text with <<wrong|right>> in it."""
    assert "<<" in body
    return [re.sub(r"<<(.*?)\|(.*?)>>", rf"\{i}", body, flags=re.DOTALL) for i in (1, 2)]


# What else may follow from a mistake that Kernel.caught looks for, beside the same kind at other statements.
FOLLOWS = {
    # What should be ordered is not.
    "barrier": ("race", "exited-block"),
    "exited-block": ("race", "uninitialised"),
    # What was refused is not done: somebody waits for it, reads it, or the transactions are left over.
    "deadlock": ("mbarrier",), "descriptor": ("deadlock",), "misaligned": ("deadlock", "mbarrier"), "mbarrier": ("deadlock", "race"),
    "out-of-range": ("deadlock", "uninitialised", "in-flight", "read-only"),
    # The same conflict after the copy's end; values that are not there yet, and a kernel that traps at them; a copy beyond its block's end.
    "in-flight": ("race", "uninitialised", "mbarrier", "exited-block", "trap"),
    # What comes too early finds nothing, no mbarrier, no fence, or a copy at work, and its signal counts for the phase before.
    "race": ("uninitialised", "in-flight", "mbarrier", "proxy", "barrier", "exited-block", "deadlock"),
    # As an address, count or coordinate.
    "uninitialised": ("deadlock", "mbarrier", "out-of-range"),
    # Neither the registers nor the operands are free.
    "wgmma": ("in-flight", "uninitialised")}


class Kernel:
    """A body for sm_90a with what `run` takes beside it, and bodies made from it by replacing pieces of text."""

    def __init__(self, names, body, **options):
        self.body, self.options = body, dict(arch="90a", names=names, memory=16) | options

    def run(self, *args, **more):
        return run(self.body, *args, **self.options, **more)

    def edit(self, *changes, **options):
        """changes: old, new, old, new, ... Each old piece must be there once."""
        body = self.body
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert body.count(old) == 1, (old, body.count(old))
            body = body.replace(old, new)
        return Kernel(body=body, **self.options | options)

    def caught(self, run, kind, at, text="", least=None):
        """Each run(self, seed) must end in a report whose kind matches, at the one line that holds `at`, whose text matches `text`;
        or at least so many of eight, where the schedule decides what goes wrong first. Other kinds of report are those that follow."""
        where, = lines_with(at, self.body)
        kinds = {*kind.split("|")}.union(*(FOLLOWS.get(k, ()) for k in kind.split("|")))
        hits = 0
        for seed in range(8 if least else 3):
            with pytest.raises(vgpu.Failure) as failure:
                run(self, seed)
            assert {r["kind"] for r in failure.value.reports} <= kinds, f"expected {kind} and what follows from it, got\n{failure.value}"
            hits += any(re.fullmatch(kind, r["kind"]) and r["where"] == where and re.search(text, r["text"]) for r in failure.value.reports)
            assert hits > seed or least, f"expected {kind} at {where}, got\n{failure.value}"
        assert hits >= (least or 3), f"{hits} of 8 schedules showed {kind} at {where}, the last one\n{failure.value}"


def only(condition, body):
    """`body` for the threads of which a comparison holds: only("%t eq 0", ...)."""
    a, op, b = condition.split()
    return f"{{ .reg .pred here; setp.{op}.u32 here, {a}, {b}; @!here bra AFTER;\n{body}\nAFTER: }}"


def wait(barrier, parity, how="try_wait.parity"):
    return f"{{ .reg .pred done; AGAIN: mbarrier.{how}.shared::cta.b64 done, [{barrier}], {parity}; @!done bra AGAIN; }}"


def aligned(shape, dtype, offset=0):
    """Zeros whose first element lies `offset` bytes behind a multiple of 256."""
    dtype = np.dtype(dtype)
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize + 512, np.uint8)
    begin = -memory.ctypes.data % 256 + offset
    return memory[begin:begin + int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)
