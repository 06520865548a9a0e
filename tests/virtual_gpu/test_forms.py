"""Forms that nvcc makes of CUDA C++ that is not a single instruction: loops of compare-and-swap, calls, cooperative launches."""
import numpy as np
import pytest

from c_api import to_bf16, to_f32
from raw_ptx import caught, run, twins
import vgpu

SOURCE, SEEDS = "kernels_forms.cu", range(6)


def launch(kernel, *args, arch="80", seed=0, **shape):
    gpu = vgpu.Gpu(arch=int(arch[:2]), seed=seed, random_completion=bool(seed % 2))
    gpu.module(vgpu.compile(SOURCE, arch)).launch(kernel, args=args, **shape)


def found(kernel, *args, **more):
    """{(kind, line of the kernel)} that a launch is reported with."""
    with pytest.raises(vgpu.Failure) as failure:
        launch(kernel, *args, **more)
    return {(r["kind"], r["where"].split(" < ")[-1]) for r in failure.value.reports}


def line_of(text):
    lines = (vgpu.Path(__file__).parent / SOURCE).read_text().split("\n")
    numbers = [n for n, line in enumerate(lines, 1) if text in line]
    assert len(numbers) == 1, text
    return f"{SOURCE}:{numbers[0]}"


# -------------------------------------------------------------------------------------------------- loops of compare-and-swap

@pytest.mark.on_silicon
@pytest.mark.parametrize("arch", ("80", "90a"))
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", ("add_bf16", "add_bf16_in_shared"))
def test_bf16_atomics(kernel, seed, arch):
    """The first value of CUDA's loop is a plain load that races with the other threads' CAS, and may."""
    n = 600
    x = np.random.default_rng(seed).choice([0.0, 0.25, 0.5], n)  # all sums below 64 in quarters are bf16 numbers
    x = np.where(np.cumsum(x) < 60, x, 0)
    sums = np.zeros(3, np.uint16)
    launch(kernel, sums, to_bf16(x.astype(np.float32)), np.int32(n), arch=arch, seed=seed, grid=2, block=96, written={0})
    np.testing.assert_array_equal(to_f32(sums), [x[i::3].sum() for i in range(3)])


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", SEEDS)
def test_bf16x2_atomics(seed):
    x = np.zeros((192, 4, 2), np.float32)
    x[np.random.default_rng(seed).permutation(192)[:60]] = [[1, 2], [0.5, 1], [1, 1], [2, 0.5]]
    sums, old = np.zeros((4, 2), np.uint16), np.zeros((192, 4, 2), np.uint16)
    launch("add_bf16x2", sums, to_bf16(x), old, seed=seed, grid=3, block=64, written={0, 2})
    np.testing.assert_array_equal(to_f32(sums), x.sum(0))
    saw = np.sort(to_f32(old).reshape(192, 8)[x[:, 0, 0] > 0], 0)  # the sums in some order
    np.testing.assert_array_equal(saw, np.arange(60)[:, None] * x.max(0).reshape(8))


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", SEEDS)
def test_loop_of_the_programming_guide(seed):
    x, total = np.random.default_rng(seed).integers(-1000, 1000, 192).astype(np.float64), np.zeros(1)
    launch("add_double", total, x, seed=seed, grid=3, block=64, written={0})
    assert total[0] == x.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plain_load_that_is_more_than_a_guess_races(seed):
    lines = "int old = *sum, expected;", "old = atomicCAS(sum, expected, expected * 3 + 1);"
    reports = found("use_the_guess", np.zeros(1, np.int32), np.zeros(192, np.int32), seed=seed, grid=3, block=64)
    assert reports <= {("race", line_of(line)) for line in lines}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_store_beside_the_loop_races(seed):
    reports = found("store_beside_the_loop", np.zeros(1), np.ones(192), seed=seed, grid=3, block=64)
    assert reports <= {("race", line_of(line)) for line in ("*sum = 0;", "  add(sum, x[THREAD]);")}


GUESS = {  # the load, and where the loop begins
    "it is repeated": "<<L: ld.global.u32 %r1, [%a0];|ld.global.u32 %r1, [%a0]; L:>> // caught",
    "it is half of what is compared": "ld.global.<<u16|u32>> %r1, [%a0]; // caught\nL:",
    "it is branched on": "ld.global.u32 %r1, [%a0]; <<setp.eq.u32 %p2, %r1, 3; @%p2 bra E;|>> // caught\nL:"}


@pytest.mark.parametrize("case", GUESS)
def test_a_guess_is_what_the_loop_alone_uses(case):
    wrong, right = twins(GUESS[case] + """
        add.u32 %r2, %r1, 1;
        atom.global.cas.b32 %r3, [%a0], %r1, %r2; // caught
        setp.ne.u32 %p1, %r3, %r1; <<""" + ("" if "repeated" in case else "mov.u32 %r1, %r3;") + """|mov.u32 %r1, %r3;>> @%p1 bra L;
        E:""")
    for seed in SEEDS:
        total = np.zeros(1, np.uint32)
        caught("race", wrong, np.zeros(1, np.uint32), seed=seed, grid=2, block=64)
        run(right, total, seed=seed, grid=2, block=64)
        assert total[0] == 128
