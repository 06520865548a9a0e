"""sliding_window_attention and rolling_attention on the virtual GPU with bad values on the device, and what the host refuses."""
import pytest
import torch

import c_api
import vgpu
from attention_checks import assert_accurate, numpy, same_bits, widened
from mixtral_bench.cases import RollingAttentionCase, SlidingWindowAttentionCase
from mixtral_ext import reference
from test_attention_kernels import ROLLING, SLIDING, UNTOUCHED, run

BIG = 2**31 - 1


def clamped(offsets, tokens):
    """The rule: the running maximum of the offsets, each clamped to what there is."""
    return torch.tensor(offsets).clamp(0, tokens).cummax(0).values.int()


@pytest.mark.parametrize("name", ("cu_seqlens_q", "cu_seqlens_k"))
@pytest.mark.parametrize("values", ((1, 80, 90), (0, 80, 70), (0, BIG, BIG), (-BIG - 1, 75, 90), (0, -5, 90), (90, 0, 0), (-1, -1, -1), (0, 80, 1000)),
                         ids=str)
def test_bad_bounds(name, values):
    """90 tokens in two sequences. Nothing is read or written out of range, and the result is that of the clamped bounds."""
    case = SlidingWindowAttentionCase("", sequences=((80, 80), (10, 10)), heads=2, window=60, maxima=False)
    inputs = case.inputs(torch.bfloat16)
    bad = {**inputs, name: torch.tensor(values).int()}
    good = {**inputs, name: clamped(values, 90)}
    low, exact = reference.sliding_window_attention(**good), reference.sliding_window_attention(**widened(good))
    for value, rounded, wide in zip(run(vgpu.Gpu(), SLIDING, bad), low, exact):
        assert (value[wide.isnan()] == UNTOUCHED).all()
        assert_accurate(value[~wide.isnan()], rounded[~wide.isnan()], wide[~wide.isnan()])


def test_longer_than_declared():
    """Tokens beyond max_seqlen_q are left alone; the workspace is that of the declared maxima."""
    for longest, n in ((3, 9), (1, 9), (20, 90)):
        inputs = SlidingWindowAttentionCase("", sequences=((n, 600), (1, 600)), heads=4).inputs(torch.bfloat16) | {"max_seqlen_q": longest}
        out, lse = run(vgpu.Gpu(), SLIDING, inputs)
        assert (out[longest:n] == UNTOUCHED).all() and (lse[:, longest:n] == UNTOUCHED).all()
        assert (out[:longest] != UNTOUCHED).any(-1).all() and (out[n] != UNTOUCHED).any(-1).all()


@pytest.mark.parametrize("longest, queries", ((1, 1), (100, 1), (256, 16), (257, 1), (100, 40)))
def test_more_keys_than_declared(longest, queries):
    """Nothing is written outside of what the declared maxima ask for, and the other sequence is as it is."""
    inputs = SlidingWindowAttentionCase("", sequences=((1, 90), (queries, 700)), heads=4).inputs(torch.bfloat16) | {"max_seqlen_k": 700}
    expected = run(vgpu.Gpu(), SLIDING, inputs)
    inputs["max_seqlen_k"] = longest
    out, lse = run(vgpu.Gpu(), SLIDING, inputs)
    assert out.isfinite().all() and not lse.isnan().any()
    if longest >= 90:
        assert same_bits(out[0], expected[0][0]) and same_bits(lse[:, 0], expected[1][:, 0])


