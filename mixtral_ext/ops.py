"""The torch ops as functions.

Shape letters: T tokens, H hidden size, I intermediate size, E experts (1 to 256), K experts per token (1 to 8),
S = T*K rows, Hq/Hk query/key heads (Hq a multiple of Hk), D head dim (64 or 128), B sequences, C cache slots.

Rules of all ops
- "float" is float32, bfloat16 or float16 on the CPU and bfloat16 or float16 on CUDA. Sums are f32 with one rounding.
- Any strides, but the innermost is 1; on CUDA float data and strides are multiples of 16 bytes. Index arrays and lse are
  contiguous where not said otherwise. All tensors of a call are on one device.
- A wrong dtype, shape, stride, device or limit is a ValueError that names the argument, what was expected and what came;
  nothing is written then. Index *values* are checked on the CPU; on CUDA bad ones are skipped and never read or write
  out of range (debug.check_<op> finds them). What device or build cannot do is a RuntimeError, and so is an argument of
  another kind than the schema has (window=2.5, a list for a tensor): that one is torch's own, and names the argument.
- `out` takes the result tensors (a tuple where there are several), writes into them and returns them. They must not
  overlap the inputs.
- For inference: where an input requires grad, backward raises; with `out` and in ops that change a tensor the call does.
  Fastest under torch.inference_mode(), where the dispatcher skips that check.

The C header (csrc/include/mixtral_ext.h) is the authority on every contract.
"""
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "lib" / "libmixtral_ext_torch.so"
try:
    torch.ops.load_library(_LIBRARY)
except OSError as error:
    what = "cannot be loaded" if _LIBRARY.exists() else "is not built"
    raise ImportError(f"mixtral_ext: {_LIBRARY} {what} ({error}). Build it for this torch: pip install --no-build-isolation . "
                      "in the source tree, or make there to build in place") from error

from . import autograd, fakes  # noqa: E402

_ops = torch.ops.mixtral_ext
_overloads = [_ops.apply_rope.default]
for _name in ("moe_gate", "moe_sort", "moe_permute", "moe_combine", "grouped_gemm", "grouped_gemm_swiglu", "moe_experts",
              "sliding_window_attention", "rolling_attention"):
    _overloads += [getattr(_ops, _name).default, getattr(_ops, _name).out]
fakes.register(_overloads)
autograd.register(_overloads)


def _results(op, out, count):
    """The tuple of `count` tensors the caller gave."""
    if not isinstance(out, (tuple, list)) or len(out) != count:
        got = f"{len(out)}" if isinstance(out, (tuple, list)) else type(out).__name__
        raise TypeError(f"mixtral_{op}: out: expected a tuple of {count} tensors, got {got}")
    return out


def moe_gate(router_logits, top_k=2, renormalize=True, *, out=None):
    """Router: the K largest logits of each token, their softmax, and the permutation that sorts the rows by expert.

    router_logits: [T, E] float32, bfloat16 or float16 (also on CUDA, any alignment). renormalize: softmax over the K
    chosen logits (Mixtral), else over all E. Ordered by f32 value; ties go to the lower expert id, NaN ranks highest.

    Returns topk_weights f32 [T, K], topk_ids i32 [T, K], expert_offsets i32 [E+1] (rows of expert e are
    expert_offsets[e] to expert_offsets[e+1]), sorted_slots i32 [T*K] (row r is slot t*K + j, rows by expert, then slot)
    and slot_rows i32 [T, K], its inverse. A token with a NaN or +inf logit, or with -inf alone, gets NaN weights and distinct ids.
    """
    if out is None:
        return _ops.moe_gate(router_logits, top_k, renormalize)
    topk_weights, topk_ids, expert_offsets, sorted_slots, slot_rows = _results("moe_gate", out, 5)
    _ops.moe_gate.out(router_logits, top_k, renormalize, topk_weights=topk_weights, topk_ids=topk_ids,
                      expert_offsets=expert_offsets, sorted_slots=sorted_slots, slot_rows=slot_rows)
    return out


def moe_sort(topk_ids, num_experts, *, out=None):
    """The permutation of moe_gate for routing made elsewhere.

    topk_ids: i32 or i64 [T, K], any row stride; an id outside [0, num_experts) is a skip marker: it gets no row, its
    slot_rows is -1, and the tail of sorted_slots is -1.

    Returns expert_offsets i32 [E+1], sorted_slots i32 [T*K], slot_rows i32 [T, K].
    """
    if out is None:
        return _ops.moe_sort(topk_ids, num_experts)
    expert_offsets, sorted_slots, slot_rows = _results("moe_sort", out, 3)
    _ops.moe_sort.out(topk_ids, num_experts, expert_offsets=expert_offsets, sorted_slots=sorted_slots, slot_rows=slot_rows)
    return out


