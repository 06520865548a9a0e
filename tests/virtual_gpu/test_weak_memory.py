"""Strong accesses that nothing orders: a load may return an older value. Kernels that rely on more compute wrong numbers under some
seed, and their twins never do. (PTX ISA 8 "Memory Consistency Model")"""
import numpy as np
import pytest

import vgpu
from raw_ptx import caught, run, twins

SOURCE = "kernels_order.cu"
SEEDS = range(40)


def launch(kernel, seed, *args, arch=80, **shape):
    gpu = vgpu.Gpu(arch=arch, seed=seed, instruction_limit=10**7)
    gpu.module(vgpu.compile(SOURCE, {80: "80", 90: "90a"}[arch])).launch(kernel, args=args, **shape)
    return gpu.counters[-1]["stale_loads_by_line"]


def chained_sum(kernel, seed):
    x = np.arange(1, 9, dtype=np.int32)
    sums, flags, out = (np.zeros(8, np.int32) for _ in range(3))
    stale = launch(kernel, seed, x, sums, flags, out, grid=8)
    return np.array_equal(out, np.cumsum(x)), stale


def volatile_sum(kernel, seed):
    x, out = np.arange(32, dtype=np.int32) ** 2, np.zeros(1, np.int32)
    try:
        stale = launch(kernel, seed, x, out)
    except vgpu.Failure as failure:  # what was there before is undefined
        assert {r["kind"] for r in failure.reports} == {"uninitialised"}
        return False, [r["where"] for r in failure.reports]
    return out[0] == x.sum(), stale


def message(kernel, seed):
    data, flag, out = (np.zeros(1, np.int32) for _ in range(3))
    stale = launch(kernel, seed, data, flag, out, grid=2, arch=90)
    return out[0] == 7, stale


def both_write(kernel, seed):
    x, out = np.zeros(2, np.int32), np.zeros(2, np.int32)
    stale = launch(kernel, seed, x, out, grid=2)
    return out.any(), stale


@pytest.mark.parametrize("example, right, wrong, line", [
    (chained_sum, "chained_sum_right", "chained_sum_wrong", "sum += sums[b - 1];"),
    (volatile_sum, "volatile_sum_right", "volatile_sum_wrong", "*out = s[0];"),
    (message, "message_right", "message_no_release", "*out = Shared(*data).load"),
    (message, "message_right", "message_no_acquire", "*out = Shared(*data).load"),
    (both_write, "both_write_right", "both_write_wrong", "out[b] = ")], ids=lambda x: x if isinstance(x, str) and "_" in x else "")
def test_what_is_missing_shows_in_the_numbers(example, right, wrong, line):
    assert all(example(right, seed)[0] for seed in SEEDS)
    results = [example(wrong, seed) for seed in SEEDS]
    assert results[0][0]  # under seed 0 memory has one order
    stale = [where for correct, lines in results if not correct for where in lines]
    assert stale
    text = (vgpu.ROOT / "tests/virtual_gpu" / SOURCE).read_text().splitlines()
    places = [part for where in stale for part in where.split(" < ") if part.startswith(SOURCE)]
    assert any(line in text[int(part.split(":")[1]) - 1] for part in places), places


@pytest.mark.parametrize("seed", range(10))
def test_no_way_back(seed):
    x, out = np.zeros(1, np.int32), np.full(32, -1, np.int32)
    launch("one_way", seed, x, out, grid=2)
    assert not out.any()


def test_never_written_is_what_came_before():
    """The older value of fresh memory is undefined: where it matters it is reported."""
    body = """setp.ne.u32 %p0, %b, 0;
@%p0 bra reader;
st.relaxed.gpu.global.u32 [%a0], 5;
st.relaxed.gpu.global.u32 [%a1], 1;
ret;
reader:
ld.relaxed.gpu.global.u32 %r0, [%a1];
setp.eq.u32 %p1, %r0, 0;
@%p1 bra reader;
fence.acq_rel.gpu;
ld.relaxed.gpu.global.u32 %r1, [%a0];
st.global.u32 [%a2], %r1;"""
    found = set()
    for seed in SEEDS:
        data, flag, out = (np.zeros(1, np.uint32) for _ in range(3))
        try:
            run(body, data, flag, out, grid=2, block=1, seed=seed, fresh={0, 2})
        except vgpu.Failure as failure:
            found |= {(r["kind"], r["where"]) for r in failure.reports}
        else:
            assert out[0] == 5
    assert found == {("uninitialised", "k.cu:12")}


