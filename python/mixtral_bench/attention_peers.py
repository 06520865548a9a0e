"""What people use today for the attention of Mistral and Mixtral on an NVIDIA GPU, each as a function that prepares a call.

Packed prompts: q [T, Hq, D], k and v [T, Hk, D], causal -> [T, Hq, D]. Decoding: q [B, Hq, D], k and v [B, L, Hk, D], all keys of which
are visible -> [B, Hq, D]; nothing is rotated or stored. A function raises where its library is missing or refuses: that is recorded. Left
out is SDPA's "math", which holds all scores in memory.
"""

import functools
import importlib
import inspect
import math
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
FLASH_ATTN = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}  # their modules


def heads_first(t: torch.Tensor) -> torch.Tensor:
    """[T, H, D] or [B, L, H, D] -> [B, H, L, D], the same memory."""
    return (t[None] if t.ndim == 3 else t).transpose(1, 2)


def first(result):
    return result[0] if isinstance(result, tuple) else result


class Flex:
    """FlexAttention, compiled anew for every row, until that took `allowance` seconds altogether."""

    def __init__(self, allowance: float):
        self.allowance, self.seconds = allowance, 0.0

    def compile(self, q, k, v, mask_of=lambda: None):
        """-> a function of tensors of these shapes, [B, H, L, D]; `mask_of()` is the block mask."""
        from torch.nn.attention.flex_attention import flex_attention

        if self.seconds > self.allowance:
            raise TimeoutError(f"compiling for the rows before took {self.seconds:.0f} s, {self.allowance:g} are allowed")
        start, compiled = time.perf_counter(), flex_attention
        if q.is_cuda:
            torch._dynamo.reset()  # else it stops to compile after 8 shapes
            compiled = torch.compile(flex_attention, dynamic=False)
        try:
            attend = functools.partial(compiled, block_mask=mask_of(), enable_gqa=True)
            attend(q, k, v)
            if q.is_cuda:
                torch.cuda.synchronize()
        finally:
            self.seconds += time.perf_counter() - start
        return attend


# ------------------------------------------------------------------------------------------------------------ prompts


def sdpa_causal(backend, q, k, v):
    """One prompt without a window, which SDPA does not have."""
    q, k, v = map(heads_first, (q, k, v))

    def call():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    return call


def flex(compiler: Flex, q, k, v, lengths, window):
    from torch.nn.attention.flex_attention import create_block_mask

    total, device = len(q), q.device
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))

    def visible(b, h, query, key):
        seen = query >= key
        if window is not None:
            seen = seen & (key > query - window)
        return seen & (sequence[query] == sequence[key]) if len(lengths) > 1 else seen

    q, k, v = map(heads_first, (q, k, v))
    attend = compiler.compile(q, k, v, lambda: create_block_mask(visible, None, None, total, total, device=device))
    return lambda: attend(q, k, v)[0].transpose(0, 1)


