"""moe_gate and moe_sort on the virtual GPU: their lists of cases, every branch of their launchers, and what they cost."""
import math

import numpy as np
import pytest
import torch

import c_api
import vgpu
from attention_checks import assert_accurate, numpy, same_bits, widened
from mixtral_bench.cases import CASES, HUGE, MoeGateCase, MoeSortCase
from mixtral_ext import reference

ARCHS = (80, 90)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNTOUCHED = -77


def fields_of(op, inputs):
    """-> the C API's fields and the outputs among them, as torch tensors full of UNTOUCHED, in the reference's order."""
    if op == "moe_gate":
        tokens, experts, top_k = *inputs["router_logits"].shape, inputs["top_k"]
        scalars = dict(top_k=top_k, renormalize=int(inputs["renormalize"]))
        outputs = dict(topk_weights=torch.full((tokens, top_k), float(UNTOUCHED)), topk_ids=torch.full((tokens, top_k), UNTOUCHED).int())
        source = "router_logits"
    else:
        tokens, top_k, experts = *inputs["topk_ids"].shape, inputs["num_experts"]
        scalars, outputs, source = dict(num_experts=experts), {}, "topk_ids"
    outputs |= {name: torch.full(shape, UNTOUCHED).int()
                for name, shape in (("expert_offsets", (experts + 1,)), ("sorted_slots", (tokens * top_k,)), ("slot_rows", (tokens, top_k)))}
    return {source: numpy(inputs[source]), **scalars, **{name: numpy(x) for name, x in outputs.items()}}, outputs


def run(gpu, op, inputs, launches=None):
    fields, outputs = fields_of(op, inputs)
    before = len(gpu.counters)
    gpu.call(op, outputs=tuple(outputs), **fields)
    assert launches is None or len(gpu.counters) - before == launches
    return tuple(outputs.values())


def check(op, inputs, got):
    """Ids and maps are the reference's, weights as near to float64 as the error rule asks."""
    exact, low = (getattr(reference, op)(**x) for x in (widened(inputs), inputs))
    for value, rounded, wide in zip(got, low, exact, strict=True):
        if wide.is_floating_point():
            assert_accurate(value, rounded, wide)
        else:
            assert torch.equal(value, wide)


def launches_of(tokens, top_k, experts):
    return 1 if tokens <= 16384 and top_k <= 2 and experts <= 16 else 2


def cases(op):
    return [case for case in CASES[op] if not case.large]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", cases("moe_gate"), ids=str)
def test_gate_cases(case, arch, dtype):
    inputs, first = case.inputs(DTYPES[dtype]), None
    for seed in range(3):
        got = run(vgpu.Gpu(arch=arch, seed=seed), "moe_gate", inputs, launches_of(case.tokens, case.top_k, case.experts))
        check("moe_gate", inputs, got)
        first = first or got
        assert all(same_bits(torch.nan_to_num(a, nan=-1.0), torch.nan_to_num(b, nan=-1.0)) for a, b in zip(got, first))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", cases("moe_sort"), ids=str)
def test_sort_cases(case, arch):
    inputs = case.inputs(torch.bfloat16)
    for seed in range(3):
        check("moe_sort", inputs, run(vgpu.Gpu(arch=arch, seed=seed), "moe_sort", inputs, launches_of(case.tokens, case.top_k, case.experts)))