@pytest.mark.parametrize("seed", range(20))
def test_atomics_see_the_newest(seed):
    """Lost updates do not exist: 8 blocks of 32 threads count with relaxed atomics, and an older value goes only to loads."""
    count, out = np.zeros(1, np.uint32), np.zeros(256, np.uint32)
    run("atom.relaxed.gpu.global.add.u32 %r0, [%a0], 1;\nst.global.u32 [%x1], %r0;", count, out, grid=8, seed=seed)
    assert count[0] == 256 and np.array_equal(np.sort(out), np.arange(256))


@pytest.mark.parametrize("seed", range(20))
def test_other_sizes_are_coherent(seed):
    """The ISA promises nothing where sizes differ (8.7.2); here a thread that saw one half of a value sees the other half and the whole."""
    body = """setp.ne.u32 %p0, %b, 0;
@%p0 bra reader;
mov.u64 %l0, 0x500000006;
st.relaxed.gpu.global.u64 [%a0], %l0;
ret;
reader:
ld.relaxed.gpu.global.u32 %r0, [%a0];
setp.eq.u32 %p1, %r0, 0;
@%p1 bra reader;
ld.relaxed.gpu.global.u64 %l1, [%a0];
ld.relaxed.gpu.global.u32 %r2, [%a0+4];
st.global.u64 [%a1], %l1;
st.global.u32 [%a1+8], %r2;"""
    x, out = np.zeros(1, np.uint64), np.zeros(2, np.uint64)
    run(body, x, out, grid=2, block=1, seed=seed)
    assert out.tolist() == [0x500000006, 5]


LITMUS = {  # what each block does (%a0, %a1: x, y, of zeros; FENCE: its fence), and the results that are in question
    "store buffering": (["st.relaxed.gpu.global.u32 [%a0], 1; FENCE ld.relaxed.gpu.global.u32 %r0, [%a1];",
                         "st.relaxed.gpu.global.u32 [%a1], 1; FENCE ld.relaxed.gpu.global.u32 %r1, [%a0];"], (0, 0)),
    "message": (["st.relaxed.gpu.global.u32 [%a0], 1; FENCE st.relaxed.gpu.global.u32 [%a1], 1;",
                 "ld.relaxed.gpu.global.u32 %r0, [%a1]; FENCE ld.relaxed.gpu.global.u32 %r1, [%a0];"], (1, 0)),
    "message by atomics": (["atom.relaxed.gpu.global.exch.b32 %r9, [%a0], 1; FENCE red.relaxed.gpu.global.add.u32 [%a1], 1;",
                            "atom.relaxed.gpu.global.or.b32 %r0, [%a1], 0; FENCE ld.relaxed.gpu.global.u32 %r1, [%a0];"], (1, 0)),
    "write to read": (["st.relaxed.gpu.global.u32 [%a0], 1;",
                       "ld.relaxed.gpu.global.u32 %r0, [%a0]; FENCE st.relaxed.gpu.global.u32 [%a1], 1;",
                       "ld.relaxed.gpu.global.u32 %r1, [%a1]; FENCE ld.relaxed.gpu.global.u32 %r2, [%a0];"], (1, 1, 0)),
    "two readers": (["st.relaxed.gpu.global.u32 [%a0], 1;", "st.relaxed.gpu.global.u32 [%a1], 1;",
                     "ld.relaxed.gpu.global.u32 %r0, [%a0]; FENCE ld.relaxed.gpu.global.u32 %r1, [%a1];",
                     "ld.relaxed.gpu.global.u32 %r2, [%a1]; FENCE ld.relaxed.gpu.global.u32 %r3, [%a0];"], (1, 0, 1, 0)),
    "one location": (["st.relaxed.gpu.global.u32 [%a0], 1; FENCE st.relaxed.gpu.global.u32 [%a0], 2;",
                      "ld.relaxed.gpu.global.u32 %r0, [%a0]; FENCE ld.relaxed.gpu.global.u32 %r1, [%a0];"], (2, 1)),
}
SC, ACQUIRE_RELEASE = "fence.sc.gpu;", "fence.acq_rel.gpu;"


@pytest.mark.parametrize("name, fence, possible", [  # by the axioms (8.10)
    *[(name, SC, False) for name in LITMUS],
    ("store buffering", ACQUIRE_RELEASE, True), ("store buffering", "", True), ("message", ACQUIRE_RELEASE, False), ("message", "", True),
    ("message by atomics", "membar.gl;", False), ("message by atomics", "", True), ("write to read", ACQUIRE_RELEASE, False),
    ("write to read", "", True), ("two readers", ACQUIRE_RELEASE, True), ("two readers", "", True), ("one location", "", False),
    ("message", "fence.acq_rel.cta;", True),
    # Only morally strong fences are in one order (8.9.3).
    ("store buffering", "fence.sc.cta;", True), ("store buffering", "membar.cta;", True)])
