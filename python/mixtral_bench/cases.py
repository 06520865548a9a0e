"""One list of cases per op, for the tests (CPU, virtual GPU, GPU) and the benchmarks.

CASES[op] lists the cases of an op; `case.inputs(dtype, device)` makes the arguments of its functional form, by name.
Small cases take milliseconds in an emulator and cover the edges of the contract; the benchmarks take the `large` ones, which have the
sizes of the models in SHAPES. Whatever an op must not read holds NaN or a huge index. `cpu_only` cases break the 16-byte alignment
that CUDA asks for; `far` ones put elements more than 2^31 elements apart (address space, not memory: nothing in
between is touched).
"""
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

HUGE = 2**31 - 1
BLOCK = 2**24 - 3  # large tensors repeat so many random elements; it divides no size, so experts, rows and sequences differ
FAR = 2**30 + 8  # stride of `far` cases: the third row lies beyond 2^31 elements


@dataclass(frozen=True)
class Shape:
    """What a model's layers have; window None: plain causal, up to `context` positions."""
    hidden: int
    intermediate: int
    heads: int
    window: int | None
    context: int
    theta: float = 1e6
    key_heads: int = 8
    head_dim: int = 128


SHAPES = {
    "mixtral-8x7b": Shape(4096, 14336, 32, None, 32768),
    "mixtral-8x22b": Shape(6144, 16384, 48, None, 65536),
    "mistral-7b": Shape(4096, 14336, 32, 4096, 32768, 1e4),  # v0.1; later versions have the attention of mixtral-8x7b
}
MOE = ("mixtral-8x7b", "mixtral-8x22b")  # 8 experts, 2 of them for a token


@dataclass(frozen=True)
class Case:
    name: str
    seed: int = 0
    shapes: tuple[str, ...] = ()  # the models (of SHAPES) that have a large case's sizes
    cpu_only: bool = False
    far: bool = False
    op: ClassVar[str]

    @property
    def large(self) -> bool:
        return bool(self.shapes)

    def inputs(self, dtype, device="cpu"):
        return self._inputs(Maker(dtype, device, self.seed))

    def __str__(self):
        return self.name


