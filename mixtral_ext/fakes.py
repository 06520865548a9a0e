"""Shapes, dtypes and devices of the ops' results, for torch.compile, export and meta tensors.

Only what follows from shapes is checked here (the ops check everything when they run), and that all tensors are on one
device: torch calls the fake when a real tensor meets a meta one.
"""
import torch

_I32, _F32 = torch.int32, torch.float32


def moe_gate(router_logits, top_k=2, renormalize=True):
    tokens, experts = router_logits.shape
    new = router_logits.new_empty
    return (new((tokens, top_k), dtype=_F32), new((tokens, top_k), dtype=_I32), new((experts + 1,), dtype=_I32),
            new((tokens * top_k,), dtype=_I32), new((tokens, top_k), dtype=_I32))


def moe_sort(topk_ids, num_experts):
    tokens, top_k = topk_ids.shape
    new = topk_ids.new_empty
    return new((num_experts + 1,), dtype=_I32), new((tokens * top_k,), dtype=_I32), new((tokens, top_k), dtype=_I32)


def moe_permute(hidden, sorted_slots, top_k):
    return hidden.new_empty((sorted_slots.shape[0], hidden.shape[1]))


def moe_combine(rows, slot_rows, topk_weights):
    return rows.new_empty((slot_rows.shape[0], rows.shape[1]))


def grouped_gemm(a, b, expert_offsets, a_rows=None, a_rows_divisor=1):
    return a.new_empty(((a if a_rows is None else a_rows).shape[0], b.shape[1]))


def grouped_gemm_swiglu(a, w_gate_up, expert_offsets, a_rows=None, a_rows_divisor=1):
    return a.new_empty(((a if a_rows is None else a_rows).shape[0], w_gate_up.shape[1] // 2))


def moe_experts(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets=None, sorted_slots=None, slot_rows=None):
    return hidden.new_empty(hidden.shape)


def sliding_window_attention(q, *_, **__):
    """Also of rolling_attention: out like q, lse [Hq, Tq] or [B, Hq, Sq]."""
    *batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((*batch, heads, tokens), dtype=_F32)


def _nothing(*_, **__):
    """An op that only writes to its arguments."""


def _on_one_device(op, fake):
    names = [a.name for a in op._schema.arguments]

    def checked(*args, **kwargs):
        first = None
        for name, value in (*zip(names, args), *kwargs.items()):
            if not isinstance(value, torch.Tensor):
                continue
            first = first or (name, value.device)
            if value.device != first[1]:
                raise ValueError(f"mixtral_{op._opname}: {name}: expected device {first[1]} (as {first[0]}), got {value.device}")
        return fake(*args, **kwargs)

    return checked


def register(ops):
    fakes = dict(moe_gate=moe_gate, moe_sort=moe_sort, moe_permute=moe_permute, moe_combine=moe_combine,
                 grouped_gemm=grouped_gemm, grouped_gemm_swiglu=grouped_gemm_swiglu, moe_experts=moe_experts,
                 sliding_window_attention=sliding_window_attention, rolling_attention=sliding_window_attention)
    for op in ops:
        fake = fakes[op._opname] if op._schema.returns else _nothing
        torch.library.register_fake(op.name(), _on_one_device(op, fake))
