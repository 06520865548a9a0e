"""rolling_attention of the C API on the CPU: every instruction set, natively where this machine has it and emulated
everywhere."""
import math
from dataclasses import replace

import pytest
import torch

from attention_checks import DTYPES, assert_accurate, assert_refused, call, gapped, same_bits, widened
from mixtral_bench.cases import CASES, RollingAttentionCase
from mixtral_ext import reference

OP = "rolling_attention"
SMALL = [case for case in CASES[OP] if not case.large]
EDGES = [
    RollingAttentionCase("decode_wrapped_spans", chunks=(1, 1, 1), lengths=(5000, 599, 1300), capacity=1300, window=1250, heads=8,
                         key_heads=2, head_dim=128),
    RollingAttentionCase("window_is_capacity_spans", chunks=(1,), lengths=(2000,), capacity=600, window=600, heads=4),
    RollingAttentionCase("long_chunks", chunks=(130, 1, 66), lengths=(333, 64, 0), capacity=160, window=100, heads=4, key_heads=2),
    RollingAttentionCase("chunk_of_two_blocks", chunks=(100,), lengths=(45,), capacity=64, window=64, heads=4, head_dim=128),
    RollingAttentionCase("group_3", chunks=(1, 5), lengths=(40, 77), capacity=33, window=33, heads=6, key_heads=2),
    RollingAttentionCase("group_11", chunks=(1, 2), lengths=(40, 77), capacity=33, window=33, heads=11),
    RollingAttentionCase("last_position", chunks=(1, 3), lengths=(2**31 - 2, 2**31 - 4), capacity=50, window=50, heads=4),
]


def run(library, context, inputs):
    """-> out, lse, k_cache, v_cache; out and lse poisoned with NaN, the given caches stay as they are."""
    whole, out = gapped(inputs["q"].shape, inputs["q"].dtype)
    lse = torch.full((inputs["q"].shape[1], inputs["q"].shape[0]), math.nan)
    caches = {}
    for name in ("k_cache", "v_cache"):  # the same strides
        given = inputs[name]
        caches[name] = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype).copy_(given)
    call(library, context, OP, **{**inputs, **caches}, out=out, lse=lse)
    assert whole[..., out.shape[-1]:].isnan().all()
    return out.clone(), lse, caches["k_cache"], caches["v_cache"]


def check(library, arch, case, dtype):
    inputs = case.inputs(DTYPES[dtype])
    result = run(library, library.context(arch), inputs)
    low, exact = reference.rolling_attention(**inputs), reference.rolling_attention(**widened(inputs))
    for value, rounded, wide in zip(result[:3], low, exact):
        assert_accurate(value, rounded, wide)
    assert same_bits(result[3], low[3])  # values are stored as they are
    if case.rope_theta is None:
        assert same_bits(result[2], low[2])
    for a, b in zip(result, run(library, library.context(arch, threads=2), inputs)):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cases(cpu_build, case, dtype):
    if case.far and dtype == "float32":
        case = replace(case, far=False)  # 24 GB of address space twice; the 16-bit dtypes do the same offsets
    check(*cpu_build, case, dtype)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(cpu_build, case):
    check(*cpu_build, case, "bfloat16")


@pytest.mark.parametrize("window, capacity", ((1, 1), (8, 8), (8, 13), (40, 64), (None, 96)))
@pytest.mark.parametrize("chunks", ((1,) * 23, (7,) * 10, (8,) * 6, (70, 1, 1, 20), (3, 0, 64, 2)), ids=str)
@pytest.mark.parametrize("rope", (None, False, True), ids=("rotated", "half_split", "interleaved"))
def test_any_chunks_equal_the_whole(lib, window, capacity, chunks, rope):
    """Feeding a sequence in chunks is sliding_window_attention over all of it, whatever the ring held before."""
    total, heads, key_heads, head_dim = sum(chunks), 4, 2, 64
    make = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(total, h, head_dim, generator=make) for h in (heads, key_heads, key_heads))
    theta = None if rope is None else 1e4
    rotated_q, rotated_k = (q, k) if rope is None else reference.apply_rope(q.double(), k.double(), torch.arange(total), theta, rope)
    exact, exact_lse = reference.sliding_window_attention(rotated_q.double(), rotated_k.double(), v.double(), window=window)
    cache = torch.full((3, capacity, key_heads, head_dim), math.nan)
    caches, context, at = dict(k_cache=cache.clone(), v_cache=cache.clone()), lib.context(threads=2), 0
    for n in chunks:
        now = slice(at, at + n)
        out = torch.full_like(q[now], math.nan)
        lse = torch.full((heads, n), math.nan)
        call(lib, context, OP, q=q[now], k=k[now], v=v[now], **caches, cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32),
             cache_lengths=torch.tensor([at], dtype=torch.int32), cache_slots=torch.tensor([1], dtype=torch.int32), window=window,
             rope_theta=theta, rope_interleaved=bool(rope), out=out, lse=lse)
        torch.testing.assert_close(out.double(), exact[now], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse[:, now], rtol=1e-5, atol=1e-5)
        at += n
    for cache in caches.values():
        assert cache[0].isnan().all() and cache[2].isnan().all()  # other sequences' slots
        assert not cache[1, :min(total, capacity)].isnan().any() and cache[1, total:].isnan().all()


