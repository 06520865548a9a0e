"""sliding_window_attention of the C API on the CPU: every instruction set, natively where this machine has it and
emulated everywhere."""
import math
from dataclasses import replace

import pytest
import torch

from attention_checks import DTYPES, assert_accurate, assert_refused, call, gapped, same_bits, widened
from mixtral_bench.cases import CASES, SlidingWindowAttentionCase
from mixtral_ext import reference

OP = "sliding_window_attention"
SMALL = [case for case in CASES[OP] if not case.large]


def edge(name, queries, keys, **other):
    return SlidingWindowAttentionCase(name, sequences=((queries, keys),), layout="single", **other)


# Lengths around the kernels' tiles (16, 32 and 64 keys), row panels (8, 16, 24, 32 and 48 rows), blocks (192 and 256 rows)
# and spans of split keys (256 and 1024).
EDGES = [
    *(edge(f"decode_{m}", 1, m, heads=4) for m in (1, 15, 31, 32, 33, 255, 256, 257)),
    *(edge(f"decode_group_{g}", 1, 70, heads=2 * g, key_heads=2, head_dim=128, window=45) for g in (1, 2, 3, 5, 7, 8, 9, 17)),
    edge("decode_split", 1, 1300, heads=8, key_heads=2, head_dim=128),
    edge("decode_split_window", 1, 1300, heads=8, key_heads=2, window=777),
    edge("decode_most_spans", 1, 8999, heads=1),
    *(edge(f"square_{n}", n, n, heads=1) for n in (7, 8, 9, 63, 64, 65, 127, 128, 129)),
    *(edge(f"group_{g}", 50, 61, heads=g, window=17) for g in (1, 2, 3, 4, 8, 11)),
    edge("two_blocks", 97, 130, heads=4, key_heads=2, head_dim=128),
    edge("two_blocks_window", 150, 150, heads=4, key_heads=2, head_dim=128, window=64),
    edge("block_edge", 64, 64, heads=4, window=63),
    edge("block_split", 3, 2100, heads=4),
    edge("block_split_window", 5, 2500, heads=4, window=1100),
    *(edge(f"window_{w}", 140, 140, heads=2, window=w) for w in (1, 2, 63, 64, 65, 128, 139, 140, 141)),
    edge("rows_without_keys", 130, 100, heads=4),
    edge("rows_without_keys_window", 70, 3, heads=4, window=2),
    edge("one_key_many_queries", 100, 1, heads=2, window=5),
]


def run(library, context, inputs):
    """-> out, lse, poisoned with NaN before the call; nothing is written between out's rows."""
    whole, out = gapped(inputs["q"].shape, inputs["q"].dtype)
    heads = inputs["q"].dim() - 2
    tokens = inputs["q"].dim() - 3
    lse = torch.full((*inputs["q"].shape[:tokens], inputs["q"].shape[heads], inputs["q"].shape[tokens]), math.nan)
    call(library, context, OP, **inputs, out=out, lse=lse)
    assert whole[..., out.shape[-1]:].isnan().all()
    return out.clone(), lse


