"""`flash_attn_func`, `flash_attn_varlen_func` and `flash_attn_with_kvcache` of flash-attn 2, computed by
`mixtral_ext.sliding_window_attention` and `mixtral_ext.rolling_attention`, on the CPU and on CUDA.

    from mixtral_ext.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Same arguments, order, defaults and results, for causal attention without dropout; everything else is refused by name.
`window_size=(left, right)`: the query at key position p (aligned bottom right) sees p-left .. p+right, both included,
a negative end being open; `causal=True` sets right to 0. A call that is not declared causal is accepted where it means
the same: right == 0, or one query per sequence, as decoding with flash-attn is often written.

Differences: the log-sum-exp of a query that sees no key is -inf (flash-attn 2: +inf, flash-attn 3: -inf); results are
always deterministic; there is no backward. Head dims, dtypes and devices are those of the ops. Those of
`flash_attn_with_kvcache` stand there.
"""

from numbers import Integral

import torch

import mixtral_ext


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """q [B, Sq, Hq, D], k and v [B, Sk, Hk, D] -> out [B, Sq, Hq, D].

    With `return_attn_probs` the tuple (out, softmax_lse f32 [B, Hq, Sq], None); flash-attn fills the third element only
    under dropout. `softmax_scale` defaults to 1/sqrt(D). ValueError for what is not supported, see the module.
    """
    _rank("flash_attn_func", 4, q=q, k=k, v=v)
    window = _window("flash_attn_func", causal, window_size, q.shape[1])
    _refuse("flash_attn_func", dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    out, lse = mixtral_ext.sliding_window_attention(q, k, v, window=window, softmax_scale=softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
):
    """q [Tq, Hq, D], k and v [Tk, Hk, D], cu_seqlens i32 [B+1] -> out [Tq, Hq, D].

    With `return_attn_probs` the tuple (out, softmax_lse f32 [Hq, Tq], None). ValueError as in `flash_attn_func`.
    """
    _rank("flash_attn_varlen_func", 3, q=q, k=k, v=v)
    _rank("flash_attn_varlen_func", 1, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    window = _window("flash_attn_varlen_func", causal, window_size, max_seqlen_q)
    _refuse(
        "flash_attn_varlen_func",
        dropout_p=dropout_p,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
    )
    out, lse = mixtral_ext.sliding_window_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        window=window,
        softmax_scale=softmax_scale,
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
):
    """q [B, Sq, Hq, D] over k_cache, v_cache [B_c, C, Hk, D] -> out [B, Sq, Hq, D], or (out, softmax_lse f32 [B, Hq, Sq]).

    With k, v [B, Sq, Hk, D]: token i of sequence b stands at position cache_seqlens[b] + i, where k and v are stored in
    place; rotary_cos, rotary_sin [at least C, rotary_dim/2] rotate q and k there (f32, one rounding; q and k themselves
    do not change). Without: the cache holds cache_seqlens[b] keys (None: C) and query i stands at cache_seqlens[b] - Sq + i.
    cache_seqlens is an int or i32 [B]; cache_batch_idx i32 [B] says which sequence of the cache belongs to b.

    The caches may be strided views and are never copied. Nothing waits for the device, so a step can be captured in a
    CUDA graph. Lengths in a CUDA tensor are therefore not checked: stores beyond the cache are dropped, positions beyond
    the rotary tables take their last row. An int, and a tensor on the CPU, is checked before anything is written.

    Extension: with left < C the cache is a ring. Position p lives at p % C and cache_seqlens may exceed C, all the time
    counting the tokens since the start. Differences: k and v have as many tokens as q; without them a cache holds the
    queries' own keys, cache_seqlens >= Sq (on CUDA a sequence with fewer gets out 0 and lse -inf), and several queries need left + Sq <= C, or left >= C - 1 and no ring; the
    indices in cache_batch_idx are distinct. num_splits, a tuning hint, is ignored. ValueError for what is not supported.
    """
    function = "flash_attn_with_kvcache"
    _rank(function, 4, q=q, k_cache=k_cache, v_cache=v_cache)
    _refuse(function, cache_leftpad=cache_leftpad, block_table=block_table, softcap=softcap, alibi_slopes=alibi_slopes)
    queries, capacity, append = q.shape[1], k_cache.shape[1], k is not None or v is not None
    if append:
        _rank(function, 4, k=k, v=v)
        for name, new in (("k", k), ("v", v)):
            if new.shape[:2] != q.shape[:2]:
                raise ValueError(f"{function}: {name}: expected {list(q.shape[:2])} (batch, tokens) as q, got {list(new.shape[:2])}")

    window = _window(function, causal, window_size, queries)
    if window is not None and (window > capacity or window == capacity and queries > 1 and not append):
        window = None  # all of a cache that does not roll: every key is in sight
    if window is not None and not append and window + queries - 1 > capacity:
        raise ValueError(
            f"{function}: window_size: expected left <= {capacity - queries} for {queries} queries without k and v "
            f"in a cache of {capacity}, got {tuple(window_size)}"
        )
    positions = capacity if window is None else 2**31 - 1
    rotary = rotary_cos is not None or rotary_sin is not None
    if rotary:
        _check_rotary(function, rotary_cos, rotary_sin, q, capacity, append)
        positions = min(positions, rotary_cos.shape[0])
    if not 1 <= queries <= positions:
        raise ValueError(f"{function}: q: expected 1 to {positions} tokens a sequence, got {queries}")
    lengths, longest = _lengths_before(function, cache_seqlens, q, capacity, append, positions)
    if cache_batch_idx is not None:
        _check_indices(function, q, cache_batch_idx=cache_batch_idx)
        cache_batch_idx = cache_batch_idx.contiguous()
    if rotary:
        cos, sin = _rotary_at(function, rotary_cos, rotary_sin, lengths, queries)
        q, k = (_rotated(x, cos, sin, rotary_interleaved) for x in (q, k))

    out, lse = mixtral_ext.rolling_attention(
        q.flatten(0, 1),
        k.flatten(0, 1) if append else None,
        v.flatten(0, 1) if append else None,
        k_cache,
        v_cache,
        torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * queries,
        lengths,
        window=window,
        softmax_scale=softmax_scale,
        cache_slots=cache_batch_idx,
        max_seqlen_q=queries,
        max_cache_length=capacity - queries if longest is None and window is None else longest,
    )
    out, lse = out.view(q.shape), lse.view(q.shape[2], *q.shape[:2]).transpose(0, 1).contiguous()
    if not append and lengths.is_cuda and longest is None:  # a row of padding that a graph's batch holds
        short = (lengths < 0)[:, None, None]
        out, lse = out.masked_fill(short[..., None], 0), lse.masked_fill(short, float("-inf"))
    return (out, lse) if return_softmax_lse else out


def _window(function: str, causal: bool, window_size: tuple[int, int], queries: int) -> int | None:
    """flash-attn's window as ours: W keys including the query's own, None for all of them."""
    if not isinstance(window_size, (tuple, list)) or [isinstance(side, Integral) for side in window_size] != [True, True]:
        raise ValueError(f"{function}: window_size: expected (left, right), two integers, got {window_size!r}")
    left, right = window_size
    if not causal and right != 0 and queries != 1:
        raise ValueError(
            f"{function}: causal: expected True (or window_size[1] == 0, or one query), "
            f"got causal={causal} with window_size={tuple(window_size)} and {queries} queries"
        )
    return None if left < 0 or left >= 2**31 - 1 else left + 1  # no sequence is longer than that


def _rank(function: str, ndim: int, **tensors) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor) or value.ndim != ndim:
            got = list(value.shape) if isinstance(value, torch.Tensor) else f"{value!r:.80}"
            raise ValueError(f"{function}: {name}: expected a tensor of {ndim} dimensions, got {got}")