def test_read_only_equals_the_chunk_itself(cpu_build):
    """After a call that stored the chunk, the same call without k and v gives the same output and stores nothing."""
    library, arch = cpu_build
    case = RollingAttentionCase("both", chunks=(1, 5, 3), lengths=(40, 7, 0), capacity=20, window=16, heads=4, key_heads=2)
    inputs = case.inputs(torch.bfloat16)
    out, lse, k_cache, v_cache = run(library, library.context(arch), inputs)
    again = run(library, library.context(arch), {**inputs, "k": None, "v": None, "k_cache": k_cache, "v_cache": v_cache})
    torch.testing.assert_close(again[0], out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(again[1], lse, rtol=1e-5, atol=1e-5)
    assert same_bits(again[2], k_cache) and same_bits(again[3], v_cache)


def test_inputs_are_not_changed(cpu_build):
    library, arch = cpu_build
    inputs = RollingAttentionCase("rope", chunks=(3,), lengths=(5,), rope_theta=1e4).inputs(torch.float16)
    before = {name: inputs[name].clone() for name in "qkv"}
    run(library, library.context(arch), inputs)
    assert all(same_bits(inputs[name], before[name]) for name in "qkv")


PLAIN = RollingAttentionCase("bad", chunks=(1, 3), lengths=(4, 9), slots=3, cache_slots=(2, 0))
FULL = replace(PLAIN, window=None, lengths=(4, 5))


@pytest.mark.parametrize("case, changes, match", [
    (PLAIN, dict(cu_seqlens_q=(1, 2, 4)), r"cu_seqlens_q: expected 0 at \[0\], got 1"),
    (PLAIN, dict(cu_seqlens_q=(0, 3, 1)), r"cu_seqlens_q: expected values that do not decrease, got 1 after 3 at \[2\]"),
    (PLAIN, dict(cu_seqlens_q=(0, 2, 5)), r"cu_seqlens_q: expected at most 4 \(tokens\) at the end, got 5"),
    (PLAIN, dict(cu_seqlens_q=(0, 0, 4)), r"cu_seqlens_q: expected sequences of at most 3 tokens, got 4 at \[1\]"),
    (PLAIN, dict(cache_lengths=(4, -1)), r"cache_lengths: expected 0 to 2147483644 \(2\^31 - 1 less the 3 new tokens\), got -1 at \[1\]"),
    (PLAIN, dict(cache_lengths=(4, 2**31 - 3), max_cache_length=-1), r"cache_lengths: expected 0 to 2147483644 .*, got 2147483645"),
    (PLAIN, dict(cache_lengths=(10, 9)), r"cache_lengths: expected at most 9 \(max_cache_length\), got 10 at \[0\]"),
    (PLAIN, dict(cache_slots=(2, 3)), r"cache_slots: expected 0 to 2, got 3 at \[1\]"),
    (PLAIN, dict(cache_slots=(-1, 0)), r"cache_slots: expected 0 to 2, got -1 at \[0\]"),
    (PLAIN, dict(cache_slots=(1, 1)), r"cache_slots: expected distinct slots, got 1 again at \[1\]"),
    (FULL, dict(cache_lengths=(4, 6), max_cache_length=-1),
     r"cache_lengths: expected length \+ new tokens <= 8 \(capacity\) without a window, got 6 \+ 3 at \[1\]"),
    (PLAIN, dict(k=None, v=None, max_seqlen_q=None),
     r"window: expected window \+ new tokens - 1 <= 8 \(capacity\) without k and v, got 8 \+ 3 - 1 at \[1\]"),
])
def test_bad_values(lib, case, changes, match):
    inputs = case.inputs(torch.float32)
    for name, values in changes.items():
        inputs[name] = torch.tensor(values, dtype=torch.int32) if isinstance(values, tuple) else values
    out, lse = torch.full_like(inputs["q"], 7.0), torch.full((inputs["q"].shape[1], inputs["q"].shape[0]), 7.0)
    assert_refused(lib, lib.context(), OP, match, (out, lse, inputs["k_cache"], inputs["v_cache"]), **inputs, out=out, lse=lse)
