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


# ---------------------------------------------------------------------------------------------------------------- edges


def one(queries, keys, **other):
    return SlidingWindowAttentionCase(f"{queries}_of_{keys}_{'_'.join(f'{k}{v}' for k, v in other.items())}", sequences=((queries, keys),),
                                      layout="single", **other)


TILE_EDGES = [  # more than 64 rows
    *(one(n, n, heads=1) for n in (65, 127, 128, 129, 191, 193)),
    *(one(n, m, heads=4) for n, m in ((17, 17), (31, 31), (32, 32), (33, 33), (32, 64), (32, 65), (33, 63), (64, 191), (65, 193))),
    *(one(100, 200, heads=g, window=70) for g in (1, 2, 3, 4, 8, 11)),
    *(one(140, 140, heads=2, window=w) for w in (1, 2, 63, 64, 65, 128, 139, 140, 141)),
    *(one(40, 300, heads=4, key_heads=2, head_dim=128, window=w) for w in (None, 1, 64, 127, 128, 129, 259, 260, 261, 300)),
    one(97, 130, heads=16, key_heads=2, head_dim=128),
    one(130, 100, heads=4), one(70, 3, heads=4, window=2), one(100, 1, heads=2, window=5), one(100, 0, heads=2),
]
SPLIT_EDGES = [  # up to 64 rows
    *(one(1, m, heads=4) for m in (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513)),
    *(one(1, 70, heads=2 * g, key_heads=2, head_dim=128, window=45) for g in (1, 2, 3, 4, 8, 11, 16, 17, 33, 64)),
    *(one(n, 90, heads=4, window=w) for n in (2, 4, 5, 15, 16) for w in (None, 1, 64, 65, 90)),
    one(1, 1300, heads=8, key_heads=2, head_dim=128), one(1, 1300, heads=8, key_heads=2, window=777), one(16, 600, heads=4, window=300),
    one(1, 16384 + 500, heads=1), one(2, 9000, heads=4, window=8999), one(5, 3, heads=4), one(1, 0, heads=4),
]
RAGGED = [
    SlidingWindowAttentionCase("ragged", sequences=((70, 70), (1, 600), (0, 9), (33, 129), (5, 0), (16, 90), (17, 17)), heads=4, window=65, tail=3),
    SlidingWindowAttentionCase("ragged_128", sequences=((3, 700), (40, 40), (1, 1)), heads=8, key_heads=2, head_dim=128),
    SlidingWindowAttentionCase("no_maxima", sequences=((1, 300), (40, 70)), heads=4, maxima=False),
    SlidingWindowAttentionCase("batched_tiles", sequences=((40, 90),) * 3, heads=4, layout="transposed", keys=((0, 90), (30, 60), (85, 3)), window=50,
                               padding=8),
    SlidingWindowAttentionCase("batched_split", sequences=((2, 700),) * 3, heads=4, layout="batched", keys=((0, 700), (300, 40), (0, 500)), window=600),
    SlidingWindowAttentionCase("many_sequences", sequences=tuple((i % 3, i % 5) for i in range(70)), heads=2),
    SlidingWindowAttentionCase("many_key_heads", sequences=((70, 70), (9, 9)), heads=6, key_heads=6, window=20, padding=16),
]
RINGS = [
    RollingAttentionCase("wrapped_spans", chunks=(1, 1, 1), lengths=(5000, 599, 1300), capacity=1300, window=1250, heads=8, key_heads=2, head_dim=128),
    RollingAttentionCase("window_is_capacity", chunks=(1, 4), lengths=(2000, 600), capacity=600, window=600, heads=4),
    RollingAttentionCase("long_chunks", chunks=(130, 1, 66), lengths=(333, 64, 0), capacity=160, window=100, heads=4, key_heads=2),
    RollingAttentionCase("chunk_past_capacity", chunks=(100,), lengths=(45,), capacity=64, window=64, heads=4, head_dim=128),
    RollingAttentionCase("chunk_twice_capacity", chunks=(150, 70), lengths=(45, 10), capacity=64, window=50, heads=4),
    RollingAttentionCase("wraps_within_tiles", chunks=(40, 40, 40), lengths=(70, 170, 1023), capacity=150, window=149, heads=4),
    RollingAttentionCase("first_fill", chunks=(70, 33), lengths=(0, 1), capacity=90, window=90, heads=4),
    RollingAttentionCase("causal", chunks=(70, 1, 20), lengths=(10, 79, 60), capacity=150, window=None, heads=4),
    RollingAttentionCase("causal_read_only", chunks=(40, 1), lengths=(10, 79), capacity=120, window=None, heads=4, read_only=True),
    RollingAttentionCase("read_only", chunks=(40, 1, 3), lengths=(200, 79, 500), capacity=140, window=101, heads=4, read_only=True),
    RollingAttentionCase("rope", chunks=(40, 1, 3), lengths=(200, 79, 500), capacity=140, window=101, heads=4, rope_theta=1e4, padding=8),
    RollingAttentionCase("rope_slots", chunks=(40, 1), lengths=(200, 79), capacity=140, window=101, heads=4, rope_theta=1e6, rope_interleaved=True,
                         slots=5, cache_slots=(3, 0), tail=2),
    RollingAttentionCase("rope_read_only", chunks=(40, 1), lengths=(200, 79), capacity=140, window=101, heads=4, rope_theta=1e4, read_only=True),
    RollingAttentionCase("decode_rope", chunks=(1,) * 5, lengths=(0, 1, 63, 64, 600), capacity=300, window=290, heads=4, rope_theta=1e4),
    RollingAttentionCase("group_3", chunks=(1, 5, 30), lengths=(40, 77, 9), capacity=33, window=33, heads=6, key_heads=2),
    RollingAttentionCase("window_1", chunks=(1, 70), lengths=(40, 77), capacity=33, window=1, heads=4),
    RollingAttentionCase("capacity_1", chunks=(1, 70), lengths=(40, 77), capacity=1, window=1, heads=4),
    RollingAttentionCase("last_position", chunks=(1, 70), lengths=(2**31 - 2, 2**31 - 71), capacity=150, window=150, heads=4),
    RollingAttentionCase("empty_chunks", chunks=(0, 70, 0, 1, 0), lengths=(4, 9, 70, 0, 0), capacity=90, window=90, heads=4),
]


@pytest.mark.parametrize("op, case", [*((SLIDING, c) for c in TILE_EDGES + SPLIT_EDGES + RAGGED), *((ROLLING, c) for c in RINGS)], ids=str)
def test_edges(op, case):
    inputs = case.inputs(torch.bfloat16)
    first = check(vgpu.Gpu(arch=80), op, inputs)
    again = run(vgpu.Gpu(arch=90, seed=1, random_completion=True, sm_count=1), op, inputs)
    assert all(same_bits(a, b) for a, b in zip(again, first))
