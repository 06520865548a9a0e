"""sliding_window_attention and rolling_attention on the virtual GPU: their lists of cases and edges on both architectures under several
schedules, which kernel has which rows, what they cost."""
import math
import re

import numpy as np
import pytest
import torch

import vgpu
from attention_checks import assert_accurate, numpy, same_bits, widened
from mixtral_bench.cases import CASES, RollingAttentionCase, SlidingWindowAttentionCase
from mixtral_ext import reference
from test_grouped_kernels import SM_COUNT, ceil_div, text_of
from test_ops import DTYPES, UNTOUCHED

SLIDING, ROLLING = "sliding_window_attention", "rolling_attention"
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
    one(65, 13000, heads=5, key_heads=5, head_dim=128),  # three of the five key heads at a time
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
    SlidingWindowAttentionCase("batched_split", sequences=((2, 700),) * 3, heads=4, layout="batched", keys=((0, 700), (300, 40), (0, 500)),
                               window=600),
    SlidingWindowAttentionCase("many_sequences", sequences=tuple((i % 3, i % 5) for i in range(70)), heads=2),
    SlidingWindowAttentionCase("many_key_heads", sequences=((70, 70), (9, 9)), heads=6, key_heads=6, window=20, padding=16),
]
RINGS = [
    RollingAttentionCase("wrapped_spans", chunks=(1, 1, 1), lengths=(5000, 599, 1300), capacity=1300, window=1250, heads=8, key_heads=2,
                         head_dim=128),
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
    RollingAttentionCase("group_130", chunks=(1, 3, 0), lengths=(40, 77, 9), capacity=70, window=69, heads=130, rope_theta=1e4),
    RollingAttentionCase("empty_chunks", chunks=(0, 70, 0, 1, 0), lengths=(4, 9, 70, 0, 0), capacity=90, window=90, heads=4),
]


@pytest.mark.parametrize("op, case", [*((SLIDING, c) for c in TILE_EDGES + SPLIT_EDGES + RAGGED), *((ROLLING, c) for c in RINGS)], ids=str)
def test_edges(op, case):
    inputs = case.inputs(torch.bfloat16)
    first = check(vgpu.Gpu(arch=80), op, inputs)
    again = run(vgpu.Gpu(arch=90, seed=1, random_completion=True, sm_count=1), op, inputs)
    assert all(same_bits(a, b) for a, b in zip(again, first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", (-0.3, -1e4, 1e4, 1e-300))
@pytest.mark.parametrize("queries", (1, 40))
def test_scales(queries, scale, dtype):
    """A negative one turns the order of the scores around; a large one makes the softmax one-hot, the least one flat."""
    inputs = one(queries, 70, heads=4, window=33).inputs(DTYPES[dtype])
    inputs["softmax_scale"] = scale
    got, exact = run(vgpu.Gpu(), SLIDING, inputs), reference.sliding_window_attention(**widened(inputs))
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2**-7, atol=0.02)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-2)  # scores of 1e5 are good to 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", (-1, 1))
@pytest.mark.parametrize("queries", (1, 40))
def test_large_scales(queries, sign, dtype):
    """Scaled scores near 1e8, which the header sets as the limit. One key has all the weight."""
    inputs = one(queries, 300, heads=4).inputs(DTYPES[dtype])
    inputs["softmax_scale"] = sign * 9e7 / float(torch.einsum("qhd,kd->hqk", inputs["q"].double(), inputs["k"][:, 0].double()).abs().max())
    got, exact = run(vgpu.Gpu(), SLIDING, inputs), reference.sliding_window_attention(**widened(inputs))
    close = torch.isclose(got[0].double(), exact[0], rtol=2**-7, atol=0.02).all(-1)
    assert got[0].isfinite().all() and close.float().mean() > 0.97  # two scores may differ by less than f32 shows
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("queries, keys, gone", ((1, 70, 70), (1, 700, 700), (1, 700, 600), (60, 60, 50), (100, 200, 180)))
def test_scores_of_minus_infinity(queries, keys, gone):
    """The first keys score -inf: as if they were not there, and a query that sees only such keys gets 0 and -inf."""
    inputs = one(queries, keys, heads=4).inputs(torch.bfloat16)
    inputs["q"][..., 5] = 1
    rest = {**inputs, "k": inputs["k"][gone:], "v": inputs["v"][gone:]}
    low, exact = reference.sliding_window_attention(**rest), reference.sliding_window_attention(**widened(rest))
    inputs["k"][:gone, :, 5] = -math.inf
    out, lse = run(vgpu.Gpu(), SLIDING, inputs)
    assert_accurate(out, low[0], exact[0])
    assert_accurate(lse, low[1], exact[1])
    blind = lse.isneginf().T
    assert blind.sum() == 4 * min(queries, max(0, gone - keys + queries)) and (out[blind] == 0).all()