def torch_varlen(q, k, v, bounds, longest, window):
    """The flash kernel of SDPA with a window, from torch 2.10 on."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}  # torch 2.11 just takes fewer heads
    size = (-1 if window is None else window - 1, 0)
    return lambda: varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=size, **grouped)


def flash_attn(module, q, k, v, window):
    attend = importlib.import_module(module).flash_attn_func
    q, k, v, size = q[None], k[None], v[None], {} if window is None else {"window_size": (window - 1, 0)}
    return lambda: first(attend(q, k, v, causal=True, **size))[0]


def flash_attn_varlen(module, q, k, v, bounds, longest, window):
    attend = importlib.import_module(module).flash_attn_varlen_func
    size = {} if window is None else {"window_size": (window - 1, 0)}
    return lambda: first(attend(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest,
                                causal=True, **size))


@functools.cache
def cudnn_handle():
    import cudnn

    return cudnn.create_handle()


def cudnn_frontend(q, k, v, window):
    """cuDNN's own graph, which has a window (its left bound counts the query's own key)."""
    import cudnn

    handle, dtype = cudnn_handle(), {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}[q.dtype]
    tensors = [heads_first(t) for t in (q, k, v)]
    graph = cudnn.pygraph(handle=handle, io_data_type=dtype, intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=cudnn.data_type.FLOAT)
    nodes = [graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=dtype) for name, t in zip("qkv", tensors)]
    left = {} if window is None or window >= len(k) else {"diagonal_band_left_bound": window}
    node, _ = graph.sdpa(name="sdpa", q=nodes[0], k=nodes[1], v=nodes[2], attn_scale=1 / math.sqrt(q.shape[-1]), generate_stats=False,
                         diagonal_alignment=cudnn.diagonal_alignment.TOP_LEFT, diagonal_band_right_bound=0, **left)
    out = torch.empty_like(q)
    node.set_output(True).set_dim(list(heads_first(out).shape)).set_stride(list(heads_first(out).stride()))
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
    arguments = dict(zip((*nodes, node), (*tensors, heads_first(out))))

    def call():
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(arguments, workspace, handle=handle)
        return out

    return call


def prompt_peers(compiler: Flex, q, k, v, lengths, window) -> dict:
    """name -> (function that prepares the call, its window). One sequence, or several packed."""
    total, longest = len(q), max(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=q.device)
    peers = {}
    if len(lengths) == 1:
        without = window is not None and window < total
        for name, backend in BACKENDS.items():
            peers[f"{name}, no window" if without else name] = functools.partial(sdpa_causal, backend, q, k, v), None
        peers["cuDNN frontend"] = functools.partial(cudnn_frontend, q, k, v, window), window
        for name, module in FLASH_ATTN.items():
            peers[name] = functools.partial(flash_attn, module, q, k, v, window), window
    else:
        for name, module in FLASH_ATTN.items():
            peers[name] = functools.partial(flash_attn_varlen, module, q, k, v, bounds, longest, window), window
    peers["torch varlen_attn"] = functools.partial(torch_varlen, q, k, v, bounds, longest, window), window
    peers["FlexAttention"] = functools.partial(flex, compiler, q, k, v, lengths, window), window
    return peers


# ----------------------------------------------------------------------------------------------------------- decoding


def sdpa_decode(backend, q, copies, rows: bool):
    """`copies()`: the next k and v. rows: the query heads of a group as rows of one head, as transformers does."""
    batch, heads, head_dim = q.shape

    def call():
        k, v = map(heads_first, copies())
        grouped = q.view(batch, k.shape[1], -1, head_dim) if rows else q[:, :, None]
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(grouped, k, v, enable_gqa=not rows).reshape(batch, heads, head_dim)

    return call


def flex_decode(compiler: Flex, q, copies):
    k, _ = copies()
    if len(k) * k.stride(0) > 2**31:
        raise ValueError("not tried: its kernels may count elements in 32 bits, and a cache has more than 2^31")
    attend = compiler.compile(q[:, :, None], *map(heads_first, copies()))
    return lambda: attend(q[:, :, None], *map(heads_first, copies()))[:, :, 0]


def flash_attn_decode(module, q, copies):
    attend = importlib.import_module(module).flash_attn_with_kvcache
    k, _ = copies()
    lengths = torch.full((len(q),), k.shape[1], dtype=torch.int32, device=q.device)
    return lambda: first(attend(q[:, None], *copies(), cache_seqlens=lengths, causal=True))[:, 0]


def decode_peers(compiler: Flex, q, copies) -> dict:
    """name -> function that prepares the call."""
    backends = BACKENDS | {"SDPA efficient": SDPBackend.EFFICIENT_ATTENTION}
    peers = {}
    for name, backend in backends.items():
        peers[name] = functools.partial(sdpa_decode, backend, q, copies, False)
        peers[f"{name}, heads as rows"] = functools.partial(sdpa_decode, backend, q, copies, True)
    for name in ("flash-attn 2", "flash-attn 3"):
        peers[name] = functools.partial(flash_attn_decode, FLASH_ATTN[name], q, copies)
    return peers | {"FlexAttention": functools.partial(flex_decode, compiler, q, copies)}
