"""moe_gate and moe_sort on the virtual GPU: their lists of cases, every branch of their launchers, and what they cost."""
import math

import numpy as np
import pytest
import torch

import c_api
import vgpu
from attention_checks import assert_accurate, numpy, same_bits, widened
from mixtral_bench.cases import CASES, HUGE, MoeGateCase, MoeSortCase
from mixtral_ext import reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNTOUCHED = -77


def fields_of(op, inputs):
    """-> the C API's fields and the outputs among them, as torch tensors full of UNTOUCHED, in the reference's order."""
    if op == "moe_gate":
        tokens, experts, top_k = *inputs["router_logits"].shape, inputs["top_k"]
        scalars = dict(top_k=top_k, renormalize=int(inputs["renormalize"]))
        outputs = dict(topk_weights=torch.full((tokens, top_k), float(UNTOUCHED)), topk_ids=torch.full((tokens, top_k), UNTOUCHED).int())
        source = "router_logits"
    else:
        tokens, top_k, experts = *inputs["topk_ids"].shape, inputs["num_experts"]
        scalars, outputs, source = dict(num_experts=experts), {}, "topk_ids"
    outputs |= {name: torch.full(shape, UNTOUCHED).int()
                for name, shape in (("expert_offsets", (experts + 1,)), ("sorted_slots", (tokens * top_k,)), ("slot_rows", (tokens, top_k)))}
    return {source: numpy(inputs[source]), **scalars, **{name: numpy(x) for name, x in outputs.items()}}, outputs


def run(gpu, op, inputs, launches=None):
    fields, outputs = fields_of(op, inputs)
    before = len(gpu.counters)
    gpu.call(op, outputs=tuple(outputs), **fields)
    assert launches is None or len(gpu.counters) - before == launches
    return tuple(outputs.values())


def check(op, inputs, got):
    """Ids and maps are the reference's, weights as near to float64 as the error rule asks."""
    exact, low = (getattr(reference, op)(**x) for x in (widened(inputs), inputs))
    for value, rounded, wide in zip(got, low, exact, strict=True):
        if wide.is_floating_point():
            assert_accurate(value, rounded, wide)
        else:
            assert torch.equal(value, wide)


def launches_of(tokens, top_k, experts):
    return 1 if tokens <= 16384 and top_k <= 2 and experts <= 16 else 2


def cases(op):
    return [case for case in CASES[op] if not case.large]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("case", cases("moe_gate"), ids=str)
def test_gate_cases(case, arch, dtype):
    inputs, first = case.inputs(DTYPES[dtype]), None
    for seed in range(3):
        got = run(vgpu.Gpu(arch=arch, seed=seed), "moe_gate", inputs, launches_of(case.tokens, case.top_k, case.experts))
        check("moe_gate", inputs, got)
        first = first or got
        assert all(same_bits(torch.nan_to_num(a, nan=-1.0), torch.nan_to_num(b, nan=-1.0)) for a, b in zip(got, first))


@pytest.mark.parametrize("arch", (80, 90))
@pytest.mark.parametrize("case", cases("moe_sort"), ids=str)
def test_sort_cases(case, arch):
    inputs = case.inputs(torch.bfloat16)
    for seed in range(3):
        check("moe_sort", inputs, run(vgpu.Gpu(arch=arch, seed=seed), "moe_sort", inputs, launches_of(case.tokens, case.top_k, case.experts)))
