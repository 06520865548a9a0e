"""compat.flash_attn.flash_attn_with_kvcache against flash-attn's own rules, written out in float64."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_ext.compat.flash_attn import flash_attn_with_kvcache
from op_calls import float_on, relative_error, same_bits, skip_unless_on
from test_flash_attn_compat import attend


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def i32(values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def tokens(device, batch, total, heads=4, key_heads=2, head_dim=64):
    """q, k, v [batch, total, heads, head_dim]: everything that the sequences will ever hold, position by position."""
    shapes = ((batch, total, h, head_dim) for h in (heads, key_heads, key_heads))
    return [normal(i, *shape).to(device, float_on(device)) for i, shape in enumerate(shapes)]


def empty_caches(like, slots, capacity):
    return [torch.full((slots, capacity, *like.shape[2:]), math.nan, dtype=like.dtype, device=like.device) for _ in "kv"]


def check(out, lse, q, k, v, causal, window_size, scale=None):
    """One sequence: out [Sq, Hq, D], lse [Hq, Sq] no further from float64 than twice the same formula in q's own dtype."""
    exact, low = (attend(q, k, v, causal, window_size, scale, dtype) for dtype in (torch.float64, q.dtype))
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    for got, rounded, wide in zip((out, lse), low, exact):
        assert got.shape == wide.shape and got.isfinite().all()
        assert relative_error(got, wide) <= 2 * relative_error(rounded, wide) + 1e-6


def turn(x, cos, sin, interleaved):
    """flash-attn's rotary embedding of x [S, H, D] by cos, sin [S, rotary_dim/2], in float64: pairs as complex numbers."""
    rotary_dim = 2 * cos.shape[1]
    x = x.double()
    pairs = x[..., :rotary_dim].unflatten(-1, (-1, 2)) if interleaved else x[..., :rotary_dim].unflatten(-1, (2, -1)).mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos.double(), sin.double())[:, None])
    return torch.cat(((turned if interleaved else turned.mT).flatten(-2), x[..., rotary_dim:]), -1)