def test_litmus(name, fence, possible):
    """Small programs of the memory-model literature: the surprising result shows under some seed if it may, and never if not."""
    blocks, surprise = LITMUS[name]
    body = "".join(f"setp.ne.u32 %p0, %b, {i};\n@%p0 bra not{i};\n{text.replace('FENCE', fence)}\n"
                   + "".join(f"st.global.u32 [%a2+{4 * k}], %r{k};\n" for k in range(len(surprise)) if f" %r{k}," in text) + f"not{i}:\n"
                   for i, text in enumerate(blocks))
    seen = set()
    for seed in range(1, 301):
        x, y, out = np.zeros(1, np.uint32), np.zeros(1, np.uint32), np.zeros(len(surprise), np.uint32)
        run(body, x, y, out, grid=len(blocks), block=1, seed=seed)
        seen.add(tuple(out.tolist()))
    assert (surprise in seen) == possible and len(seen) > 1, seen


@pytest.mark.parametrize("seed", range(10))
def test_a_reduction_acquires_nothing(seed):
    """8.8: red.add and a fence are no acquire pattern, so what follows is not ordered behind the block that added before."""
    body = """setp.ne.u32 %p0, %b, 0;
@%p0 bra reader;
st.global.u32 [%a0], 5; // caught
membar.gl;
red.relaxed.gpu.global.add.u32 [%a1], 1;
ret;
reader:
<<red.relaxed.gpu.global.add.u32 [%a1], 1;|again: ld.relaxed.gpu.global.u32 %r1, [%a1]; setp.eq.u32 %p1, %r1, 0; @%p1 bra again;>>
membar.gl;
ld.global.u32 %r0, [%a0]; // caught
st.global.u32 [%a2], %r0;"""
    wrong, right = twins(body)
    x, count, out = (np.zeros(1, np.uint32) for _ in range(3))
    caught("race", wrong, x, count, out, grid=2, block=1, seed=seed)
    x, count, out = (np.zeros(1, np.uint32) for _ in range(3))
    run(right, x, count, out, grid=2, block=1, seed=seed)
    assert out[0] == 5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("space", ("global", "shared"))
def test_the_last_ticket_clears_the_counter(space, seed):
    """An atomic that took the last ticket observed the others (8.9.5), so its thread may store to the counter; one that took another may not."""
    body = """mov.u32 %r8, s; setp.ne.u32 %p0, %t, 0; @%p0 bra ready; st.shared.u32 [%r8], 0; ready: bar.sync 0;
atom.SPACE.inc.u32 %r0, [WHERE], 10000; // caught
setp.ne.u32 %p1, %r0, <<5|LAST>>;
@%p1 bra end;
st.SPACE.u32 [WHERE], 77; // caught
end:"""
    blocks, where = (10, "%a0") if space == "global" else (1, "%r8")
    body = body.replace("SPACE", space).replace("WHERE", where).replace("LAST", str(64 * blocks - 1))
    wrong, right = twins(body)
    for kernel in right, wrong:
        count = np.zeros(1, np.uint32)
        more = dict(grid=blocks, block=64, seed=seed, variables=".shared .align 4 .b8 s[4];")
        if kernel is right:
            run(kernel, count, **more)
            assert space == "shared" or count[0] == 77
        else:
            caught("race", kernel, count, **more)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("release", ("st.release.gpu.global.u32 [%a1], 1;", "atom.release.gpu.global.exch.b32 %r9, [%a1], 1;"))
def test_a_strong_write_goes_on_with_its_thread_s_release(release, seed):
    """8.8: a release on M, then a strong write on M by the same thread, is a release pattern; on another location it is none."""
    body = f"""setp.ne.u32 %p0, %b, 0; @%p0 bra reader;
st.global.u32 [%a0], 5; // caught
{release}
st.relaxed.gpu.global.u32 [<<%a1+4|%a1>>], 2;
ret;
reader:
ld.acquire.gpu.global.u32 %r1, [<<%a1+4|%a1>>];
setp.ne.u32 %p1, %r1, 2;
@%p1 bra reader;
ld.global.u32 %r0, [%a0]; // caught
st.global.u32 [%a2], %r0;"""
    wrong, right = twins(body)
    for kernel in right, wrong:
        x, flag, out = (np.zeros(2, np.uint32) for _ in range(3))
        if kernel is right:
            run(kernel, x, flag, out, grid=2, block=1, seed=seed)
            assert out[0] == 5
        else:
            caught("race", kernel, x, flag, out, grid=2, block=1, seed=seed)
