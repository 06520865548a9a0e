"""mixtral_ext.numpy: every op against its formula in float64, its own rules (dtypes, out, read-only arrays, threads), and all
of that once more where torch cannot be imported."""
import math
import os
import subprocess
import sys
import sysconfig
import threading
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import c_api

# No module at all is a broken build and fails.
if (others := list(c_api.NATIVE.parent.glob("_numpy.*.so"))) and not (c_api.NATIVE.parent / f"_numpy{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
    pytest.skip(f"mixtral_ext.numpy is built for another Python: {others[0].name}", allow_module_level=True)
import mixtral_ext.numpy as ops  # noqa: E402

ROOT = Path(__file__).parents[1]
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # the largest relative error of one rounding
DTYPES = pytest.mark.parametrize("dtype", ROUNDING)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def exact(x):
    """Any array as float64; uint16 is bfloat16."""
    return (c_api.to_f32(x) if x.dtype == np.uint16 else x).astype(np.float64)


def expect_close(got, expected, dtype, stages=1):
    """Relative Frobenius error of `stages` roundings at most."""
    assert got.shape == expected.shape
    error = np.linalg.norm(exact(got) - expected) / max(np.linalg.norm(expected), 1e-30)
    assert error <= stages * ROUNDING[dtype] + 1e-6, error


def same(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# --------------------------------------------------------------------------------------------------- formulas in float64

def maps_of(ids, num_experts):
    flat = ids.reshape(-1)
    valid = (flat >= 0) & (flat < num_experts)
    order = [slot for expert in range(num_experts) for slot in np.flatnonzero(flat == expert)]
    offsets = np.array([0, *np.cumsum([(flat == expert).sum() for expert in range(num_experts)])])
    slots, rows = np.full(flat.size, -1), np.full(flat.size, -1)
    slots[:valid.sum()] = order
    rows[order] = np.arange(len(order))
    return offsets, slots, rows.reshape(ids.shape)


def silu(x):
    return x / (1 + np.exp(-x))


def experts_of(hidden, w_gate_up, w_down, weights, ids):
    out = np.zeros_like(hidden)
    for t, j in np.ndindex(ids.shape):
        if 0 <= ids[t, j] < len(w_down):
            gate, up = np.split(w_gate_up[ids[t, j]] @ hidden[t], 2)
            out[t] += weights[t, j] * (w_down[ids[t, j]] @ (silu(gate) * up))
    return out


def attend(q, k, v, window, scale):
    """q [n, Hq, D], k and v [m, Hk, D] -> out [n, Hq, D], lse [Hq, n]."""
    n, m, group = len(q), len(k), q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    position, key = np.arange(m - n, m)[:, None], np.arange(m)[None, :]
    seen = (key <= position) & (key > position - (window or m + n))
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(seen, np.exp(scores), 0)
        total = weights.sum(-1)
        out = np.einsum("hqk,khd->qhd", np.where(total[..., None] > 0, weights / total[..., None], 0), v)
        return out, np.log(total)


def rotated(x, positions, theta, interleaved):
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    pair = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return np.stack(pair, -1).reshape(x.shape) if interleaved else np.concatenate(pair, -1)


# ---------------------------------------------------------------------------------------------------------------- routing

@DTYPES
@pytest.mark.parametrize("renormalize", [True, False])
def test_moe_gate(rng, dtype, renormalize):
    logits = c_api.cast(rng.normal(size=(37, 12)), dtype)[:, :9]  # 3 more in every row: strided
    weights, ids, *maps = ops.moe_gate(logits, 3, renormalize)
    x = exact(logits)
    expected_ids = np.argsort(-x, axis=1, kind="stable")[:, :3]
    chosen = np.take_along_axis(x, expected_ids, 1)
    np.testing.assert_array_equal(ids, expected_ids)
    expected = np.exp(chosen) / np.exp(chosen if renormalize else x).sum(1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=2e-6)
    for got, expected in zip(maps, maps_of(ids, 9)):
        np.testing.assert_array_equal(got, expected)
    assert [array.dtype.name for array in (weights, ids, *maps)] == ["float32"] + 4 * ["int32"]


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_moe_sort(rng, dtype):
    ids = rng.integers(-2, 8, (41, 2)).astype(dtype)  # -2, -1, 6 and 7 are skip markers
    for got, expected in zip(ops.moe_sort(ids, 6), maps_of(ids, 6)):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.int32


@DTYPES
def test_moe_permute_and_combine(rng, dtype):
    ids = rng.integers(-1, 5, (20, 2))
    offsets, slots, rows_of = (x.astype(np.int32) for x in maps_of(ids, 5))
    hidden = c_api.cast(rng.normal(size=(20, 48)), dtype)
    weights = rng.random((20, 2), np.float32)
    used = slots >= 0
    rows = ops.moe_permute(hidden, slots, 2)
    assert same(rows[used], hidden[slots[used] // 2])
    rows[~used] = c_api.cast(np.nan, dtype)
    weights[rows_of < 0] = np.nan  # not read
    expected = np.zeros((20, 48))
    for t, j in np.ndindex(20, 2):
        if rows_of[t, j] >= 0:
            expected[t] += weights[t, j].astype(np.float64) * exact(rows[rows_of[t, j]])
    expect_close(ops.moe_combine(rows, rows_of, weights), expected, dtype)


# ---------------------------------------------------------------------------------------------------------------- experts

@DTYPES
@pytest.mark.parametrize("gather", [False, True])
def test_grouped_gemm(rng, dtype, gather):
    offsets = np.array([0, 5, 5, 24, 30], np.int32)
    a = c_api.cast(rng.normal(size=(16 if gather else 33, 64)), dtype)
    b, w_gate_up = (c_api.cast(rng.normal(size=(4, n, 64)) / 8, dtype) for n in (40, 80))
    a_rows = rng.integers(0, 32, 33).astype(np.int32) if gather else None
    if gather:
        a_rows[30:] = 2**31 - 1  # past the last offset: not read
    x = exact(a)[a_rows[:30] // 2] if gather else exact(a)[:30]
    expert = np.searchsorted(offsets[1:], np.arange(30), side="right")
    expected = np.einsum("rk,rnk->rn", x, exact(b)[expert])
    gate, up = np.split(np.einsum("rk,rnk->rn", x, exact(w_gate_up)[expert]), 2, axis=1)
    divisor = 2 if gather else 1
    expect_close(ops.grouped_gemm(a, b, offsets, a_rows, divisor)[:30], expected, dtype)
    expect_close(ops.grouped_gemm_swiglu(a, w_gate_up, offsets, a_rows, divisor)[:30], silu(gate) * up, dtype)
    out = c_api.cast(np.full((33, 41), 7.0), dtype)
    assert ops.grouped_gemm(a, b, offsets, a_rows, divisor, out=out[:, :40])[:30].base is out
    expect_close(out[:30, :40], expected, dtype)
    assert (exact(out[30:]) == 7).all() and (exact(out[:, 40]) == 7).all()


@DTYPES
@pytest.mark.parametrize("maps_given", [False, True])
def test_moe_experts(rng, dtype, maps_given):
    hidden = c_api.cast(rng.normal(size=(11, 64)), dtype)
    w_gate_up, w_down = (c_api.cast(rng.normal(size=shape) / 8, dtype) for shape in ((5, 96, 64), (5, 64, 48)))
    weights, ids = rng.random((11, 2), np.float32), rng.integers(-1, 6, (11, 2))
    maps = ops.moe_sort(ids, 5) if maps_given else (None, None, None)
    given_ids = np.full_like(ids, 2**40) if maps_given else ids  # not read with the maps
    expected = experts_of(exact(hidden), exact(w_gate_up), exact(w_down), weights.astype(np.float64), ids)
    expect_close(ops.moe_experts(hidden, w_gate_up, w_down, weights, given_ids, *maps), expected, dtype, stages=3)


# -------------------------------------------------------------------------------------------------------------- attention

@DTYPES
@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_sliding_window_attention(rng, dtype, window):
    storage = [c_api.cast(rng.normal(size=(2, heads, 30, 64)), dtype) for heads in (4, 2, 2)]
    q, k, v = (x.swapaxes(1, 2) for x in storage)  # [B, S, H, D] as a view of [B, H, S, D]
    out, lse = ops.sliding_window_attention(q, k, v, window=window)
    for b in range(2):
        expected, expected_lse = attend(exact(q[b]), exact(k[b]), exact(v[b]), window, 1 / 8)
        expect_close(out[b], expected, dtype, stages=2)  # the second: probabilities may be rounded for the product
        np.testing.assert_allclose(lse[b], expected_lse, rtol=1e-5, atol=1e-5)
    assert lse.dtype == np.float32 and out.dtype == q.dtype


@DTYPES
def test_sliding_window_attention_packed_and_ranges(rng, dtype):
    q, k, v = (c_api.cast(rng.normal(size=(n, heads, 64)), dtype) for n, heads in ((9, 4), (21, 2), (21, 2)))
    bounds_q, bounds_k = np.array([0, 4, 4, 9], np.int32), np.array([0, 2, 5, 21], np.int32)
    out, lse = ops.sliding_window_attention(q, k, v, bounds_q, bounds_k, 5, 16, window=6, softmax_scale=0.3)
    for b in range(3):
        at, of = slice(*bounds_q[b:b + 2]), slice(*bounds_k[b:b + 2])
        expected, expected_lse = attend(exact(q[at]), exact(k[of]), exact(v[of]), 6, 0.3)
        expect_close(out[at], expected, dtype, stages=2)
        np.testing.assert_allclose(lse[:, at], expected_lse, rtol=1e-5, atol=1e-5)
    assert (lse[:, :2] == -np.inf).all() and (exact(out[:2]) == 0).all()  # the first two stand before all keys

    start, length = np.array([3], np.int32), np.array([10], np.int32)
    k[:3] = k[13:] = v[:3] = v[13:] = c_api.cast(np.nan, dtype)
    one, none = ops.sliding_window_attention(q[None], k[None], v[None], k_start=start, k_length=length,
                                             out=(np.empty_like(q)[None], None))
    assert none is None
    expect_close(one[0], attend(exact(q), exact(k[3:13]), exact(v[3:13]), None, 1 / 8)[0], dtype, stages=2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rolling_attention(rng, interleaved):
    """Two sequences fed in uneven chunks through rings of 8 slots give what attention over the whole gives."""
    lengths, window, capacity = (29, 17), 6, 8
    q, k, v = ([rng.normal(size=(n, heads, 64)).astype(np.float32) for n in lengths] for heads in (4, 2, 2))
    k_cache, v_cache = np.full((2, 3, capacity, 2, 64), np.nan, np.float32)
    slots = np.array([2, 0], np.int32)
    out, seen = [[], []], np.zeros(2, np.int32)
    for chunk in ((3, 1), (1, 1), (12, 7), (0, 1), (13, 7)):
        parts = [[x[b][seen[b]:seen[b] + chunk[b]] for b in range(2)] for x in (q, k, v)]
        bounds = np.array([0, chunk[0], sum(chunk)], np.int32)
        before = seen.copy()
        result, lse = ops.rolling_attention(*(np.concatenate(part) for part in parts), k_cache, v_cache, bounds, seen, window,
                                            cache_slots=slots, rope_theta=1e4, rope_interleaved=interleaved)
        assert (seen == before).all() and np.isfinite(lse).all()
        for b in range(2):
            out[b].append(result[bounds[b]:bounds[b + 1]])
        seen += np.array(chunk, np.int32)
    for b in range(2):
        positions = np.arange(lengths[b])
        turned = [rotated(x[b].astype(np.float64), positions, 1e4, interleaved) for x in (q, k)]
        expected = attend(*turned, v[b].astype(np.float64), window, 1 / 8)[0]
        np.testing.assert_allclose(np.concatenate(out[b]), expected, rtol=1e-4, atol=1e-5)
        last = positions[-capacity:]
        np.testing.assert_allclose(k_cache[slots[b], last % capacity], turned[1][last], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(v_cache[slots[b], last % capacity], v[b][last])
    assert np.isnan(k_cache[1]).all()

    ring = k_cache.copy(), v_cache.copy()  # read-only form: the last query again, everything it sees is in the ring
    again, _ = ops.rolling_attention(rotated(q[0][-1:], positions=np.array([28]), theta=1e4, interleaved=interleaved).astype(np.float32),
                                     None, None, k_cache, v_cache, np.array([0, 1], np.int32), np.array([28], np.int32), window,
                                     cache_slots=slots[:1])
    np.testing.assert_allclose(again, out[0][-1][-1:], rtol=1e-4, atol=1e-5)
    assert same(ring[0], k_cache) and same(ring[1], v_cache)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_apply_rope(rng, dtype, interleaved, index):
    q, k = (c_api.cast(rng.normal(size=(6, heads, 64)), dtype) for heads in (4, 2))
    positions = np.array([0, 1, 2, 50, 99, 7], index)
    expected = [rotated(exact(x), positions, 1e4, interleaved) for x in (q, k)]
    assert ops.apply_rope(q, k, positions, 1e4, interleaved) is None
    for got, turned in zip((q, k), expected):
        expect_close(got, turned, dtype, stages=1.1)  # angles of up to 99 are off by 2^-18 in float32
    ops.apply_rope(q, None, positions, 1e4, interleaved)


# ------------------------------------------------------------------------------------------------------------------ rules

def test_bfloat16_of_ml_dtypes(rng):
    """An array whose dtype is called bfloat16 is used as it is, and so is the result."""
    bfloat16 = pytest.importorskip("ml_dtypes", reason="no package here brings a bfloat16 dtype to numpy").bfloat16
    a, b = rng.normal(size=(3, 64)).astype(bfloat16), rng.normal(size=(1, 16, 64)).astype(bfloat16)
    offsets = np.array([0, 3], np.int32)
    out = ops.grouped_gemm(a, b, offsets)
    assert out.dtype == bfloat16
    assert same(out.view(np.uint16), ops.grouped_gemm(a.view(np.uint16), b.view(np.uint16), offsets))


def gate_with(logits, **arguments):
    return lambda: ops.moe_gate(logits, **arguments)


LOGITS = np.zeros((3, 8), np.float32)
HEADS = np.zeros((2, 4, 64), np.float32)
READ_ONLY = np.zeros((2, 4, 64), np.float32)
READ_ONLY.flags.writeable = False
RING = np.zeros((1, 4, 4, 64), np.float32)
READ_ONLY_RING = RING.copy()
READ_ONLY_RING.flags.writeable = False
ONE = np.array([0, 2], np.int32)
ZERO = np.array([0], np.int32)
INTERLACED = np.zeros((3, 8), [("x", np.float32), ("y", np.uint8)])["x"]


@pytest.mark.parametrize("call, error, message", [
    (gate_with(LOGITS.astype(np.float64)), ValueError, "router_logits: expected dtype float32, bfloat16 or float16, got float64$"),
    (gate_with(LOGITS.astype(np.int8)), ValueError, "router_logits: expected dtype float32, bfloat16 or float16, got int8$"),
    (gate_with(LOGITS.astype(np.complex64)), ValueError, "router_logits: expected dtype float32, bfloat16 or float16, got complex64$"),
    (gate_with(LOGITS > 0), ValueError, "router_logits: expected dtype float32, bfloat16 or float16, got bool$"),
    (gate_with(LOGITS.astype(object)), ValueError, "router_logits: expected numbers, got dtype object$"),
    (gate_with(LOGITS.astype(">f4")), ValueError, "router_logits: expected native byte order, got dtype >f4"),
    (gate_with(LOGITS.astype(np.int32)), ValueError, "router_logits: expected dtype float32, bfloat16 or float16, got int32"),
    (gate_with(LOGITS[0]), ValueError, "router_logits: expected 2 dimensions, got 1"),
    (gate_with(LOGITS[..., None, None, None]), ValueError, "router_logits: expected 1 to 4 dimensions, got 5"),
    (gate_with(np.float32(1)), TypeError, "router_logits: expected a numpy array, got float32"),
    (gate_with([[1.0, 2.0]]), TypeError, "router_logits: expected a numpy array, got list"),
    (gate_with(None), ValueError, "router_logits: expected a tensor, got none"),
    (gate_with(LOGITS.T), ValueError, "router_logits: expected innermost stride 1, got 8"),
    (gate_with(LOGITS[::-1]), ValueError, "router_logits: expected strides of 0 or more, got -8 in dimension 0"),
    (gate_with(INTERLACED), ValueError, "router_logits: expected strides of whole elements"),
    (gate_with(LOGITS, top_k=9), ValueError, "top_k: expected 1 to 8, got 9"),
    (gate_with(LOGITS, top_k=-1), ValueError, "top_k: expected 1 to 8, got -1"),
    (gate_with(LOGITS, top_k=2**33), ValueError, "top_k: expected an integer of 32 bits, got 8589934592"),
    (gate_with(LOGITS, top_k=2.0), TypeError, "top_k: expected an integer, got float"),
    (gate_with(LOGITS, out=LOGITS), TypeError, "out: expected a tuple of 5 arrays, got ndarray"),
    (gate_with(LOGITS, out=(LOGITS,)), TypeError, "out: expected a tuple of 5 arrays, got tuple of 1"),
    (lambda: ops.moe_sort(np.zeros((2, 2), np.int16), 4), ValueError, "topk_ids: expected dtype int32 or int64, got int16$"),
    (lambda: ops.moe_sort(np.zeros((2, 2), np.int32), 2**20), ValueError, "num_experts: expected 1 to 256, got 1048576"),
    (lambda: ops.moe_permute(LOGITS, np.array([0, 6], np.int32), 2), ValueError, "sorted_slots: expected -1 to 5, got 6"),
    (lambda: ops.moe_combine(LOGITS, np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32), out=READ_ONLY), ValueError,
     "out: expected a writeable array, got a read-only one"),
    (lambda: ops.grouped_gemm(LOGITS, LOGITS[None].astype(np.float16), np.array([0, 3], np.int32)), ValueError,
     "b: expected dtype float32 \\(as a\\), got float16"),
    (lambda: ops.apply_rope(READ_ONLY, None, np.arange(2), 1e4), ValueError, "q: expected a writeable array, got a read-only one"),
    (lambda: ops.apply_rope(HEADS, READ_ONLY, np.arange(2), 1e4), ValueError, "k: expected a writeable array, got a read-only one"),
    (lambda: ops.apply_rope(HEADS, None, np.arange(2), "1e4"), TypeError, "theta: expected a number, got str"),
    (lambda: ops.rolling_attention(HEADS, HEADS, HEADS, READ_ONLY_RING, RING, ONE, ZERO), ValueError,
     "k_cache: expected a writeable array, got a read-only one"),
    (lambda: ops.rolling_attention(HEADS, HEADS, HEADS, RING, READ_ONLY_RING, ONE, ZERO), ValueError,
     "v_cache: expected a writeable array, got a read-only one"),
    (lambda: ops.rolling_attention(HEADS, HEADS, HEADS, RING, RING.copy(), ONE, ZERO, window=0), ValueError,
     "window: expected None or a value other than 0, got 0$"),
    (lambda: ops.rolling_attention(HEADS, HEADS, HEADS, RING, RING.copy(), ONE, ZERO, max_cache_length=-1), ValueError,
     "rolling_attention: max_cache_length: expected None or a value of 0 or more, got -1$"),
    (lambda: ops.rolling_attention(HEADS, HEADS, HEADS, RING, RING.copy(), ONE, ZERO, rope_theta=0.0), ValueError,
     "rope_theta: expected None or a value other than 0, got 0$"),
    (lambda: ops.rolling_attention(HEADS, HEADS, HEADS, RING, RING.copy(), ONE, ZERO, rope_theta=np.ones(2)), TypeError,
     "rope_theta: expected a number, got ndarray$"),
    (lambda: ops.sliding_window_attention(HEADS, HEADS, HEADS, window=np.array([3, 4])), TypeError,
     "sliding_window_attention: window: expected an integer, got ndarray$"),
    (lambda: ops.sliding_window_attention(HEADS, HEADS, HEADS, window=2.5), TypeError, "window: expected an integer, got float$"),
    (lambda: ops.sliding_window_attention(HEADS, HEADS, HEADS, max_seqlen_q=1), ValueError,
     r"max_seqlen_q: expected 0 or at least 2 \(tokens of q\) without cu_seqlens_q, got 1$"),
    (lambda: ops.sliding_window_attention(HEADS, HEADS, HEADS, max_seqlen_k=1), ValueError,
     r"max_seqlen_k: expected 0 or at least 2 \(tokens of k\) without cu_seqlens_k, got 1$"),
    (lambda: ops.sliding_window_attention(HEADS, HEADS, HEADS, window=-3), ValueError, "window: expected .* got -3"),
    (lambda: ops.sliding_window_attention(HEADS, HEADS, HEADS, softmax_scale=math.nan), ValueError, "softmax_scale: expected .* got -?nan"),
    (lambda: ops.sliding_window_attention(HEADS[0], HEADS, HEADS), ValueError, "q: expected 3 dimensions"),
    (lambda: ops.set_num_threads(0), ValueError, "set_num_threads: expected 1 to 4096, got 0"),
])
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_mutating_ops_write_nothing_when_refused():
    q, k = np.ones((2, 4, 64), np.float32), np.ones((2, 4, 64), np.float32)
    with pytest.raises(ValueError, match="positions: expected 0 to"):
        ops.apply_rope(q, k, np.array([5, -1]), 1e4)
    assert (q == 1).all() and (k == 1).all()
    rings = np.ones((2, 1, 4, 4, 64), np.float32)
    with pytest.raises(ValueError, match="cache_lengths: expected"):
        ops.rolling_attention(q, k, k, *rings, ONE, np.array([-1], np.int32), 2)
    assert (rings == 1).all()


@pytest.fixture
def layer(rng):
    """A call of moe_experts that has work for several threads."""
    hidden = rng.normal(size=(40, 128)).astype(np.float32)
    weights, ids, *maps = ops.moe_gate(rng.normal(size=(40, 8)).astype(np.float32))
    w_gate_up, w_down = (rng.normal(size=shape).astype(np.float32) / 8 for shape in ((8, 256, 128), (8, 128, 128)))
    threads = ops.get_num_threads()
    yield lambda: ops.moe_experts(hidden, w_gate_up, w_down, weights, ids, *maps)
    ops.set_num_threads(threads)


def test_any_number_of_threads_gives_the_same(layer):
    results = []
    for threads in (1, 2, 5):
        ops.set_num_threads(threads)
        assert ops.get_num_threads() == threads
        results += [layer() for _ in range(20)]
    assert all(same(result, results[0]) for result in results)


def test_calls_from_several_threads(layer):
    """They share the pool, and one may change it meanwhile."""
    ops.set_num_threads(3)
    expected, results = layer(), []
    threads = [threading.Thread(target=lambda: results.extend(layer() for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    ops.set_num_threads(2)
    for thread in threads:
        thread.join()
    assert len(results) == 80 and all(same(result, expected) for result in results)


def test_fewer_threads_where_the_system_gives_no_more():
    """Stacks of 4095 threads do not fit an address space of 1 GiB more: those that do are used."""
    script = """
import resource, numpy as np, mixtral_ext.numpy as ops
a, b = np.random.default_rng(0).normal(size=(2, 400, 64)).astype(np.float32)
call = lambda: ops.grouped_gemm(a, b[None], np.array([0, 400], np.int32))
expected = call()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_STACK, (2**23, resource.RLIM_INFINITY))
ops.set_num_threads(4096)
assert 1 <= ops.get_num_threads() < 4096, ops.get_num_threads()
assert (call() == expected).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr


def test_forked_process_computes():
    """Workers stay behind in the parent; the child makes its own."""
    script = """
import os, numpy as np, mixtral_ext.numpy as ops
ops.set_num_threads(4)
a, b = np.random.default_rng(0).normal(size=(2, 400, 64)).astype(np.float32)
call = lambda: ops.grouped_gemm(a, b[None], np.array([0, 400], np.int32))
expected = call()
child = os.fork()
if child == 0:
    os._exit(0 if (call() == expected).all() and ops.get_num_threads() == 4 else 1)
assert os.waitpid(child, 0)[1] == 0 and (call() == expected).all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=dict(os.environ, PYTHONPATH=str(ROOT)))


@pytest.mark.skipif(find_spec("torch") is None, reason="this is such a Python")
def test_all_this_without_torch(tmp_path):
    """This file once more, in a Python that has everything installed here but torch."""
    for entry in Path(np.__file__).parents[1].iterdir():
        if not entry.name.startswith(("torch", "functorch")):
            (tmp_path / entry.name).symlink_to(entry)
    environment = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")

    def python(*arguments):  # -S: site-packages are only what PYTHONPATH has
        return subprocess.run([sys.executable, "-S", *arguments], capture_output=True, text=True, timeout=300, env=environment)

    assert "No module named 'torch'" in python("-c", "import torch").stderr
    done = python("-c", "import mixtral_ext; mixtral_ext.moe_gate")
    assert "install torch" in done.stderr and "mixtral_ext.numpy" in done.stderr
    done = python("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