def _refuse(function: str, **arguments) -> None:
    for name, value in arguments.items():
        if value is not None and (isinstance(value, torch.Tensor) or value != 0):
            got = f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise ValueError(f"{function}: {name}: expected {'0' if name in ('dropout_p', 'softcap') else 'None'}, got {got}")


def _check_indices(function: str, q: torch.Tensor, **tensors) -> None:
    _rank(function, 1, **tensors)
    for name, value in tensors.items():
        for what, expected, got in (
            ("shape", [q.shape[0]], list(value.shape)),
            ("dtype", torch.int32, value.dtype),
            ("device", q.device, value.device),
        ):
            if got != expected:
                raise ValueError(f"{function}: {name}: expected {what} {expected}, got {got}")


def _lengths_before(function, cache_seqlens, q, capacity, append, positions) -> tuple[torch.Tensor, int | None]:
    """i32 [B], the position of each sequence's first query, and the largest of them, if the host knows it."""
    batch, queries = q.shape[:2]
    if cache_seqlens is None and not append:
        cache_seqlens = capacity
    if isinstance(cache_seqlens, Integral):
        low, high = (0, positions - queries) if append else (queries, positions)
        if not low <= cache_seqlens <= high:
            raise ValueError(
                f"{function}: cache_seqlens: expected {low} to {high} ({queries} "
                f"{'new' if append else 'last'} tokens of at most {positions}), got {cache_seqlens}"
            )
        length = int(cache_seqlens) if append else int(cache_seqlens) - queries
        return torch.full((batch,), length, dtype=torch.int32, device=q.device), length
    if not isinstance(cache_seqlens, torch.Tensor):
        raise ValueError(f"{function}: cache_seqlens: expected an int or an int32 tensor of shape [{batch}], got {cache_seqlens!r:.80}")
    _check_indices(function, q, cache_seqlens=cache_seqlens)
    return cache_seqlens.contiguous() if append else cache_seqlens - queries, None


