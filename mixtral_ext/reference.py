"""Every op in plain torch, written for clarity: the oracle of the tests and a yardstick for precision.

Each function takes the arguments of the op of the same name (see ops.py for shapes) and computes in the dtype of its
inputs, rounding where torch rounds: on float64 inputs it is the reference, on bfloat16 ones the "same formula in
low-precision torch". Nothing is changed in place: ops that mutate return the changed tensors after their results.
Elements the contract leaves unwritten are NaN. Index values are trusted; all functions read them on the host.
"""
import math

import torch


def _wide(dtype):
    """The dtype of what the ops hold in f32 (routing weights, angles, lse)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------ routing


def moe_gate(router_logits, top_k=2, renormalize=True):
    """-> topk_weights, topk_ids, expert_offsets, sorted_slots, slot_rows."""
    logits = router_logits.to(_wide(router_logits.dtype))
    # Adding 0 makes -0 equal to +0; torch's sort puts NaN first in descending order, and stable keeps ties in id order.
    key = logits.float() + 0.0
    key = key.masked_fill(key.isnan(), math.nan)
    topk_ids = key.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if renormalize:
        topk_weights = logits.gather(1, topk_ids).softmax(dim=1)
    else:
        topk_weights = logits.softmax(dim=1).gather(1, topk_ids)
    topk_ids = topk_ids.int()
    return (topk_weights, topk_ids, *moe_sort(topk_ids, router_logits.shape[1]))


def moe_sort(topk_ids, num_experts):
    """-> expert_offsets, sorted_slots, slot_rows. Ids outside [0, num_experts) are skip markers."""
    ids = topk_ids.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    rows = int((ids < num_experts).sum())
    order = ids.argsort(stable=True)[:rows]
    expert_offsets = ids.new_zeros(num_experts + 1)
    expert_offsets[1:] = ids.bincount(minlength=num_experts + 1)[:num_experts].cumsum(0)
    sorted_slots = torch.full_like(ids, -1)
    sorted_slots[:rows] = order
    slot_rows = torch.full_like(ids, -1)
    slot_rows[order] = torch.arange(rows, device=ids.device)
    return expert_offsets.int(), sorted_slots.int(), slot_rows.reshape(topk_ids.shape).int()


def moe_permute(hidden, sorted_slots, top_k):
    """-> rows [S, H]; NaN where the slot is -1."""
    rows = hidden.new_full((sorted_slots.shape[0], hidden.shape[1]), math.nan)
    used = sorted_slots >= 0
    rows[used] = hidden[sorted_slots[used].long() // top_k]
    return rows


def moe_combine(rows, slot_rows, topk_weights):
    """-> [T, H]: the weighted sum over each token's rows, in slot order."""
    out = rows.new_zeros(slot_rows.shape[0], rows.shape[1])
    for j in range(slot_rows.shape[1]):
        used = slot_rows[:, j] >= 0
        out[used] += topk_weights[used, j, None].to(rows.dtype) * rows[slot_rows[used, j].long()]
    return out


# ------------------------------------------------------------------------------------------------------------ experts


def grouped_gemm(a, b, expert_offsets, a_rows=None, a_rows_divisor=1):
    """-> [R, N]: row r of expert e is a[r] (or a[a_rows[r] // a_rows_divisor]) @ b[e].T; NaN past the last offset."""
    out = a.new_full((a.shape[0] if a_rows is None else a_rows.shape[0], b.shape[1]), math.nan)
    bounds = expert_offsets.tolist()
    for e, (first, end) in enumerate(zip(bounds, bounds[1:])):
        if first == end:
            continue
        rows = a[first:end] if a_rows is None else a[a_rows[first:end].long() // a_rows_divisor]
        out[first:end] = rows @ b[e].T
    return out


def grouped_gemm_swiglu(a, w_gate_up, expert_offsets, a_rows=None, a_rows_divisor=1):
    """-> [R, I]: silu(gate) * up of the product with w_gate_up [E, 2I, H]."""
    gate, up = grouped_gemm(a, w_gate_up, expert_offsets, a_rows, a_rows_divisor).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def moe_experts(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets=None, sorted_slots=None,
                slot_rows=None):
    """-> [T, H]: the expert layer. topk_ids is not read when the maps are given."""
    if expert_offsets is None:
        expert_offsets, sorted_slots, slot_rows = moe_sort(topk_ids, w_gate_up.shape[0])
    inner = grouped_gemm_swiglu(hidden, w_gate_up, expert_offsets, sorted_slots, topk_weights.shape[1])
    return moe_combine(grouped_gemm(inner, w_down, expert_offsets), slot_rows, topk_weights)


# ---------------------------------------------------------------------------------------------------------- attention


def _attend(q, k, v, window, softmax_scale):
    """One sequence: q [n, Hq, D], k and v [m, Hk, D], query i at key position m - n + i -> out like q, lse [Hq, n]."""
    n, heads, head_dim = q.shape
    m, key_heads, _ = k.shape
    group = heads // key_heads
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    k, v = (x.transpose(0, 1).repeat_interleave(group, dim=0) for x in (k, v))  # [Hq, m, D]
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) * scale                    # [Hq, n, m]
    query = torch.arange(m - n, m, device=q.device)[:, None]
    key = torch.arange(m, device=q.device)[None, :]
    visible = key <= query
    if window is not None:
        visible &= key > query - window
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(dim=2).to(_wide(q.dtype)) if m else q.new_full((heads, n), -math.inf, dtype=_wide(q.dtype))
    probabilities = scores.softmax(dim=2).masked_fill(~visible, 0)  # a row without keys is NaN before, 0 after
    return (probabilities @ v).transpose(0, 1), lse


