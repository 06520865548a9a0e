"""Attention at the lengths it is for, to 128k tokens, against wider formulas: prompts on sampled rows, decoding in a wrapped ring of 4096 and
in a linear cache of 131072. Tiny sizes run the same checks on the CPU."""
import pytest
import torch

import mixtral_ext
from mixtral_bench.cases import RollingAttentionCase
from mixtral_bench.attention_ops import attend_rows, row_errors, sampled_rows
from mixtral_ext import reference
from op_calls import call, check_results, poisoned, skip_unless_on

HEADS = 8
GROUPS = (1, 4, 8)  # query heads a key head
DTYPES = (torch.bfloat16, torch.float16)
LONG = [pytest.param("cuda", length, window, marks=pytest.mark.gpu) for length in (4096, 32768, 131072) for window in (4096, None)]


def every_kind(test):
    for name, values in (("group", GROUPS), ("head_dim", (64, 128)), ("dtype", DTYPES)):
        test = pytest.mark.parametrize(name, values, ids=str)(test)
    return test


def rms(errors):
    return errors.square().mean().sqrt().item()


def prompt(device, length, dtype, head_dim, group):
    generator = torch.Generator(device).manual_seed(length + group)
    return [torch.empty(length, heads, head_dim, dtype=dtype, device=device).normal_(generator=generator)
            for heads in (HEADS, HEADS // group, HEADS // group)]


def check_prompt(q, k, v, window, out, lse):
    """At most twice the error of the same formula in low-precision torch, plus 1e-6. Rows count alike: the first are far larger."""
    rows, starts = sampled_rows((len(q),), window, q.device)
    low, low_lse = attend_rows(q[rows], k, v, rows, starts, window)
    exact, exact_lse = attend_rows(q[rows].float(), k.float(), v.float(), rows, starts, window)
    assert rms(row_errors(out[rows], exact)) <= 2 * rms(row_errors(low, exact)) + 1e-6
    difference, allowed = (lse[:, rows] - exact_lse).norm(), (low_lse.float() - exact_lse).norm()
    assert difference <= 2 * allowed + 1e-6 * exact_lse.norm()


@pytest.mark.parametrize("device, length, window", [("cpu", 300, 64), ("cpu", 131, None), *LONG])
@every_kind
def test_prompt(device, length, window, dtype, head_dim, group):
    skip_unless_on(device, dtype)
    q, k, v = prompt(device, length, dtype, head_dim, group)
    out, lse = poisoned(q), torch.full((HEADS, length), -77.0, device=device)
    mixtral_ext.sliding_window_attention(q, k, v, window=window, out=(out, lse))
    check_prompt(q, k, v, window, out, lse)
    assert (lse != -77).all() and out.isfinite().all()  # all rows, also those that are not sampled


def rolling(name, capacity, window, lengths, chunks=None):
    return RollingAttentionCase(name, chunks=chunks or (1,) * len(lengths), lengths=lengths, capacity=capacity, window=window, heads=HEADS,
                                rope_theta=1e6)


CACHES = [("cpu", rolling("tiny_ring", 40, 40, (1000, 39, 0))), ("cpu", rolling("tiny_linear", 300, None, (299, 170))),
          *(pytest.param("cuda", case, marks=pytest.mark.gpu) for case in (
              rolling("ring", 4096, 4096, (131071, 100000, 4097, 4095)),
              rolling("window_below_capacity", 4096, 3000, (131071, 5000)),
              rolling("linear", 131072, None, (131071, 65537)),
              rolling("chunk_in_ring", 4096, 4096, (131071, 100000), chunks=(300, 7))))]


@pytest.mark.parametrize("device, case", CACHES, ids=str)
@every_kind
def test_decode(device, case, dtype, head_dim, group):
    """Against float64, with what is stored; slots out of sight hold NaN."""
    skip_unless_on(device, dtype)
    case = RollingAttentionCase(**{**vars(case), "head_dim": head_dim, "key_heads": HEADS // group})
    inputs = case.inputs(dtype, device)
    check_results(case.op, inputs, call(case.op, inputs, "out"), "out")


@pytest.mark.parametrize("window", (1, 5, 64, None))
@pytest.mark.parametrize("lengths", ((70,), (9, 1, 30, 30)), ids=str)
def test_the_rows_of_the_reference_are_those_of_the_whole(lengths, window):
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(total, heads, 64, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    whole, whole_lse = reference.sliding_window_attention(q, k, v, bounds, bounds, window=window)
    rows, starts = sampled_rows(lengths, window, torch.device("cpu"))
    out, lse = attend_rows(q[rows], k, v, rows, starts, window)
    torch.testing.assert_close(out, whole[rows], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse[:, rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", ("window + 1", "window - 1", "scaled", "one row"))
def test_a_wrong_prompt_is_noticed(change):
    q, k, v = prompt("cpu", 300, torch.float16, 64, 4)
    out, lse = mixtral_ext.sliding_window_attention(q, k, v, window=64)
    check_prompt(q, k, v, 64, out, lse)
    if change.startswith("window"):
        out, _ = mixtral_ext.sliding_window_attention(q, k, v, window=65 if "+" in change else 63)
    elif change == "scaled":
        out *= 1.01
    else:
        out[64] = out[65]
    with pytest.raises(AssertionError):
        check_prompt(q, k, v, 64, out, lse)
