"""sliding_window_attention and rolling_attention on the virtual GPU: their lists of cases and edges on both architectures under several
schedules, which kernel has which rows, what they cost, bad values on the device."""
import math

import pytest
import torch

import vgpu
from attention_checks import assert_accurate, numpy, same_bits, widened
from mixtral_bench.cases import CASES, RollingAttentionCase, SlidingWindowAttentionCase
from mixtral_ext import reference

SLIDING, ROLLING = "sliding_window_attention", "rolling_attention"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
UNTOUCHED = 77.0
ARCHS = pytest.mark.parametrize("arch", (80, 90))


def run(gpu, op, inputs):
    """-> out, lse (and k_cache, v_cache). Gaps after the rows of out, and what no query has, stay as they are."""
    q = inputs["q"]
    whole = torch.full((*q.shape[:-1], q.shape[-1] + 16), UNTOUCHED, dtype=q.dtype)
    out, lse = whole[..., :q.shape[-1]], torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), UNTOUCHED)
    caches = {name: torch.empty_strided(inputs[name].shape, inputs[name].stride(), dtype=q.dtype).copy_(inputs[name])
              for name in ("k_cache", "v_cache") if name in inputs}
    fields = {name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in {**inputs, **caches}.items()}
    gpu.call(op, outputs=("out", "lse"), **fields, out=numpy(out), lse=numpy(lse))
    assert (whole[..., q.shape[-1]:] == UNTOUCHED).all()
    return out.clone(), lse, *caches.values()


def check(gpu, op, inputs):
    """Runs an op: as near to float64 as the error rule asks, and nothing written where nothing is to be."""
    got = run(gpu, op, inputs)
    low, exact = getattr(reference, op)(**inputs), getattr(reference, op)(**widened(inputs))
    for value, rounded, wide in zip(got[:2], low, exact):
        unwritten = wide.isnan()  # queries outside the bounds
        assert (value[unwritten] == UNTOUCHED).all()
        assert_accurate(value[~unwritten], rounded[~unwritten], wide[~unwritten])
    if op == ROLLING:
        assert same_bits(got[3], low[3])
        if inputs["rope_theta"] is None:
            assert same_bits(got[2], low[2])
        else:
            assert_accurate(got[2], low[2], exact[2])
    return got


def small(op):
    return [case for case in CASES[op] if not case.large and not case.cpu_only]


@pytest.mark.parametrize("dtype", DTYPES)
@ARCHS
@pytest.mark.parametrize("op, case", [(op, case) for op in (SLIDING, ROLLING) for case in small(op)], ids=str)
def test_cases(op, case, arch, dtype):
    inputs = case.inputs(DTYPES[dtype])
    first = check(vgpu.Gpu(arch=arch), op, inputs)
    for seed in (1, 2):
        assert all(same_bits(a, b) for a, b in zip(run(vgpu.Gpu(arch, seed, random_completion=seed == 2), op, inputs), first))
