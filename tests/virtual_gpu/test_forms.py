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


# The same loop with the guess in a register of its own, %r5. Each case changes one line of it.
LOOP = ["ld.global.u32 %r5, [%a0]; // caught", "mov.u32 %r1, %r5;", "L: add.u32 %r2, %r1, 1;", "atom.global.cas.b32 %r3, [%a0], %r1, %r2; // caught",
        "setp.ne.u32 %p1, %r3, %r1; mov.u32 %r1, %r3; @%p1 bra L;", "st.global.u32 [%x1], %r3;"]
MORE_THAN_A_GUESS = {
    "used after the loop": (5, "st.global.u32 [%x1], %r5;"),
    "a copy is used after the loop": (1, "mov.u32 %r6, %r5; mov.u32 %r1, %r6; mov.u32 %r7, %r6;",
                                                                                             "st.global.u32 [%x1], %r7;"),
    "half of it is used after the loop": (5, "mov.b32 {%h1, %h2}, %r5; st.global.u16 [%x1], %h1;"),
    "stored in the loop": (2, "L: st.global.u32 [%x1], %r1; add.u32 %r2, %r1, 1;"),
    "stored after the CAS": (4, "st.global.u32 [%x1], %r1; setp.ne.u32 %p1, %r3, %r1; mov.u32 %r1, %r3; @%p1 bra L;"),
    "told to other lanes": (2, "L: shfl.sync.idx.b32 %r6, %r1, 0, 31, -1; add.u32 %r2, %r1, 1;"),
    "the loop ends whatever the CAS saw": (4, "setp.ne.u32 %p1, %t, %t; mov.u32 %r1, %r3; @%p1 bra L;"),
    "the loop ends when the CAS fails": (4, "setp.ne.u32 %p1, %r3, %r1; mov.u32 %r1, %r3; @!%p1 bra L;"),
    "a CAS that is not repeated": (4, "mov.u32 %r1, %r3;"),
    "the loop goes on elsewhere": (2, "L: setp.gt.u32 %p2, %r1, 90; @%p2 bra E; add.u32 %r2, %r1, 1;"),
    "another address": (0, "ld.global.u32 %r5, [%a0+4]; // caught", "@!%p1 red.global.add.u32 [%a0+4], 1; // caught"),
    "another register's address": (0, "ld.global.u32 %r5, [%l5]; // caught", "@!%p1 red.global.add.u32 [%a0+4], 1; // caught"),
    "the address moves in the loop": (2, "L: add.s64 %l5, %l5, 0; add.u32 %r2, %r1, 1;")}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("case", [None, *MORE_THAN_A_GUESS])
def test_a_guess_is_used_by_its_loop_alone(case, seed):
    lines = list(LOOP)
    if case:
        at, line, *last = MORE_THAN_A_GUESS[case]
        lines[at:at + 1], lines[5:5] = [line], last
    if case == "the address moves in the loop":
        lines = [line.replace("[%a0]", "[%l5]") for line in lines]
    body = "add.s64 %l5, %a0, 4;\n" + "\n".join(lines) + "\nE:"
    args, more = [np.zeros(64, np.uint32), np.zeros(128, np.uint32)], dict(seed=seed, grid=2, block=64, written={0, 1})
    if case:
        caught("race", body, *args, **more)
    else:
        run(body, *args, **more)
        assert args[0][0] == 128 and sorted(args[1]) == list(range(128))


def test_a_guess_of_the_same_place_written_in_two_ways():
    total = np.zeros(2, np.uint32)
    run("add.s64 %l5, %a0, 4;\n" + "\n".join(LOOP[:5]).replace("ld.global.u32 %r5, [%a0]", "ld.global.u32 %r5, [%a0+4]").replace("[%a0]", "[%l5]"),
        total, grid=2, block=64)
    assert list(total) == [0, 128]


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", (2, 4))
def test_vectors_of_floats(n, seed):
    x = np.random.default_rng(seed).integers(0, 9, (192, n)).astype(np.float32)
    sums, old = np.zeros((3, n), np.float32), np.zeros((192, n), np.float32)
    launch(f"add_float{n}", sums, x, old, arch="90a", seed=seed, grid=3, block=64, written={0, 2})
    np.testing.assert_array_equal(sums, [x[i::3].sum(0) for i in range(3)])
    if n == 2:  # the last to add has seen the sum of the others
        assert all(((old + x)[i::3] == sums[i]).any(0).all() for i in range(3))