def sliding_window_attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                             window=None, softmax_scale=None, k_start=None, k_length=None):
    """-> out, lse; NaN for packed queries outside cu_seqlens_q."""
    if q.dim() == 4:
        out, lse = [], []
        for b in range(q.shape[0]):
            first = 0 if k_start is None else int(k_start[b])
            end = k.shape[1] if k_length is None else first + int(k_length[b])
            one = _attend(q[b], k[b, first:end], v[b, first:end], window, softmax_scale)
            out.append(one[0])
            lse.append(one[1])
        if not out:
            return torch.empty_like(q), q.new_empty((0, q.shape[2], q.shape[1]), dtype=_wide(q.dtype))
        return torch.stack(out), torch.stack(lse)
    if cu_seqlens_q is None:
        return _attend(q, k, v, window, softmax_scale)
    out = torch.full_like(q, math.nan)
    lse = q.new_full((q.shape[1], q.shape[0]), math.nan, dtype=_wide(q.dtype))
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(queries) - 1):
        at, of = slice(queries[b], queries[b + 1]), slice(keys[b], keys[b + 1])
        out[at], lse[:, at] = _attend(q[at], k[of], v[of], window, softmax_scale)
    return out, lse


def rolling_attention(q, k, v, k_cache, v_cache, cu_seqlens_q, cache_lengths, window=None, softmax_scale=None,
                      cache_slots=None, max_seqlen_q=None, max_cache_length=None, rope_theta=None,
                      rope_interleaved=False):
    """-> out, lse, k_cache, v_cache (copies); NaN for queries outside cu_seqlens_q."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    capacity = k_cache.shape[1]
    out = torch.full_like(q, math.nan)
    lse = q.new_full((q.shape[1], q.shape[0]), math.nan, dtype=_wide(q.dtype))
    bounds = cu_seqlens_q.tolist()
    for b in range(len(bounds) - 1):
        at, n, length = slice(bounds[b], bounds[b + 1]), bounds[b + 1] - bounds[b], int(cache_lengths[b])
        slot = b if cache_slots is None else int(cache_slots[b])
        if n == 0:
            continue
        chunk = torch.arange(length, length + n, device=q.device)
        first = 0 if window is None else max(0, length - window + 1)
        end = length + n if k is None else length
        ring = torch.arange(first, end, device=q.device) % capacity
        query, keys, values = q[at], k_cache[slot, ring], v_cache[slot, ring]
        new_key = None if k is None else k[at]
        if rope_theta is not None:
            query, new_key = apply_rope(query, new_key, chunk, rope_theta, rope_interleaved)
        if k is not None:
            keys, values = torch.cat([keys, new_key]), torch.cat([values, v[at]])
        out[at], lse[:, at] = _attend(query, keys, values, window, softmax_scale)
        if k is not None:
            stored = chunk[-capacity:]
            k_cache[slot, stored % capacity] = new_key[-capacity:]
            v_cache[slot, stored % capacity] = v[at][-capacity:]
    return out, lse, k_cache, v_cache


def apply_rope(q, k, positions, theta, interleaved=False):
    """-> q, k (None without k): pair i of each head turned by positions * theta^(-2i/D) (RoFormer, eq. 34)."""
    half, wide = q.shape[2] // 2, _wide(q.dtype)
    frequency = theta ** (-torch.arange(half, device=q.device, dtype=wide) / half)
    angle = positions.to(wide)[:, None, None] * frequency  # [T, 1, D/2]
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)

    def turn(x):
        if x is None:
            return None
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        turned = a * cos - b * sin, a * sin + b * cos
        return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)

    return turn(q), turn(k)
