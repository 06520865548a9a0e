"""Whole kernels on the virtual GPU: correct ones pass under every schedule, and each planted bug is reported at its line while its
correct twin passes."""
import re
from pathlib import Path

import numpy as np
import pytest

import runs
import vgpu
from runs import SM80, SM90

ARCH = {SM80: "80", SM90: "90a"}
LINES = {source: (Path(__file__).parent / source).read_text().splitlines() for source in ARCH}


def module(source, seed=0, random_completion=False, ptx=None):
    gpu = vgpu.Gpu(arch=int(ARCH[source][:2]), seed=seed, random_completion=random_completion)
    return gpu.module(ptx or vgpu.compile(source, ARCH[source]))


KERNELS = pytest.mark.parametrize("source, kernel, run", runs.CORRECT, ids=[kernel for _, kernel, _ in runs.CORRECT])


@pytest.mark.on_silicon
@KERNELS
def test_correct_kernels(source, kernel, run):
    run(module(source), kernel)


@pytest.mark.parametrize("random_completion", (False, True), ids=("late", "random"))
@pytest.mark.parametrize("seed", range(20))
@KERNELS
def test_correct_kernels_under_schedules(source, kernel, run, seed, random_completion):
    run(module(source, seed, random_completion), kernel)


def test_sm80_kernels_run_on_sm90():
    """The same PTX on the newer architecture."""
    for source, kernel, run in runs.CORRECT:
        if source == SM80:
            run(vgpu.Gpu(arch=90).module(vgpu.compile(SM80, "80")), kernel)


def caught_at(source, bug):
    """file.cu:line of the statement that the report must name."""
    marks = {i: re.search(r"// caught: (.*)", line) for i, line in enumerate(LINES[source], 1)}
    lines = [i for i, mark in marks.items() if mark and bug in mark[1].split(", ")]
    assert len(lines) == 1, (bug, lines)
    return f"{source}:{lines[0]}"


PLANTED = [  # source, run, kernel, bug, kind of report
    (SM80, runs.gemm_sm80, "gemm_sm80", "missing_wait", "in-flight"),
    (SM80, runs.gemm_sm80, "gemm_sm80", "wrong_group_count", "in-flight"),
    (SM80, runs.gemm_sm80, "gemm_sm80", "missing_barrier", "race"),
    (SM80, runs.ticket_sum, "ticket_sum", "missing_fence", "race"),
    (SM80, runs.split_dot, "split_dot", "split_race", "race"),
    (SM80, runs.reverse, "reverse", "missing_syncwarp", "race"),
    (SM80, runs.reverse, "reverse", "global_off_by_one", "out-of-range"),
    (SM80, runs.reverse, "reverse", "shared_off_by_one", "out-of-range"),
    (SM80, runs.reverse, "reverse", "misaligned", "misaligned"),
    (SM80, runs.reverse, "reverse", "never_written", "uninitialised"),
    (SM80, runs.reverse, "reverse", "divergent_barrier", "divergent-collective"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "wrong_parity", "in-flight"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "wrong_bytes", "deadlock"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "early_release", "in-flight"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "read_before_wait", "wgmma"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "no_proxy_fence_store", "proxy"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "reused_before_read", "in-flight"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "wrong_swizzle", "descriptor"),
    (SM90, runs.gemm_sm90, "gemm_sm90", "no_init_fence", "proxy"),
    (SM90, runs.gemm_cluster, "gemm_cluster", "no_cluster_barrier", "race"),
    # The host's bugs: a box of A reaches into B's part of the stage, one of C beyond the staging memory.
    (SM90, lambda module, _: runs.gemm_sm90(module, "gemm_sm90", a_rows=256), "gemm_sm90", "load_box", "in-flight"),
    (SM90, lambda module, _: runs.gemm_sm90(module, "gemm_sm90", c_rows=128), "gemm_sm90", "store_box", "out-of-range"),
    (SM90, runs.product, "product", "no_proxy_fence_wgmma", "proxy"),
    (SM90, runs.dependent_launch, "add_values", "no_dependency_wait", "race"),
]
IN_TEXT = ("wrong_bytes",)  # a deadlock is reported where one warp waits; its text says where the others do
# Reports that follow from a bug: the kind, and a piece of the line. Else nothing is reported.
A80, B80, COPY80, OUT80, OUT = "ldmatrix_x4(fa", "ldmatrix_x4(fb", "cp_async_16(stage", "c[(int64_t)row * n", "out[t] = shared[t"
A90, B90, PAIR, PRODUCT = "tma_load_2d(to, &a_map", "tma_load_2d(to + kOperandBytes, &b_map", "tma_load_2d_multicast(to", "wgmma_m64n128k16(sum, da"
STAGING, STORE, FULL, EMPTY, EXPECT = "stmatrix_x4(out", "tma_store_2d(&c_map", "mbarrier_try_wait(full", "mbarrier_try_wait(empty", "expect_tx(full"
STALE = {("in-flight", B80), ("race", A80), ("race", B80), ("uninitialised", OUT80)}  # all operands; their sums are stored
FOLLOWS = {
    "missing_wait": STALE | {("in-flight", COPY80)}, "wrong_group_count": STALE | {("in-flight", COPY80)},  # a warp ends before its copies
    "missing_barrier": STALE | {("in-flight", A80), ("race", COPY80)},  # other warps' copies: awaited by none but these
    "global_off_by_one": {("uninitialised", OUT)}, "shared_off_by_one": {("uninitialised", OUT)},  # what was not read is stored
    "divergent_barrier": {("race", OUT)},  # no barrier
    "wrong_parity": {(kind, line) for kind in ("in-flight", "race") for line in (A90, B90)} | {("mbarrier", EXPECT)},  # the other way round
    "early_release": {("in-flight", B90), ("race", A90), ("race", B90), ("in-flight", PRODUCT)},  # both operands, then what is copied is read
    "read_before_wait": {("in-flight", A90), ("in-flight", B90), ("in-flight", PRODUCT)},  # the last stage is released too early as well
    "no_init_fence": {("proxy", B90)},  # of the same mbarrier
    "no_cluster_barrier": {("race", "mbarrier_arrive_cluster(empty"), ("proxy", PAIR), ("mbarrier", PAIR), ("deadlock", EMPTY)},  # signals are lost
    # The bytes of the box are not those that are expected, and two copies write the same bytes.
    "load_box": {(kind, line) for kind in ("in-flight", "race") for line in (A90, B90, PRODUCT)} | {("deadlock", EMPTY), ("deadlock", FULL),
                                                                                                    ("mbarrier", EXPECT)},
    "store_box": {(kind, line) for kind in ("in-flight", "race") for line in (STAGING, STORE)}}  # the box has the other warpgroup's rows too


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("source, run, twin, bug, kind", PLANTED, ids=[bug for *_, bug, _ in PLANTED])
def test_planted_bugs_are_caught(source, run, twin, bug, kind, seed):
    with pytest.raises(vgpu.Failure) as failure:
        run(module(source, seed), f"{twin}_{bug}")
    line, found = caught_at(source, bug), 0
    for r in failure.value.reports:
        if r["kind"] == kind and re.search(rf"\b{re.escape(line)}\b", r["text" if bug in IN_TEXT else "where"]):
            found += 1
        else:
            text = LINES[source][int(re.search(rf"{source}:(\d+)", r["where"])[1]) - 1]
            assert any(r["kind"] == k and piece in text for k, piece in FOLLOWS.get(bug, ())), (line, r, text)
    assert found, (line, str(failure.value))
    # The twin is in runs.CORRECT.
    assert any(kernel in (twin, f"{twin}_correct") for _, kernel, _ in runs.CORRECT)


