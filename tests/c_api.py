"""The C API (csrc/include/mixtral_ext.h) on numpy arrays through ctypes: the same calls a C program makes, on any build of
the library. bfloat16 arrays are uint16 arrays of their bits: no op takes integers of 16 bits."""
import ctypes
import random
import threading
from pathlib import Path

import numpy as np

NATIVE = Path(__file__).parents[1] / "mixtral_ext/lib/libmixtral_ext.so.0"

OK, INVALID_ARGUMENT, NOT_SUPPORTED, WORKSPACE, CUDA, OUT_OF_MEMORY = range(6)
I32, I64, F16, F32, BF16 = 0x00012000, 0x00014000, 0x00011002, 0x00012002, 0x00011004
DTYPES = {"int32": I32, "int64": I64, "float16": F16, "float32": F32, "uint16": BF16}
ARCHS = {"auto": 0, "portable": 1, "avx2": 2, "avx512": 3, "avx512_bf16": 4, "amx": 5, "sm80": 80, "sm90": 90}
CPU_ARCHS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


class MixtralError(Exception):
    """A call that did not return MIXTRAL_OK: `status` and the text of mixtral_last_error()."""

    def __init__(self, status, message):
        super().__init__(f"status {status}: {message}")
        self.status, self.message = status, message


# ------------------------------------------------------------------------------------------------------ the structs

class Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("shape", ctypes.c_int64 * 4), ("stride", ctypes.c_int64 * 4)]


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
ParallelFor = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, Task, ctypes.c_void_p)


class ContextOptions(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t), ("device_type", ctypes.c_int32), ("device_index", ctypes.c_int32),
                ("arch", ctypes.c_int32), ("reserved", ctypes.c_int32), ("parallel_for", ParallelFor),
                ("pool", ctypes.c_void_p)]


def _params(op, *fields):
    return type(op, (ctypes.Structure,), {"_fields_": [("struct_size", ctypes.c_size_t), *fields]})


def _tensors(names):
    return [(name, Tensor) for name in names.split()]


def _ints(names):
    return [(name, ctypes.c_int32) for name in names.split()]


def _longs(names):
    return [(name, ctypes.c_int64) for name in names.split()]


def _doubles(names):
    return [(name, ctypes.c_double) for name in names.split()]


OPS = {  # in the order of mixtral_op: op i is number i + 1
    "moe_gate": _params("moe_gate", *_tensors("router_logits"), *_ints("top_k renormalize"),
                        *_tensors("topk_weights topk_ids expert_offsets sorted_slots slot_rows")),
    "moe_sort": _params("moe_sort", *_tensors("topk_ids"), *_ints("num_experts reserved"),
                        *_tensors("expert_offsets sorted_slots slot_rows")),
    "moe_permute": _params("moe_permute", *_tensors("hidden sorted_slots"), *_ints("top_k reserved"), *_tensors("rows")),
    "moe_combine": _params("moe_combine", *_tensors("rows slot_rows topk_weights out")),
    "grouped_gemm": _params("grouped_gemm", *_tensors("a b expert_offsets a_rows"), *_ints("a_rows_divisor reserved"),
                            *_tensors("out")),
    "grouped_gemm_swiglu": _params("grouped_gemm_swiglu", *_tensors("a w_gate_up expert_offsets a_rows"),
                                   *_ints("a_rows_divisor reserved"), *_tensors("out")),
    "moe_experts": _params("moe_experts", *_tensors("hidden w_gate_up w_down topk_weights topk_ids expert_offsets "
                                                    "sorted_slots slot_rows out")),
    "sliding_window_attention": _params("sliding_window_attention",
                                        *_tensors("q k v cu_seqlens_q cu_seqlens_k k_start k_length"),
                                        *_longs("max_seqlen_q max_seqlen_k window"), *_doubles("softmax_scale"),
                                        *_tensors("out lse")),
    "rolling_attention": _params("rolling_attention",
                                 *_tensors("q k v k_cache v_cache cu_seqlens_q cache_lengths cache_slots"),
                                 *_longs("max_seqlen_q max_cache_length window"), *_doubles("softmax_scale rope_theta"),
                                 *_ints("rope_interleaved reserved"), *_tensors("out lse")),
    "apply_rope": _params("apply_rope", *_tensors("q k positions"), *_doubles("theta"), *_ints("interleaved reserved")),
}
# What a field that is not given holds, where that is not zero.
DEFAULTS = {"a_rows_divisor": 1, "max_cache_length": -1}

# ------------------------------------------------------------------------------------------------- arrays


def to_bf16(x):
    """float values -> uint16 bits of bfloat16, round to nearest even; NaN stays NaN."""
    x = np.asarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def to_f32(x):
    """float32, float16, or uint16 (bfloat16 bits) -> float32."""
    x = np.asarray(x)
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.astype(np.float32)


def cast(x, dtype):
    """Values in an element type by name: "float32", "float16" or "bfloat16" (as uint16 bits)."""
    return to_bf16(x) if dtype == "bfloat16" else np.asarray(x, dtype)