# ---------------------------------------------------------------------------------------------------------------------- calls

@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", SEEDS)
def test_call_of_scalars(seed):
    """From two places in lanes that are apart, one of them through another function; with an early return."""
    def power(x, n):
        r = np.float32(1)
        for _ in range(n):
            if r > 100:
                return -r
            r *= x
        return r
    x, out = np.random.default_rng(seed).integers(1, 9, 192).astype(np.float32), np.zeros(192, np.float32)
    launch("call_scalars", x, out, seed=seed, grid=2, block=96, written={1}, fresh={1})
    np.testing.assert_array_equal(out, [power(x[t], t % 7) if t % 3 == 0 else power(x[t], t % 5) + power(x[t] + 1, 2) + 1
                                        for t in range(192)])


@pytest.mark.on_silicon
@pytest.mark.parametrize("arch", ("80", "90a"))
def test_call_of_structures(arch):
    """By value and by address, and returned."""
    x, out, wanted = np.arange(1, 97, dtype=np.float32), np.zeros((96, 2), np.int32), []
    for t in range(96):
        n = [1, 2, 3, 4, t]
        n[t % 5] += 3
        wanted.append([n[t % 5 & 3] + x[t % 5] + 10 * n[2] + 100 * n[4], n[t % 5]])
    launch("call_structures", x, out, arch=arch, block=96, written={1}, fresh={1})
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", SEEDS)
def test_call_with_barriers_and_shared_memory(seed):
    """The function's shared memory is the same in both calls."""
    x = np.random.default_rng(seed).integers(0, 100, 128).astype(np.float32)
    wanted = x.reshape(-1, 2)[:, ::-1].reshape(-1) + 6 * x
    launch("call_with_barriers", x, seed=seed, block=128)
    np.testing.assert_array_equal(x, wanted)


@pytest.mark.on_silicon
def test_call_of_small_types():
    rng = np.random.default_rng(0)
    a, b, more = rng.integers(-128, 128, 256, np.int8), rng.integers(-200, 200, 256, np.int16), rng.integers(0, 2, 256).astype(bool)
    wanted = np.where(more, a > b, a < b)
    launch("call_small_types", a, b, more, block=256)
    np.testing.assert_array_equal(more, wanted)


@pytest.mark.on_silicon
def test_call_of_pow():
    """A function of CUDA's own that nvcc calls."""
    x = np.random.default_rng(0).random(64) * 10
    wanted = x ** 1.7
    launch("call_pow", x, block=64)
    np.testing.assert_allclose(x, wanted, rtol=1e-14)


FUNCTION = """.func (.param .b32 r) f(.param .align 8 .b8 a[16]) {
    .reg .b64 %l1; .reg .b32 %r1; .reg .pred %p1; mov.b64 %l1, a; st.param.b32 [r+0], 7;
    ld.param.b32 %r1, [%l1+8]; setp.gt.u32 %p1, %r1, 20; @%p1 ret; st.param.b32 [r+0], %r1; }"""
PASS = """mov.u32 %r1, 1; mov.u64 %l1, 2; setp.lt.u32 %p1, %t, 9;
    {{ .param .align 8 .b8 p[16]; .param .b32 q; st.param.b32 [p+{}], %t;
    call.uni (q), f, (p); ld.param.b32 %r2, [q+0]; }}
    add.u32 %r2, %r2, %r1; st.global.u32 [%x0], %r2;"""


@pytest.mark.on_silicon
def test_parameters_of_a_function():
    """Read by address; its registers have the names of the kernel's; a predicated return; without one at the end."""
    out = np.zeros(32, np.uint32)
    run(PASS.format(8), out, module_variables=FUNCTION)
    np.testing.assert_array_equal(out, [t + 1 if t <= 20 else 8 for t in range(32)])


def test_what_was_not_passed_is_undefined():
    with pytest.raises(vgpu.Failure, match="uninitialised"):
        run(PASS.format(4), np.zeros(32, np.uint32), module_variables=FUNCTION)