@pytest.mark.parametrize("values", ((0, 600, 10, 50), (0, 700, 300, 800), (0, 700, -1, 800)), ids=str)
def test_bad_bounds_of_three(values):
    """Keys of a sequence behind one that ends later: each pair is clamped by itself."""
    inputs = SlidingWindowAttentionCase("", sequences=((1, 300),) * 3, heads=2, maxima=False).inputs(torch.bfloat16)
    out, lse = run(vgpu.Gpu(), SLIDING, {**inputs, "cu_seqlens_k": torch.tensor(values).int()})
    for b in range(3):
        begin = max(values[b], 0)
        one = dict(q=inputs["q"][b:b + 1], k=inputs["k"][begin:max(begin, values[b + 1])], v=inputs["v"][begin:max(begin, values[b + 1])])
        low, exact = reference.sliding_window_attention(**one), reference.sliding_window_attention(**widened(one))
        assert_accurate(out[b:b + 1], low[0], exact[0])
        assert_accurate(lse[:, b:b + 1], low[1], exact[1])


def test_a_ring_without_slots():
    """Its memory may be NULL, as torch's of an empty tensor is: every slot is a bad one."""
    inputs = RollingAttentionCase("", chunks=(1, 1), lengths=(0, 0), cache_slots=(0, 1), rope_theta=1e4).inputs(torch.bfloat16)
    out, lse, gpu = torch.full_like(inputs["q"], UNTOUCHED), torch.full((2, 2), UNTOUCHED), vgpu.Gpu()
    tensor, inputs["k_cache"], inputs["v_cache"] = c_api.tensor, *(inputs[name][:0] for name in ("k_cache", "v_cache"))

    def with_null(array, dtype=None):
        t = tensor(array, dtype)
        t.data = t.data if array.size else None
        return t

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(c_api, "tensor", with_null)
        gpu.call(ROLLING, outputs=("out", "lse"), **{name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()},
                 out=numpy(out), lse=numpy(lse))
    assert (out == UNTOUCHED).all() and (lse == UNTOUCHED).all()


@pytest.mark.parametrize("start, length", ((-1, 20), (31, 5), (BIG, BIG), (-BIG - 1, -BIG - 1), (10, 21), (3, -1), (0, BIG)))
def test_bad_key_ranges(start, length):
    """30 keys each; the second sequence's range is bad."""
    case = SlidingWindowAttentionCase("", sequences=((20, 30),) * 2, heads=4, layout="batched", window=9)
    inputs = case.inputs(torch.bfloat16)
    first = min(max(start, 0), 30)
    ranges = dict(k_start=torch.tensor([2, first]).int(), k_length=torch.tensor([20, min(max(length, 0), 30 - first)]).int())
    low, exact = (reference.sliding_window_attention(**x, **ranges) for x in (inputs, widened(inputs)))
    got = run(vgpu.Gpu(), SLIDING, {**inputs, "k_start": torch.tensor([2, start]).int(), "k_length": torch.tensor([20, length]).int()})
    for value, rounded, wide in zip(got, low, exact):
        assert_accurate(value, rounded, wide)


@pytest.mark.parametrize("rope_theta", (None, 1e4))
@pytest.mark.parametrize("chunks", ((1, 1, 1), (40, 1, 3)), ids=str)
@pytest.mark.parametrize("slot", (-1, 4, BIG, -BIG - 1))
def test_bad_slots_are_skipped(slot, chunks, rope_theta):
    case = RollingAttentionCase("", chunks=chunks, lengths=(20, 500, 90), capacity=300, window=290, heads=4, slots=4, cache_slots=(3, 0, 1),
                                rope_theta=rope_theta)
    inputs, gpu = case.inputs(torch.bfloat16), vgpu.Gpu()
    whole = run(gpu, ROLLING, inputs)
    inputs["cache_slots"][1] = slot
    out, lse, *caches = run(gpu, ROLLING, inputs)
    skipped = slice(chunks[0], chunks[0] + chunks[1])
    assert (out[skipped] == UNTOUCHED).all() and (lse[:, skipped] == UNTOUCHED).all()
    out[skipped], lse[:, skipped] = whole[0][skipped], whole[1][:, skipped]
    assert same_bits(out, whole[0]) and same_bits(lse, whole[1])
    for cache, given, other in zip(caches, (inputs["k_cache"], inputs["v_cache"]), whole[2:]):
        assert same_bits(cache[0], given[0]) and same_bits(cache[1:], other[1:])