# Every branch: one launch with 8 or 16 counters, two with 1, 8 or 32 lanes a token; 16-byte loads or not.
SHAPES = [(70, 8, 2), (70, 8, 1), (70, 7, 2), (70, 4, 2), (70, 1, 1), (70, 16, 2), (70, 12, 1), (70, 9, 2),
          (70, 8, 3), (45, 8, 8), (45, 3, 3), (70, 17, 2), (45, 64, 8), (45, 60, 4), (45, 65, 1), (45, 256, 8), (45, 100, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("offset, padding", ((0, 0), (1, 0), (0, 16), (0, 3), (8, 16)))
def test_gate_layouts(dtype, renormalize, offset, padding):
    """offset: elements from a 16-byte boundary to the first logit; padding: between rows. What is around is NaN."""
    for tokens, experts, top_k in SHAPES:
        storage = torch.full((tokens * (experts + padding) + offset,), math.nan, dtype=DTYPES[dtype])
        logits = storage[offset:].view(tokens, experts + padding)[:, :experts]
        logits.copy_(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(experts)))
        inputs = dict(router_logits=logits, top_k=top_k, renormalize=renormalize)
        check("moe_gate", inputs, run(vgpu.Gpu(), "moe_gate", inputs, launches_of(tokens, top_k, experts)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("renormalize", (True, False))
def test_gate_special_values(arch, renormalize, dtype):
    """Rows of NaN of both signs, infinities, zeros of both signs, the largest and smallest numbers, and ties among them."""
    bits, integer = {"float32": ((0xff800001, 0x7fc00000, 0x7fffffff, 0xffffffff, 1, 0x80000001, 0x7f7fffff, 0xff7fffff), np.uint32),
                     "bfloat16": ((0xff81, 0x7fc0, 0x7fff, 0xffff, 1, 0x8001, 0x7f7f, 0xff7f), np.uint16),
                     "float16": ((0xfc01, 0x7e00, 0x7fff, 0xffff, 1, 0x8001, 0x7bff, 0xfbff), np.uint16)}[dtype]
    torch_integer = {np.uint32: torch.int32, np.uint16: torch.int16}[integer]
    special = torch.from_numpy(np.array(bits, integer).view(np.dtype(integer).name[1:])).to(torch_integer).view(DTYPES[dtype])
    values = torch.cat([special, torch.tensor([math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 2**-14, -2**-14]).to(DTYPES[dtype])])
    generator = torch.Generator().manual_seed(5)
    for experts, top_k in ((8, 2), (16, 2), (8, 8), (64, 8), (200, 8)):
        for low in (0, 4, 8, 9):  # with NaN; without; no more than the infinities; -inf at most
            logits = values[torch.randint(low, 16, (90, experts), generator=generator)]
            inputs = dict(router_logits=logits, top_k=top_k, renormalize=renormalize)
            got = run(vgpu.Gpu(arch=arch), "moe_gate", inputs)
            exact = reference.moe_gate(**widened(inputs))
            for value, wide in zip(got[1:], exact[1:]):
                assert torch.equal(value, wide)
            weights, wide = got[0], exact[0]
            assert torch.equal(weights.isnan(), wide.isnan())
            torch.testing.assert_close(weights.double(), wide, rtol=2e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens, experts, top_k", ((4096, 8, 2), (16384, 8, 2), (16384, 16, 1), (16385, 8, 2), (16385, 5, 1), (20000, 16, 2),
                                                    (4500, 64, 6), (4200, 256, 8)))
def test_many_tokens(arch, tokens, experts, top_k):
    inputs = MoeGateCase("", tokens=tokens, experts=experts, top_k=top_k, seed=tokens).inputs(torch.bfloat16)
    got = run(vgpu.Gpu(arch=arch), "moe_gate", inputs, launches_of(tokens, top_k, experts))
    check("moe_gate", inputs, got)
    ids = dict(topk_ids=got[1], num_experts=experts)
    for value, same in zip(run(vgpu.Gpu(arch=arch, seed=1), "moe_sort", ids, launches_of(tokens, top_k, experts)), got[2:], strict=True):
        assert torch.equal(value, same)


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("tokens, experts, top_k", ((0, 8, 2), (0, 200, 3), (1, 8, 2), (33, 8, 2), (3000, 2, 2), (2050, 16, 2), (500, 2, 8),
                                                    (77, 1, 8), (1500, 256, 8), (16384, 1, 2), (16384, 16, 2), (17000, 3, 1)))
def test_sort_repeated_ids_and_skips(tokens, experts, top_k, dtype):
    """Ids of a token may repeat, and K may exceed E. The rows lie apart, with valid ids between them."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts + 1, (tokens, top_k + 3), generator=generator).to(dtype)
    inputs = dict(topk_ids=ids[:, :top_k], num_experts=experts)
    check("moe_sort", inputs, run(vgpu.Gpu(seed=tokens % 3), "moe_sort", inputs, launches_of(tokens, top_k, experts)))


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_sort_long_runs(seed):
    """160 tokens a chunk, 1280 slots: a warp's run is 64 of them, taken 32 at a time."""
    ids = torch.randint(-1, 4, (16500, 8), generator=torch.Generator().manual_seed(seed)).int()
    inputs = dict(topk_ids=ids, num_experts=3)
    check("moe_sort", inputs, run(vgpu.Gpu(seed=seed), "moe_sort", inputs, 2))


@pytest.mark.parametrize("skip", (-1, 8, HUGE, -HUGE - 1))
@pytest.mark.parametrize("top_k", (2, 3))
def test_sort_one_expert_or_none(skip, top_k):
    """All of 16384 tokens' ids on one expert fill its counters; skips alone leave every row unused."""
    for expert in (0, 7, skip):
        inputs = dict(topk_ids=torch.full((16384, top_k), expert).int(), num_experts=8)
        check("moe_sort", inputs, run(vgpu.Gpu(), "moe_sort", inputs))


def test_rows_far_apart():
    """The third row lies beyond 2^31 elements."""
    far = 2**30 + 8
    for top_k, experts in ((2, 8), (4, 64)):
        logits = torch.empty(2 * far + experts, dtype=torch.bfloat16).as_strided((3, experts), (far, 1))
        logits.copy_(torch.randn(3, experts))
        inputs = dict(router_logits=logits, top_k=top_k, renormalize=True)
        got = run(vgpu.Gpu(), "moe_gate", inputs)
        check("moe_gate", inputs, got)
        ids = torch.empty(2 * far + top_k, dtype=torch.int32).as_strided((3, top_k), (far, 1)).copy_(got[1])
        inputs = dict(topk_ids=ids, num_experts=experts)
        check("moe_sort", inputs, run(vgpu.Gpu(), "moe_sort", inputs))


# ------------------------------------------------------------------------------------------ the division of tokens

def array(dtype, *shape):
    """A described contiguous array; only its description is looked at."""
    strides = [math.prod(shape[i + 1:]) for i in range(len(shape))]
    return c_api.Tensor(2**20, dtype, len(shape), (*shape, *[0] * (4 - len(shape))), (*strides, *[0] * (4 - len(shape))))


def described(op, tokens, experts, top_k):
    maps = dict(expert_offsets=array(c_api.I32, experts + 1), sorted_slots=array(c_api.I32, tokens * top_k),
                slot_rows=array(c_api.I32, tokens, top_k))
    if op == "moe_sort":
        return dict(topk_ids=array(c_api.I32, tokens, top_k), num_experts=experts, **maps)
    return dict(router_logits=array(c_api.BF16, tokens, experts), top_k=top_k, renormalize=1, **maps,
                topk_weights=array(c_api.F32, tokens, top_k), topk_ids=array(c_api.I32, tokens, top_k))


@pytest.mark.parametrize("op", ("moe_gate", "moe_sort"))
@pytest.mark.parametrize("tokens, experts, top_k, chunks", (
    (0, 8, 2, 0), (16384, 16, 2, 0), (16384, 17, 2, 128), (16384, 16, 3, 128), (16385, 16, 2, 103), (0, 17, 2, 1), (1, 17, 2, 1), (32, 17, 2, 1),
    (33, 17, 2, 2), (4096, 256, 8, 128), (4097, 256, 8, 65), (2**17, 8, 2, 128), (2**28 - 1, 256, 8, 128), (2**31 - 1, 8, 1, 128)))
def test_workspace(op, tokens, experts, top_k, chunks):
    """A histogram a chunk, however many tokens there are; nothing for one launch or what is not acceptable."""
    vgpu.Gpu().start()
    lib = vgpu.library()
    context, fields = lib.context(device="cuda"), described(op, tokens, experts, top_k)
    assert lib.workspace_size(op, context, **fields) == (chunks * experts * 4 + 63 if chunks else 0)
    assert lib.supports(op, context, **fields) == lib.supports(op, context) == c_api.OK
    assert lib.workspace_size(op, context, **fields | dict(slot_rows=array(c_api.F32, tokens, top_k))) == 0


@pytest.mark.parametrize("tokens, blocks, warps", ((0, 1, 1), (1, 1, 1), (32, 1, 1), (33, 2, 2), (1000, 32, 32), (2048, 64, 32), (2049, 33, 32),
                                                   (4096, 64, 32), (9000, 57, 32), (16384, 64, 32)))
def test_blocks_of_one_launch(tokens, blocks, warps):
    gpu = vgpu.Gpu()
    inputs = dict(topk_ids=torch.zeros(tokens, 2).int(), num_experts=8)
    check("moe_sort", inputs, run(gpu, "moe_sort", inputs, 1))
    assert gpu.counters[-1]["barriers"] == blocks * warps  # each warp arrives once


# ------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("op, change, match", (
    ("moe_gate", dict(top_k=9), "top_k: expected 1 to 8, got 9"),
    ("moe_gate", dict(top_k=0), "top_k: expected 1 to 8, got 0"),
    ("moe_gate", dict(router_logits=array(c_api.BF16, 4, 257)), "experts\\): expected 1 to 256, got 257"),
    ("moe_gate", dict(router_logits=array(c_api.I32, 4, 64)), "router_logits: expected dtype float32, bfloat16 or float16, got int32"),
    ("moe_gate", dict(topk_ids=array(c_api.I64, 4, 3)), "topk_ids: expected dtype int32, got int64"),
    ("moe_gate", dict(topk_weights=array(c_api.F32, 4, 2)), r"topk_weights: expected shape \[4, 3\], got \[4, 2\]"),
    ("moe_sort", dict(num_experts=0), "num_experts: expected 1 to 256, got 0"),
    ("moe_sort", dict(topk_ids=array(c_api.F32, 4, 3)), "topk_ids: expected dtype int32 or int64, got float32"),
    ("moe_sort", dict(sorted_slots=array(c_api.I32, 11)), r"sorted_slots: expected shape \[12\], got \[11\]"),
    ("moe_sort", dict(reserved=1), "reserved: expected 0, got 1")))