def test_predicated_calls_are_not_covered():
    with pytest.raises(vgpu.Failure, match="uncovered in k at k.cu:3"):
        run(PASS.format(8).replace("call", "@%p1 call"), np.zeros(32, np.uint32), module_variables=FUNCTION)


def test_reports_name_the_call():
    lines = [line_of(text) for text in ("void write(", "if (THREAD == 5) write(out, 64);")]
    with pytest.raises(vgpu.Failure) as failure:
        launch("call_out_of_range", np.zeros(64, np.int32), block=64)
    assert [(r["kind"], r["where"]) for r in failure.value.reports] == [("out-of-range", " < ".join(lines))]


@pytest.mark.parametrize("kernel, called", [("call_recursive", "fibonacci"), ("call_pointer", "%rd"), ("call_printf", "vprintf")])
def test_other_calls_are_not_covered(kernel, called):
    with pytest.raises(vgpu.Failure) as failure:
        launch(kernel, np.array([9, 1, 1], np.int32), block=1)
    assert [r["kind"] for r in failure.value.reports] == ["uncovered"]
    assert kernel == "call_pointer" or called in failure.value.reports[0]["statement"]


def test_code_beside_a_call_that_is_not_covered_runs():
    x = np.array([0, 1], np.int32)
    launch("call_printf", x, block=1)
    assert list(x) == [0, 5]


@pytest.mark.parametrize("arch", ("80", "90a"))
@pytest.mark.parametrize("seed", SEEDS)
def test_failed_assertion(arch, seed):
    x = np.ones(192, np.int32)
    launch("call_assert", x, arch=arch, seed=seed, grid=2, block=96)
    x[77] = 0
    with pytest.raises(vgpu.Failure) as failure:
        launch("call_assert", x, arch=arch, seed=seed, grid=2, block=96)
    (report,), where = failure.value.reports, line_of('assert(x[THREAD] > 0 && "all are positive")')
    assert (report["kind"], report["where"], report["thread"]) == ("trap", where, "block (0,0,0) thread 77")
    assert report["text"] == f'assertion x[THREAD] > 0 && "all are positive" failed: {where}, void call_assert(int *)'


# ------------------------------------------------------------------------------------------------------- cooperative launches

@pytest.mark.on_silicon
@pytest.mark.parametrize("arch", ("80", "90a"))
@pytest.mark.parametrize("seed", SEEDS)
def test_grid_sync(seed, arch):
    x = np.random.default_rng(seed).integers(0, 1000, (7, 64), np.int32)
    wanted = np.roll(x, -5, 0) + 5
    launch("grid_sync_correct", x, np.int32(5), arch=arch, seed=seed, grid=7, block=64, cooperative=True)
    np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_grid_sync(seed):
    reports = found("grid_sync_missing", np.zeros((7, 64), np.int32), np.int32(5), seed=seed, grid=7, block=64, cooperative=True)
    assert reports == {("race", line_of("grid_sync_missing"))}


def test_grid_sync_not_by_all_blocks():
    with pytest.raises(vgpu.Failure, match="nothing can go on:(.*\n)*  block .* thread 0 polls near"):
        launch("grid_sync_not_by_all", np.zeros(96, np.int32), grid=3, cooperative=True)


def test_grid_sync_needs_a_cooperative_launch():
    """cooperative_groups traps."""
    assert {kind for kind, _ in found("grid_sync_correct", np.zeros(64, np.int32), np.int32(1), grid=2)} == {"trap"}


def test_a_cooperative_grid_is_resident_as_a_whole():
    """Four blocks of 512 threads on each of four multiprocessors (sm_count), two of 1024."""
    for block, most in ((512, 16), (1024, 8)):
        x = np.zeros((most + 1, block), np.int32)
        launch("grid_sync_correct", x, np.int32(1), grid=most, block=block, cooperative=True)
        assert (x[:most] == 1).all() and not x[most:].any()
        with pytest.raises(vgpu.LaunchError, match=f"a cooperative grid of {most + 1} blocks, of which {most} are resident at once"):
            launch("grid_sync_correct", x, np.int32(1), grid=most + 1, block=block, cooperative=True)