@pytest.mark.parametrize("chunks", ((1, 1), (40, 1)), ids=str)
@pytest.mark.parametrize("length", (-1, -BIG - 1, BIG, BIG - 1, 101, 500))
def test_bad_lengths(length, chunks):
    """Negative ones count as 0; of more than declared, 60, the newest 60 are seen. The other sequence is as it is."""
    case = RollingAttentionCase("", chunks=chunks, lengths=(20, 60), capacity=130, window=101, heads=4)
    inputs, gpu = case.inputs(torch.bfloat16), vgpu.Gpu()
    n, counts_as = chunks[0], min(max(length, 0), BIG - chunks[0])
    inputs["k_cache"][0].normal_(), inputs["v_cache"][0].normal_()
    good = {**inputs, "cache_lengths": torch.tensor([counts_as, 60]).int(), "max_cache_length": counts_as}
    low, exact = reference.rolling_attention(**good), reference.rolling_attention(**widened(good))
    got = run(gpu, ROLLING, {**inputs, "cache_lengths": torch.tensor([length, 60]).int()})
    for value, rounded, wide in zip(got[:2] if length <= 0 else (), low, exact):
        assert_accurate(value, rounded, wide)
    whole = run(gpu, ROLLING, inputs)
    assert same_bits(got[0][n:], whole[0][n:]) and same_bits(got[1][:, n:], whole[1][:, n:]) and got[0].isfinite().all()
    assert all(same_bits(a, b) for a, b in zip(got[2:], low[2:]))


@pytest.mark.parametrize("chunks", ((1, 1), (40, 2)), ids=str)
@pytest.mark.parametrize("read_only", (False, True))
def test_more_than_a_cache_without_a_window_holds(chunks, read_only):
    """Lengths beyond what was declared: the device stores nothing beyond the last place, and reads nothing there."""
    case = RollingAttentionCase("", chunks=chunks, lengths=(10, 3), capacity=60, window=None, heads=4, read_only=read_only)
    inputs = case.inputs(torch.bfloat16)
    inputs["k_cache"].nan_to_num_(0.5), inputs["v_cache"].nan_to_num_(0.5)
    inputs["cache_lengths"][0] = 59
    inputs["max_cache_length"] = 60 - max(chunks)
    out, lse, *caches = run(vgpu.Gpu(), ROLLING, inputs)
    assert out.isfinite().all() and lse.isfinite().all()
    for cache, given, new in zip(caches, (inputs["k_cache"], inputs["v_cache"]), "kv"):
        assert same_bits(cache[0, :59], given[0, :59])
        assert same_bits(cache[0, 59], given[0, 59] if read_only else inputs[new][0])


@pytest.mark.parametrize("changes, match", [
    (dict(window=0, max_cache_length=-1), "max_cache_length: expected a value of 0 or more on CUDA without a window, got -1"),
    (dict(window=0, max_seqlen_q=0), "max_seqlen_q: expected a value of 1 or more on CUDA without a window, got 0"),
    (dict(window=0, max_cache_length=59),
     r"max_cache_length: expected max_cache_length \+ max_seqlen_q <= 60 \(capacity\) without a window, got 59 \+ 2"),
    (dict(k=None, v=None, max_seqlen_q=0), "max_seqlen_q: expected a value of 1 or more on CUDA without k and v, got 0"),
    (dict(k=None, v=None), r"window: expected window \+ max_seqlen_q - 1 <= 60 \(capacity\) without k and v, got 60 \+ 2 - 1")])
def test_refused(changes, match):
    """What the host can see, before anything is written."""
    inputs = RollingAttentionCase("", chunks=(2, 1), lengths=(10, 3), capacity=60, window=60, heads=4).inputs(torch.bfloat16) | changes
    with pytest.raises(c_api.MixtralError, match=match) as error:
        run(vgpu.Gpu(), ROLLING, inputs)
    assert error.value.status == c_api.INVALID_ARGUMENT