def tensor(array, dtype=None):
    """A mixtral_tensor over the memory of `array`, in its own strides; it does not keep the array alive."""
    if array.ndim > 4 or any(stride % array.itemsize for stride in array.strides):
        raise ValueError("a mixtral_tensor has at most 4 dimensions and strides of whole elements")
    pad = (0,) * (4 - array.ndim)
    return Tensor(array.ctypes.data, DTYPES[array.dtype.name] if dtype is None else dtype, array.ndim,
                  (*array.shape, *pad), (*(stride // array.itemsize for stride in array.strides), *pad))


# ------------------------------------------------------------------------------------------------- library


class Context:
    """A live mixtral_context of `library`; destroyed with this object."""

    def __init__(self, library, device_type, device_index, arch, parallel_for):
        self.library, self.parallel_for = library, parallel_for  # C keeps a pointer to it
        options = ContextOptions(ctypes.sizeof(ContextOptions), device_type, device_index, arch, 0,
                                 parallel_for or ParallelFor(), None)
        self.handle = ctypes.c_void_p()
        library.check(library.c.mixtral_context_create(ctypes.byref(options), ctypes.byref(self.handle)))
        self.arch = next(name for name, code in ARCHS.items() if code == library.c.mixtral_context_arch(self.handle))

    def __del__(self):
        if self.handle:
            self.library.c.mixtral_context_destroy(self.handle)


def scrambled_parallel_for(threads, seed=0):
    """A parallel_for that deals the tasks to `threads` threads in a random order."""
    rng = random.Random(seed)

    @ParallelFor
    def parallel_for(pool, count, task, task_data):
        order = list(range(count))
        rng.shuffle(order)

        def work(part):
            for index in part:
                task(task_data, index)
        workers = [threading.Thread(target=work, args=(order[i::threads],)) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return parallel_for


class Library:
    """One build of libmixtral_ext, loaded from `path`."""

    def __init__(self, path=NATIVE):
        self.path = Path(path)
        self.c = c = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        c.mixtral_last_error.restype = ctypes.c_char_p
        c.mixtral_context_create.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        c.mixtral_context_destroy.argtypes = [ctypes.c_void_p]
        c.mixtral_context_destroy.restype = None
        c.mixtral_context_arch.argtypes = [ctypes.c_void_p]
        c.mixtral_supports.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        for op in OPS:
            size, run = getattr(c, f"mixtral_{op}_workspace_size"), getattr(c, f"mixtral_{op}")
            size.argtypes, size.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_size_t
            run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def check(self, status):
        if status != OK:
            raise MixtralError(status, self.c.mixtral_last_error().decode())

    def context(self, arch="auto", threads=1, device="cpu", index=0):
        """threads=1: the library runs serially; more: tasks in random order on so many Python threads.
        A MixtralError (NOT_SUPPORTED) where machine or library lacks `arch` (a key of ARCHS)."""
        parallel_for = scrambled_parallel_for(threads) if threads > 1 else None
        return Context(self, {"cpu": 1, "cuda": 2}[device], index, ARCHS[arch], parallel_for)

    def archs(self):
        """The CPU architectures this library runs on this machine."""
        def has(arch):
            try:
                self.context(arch)
            except MixtralError as error:
                if error.status != NOT_SUPPORTED:
                    raise
                return False
            return True
        return [arch for arch in CPU_ARCHS if has(arch)]

    def params(self, op, **fields):
        """The op's params struct: arrays become tensors, None and what is not given is absent (or the DEFAULTS)."""
        struct = OPS[op](struct_size=ctypes.sizeof(OPS[op]))
        for name, value in {**{k: v for k, v in DEFAULTS.items() if hasattr(struct, k)}, **fields}.items():
            if not hasattr(struct, name):
                raise TypeError(f"mixtral_{op} has no field {name}")
            if value is not None:
                setattr(struct, name, tensor(value) if isinstance(value, np.ndarray) else value)
        return struct

    def workspace_size(self, op, context, **fields):
        struct = self.params(op, **fields)
        return getattr(self.c, f"mixtral_{op}_workspace_size")(context.handle, ctypes.byref(struct))

    def supports(self, op, context, **fields):
        """mixtral_supports as a status; without fields: whether the op exists on the context."""
        struct = ctypes.byref(self.params(op, **fields)) if fields else None
        return self.c.mixtral_supports(context.handle, list(OPS).index(op) + 1, struct)

    def call(self, op, context, *, workspace=None, stream=None, **fields):
        """Runs mixtral_<op>; a MixtralError for every status but MIXTRAL_OK.

        workspace: a uint8 array to use, or None for one of exactly the size the library asks for: full of 0xFF (NaN in every
        float type, -1 in every integer), at an odd address, and with guard bytes that must not change."""
        struct = self.params(op, **fields)
        guard = 64
        if workspace is None:
            size = getattr(self.c, f"mixtral_{op}_workspace_size")(context.handle, ctypes.byref(struct))
            block = np.full(guard + 1 + size + guard, 0xFF, np.uint8)
            start = guard + 1 - block.ctypes.data % 2
            block[:start] = block[start + size:] = 0x5A
            workspace = block[start:start + size]
        else:
            block, start, size = workspace, 0, workspace.size
        status = getattr(self.c, f"mixtral_{op}")(context.handle, ctypes.byref(struct), workspace.ctypes.data, size, stream)
        self.check(status)
        if block is not workspace:
            assert (block[:start] == 0x5A).all() and (block[start + size:] == 0x5A).all(), f"{op} wrote outside its workspace"