def tables(device, positions, rotary_dim, dtype):
    angle = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(rotary_dim // 2) * 2 / rotary_dim)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def feed(device, chunks, window_size, capacity, starts, slots=(0, 1), ints=False, causal=True, rotary=None, head_dim=64, **options):
    """Feeds two sequences chunk by chunk and checks every result and all of both caches. starts: tokens that are in the
    cache before the first chunk. rotary: (cos, sin, interleaved)."""
    q, k, v = tokens(device, 2, max(starts) + sum(chunks), head_dim=head_dim)
    k_stored, q_seen = k.double(), q.double()
    if rotary:
        cos, sin, interleaved = (x[: q.shape[1]] if isinstance(x, torch.Tensor) else x for x in rotary)
        options |= dict(rotary_cos=rotary[0], rotary_sin=rotary[1], rotary_interleaved=interleaved)
        q_seen, k_stored = (torch.stack([turn(x, cos, sin, interleaved) for x in both]) for both in (q, k))
    q_seen, k_rounded = q_seen.to(q.dtype), k_stored.to(k.dtype)
    caches, expected = empty_caches(k, 4, capacity), empty_caches(k, 4, capacity)
    for b, start in enumerate(starts):
        for cache, new in zip((*caches, *expected), (k_rounded, v) * 2):
            cache[slots[b], :start] = new[b, :start]
    if slots != (0, 1):
        options |= dict(cache_batch_idx=i32(slots, device))
    lengths = list(starts)
    for n in chunks:
        new = [torch.stack([x[b, lengths[b] : lengths[b] + n] for b in range(2)]) for x in (q, k, v)]
        given = [x.clone() for x in new]
        out, lse = flash_attn_with_kvcache(
            new[0], *caches, *new[1:], cache_seqlens=lengths[0] if ints else i32(lengths, device),
            causal=causal, window_size=window_size, return_softmax_lse=True, **options,
        )
        assert all(same_bits(x, before) for x, before in zip(new, given))
        for b, slot in enumerate(slots):
            end = lengths[b] + n
            check(out[b], lse[b], q_seen[b, lengths[b] : end], k_rounded[b, :end], v[b, :end], causal, window_size)
            for position in range(lengths[b], end):
                for cache, stored in zip(expected, (k_rounded, v)):
                    cache[slot, position % capacity] = stored[b, position]
            lengths[b] = end
        assert same_bits(caches[1], expected[1])
        if rotary:
            torch.testing.assert_close(caches[0], expected[0], rtol=torch.finfo(k.dtype).eps, atol=1e-6, equal_nan=True)
        else:
            assert same_bits(caches[0], expected[0])


@pytest.mark.parametrize("ints", [False, True], ids=["tensor", "int"])
@pytest.mark.parametrize("slots", [(0, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("window_size, capacity", [
    ((-1, -1), 23),  # filled to the last position
    ((4, 0), 23),
    ((6, -1), 23),
    ((22, 0), 23),
    ((23, 0), 23),  # wider than the cache
    ((2**40, 0), 23),
    ((4, 0), 5),  # rolls
    ((4, 3), 7),
    ((0, 0), 1),
], ids=str)
def test_prompt_and_decode(device, window_size, capacity, slots, ints):
    starts = (0, 0) if ints or capacity == 1 else (0, 3)
    feed(device, (6, 1, 1, 4, 1, 7), window_size, capacity, starts, slots, ints)


@pytest.mark.parametrize("causal, window_size", [(False, (-1, -1)), (False, (3, -1)), (False, (3, 2)), (False, (3, 0)), (True, (3, 5))])
def test_decode_needs_no_causal(device, causal, window_size):
    feed(device, (1,) * 6, window_size, 9, (3, 2), causal=causal, head_dim=128, num_splits=3)


@pytest.mark.parametrize("window_size", [(-1, 0), (2, 0)])
def test_window_that_ends_at_the_query_is_causal(device, window_size):
    feed(device, (4, 3), window_size, 9, (1, 2), causal=False)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("rotary_dim", [16, 48, 64])
@pytest.mark.parametrize("window_size, capacity, ints", [((-1, -1), 16, False), ((-1, -1), 16, True), ((3, 0), 4, False), ((3, 0), 4, True)])
def test_rotary(device, window_size, capacity, ints, rotary_dim, interleaved):
    cos, sin = tables(device, 16, rotary_dim, float_on(device))
    feed(device, (5, 1, 1, 3, 1), window_size, capacity, (2, 2) if ints else (4, 2), (2, 0), ints, rotary=(cos, sin, interleaved))


def test_rotary_tables_of_float32(device):
    dtype = torch.bfloat16
    skip_unless_on(device, dtype)
    q, k, v = (x.to(dtype) for x in tokens(device, 1, 3))
    caches = empty_caches(k, 1, 8)
    cos, sin = tables(device, 8, 32, torch.float32)
    out = flash_attn_with_kvcache(q, *caches, k, v, cos, sin, cache_seqlens=0, causal=True)
    exact = turn(k[0], cos[:3], sin[:3], True)
    torch.testing.assert_close(caches[0][0, :3].double(), exact, rtol=2.0**-8 * 1.01, atol=1e-6)  # half a unit in the last place: one rounding
    seen = turn(q[0], cos[:3], sin[:3], True).to(dtype)
    expected, low = (attend(seen, exact.to(dtype), v[0], True, (-1, -1), dtype=x)[0] for x in (torch.float64, dtype))
    assert relative_error(out[0], expected) <= 2 * relative_error(low, expected) + 1e-6


def filled(device, slots, capacity, lengths):
    """q [2, 3, 4, 64] and caches whose rows are NaN from each length on."""
    q, k, v = tokens(device, slots, capacity)
    for b, length in enumerate(lengths):
        k[b, length:] = v[b, length:] = math.nan
    return q[:2, :3].contiguous(), k, v


@pytest.mark.parametrize("how", ["tensor", "strided", "int", "None"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("window_size", [(-1, -1), (0, 0), (5, 0), (9, 0), (11, 0), (12, 0), (50, -1)])
def test_read_only(device, window_size, queries, how):
    lengths = {"int": (7, 7), "None": (12, 12)}.get(how, (12, 4))
    q, *caches = filled(device, 3, 12, (*lengths, 12))
    before = [x.clone() for x in caches]
    given = {
        "tensor": i32(lengths, device),
        "strided": i32([[n, 99] for n in lengths], device)[:, 0],
        "int": 7,
        "None": None,
    }[how]
    q = q[:, :queries]
    out, lse = flash_attn_with_kvcache(
        q, *caches, cache_seqlens=given, softmax_scale=0.2, causal=True, window_size=window_size, return_softmax_lse=True)
    for b, n in enumerate(lengths):
        check(out[b], lse[b], q[b], caches[0][b, :n], caches[1][b, :n], True, window_size, 0.2)
    assert all(same_bits(x, y) for x, y in zip(caches, before))
    alone = flash_attn_with_kvcache(q, *caches, cache_seqlens=given, softmax_scale=0.2, causal=True, window_size=window_size)
    assert torch.equal(alone, out)


def test_read_only_of_a_ring_and_batch_indices(device):
    """Sequence b has seen 25 and 13 tokens; its cache of 8 holds the last 8, and its 3 queries see 6 each."""
    q, k, v = tokens(device, 2, 25)
    caches, lengths, slots = empty_caches(k, 3, 8), (25, 13), (2, 1)
    for b, n in enumerate(lengths):
        for position in range(n - 8, n):
            caches[0][slots[b], position % 8], caches[1][slots[b], position % 8] = k[b, position], v[b, position]
    batch = i32([[s, 99] for s in slots], device)[:, 0]  # strided
    out, lse = flash_attn_with_kvcache(q[:, :3], *caches, cache_seqlens=i32(lengths, device), cache_batch_idx=batch,
                                       causal=True, window_size=(5, 0), return_softmax_lse=True)
    for b, n in enumerate(lengths):
        check(out[b], lse[b], q[b, :3], k[b, :n], v[b, :n], True, (5, 0))


class OpsOn(TorchDispatchMode):
    """Names of the ops that see one of these tensors' memory, and of all ops."""

    def __init__(self, *tensors):
        super().__init__()
        self.memory, self.touching, self.all = {t.untyped_storage().data_ptr() for t in tensors}, [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        values = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        if any(x.untyped_storage().data_ptr() in self.memory for x in values):
            self.touching.append(function.name())
        self.all.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["heads_first", "gaps"])
def test_strided_caches_are_used_in_place(device, layout):
    """No op but ours sees a cache, and none reads a value from a tensor."""
    q, k, v = tokens(device, 2, 3)
    wholes = [torch.full(shape, 7.0, dtype=k.dtype, device=device)
              for shape in [(3, 2, 10, 64) if layout == "heads_first" else (6, 20, 4, 80)] * 2]
    views = [w.transpose(1, 2) if layout == "heads_first" else w[1::2, 3:13, ::2, 8:72] for w in wholes]
    expected = [w.clone() for w in wholes]
    in_expected = [w.transpose(1, 2) if layout == "heads_first" else w[1::2, 3:13, ::2, 8:72] for w in expected]
    for cache, new in zip(in_expected, (k, v)):
        for b, (slot, start) in enumerate(((2, 4), (0, 7))):
            cache[slot, start : start + 3] = new[b]
    lengths, batch = i32(((4, 99), (7, 99)), device)[:, 0], i32((2, 0), device)
    with OpsOn(*wholes) as ops:
        out, lse = flash_attn_with_kvcache(q, *views, k, v, cache_seqlens=lengths, cache_batch_idx=batch, causal=True,
                                           return_softmax_lse=True)
    assert ops.touching == ["mixtral_ext::rolling_attention"]
    assert not {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"} & set(ops.all)
    assert all(same_bits(x, y) for x, y in zip(wholes, expected))
    for b, (slot, start) in enumerate(((2, 4), (0, 7))):
        check(out[b], lse[b], q[b], in_expected[0][slot, : start + 3], in_expected[1][slot, : start + 3], True, (-1, -1))


@pytest.mark.parametrize("strided", ["q_k_v_of_one_product", "heads_first"])
def test_strided_tokens(device, strided):
    q, k, v = tokens(device, 2, 3)
    if strided == "heads_first":
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    else:
        given = torch.cat((q, k, v), 2).split((4, 2, 2), 2)
    caches = empty_caches(k, 2, 5)
    out, lse = flash_attn_with_kvcache(given[0], *caches, *given[1:], cache_seqlens=0, causal=True, return_softmax_lse=True)
    assert out.is_contiguous() and lse.is_contiguous()
    for b in range(2):
        check(out[b], lse[b], q[b], k[b], v[b], True, (-1, -1))
    assert same_bits(caches[0][:, :3], k) and same_bits(caches[1][:, :3], v)


def test_without_data():
    """Shapes alone are enough: tensors without values pass through, so nothing on the host waits for one."""
    def call(device):
        q, k, v = (torch.empty(2, 3, h, 64, device=device) for h in (4, 2, 2))
        caches = [torch.empty(5, 16, 2, 64, device=device) for _ in "kv"]
        table = torch.empty(16, 32, device=device)
        lengths, batch = (torch.empty(2, dtype=torch.int32, device=device) for _ in "lb")
        for window_size in ((-1, -1), (4, 0)):
            for new in ((None, None, None, None), (k, v, None, None), (k, v, table, table)):
                for length in (lengths, 9):
                    out, lse = flash_attn_with_kvcache(q, *caches, *new, length, batch, causal=True, window_size=window_size,
                                                       return_softmax_lse=True)
                    assert out.shape == q.shape and out.dtype == q.dtype and out.device == q.device
                    assert lse.shape == (2, 4, 3) and lse.dtype == torch.float32
                    assert all(isinstance(x, type(q)) for x in (out, lse))

    call("meta")
    with FakeTensorMode():
        call("cpu")


@pytest.mark.gpu
def test_step_in_a_cuda_graph():
    """One captured step with rotary embedding serves every length, past the end of the ring too."""
    q, k, v = tokens("cuda", 2, 12)
    cos, sin = tables("cuda", 16, 64, q.dtype)
    q_seen, k_seen = (torch.stack([turn(x, cos[:12], sin[:12], False) for x in both]).to(q.dtype) for both in (q, k))
    caches, lengths, new = empty_caches(k, 2, 6), i32((0, 0), "cuda"), [x[:, :1].clone() for x in (q, k, v)]

    def step():
        result = flash_attn_with_kvcache(new[0], *caches, *new[1:], cos, sin, lengths, window_size=(4, 0), rotary_interleaved=False,
                                         return_softmax_lse=True)
        lengths.add_(1)
        return result

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    lengths.zero_()
    for t in range(12):
        for static, x in zip(new, (q, k, v)):
            static.copy_(x[:, t : t + 1])
        graph.replay()
        for b in range(2):
            check(out[b], lse[b], q_seen[b, t : t + 1], k_seen[b, : t + 1], v[b, : t + 1], False, (4, 0))


FUNCTION = "flash_attn_with_kvcache: "
NEW = torch.zeros(2, 3, 2, 64)
TABLE = torch.zeros(16, 32)
REFUSED = {  # changes to a call with B=2, Sq=3, C=16, Hq=4, Hk=2, D=64 -> message
    "block_table": (dict(block_table=i32([[0]])), r"block_table: expected None, got a tensor of shape \[1, 1\]"),
    "cache_leftpad": (dict(cache_leftpad=i32([0, 0])), r"cache_leftpad: expected None, got a tensor of shape \[2\]"),
    "softcap": (dict(softcap=30.0), "softcap: expected 0, got 30.0"),
    "alibi_slopes": (dict(alibi_slopes=torch.ones(4)), r"alibi_slopes: expected None, got a tensor of shape \[4\]"),
    "not causal": (dict(causal=False), r"causal: expected True .*, got causal=False with window_size=\(-1, -1\) and 3 queries"),
    "window_size": (dict(window_size=4), r"window_size: expected \(left, right\), two integers, got 4"),
    "k alone": (dict(v=None), "v: expected a tensor of 4 dimensions, got None"),
    "v alone": (dict(k=None), "k: expected a tensor of 4 dimensions, got None"),
    "q's rank": (dict(q=torch.zeros(6, 4, 64)), r"q: expected a tensor of 4 dimensions, got \[6, 4, 64\]"),
    "k's rank": (dict(k=NEW[0]), r"k: expected a tensor of 4 dimensions, got \[3, 2, 64\]"),
    "cache's rank": (dict(v_cache=torch.zeros(3, 16, 64)), r"v_cache: expected a tensor of 4 dimensions, got \[3, 16, 64\]"),
    "no queries": (dict(q=torch.zeros(2, 0, 4, 64), k=NEW[:, :0], v=NEW[:, :0]), "q: expected 1 to 16 tokens a sequence, got 0"),
    "k's tokens": (dict(k=NEW[:, :2], v=NEW[:, :2]), r"k: expected \[2, 3\] \(batch, tokens\) as q, got \[2, 2\]"),
    "v's batch": (dict(v=NEW[:1]), r"v: expected \[2, 3\] \(batch, tokens\) as q, got \[1, 3\]"),
    "i64 lengths": (dict(cache_seqlens=torch.tensor([0, 0])), "cache_seqlens: expected dtype torch.int32, got torch.int64"),
    "lengths' batch": (dict(cache_seqlens=i32([0, 0, 0])), r"cache_seqlens: expected shape \[2\], got \[3\]"),
    "lengths' rank": (dict(cache_seqlens=i32([[0, 0]])), r"cache_seqlens: expected a tensor of 1 dimensions, got \[1, 2\]"),
    "lengths' device": (dict(cache_seqlens=i32([0, 0], "meta")), "cache_seqlens: expected device cpu, got meta"),
    "no lengths": (dict(cache_seqlens=None), r"cache_seqlens: expected an int or an int32 tensor of shape \[2\], got None"),
    "lengths' kind": (dict(cache_seqlens=1.5), r"cache_seqlens: expected an int or an int32 tensor of shape \[2\], got 1.5"),
    "i64 indices": (dict(cache_batch_idx=torch.tensor([0, 1])), "cache_batch_idx: expected dtype torch.int32, got torch.int64"),
    "indices' batch": (dict(cache_batch_idx=i32([0])), r"cache_batch_idx: expected shape \[2\], got \[1\]"),
    "full": (dict(cache_seqlens=14), r"cache_seqlens: expected 0 to 13 \(3 new tokens of at most 16\), got 14"),
    "full, wide window": (dict(cache_seqlens=14, window_size=(16, 0)), "cache_seqlens: expected 0 to 13 .*, got 14"),
    "negative": (dict(cache_seqlens=-1, window_size=(4, 0)), "cache_seqlens: expected 0 to 2147483644 .*, got -1"),
    "too many tokens": (dict(q=torch.zeros(2, 17, 4, 64), k=torch.zeros(2, 17, 2, 64), v=torch.zeros(2, 17, 2, 64)),
                        "q: expected 1 to 16 tokens a sequence, got 17"),
    "read beyond": (dict(k=None, v=None, cache_seqlens=17), r"cache_seqlens: expected 3 to 16 \(3 last tokens of at most 16\), got 17"),
    "read before": (dict(k=None, v=None, cache_seqlens=2), "cache_seqlens: expected 3 to 16 .*, got 2"),
    "read a ring": (dict(k=None, v=None, cache_seqlens=9, window_size=(14, 0)),
                    r"window_size: expected left <= 13 for 3 queries without k and v in a cache of 16, got \(14, 0\)"),
    "rotary without k": (dict(k=None, v=None, rotary_cos=TABLE, rotary_sin=TABLE), "rotary_cos: expected None without k and v"),
    "sin without k": (dict(k=None, v=None, rotary_sin=TABLE), "rotary_sin: expected None without k and v"),
    "cos alone": (dict(rotary_cos=TABLE), "rotary_sin: expected a tensor of 2 dimensions, got None"),
    "sin alone": (dict(rotary_sin=TABLE), "rotary_cos: expected a tensor of 2 dimensions, got None"),
    "short tables": (dict(rotary_cos=TABLE[1:], rotary_sin=TABLE[1:]),
                     r"rotary_cos: expected at least 16 \(cache\) rows of at most 32 \(half of D\), got \[15, 32\]"),
    "wide tables": (dict(rotary_cos=torch.zeros(16, 33), rotary_sin=torch.zeros(16, 33)), r"rotary_cos: .* got \[16, 33\]"),
    "unlike tables": (dict(rotary_cos=TABLE, rotary_sin=TABLE[:, :8]), r"rotary_sin: expected \[16, 32\] as rotary_cos, got \[16, 8\]"),
    "tables' device": (dict(rotary_cos=TABLE, rotary_sin=TABLE.to("meta")), "rotary_sin: expected device cpu, got meta"),
    "past the tables": (dict(rotary_cos=TABLE, rotary_sin=TABLE, cache_seqlens=14, window_size=(4, 0)),
                        "cache_seqlens: expected 0 to 13 .*, got 14"),
    "past the tables, tensor": (dict(rotary_cos=TABLE, rotary_sin=TABLE, cache_seqlens=i32([0, 14]), window_size=(4, 0)),
                                r"cache_seqlens: expected positions of the 3 tokens within the 16 rows of rotary_cos, got \[0, 14\]"),
}
REFUSED_BY_THE_OP = {
    "full, tensor": (dict(cache_seqlens=i32([0, 14])), r"cache_lengths: expected at most 13 \(max_cache_length\), got 14 at \[1\]"),
    "negative, tensor": (dict(cache_seqlens=i32([-1, 0])), r"cache_lengths: expected 0 to .*, got -1 at \[0\]"),
    "read before, tensor": (dict(k=None, v=None, cache_seqlens=i32([3, 2])), r"cache_lengths: expected 0 to .*, got -1 at \[1\]"),
    "equal indices": (dict(cache_batch_idx=i32([1, 1])), r"cache_slots: expected distinct slots, got 1 again at \[1\]"),
    "too few caches": (dict(k_cache=torch.zeros(1, 16, 2, 64), v_cache=torch.zeros(1, 16, 2, 64)),
                       r"k_cache.shape\[0\] \(slots\): expected at least the 2 sequences, got 1"),
    "k's heads": (dict(k=NEW[:, :, :1]), "k: expected"),
    "v_cache's dtype": (dict(v_cache=torch.zeros(3, 16, 2, 64, dtype=torch.bfloat16)), "v_cache: expected dtype"),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_BY_THE_OP])
def test_refuses_by_name_and_writes_nothing(name):
    changes, message = {**REFUSED, **REFUSED_BY_THE_OP}[name]
    caches = dict(k_cache=torch.full((3, 16, 2, 64), 5.0), v_cache=torch.full((3, 16, 2, 64), 6.0))
    arguments = dict(q=torch.zeros(2, 3, 4, 64), **caches, k=NEW, v=NEW, cache_seqlens=0, causal=True) | changes
    with pytest.raises(ValueError, match=(FUNCTION if name in REFUSED else "mixtral_rolling_attention: ") + message):
        flash_attn_with_kvcache(**arguments)
    assert (caches["k_cache"] == 5).all() and (caches["v_cache"] == 6).all()


@pytest.mark.gpu
def test_on_cuda_what_is_beyond_the_cache_is_dropped():
    q, k, v = tokens("cuda", 2, 3)
    caches, expected = empty_caches(k, 2, 8), empty_caches(k, 2, 8)
    for cache, new in zip(expected, (k, v)):
        cache[0, 5:] = new[0]
    for cache in (*caches, *expected):
        cache[:, :5] = 1
    flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=i32((5, 8), "cuda"), causal=True)
    assert all(same_bits(x, y) for x, y in zip(caches, expected))


@pytest.mark.gpu
@pytest.mark.parametrize("queries", [1, 3])
def test_on_cuda_a_row_of_padding_sees_nothing(queries):
    """In a read-only call whose lengths the host cannot see; the other sequence is as without it."""
    q, *caches = filled("cuda", 2, 12, (7, 12))
    q = q[:, :queries]
    expected = flash_attn_with_kvcache(q, *caches, cache_seqlens=i32((7, 12), "cuda"), causal=True, return_softmax_lse=True)
    out, lse = flash_attn_with_kvcache(q, *caches, cache_seqlens=i32((7, 0), "cuda"), causal=True, return_softmax_lse=True)
    assert (out[1] == 0).all() and lse[1].isneginf().all()
    assert same_bits(out[0], expected[0][0]) and same_bits(lse[0], expected[1][0])


@pytest.mark.gpu
def test_on_cuda_positions_beyond_the_tables_take_the_last_row():
    q, k, v = tokens("cuda", 2, 1)
    caches = empty_caches(k, 2, 8)
    for cache in caches:
        cache[:] = 1
    cos, sin = tables("cuda", 8, 64, k.dtype)
    flash_attn_with_kvcache(q, *caches, k, v, cos, sin, i32((7, 21), "cuda"), window_size=(3, 0))
    for b, row in enumerate((7, 21 % 8)):
        torch.testing.assert_close(caches[0][b, row].double(), turn(k[b], cos[7:], sin[7:], True)[0], rtol=2.0**-7, atol=1e-6)
