"""What people use today for the attention of Mistral and Mixtral: PEERS[op] lists the peers of each op (see peer.Peer).

Left out is SDPA's "math", which holds all scores in memory.
"""

import functools
import importlib
import inspect
import math
import time
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from mixtral_bench import llama_cpp
from mixtral_bench.peer import Peer, Unsupported, heads_first, memory, need
from mixtral_ext import reference

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
FLASH_ATTN = {2: "flash_attn.flash_attn_interface", 3: "flash_attn_interface", 4: "flash_attn.cute"}  # their modules


def first(result):
    return result[0] if isinstance(result, tuple) else result


class Flex:
    """FlexAttention, compiled for each case, until that took `allowance` seconds altogether."""

    def __init__(self, allowance: float):
        self.allowance, self.seconds, self.key, self.attend = allowance, 0.0, None, None

    def compile(self, key, q, k, v, scale, mask_of=lambda: None):
        """-> a function of tensors of these shapes, [B, H, L, D]; `mask_of()` is the block mask; one function for calls with one key."""
        from torch.nn.attention.flex_attention import flex_attention

        if key == self.key:
            return self.attend
        if self.seconds > self.allowance:
            raise Unsupported(f"compiling for the cases before took {self.seconds:.0f} s, {self.allowance:g} are allowed")
        start, self.key = time.perf_counter(), None
        torch._dynamo.reset()  # else it stops to compile after 8 shapes
        try:
            attend = functools.partial(torch.compile(flex_attention, dynamic=False), block_mask=mask_of(), scale=scale, enable_gqa=True)
            attend(q, k, v)
            if q.is_cuda:
                torch.cuda.synchronize()
        finally:
            self.seconds += time.perf_counter() - start
        self.key, self.attend = key, attend
        return attend


FLEX = Flex(allowance=200)


# ------------------------------------------------------------------------------------------------------------ prompts


def bites(case) -> bool:
    """Whether the window hides keys that a causal mask shows."""
    return case.window is not None and case.window < max((keys for _, keys in case.sequences), default=0)


def prompt(case, inputs, single=False, aligned=False):
    """q [Tq, Hq, D], k and v [Tk, Hk, D], if the peer can do the case. single: one sequence; aligned: as many queries as keys."""
    if case.layout not in ("single", "packed"):
        raise Unsupported("packed sequences only")
    if single and len(case.sequences) > 1:
        raise Unsupported("one sequence a call")
    if aligned and any(queries != keys for queries, keys in case.sequences):
        raise Unsupported("its causal mask begins at the first key")
    return inputs["q"], inputs["k"], inputs["v"]


def window_size(case) -> dict:
    """flash-attn's: keys to the left and to the right of a query's own."""
    return {"window_size": (case.window - 1, 0)} if bites(case) else {}


def bounds(case, device) -> dict:
    """cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k."""
    both = [torch.tensor(column) for column in zip(*case.sequences)]
    starts = [torch.cat([n.new_zeros(1), n.cumsum(0)]).to(device, torch.int32) for n in both]
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*starts, *(int(n.max()) for n in both))))


@functools.lru_cache(2)
def mask(sequences, window, dtype, device) -> torch.Tensor:
    """[Tq, Tk]: 0 where a query sees a key, -inf elsewhere."""
    size = sum(n for n, _ in sequences) * sum(m for _, m in sequences) * dtype.itemsize
    need(size, memory(device)[1] / 4, "its mask")
    hidden = torch.full((sum(n for n, _ in sequences), sum(m for _, m in sequences)), -math.inf, dtype=dtype, device=device)
    row = column = 0
    for n, m in sequences:
        block = hidden[row:row + n, column:column + m]
        block.triu_(m - n + 1)  # row i sees the keys up to m - n + i
        if window is not None and window < m:
            block += torch.full_like(block, -math.inf).tril_(m - n - window)
        row, column = row + n, column + m
    return hidden


def sdpa(backend, drop_window, case, inputs):
    """SDPA has no window: with drop_window it computes the case without."""
    if bites(case) != drop_window:
        raise Unsupported("it has no window" if bites(case) else "the window hides no key")
    q, k, v = map(heads_first, prompt(case, inputs, single=True, aligned=True))
    scale = inputs["softmax_scale"]

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return call