def test_bad_arguments(op, change, match):
    gpu = vgpu.Gpu()
    gpu.start()
    context = gpu.lib.context(device="cuda")
    with pytest.raises(c_api.MixtralError, match=match) as error:
        gpu.lib.call(op, context, workspace=np.zeros(0, np.uint8), **{**described(op, 4, 64, 3), **change})
    gpu.finish()
    assert error.value.status == c_api.INVALID_ARGUMENT and not gpu.counters


@pytest.mark.parametrize("op", ("moe_gate", "moe_sort"))
def test_workspace_is_asked_for_and_may_lie_anywhere(op):
    case = MoeGateCase("", tokens=40, experts=20, top_k=3) if op == "moe_gate" else MoeSortCase("", tokens=40, experts=20, top_k=3)
    inputs = case.inputs(torch.float32)
    gpu = vgpu.Gpu()
    for offset in (1, 64, 0):
        gpu.start()
        fields, outputs = fields_of(op, inputs)
        context = gpu.lib.context(device="cuda")
        size = gpu.lib.workspace_size(op, context, **fields)
        assert size == 2 * 20 * 4 + 63
        with pytest.raises(c_api.MixtralError, match=f"workspace: expected {size} bytes, got {size - 1}") as error:
            gpu.lib.call(op, context, workspace=np.zeros(size - 1, np.uint8), **fields)
        assert error.value.status == c_api.WORKSPACE
        assert all((value == UNTOUCHED).all() for value in outputs.values())
        workspace = np.full(size + offset, 0xFF, np.uint8)[offset:]
        arrays = [(name, x, name in outputs, name not in outputs) for name, x in fields.items() if isinstance(x, np.ndarray)]
        with gpu.mapped([*arrays, ("workspace", workspace, True, False)]):
            gpu.lib.call(op, context, workspace=workspace, **fields)
            gpu.finish()
        check(op, inputs, tuple(outputs.values()))