def test_wrong_transpose_bit_gives_wrong_numbers():
    """The one planted bug that only the numbers show: all that it reads is there."""
    ptx = vgpu.compile(SM90, "90a")
    wrong = ptx.replace("p, 1, 1, 0, 0;", "p, 1, 1, 0, 1;")
    assert wrong != ptx
    with pytest.raises(AssertionError) as failure:
        runs.product(module(SM90, ptx=wrong), "product_correct")
    assert not isinstance(failure.value, vgpu.Failure)


def test_counters_of_a_product():
    """Bytes, products and conflicts are those of the algorithm, whatever the schedule."""
    m, n, k = 128, 192, 160
    for seed in range(2):
        mod = module(SM80, seed)
        runs.gemm_sm80(mod, "gemm_sm80", m, n, k)
        c = mod.gpu.counters[-1]
        blocks = m // 64 * (n // 64)
        assert c["matrix_flops"] == 2 * m * n * k
        assert c["async_load_bytes"] == blocks * 2 * 64 * k * 2
        assert c["global_load_bytes"] == 0 and c["global_store_bytes"] == m * n * 4
        assert c["shared_conflicts"] == 0 and c["conflicts_by_line"] == {}

    mod = module(SM90)
    runs.gemm_cluster(mod, "gemm_cluster")
    c = mod.gpu.counters[-1]
    tiles = 512 // 128 * (256 // 128)
    assert c["matrix_flops"] == 2 * 512 * 256 * 192
    # A once a tile; B once for the two tiles of a cluster: what multicast saves.
    assert c["async_load_bytes"] == tiles * 128 * 192 * 2 + tiles // 2 * 128 * 192 * 2
    assert c["async_store_bytes"] == 512 * 256 * 2 and c["shared_conflicts"] == 0


def test_resources():
    """ptxas reports each kernel: registers, spills, and where it had to wait for a product by itself."""
    for source in ARCH:
        for name, r in module(source).resources.items():
            assert 1 <= r["registers"] <= 255 and r["spills"] == 0, (name, r)
            assert bool(r["wgmma_warnings"]) == (name == "gemm_sm90_read_before_wait"), (name, r)


