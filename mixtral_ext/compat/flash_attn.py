"""`flash_attn_func` and `flash_attn_varlen_func` of flash-attn 2, computed by `mixtral_ext.sliding_window_attention`.

    from mixtral_ext.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

Same arguments, order, defaults and results, for causal attention without dropout; everything else is refused by name.
`window_size=(left, right)`: the query at key position p (aligned bottom right) sees p-left .. p+right, both included,
a negative end being open; `causal=True` sets right to 0. A call that is not declared causal is accepted where it means
the same: right == 0, or one query per sequence, as decoding with flash-attn is often written.

Differences: the log-sum-exp of a query that sees no key is -inf (flash-attn 2: +inf, flash-attn 3: -inf); results are
always deterministic; there is no backward. Head dims, dtypes and devices are those of `sliding_window_attention`.
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