def moe_permute(hidden, sorted_slots, top_k, *, out=None):
    """rows[r] = hidden[sorted_slots[r] // top_k].

    hidden: [T, H] float. sorted_slots: i32 [S], values -1 to T*K - 1. Returns rows [S, H]; where the slot is -1 they are
    undefined (with `out`: not written).
    """
    if out is None:
        return _ops.moe_permute(hidden, sorted_slots, top_k)
    _ops.moe_permute.out(hidden, sorted_slots, top_k, rows=out)
    return out


def moe_combine(rows, slot_rows, topk_weights, *, out=None):
    """out[t] = sum over j of topk_weights[t, j] * rows[slot_rows[t, j]], in order of j.

    rows: [S, H] float. slot_rows: i32 [T, K], values -1 (contributes nothing, its weight is not read) to S - 1.
    topk_weights: f32 [T, K]. Returns [T, H] in the dtype of rows.
    """
    if out is None:
        return _ops.moe_combine(rows, slot_rows, topk_weights)
    _ops.moe_combine.out(rows, slot_rows, topk_weights, out=out)
    return out


def grouped_gemm(a, b, expert_offsets, a_rows=None, a_rows_divisor=1, *, out=None):
    """out[r] = a[r] @ b[e].T for every row r of expert e, or a[a_rows[r] // a_rows_divisor] @ b[e].T.

    a: [M, Kd] float. b: [E, N, Kd], dtype of a. expert_offsets: i32 [E+1], from 0, not decreasing, at most R. a_rows: i32
    [R], without it R = M; sorted_slots with divisor K gathers tokens inside the product.

    Returns [R, N] in the dtype of a; rows from expert_offsets[E] on are undefined (with `out`: not written). A row's bits do
    not depend on the other rows.

    CUDA: bfloat16 or float16, Kd a multiple of 8; N too, unless `out` has rows a multiple of 16 bytes apart. A row with a bad
    a_rows is computed as if it were zeros.
    """
    if out is None:
        return _ops.grouped_gemm(a, b, expert_offsets, a_rows, a_rows_divisor)
    _ops.grouped_gemm.out(a, b, expert_offsets, a_rows, a_rows_divisor, out=out)
    return out


def grouped_gemm_swiglu(a, w_gate_up, expert_offsets, a_rows=None, a_rows_divisor=1, *, out=None):
    """As grouped_gemm with w_gate_up [E, 2I, H] = [gate; up] (transformers' and vLLM's order):
    out[r] = silu(A(r) @ gate.T) * (A(r) @ up.T), one rounding. Returns [R, I]. Limits on CUDA as there, with H for Kd, I for N.
    """
    if out is None:
        return _ops.grouped_gemm_swiglu(a, w_gate_up, expert_offsets, a_rows, a_rows_divisor)
    _ops.grouped_gemm_swiglu.out(a, w_gate_up, expert_offsets, a_rows, a_rows_divisor, out=out)
    return out


def moe_experts(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets=None, sorted_slots=None,
                slot_rows=None, *, out=None):
    """The expert layer: out[t] = sum over j of topk_weights[t, j] * (w_down[e] @ (silu(gate[e] @ x) * (up[e] @ x))),
    e = topk_ids[t, j], x = hidden[t].

    hidden: [T, H] float. w_gate_up: [E, 2I, H] = [gate; up], w_down: [E, H, I], dtype of hidden. topk_weights: f32
    [T, K]. topk_ids: i32 or i64 [T, K]; ids outside [0, E) are skip markers. expert_offsets, sorted_slots, slot_rows:
    all from moe_gate or moe_sort for these ids (then topk_ids is not read), or none (then the call sorts).

    Returns [T, H] in the dtype of hidden, rounded after SwiGLU, after the second product and after the sum. A token's bits do
    not depend on the other tokens.

    CUDA: bfloat16 or float16, H and I multiples of 8. Takes K*(I+H)*2 bytes of workspace a token from torch's allocator, and
    waits for nothing on the host, so it can be captured in a CUDA graph.
    """
    if out is None:
        return _ops.moe_experts(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets, sorted_slots, slot_rows)
    _ops.moe_experts.out(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets, sorted_slots, slot_rows, out=out)
    return out


