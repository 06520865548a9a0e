"""The ops on numpy arrays; needs numpy alone, and runs the same CPU kernels as the torch ops.

Names, arguments and results are those of the torch ops. For every function here:

* Floating-point arrays are float32, float16 or bfloat16, all of one call the same. numpy has no bfloat16 of its own: an
  array whose dtype is called "bfloat16" (the package ml_dtypes has one) is taken as it is, and so is a uint16 array, as the
  bits of bfloat16 values. Index arrays are int32 (ids and positions also int64).
* Arrays are used in place, in their own strides, never copied or converted; the innermost stride is one element.
* `out` takes the results instead of new arrays: one array, or a tuple of arrays in the order of the results. It is also
  what is returned. Results may not overlap arguments or each other.
* A wrong dtype, shape, stride or value is a ValueError (no array where one must be: a TypeError) that names the argument,
  what was expected and what came; then no result was written.
* Sums run in float32 with one rounding at the end of each stage. Results do not depend on the number of threads.

Shape letters: T tokens, H hidden size, I intermediate size, E experts (at most 256), K experts per token (at most 8),
S = T*K rows, Hq/Hk query and key heads (Hq a multiple of Hk), D head dim (64 or 128), B sequences, W window, C cache slots.

Calls release the GIL and share one thread pool. Workers do not survive a fork: the child makes its own at its first call.
"""
import numpy as np

try:
    from .lib import _numpy
except ImportError as error:
    raise ImportError(f"mixtral_ext.numpy: {error}. Its compiled module is built for one Python version: reinstall "
                      "mixtral_ext with this one") from error

__all__ = ["moe_gate", "moe_sort", "moe_permute", "moe_combine", "grouped_gemm", "grouped_gemm_swiglu", "moe_experts",
           "sliding_window_attention", "rolling_attention", "apply_rope", "get_num_threads", "set_num_threads"]


def get_num_threads():
    """Threads an op may use, the caller's own among them; the machine's hardware threads unless set."""
    return _numpy.get_num_threads()


def set_num_threads(threads):
    """Use `threads` threads from now on, the caller's own among them; 1 runs every op on the calling thread alone.

    threads: 1 to 4096. Where the system starts fewer, those are used (see get_num_threads).
    """
    _numpy.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- helpers
# Results are allocated before the arguments are checked, so what a bad argument does not tell counts as 0.

def _size(array, dim):
    """array.shape[dim], or 0 where there is none."""
    shape = getattr(array, "shape", ())
    return shape[dim] if dim < len(shape) else 0


def _clamped(number, high):
    return int(min(max(number, 0), high)) if isinstance(number, (int, np.integer)) else 0


def _like(array, *shape):
    return np.empty(shape, getattr(array, "dtype", np.float32))


def _i32(*shape):
    return np.empty(shape, np.int32)


def _results(op, out, count):
    """The tuple of `count` arrays the caller gave."""
    if not isinstance(out, tuple) or len(out) != count:
        raise TypeError(f"mixtral_{op}: out: expected a tuple of {count} arrays, got {type(out).__name__}"
                        + (f" of {len(out)}" if isinstance(out, tuple) else ""))
    return out


# ---------------------------------------------------------------------------------------------------------- routing

def moe_gate(router_logits, top_k=2, renormalize=True, *, out=None):
    """Router: the `top_k` largest logits of each token, their softmax, and the permutation that sorts rows by expert.

    router_logits: [T, E]. Order is by the float32 logit, ties to the lower expert id, NaN ranks highest.
    top_k: K, 1 to min(8, E).
    renormalize: softmax over the K chosen logits (Mixtral); False: over all E, of which the chosen are kept.

    Returns (topk_weights float32 [T, K], topk_ids int32 [T, K], expert_offsets int32 [E+1], sorted_slots int32 [S],
    slot_rows int32 [T, K]). Rows expert_offsets[e] to expert_offsets[e+1] belong to expert e; row r is slot
    sorted_slots[r] = t*K + j, and slot_rows[t, j] = r is the inverse.
    """
    if out is None:
        tokens, experts = _size(router_logits, 0), _size(router_logits, 1)
        k = _clamped(top_k, 8)
        out = (np.empty((tokens, k), np.float32), _i32(tokens, k), _i32(experts + 1), _i32(tokens * k), _i32(tokens, k))
    topk_weights, topk_ids, expert_offsets, sorted_slots, slot_rows = _results("moe_gate", out, 5)
    _numpy.moe_gate(router_logits=router_logits, top_k=top_k, renormalize=bool(renormalize), topk_weights=topk_weights,
                    topk_ids=topk_ids, expert_offsets=expert_offsets, sorted_slots=sorted_slots, slot_rows=slot_rows)
    return out


