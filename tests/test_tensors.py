"""What the header says of every mixtral_tensor, for all ops alike."""
import numpy as np
import pytest

import c_api


def floats(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def ints(*values):
    return np.array(values, np.int32)


def one_of_all(tokens):
    """op -> (arrays, numbers): a call with one expert, sequence, key head and slot; 0 or 1 tokens."""
    T, slots, weights = tokens, ints(*range(tokens)), np.ones((tokens, 1), np.float32)
    maps = dict(expert_offsets=ints(0, T), sorted_slots=slots, slot_rows=slots[:, None])
    attention = dict(q=floats(T, 1, 64), k=floats(T, 1, 64), v=floats(T, 1, 64), out=floats(T, 1, 64), lse=floats(1, T))
    batched = {name: x[None] for name, x in attention.items()}
    return {
        "moe_gate": (dict(router_logits=floats(T, 1), topk_weights=weights, topk_ids=slots[:, None], **maps), dict(top_k=1)),
        "moe_sort": (dict(topk_ids=slots[:, None], **maps), dict(num_experts=1)),
        "moe_permute": (dict(hidden=floats(T, 40), sorted_slots=slots, rows=floats(T, 40)), dict(top_k=1)),
        "moe_combine": (dict(rows=floats(T, 40), slot_rows=slots[:, None], topk_weights=weights, out=floats(T, 40)), {}),
        "grouped_gemm": (dict(a=floats(T, 40), b=floats(1, 1, 40), expert_offsets=ints(0, T), out=floats(T, 1)), {}),
        "grouped_gemm_swiglu": (dict(a=floats(T, 40), w_gate_up=floats(1, 2, 40), expert_offsets=ints(0, T), a_rows=slots,
                                     out=floats(T, 1)), {}),
        "moe_experts": (dict(hidden=floats(T, 40), w_gate_up=floats(1, 2, 40), w_down=floats(1, 40, 1), topk_weights=weights,
                             topk_ids=slots[:, None], out=floats(T, 40)), {}),
        "sliding_window_attention": (attention, dict(window=1)),
        "sliding_window_attention, batched": (dict(batched, k_start=ints(0), k_length=ints(T)), {}),
        "rolling_attention": (dict(attention, k_cache=floats(1, 1, 1, 64), v_cache=floats(1, 1, 1, 64), cu_seqlens_q=ints(0, T),
                                   cache_lengths=ints(9), cache_slots=ints(0)), dict(window=1)),
        "apply_rope": (dict(q=floats(T, 1, 64), k=floats(T, 1, 64), positions=slots + 5), dict(theta=10000)),
    }


@pytest.mark.parametrize("stride", (0, -1, 2**63 - 1, -2**63))
@pytest.mark.parametrize("tokens", (0, 1))
@pytest.mark.parametrize("op", one_of_all(1))
def test_ignored_strides_and_null(cpu_build, op, tokens, stride):
    """Strides of dimensions of at most 1 may hold anything, and the data of an empty array may be NULL."""
    library, arch = cpu_build
    plain, numbers = one_of_all(tokens)[op]
    odd = {name: x.copy() for name, x in plain.items()}
    library.call(op.split(",")[0], library.context(arch), **plain, **numbers)
    tensors = {name: c_api.tensor(x) for name, x in odd.items()}
    for name, t in tensors.items():
        for i in range(t.ndim):
            if t.shape[i] <= 1:
                t.stride[i] = stride
        if odd[name].size == 0:
            t.data = None
    library.call(op.split(",")[0], library.context(arch), **tensors, **numbers)
    for name, x in odd.items():
        assert x.tobytes() == plain[name].tobytes(), name