def test_resources_join_counters_and_reports():
    """When they are read: ptxas takes longer than a launch."""
    mod, asked = module(SM90), vgpu.resources.cache_info()
    runs.gemm_sm90(mod, "gemm_sm90")
    runs.product(mod, "product_correct")
    with pytest.raises(vgpu.Failure) as failure:
        runs.gemm_sm90(mod, "gemm_sm90_read_before_wait")
    assert vgpu.resources.cache_info() == asked
    gemm, product, early = mod.gpu.counters
    assert 1 <= gemm["registers"] <= 65536 // 384 and gemm["spills"] == gemm["shared_bytes"] == 0 and gemm["wgmma_warnings"] == []
    assert product["shared_bytes"] == (64 + 128) * 128
    for text in str(failure.value), early["wgmma_warnings"][0]:
        assert "(C7517)" in text and text.endswith("'gemm_sm90_read_before_wait'")
    with pytest.raises(KeyError):
        gemm["stalls"]


def test_refused_launches():
    mod = module(SM80)
    x, out = np.zeros(256, np.int32), np.zeros(256, np.int32)
    args = [x, out, np.int32(256)]
    for shape, why in [(dict(grid=0, block=256), "a grid of 0"), (dict(grid=1, block=288), "__launch_bounds__ says at most 256"),
                       (dict(grid=(1, 70000), block=256), "a grid of 70000"), (dict(grid=1, block=2048), "a block of 2048"),
                       (dict(grid=1, block=256, shared=200000), "bytes of dynamic shared memory"),
                       (dict(grid=2, block=256, cluster=(2,)), "a cluster on sm_80")]:
        with pytest.raises(vgpu.LaunchError, match=why):
            mod.launch("reverse_correct", args=args, **shape)
    assert not out.any()
    with pytest.raises(vgpu.LaunchError, match="code for sm_90a on a device of sm_80"):
        runs.product(vgpu.Gpu(arch=80).module(vgpu.compile(SM90, "90a")), "product_correct")
    with pytest.raises(vgpu.LaunchError, match="code for sm_90 on a device of sm_80"):
        vgpu.Gpu(arch=80).module(vgpu.compile(SM80, "90")).launch("reverse_correct", block=256, args=args)
    for settings in (dict(arch=70), dict(sm_count=0), dict(colour=3)):
        with pytest.raises(ValueError, match="there is no such setting"):
            vgpu.Gpu(**settings).module(vgpu.compile(SM80, "80")).launch("reverse_correct", block=256, args=args)
    for wrong in (dict(fresh={5}), dict(written={2})):
        with pytest.raises(ValueError, match="expected indices of array arguments"):
            mod.launch("reverse_correct", block=256, args=args, **wrong)
    with pytest.raises(ValueError, match="argument 1: a read-only array, and the kernel may write it"):
        out.flags.writeable = False
        mod.launch("reverse_correct", block=256, args=args, written={1})
    with pytest.raises(ValueError, match="argument 0: a read-only array"):
        mod.launch("reverse_correct", block=256, args=[out, x, np.int32(256)])
    mod.launch("reverse_correct", block=256, args=[out, x, np.int32(256)], written={1})
    with pytest.raises(vgpu.Failure, match="out-of-range"):  # None is a null pointer
        module(SM80).launch("reverse_correct", block=256, args=[None, x, np.int32(256)])


def test_refused_arguments():
    """Of another size, and floats for integers or pointers and the reverse, which nvcc's PTX tells."""
    mod, x, rows = module(SM80), np.zeros(256, np.int32), np.zeros((64, 64), np.uint16)
    for kernel, block, args, why in [
            ("reverse_correct", 256, [x, x, np.float32(256)], "argument 2: the kernel takes 4 bytes of type .u, got 4 of float32"),
            ("reverse_correct", 256, [x, x, np.int64(256)], "argument 2: the kernel takes 4 bytes of type .u, got 8 of int64"),
            ("reverse_correct", 256, [x, np.float64(1), np.int32(256)], "argument 1: the kernel takes 8 bytes of type .u, got 8 of float64"),
            ("reverse_correct", 256, [x, x], "the kernel takes 3 arguments, got 2"),
            ("attention_sm80", 128, [rows, rows, rows, x, np.uint32(1)], "argument 4: the kernel takes 4 bytes of type .f, got 4 of uint32")]:
        with pytest.raises(ValueError, match=why):
            mod.launch(kernel, block=block, args=args)
    with pytest.raises(ValueError, match="argument 0: the kernel takes 128 bytes of type .b, got 8"):
        module(SM90).launch("gemm_sm90", block=384, args=[rows, rows, rows, *map(np.int32, (64, 64, 64))])
    with pytest.raises(ValueError, match="innermost dimension is contiguous: expected a stride of 2 bytes, got 128"):
        vgpu.TensorMap(rows.T, (8, 8))