def moe_sort(topk_ids, num_experts, *, out=None):
    """The permutation of `moe_gate` for routing made elsewhere.

    topk_ids: [T, K] int32 or int64. An id outside [0, num_experts) is a skip marker: it gets no row.
    num_experts: E.

    Returns (expert_offsets int32 [E+1], sorted_slots int32 [S], slot_rows int32 [T, K]) as `moe_gate` does; slot_rows is -1
    for a skip marker, and so is the end of sorted_slots, from expert_offsets[E] on.
    """
    if out is None:
        tokens, top_k = _size(topk_ids, 0), _size(topk_ids, 1)
        out = (_i32(_clamped(num_experts, 256) + 1), _i32(tokens * top_k), _i32(tokens, top_k))
    expert_offsets, sorted_slots, slot_rows = _results("moe_sort", out, 3)
    _numpy.moe_sort(topk_ids=topk_ids, num_experts=num_experts, expert_offsets=expert_offsets, sorted_slots=sorted_slots,
                    slot_rows=slot_rows)
    return out


def moe_permute(hidden, sorted_slots, top_k, *, out=None):
    """Gather of token rows by expert: rows[r] = hidden[sorted_slots[r] // top_k].

    hidden: [T, H]. sorted_slots: int32 [S], each -1 to T*K - 1. top_k: K, 1 to 8.

    Returns rows [S, H]; rows whose slot is -1 are not written (undefined without `out`).
    """
    if out is None:
        out = _like(hidden, _size(sorted_slots, 0), _size(hidden, 1))
    _numpy.moe_permute(hidden=hidden, sorted_slots=sorted_slots, top_k=top_k, rows=out)
    return out


def moe_combine(rows, slot_rows, topk_weights, *, out=None):
    """Weighted sum back to tokens: out[t] = sum over j of topk_weights[t, j] * rows[slot_rows[t, j]], in order of j.

    rows: [S, H]. slot_rows: int32 [T, K], each -1 to S - 1. topk_weights: float32 [T, K]. A slot_rows of -1 contributes
    nothing, and its weight is not read.

    Returns out [T, H].
    """
    if out is None:
        out = _like(rows, _size(slot_rows, 0), _size(rows, 1))
    _numpy.moe_combine(rows=rows, slot_rows=slot_rows, topk_weights=topk_weights, out=out)
    return out


# ---------------------------------------------------------------------------------------------------------- experts

def grouped_gemm(a, b, expert_offsets, a_rows=None, a_rows_divisor=1, *, out=None):
    """One matrix product per expert: row r of expert e is a[r] @ b[e].T.

    a: [M, Kd]. b: [E, N, Kd].
    expert_offsets: int32 [E+1], starts at 0 and does not decrease; expert e has rows expert_offsets[e] to
        expert_offsets[e+1].
    a_rows, a_rows_divisor: with a_rows (int32 [R]) row r reads a[a_rows[r] // a_rows_divisor] instead; sorted_slots with
        divisor K gathers tokens inside the product. Without it R = M and the divisor is 1.

    Returns out [R, N]; rows from expert_offsets[E] on are not written (undefined without `out`).
    """
    if out is None:
        out = _like(a, _size(a if a_rows is None else a_rows, 0), _size(b, 1))
    _numpy.grouped_gemm(a=a, b=b, expert_offsets=expert_offsets, a_rows=a_rows, a_rows_divisor=a_rows_divisor, out=out)
    return out


def grouped_gemm_swiglu(a, w_gate_up, expert_offsets, a_rows=None, a_rows_divisor=1, *, out=None):
    """silu(gate) * up of a product per expert: row r of expert e is silu(a[r] @ gate.T) * (a[r] @ up.T) with
    gate, up = w_gate_up[e, :I], w_gate_up[e, I:] and silu(x) = x / (1 + exp(-x)), all in float32, one rounding.

    a: [M, H]. w_gate_up: [E, 2I, H]. expert_offsets, a_rows, a_rows_divisor: as in `grouped_gemm`.

    Returns out [R, I]; rows from expert_offsets[E] on are not written (undefined without `out`).
    """
    if out is None:
        out = _like(a, _size(a if a_rows is None else a_rows, 0), _size(w_gate_up, 1) // 2)
    _numpy.grouped_gemm_swiglu(a=a, w_gate_up=w_gate_up, expert_offsets=expert_offsets, a_rows=a_rows,
                               a_rows_divisor=a_rows_divisor, out=out)
    return out


def moe_experts(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets=None, sorted_slots=None, slot_rows=None,
                *, out=None):
    """The whole expert layer: out[t] = sum over j of topk_weights[t, j] * w_down[e] @ (silu(gate[e] @ x) * (up[e] @ x)),
    e = topk_ids[t, j], x = hidden[t], gate and up the two halves of w_gate_up[e].

    hidden: [T, H]. w_gate_up: [E, 2I, H]. w_down: [E, H, I].
    topk_weights: float32 [T, K]. topk_ids: int32 or int64 [T, K]; an id outside [0, E) contributes nothing.
    expert_offsets, sorted_slots, slot_rows: the maps of `moe_gate` or `moe_sort` for these ids; all or none (none: the
        call sorts; with them topk_ids is not read).

    Returns out [T, H]. Rounds to the dtype of hidden after SwiGLU, after the second product and after the sum.
    """
    if out is None:
        out = _like(hidden, _size(hidden, 0), _size(hidden, 1))
    _numpy.moe_experts(hidden=hidden, w_gate_up=w_gate_up, w_down=w_down, topk_weights=topk_weights, topk_ids=topk_ids,
                       expert_offsets=expert_offsets, sorted_slots=sorted_slots, slot_rows=slot_rows, out=out)
    return out


# -------------------------------------------------------------------------------------------------------- attention

def sliding_window_attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                             window=None, softmax_scale=None, k_start=None, k_length=None, *, out=None):
    """Causal grouped-query attention over a sliding window, softmax(softmax_scale * q k^T) v.

    The last query of a sequence stands at its last key. With window W a query at position p sees the keys at positions
    p-W+1 to p, itself among them; None: all up to p. Query head h reads key head h // (Hq/Hk).

    q: [Tq, Hq, D] packed or [B, Sq, Hq, D] batched. k, v: [Tk, Hk, D] or [B, Sk, Hk, D]; any outer strides.
    cu_seqlens_q, cu_seqlens_k: int32 [B+1], packed only: sequence b has queries cu_seqlens_q[b] to cu_seqlens_q[b+1];
        without them the arrays hold one sequence. max_seqlen_q, max_seqlen_k: no sequence is longer (None: unknown).
    window: W, 1 or more, or None. softmax_scale: None is 1/sqrt(D).
    k_start, k_length: int32 [B], batched only: sequence b has the keys k_start[b] to k_start[b] + k_length[b] - 1.

    Returns (out like q, lse float32: the natural log of the sum of exp, [Hq, Tq] or [B, Hq, Sq]). A query that sees no key
    gets out 0 and lse -inf; packed queries outside the bounds are not written (undefined without `out`). With
    out=(out, None) no lse is written.
    """
    if out is None:
        batch = (_size(q, 0),) if getattr(q, "ndim", 0) == 4 else ()
        out = (_like(q, *getattr(q, "shape", ())),
               np.empty((*batch, _size(q, len(batch) + 1), _size(q, len(batch))), np.float32))
    result, lse = _results("sliding_window_attention", out, 2)
    _numpy.sliding_window_attention(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, window=window, softmax_scale=softmax_scale, k_start=k_start, k_length=k_length,
        out=result, lse=lse)
    return out