# ----------------------------------------------------------------------------------------------------------- costs

def cost(op, case, arch, dtype=torch.bfloat16):
    gpu = vgpu.Gpu(arch=arch)
    run(gpu, op, case.inputs(dtype))
    return gpu.counters


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tokens, blocks, warps", ((1, 1, 1), (64, 2, 2), (4096, 64, 32)))
def test_cost_of_one_launch(arch, tokens, blocks, warps):
    """Every block reads all logits by 16-byte loads, and its own tokens' again; one barrier; no bank conflict."""
    c, = cost("moe_gate", MoeGateCase("", tokens=tokens), arch)
    slots, logits = 2 * tokens, tokens * 8 * 2
    assert c["global_load_bytes"] == (blocks + 1) * logits
    assert c["global_load_sectors"] == (blocks + 1) * -(-logits // 32)
    assert c["global_store_bytes"] == slots * (4 + 4 + 4 + 4) + 9 * 4  # weights, ids, both maps, offsets
    assert c["barriers"] == blocks * warps and c["shared_conflicts"] == 0

    c, = cost("moe_sort", MoeSortCase("", tokens=tokens), arch)
    assert c["global_load_bytes"] == (blocks + 1) * slots * 4 and c["global_store_bytes"] == slots * (4 + 4) + 9 * 4
    assert c["barriers"] == blocks * warps and c["shared_conflicts"] == 0


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("experts, top_k", ((64, 4), (256, 8)))
def test_cost_of_two_launches(arch, experts, top_k):
    """The logits are read once, the ids twice; a block reads the histograms of all chunks."""
    tokens, chunks = 256, 8
    slots = tokens * top_k
    choose, place = cost("moe_gate", MoeGateCase("", tokens=tokens, experts=experts, top_k=top_k), arch)
    assert choose["global_load_bytes"] == tokens * experts * 2 and choose["global_load_sectors"] == tokens * experts * 2 // 32
    assert choose["global_store_bytes"] == slots * (4 + 4) + chunks * experts * 4
    assert place["global_load_bytes"] == 2 * slots * 4 + chunks * chunks * experts * 4
    assert place["global_store_bytes"] == slots * (4 + 4) + (experts + 1) * 4
    assert choose["barriers"] == 2 * 16 * chunks and place["shared_bytes"] == (32 * 256 + 2 * 256 + 1) * 4

    count, again = cost("moe_sort", MoeSortCase("", tokens=tokens, experts=experts, top_k=top_k), arch)
    assert count["global_load_bytes"] == slots * 4 and count["global_store_bytes"] == chunks * experts * 4
    assert again["global_load_bytes"] == place["global_load_bytes"] and again["global_store_bytes"] == place["global_store_bytes"]


def test_resources():
    """As the heads of the files say."""
    kernels = {"route_kernelILi8": 48, "route_kernelILi16": 59, "chunk_kernel": 96, "count_kernel": 26, "place_kernel": 42}  # most registers
    found = [(name, r) for ptx in vgpu.Gpu().library_ptx() for name, r in vgpu.resources(ptx).items() if any(k in name for k in kernels)]
    assert len(found) == 2 * ((6 * 2 + 9 * 2 + 1) + (4 + 2 + 2))  # two architectures
    for name, r in found:
        assert r["spills"] == 0 and r["registers"] <= next(most for k, most in kernels.items() if k in name), (name, r)