@pytest.mark.parametrize("queries, keys", ((1, 300), (16, 300), (40, 300)))
def test_nan_and_infinity_reach_who_sees_them(queries, keys):
    """As in softmax(scores) @ v. Which other queries a bad value reaches: at most those whose block of rows has one that sees its key."""
    window, at = 100, keys - 20
    inputs = one(queries, keys, heads=4, window=window).inputs(torch.bfloat16)
    position = torch.arange(keys)[-queries:]
    sees = (position >= at) & (position < at + window)
    assert sees.any()
    clean, _ = run(vgpu.Gpu(), SLIDING, inputs)
    for name, bad in ("k", math.nan), ("v", math.nan), ("v", math.inf):
        poisoned = {**inputs, name: inputs[name].clone()}
        poisoned[name][at] = bad
        out, lse = run(vgpu.Gpu(), SLIDING, poisoned)
        assert (out[sees].isfinite().logical_not()).all() and lse[:, sees].isnan().all() == (name == "k")
        tokens = 32 if queries * 4 > 64 else 4  # of a block
        others = torch.tensor([not sees[i // tokens * tokens:i // tokens * tokens + tokens].any() for i in range(queries)])
        assert same_bits(out[others], clean[others])


@pytest.mark.parametrize("longest, together", ((90, 3), (40_000, 2), (60_000, 1)))
def test_key_heads_in_turn(longest, together):
    """As many at a time as have 24 MB of keys and values that may be read, by what is declared; the result is the same."""
    inputs = RollingAttentionCase("", chunks=(70, 33), lengths=(20, 3), capacity=60_070, window=None, heads=6, key_heads=3).inputs(torch.bfloat16)
    inputs["max_cache_length"] = longest
    gpu = vgpu.Gpu()
    check(gpu, ROLLING, inputs)
    tiles = gpu.counters[kernels(gpu).index(TILES)]
    assert tiles["blocks"] == 3 * together * ceil_div(3, together)


def test_lse_is_optional():
    for case in one(1, 700, heads=4), one(1, 70, heads=4), one(40, 70, heads=4):
        inputs = case.inputs(torch.bfloat16)
        expected, _ = run(vgpu.Gpu(), SLIDING, inputs)
        out = torch.full_like(inputs["q"], math.nan)
        vgpu.Gpu().call(SLIDING, outputs=("out",), **{name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()},
                        out=numpy(out))
        assert same_bits(out, expected)


# ----------------------------------------------------------------------------------------------------------------- bits


@ARCHS
def test_sequences_do_not_depend_on_neighbours(arch):
    """The same bits alone, though alone one kernel is enough for each."""
    case = SlidingWindowAttentionCase("", sequences=((1, 700), (9, 9), (60, 75), (1, 3), (17, 500)), heads=4, window=300)
    inputs, gpu = case.inputs(torch.bfloat16), vgpu.Gpu(arch)
    out, lse = run(gpu, SLIDING, inputs)
    q, k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    for b in range(len(case.sequences)):
        at, of = slice(q[b], q[b + 1]), slice(k[b], k[b + 1])
        alone = run(gpu, SLIDING, dict(q=inputs["q"][at], k=inputs["k"][of], v=inputs["v"][of], window=300))
        assert same_bits(alone[0], out[at]) and same_bits(alone[1], lse[:, at])


@ARCHS
@pytest.mark.parametrize("rope_theta", (None, 1e4))
@pytest.mark.parametrize("heads", (4, 71))
def test_steps_do_not_depend_on_neighbours(heads, arch, rope_theta):
    """Of a ragged step, of which a decoding sequence is in a batch of its own: the store before the attention and after it give one result."""
    case = RollingAttentionCase("", chunks=(1, 5, 40, 1), lengths=(900, 700, 333, 64), capacity=600, window=600, heads=heads, rope_theta=rope_theta)
    inputs, gpu = case.inputs(torch.bfloat16), vgpu.Gpu(arch)
    out, lse, *caches = run(gpu, ROLLING, inputs)
    bounds = inputs["cu_seqlens_q"].tolist()
    for b, n in enumerate(case.chunks):
        at = slice(bounds[b], bounds[b + 1])
        alone = {**inputs, **{name: inputs[name][at] for name in "qkv"}, "k_cache": inputs["k_cache"][b:b + 1], "v_cache": inputs["v_cache"][b:b + 1],
                 "cu_seqlens_q": torch.tensor([0, n]).int(), "cache_lengths": inputs["cache_lengths"][b:b + 1], "max_seqlen_q": n}
        got = run(gpu, ROLLING, alone)
        assert same_bits(got[0], out[at]) and same_bits(got[1], lse[:, at])
        assert all(same_bits(x[0], cache[b]) for x, cache in zip(got[2:], caches))


# ---------------------------------------------------------------------------------------------------------------- costs

SPLIT, COMBINE, TILES, CHUNK = "attention_split_kernel", "attention_combine_kernel", "attention_tiles_kernel", "rotate_store_kernel"
LEAST_SPAN, MOST_SPANS = 512, 64


def kernels(gpu):
    return [next(name for name in (SPLIT, COMBINE, TILES, CHUNK) if name in c["kernel"]) for c in gpu.counters]


@pytest.mark.parametrize("case, launches", [
    (one(16, 16, heads=4), [SPLIT]), (one(17, 17, heads=4), [TILES]), (one(16, 513, heads=4), [SPLIT, COMBINE]),
    (one(1, 9000, heads=4, window=512), [SPLIT]),
    (one(1, 9000, heads=4, window=513), [SPLIT, COMBINE]), (one(65, 9, heads=1), [TILES]), (one(0, 9), []),
    (SlidingWindowAttentionCase("ragged", sequences=((70, 70), (1, 600))), [SPLIT, COMBINE, TILES]),
    (SlidingWindowAttentionCase("ragged_short", sequences=((70, 70), (1, 3))), [SPLIT, TILES]),
    (SlidingWindowAttentionCase("batched", sequences=((70, 70),) * 2, layout="batched"), [TILES]),
    (SlidingWindowAttentionCase("batched_split", sequences=((2, 600),) * 2, layout="batched"), [SPLIT, COMBINE]),
    (RollingAttentionCase("decode", chunks=(1, 1), lengths=(1100, 3), capacity=1024, window=1024), [CHUNK, SPLIT, COMBINE]),
    (RollingAttentionCase("decode_rope", chunks=(1, 1), lengths=(1100, 3), capacity=1024, window=1024, rope_theta=1e4), [CHUNK, SPLIT, COMBINE]),
    (RollingAttentionCase("decode_one_span", chunks=(1, 1), lengths=(1100, 3), capacity=256, window=256), [CHUNK, SPLIT]),
    (RollingAttentionCase("decode_71_heads", chunks=(1, 1), lengths=(1100, 3), capacity=1024, window=1024, heads=71), [CHUNK, TILES]),
    (RollingAttentionCase("decode_read_only", chunks=(1,), lengths=(1100,), capacity=1024, window=1024, read_only=True), [SPLIT, COMBINE]),
    (RollingAttentionCase("few_tokens", chunks=(2, 1), lengths=(1100, 3), capacity=1024, window=1024, rope_theta=1e4), [CHUNK, SPLIT, COMBINE, CHUNK]),
    (RollingAttentionCase("prompt", chunks=(70,), lengths=(0,), capacity=256, window=100), [SPLIT, TILES, CHUNK]),
    (RollingAttentionCase("prompt_rope", chunks=(70, 1), lengths=(0, 1100), capacity=1024, window=1024, rope_theta=1e4),
     [CHUNK, SPLIT, COMBINE, TILES, CHUNK])], ids=str)
def test_launches(case, launches):
    """A decoding step is three at most; which, depends on shapes and declared maxima alone."""
    gpu = vgpu.Gpu()
    check(gpu, case.op, case.inputs(torch.bfloat16))
    assert kernels(gpu) == launches


def spans_of(keys):
    return ceil_div(keys, LEAST_SPAN * ceil_div(max(keys, 1), LEAST_SPAN * MOST_SPANS)) if keys else 1


@pytest.mark.parametrize("keys, spans", ((512, 1), (513, 2), (4096, 8), (32768, 64), (32769, 33), (65537, 43)))
def test_spans(keys, spans):
    """Of a length alone: at least 512 keys, at most 64. Each leaves the sums of a row, a shift and a sum of weights."""
    gpu = vgpu.Gpu()
    run(gpu, SLIDING, one(1, keys, heads=1).inputs(torch.bfloat16))
    assert spans_of(keys) == spans
    assert gpu.counters[0]["global_store_bytes"] == (64 * 2 + 4 if spans == 1 else spans * (64 * 4 + 8))


def masked_scores(c):
    """Warp instructions that put -inf in the place of a score."""
    return sum(n for where, n in c["selections_by_line"].items() if "mask.sees(" in text_of(where)[0])


@ARCHS
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("n, m, group, window", ((128, 128, 1, None), (150, 400, 4, None), (150, 400, 4, 100), (64, 1000, 8, 257), (70, 70, 2, 1)))
def test_cost_of_tiles(n, m, group, window, head_dim, arch):
    """By brute force over which query sees which key: q once, of k and v only what some row of a block sees; products only of tiles of keys
    with such keys; masks only where some row does not see all of the tile; no bank conflict."""
    gpu = vgpu.Gpu(arch)
    run(gpu, SLIDING, one(n, m, heads=group, head_dim=head_dim, window=window).inputs(torch.bfloat16))
    c, = gpu.counters
    query, key = torch.arange(n)[:, None] + m - n, torch.arange(ceil_div(m, 64) * 64)[None]
    sees = (key <= query) & (key > query - (window or m)) & (key < m)
    row = sees.repeat_interleave(group, 0)
    loaded, flops, masked, tiles = 0, 0, 0, 0
    for first in range(0, n * group, 128):
        block = row[first:first + 128]
        loaded += int(block.any(0).sum())
        warps = ceil_div(len(block), 32)
        for t in block.split(64, 1):
            tiles += bool(t.any())
            flops += bool(t.any()) * warps * 32 * 64 * head_dim * 4
            masked += bool(t.any() and not t.all()) * warps
    assert c["async_load_bytes"] == (n * group + 2 * loaded) * head_dim * 2
    assert c["matrix_flops"] == flops
    assert masked_scores(c) == masked * 64  # scores of a thread
    assert c["barriers"] == 4 * (2 * tiles + 2 * ceil_div(n * group, 128))
    assert c["shared_conflicts"] == 0, c["conflicts_by_line"]
    assert c["global_store_bytes"] == n * group * (head_dim * 2 + 4)
    if window:  # as many tiles as the formula says, and of them two or three with a mask
        tokens = 128 // group
        assert tiles <= ceil_div(n * group, 128) * (ceil_div(min(window, m) + tokens - 1, 64) + 1)


@ARCHS
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("length, capacity, window, group", ((300, 512, 512, 4), (5000, 1024, 1024, 4), (700, 600, 555, 16), (50, 64, 64, 1),
                                                             (999, 1000, 999, 2)))
def test_cost_of_decoding(length, capacity, window, group, head_dim, arch):
    """Keys and values once for the group, q once a warp; sums of a span out and back; masks at the end of the keys alone."""
    gpu, key_heads = vgpu.Gpu(arch), 2
    run(gpu, ROLLING, RollingAttentionCase("", chunks=(1,), lengths=(length,), capacity=capacity, window=window, heads=2 * group, key_heads=2,
                                           head_dim=head_dim).inputs(torch.bfloat16))
    keys = min(length + 1, window)
    spans, rows = spans_of(keys), group * key_heads
    chunk, split, *combine = gpu.counters
    assert chunk["global_store_bytes"] == 2 * key_heads * head_dim * 2
    assert split["async_load_bytes"] == key_heads * keys * head_dim * 4
    assert split["matrix_flops"] == key_heads * ceil_div(keys, 16) * 16 * 16 * head_dim * 4
    assert masked_scores(split) == (key_heads * 8 if keys % 16 else 0)
    assert split["shared_conflicts"] == 0, split["conflicts_by_line"]
    assert split["blocks"] == min(2 * SM_COUNT, spans * key_heads)
    out = rows * (head_dim * 2 + 4)
    partial = rows * spans * (head_dim * 4 + 8)
    if spans == 1:
        assert split["global_store_bytes"] == out and not combine
    else:
        assert split["global_store_bytes"] == partial
        assert combine[0]["global_store_bytes"] == out and combine[0]["blocks"] == min(8 * SM_COUNT, ceil_div(rows, 4))


@pytest.mark.parametrize("batch, tokens, longest, capacity, window", ((128, 128, 1, 4096, 4096), (128, 255, 128, 4096, 4096),
                                                                      (128, 255, 128, 32768, None)))
def test_workspace(batch, tokens, longest, capacity, window):
    """As the header says: (D+2)*4 bytes a span, query head and token that there are; with decoding beside a prompt, too."""
    def array(*shape):
        return np.lib.stride_tricks.as_strided(np.zeros(1, np.uint16), shape, [2 * math.prod(shape[i + 1:]) for i in range(len(shape))])

    gpu = vgpu.Gpu()
    gpu.start()
    q, k, cache = array(tokens, 32, 128), array(tokens, 8, 128), array(batch, capacity, 8, 128)
    size = gpu.lib.workspace_size(ROLLING, gpu.lib.context(arch="sm90", device="cuda"), q=q, k=k, v=k, k_cache=cache, v_cache=cache, out=q,
                                  cu_seqlens_q=np.zeros(batch + 1, np.int32), cache_lengths=np.zeros(batch, np.int32), window=window or 0,
                                  max_seqlen_q=longest, max_cache_length=capacity - longest)
    assert size <= 1.2 * tokens * 32 * min(64, ceil_div(capacity, LEAST_SPAN) + 1) * (128 + 2) * 4


def test_resources():
    """As the heads of the files say. Nothing spills; sums, scores and fragments are in registers. 128 threads with 255 fit an SM twice."""
    found = {}
    for ptx in vgpu.Gpu.library_ptx():
        if "attention_" in ptx:
            for name, r in vgpu.resources(ptx).items():
                if match := re.search(rf"({TILES}|{SPLIT}|{COMBINE}).*Li(64|128)E", name):
                    found.setdefault((match[1], int(match[2])), []).append(r)
    registers = {(TILES, 64): (64 + 64 + 24, 238), (TILES, 128): (128 + 64 + 24, 255), (SPLIT, 64): (32 + 16 + 8, 146),
                 (SPLIT, 128): (64 + 32 + 8, 192), (COMBINE, 64): (1, 64), (COMBINE, 128): (1, 64)}  # at least, at most
    assert found.keys() == registers.keys()
    for kernel, all_of in found.items():
        assert len(all_of) == 4  # two dtypes, two architectures
        for r in all_of:
            assert r["spills"] == 0 and r["shared_bytes"] == 0 and registers[kernel][0] <= r["registers"] <= registers[kernel][1], (kernel, r)