def check(library, arch, case, dtype):
    inputs = case.inputs(DTYPES[dtype])
    out, lse = run(library, library.context(arch), inputs)
    low, exact = reference.sliding_window_attention(**inputs), reference.sliding_window_attention(**widened(inputs))
    assert_accurate(out, low[0], exact[0])
    assert_accurate(lse, low[1], exact[1])
    rows = exact[1].isneginf()  # queries without keys: exactly 0
    assert (out.movedim(-2, -3)[rows] == 0).all()
    again = run(library, library.context(arch, threads=2), inputs)
    assert same_bits(out, again[0]) and same_bits(lse, again[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_cases(cpu_build, case, dtype):
    check(*cpu_build, case, dtype)


@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges(cpu_build, case):
    check(*cpu_build, case, "bfloat16")


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("case", [c for c in EDGES if c.name in ("decode_split", "decode_group_7", "two_blocks_window", "block_split")],
                         ids=str)
def test_edges_in_other_dtypes(cpu_build, case, dtype):
    check(*cpu_build, case, dtype)


@pytest.mark.parametrize("queries", (1, 3, 70))
def test_keys_outside_the_window_are_not_read(cpu_build, queries):
    """The cost is linear in the length: of 3000 keys only those that some query sees are touched."""
    library, arch = cpu_build
    window, keys = 90, 3000
    case = edge("far_keys", queries, keys, heads=4, head_dim=128, window=window)
    inputs = case.inputs(torch.bfloat16)
    first = keys - queries - window + 1
    expected = reference.sliding_window_attention(**widened(inputs))
    for name in "kv":
        inputs[name][:first] = math.nan
    out, lse = run(library, library.context(arch), inputs)
    low = reference.sliding_window_attention(**{**inputs, "k": inputs["k"].nan_to_num(), "v": inputs["v"].nan_to_num()})
    assert_accurate(out, low[0], expected[0])
    assert_accurate(lse, low[1], expected[1])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("poison", (math.nan, math.inf))
def test_a_poisoned_key_reaches_only_queries_that_see_it(cpu_build, poison, dtype):
    library, arch = cpu_build
    window, at = 40, 50
    inputs = edge("poisoned", 130, 130, heads=2, window=window).inputs(DTYPES[dtype])
    clean, clean_lse = run(library, library.context(arch), inputs)
    inputs["k"][at] = math.nan
    inputs["v"][at] = poison
    out, lse = run(library, library.context(arch), inputs)
    sees = torch.arange(130)
    sees = (sees >= at) & (sees < at + window)
    torch.testing.assert_close(out[~sees], clean[~sees], rtol=2**-7, atol=1e-5)  # an ulp: values may be summed in another order
    torch.testing.assert_close(lse[:, ~sees], clean_lse[:, ~sees], rtol=0, atol=0)
    assert out[sees].isnan().all() and lse[:, sees].isnan().all()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("queries", (1, 130))
def test_an_infinite_value_counts_even_at_weight_zero(cpu_build, queries, dtype):
    """0 * inf is NaN in softmax(scores) @ v: in tiles at the window's edges, within it, and in decoding alike."""
    library, arch = cpu_build
    window, at = 100, 90
    inputs = edge("infinite", queries, 130, heads=2, window=window).inputs(DTYPES[dtype])
    inputs["q"].fill_(1)
    inputs["k"][at] = -1000  # the weight 2^-10000 is 0 in any format
    clean, clean_lse = run(library, library.context(arch), inputs)
    inputs["v"][at] = math.inf
    out, lse = run(library, library.context(arch), inputs)
    position = torch.arange(130)[-queries:]
    sees = (position >= at) & (position < at + window)
    assert sees.any()
    torch.testing.assert_close(out[~sees], clean[~sees], rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(lse, clean_lse, rtol=0, atol=0)
    assert out[sees].isnan().all()


@pytest.mark.parametrize("queries", (1, 40))
def test_extreme_scores(cpu_build, queries):
    """Scores of +-1e4 and more: the softmax is one-hot, never NaN."""
    library, arch = cpu_build
    inputs = edge("extreme", queries, 70, heads=2, window=33).inputs(torch.float32)
    inputs["softmax_scale"] = -1e4
    out, lse = run(library, library.context(arch), inputs)
    exact = reference.sliding_window_attention(**widened(inputs))
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-2, atol=1e-2)  # f32 scores of 1e5 are good to 1e-2
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("queries, keys, gone", ((1, 70, 70), (1, 700, 700), (1, 700, 600), (60, 60, 50)))
def test_scores_of_minus_infinity(cpu_build, queries, keys, gone, dtype):
    """The first keys score -inf: as if they were not there, and a query that sees only such keys gets 0 and -inf."""
    library, arch = cpu_build
    inputs = edge("minus_infinity", queries, keys, heads=2).inputs(DTYPES[dtype])
    inputs["q"][..., 5] = 1
    rest = {**inputs, "k": inputs["k"][gone:], "v": inputs["v"][gone:]}
    low, exact = reference.sliding_window_attention(**rest), reference.sliding_window_attention(**widened(rest))
    inputs["k"][:gone, :, 5] = -math.inf
    out, lse = run(library, library.context(arch), inputs)
    assert_accurate(out, low[0], exact[0])
    assert_accurate(lse, low[1], exact[1])
    blind = lse.isneginf().T
    assert blind.sum() == 2 * min(queries, max(0, gone - keys + queries)) and (out[blind] == 0).all()


def test_long_f32_sums(cpu_build):
    """A block of rows that is not split adds 16384 values: tile by tile, not one after the other."""
    library, arch = cpu_build
    check(library, arch, edge("long", 193, 16384, heads=1), "float32")


def test_lse_is_optional(cpu_build):
    library, arch = cpu_build
    inputs = SMALL[0].inputs(torch.float32)
    expected, _ = run(library, library.context(arch), inputs)
    out = torch.full_like(inputs["q"], math.nan)
    call(library, library.context(arch), OP, **inputs, out=out)
    assert same_bits(out, expected)


def test_sequences_do_not_depend_on_neighbours(cpu_build):
    library, arch = cpu_build
    case = SlidingWindowAttentionCase("alone", sequences=((1, 700), (9, 9), (60, 75), (1, 3)), heads=4, window=300)
    inputs = case.inputs(torch.bfloat16)
    context = library.context(arch)
    out, lse = run(library, context, inputs)
    q, k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    for b in range(4):
        at, of = slice(q[b], q[b + 1]), slice(k[b], k[b + 1])
        alone = run(library, context, dict(q=inputs["q"][at], k=inputs["k"][of], v=inputs["v"][of], window=300))
        assert same_bits(alone[0], out[at]) and same_bits(alone[1], lse[:, at])


RAGGED = replace(SMALL[0], sequences=((5, 5), (3, 8)), tail=2)
BATCHED = replace(SMALL[0], sequences=((5, 9),) * 2, layout="batched", keys=((0, 9), (3, 6)))


@pytest.mark.parametrize("case, name, values, match", [
    (RAGGED, "cu_seqlens_q", (1, 5, 8), r"cu_seqlens_q: expected 0 at \[0\], got 1"),
    (RAGGED, "cu_seqlens_q", (0, 5, 4), r"cu_seqlens_q: expected values that do not decrease, got 4 after 5 at \[2\]"),
    (RAGGED, "cu_seqlens_q", (0, 5, 11), r"cu_seqlens_q: expected sequences of at most 5 tokens, got 6 at \[1\]"),
    (RAGGED, "cu_seqlens_k", (0, 5, 16), r"cu_seqlens_k: expected sequences of at most 8 tokens, got 11 at \[1\]"),
    (RAGGED, "cu_seqlens_k", (0, 8, 16), r"cu_seqlens_k: expected at most 15 \(tokens\) at the end, got 16"),
    (RAGGED, "cu_seqlens_k", (0, -5, 3), r"cu_seqlens_k: expected values that do not decrease, got -5 after 0 at \[1\]"),
    (BATCHED, "k_start", (0, 10), r"k_start: expected 0 to 9, got 10 at \[1\]"),
    (BATCHED, "k_start", (-1, 3), r"k_start: expected 0 to 9, got -1 at \[0\]"),
    (BATCHED, "k_length", (9, 7), r"k_length: expected 0 to 6 \(keys after k_start\), got 7 at \[1\]"),
    (BATCHED, "k_length", (-1, 6), r"k_length: expected 0 to 9 \(keys after k_start\), got -1 at \[0\]"),
])
def test_bad_values(lib, case, name, values, match):
    inputs = case.inputs(torch.float32)
    inputs[name] = torch.tensor(values, dtype=torch.int32)
    out = torch.full_like(inputs["q"], 7.0)
    lse = torch.full((*out.shape[:-3], out.shape[-2], out.shape[-3]), 7.0)
    assert_refused(lib, lib.context(), OP, match, (out, lse), **inputs, out=out, lse=lse)
