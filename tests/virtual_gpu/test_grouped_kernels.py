"""grouped_gemm, grouped_gemm_swiglu and moe_experts on the virtual GPU beyond their lists of cases (test_ops.py): every kernel that the
launchers choose among, the edges of their tiles, what they cost, bad values on the device, refusals."""
import ctypes
import math
import re

import numpy as np
import pytest
import torch

import c_api
import vgpu
from attention_checks import assert_accurate, numpy, same_bits, widened
from mixtral_bench.cases import HUGE, GroupedGemmCase, GroupedGemmSwigluCase, MoeExpertsCase
from mixtral_ext import reference
from test_ops import DTYPES, UNTOUCHED, run

CASE = {"grouped_gemm": GroupedGemmCase, "grouped_gemm_swiglu": GroupedGemmSwigluCase}
WEIGHTS = {"grouped_gemm": "b", "grouped_gemm_swiglu": "w_gate_up"}
PRODUCTS = pytest.mark.parametrize("op", CASE)
ARCHS = pytest.mark.parametrize("arch", (80, 90))
SM_COUNT = 4  # of a vgpu.Gpu
FEW, TILES = "few_rows", "tiles"
WEIGHT_ROWS = {(FEW, 8): 64, (FEW, 16): 64, (FEW, 32): 64, (FEW, 64): 64, (TILES, 64): 128, (TILES, 128): 256}  # of a tile
# As the heads of the files say: shared memory of a block; accumulators and fragments.
SHARED_KB = {(FEW, 8): 91, (FEW, 16): 92, (FEW, 32): 88, (FEW, 64): 88, (TILES, 64): 96, (TILES, 128): 96}
HELD = {(TILES, 64): 64 + 2 * 24, (TILES, 128): 128 + 2 * 32}


def inputs_of(op, segments, inner=72, outer=40, dtype=torch.bfloat16, **more):
    return CASE[op]("", segments=tuple(segments), inner=inner, outer=outer, **more).inputs(dtype)


