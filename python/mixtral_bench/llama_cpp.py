"""llama.cpp on the CPU as a peer, through ggml's C API (ctypes) in the shared libraries that llama-cpp-python brings.

The graphs are those of llama.cpp's models: activations f32, weights as they are (not copied), keys and values in f16, its default. A step
adds the values of thousands of keys in f16, too: relative errors of 0.007 to 0.01.
"""

import ctypes
import functools
import importlib
import math
import weakref
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

TYPES = {torch.float32: 0, torch.float16: 1, torch.int32: 26, torch.bfloat16: 30}  # enum ggml_type
POINTER = c_void_p


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


BASE = {  # name -> result, arguments
    "ggml_init": (POINTER, InitParams),
    "ggml_free": (None, POINTER),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_new_tensor": (POINTER, POINTER, c_int, c_int, ctypes.POINTER(c_int64)),
    "ggml_view_2d": (POINTER, POINTER, POINTER, c_int64, c_int64, c_size_t, c_size_t),
    "ggml_view_3d": (POINTER, POINTER, POINTER, c_int64, c_int64, c_int64, c_size_t, c_size_t, c_size_t),
    "ggml_permute": (POINTER, POINTER, POINTER, c_int, c_int, c_int, c_int),
    "ggml_mul_mat_id": (POINTER, POINTER, POINTER, POINTER, POINTER),
    "ggml_swiglu_split": (POINTER, POINTER, POINTER, POINTER),
    "ggml_mul": (POINTER, POINTER, POINTER, POINTER),
    "ggml_add": (POINTER, POINTER, POINTER, POINTER),
    "ggml_flash_attn_ext": (POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, c_float, c_float, c_float),
    "ggml_new_graph": (POINTER, POINTER),
    "ggml_build_forward_expand": (None, POINTER, POINTER),
    "ggml_get_data": (POINTER, POINTER),
    "ggml_backend_cpu_buffer_type": (POINTER,),
    "ggml_backend_cpu_buffer_from_ptr": (POINTER, POINTER, c_size_t),
    "ggml_backend_buffer_free": (None, POINTER),
    "ggml_backend_tensor_alloc": (c_int, POINTER, POINTER, POINTER),
    "ggml_backend_graph_compute": (c_int, POINTER, POINTER),
    "ggml_gallocr_new": (POINTER, POINTER),
    "ggml_gallocr_alloc_graph": (c_bool, POINTER, POINTER),
    "ggml_gallocr_free": (None, POINTER),
}
CPU = {"ggml_backend_cpu_init": (POINTER,), "ggml_backend_cpu_set_n_threads": (None, POINTER, c_int)}


@functools.cache
def library() -> dict:
    """name -> function."""
    folder = Path(importlib.import_module("llama_cpp").__file__).parent / "lib"
    found = {}
    for file, names in (("libggml-base.so", BASE), ("libggml-cpu.so", CPU)):
        loaded = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
        for name, (result, *arguments) in names.items():
            found[name] = getattr(loaded, name)
            found[name].restype, found[name].argtypes = result, arguments
    return found


@functools.cache
def backend():
    return library()["ggml_backend_cpu_init"]()


class Graph:
    """A ggml graph over the memory of torch tensors. `graph.mul(a, b)` is ggml_mul in its context; shapes are ggml's, torch's reversed."""

    def __init__(self):
        ggml, self.buffers, self.kept = library(), [], []
        size = 64 * ggml["ggml_tensor_overhead"]() + ggml["ggml_graph_overhead"]()
        self.context = ggml["ggml_init"](InitParams(size, None, True))
        self.allocator = ggml["ggml_gallocr_new"](ggml["ggml_backend_cpu_buffer_type"]())
        weakref.finalize(self, release, self.context, self.allocator, self.buffers)

    def __getattr__(self, name):
        return functools.partial(library()[f"ggml_{name}"], self.context)

    def tensor(self, t: torch.Tensor):
        t = t.contiguous()
        shape = (c_int64 * t.ndim)(*reversed(t.shape))
        made = self.new_tensor(TYPES[t.dtype], t.ndim, shape)
        buffer = library()["ggml_backend_cpu_buffer_from_ptr"](t.data_ptr(), t.nbytes)
        library()["ggml_backend_tensor_alloc"](buffer, made, t.data_ptr())
        self.buffers.append(buffer)
        self.kept.append(t)
        return made

    def call(self, result, *shape):
        """-> a function that computes `result`, f32, as a tensor of this shape."""
        ggml, graph = library(), self.new_graph()
        ggml["ggml_build_forward_expand"](graph, result)
        if not ggml["ggml_gallocr_alloc_graph"](self.allocator, graph):
            raise MemoryError("ggml has no memory for the graph")
        ggml["ggml_backend_cpu_set_n_threads"](backend(), torch.get_num_threads())
        memory = (c_float * math.prod(shape)).from_address(ggml["ggml_get_data"](result))
        out = torch.frombuffer(memory, dtype=torch.float32).view(shape)

        def compute(graph_of=self):  # whose end frees what the call works on
            if status := ggml["ggml_backend_graph_compute"](backend(), graph):
                raise RuntimeError(f"ggml_backend_graph_compute: status {status}")
            return out

        return compute


def release(context, allocator, buffers):
    for buffer in buffers:
        library()["ggml_backend_buffer_free"](buffer)
    library()["ggml_gallocr_free"](allocator)
    library()["ggml_free"](context)


def experts(case, inputs):
    """The expert layer, gate and up in one product as llama.cpp has them in files with merged experts -> f32 [T, H]."""
    hidden, w_gate_up, w_down = (inputs[name] for name in ("hidden", "w_gate_up", "w_down"))
    (tokens, k), inner, width = inputs["topk_ids"].shape, w_down.shape[2], hidden.shape[1]
    graph = Graph()
    ids = graph.tensor(inputs["topk_ids"])
    both = graph.mul_mat_id(graph.tensor(w_gate_up), graph.tensor(hidden.float()[:, None]), ids)  # [2I, K, T]
    gate, up = (graph.view_3d(both, inner, k, tokens, 8 * inner, 8 * inner * k, at) for at in (0, 4 * inner))
    rows = graph.mul_mat_id(graph.tensor(w_down), graph.swiglu_split(gate, up), ids)  # [H, K, T]
    rows = graph.mul(rows, graph.tensor(inputs["topk_weights"][..., None]))
    parts = [graph.view_2d(rows, width, tokens, 4 * width * k, 4 * width * j) for j in range(k)]
    out = functools.reduce(graph.add, parts) if k > 1 else rows
    return graph.call(out, tokens, width)


def attention(q, k, v, mask, scale):
    """q [B, n, Hq, D], k and v [B, m, Hk, D], mask [n, m] (0 or -inf) or None: all keys -> a function that gives f32 [B, n, Hq, D]."""
    graph = Graph()
    q, k, v = (graph.permute(graph.tensor(t.to(dtype)), 0, 2, 1, 3) for t, dtype in
               ((q, torch.float32), (k, torch.float16), (v, torch.float16)))
    mask = None if mask is None else graph.tensor(mask.half())
    return graph.call(graph.flash_attn_ext(q, k, v, mask, scale, 0.0, 0.0), *graph.kept[0].shape)