def masked_sdpa(case, inputs):
    q, k, v = (heads_first(t).contiguous() for t in prompt(case, inputs))
    seen, scale = mask(case.sequences, case.window, q.dtype, q.device), inputs["softmax_scale"]
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def transformers_sdpa(case, inputs):
    """transformers repeats keys and values for each query head where there is a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not bites(case):
        raise Unsupported("without a window it calls SDPA")
    q, k, v = map(heads_first, prompt(case, inputs))
    seen = mask(case.sequences, case.window, q.dtype, q.device)[None, None]
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], is_causal=True)
    return lambda: sdpa_attention_forward(module, q, k, v, seen, scaling=inputs["softmax_scale"])[0][0]


def flex(case, inputs):
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = prompt(case, inputs)
    lengths = [torch.tensor(column, device=q.device) for column in zip(*case.sequences)]
    of_query, of_key = (torch.repeat_interleave(torch.arange(len(n), device=q.device), n) for n in lengths)
    single = len(case.sequences) == 1
    shift = lengths[1].cumsum(0) - lengths[0].cumsum(0)  # from a query's row to that of its own key
    shift = shift[0] if single else shift[of_query]
    window = case.window if bites(case) else None

    def visible(b, h, query, key):
        own = query + (shift if single else shift[query])
        seen = own >= key
        if window is not None:
            seen = seen & (key > own - window)
        return seen if single else seen & (of_query[query] == of_key[key])

    q, k, v = map(heads_first, (q, k, v))
    attend = FLEX.compile((case, q.dtype, q.device), q, k, v, inputs["softmax_scale"],
                          lambda: create_block_mask(visible, None, None, q.shape[2], k.shape[2], device=q.device))
    return lambda: attend(q, k, v)[0].transpose(0, 1)


def torch_varlen(case, inputs):
    """The flash kernel of SDPA with a window, from torch 2.10 on."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = prompt(case, inputs)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.11 just takes fewer heads
    sizes, seen = bounds(case, q.device), window_size(case) or {"window_size": (-1, 0)}
    return lambda: varlen_attn(q, k, v, *sizes.values(), scale=inputs["softmax_scale"], **seen, **grouped)


def flash_attn(version, case, inputs):
    q, k, v = prompt(case, inputs)
    module = importlib.import_module(FLASH_ATTN[version])
    rest = window_size(case) | {"causal": True, "softmax_scale": inputs["softmax_scale"]}
    if len(case.sequences) == 1:
        return lambda: first(module.flash_attn_func(q[None], k[None], v[None], **rest))[0]
    rest |= bounds(case, q.device)
    return lambda: first(module.flash_attn_varlen_func(q, k, v, **rest))


@functools.cache
def cudnn_handle():
    import cudnn

    return cudnn.create_handle()


@functools.lru_cache(1)
def cudnn_graph(case, dtype, strides):
    """The graph of a case, built once for all copies of its inputs -> graph, its tensors q, k, v and out. Its window's left bound counts the
    query's own key."""
    import cudnn

    kind = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}.get(dtype)
    if kind is None:
        raise Unsupported(f"no {dtype}")
    (queries, keys), = case.sequences
    shapes = [[1, heads, length, case.head_dim] for heads, length in ((case.heads, queries), (case.key_heads, keys), (case.key_heads, keys))]
    graph = cudnn.pygraph(handle=cudnn_handle(), io_data_type=kind, intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=cudnn.data_type.FLOAT)
    nodes = [graph.tensor(name=name, dim=shape, stride=list(stride), data_type=kind) for name, shape, stride in zip("qkv", shapes, strides)]
    left = {"diagonal_band_left_bound": case.window} if bites(case) else {}
    node, _ = graph.sdpa(name="sdpa", q=nodes[0], k=nodes[1], v=nodes[2], attn_scale=case.softmax_scale or 1 / math.sqrt(case.head_dim),
                         generate_stats=False, diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT, diagonal_band_right_bound=0, **left)
    node.set_output(True).set_dim(shapes[0]).set_stride(list(strides[0]))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, (*nodes, node)


def cudnn_frontend(case, inputs):
    """cuDNN's own graph, which has a window."""
    import cudnn

    q, k, v = prompt(case, inputs, single=True, aligned=True)
    out = torch.empty_like(q)
    tensors = [heads_first(t) for t in (q, k, v, out)]
    graph, nodes = cudnn_graph(case, q.dtype, tuple(t.stride() for t in tensors[:3]))
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
    arguments, handle = dict(zip(nodes, tensors)), cudnn_handle()

    def call():
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(arguments, workspace, handle=handle)
        return out

    return call


def llama_cpp_prompt(case, inputs):
    q, k, v = (t[None] for t in prompt(case, inputs))
    seen = mask(case.sequences, case.window, torch.float16, q.device)
    attend = llama_cpp.attention(q, k, v, seen, inputs["softmax_scale"] or q.shape[-1] ** -0.5)
    return lambda: attend()[0]


# ----------------------------------------------------------------------------------------------------------- decoding

ORDERED = WeakTensorKeyDictionary()  # the case's k_cache -> layout -> (k, v), which peers of the same inputs share