def _check_rotary(function: str, cos, sin, q: torch.Tensor, capacity: int, append: bool) -> None:
    if not append:
        raise ValueError(f"{function}: {'rotary_sin' if cos is None else 'rotary_cos'}: expected None without k and v, got a table")
    _rank(function, 2, rotary_cos=cos, rotary_sin=sin)
    if cos.shape[0] < capacity or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"{function}: rotary_cos: expected at least {capacity} (cache) rows of at most {q.shape[3] // 2} (half of D), "
            f"got {list(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"{function}: rotary_sin: expected {list(cos.shape)} as rotary_cos, got {list(sin.shape)}")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if table.device != q.device:
            raise ValueError(f"{function}: {name}: expected device {q.device}, got {table.device}")


def _rotary_at(function: str, cos: torch.Tensor, sin: torch.Tensor, lengths: torch.Tensor, queries: int):
    """The rows of both tables for tokens at lengths .. lengths + queries - 1: f32 [B, Sq, 1, rotary_dim/2]."""
    position = lengths[:, None] + torch.arange(queries, dtype=torch.int32, device=lengths.device)
    if position.device.type != "cpu":  # where an index out of range would be the end of the process
        position = position.clamp(0, cos.shape[0] - 1)
    try:
        return cos[position].float()[:, :, None], sin[position].float()[:, :, None]
    except IndexError as error:
        raise ValueError(
            f"{function}: cache_seqlens: expected positions of the {queries} tokens within the {cos.shape[0]} rows of "
            f"rotary_cos, got {lengths.tolist()}"
        ) from error


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [B, S, H, D] with its first rotary_dim dims turned: in the f32 of cos and sin, then rounded once."""
    half = cos.shape[-1]
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else (pairs[..., :half], pairs[..., half:])
    turned = a * cos - b * sin, a * sin + b * cos
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)
