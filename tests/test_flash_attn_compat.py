"""compat.flash_attn against flash-attn's own rules, written out in float64."""

import inspect

import pytest
import torch

from mixtral_ext.compat.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def attend(q, k, v, causal, window_size, scale=None, dtype=torch.float64):
    """flash-attn's definition: q [Sq, Hq, D], k, v [Sk, Hk, D] -> out [Sq, Hq, D], lse [Hq, Sq], computed in dtype."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    left, right = window_size[0], 0 if causal else window_size[1]
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    position = torch.arange(n, device=q.device)[:, None] + m - n
    key = torch.arange(m, device=q.device)[None, :]
    seen = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    logits = q @ k.repeat_interleave(group, 0).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0)[..., None]).exp()
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1), lse


def check(out, lse, expected_out, expected_lse):
    assert out.shape == expected_out.shape and lse.shape == expected_lse.shape and lse.dtype == torch.float32
    assert (out.double() - expected_out).norm() <= 1e-5 * expected_out.norm()
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-4)


def qkv(seed, q_shape, kv_shape):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in (q_shape, kv_shape, kv_shape)]


WINDOWS = [(-1, -1), (0, 0), (4, 0), (5, -1), (7, 3), (100, 0), (2**31 - 1, 0), (2**40, -1)]


@pytest.mark.parametrize("window_size", WINDOWS)
@pytest.mark.parametrize("sq, sk", [(9, 9), (5, 12), (1, 12), (12, 7)])
def test_func(sq, sk, window_size):
    q, k, v = qkv(1, (2, sq, 4, 64), (2, sk, 2, 64))
    out, lse, probabilities = flash_attn_func(q, k, v, causal=True, window_size=window_size, return_attn_probs=True)
    assert probabilities is None
    for b in range(2):
        check(out[b], lse[b], *attend(q[b], k[b], v[b], True, window_size))
    assert torch.equal(flash_attn_func(q, k, v, causal=True, window_size=window_size), out)


@pytest.mark.parametrize("window_size", WINDOWS)
def test_varlen(window_size):
    queries, keys = [3, 0, 1, 8, 6], [3, 4, 9, 5, 11]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (queries, keys))
    q, k, v = qkv(2, (sum(queries), 4, 128), (sum(keys), 1, 128))
    arguments = (q, k, v, cu_q, cu_k, max(queries), max(keys))
    out, lse, _ = flash_attn_varlen_func(*arguments, causal=True, window_size=window_size, return_attn_probs=True)
    parts = [
        attend(q[cu_q[b] : cu_q[b + 1]], k[cu_k[b] : cu_k[b + 1]], v[cu_k[b] : cu_k[b + 1]], True, window_size)
        for b in range(5)
    ]
    check(out, lse, torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], -1))
    assert torch.equal(flash_attn_varlen_func(*arguments, causal=True, window_size=window_size), out)


@pytest.mark.parametrize("window_size", [(-1, 0), (4, 0)])
def test_window_that_ends_at_the_query_is_causal(window_size):
    q, k, v = qkv(3, (1, 6, 2, 64), (1, 8, 2, 64))
    out, lse, _ = flash_attn_func(q, k, v, window_size=window_size, return_attn_probs=True)
    check(out[0], lse[0], *attend(q[0], k[0], v[0], False, window_size))


@pytest.mark.parametrize("window_size", [(-1, -1), (4, -1), (4, 2)])
def test_one_query_needs_no_causal(window_size):
    q, k, v = qkv(4, (2, 1, 2, 64), (2, 8, 2, 64))
    out, lse, _ = flash_attn_func(q, k, v, window_size=window_size, return_attn_probs=True)
    for b in range(2):
        check(out[b], lse[b], *attend(q[b], k[b], v[b], False, window_size))
    cu_q, cu_k = torch.arange(3, dtype=torch.int32), torch.tensor([0, 8, 16], dtype=torch.int32)
    packed = flash_attn_varlen_func(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k, 1, 8, window_size=window_size)
    torch.testing.assert_close(packed, out.flatten(0, 1))


def test_softmax_scale():
    q, k, v = qkv(5, (1, 4, 2, 64), (1, 4, 2, 64))
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, return_attn_probs=True)
    check(out[0], lse[0], *attend(q[0], k[0], v[0], True, (-1, -1), 0.3))


def test_bf16_error():
    """No further from float64 than twice the same formula in bf16 torch."""
    q, k, v = (x.bfloat16() for x in qkv(6, (1, 40, 4, 128), (1, 40, 4, 128)))
    expected, _ = attend(q[0], k[0], v[0], True, (15, 0))
    position = torch.arange(40)
    seen = (position <= position[:, None]) & (position >= position[:, None] - 15)
    logits = (q[0].transpose(0, 1) @ k[0].permute(1, 2, 0)) * 128**-0.5
    low = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v[0].transpose(0, 1)
    low_error = (low.transpose(0, 1).double() - expected).norm() / expected.norm()
    out = flash_attn_func(q, k, v, causal=True, window_size=(15, 0))[0]
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() <= 2 * low_error + 1e-6


REFUSED = {
    "dropout_p": 0.1,
    "softcap": 30.0,
    "alibi_slopes": torch.ones(2),
    "causal": False,
}


@pytest.mark.parametrize("name", REFUSED)
def test_func_refuses_by_name(name):
    q, k, v = qkv(7, (1, 4, 2, 64), (1, 4, 2, 64))
    with pytest.raises(ValueError, match=f"flash_attn_func: {name}"):
        flash_attn_func(q, k, v, **{"causal": True, name: REFUSED[name]})


@pytest.mark.parametrize("name", [*REFUSED, "block_table"])
def test_varlen_refuses_by_name(name):
    q, k, v = qkv(8, (4, 2, 64), (4, 2, 64))
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    value = {**REFUSED, "block_table": torch.zeros(1, 1, dtype=torch.int32)}[name]
    with pytest.raises(ValueError, match=f"flash_attn_varlen_func: {name}"):
        flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 4, 4, **{"causal": True, name: value})


def test_wrong_ranks_and_windows():
    q, k, v = qkv(9, (1, 4, 2, 64), (1, 4, 2, 64))
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    for call, message in (
        (lambda: flash_attn_func(q[0], k[0], v[0], causal=True), r"flash_attn_func: q: expected a tensor of 4 dimensions, got \[4, 2, 64\]"),
        (lambda: flash_attn_func(q, k, v, causal=True, window_size=4), r"window_size: expected \(left, right\), two integers, got 4"),
        (lambda: flash_attn_func(q, k, v, causal=True, window_size=(None, 0)), r"two integers, got \(None, 0\)"),
        (lambda: flash_attn_func(q, k, v, causal=True, window_size=(1.5, 0)), r"two integers, got \(1.5, 0\)"),
        (lambda: flash_attn_func(q, k, v, causal=True, window_size=(4, 0, 0)), r"two integers, got \(4, 0, 0\)"),
        (lambda: flash_attn_varlen_func(q, k, v, bounds, bounds, 4, 4, causal=True), "flash_attn_varlen_func: q: expected a tensor of 3"),
        (lambda: flash_attn_varlen_func(q[0], k[0], v[0], bounds, None, 4, 4, causal=True), "cu_seqlens_k: expected a tensor of 1 .*, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_signatures():
    """The arguments and defaults of flash-attn 2.8, in its order."""
    common = {
        "dropout_p": 0.0,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
        "return_attn_probs": False,
    }
    required = dict.fromkeys(("q", "k", "v"), inspect.Parameter.empty)
    lengths = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), inspect.Parameter.empty)
    cached = {
        **dict.fromkeys(("q", "k_cache", "v_cache"), inspect.Parameter.empty),
        **dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")),
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "rotary_interleaved": True,
        "alibi_slopes": None,
        "num_splits": 0,
        "return_softmax_lse": False,
    }
    for function, expected in (
        (flash_attn_func, {**required, **common}),
        (flash_attn_varlen_func, {**required, **lengths, **common, "block_table": None}),
        (flash_attn_with_kvcache, cached),
    ):
        parameters = inspect.signature(function).parameters
        assert [(p.name, p.default) for p in parameters.values()] == list(expected.items())