def step(case, inputs, heads_first: bool):
    """-> q [B, Hq, D] and all keys and values that it sees, the new ones at their end, rotated: [B, Hk, keys, D] or [B, keys, Hk, D]."""
    if any(n != 1 for n in case.chunks) or len(set(case.lengths)) != 1 or inputs["k"] is None or case.cache_slots:
        raise Unsupported("one new token for each of several sequences of one length")
    q, k, v = (inputs[name] for name in "qkv")
    length = case.lengths[0]
    if inputs["rope_theta"] is not None:
        positions = torch.full((len(q),), length, device=q.device)
        turned = reference.apply_rope(q.float(), k.float(), positions, inputs["rope_theta"], inputs["rope_interleaved"])
        q, k = (t.to(q.dtype) for t in turned)
    caches = inputs["k_cache"], inputs["v_cache"]
    shared = ORDERED.setdefault(caches[0], {})
    if heads_first not in shared:
        keys = length + 1 if case.window is None else min(case.window, length + 1)
        need(2 * len(q) * keys * k[0].numel() * k.element_size(), memory(q.device)[0], "a copy of the caches in order")
        slots = torch.arange(length + 1 - keys, length, device=q.device) % caches[0].shape[1]
        shared[heads_first] = []
        for cache, new in zip(caches, (k, v)):
            shape = (len(q), k.shape[1], keys, k.shape[2]) if heads_first else (len(q), keys, *k.shape[1:])
            ordered = cache.new_empty(shape)
            by_token = ordered.transpose(1, 2) if heads_first else ordered
            for b in range(len(q)):
                by_token[b, :-1], by_token[b, -1] = cache[b, slots], new[b]
            shared[heads_first].append(ordered)
    return q, *shared[heads_first]


def sdpa_decode(backend, rows, case, inputs):
    """rows: the query heads of a group as rows of one head, as transformers does."""
    q, k, v = step(case, inputs, heads_first=True)
    batch, heads, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, head_dim) if rows else q[:, :, None]
    scale = inputs["softmax_scale"]

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(grouped, k, v, scale=scale, enable_gqa=not rows).reshape(batch, heads, head_dim)

    return call


def flex_decode(case, inputs):
    q, k, v = step(case, inputs, heads_first=True)
    if k.numel() > 2**31:
        raise Unsupported("its kernels may count elements in 32 bits, and a cache has more than 2^31")
    q = q[:, :, None]
    attend = FLEX.compile((case, q.dtype, q.device), q, k, v, inputs["softmax_scale"])
    return lambda: attend(q, k, v)[:, :, 0]


def flash_attn_decode(version, case, inputs):
    q, k, v = step(case, inputs, heads_first=False)
    q, module = q[:, None], importlib.import_module(FLASH_ATTN[version])
    rest = {"causal": True, "softmax_scale": inputs["softmax_scale"]}
    if version == 4:  # it has no function for caches
        return lambda: first(module.flash_attn_func(q, k, v, **rest))[:, 0]
    lengths = torch.full((len(q),), k.shape[1], dtype=torch.int32, device=q.device)
    return lambda: first(module.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, **rest))[:, 0]


def llama_cpp_decode(case, inputs):
    q, k, v = step(case, inputs, heads_first=False)
    attend = llama_cpp.attention(q[:, None], k, v, None, inputs["softmax_scale"] or q.shape[-1] ** -0.5)
    return lambda: attend()[:, 0]


# ---------------------------------------------------------------------------------------------------------- the lists


def devices(backend: str) -> tuple:
    return ("cpu", "cuda") if backend == "flash" else ("cuda",)


def flash_attn_peers(prepare) -> list[Peer]:
    return [Peer(f"flash-attn {version}", functools.partial(prepare, version), ("cuda",), package, FLASH_ATTN[version])
            for version, package in ((2, "flash-attn"), (3, "flash-attn-3"), (4, "flash-attn-4"))]


LLAMA_CPP = dict(devices=("cpu",), package="llama-cpp-python", module="llama_cpp", tolerance=0.02)  # it adds up in f16

PEERS: dict[str, list[Peer]] = {
    "sliding_window_attention": [
        *(Peer(f"SDPA {name}", functools.partial(sdpa, backend, False), devices(name)) for name, backend in BACKENDS.items()),
        *(Peer(f"SDPA {name}, no window", functools.partial(sdpa, backend, True), devices(name), changed={"window": None})
          for name, backend in BACKENDS.items()),
        Peer("masked SDPA", masked_sdpa),
        Peer("transformers sdpa", transformers_sdpa, package="transformers", module="transformers"),
        Peer("FlexAttention", flex),
        Peer("torch varlen_attn", torch_varlen, ("cuda",), module="torch.nn.attention.varlen"),
        Peer("cuDNN frontend", cudnn_frontend, ("cuda",), "nvidia-cudnn-frontend", "cudnn"),
        *flash_attn_peers(flash_attn),
        Peer("llama.cpp", llama_cpp_prompt, **LLAMA_CPP),
    ],
    "rolling_attention": [
        *(Peer(f"SDPA {name}{', heads as rows' if rows else ''}", functools.partial(sdpa_decode, backend, rows), devices(name))
          for name, backend in BACKENDS.items() for rows in (False, True)),
        Peer("FlexAttention", flex_decode),
        *flash_attn_peers(flash_attn_decode),
        Peer("llama.cpp", llama_cpp_decode, **LLAMA_CPP),
    ],
}
