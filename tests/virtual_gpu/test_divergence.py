"""Branches that take the lanes of a warp apart: what nvcc makes of CUDA C++ gives what Python computes under every schedule, and
lanes come together again."""
import numpy as np
import pytest

import vgpu
from raw_ptx import caught, run

SOURCE = "kernels_divergence.cu"


def wrap(v):
    return (v + 2**31) % 2**32 - 2**31


# Each: the values of all threads and a thread, to its result (None: it stores nothing, and -7 stays).


def nested(x, t):
    v = x[t]
    if v & 1:
        r = wrap(v * 3) + (x[t ^ 1] if v & 4 else -x[t ^ 2]) if v & 2 else v ^ 0x55
        return r + 1 + t
    return (sum(i * v for i in range(v & 7)) if v & 8 else -v) + t


def trip_counts(x, t):
    r = 0
    for i in range(x[t] % 50):
        r = r * 5 + i
    return r


def break_continue(x, t):
    v, r = x[t], 0
    for i in range(40):
        if (i + v) % 7 == 3:
            continue
        if i * 3 > v % 100:
            break
        for j in range(i % 5 + v % 3):
            if not (j ^ i) & 1:
                r += j * i + 1
        r ^= i
    return r


def goto_out(x, t):
    v, r = x[t], 0
    for i in range(6):
        for j in range(6):
            for k in range(6):
                r += i * 36 + j * 6 + k
                if r > v % 3000:
                    return r * 10 + i
                if k > v % 5:
                    return -r * 10 + i
    return -r * 10 + 6


def early_return(x, t):
    r = x[t]
    if r % 3 == 0:
        return None
    while r > 5:
        r = r - 3 if r & 1 else r // 2
        if r == 4:
            return -1
    return r


def many_cases(x, t):
    v, r = x[t], 0
    for i in range(5):
        case = v >> i * 3 & 7
        if case == 6:
            return r
        r = {0: r + 10, 1: r * 3 - 4, 2: r - 4, 3: r if r & 1 else r ^ 0xFF, 4: r << 1 | 1}.get(case, r + (v & 15))
    return r + 1000


def collatz(x, t):
    v, steps = x[t] % 1000 + 1, 0
    while v != 1:
        v, steps = 3 * v + 1 if v % 2 else v // 2, steps + 1
    return steps


def short_circuit(x, t):
    v, calls = x[t], 0

    def say(value):
        nonlocal calls
        calls += 1
        return value != 0
    r = (say(v & 1) and (say(v & 2) or say(v & 4))) or (say(v & 8) and not say(v & 16))
    return calls * 2 + r


def do_while(x, t):
    r = x[t]
    while True:
        if r % 5 != 4:
            r = (r - 2 if r % 5 == 2 else r) * 3 // 4 - 1
        if not (r > 10 and r % 5 != 4):
            return r