class Maker:
    """Random tensors of one case. Normal numbers, scaled so that results stay near 1."""

    def __init__(self, dtype, device, seed):
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape, scale=1.0, padding=0, far=False, dtype=None):
        """Contiguous, or with `padding` NaN elements after each innermost row, or FAR apart in the first dimension."""
        t = self.empty(*shape, padding=padding, far=far, dtype=dtype)
        if t.numel() < 2 * BLOCK or not t.is_contiguous():
            return t.normal_(0, scale, generator=self.generator)
        block = torch.empty(BLOCK, dtype=t.dtype, device=t.device).normal_(0, scale, generator=self.generator)
        for part in t.view(-1).split(BLOCK):  # a GB of new normal numbers takes 10 s on a CPU
            part.copy_(block[:len(part)])
        return t

    def empty(self, *shape, padding=0, far=False, dtype=None):
        """The same layouts, filled with NaN."""
        dtype = dtype or self.dtype
        if far:
            inner = math.prod(shape[1:])
            flat = torch.empty(FAR * (shape[0] - 1) + inner, dtype=dtype, device=self.device)
            return flat.as_strided(shape, (FAR, *torch.empty(shape, device="meta").stride()[1:])).fill_(math.nan)
        return torch.full((*shape[:-1], shape[-1] + padding), math.nan, dtype=dtype, device=self.device)[..., :shape[-1]]

    def ints(self, low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def i32(self, values):
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def distinct_ids(self, tokens, experts, top_k):
        return torch.rand(tokens, experts, generator=self.generator, device=self.device).argsort(1)[:, :top_k].int()

    def topk_ids(self, tokens, experts, top_k, routing, dtype=torch.int32):
        """routing: uniform; balanced (as many rows for each expert); one (all rows on the last expert); few (experts 1 and 2 only);
        two (every token on two experts that are not neighbours); skips; all_skips."""
        if routing == "balanced":
            ids = (torch.arange(tokens * top_k, device=self.device) % experts).view(tokens, top_k).to(dtype)
        elif routing == "two":
            ids = torch.tensor([1, experts - 2], dtype=dtype, device=self.device).expand(tokens, 2).contiguous()
        elif routing == "one":
            ids = torch.full((tokens, top_k), experts - 1, dtype=dtype, device=self.device)
        elif routing == "few":
            ids = self.ints(1, min(3, experts), tokens, top_k, dtype=dtype)
        else:
            ids = self.distinct_ids(tokens, experts, top_k).to(dtype)
        if routing in ("skips", "all_skips"):
            markers = [-1, experts, HUGE, -HUGE - 1]
            if dtype == torch.int64:
                markers += [2**32, 2**32 + 1, -2**32]  # these look valid when truncated to 32 bits
            marker = torch.tensor(markers, dtype=dtype, device=self.device)[self.ints(0, len(markers), tokens, top_k).long()]
            skipped = torch.rand(tokens, top_k, generator=self.generator, device=self.device) < 0.4
            ids = marker if routing == "all_skips" else torch.where(skipped, marker, ids)
        return ids

    def maps(self, tokens, experts, top_k, routing):
        """expert_offsets, sorted_slots, slot_rows made by torch alone."""
        from mixtral_ext.reference import moe_sort
        return moe_sort(self.topk_ids(tokens, experts, top_k, routing), experts)

    def topk_weights(self, ids_or_rows, skipped):
        weights = torch.rand(ids_or_rows.shape, generator=self.generator, device=self.device)
        return (weights / weights.sum(1, keepdim=True)).masked_fill(skipped, math.nan)


# ------------------------------------------------------------------------------------------------------------ routing


@dataclass(frozen=True)
class MoeGateCase(Case):
    op: ClassVar[str] = "moe_gate"
    tokens: int = 7
    experts: int = 8
    top_k: int = 2
    renormalize: bool = True
    values: str = "normal"
    padding: int = 0

    def _inputs(self, make):
        logits = make.normal(self.tokens, self.experts, padding=self.padding)
        if self.values == "ties":
            logits.copy_(make.ints(-1, 2, *logits.shape))
        elif self.values == "zeros":  # -0 and +0 tie
            logits.copy_(torch.where(make.ints(0, 2, *logits.shape) > 0, 0.0, -0.0))
        elif self.values == "one":
            logits[:, -1] = 100.0
        elif self.values == "nan":
            logits.masked_fill_(make.ints(0, 4, *logits.shape) == 0, math.nan)
            logits[0] = math.nan
        elif self.values == "inf":  # rows: all -inf; one finite logit; about half -inf
            logits.masked_fill_(make.ints(0, 2, *logits.shape) == 0, -math.inf)
            logits[:2] = -math.inf
            logits[1:2, -1] = 0.5
        return dict(router_logits=logits, top_k=self.top_k, renormalize=self.renormalize)


@dataclass(frozen=True)
class MoeSortCase(Case):
    op: ClassVar[str] = "moe_sort"
    tokens: int = 7
    experts: int = 8
    top_k: int = 2
    routing: str = "uniform"
    ids_dtype: torch.dtype = torch.int32
    padding: int = 0

    def _inputs(self, make):
        ids = make.topk_ids(self.tokens, self.experts, self.top_k, self.routing, self.ids_dtype)
        if self.padding:
            ids = torch.nn.functional.pad(ids, (0, self.padding))[:, :self.top_k]
        return dict(topk_ids=ids, num_experts=self.experts)


@dataclass(frozen=True)
class MoePermuteCase(Case):
    op: ClassVar[str] = "moe_permute"
    tokens: int = 7
    hidden: int = 64
    experts: int = 8
    top_k: int = 2
    routing: str = "uniform"
    padding: int = 0

    def _inputs(self, make):
        _, sorted_slots, _ = make.maps(self.tokens, self.experts, self.top_k, self.routing)
        hidden = make.normal(self.tokens, self.hidden, padding=self.padding, far=self.far)
        return dict(hidden=hidden, sorted_slots=sorted_slots, top_k=self.top_k)


@dataclass(frozen=True)
class MoeCombineCase(MoePermuteCase):
    op: ClassVar[str] = "moe_combine"

    def _inputs(self, make):
        offsets, _, slot_rows = make.maps(self.tokens, self.experts, self.top_k, self.routing)
        rows = make.normal(self.tokens * self.top_k, self.hidden, padding=self.padding, far=self.far)
        rows[int(offsets[-1]):] = math.nan
        return dict(rows=rows, slot_rows=slot_rows, topk_weights=make.topk_weights(slot_rows, slot_rows < 0))


# ------------------------------------------------------------------------------------------------------------ experts


@dataclass(frozen=True)
class GroupedGemmCase(Case):
    op: ClassVar[str] = "grouped_gemm"
    segments: tuple = (3, 0, 5, 1)  # rows of each expert
    inner: int = 64                 # Kd (H of the SwiGLU form)
    outer: int = 48                 # N (I of the SwiGLU form)
    tail: int = 0                   # rows past the last offset
    gather: int = 0                 # 0: no a_rows; else a_rows with this divisor
    padding: int = 0
    far: bool = False               # experts FAR apart, and rows of a

    def _operands(self, make, outer):
        rows, offsets = sum(self.segments), [0]
        for n in self.segments:
            offsets.append(offsets[-1] + n)
        b = make.normal(len(self.segments), outer, self.inner, scale=max(1, self.inner)**-0.5, padding=self.padding, far=self.far)
        if not self.gather:
            a = make.normal(rows + self.tail, self.inner, padding=self.padding, far=self.far)
            a[rows:] = math.nan
            return a, b, dict(expert_offsets=make.i32(offsets))
        tokens = max(1, -(-rows // self.gather))
        a = make.normal(tokens, self.inner, padding=self.padding, far=self.far)
        a_rows = make.ints(0, tokens * self.gather, rows + self.tail)
        a_rows[rows:] = HUGE
        return a, b, dict(expert_offsets=make.i32(offsets), a_rows=a_rows, a_rows_divisor=self.gather)

    def _inputs(self, make):
        a, b, rest = self._operands(make, self.outer)
        return dict(a=a, b=b, **rest)


@dataclass(frozen=True)
class GroupedGemmSwigluCase(GroupedGemmCase):
    op: ClassVar[str] = "grouped_gemm_swiglu"

    def _inputs(self, make):
        a, b, rest = self._operands(make, 2 * self.outer)
        return dict(a=a, w_gate_up=b, **rest)


@dataclass(frozen=True)
class MoeExpertsCase(Case):
    op: ClassVar[str] = "moe_experts"
    tokens: int = 7
    experts: int = 4
    top_k: int = 2
    hidden: int = 64
    intermediate: int = 48
    routing: str = "uniform"
    maps: bool = False
    ids_dtype: torch.dtype = torch.int32
    padding: int = 0

    def _inputs(self, make):
        from mixtral_ext.reference import moe_sort
        ids = make.topk_ids(self.tokens, self.experts, self.top_k, self.routing, self.ids_dtype)
        args = dict(
            hidden=make.normal(self.tokens, self.hidden, padding=self.padding, far=self.far),
            w_gate_up=make.normal(self.experts, 2 * self.intermediate, self.hidden, scale=max(1, self.hidden)**-0.5,
                                  padding=self.padding),
            w_down=make.normal(self.experts, self.hidden, self.intermediate, scale=2 * max(1, self.intermediate)**-0.5,
                               padding=self.padding),
            topk_weights=make.topk_weights(ids, (ids < 0) | (ids >= self.experts)),
            topk_ids=ids)
        if self.maps:
            args.update(zip(("expert_offsets", "sorted_slots", "slot_rows"), moe_sort(ids, self.experts)))
            args["topk_ids"] = torch.full_like(ids, HUGE)  # not read
        return args


# ---------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class SlidingWindowAttentionCase(Case):
    """sequences: (queries, keys) of each. layout: packed; single (one sequence, no cu_seqlens); batched; transposed
    (batched as a view of [B, H, S, D]). keys: (k_start, k_length) of each sequence, batched only."""
    op: ClassVar[str] = "sliding_window_attention"
    sequences: tuple = ((5, 5),)
    heads: int = 2
    key_heads: int = 1
    head_dim: int = 64
    window: int | None = None
    softmax_scale: float | None = None
    layout: str = "packed"
    keys: tuple | None = None
    only_start: bool = False  # pass k_start without k_length
    tail: int = 0             # packed: rows of q, k and v outside the bounds
    maxima: bool = True       # packed: pass max_seqlen_q and max_seqlen_k
    padding: int = 0

    def _inputs(self, make):
        common = dict(window=self.window, softmax_scale=self.softmax_scale)
        counts, lengths = [n for n, _ in self.sequences], [m for _, m in self.sequences]
        if self.layout in ("packed", "single"):
            tensors = []
            for total, heads in ((sum(counts), self.heads), (sum(lengths), self.key_heads), (sum(lengths), self.key_heads)):
                t = make.normal(total + self.tail, heads, self.head_dim, padding=self.padding)
                t[total:] = math.nan
                tensors.append(t)
            args = dict(zip("qkv", tensors))
            if self.layout == "packed":
                for name, sizes in (("q", counts), ("k", lengths)):
                    args[f"cu_seqlens_{name}"] = make.i32([0] + [sum(sizes[:i + 1]) for i in range(len(sizes))])
                    if self.maxima:
                        args[f"max_seqlen_{name}"] = max(sizes, default=0)
            return args | common
        batch, n, m = len(self.sequences), max(counts, default=0), max(lengths, default=0)
        args = {}
        for name, size, heads in (("q", n, self.heads), ("k", m, self.key_heads), ("v", m, self.key_heads)):
            if self.layout == "transposed":
                args[name] = make.normal(batch, heads, size, self.head_dim, padding=self.padding).transpose(1, 2)
            else:
                args[name] = make.normal(batch, size, heads, self.head_dim, padding=self.padding, far=self.far)
        if self.keys:
            for b, (first, length) in enumerate(self.keys):
                for t in (args["k"], args["v"]):
                    t[b, :first] = math.nan
                    t[b, first + length:] = math.nan
            args["k_start"] = make.i32([first for first, _ in self.keys])
            if not self.only_start:
                args["k_length"] = make.i32([length for _, length in self.keys])
        return args | common


@dataclass(frozen=True)
class RollingAttentionCase(Case):
    """chunks: new tokens of each sequence; lengths: tokens it has seen. Ring slots out of every query's sight hold NaN."""
    op: ClassVar[str] = "rolling_attention"
    chunks: tuple = (1, 1)
    lengths: tuple = (0, 3)
    capacity: int = 8
    window: int | None = 8
    heads: int = 2
    key_heads: int = 1
    head_dim: int = 64
    softmax_scale: float | None = None
    slots: int = 0             # 0: one per sequence
    cache_slots: tuple | None = None
    read_only: bool = False
    rope_theta: float | None = None
    rope_interleaved: bool = False
    tail: int = 0              # rows of q, k and v outside the bounds
    padding: int = 0

    def _inputs(self, make):
        total = sum(self.chunks)

        def chunk(heads):
            t = make.normal(total + self.tail, heads, self.head_dim, padding=self.padding)
            t[total:] = math.nan
            return t

        args = dict(q=chunk(self.heads), k=None, v=None)
        if not self.read_only:
            args.update(k=chunk(self.key_heads), v=chunk(self.key_heads))
        shape = (self.slots or len(self.chunks), self.capacity, self.key_heads, self.head_dim)
        for name in ("k_cache", "v_cache"):
            cache = args[name] = make.empty(*shape, padding=self.padding, far=self.far)
            for b, (n, length) in enumerate(zip(self.chunks, self.lengths)):
                slot = self.cache_slots[b] if self.cache_slots else b
                first = 0 if self.window is None else max(0, length - self.window + 1)
                end = length + n if self.read_only else length
                ring = torch.arange(first, end, device=make.device) % self.capacity
                cache[slot, ring] = make.normal(len(ring), *shape[2:])
        args["cu_seqlens_q"] = make.i32([0] + [sum(self.chunks[:i + 1]) for i in range(len(self.chunks))])
        args["cache_lengths"] = make.i32(self.lengths)
        if self.cache_slots:
            args["cache_slots"] = make.i32(self.cache_slots)
        return args | dict(window=self.window, softmax_scale=self.softmax_scale, max_seqlen_q=max(self.chunks, default=0),
                           max_cache_length=max(self.lengths, default=0), rope_theta=self.rope_theta,
                           rope_interleaved=self.rope_interleaved)


@dataclass(frozen=True)
class ApplyRopeCase(Case):
    op: ClassVar[str] = "apply_rope"
    tokens: int = 5
    heads: int = 2
    key_heads: int = 1  # 0: no k
    head_dim: int = 64
    theta: float = 1e4
    interleaved: bool = False
    first: int = 0      # position of the first token
    positions_dtype: torch.dtype = torch.int32
    padding: int = 0

    def _inputs(self, make):
        q = make.normal(self.tokens, self.heads, self.head_dim, padding=self.padding, far=self.far)
        k = make.normal(self.tokens, self.key_heads, self.head_dim, padding=self.padding) if self.key_heads else None
        positions = self.first + torch.arange(self.tokens, device=make.device)
        return dict(q=q, k=k, positions=positions.to(self.positions_dtype), theta=self.theta, interleaved=self.interleaved)


# ---------------------------------------------------------------------------------------------------------- the lists


def _gate_cases():
    return [
        MoeGateCase("empty", tokens=0),
        MoeGateCase("one_token", tokens=1),
        MoeGateCase("plain", tokens=37, seed=1),
        MoeGateCase("all_experts", tokens=3, renormalize=False),
        MoeGateCase("ties", tokens=19, values="ties"),
        MoeGateCase("signed_zeros", tokens=9, values="zeros"),
        MoeGateCase("one_expert_first", tokens=11, values="one"),
        MoeGateCase("nan", tokens=13, values="nan"),
        MoeGateCase("nan_all_experts", tokens=13, values="nan", renormalize=False),
        MoeGateCase("minus_inf", tokens=9, values="inf"),
        MoeGateCase("minus_inf_all_experts", tokens=9, values="inf", renormalize=False),
        MoeGateCase("k1", tokens=9, top_k=1),
        MoeGateCase("k_is_e", tokens=5, experts=3, top_k=3),
        MoeGateCase("one_expert_only", tokens=5, experts=1, top_k=1),
        MoeGateCase("e64_k8", tokens=11, experts=64, top_k=8, padding=5),
        MoeGateCase("e256_k8", tokens=6, experts=256, top_k=8, renormalize=False),
        MoeGateCase("e60_k4_ties", tokens=9, experts=60, top_k=4, values="ties"),
        MoeGateCase("many_tokens", tokens=1030, seed=2),
    ] + [MoeGateCase(f"mixtral-8x7b T={t}", tokens=t, shapes=MOE) for t in (1, 8, 64, 512, 4096, 16384)]


def _sort_cases():
    return [
        MoeSortCase("empty", tokens=0),
        MoeSortCase("plain", tokens=37),
        MoeSortCase("one_expert", tokens=9, routing="one"),
        MoeSortCase("few_experts", tokens=9, routing="few"),
        MoeSortCase("skips", tokens=21, routing="skips"),
        MoeSortCase("skips_i64", tokens=21, routing="skips", ids_dtype=torch.int64),
        MoeSortCase("all_skips", tokens=5, routing="all_skips"),
        MoeSortCase("i64_padded", tokens=6, ids_dtype=torch.int64, padding=3),
        MoeSortCase("k1", tokens=5, top_k=1),
        MoeSortCase("e256_k8", tokens=9, experts=256, top_k=8, routing="skips"),
        MoeSortCase("one_expert_only", tokens=5, experts=1, top_k=1),
        MoeSortCase("many_tokens", tokens=1030, routing="skips"),
    ] + [MoeSortCase(f"mixtral-8x7b T={t}", tokens=t, shapes=MOE) for t in (1, 512, 4096, 16384)]


def _row_cases(kind):
    """moe_permute and moe_combine."""
    return [
        kind("empty", tokens=0),
        kind("one_token", tokens=1),
        kind("plain", tokens=7),
        kind("skips", tokens=9, routing="skips"),
        kind("all_skips", tokens=3, routing="all_skips"),
        kind("k1", tokens=5, top_k=1),
        kind("k8", tokens=3, top_k=8, hidden=72),
        kind("padded", tokens=5, padding=8),
        kind("wide", tokens=2, hidden=2056),
        kind("odd_hidden", tokens=5, hidden=37, cpu_only=True),
        kind("odd_stride", tokens=5, padding=3, cpu_only=True),
        kind("far", tokens=3, top_k=1, far=True),
    ] + [kind(f"{model} T={t}", tokens=t, hidden=SHAPES[model].hidden, shapes=(model,)) for model in MOE for t in (1, 8, 64, 512, 4096)]


def _gemm_cases(kind):
    """grouped_gemm and grouped_gemm_swiglu."""
    large = []
    for model in MOE:
        hidden, intermediate = SHAPES[model].hidden, SHAPES[model].intermediate
        sizes = dict(inner=hidden, outer=intermediate, gather=2) if kind is GroupedGemmSwigluCase else dict(inner=intermediate, outer=hidden)
        large += [kind(f"{model} T={t}", segments=_even(2 * t, 8), **sizes, shapes=(model,)) for t in (1, 8, 64, 512, 4096)]
    return [
        kind("plain"),
        kind("empty", segments=(0, 0, 0)),
        kind("one_row", segments=(0, 1, 0)),
        kind("one_expert", segments=(0, 17, 0)),
        kind("one_expert_only", segments=(9,)),
        kind("tail", segments=(2, 3, 0), tail=4),
        kind("gather", segments=(3, 0, 5, 2), gather=2),
        kind("gather_tail", segments=(3, 0, 5, 2), gather=2, tail=3),
        kind("gather_divisor_1", segments=(4, 1), gather=1),
        kind("padded", segments=(3, 6), padding=8, gather=2),
        kind("row_tile_edges", segments=(129, 15, 16, 17), inner=32, outer=16),
        kind("many_rows", segments=(3, 340), inner=32, outer=16),
        kind("few_rows_at_once", segments=(40, 0, 24, 0), inner=32, outer=16),
        kind("column_tile_edges", segments=(5, 2), inner=32, outer=136),
        kind("long_inner", segments=(3, 2), inner=328, outer=24),
        kind("inner_8", segments=(3, 2), inner=8, outer=8),
        kind("odd_sizes", segments=(3, 5), inner=37, outer=19, cpu_only=True),
        kind("odd_stride", segments=(3, 5), padding=3, gather=2, cpu_only=True),
        kind("far", segments=(1, 0, 2), inner=16, outer=8, far=True),
        kind("far_gather", segments=(2, 0, 4), inner=16, outer=8, gather=2, far=True),
    ] + large


def _even(rows, experts):
    return tuple((rows * (e + 1)) // experts - rows * e // experts for e in range(experts))


def _experts_cases():
    def layer(model, tokens, routing):
        name = f"{model} T={tokens}" + (f" {routing}" if routing != "uniform" else "")
        return MoeExpertsCase(name, tokens=tokens, experts=8, hidden=SHAPES[model].hidden, intermediate=SHAPES[model].intermediate,
                              routing=routing, shapes=(model,))

    return [
        MoeExpertsCase("empty", tokens=0),
        MoeExpertsCase("one_token", tokens=1),
        MoeExpertsCase("plain", tokens=7),
        MoeExpertsCase("maps", tokens=7, maps=True),
        MoeExpertsCase("maps_skips", tokens=7, maps=True, routing="skips"),
        MoeExpertsCase("skips_i64", tokens=7, routing="skips", ids_dtype=torch.int64),
        MoeExpertsCase("all_skips", tokens=3, routing="all_skips"),
        MoeExpertsCase("one_expert", tokens=9, routing="one"),
        MoeExpertsCase("k1", tokens=5, top_k=1),
        MoeExpertsCase("k3_padded", tokens=5, top_k=3, padding=8, routing="skips"),
        MoeExpertsCase("row_tile_edges", tokens=67, experts=2, hidden=32, intermediate=16),
        MoeExpertsCase("many_rows", tokens=170, experts=2, hidden=32, intermediate=16),
        MoeExpertsCase("few_rows_at_once", tokens=32, hidden=32, intermediate=16),
        MoeExpertsCase("no_intermediate", tokens=3, intermediate=0),
        MoeExpertsCase("far", tokens=3, far=True),
        MoeExpertsCase("odd_sizes", tokens=5, hidden=37, intermediate=19, padding=1, cpu_only=True),
    ] + [layer("mixtral-8x7b", t, "uniform") for t in (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096, 16384)] + [
        layer("mixtral-8x7b", t, routing) for routing in ("balanced", "two") for t in (8, 64, 512, 4096)] + [
        layer("mixtral-8x22b", t, "uniform") for t in (1, 8, 64, 512, 4096)]


PACKED = {  # sequences in 16384 tokens
    "mixed": (4096, 1, 317, 2048, 777, 5000, 64, 129, 1500, 2452),
    "one long": (12288, *(128,) * 32),
}


def _sliding_cases():
    case = SlidingWindowAttentionCase

    def prompts(model, name, *lengths):
        shape = SHAPES[model]
        return case(f"{model} {name}", sequences=tuple((n, n) for n in lengths), layout="packed" if len(lengths) > 1 else "single",
                    window=shape.window, heads=shape.heads, key_heads=shape.key_heads, head_dim=shape.head_dim, shapes=(model,))

    return [
        case("plain"),
        case("empty", sequences=()),
        case("no_queries", sequences=((0, 4), (3, 3), (0, 0))),
        case("no_keys", sequences=((3, 0), (2, 2))),
        case("more_queries_than_keys", sequences=((5, 3),)),
        case("bottom_right", sequences=((3, 9), (1, 7)), window=4),
        case("window_1", sequences=((6, 6),), window=1),
        case("window_n_minus_1", sequences=((6, 6),), window=5),
        case("window_n", sequences=((6, 6),), window=6),
        case("window_n_plus_1", sequences=((6, 6),), window=7),
        case("window_huge", sequences=((6, 6),), window=HUGE),
        case("ragged", sequences=((5, 5), (1, 1), (17, 17), (0, 0), (3, 8)), window=4, heads=4, key_heads=2, tail=3),
        case("no_maxima", sequences=((5, 5), (3, 8)), maxima=False),
        case("head_dim_128", sequences=((9, 9),), head_dim=128, window=5),
        case("scale", sequences=((5, 5),), softmax_scale=0.3),
        case("single", sequences=((4, 11),), layout="single", window=6),
        case("single_tile_edges", sequences=((67, 131),), layout="single"),
        case("window_tile_edges", sequences=((131, 131),), layout="single", window=65),
        case("batched", sequences=((5, 7),) * 2, layout="batched", heads=4, key_heads=2),
        case("transposed", sequences=((5, 7),) * 2, layout="transposed", window=3, heads=4, key_heads=2, padding=8),
        case("batched_keys", sequences=((5, 9),) * 4, layout="transposed", keys=((0, 9), (3, 6), (2, 4), (9, 0)), window=3),
        case("batched_start", sequences=((4, 6),) * 3, layout="batched", keys=((0, 6), (2, 4), (6, 0)), only_start=True),
        case("batched_empty", sequences=(), layout="batched"),
        case("gqa_4_of_1", sequences=((9, 9),), heads=4, key_heads=1, window=4, padding=8),
        case("odd_stride", sequences=((5, 5),), padding=3, cpu_only=True),
        case("far", sequences=((2, 2),) * 3, layout="batched", far=True),
    ] + [prompts(model, f"T={n}", n) for model in ("mistral-7b", "mixtral-8x7b") for n in (1024, 2048, 4096, 8192, 16384, 32768, 65536)] + [
        prompts(model, f"packed {name}", *mix) for model in ("mistral-7b", "mixtral-8x7b") for name, mix in PACKED.items()] + [
        prompts("mixtral-8x22b", f"T={n}", n) for n in (4096, 16384)]


BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


def _rolling_cases():
    case = RollingAttentionCase

    def decode(model, name, chunks, length):
        """length: tokens that each sequence has seen. With a window the ring has wrapped, without one it is nearly full."""
        shape = SHAPES[model]
        return case(f"{model} {name}", chunks=chunks, lengths=(length,) * len(chunks), capacity=shape.window or shape.context,
                    window=shape.window, heads=shape.heads, key_heads=shape.key_heads, head_dim=shape.head_dim, rope_theta=shape.theta,
                    shapes=(model,))

    return [
        case("first_token", chunks=(1,), lengths=(0,)),
        case("decode", chunks=(1, 1, 1, 1), lengths=(3, 7, 8, 29)),
        case("decode_window_below_capacity", chunks=(1, 1, 1), lengths=(2, 8, 21), window=5),
        case("window_1", chunks=(1, 3), lengths=(9, 4), window=1),
        case("window_capacity", chunks=(1, 2), lengths=(7, 16), window=8),
        case("prefill", chunks=(5, 8), lengths=(0, 0)),
        case("prefill_past_capacity", chunks=(21,), lengths=(0,), window=6),
        case("chunks", chunks=(3, 9, 0, 1), lengths=(6, 13, 4, 8), window=7, tail=2),
        case("chunk_twice_capacity", chunks=(17,), lengths=(5,)),
        case("causal", chunks=(1, 3, 2), lengths=(7, 0, 6), capacity=10, window=None),
        case("slots", chunks=(1, 2), lengths=(9, 3), slots=5, cache_slots=(4, 1)),
        case("read_only", chunks=(1, 2), lengths=(12, 3), window=6, read_only=True),
        case("read_only_causal", chunks=(1, 2), lengths=(7, 3), capacity=9, window=None, read_only=True),
        case("rope", chunks=(1, 3, 1), lengths=(12, 0, 1), rope_theta=1e4),
        case("rope_interleaved", chunks=(1, 3), lengths=(12, 0), rope_theta=1e6, rope_interleaved=True),
        case("rope_read_only", chunks=(2,), lengths=(12,), window=6, read_only=True, rope_theta=1e4),
        case("head_dim_128_gqa", chunks=(1, 2), lengths=(12, 3), heads=8, key_heads=2, head_dim=128, padding=8),
        case("scale", chunks=(2,), lengths=(5,), softmax_scale=0.2),
        case("empty", chunks=(), lengths=(), slots=1),
        case("long_ring", chunks=(1, 3), lengths=(300, 131), capacity=140, window=135),
        case("odd_stride", chunks=(2, 1), lengths=(5, 9), padding=3, cpu_only=True),
        case("far", chunks=(1, 1, 1), lengths=(3, 1, 11), far=True),
    ] + [decode("mistral-7b", f"B={b}", (1,) * b, 9557) for b in BATCHES] + [
        decode("mixtral-8x7b", f"B={b}", (1,) * b, 32704) for b in BATCHES] + [
        decode("mixtral-8x22b", f"B={b}", (1,) * b, 65472) for b in (1, 16)] + [
        decode("mistral-7b", f"chunk={n}", (n,), 9557) for n in (128, 2048)]


def _rope_cases():
    case = ApplyRopeCase
    return [
        case("plain"),
        case("interleaved", interleaved=True),
        case("empty", tokens=0),
        case("no_k", key_heads=0),
        case("head_dim_128", head_dim=128, heads=4, key_heads=2, theta=1e6, first=1000),
        case("head_dim_128_interleaved", head_dim=128, heads=4, key_heads=2, theta=1e6, first=1000, interleaved=True),
        case("late_positions", first=100000),
        case("i64", positions_dtype=torch.int64, first=77),
        case("padded", padding=8, tokens=3),
        case("odd_stride", padding=3, cpu_only=True),
        case("far", tokens=3, far=True),
    ] + [case(f"mixtral-8x7b T={t}", tokens=t, heads=32, key_heads=8, head_dim=128, theta=1e6, first=5000, shapes=("mixtral-8x7b", "mistral-7b"))
         for t in (1, 64, 4096)]


CASES = {
    "moe_gate": _gate_cases(),
    "moe_sort": _sort_cases(),
    "moe_permute": _row_cases(MoePermuteCase),
    "moe_combine": _row_cases(MoeCombineCase),
    "grouped_gemm": _gemm_cases(GroupedGemmCase),
    "grouped_gemm_swiglu": _gemm_cases(GroupedGemmSwigluCase),
    "moe_experts": _experts_cases(),
    "sliding_window_attention": _sliding_cases(),
    "rolling_attention": _rolling_cases(),
    "apply_rope": _rope_cases(),
}