def sliding_window_attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                             window=None, softmax_scale=None, k_start=None, k_length=None, *, out=None):
    """Causal grouped-query attention, bottom-right aligned, with an optional sliding window.

    Of a sequence with n queries and m keys, query i stands at p = m - n + i and sees the keys max(0, p - window + 1) to
    p: `window` keys including its own (flash-attn's window_size=(window - 1, 0)); window None sees 0 to p.
    softmax_scale None is 1/sqrt(D). A query that sees no key, or keys with scores of -inf alone, gets out 0 and lse -inf.

    Packed: q [Tq, Hq, D], k and v [Tk, Hk, D] float; cu_seqlens_q and cu_seqlens_k i32 [B+1] are the bounds of the
    sequences (without both: one sequence), max_seqlen_q and max_seqlen_k upper bounds of their lengths, if known.
    Batched: q [B, Sq, Hq, D], k and v [B, Sk, Hk, D], any strides (a transposed [B, H, S, D] is as good); k_start and
    k_length i32 [B] restrict a sequence to the keys k_start .. k_start + k_length - 1, others are not read.

    Returns out, shape and dtype of q (contiguous), and lse f32, the natural log of the sum of exp(scale * q k^T),
    [Hq, Tq] packed, [B, Hq, Sq] batched. Packed queries outside the bounds are undefined. `out` takes (out, lse or None).
    A sequence's bits do not depend on the other sequences.

    CUDA: bfloat16 or float16. A NaN or infinity in k or v may also reach queries near those that see it (mixtral_ext.h).
    """
    args = (q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, softmax_scale, k_start, k_length)
    if out is None:
        return _ops.sliding_window_attention(*args)
    result, lse = _results("sliding_window_attention", out, 2)
    _ops.sliding_window_attention.out(*args, out=result, lse=lse)
    return out


def rolling_attention(q, k, v, k_cache, v_cache, cu_seqlens_q, cache_lengths, window=None, softmax_scale=None,
                      cache_slots=None, max_seqlen_q=None, max_cache_length=None, rope_theta=None,
                      rope_interleaved=False, *, out=None):
    """Attention of a chunk of new tokens over a ring of cached keys and values, then the append (changes the caches).

    q: [Tq, Hq, D], k and v: [Tq, Hk, D] float, sequence b at cu_seqlens_q[b] to cu_seqlens_q[b+1] (i32 [B+1]). k_cache,
    v_cache: [slots, C, Hk, D], dtype of q; position p lives in ring slot p % C of cache_slots[b] (i32 [B], default b).
    cache_lengths: i32 [B], tokens seen so far, the position of the first new token; may exceed C; the caller advances it.

    The query at position p sees max(0, p - window + 1) .. p (window None: 0 .. p), older ones from the ring, the chunk
    from k and v themselves. Then the last min(n, C) tokens are stored. With k and v None nothing is stored and the ring
    holds the chunk already. window <= C; without k and v, window + max_seqlen_q - 1 <= C; window None needs
    max_cache_length + max_seqlen_q <= C (declared maxima, needed on CUDA). With rope_theta, q and k arrive
    unrotated, are rotated as apply_rope does, and the ring holds rotated keys.

    Returns out, shape and dtype of q (contiguous), and lse f32 [Hq, Tq]; undefined outside the bounds. `out` takes
    (out, lse or None). A sequence's bits do not depend on the other sequences.

    CUDA: bfloat16 or float16. The lengths stay on the device: nothing waits for them, and they may change between replays of a
    CUDA graph. So window None needs both maxima, and k and v None needs max_seqlen_q.
    """
    args = (q, k, v, k_cache, v_cache, cu_seqlens_q, cache_lengths, window, softmax_scale, cache_slots, max_seqlen_q,
            max_cache_length, rope_theta, rope_interleaved)
    if out is None:
        return _ops.rolling_attention(*args)
    result, lse = _results("rolling_attention", out, 2)
    _ops.rolling_attention.out(*args, out=result, lse=lse)
    return out


def apply_rope(q, k, positions, theta, interleaved=False):
    """Rotary embedding, in place: pair i of each head turns by positions[t] * theta^(-2i/D) (RoFormer, eq. 34).

    q: [T, Hq, D] float, k: [T, Hk, D] or None. positions: i32 or i64 [T], 0 or more. interleaved: pairs (x[2i], x[2i+1])
    as in Mistral's consolidated checkpoints; else (x[i], x[i + D/2]) as in transformers' ones. Returns None.
    """
    _ops.apply_rope(q, k, positions, theta, interleaved)