def reduce_odd_and_even(x, t):
    block = x[t // 128 * 128:t // 128 * 128 + 128]
    return sum(v for v in block if (v & 1) == (t & 1))


def both_arms_shuffle(x, t):
    warp = x[t // 32 * 32:t // 32 * 32 + 32]
    given = [v + 1 if v % 3 == 0 else v - 1 for v in warp][t % 32 ^ 5]
    return (given * 2 if x[t] % 3 == 0 else given + sum(range(x[t] % 4))) + sum(v & 1 for v in warp)


KERNELS = [nested, trip_counts, break_continue, goto_out, early_return, many_cases, collatz, short_circuit, do_while,
           reduce_odd_and_even, both_arms_shuffle]


@pytest.mark.on_silicon
@pytest.mark.parametrize("kernel", KERNELS, ids=[k.__name__ for k in KERNELS])
def test_control_flow(kernel):
    x = np.random.default_rng(1).integers(0, 5000, 384, np.int32)
    x[:64], x[64:96], x[96:128] = np.arange(64), 1, np.where(np.arange(32) == 9, 4000, 0)
    values = x.tolist()
    wanted = [-7 if (r := kernel(values, t)) is None else wrap(r) for t in range(384)]
    for seed in range(10):
        out = np.full(384, -7, np.int32)
        vgpu.Gpu(arch=80, seed=seed).module(vgpu.compile(SOURCE, "80")).launch(kernel.__name__, grid=3, block=128, args=[x, out],
                                                                               written={1})
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("part", range(4))
def test_lanes_come_together_again(part):
    """Behind branches and loops of different lengths a warp's lanes execute as one: 64 additions are 64 instructions of each warp.
    Seldom, on purpose, they stay apart, but with seed 0."""
    warps, x = 16, np.ones(512, np.float32)
    together, kept = 0, []
    for seed in range(8):
        gpu = vgpu.Gpu(arch=80, seed=seed)
        gpu.module(vgpu.compile(SOURCE, "80")).launch(f"together_{part}", grid=2, block=256,
                                                      args=[x, np.zeros(512, np.float32), np.int32(5)])
        counters = gpu.counters[-1]
        multiplied = {0: 0, 1: 32 + 25, 2: sum(range(32)), 3: 5 * 32 - 5}[part]  # with the addition of the second arm of part 1
        assert counters["thread_instructions"]["float"] == warps * (64 * 32 + multiplied)
        kept.append(counters["warp_instructions"]["float"] - warps * {0: 0, 1: 3, 2: 31, 3: 5}[part])
        together += kept[-1] == warps * 64
    assert kept[0] == min(kept) == warps * 64 and max(kept) < warps * 64 * 1.5
    assert together == 8 if part == 0 else together >= 2


def test_one_lane_at_a_time_costs_a_warp():
    """32 arms of a branch on the lane: each is executed by one lane, and costs one instruction of the warp."""
    body = "mov.f32 %f1, 0f3F800000;\n"
    for i in range(32):
        body += f"ARM_{i}: setp.ne.u32 %p1, %lane, {i}; @%p1 bra ARM_{i + 1};\nfma.rn.f32 %f1, %f1, %f1, 0f00000000;\n"
    stores = []
    for seed in range(8):
        counters = run(body + "ARM_32: st.global.f32 [%x0], %f1;", np.zeros(32, np.float32), seed=seed)
        assert counters["thread_instructions"]["float"] == counters["warp_instructions"]["float"] == 32
        assert counters["thread_instructions"]["store_global"] == 32
        stores.append(counters["warp_instructions"]["store_global"])
    assert stores[0] == 1 and max(stores) < 5


def test_a_long_inner_loop_of_one_lane():
    """The others wait for it; a warp beside it goes on."""
    out = np.zeros(64, np.uint32)
    counters = run("""mov.u32 %r1, 0; setp.ne.u32 %p1, %t, 13; @%p1 bra B;
        L: add.u32 %r1, %r1, 3; setp.lt.u32 %p2, %r1, 60000; @%p2 bra L;
        B: add.u32 %r1, %r1, %t; st.global.u32 [%x0], %r1;""", out, block=64)
    np.testing.assert_array_equal(out, np.arange(64) + 60000 * (np.arange(64) == 13))
    assert counters["warp_instructions"]["store_global"] == 2


@pytest.mark.on_silicon
def test_lanes_may_wait_for_lanes_behind_the_place_where_they_meet():
    """Lane 0 waits for what lane 5 stores behind the branch: coming together must not stop lane 5."""
    for seed in range(10):
        x = np.zeros(33, np.uint32)
        run("""setp.ne.u32 %p1, %t, 0; @%p1 bra MEET;
            L: ld.acquire.gpu.global.u32 %r1, [%a0+128]; setp.eq.u32 %p2, %r1, 0; @%p2 bra L;
            MEET: setp.eq.u32 %p3, %t, 5; @%p3 st.release.gpu.global.u32 [%a0+128], 1;
            add.u32 %r2, %t, 1; st.global.u32 [%x0], %r2;""", x, seed=seed)
        np.testing.assert_array_equal(x, [*range(1, 33), 1])


@pytest.mark.parametrize("seed", range(3))
def test_a_loop_without_an_end(seed):
    """The report names the loop."""
    caught("instruction-limit", """setp.ne.u32 %p1, %t, 40; @%p1 exit;
        L: add.u32 %r1, %t, 1; add.u32 %r1, %r1, 2; bra L; // caught""", block=64, seed=seed, options=dict(instruction_limit=10**6))


@pytest.mark.on_silicon
@pytest.mark.parametrize("grid, block", (((1, 1, 1), (1, 1, 1)), ((3, 2, 4), (5, 3, 2)), ((2, 1, 3), (8, 8, 3)),
                                         ((1, 5, 1), (1, 33, 1)), ((2, 2, 2), (1, 1, 40)), ((4, 1, 1), (64, 1, 1))))
def test_indices(grid, block):
    """Threads of 3-dimensional blocks and grids, in order x, y, z; warps that are not full have only their lanes."""
    size, count = int(np.prod(block)), int(np.prod(grid))
    out = np.zeros((count, size, 17), np.uint32)
    vgpu.Gpu(arch=80).module(vgpu.compile(SOURCE, "80")).launch("places", grid=grid, block=block, args=[out], fresh={0})
    t, b = np.arange(size), np.arange(count)
    axes = lambda i, shape: (i % shape[0], i // shape[0] % shape[1], i // shape[0] // shape[1])
    for i, value in enumerate(axes(t, block)):
        assert (out[:, :, i] == value).all()
    for i, value in enumerate(axes(b, grid)):
        assert (out[:, :, 3 + i] == value[:, None]).all()
    for i, shape in ((6, block), (7, grid)):
        assert (out[:, :, i] == shape[0] * 10000 + shape[1] * 100 + shape[2]).all()
    lane, bit = t % 32, 1 << (t % 32).astype(np.int64)
    full = (1 << np.minimum(size - t // 32 * 32, 32)) - 1  # the lanes of the thread's warp
    if vgpu.Gpu.virtual:  # %warpid and %nwarpid: volatile, and a multiprocessor's rather than a block's (PTX ISA 10.4, 10.5)
        assert (out[:, :, 8 + 1] == t // 32).all() and (out[:, :, 8 + 2] == -(-size // 32)).all()
    for i, value in {0: lane, 3: full, 4: bit - 1, 5: 2 * bit - 1, 6: bit, 7: 2**32 - bit, 8: 2**32 - 2 * bit}.items():
        assert (out[:, :, 8 + i] == value).all(), i


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("poll, ends", [
    ("ld.volatile.global.u32 %r1, [%a0]; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 1000;", True),
    ("atom.global.cas.b32 %r1, [%a0], 5, 6; add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 1000;", True),
    ("mov.u64 %l2, %clock64; nanosleep.u32 20; sub.u64 %l3, %l2, %l1; setp.lt.u64 %p1, %l3, 20000;", True),
    ("ld.volatile.global.u32 %r1, [%a0]; add.u32 %r2, %r2, 1; setp.eq.u32 %p1, %r1, 0;", False),
    ("ld.volatile.global.u32 %r1, [%a0]; setp.eq.u32 %p1, %r1, 0;", False)])
def test_polls_that_end_by_themselves(poll, ends, seed):
    """A loop that gives up after so many tries or so much time is no deadlock; one that only memory could end is, counting or not."""
    body = f"mov.u32 %r2, 0; mov.u64 %l1, %clock64;\nagain: {poll}\n@%p1 bra again; // caught\nst.global.u32 [%x1], 1;"
    x, out = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    if ends:
        run(body, x, out, block=64, seed=seed)
        assert out.all()
    else:
        caught("deadlock", body.replace(" // caught", "").replace("\n@%p1", " @%p1").replace(poll, poll + " // caught\n"), x, out, block=64,
               seed=seed)