def fields_of(inputs):
    return {name: numpy(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def ceil_div(a, b):
    return -(-a // b)


def kernel_of(name):
    """((kind, rows of a tile), dtype, SwiGLU) from the template arguments in a kernel's name; None if it is no grouped product's."""
    match = re.search(r"grouped_gemm_(few_rows|tiles)_kernelI(13__nv_bfloat16|6__half)Lb([01])E.*4TileILi(\d+)E", name)
    return match and ((match[1], int(match[4])), torch.bfloat16 if "bfloat16" in match[2] else torch.float16, match[3] == "1")


def columns_of(kernel, op):
    """Columns of the result that a tile has."""
    return WEIGHT_ROWS[kernel] // (2 if op == "grouped_gemm_swiglu" else 1)


def check(gpu, op, inputs, kernel):
    """Runs a grouped product: `kernel` did it, as near to float64 as the error rule asks, and left the rows past the last offset alone."""
    out, = run(gpu, op, inputs)
    assert kernel_of(gpu.counters[-1]["kernel"]) == (kernel, out.dtype, op == "grouped_gemm_swiglu")
    used, formula = int(inputs["expert_offsets"][-1]), getattr(reference, op)
    assert (out[used:] == UNTOUCHED).all()
    # Without the NaN between rows, which torch's own bf16 product may read.
    close = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert_accurate(out[:used], formula(**close)[:used], formula(**widened(close))[:used])
    return out


# --------------------------------------------------------------------------------------------------------- every kernel

# (kind, rows of a tile), rows of each expert, tokens gathered twice or not. One expert has more rows than a tile.
KERNELS = pytest.mark.parametrize("kernel, segments, gather", [
    ((FEW, 8), (0, 11, 0, 3, 0), 2), ((FEW, 16), (19, 0, 9), 2), ((FEW, 32), (0, 1, 39, 20), 2), ((FEW, 64), (70, 0, 57, 1, *[0] * 5), 2),
    ((TILES, 64), (0, 65, 3, 0, 64, 0), 0), ((TILES, 128), (130, 260), 2)], ids=str)


@pytest.mark.parametrize("dtype", DTYPES)
@ARCHS
@PRODUCTS
@KERNELS
def test_kernels(kernel, segments, gather, op, arch, dtype):
    """Columns and k end within a tile, rows of all arrays lie apart with NaN between. The same bits under every schedule."""
    inputs = inputs_of(op, segments, 136, columns_of(kernel, op) + 11, DTYPES[dtype], gather=gather, tail=2, padding=8)
    first = check(vgpu.Gpu(arch), op, inputs, kernel)
    for seed in (1, 2):
        assert same_bits(*run(vgpu.Gpu(arch, seed, random_completion=seed == 2), op, inputs), first)


@PRODUCTS
@KERNELS
def test_schedules(kernel, segments, gather, op):
    """More of k than the stages hold, and several units a block: copies run on from one to the next."""
    inputs = inputs_of(op, segments, 712, 72 if kernel[0] == FEW else 40, gather=gather)
    first = check(vgpu.Gpu(sm_count=2), op, inputs, kernel)
    for seed in (1, 2):
        assert same_bits(*run(vgpu.Gpu(seed=seed, random_completion=seed == 1, sm_count=1), op, inputs), first)


@PRODUCTS
@KERNELS
@pytest.mark.parametrize("arch, inner, outer, beyond", [(80, 0, 8, 0), (90, 8, 1, 0), (80, 16, 9, 0), (90, 56, 0, -1), (80, 64, 0, 0),
                                                       (90, 72, 0, 7)])
def test_depths_and_columns(arch, inner, outer, beyond, kernel, segments, gather, op):
    """k may be any multiple of 8, also 0: the result is zero then. The last columns: `outer`, or so many beyond a tile."""
    out = check(vgpu.Gpu(arch), op, inputs_of(op, segments, inner, outer or columns_of(kernel, op) + beyond, gather=gather), kernel)
    assert inner or (out[:sum(segments)] == 0).all()


@PRODUCTS
def test_nothing_to_do_is_no_launch(op):
    gpu = vgpu.Gpu()
    for segments, outer in ((3, 90), 0), ((0, 0), 8):
        run(gpu, op, inputs_of(op, segments, outer=outer))
    assert not gpu.counters


SPARSE = [  # experts without rows at both ends and between; of 256 a lane looks at 8, of 33 at two or none
    ((FEW, 16), [*[0] * 200, 9, *[0] * 30, 2, *[0] * 24]), ((FEW, 64), [3, *[0] * 254, 60]), ((FEW, 32), [*[0] * 32, 17]),
    ((FEW, 8), [2, *[0] * 15, 1, *[0] * 15, 4]), ((FEW, 64), [1] * 33), ((TILES, 64), [0, *[20] * 31, 0]), ((FEW, 64), [0, 0, 70, *[0] * 29, 9]),
    ((TILES, 64), [*[0] * 100, 4100, *[0] * 155]), ((FEW, 64), [n % 7 for n in range(256)])]


@PRODUCTS
@pytest.mark.parametrize("kernel, segments", SPARSE, ids=range(len(SPARSE)))
def test_many_experts(kernel, segments, op):
    check(vgpu.Gpu(), op, inputs_of(op, segments, 8, 8), kernel)


@PRODUCTS
@pytest.mark.parametrize("kernel, segments", [((TILES, 64), (0, 0, 1100, 0, 0, 3, 0, 0)), ((TILES, 128), (17 * 128 + 5,))], ids=str)
def test_order_of_tiles(kernel, segments, op):
    """18 tiles of rows on an expert: 16 make a pass over the two tiles of columns together, then the other two."""
    check(vgpu.Gpu(), op, inputs_of(op, segments, 64, columns_of(kernel, op) + 8), kernel)


@PRODUCTS
@pytest.mark.parametrize("kernel, rows", [((FEW, 32), 20), ((TILES, 64), 70), ((TILES, 128), 900)], ids=str)
def test_weights_lie_apart(kernel, rows, op):
    """NaN between experts and between their rows, and in experts without rows."""
    inputs = inputs_of(op, (0, rows - 9, 0, 9), tail=3)
    weights = inputs[WEIGHTS[op]]
    whole = torch.full((4, weights.shape[1] + 5, weights.shape[2] + 8), math.nan, dtype=weights.dtype)
    inputs[WEIGHTS[op]] = whole[:, :weights.shape[1], :weights.shape[2]].copy_(weights)
    whole[[0, 2]] = math.nan
    check(vgpu.Gpu(), op, inputs, kernel)


@PRODUCTS
@pytest.mark.parametrize("kernel, rows", [((FEW, 8), 5), ((TILES, 64), 65), ((TILES, 128), 193)], ids=str)
def test_rows_far_apart(kernel, rows, op):
    """The last rows of a and of the result lie beyond 2^31 elements."""
    inputs = inputs_of(op, (rows,), 16, 8)
    out = torch.full((rows, 8), UNTOUCHED, dtype=torch.bfloat16)
    inputs["a"], out = far(inputs["a"]), far(out)
    gpu = vgpu.Gpu()
    gpu.call(op, outputs=("out",), **fields_of(inputs), out=numpy(out))
    assert kernel_of(gpu.counters[-1]["kernel"])[0] == kernel
    assert_accurate(out, getattr(reference, op)(**inputs), getattr(reference, op)(**widened(inputs)))


def far(t):
    """Its rows so far apart that the last one begins beyond 2^31 elements (address space, not memory)."""
    stride = ceil_div(2**31, (len(t) - 1) * 8) * 8
    return torch.empty((len(t) - 1) * stride + t.shape[1], dtype=t.dtype).as_strided(t.shape, (stride, 1)).copy_(t)


@pytest.mark.parametrize("tokens, experts, kernel", [(3, 4, (FEW, 8)), (40, 2, (TILES, 64)), (200, 2, (TILES, 128))], ids=str)
def test_tokens_far_apart(tokens, experts, kernel):
    inputs = MoeExpertsCase("", tokens=tokens, experts=experts, hidden=16, intermediate=8).inputs(torch.bfloat16)
    inputs["hidden"], out = far(inputs["hidden"]), far(inputs["hidden"])
    gpu = vgpu.Gpu()
    gpu.call("moe_experts", outputs=("out",), **fields_of(inputs), out=numpy(out))
    assert [kernel_of(c["kernel"])[0] for c in gpu.counters[1:3]] == 2 * [kernel]
    assert_accurate(out, reference.moe_experts(**inputs), reference.moe_experts(**widened(inputs)))


# ------------------------------------------------------------------------------------------- the choice among the kernels

TABLE = [  # rows, experts, divisor -> kernel: both sides of every threshold of grouped_gemm_config
    (1, 8, 1, (FEW, 8)), (8, 8, 1, (FEW, 8)), (9, 8, 1, (FEW, 16)), (16, 8, 1, (FEW, 16)), (17, 8, 1, (FEW, 32)), (32, 8, 1, (FEW, 32)),
    (33, 8, 1, (FEW, 64)), (16, 8, 2, (FEW, 8)), (17, 8, 2, (FEW, 16)), (64, 8, 8, (FEW, 8)), (64, 1, 1, (FEW, 64)), (65, 1, 1, (TILES, 64)),
    (64, 4, 1, (FEW, 64)), (65, 4, 1, (TILES, 64)), (80, 5, 1, (FEW, 64)), (81, 5, 1, (TILES, 64)), (128, 8, 8, (FEW, 16)),
    (129, 8, 8, (TILES, 64)), (160, 1, 1, (TILES, 64)), (161, 1, 1, (TILES, 128)), (640, 4, 1, (TILES, 64)),
    (641, 4, 1, (TILES, 128)), (641, 4, 2, (TILES, 128))]


def blocks_of(kernel, rows, experts, columns, tile_columns):
    """Blocks of the grid: all tiles that there can be, for few rows at most one or two a multiprocessor."""
    tiles = (rows + min(rows, experts) * (kernel[1] - 1)) // kernel[1] * ceil_div(columns, tile_columns)
    return tiles if kernel[0] == TILES else min(tiles, SM_COUNT * (1 if kernel[1] == 8 else 2))


@PRODUCTS
@pytest.mark.parametrize("rows, experts, divisor, kernel", TABLE, ids=str)
def test_which_kernel(rows, experts, divisor, kernel, op):
    gpu, columns = vgpu.Gpu(), columns_of(kernel, op) + 8
    segments = [rows * (e + 1) // experts - rows * e // experts for e in range(experts)]
    check(gpu, op, inputs_of(op, segments, 8, columns, gather=divisor if divisor > 1 else 0), kernel)
    c, = gpu.counters
    assert c["blocks"] == blocks_of(kernel, rows, experts, columns, columns_of(kernel, op))
    assert c["dynamic_shared_bytes"] == SHARED_KB[kernel] * 1024 <= 99 * 1024


@pytest.mark.parametrize("tokens, experts, top_k, kernel", [
    (8, 8, 2, (FEW, 8)), (9, 8, 2, (FEW, 16)), (17, 8, 2, (FEW, 32)), (32, 4, 2, (FEW, 32)), (33, 4, 2, (TILES, 64)), (64, 8, 2, (FEW, 64)),
    (65, 8, 2, (TILES, 64)), (8, 64, 8, (FEW, 8)), (160, 2, 2, (TILES, 64)), (161, 2, 2, (TILES, 128))], ids=str)
def test_which_kernel_of_the_expert_layer(tokens, experts, top_k, kernel):
    """A token goes to an expert once, so T rows are the most that one is expected to have. Both products get the same kernel."""
    gpu = vgpu.Gpu()
    inputs = MoeExpertsCase("", tokens=tokens, experts=experts, top_k=top_k, hidden=16, intermediate=8).inputs(torch.float16)
    out, = run(gpu, "moe_experts", inputs)
    assert_accurate(out, reference.moe_experts(**inputs), reference.moe_experts(**widened(inputs)))
    assert [kernel_of(c["kernel"]) for c in gpu.counters[-3:-1]] == [(kernel, torch.float16, True), (kernel, torch.float16, False)]


def test_resources():
    """Nothing spills, so accumulators and fragments are in registers; 128 threads with 255 of them fit an SM twice."""
    found = {}
    for ptx in vgpu.Gpu.library_ptx():
        for name, r in vgpu.resources(ptx).items() if "grouped_gemm" in ptx else ():
            if kernel := kernel_of(name):
                found.setdefault(kernel, []).append(r)
    assert len(found) == 6 * 2 * 2
    for (kernel, *_), of_archs in found.items():
        assert len(of_archs) == 2
        for r in of_archs:
            assert r["spills"] == r["shared_bytes"] == 0 and HELD.get(kernel, 0) < r["registers"] <= 255, (kernel, r)


# --------------------------------------------------------------------------------------------------------------- costs

def text_of(where):
    """The lines of source that "file.cu:1 < file.cu:2" names."""
    files = {path.name: path for path in vgpu.CSRC.glob("cuda/**/*") if path.is_file()}
    return [files[name].read_text().splitlines()[int(line) - 1] for name, line in re.findall(r"([\w.]+):(\d+)", where)]


def assert_cost(c, kernel, swiglu, segments, n, k):
    """Of one product. Weights once for every tile of rows, rows of A once for every tile of columns, nothing else."""
    column_tiles, rows, steps = ceil_div(n, WEIGHT_ROWS[kernel] // (1 + swiglu)), sum(segments), ceil_div(k, 64)
    row_tiles = sum(ceil_div(r, kernel[1]) for r in segments)
    granule = 8 if kernel[0] == FEW else 64  # rows that the tensor cores take at once
    assert c["async_load_bytes"] == 2 * k * (row_tiles * n * (1 + swiglu) + column_tiles * rows)
    assert c["matrix_flops"] == 2 * sum(ceil_div(r, granule) * granule for r in segments) * column_tiles * WEIGHT_ROWS[kernel] * steps * 64
    assert c["global_store_bytes"] == rows * n * 2
    # One a step for every warp; of a tile three more around its result and before its first step, of a unit of few rows one more.
    assert c["barriers"] == row_tiles * column_tiles * (8 if kernel == (TILES, 128) else 4) * (steps + (1 if kernel[0] == FEW else 3))
    # Bank conflicts are of the result's staging alone, in 2-byte stores of few rows.
    assert c["shared_conflicts"] == sum(c["conflicts_by_line"].values())
    assert kernel[0] == FEW or not c["conflicts_by_line"], c["conflicts_by_line"]
    assert all(any("from_float(" in line for line in text_of(where)) for where in c["conflicts_by_line"]), c["conflicts_by_line"]


@ARCHS
@PRODUCTS
@KERNELS
def test_cost(kernel, segments, gather, op, arch):
    """Experts without rows, rows and columns that do not exist and k beyond the end cost no byte."""
    gpu, n, k = vgpu.Gpu(arch), columns_of(kernel, op) + 24, 328
    run(gpu, op, inputs_of(op, segments, k, n, gather=gather))
    assert_cost(gpu.counters[-1], kernel, op == "grouped_gemm_swiglu", segments, n, k)


@ARCHS
@PRODUCTS
@pytest.mark.parametrize("kernel, segments", [((FEW, 8), (0, 8)), ((FEW, 16), (16, 0)), ((FEW, 32), (32,)), ((FEW, 64), (64,)),
                                              ((TILES, 64), (64, 128)), ((TILES, 128), (512, 0))], ids=str)
def test_accesses_are_of_16_bytes(kernel, segments, op, arch):
    """Whole tiles: every lane of a copy brings 16 bytes, every lane of a store takes 16, and a warp's stores are whole sectors."""
    gpu, n, k = vgpu.Gpu(arch), 2 * columns_of(kernel, op), 192
    run(gpu, op, inputs_of(op, segments, k, n))
    c = gpu.counters[-1]
    assert_cost(c, kernel, op == "grouped_gemm_swiglu", segments, n, k)
    copies = sum(count for where, count in c["executed_by_line"].items() if any("cp_async_16(" in line for line in text_of(where)))
    useful = 2 * k * n * (1 + (op == "grouped_gemm_swiglu"))
    assert c["async_load_bytes"] == copies * 32 * 16 and c["matrix_flops"] == useful * sum(segments)
    assert c["thread_instructions"]["store_global"] * 16 == c["global_store_bytes"] == c["global_store_sectors"] * 32


def natural_routing(tokens, experts, seed):
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).topk(2, dim=1).indices.int()


@pytest.mark.parametrize("seed, hidden, intermediate", ((0, 256, 128), (1, 64, 64)))
def test_few_flops_are_wasted(seed, hidden, intermediate):
    """4096 tokens, 8 experts, the two largest of random logits: at most 7 % of the rows multiplied do not exist."""
    gpu, inputs = vgpu.Gpu(), MoeExpertsCase("", tokens=4096, experts=8, hidden=hidden, intermediate=intermediate).inputs(torch.bfloat16)
    inputs["topk_ids"] = natural_routing(4096, 8, seed)
    out, = run(gpu, "moe_experts", inputs)
    assert_accurate(out, reference.moe_experts(**inputs), reference.moe_experts(**widened(inputs)))
    segments = torch.bincount(inputs["topk_ids"].flatten(), minlength=8).tolist()
    _, up, down, _ = gpu.counters
    for c, swiglu, n, k in (up, True, intermediate, hidden), (down, False, hidden, intermediate):
        assert_cost(c, (TILES, 128), swiglu, segments, n, k)
        columns = ceil_div(n * (1 + swiglu), 256) * 256  # with 256 and 128 all are useful
        assert 2 * 8192 * columns * k <= c["matrix_flops"] <= 1.07 * 2 * 8192 * columns * k


def test_few_rows_are_wasted_whatever_the_logits():
    """The same, by the formula of assert_cost, for more routings than can be run here."""
    for seed in range(200):
        rows = torch.bincount(natural_routing(4096, 8, seed).flatten(), minlength=8)
        assert ((rows + 63) // 64 * 64).sum() <= 1.07 * 8192


@pytest.mark.parametrize("tokens, experts, top_k, launches", ((16, 16, 2, 4), (16, 17, 2, 5), (16, 8, 3, 5), (16384, 8, 1, 4), (16385, 8, 1, 5)))
def test_launches(tokens, experts, top_k, launches):
    """3 with maps, else one or two more for the sort; which, and how many blocks, whatever the routing."""
    shapes = []
    for routing in ("uniform", "one", "skips", "all_skips") if tokens < 100 else ("all_skips",):
        for maps in (False, True) if tokens < 100 else (False,):
            sizes = dict(tokens=tokens, experts=experts, top_k=top_k, hidden=8, intermediate=8)
            gpu = vgpu.Gpu()
            run(gpu, "moe_experts", MoeExpertsCase("", **sizes, routing=routing, maps=maps).inputs(torch.bfloat16))
            assert len(gpu.counters) == (3 if maps else launches)
            shapes.append([(c["kernel"], c["blocks"], c["dynamic_shared_bytes"]) for c in gpu.counters[-3:]])
    assert all(shape == shapes[0] for shape in shapes)


# ---------------------------------------------------------------------------------------------------------------- bits

PARTS = [(0, 1), (5, 7), (100, 12), (200, 20), (300, 64), (1000, 100), (1500, 200)]  # first row, rows


@pytest.mark.parametrize("arch, dtype", ((80, "float16"), (90, "bfloat16")))
@PRODUCTS
def test_a_row_does_not_depend_on_its_company(op, arch, dtype):
    gpu, inputs = vgpu.Gpu(arch), inputs_of(op, (3000,), dtype=DTYPES[dtype])
    whole, = run(gpu, op, inputs)
    for first, rows in PARTS:
        part = inputs | dict(a=inputs["a"][first:first + rows], expert_offsets=torch.tensor([0, rows]).int())
        assert same_bits(*run(gpu, op, part), whole[first:first + rows])
    assert {kernel_of(c["kernel"])[0] for c in gpu.counters} == set(WEIGHT_ROWS)


@pytest.mark.parametrize("arch, dtype", ((80, "float16"), (90, "bfloat16")))
def test_a_token_does_not_depend_on_its_company(arch, dtype):
    gpu, inputs = vgpu.Gpu(arch), MoeExpertsCase("", tokens=3000, experts=8, hidden=72, intermediate=40).inputs(DTYPES[dtype])
    whole, = run(gpu, "moe_experts", inputs)
    for first, tokens in PARTS:
        part = inputs | {name: inputs[name][first:first + tokens] for name in ("hidden", "topk_weights", "topk_ids")}
        assert same_bits(*run(gpu, "moe_experts", part), whole[first:first + tokens])
    assert {kernel_of(c["kernel"])[0] for c in gpu.counters if kernel_of(c["kernel"])} == set(WEIGHT_ROWS)


# ---------------------------------------------------------------------------------------------- bad values on the device

def clamped(offsets, rows):
    """The rule: the running maximum of the offsets, each clamped to [0, rows]."""
    return torch.from_numpy(np.maximum.accumulate(np.clip(offsets.numpy(), 0, rows)))


def gathered(a, a_rows, divisor):
    """A(r), zeros where there is no such row."""
    there = (a_rows >= 0) & (a_rows // divisor < len(a))
    return torch.where(there[:, None], a[torch.where(there, a_rows // divisor, 0).long()], 0)


def check_by_rule(op, inputs, arch=90):
    out, = run(vgpu.Gpu(arch), op, inputs)
    rule = inputs | dict(expert_offsets=clamped(inputs["expert_offsets"], len(out)))
    if "a_rows" in inputs:
        rule["a"] = gathered(inputs["a"], rule.pop("a_rows"), rule.pop("a_rows_divisor"))
    exact = getattr(reference, op)(**widened(rule))
    written = ~exact.isnan().any(1)
    assert (out[~written] == UNTOUCHED).all()
    assert_accurate(out[written], getattr(reference, op)(**rule)[written], exact[written])


ROWS = pytest.mark.parametrize("rows", (15, 40, 70, 800))  # of 4 experts: few rows of 16 and 64, tiles of 64 and 128 rows
R = "R"
BAD_OFFSETS = [(0, 9, 4, 12, R), (5, 9, 12, 12, 14), (0, 9, 16, R, 14), (-3, -HUGE - 1, 7, HUGE, 9), (HUGE, 0, 0, 0, 0), (0, 0, 0, 0, HUGE),
               (7, 3, 3, 3, 3), (-1, -1, -1, -1, -1), (HUGE, HUGE, HUGE, HUGE, HUGE), (0, HUGE, -HUGE - 1, HUGE, 5), (3, 2, 1, 0, -1),
               (-HUGE - 1, 1, 2, 3, 4)]


@PRODUCTS
@ROWS
@pytest.mark.parametrize("offsets", BAD_OFFSETS, ids=str)
def test_bad_offsets(offsets, rows, op):
    inputs = inputs_of(op, (rows, 0, 0, 0), 16, 24, gather=0)
    inputs["expert_offsets"] = torch.tensor([rows if x == R else x for x in offsets]).int()
    check_by_rule(op, inputs)


@PRODUCTS
@pytest.mark.parametrize("experts", (3, 33, 200, 256))
def test_bad_offsets_of_many_experts(experts, op):
    generator = torch.Generator().manual_seed(experts)
    for rows in (60, 600) if experts < 100 else (60,):  # 600: tiles
        inputs = inputs_of(op, [rows, *[0] * (experts - 1)], 16, 8)
        for low, high in ((-9, rows + 9), (-rows, rows), (-HUGE - 1, HUGE)):
            offsets = torch.randint(low, high, (experts + 1,), generator=generator).int()
            check_by_rule(op, inputs | dict(expert_offsets=offsets))
        nearly = torch.arange(experts + 1) * rows // experts + torch.randint(-9, 9, (experts + 1,), generator=generator)
        check_by_rule(op, inputs | dict(expert_offsets=nearly.int()))


@PRODUCTS
@ROWS
@pytest.mark.parametrize("divisor", (1, 2, HUGE))
def test_bad_rows_count_as_zeros(divisor, rows, op):
    inputs = inputs_of(op, (rows - 9, 0, 4, 2), 16, 24, gather=2, tail=3)
    tokens, generator = len(inputs["a"]), torch.Generator().manual_seed(rows)
    bad = torch.tensor([-1, -2, -HUGE - 1, min(HUGE, tokens * divisor), HUGE, HUGE - 1])
    a_rows = bad[torch.randint(0, len(bad), (rows,), generator=generator)]
    a_rows[::3] = torch.randint(0, min(HUGE, tokens * divisor), a_rows[::3].shape, generator=generator)
    check_by_rule(op, inputs | dict(a_rows=a_rows.int(), a_rows_divisor=divisor))


def experts_by_rule(inputs):
    """moe_experts with maps of any values, in a workspace of zeros: rows of no expert stay zero."""
    top_k, rows = inputs["topk_ids"].shape[1], inputs["topk_ids"].numel()
    offsets = clamped(inputs["expert_offsets"], rows)
    a = gathered(inputs["hidden"], inputs["sorted_slots"], top_k)
    inner = torch.nan_to_num(reference.grouped_gemm_swiglu(a, inputs["w_gate_up"], offsets))
    products = torch.nan_to_num(reference.grouped_gemm(inner, inputs["w_down"], offsets))
    slot_rows = torch.where((inputs["slot_rows"] >= 0) & (inputs["slot_rows"] < rows), inputs["slot_rows"], -1)
    return reference.moe_combine(products, slot_rows, inputs["topk_weights"])


@pytest.mark.parametrize("tokens", (7, 20, 40, 400))
@pytest.mark.parametrize("name, values", [
    ("expert_offsets", (0, 9, 4, 12, 13)), ("expert_offsets", (5, 9, 12, HUGE, 3)), ("expert_offsets", (-HUGE - 1, -1, 8, 2, 2)),
    ("expert_offsets", (HUGE,) * 5), ("sorted_slots", (-1, -HUGE - 1, HUGE, 14, -2)), ("slot_rows", (-2, -HUGE - 1, HUGE, 14, -1))], ids=str)
def test_bad_maps_of_the_expert_layer(name, values, tokens):
    inputs = MoeExpertsCase("", tokens=tokens, hidden=32, intermediate=24, maps=True).inputs(torch.bfloat16)
    values = torch.tensor([2 * tokens if x == 14 else x for x in values]).int()
    inputs[name].view(-1)[:len(values)] = values
    if name == "slot_rows":
        inputs["topk_weights"].view(-1)[:len(values)] = math.nan  # not read
    gpu, out = vgpu.Gpu(), torch.full((tokens, 32), UNTOUCHED, dtype=torch.bfloat16)
    gpu.start()
    fields, context = fields_of(inputs) | dict(out=numpy(out)), gpu.lib.context(device="cuda")
    workspace = np.zeros(gpu.lib.workspace_size("moe_experts", context, **fields), np.uint8)
    with gpu.mapped([(name, x, name == "out", name != "out") for name, x in fields.items()] + [("workspace", workspace, True, True)]):
        gpu.lib.call("moe_experts", context, workspace=workspace, **fields)
        gpu.finish()
    assert_accurate(out, experts_by_rule(inputs), experts_by_rule(widened(inputs)))


@pytest.mark.parametrize("tokens, experts, top_k", ((8, 8, 2), (9, 2, 8), (40, 20, 3), (70, 3, 8)))
def test_repeated_ids_and_skips(tokens, experts, top_k):
    """An expert named twice by a token has more rows than expected; skips have none, and their weights are not read."""
    generator = torch.Generator().manual_seed(tokens)
    for low, high in ((0, 1), (0, experts), (-2, experts + 2)):
        inputs = MoeExpertsCase("", tokens=tokens, experts=experts, top_k=top_k, hidden=32, intermediate=24).inputs(torch.bfloat16)
        ids = torch.randint(low, high, (tokens, top_k), generator=generator)
        weights = torch.rand(tokens, top_k, generator=generator).masked_fill((ids < 0) | (ids >= experts), math.nan)
        inputs |= dict(topk_ids=ids, topk_weights=weights)
        out, = run(vgpu.Gpu(), "moe_experts", inputs)
        assert_accurate(out, reference.moe_experts(**inputs), reference.moe_experts(**widened(inputs)))


# ------------------------------------------------------------------------------------------------------------- refusals

def refused(op, fields, match, workspace=np.zeros(2**16, np.uint8), status=c_api.INVALID_ARGUMENT):
    """With this status and message, and no launch."""
    gpu = vgpu.Gpu()
    gpu.start()
    with pytest.raises(c_api.MixtralError, match=re.escape(f"mixtral_{op}: {match}")) as error:
        gpu.lib.call(op, gpu.lib.context(device="cuda"), workspace=workspace, **fields)
    gpu.finish()
    assert error.value.status == status and not gpu.counters and (fields["out"] == 0).all()


def shifted(x):
    """The same values, 2 bytes behind a multiple of 16."""
    memory = np.zeros(x.size + 16, x.dtype)
    begin = -memory.ctypes.data % 16 // x.itemsize + 1
    memory[begin:begin + x.size] = x.reshape(-1)
    return memory[begin:begin + x.size].reshape(x.shape)


def padded(x, columns):
    """The same values, so many elements after each row."""
    return np.concatenate([x, np.zeros((*x.shape[:-1], columns), x.dtype)], -1)[..., :x.shape[-1]]


def floats(op):
    """Names of the arrays in the model's dtype."""
    return ("hidden", "w_gate_up", "w_down", "out") if op == "moe_experts" else ("a", WEIGHTS[op], "out")


def small_fields(op, inner=24, outer=16):
    """Rows of floats begin at multiples of 16 bytes, whatever their length."""
    if op == "moe_experts":
        inputs, shape = MoeExpertsCase("", tokens=3, hidden=inner, intermediate=outer).inputs(torch.float16), (3, inner)
    else:
        inputs, shape = inputs_of(op, (2, 3), inner, outer, torch.float16), (5, outer)
    fields = fields_of(inputs) | dict(out=np.zeros(shape, np.float16))
    return fields | {name: padded(fields[name], -fields[name].shape[-1] % 8) for name in floats(op)}


EVERY_OP = pytest.mark.parametrize("op", (*CASE, "moe_experts"))


@EVERY_OP
def test_refused_dtypes_and_layouts(op):
    fields = small_fields(op)
    first = floats(op)[0]
    refused(op, {name: x.astype(np.float32) if name in floats(op) else x for name, x in fields.items()},
            f"{first}: expected dtype bfloat16 or float16, got float32")
    for name in floats(op):
        refused(op, fields | {name: shifted(fields[name])}, f"{name}: expected data aligned to 16 bytes, got 0x")
        apart = padded(fields[name], 4)
        wrong = next(i for i in range(apart.ndim - 1) if apart.strides[i] % 16)
        refused(op, fields | {name: apart}, f"{name}: expected strides that are multiples of 16 bytes, got {apart.strides[wrong] // 2} elements "
                                            f"in dimension {wrong}")


@PRODUCTS
def test_refused_depths(op):
    refused(op, small_fields(op, inner=20), "a.shape[1]: expected a multiple of 8 on CUDA, got 20")


@pytest.mark.parametrize("sizes, match", ((dict(inner=20), "hidden.shape[1]: expected a multiple of 8 on CUDA, got 20"),
                                          (dict(outer=20), "w_down.shape[2]: expected a multiple of 8 on CUDA, got 20")))
def test_refused_sizes_of_the_expert_layer(sizes, match):
    refused("moe_experts", small_fields("moe_experts", **sizes), match)


def test_workspace():
    """Its bytes follow from shapes: two products' rows, without maps these and what the sort needs; NULL or less is refused."""
    gpu, fields = vgpu.Gpu(), small_fields("moe_experts")
    gpu.start()
    context = gpu.lib.context(device="cuda")
    aligned = lambda n: ceil_div(n, 64) * 64
    products = aligned(6 * 16 * 2) + aligned(6 * 24 * 2)
    size = products + aligned(5 * 4) + 2 * aligned(6 * 4) + 63
    assert gpu.lib.workspace_size("moe_experts", context, **fields) == size
    refused("moe_experts", fields, f"workspace: expected {size} bytes, got {size - 1}", np.zeros(size - 1, np.uint8), c_api.WORKSPACE)
    params = gpu.lib.params("moe_experts", **fields)
    with pytest.raises(c_api.MixtralError, match=f"workspace: expected {size} bytes, got NULL"):
        gpu.lib.check(gpu.lib.c.mixtral_moe_experts(context.handle, ctypes.byref(params), None, size, None))
    gpu.finish()
    assert not gpu.counters and (fields["out"] == 0).all()

    maps = MoeExpertsCase("", tokens=3, hidden=24, intermediate=16, maps=True).inputs(torch.float16)
    assert gpu.lib.workspace_size("moe_experts", context, **fields_of(maps), out=fields["out"]) == products + 63
    for op in CASE:
        assert gpu.lib.workspace_size(op, context, **small_fields(op)) == 0
