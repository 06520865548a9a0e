"""check_<op>(...): are the values in the index arrays in range?

On CUDA an op skips bad offsets, ids and lengths, since it cannot look at them without waiting. These functions take
the arguments of the op of the same name, wait for the device, and raise the ValueError that the CPU op raises for
the same values: they run that op on copies of the index arrays, with arrays of no width in place of the data.
Nothing of what is passed changes. moe_gate and moe_sort have no values to check.
"""
import torch

from . import ops


def _data(*shape):
    """A tensor of this shape in a few bytes of memory; its elements share one row."""
    return torch.zeros(shape[-1:]).expand(shape)


def _host(index):
    return None if index is None else index.detach().cpu()


def check_moe_permute(hidden, sorted_slots, top_k):
    ops.moe_permute(_data(hidden.shape[0], 0), _host(sorted_slots), top_k)


def check_moe_combine(rows, slot_rows, topk_weights):
    ops.moe_combine(_data(rows.shape[0], 0), _host(slot_rows), torch.zeros(topk_weights.shape))


def check_grouped_gemm(a, b, expert_offsets, a_rows=None, a_rows_divisor=1):
    ops.grouped_gemm(_data(a.shape[0], 0), _data(b.shape[0], 0, 0), _host(expert_offsets), _host(a_rows), a_rows_divisor)


def check_grouped_gemm_swiglu(a, w_gate_up, expert_offsets, a_rows=None, a_rows_divisor=1):
    ops.grouped_gemm_swiglu(_data(a.shape[0], 0), _data(w_gate_up.shape[0], 0, 0), _host(expert_offsets), _host(a_rows),
                            a_rows_divisor)


def check_moe_experts(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets=None, sorted_slots=None,
                      slot_rows=None):
    experts = w_gate_up.shape[0]
    ops.moe_experts(_data(hidden.shape[0], 0), _data(experts, 0, 0), _data(experts, 0, 0), torch.zeros(topk_weights.shape),
                    _host(topk_ids), _host(expert_offsets), _host(sorted_slots), _host(slot_rows))


def check_sliding_window_attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                                   window=None, softmax_scale=None, k_start=None, k_length=None):
    keys = _data(*k.shape[:-2], 1, k.shape[-1])
    ops.sliding_window_attention(_data(*q.shape[:-2], 0, q.shape[-1]), keys, keys, _host(cu_seqlens_q), _host(cu_seqlens_k),
                                 max_seqlen_q, max_seqlen_k, window, softmax_scale, _host(k_start), _host(k_length))


def check_rolling_attention(q, k, v, k_cache, v_cache, cu_seqlens_q, cache_lengths, window=None, softmax_scale=None,
                            cache_slots=None, max_seqlen_q=None, max_cache_length=None, rope_theta=None,
                            rope_interleaved=False):
    new = None if k is None else _data(k.shape[0], 1, q.shape[-1])
    caches = [torch.empty(*k_cache.shape[:2], 1, q.shape[-1]) for _ in "kv"]  # memory is touched where the chunk is stored
    ops.rolling_attention(_data(q.shape[0], 0, q.shape[-1]), new, new, *caches, _host(cu_seqlens_q), _host(cache_lengths),
                          window, softmax_scale, _host(cache_slots), max_seqlen_q, max_cache_length)


def check_apply_rope(q, k, positions, theta, interleaved=False):
    ops.apply_rope(_data(q.shape[0], 0, q.shape[-1]), None, _host(positions), theta, interleaved)