def rolling_attention(q, k, v, k_cache, v_cache, cu_seqlens_q, cache_lengths, window=None, softmax_scale=None,
                      cache_slots=None, max_seqlen_q=None, max_cache_length=None, rope_theta=None, rope_interleaved=False,
                      *, out=None):
    """Attention of a chunk of new tokens over a ring of cached keys and values, then the append; k_cache and v_cache change.

    Position p of a sequence lives in ring slot p % C. Sequence b has new tokens at positions L, L+1, ..., L =
    cache_lengths[b]; they see ring and chunk as in `sliding_window_attention`, then the last C of them are stored.

    q: [Tq, Hq, D]. k, v: [Tq, Hk, D], or both None: nothing is stored, and the ring already holds the chunk.
    k_cache, v_cache: [slots, C, Hk, D] of the dtype of q, writeable.
    cu_seqlens_q: int32 [B+1], bounds of the new tokens of each sequence. cache_lengths: int32 [B], tokens seen so far (may
        exceed C); not changed, the caller adds the new tokens.
    window: W, 1 to C, or None: then no position may be overwritten. softmax_scale: None is 1/sqrt(D).
    cache_slots: int32 [B], distinct: sequence b uses k_cache[cache_slots[b]]; None: k_cache[b].
    max_seqlen_q, max_cache_length: upper bounds of new tokens and of cache_lengths (None: unknown).
    rope_theta: q and k arrive unrotated and are rotated as `apply_rope` does, with rope_interleaved; None: rotated already.

    Returns (out like q, lse float32 [Hq, Tq]); queries outside the bounds are not written (undefined without `out`). With
    out=(out, None) no lse is written.
    """
    if out is None:
        out = (_like(q, *getattr(q, "shape", ())), np.empty((_size(q, 1), _size(q, 0)), np.float32))
    result, lse = _results("rolling_attention", out, 2)
    _numpy.rolling_attention(
        q=q, k=k, v=v, k_cache=k_cache, v_cache=v_cache, cu_seqlens_q=cu_seqlens_q, cache_lengths=cache_lengths,
        cache_slots=cache_slots, max_seqlen_q=max_seqlen_q, max_cache_length=max_cache_length, window=window,
        softmax_scale=softmax_scale, rope_theta=rope_theta, rope_interleaved=bool(rope_interleaved), out=result, lse=lse)
    return out


def apply_rope(q, k, positions, theta, interleaved=False):
    """Rotary embedding, in place: pair i of each head of q and k turns by the angle positions[t] * theta^(-2i/D).

    q: [T, Hq, D], k: [T, Hk, D] or None, writeable. positions: int32 or int64 [T], 0 or more. theta: positive.
    interleaved: pairs are (x[2i], x[2i+1]) (Mistral's consolidated checkpoints) instead of (x[i], x[i + D/2])
    (transformers checkpoints). (a, b) becomes (a cos - b sin, a sin + b cos): Su et al., RoFormer, eq. 34.
    """
    _numpy.apply_rope(q=q, k=k, positions=positions, theta=theta, interleaved=bool(interleaved))
