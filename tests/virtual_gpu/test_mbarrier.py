"""mbarrier of the virtual GPU (PTX ISA 9.7.13.15): phases, counts, transactions, what they order, and reports of misuse."""
import numpy as np
import pytest

from raw_ptx import Kernel, only, wait

MODES = pytest.mark.parametrize("seed, random_completion", [(0, False), (1, True), (2, False), (3, True)])


# ------------------------------------------------------------------------------------------------------------ a ring of stages
# Producer threads (the first 64) write x[round] to a stage, consumers (the other 64) add what another producer wrote. full at
# smem + 8 stage, empty at smem + 64 + 8 stage, stages of 64 words from smem + 128.

STAGES = 3
ARRIVE = {
    "every thread": (64, "mbarrier.arrive.shared::cta.b64 _, [{}];"),
    "with its state": (64, "mbarrier.arrive.release.cta.shared::cta.b64 state, [{}];"),
    "one of two, count 2": (64, "bar.warp.sync -1; and.b32 r, %t, 1; setp.eq.u32 p, r, 0;\n"
                                "@p mbarrier.arrive.shared::cta.b64 _, [{}], 2;"),
    "a warp, count 32": (64, "bar.warp.sync -1; setp.eq.u32 p, %lane, 0; @p mbarrier.arrive.shared::cta.b64 state, [{}], 32;"),
    "a warp, once": (2, "bar.warp.sync -1; setp.eq.u32 p, %lane, 0; @p mbarrier.arrive.release.cluster.shared::cta.b64 _, [{}];"),
}


def ring(arrive, how):
    count, arrive = ARRIVE[arrive]
    init = "\n".join(f"mbarrier.init.shared::cta.b64 [%smem+{at + 8 * s}], {count};" for s in range(STAGES) for at in (0, 64))
    return Kernel("x out rounds", f"""
.reg .b32 stage, phase, other, round, full, empty, at, v, sum, r, spin; .reg .b64 from, offset, state; .reg .pred p, producer;
mov.u32 stage, 0; mov.u32 phase, 0; mov.u32 round, 0; mov.u32 sum, 0;
{only("%t eq 0", init)}
bar.sync 0;
setp.lt.u32 producer, %t, 64;
LOOP:
shl.b32 r, stage, 3; add.u32 full, %smem, r; add.u32 empty, full, 64; mad.lo.u32 at, stage, 256, %smem;
@!producer bra CONSUME;
xor.b32 other, phase, 1;
{wait("empty", "other", how)}
mad.lo.u32 r, round, 64, %t; mul.wide.u32 offset, r, 4; add.u64 from, x, offset; ld.global.u32 v, [from];
mad.lo.u32 at, %t, 4, at; st.shared.u32 [at+128], v;
{arrive.format("full")}
bra NEXT;
CONSUME:
{wait("full", "phase", how)}
xor.b32 r, %t, 37; and.b32 r, r, 63; mad.lo.u32 at, r, 4, at;
ld.shared.u32 v, [at+128]; add.u32 sum, sum, v;
{arrive.format("empty")}
NEXT:
add.u32 stage, stage, 1; setp.eq.u32 p, stage, {STAGES}; @p xor.b32 phase, phase, 1; @p mov.u32 stage, 0;
add.u32 round, round, 1; setp.lt.u32 p, round, rounds; @p bra LOOP;
@producer ret;
mul.wide.u32 offset, %t, 4; add.u64 from, out, offset; st.global.u32 [from+-256], sum;
""", memory=128 + 256 * STAGES)


def run_ring(kernel, seed=0, random_completion=False, rounds=11):
    x = np.random.default_rng(seed).integers(0, 2**30, (rounds, 64), dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    kernel.run(x, out, np.uint32(rounds), seed=seed, random_completion=random_completion, block=128, written={1})
    np.testing.assert_array_equal(out, x.sum(0, dtype=np.uint32)[np.arange(64) ^ 37])


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["try_wait.parity", "test_wait.parity", "test_wait.parity.acquire.cluster"])
@pytest.mark.parametrize("arrive", ARRIVE)
def test_producers_and_consumers(arrive, how, seed):
    run_ring(ring(arrive, how), seed)


RING = ring("every thread", "try_wait.parity")
WAIT_FULL, WAIT_EMPTY, ARRIVE_FULL = wait("full", "phase"), wait("empty", "other"), ARRIVE["every thread"][1].format("full")
RING_BUGS = [  # name, edits, kind, where, text, in how many of 8 schedules at least
    ("no wait for data", (WAIT_FULL, ""), "race", "ld.shared.u32 v", "thread .*wrote", 2),
    ("no wait for space", (WAIT_EMPTY, ""), "race", "st.shared.u32 [at+128]", "read", 2),
    ("consumer's parity stays", ("@p xor.b32 phase, phase, 1;", "selp.u32 r, 1, 0, producer; @p xor.b32 phase, phase, r;"),
     "race", "ld.shared.u32 v", "", 1),
    ("producer's parity not inverted", (WAIT_EMPTY, wait("empty", "phase")), "deadlock", "[empty], phase", "polls near k.cu"),
    ("relaxed arrival", (ARRIVE_FULL, "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [full];"), "race", "ld.shared.u32 v", ""),
    ("relaxed wait", (WAIT_FULL, wait("full", "phase", "try_wait.parity.relaxed.cta")), "race", "ld.shared.u32 v", ""),
    ("more than pending", (ARRIVE_FULL, "mbarrier.arrive.shared::cta.b64 _, [full], 3;"), "mbarrier", "_, [full], 3;",
     "of 3 is more than the 1 of 64"),
    ("too few arrivals", (ARRIVE_FULL, "@p mbarrier.arrive.shared::cta.b64 _, [full];", "st.shared.u32 [at+128], v;",
                          "st.shared.u32 [at+128], v; setp.ne.u32 p, %t, 9;"),
     "deadlock", "[empty], other", "mbarrier at shared address 0 of block 0: phase 0 lacks 1 of 64 arrivals"),
    ("no barrier after init", ("bar.sync 0;", ""), "race|mbarrier", "[empty], other",
     "without a barrier between them|no initialised mbarrier", 1),
    ("never initialised", ("mbarrier.init.shared::cta.b64 [%smem+64], 64;", ""), "mbarrier", "[empty], other",
     "no initialised mbarrier at shared address 64"),
    ("initialised twice", ("[%smem+64], 64;", "[%smem+64], 64; mbarrier.init.shared::cta.b64 [%smem+64], 64;"), "mbarrier",
     "[%smem+64], 64", "inval comes before"),
    ("count 0", ("[%smem+64], 64;", "[%smem+64], round;"), "mbarrier", "[%smem+64], round", "count from 1 to 2.20 - 1, got 0"),
    ("count 2^20", ("[%smem+64], 64;", "[%smem+64], 1048576;"), "mbarrier", "[%smem+64], 1048576", "count from 1"),
    ("unaligned", ("[%smem+64], 64;", "[%smem+68], 64;"), "misaligned", "[%smem+68], 64", "multiple of 8"),
    ("overwritten", ("bra NEXT;", "setp.eq.u32 p, %t, 0; @p st.shared.u32 [%smem+64], 0;\nbra NEXT;"), "mbarrier",
     "[empty], other", "overwritten by .*thread 0"),
    ("overwritten above", ("bra NEXT;", "setp.eq.u32 p, %t, 0; @p st.shared.u32 [%smem+68], 0;\nbra NEXT;"), "mbarrier",
     "[empty], other", "overwritten by .*thread 0"),
    ("an undefined address", (ARRIVE_FULL, "mbarrier.arrive.shared::cta.b64 _, [spin];"), "uninitialised", "_, [spin];",
     "address of an mbarrier"),
    ("an undefined count", (ARRIVE_FULL, "mbarrier.arrive.shared::cta.b64 _, [full], spin;"), "uninitialised", "_, [full], spin;",
     "count of an mbarrier"),
    ("an arrival of 0", (ARRIVE_FULL, "mov.u32 r, 0; mbarrier.arrive.shared::cta.b64 _, [full], r;"), "mbarrier", "_, [full], r;",
     "count from 1"),
    ("invalidated", ("@producer ret;", "mbarrier.inval.shared::cta.b64 [%smem];\n@producer ret;"), "mbarrier|race",
     "mbarrier.inval", "no mbarrier to invalidate|no (barrier|__syncwarp) between"),
]


@pytest.mark.parametrize("bug", RING_BUGS, ids=[bug[0] for bug in RING_BUGS])
def test_misuse(bug):
    RING.edit(*bug[1]).caught(run_ring, *bug[2:])


# ---------------------------------------------------------------------------------------------- states, transactions, invalidation

# All threads arrive, keep the state and wait with it: a barrier. Two buffers, so that one barrier a round is enough.
STATES = Kernel("x out rounds", f"""
.reg .b32 round, at, v, sum, r; .reg .b64 state, offset, from; .reg .pred p;
mov.u32 sum, 0; mov.u32 round, 0;
{only("%t eq 0", "mbarrier.init.shared.b64 [%smem], 96;")}
bar.sync 0;
LOOP:
mad.lo.u32 r, round, 96, %t; mul.wide.u32 offset, r, 4; add.u64 from, x, offset; ld.global.u32 v, [from];
and.b32 at, round, 1; mad.lo.u32 at, at, 384, %smem; mad.lo.u32 r, %t, 4, at; st.shared.u32 [r+16], v;
mbarrier.arrive.shared.b64 state, [%smem];
{wait("%smem", "state", "test_wait")}
mad.lo.u32 r, %t, 7, round; rem.u32 r, r, 96; mad.lo.u32 r, r, 4, at; ld.shared.u32 v, [r+16]; add.u32 sum, sum, v;
add.u32 round, round, 1; setp.lt.u32 p, round, rounds; @p bra LOOP;
mul.wide.u32 offset, %t, 4; add.u64 from, out, offset; st.global.u32 [from], sum;
""", memory=16 + 2 * 384)


def run_states(kernel, seed=0, random_completion=False, rounds=9):
    x = np.random.default_rng(seed).integers(0, 2**30, (rounds, 96), dtype=np.uint32)
    out = np.zeros(96, np.uint32)
    kernel.run(x, out, np.uint32(rounds), seed=seed, random_completion=random_completion, block=96, written={1})
    wanted = sum(x[i][(np.arange(96) * 7 + i) % 96] for i in range(rounds))
    np.testing.assert_array_equal(out, wanted.astype(np.uint32))


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", ["test_wait", "try_wait", "try_wait.acquire.cta"])
def test_states(how, seed):
    run_states(STATES.edit(wait("%smem", "state", "test_wait"), wait("%smem", "state", how)), seed)


def test_state_of_an_older_phase_passes_at_once():
    """Waiting with the first state for ever is no barrier: the data race shows."""
    first = "setp.eq.u32 p, round, 0; @p mbarrier.arrive.shared.b64 state, [%smem]; @!p mbarrier.arrive.shared.b64 _, [%smem];"
    STATES.edit("mbarrier.arrive.shared.b64 state, [%smem];", first).caught(run_states, "race", "ld.shared.u32 v, [r+16]", "wrote")


# Thread 0 expects bytes, threads 32 and 64 complete them; data goes by the arrivals of those two.
COMPLETE_40 = "mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%smem], 40;"
ONE = "mbarrier.arrive.shared::cta.b64 _, [%smem];"
FIRST = only("%t eq 32", f"{ONE}\n{COMPLETE_40}")
SECOND = only("%t eq 64", f"mbarrier.complete_tx.shared::cta.b64 [%smem], 24;\n{ONE}")
WRITE = "st.shared.u32 [at+16], v;"
BYTES = Kernel("out", f"""
.reg .b32 v, at; .reg .b64 offset, to; .reg .pred p;
{only("%t eq 0", "mbarrier.init.shared::cta.b64 [%smem], 3;")}
bar.sync 0;
{only("%t eq 0", "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%smem], 48;")}
{only("%t eq 0", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%smem], 16;")}
{only("%lane eq 0", f"mad.lo.u32 at, %warp, 4, %smem; add.u32 v, %warp, 100; {WRITE}")}
{FIRST}
{SECOND}
setp.lt.u32 p, %t, 1; @p bra END;
{wait("%smem", "0")}
ld.shared.u32 v, [%smem+24];
ld.shared.u32 at, [%smem+20]; mad.lo.u32 v, v, 1000, at;
mul.wide.u32 offset, %t, 4; add.u64 to, out, offset; st.global.u32 [to], v;
END:
""", memory=32)


def run_bytes(kernel, seed=0, random_completion=False):
    out = np.zeros(96, np.uint32)
    kernel.run(out, seed=seed, random_completion=random_completion, block=96)
    np.testing.assert_array_equal(out, [0] + [102101] * 95)


@pytest.mark.on_silicon
@MODES
def test_transactions(seed, random_completion):
    run_bytes(BYTES, seed, random_completion)


BYTES_BUGS = [
    ("too many expected", ("_, [%smem], 16;", "_, [%smem], 32;"), "deadlock", "[%smem], 0;",
     "shared address 0 of block 0: phase 0 lacks 0 of 3 arrivals and 16 bytes"),
    ("too few completed", (COMPLETE_40, ""), "deadlock", "[%smem], 0;", "phase 0 lacks 0 of 3 arrivals and 40 bytes"),
    ("more than expected", (COMPLETE_40, COMPLETE_40 + COMPLETE_40), "deadlock", "[%smem], 0;",
     "lacks 0 of 3 arrivals and -40 bytes", 2),
    ("completion orders nothing", (WRITE, f"setp.ne.u32 p, %warp, 1; @p {WRITE}", COMPLETE_40, f"{WRITE} {COMPLETE_40}"), "race",
     "ld.shared.u32 at", "thread 32 "),
    ("nobody waits", (wait("%smem", "0"), "bra END;", "[%smem], 3;", "[%smem], 1;", FIRST, FIRST.replace(ONE, ""),
                      SECOND, SECOND.replace(ONE, "")), "mbarrier", "arrive.expect_tx", "nobody waited for the transactions", 2),
    ("out of range", ("[%smem], 48;", "[%smem], 2097152;"), "mbarrier", "[%smem], 2097152;", "leaves its range"),
    ("an undefined number", ("[%smem], 48;", "[%smem], v;"), "uninitialised", "[%smem], v;", "count of an mbarrier"),
]


@pytest.mark.parametrize("bug", BYTES_BUGS, ids=[bug[0] for bug in BYTES_BUGS])
def test_misuse_of_transactions(bug):
    BYTES.edit(*bug[1]).caught(run_bytes, *bug[2:])


# The same eight bytes are an mbarrier, data, and an mbarrier with another count.
REUSE = Kernel("out", f"""
.reg .b32 v; .reg .b64 offset, to; .reg .pred p;
{only("%t eq 0", "mbarrier.init.shared::cta.b64 [%smem], 64;")}
bar.sync 0;
mbarrier.arrive.shared::cta.b64 _, [%smem];
{wait("%smem", "0")}
bar.sync 0;
setp.eq.u32 p, %t, 0;
@p mbarrier.inval.shared::cta.b64 [%smem];
@p st.shared.u32 [%smem], 7; @p ld.shared.u32 v, [%smem];
@p mbarrier.init.shared::cta.b64 [%smem], 2;
bar.sync 0;
{only("%lane eq 0", "mbarrier.arrive.release.cta.shared::cta.b64 _, [%smem];")}
{wait("%smem", "0", "test_wait.parity")}
mul.wide.u32 offset, %t, 4; add.u64 to, out, offset; st.global.u32 [to], %t;
""")


def run_reuse(kernel, seed=0, random_completion=False):
    out = np.zeros(64, np.uint32)
    kernel.run(out, seed=seed, random_completion=random_completion, block=64)
    np.testing.assert_array_equal(out, np.arange(64))


def test_reuse_after_inval():
    for seed in range(4):
        run_reuse(REUSE, seed)
    inval, again = "@p mbarrier.inval.shared::cta.b64 [%smem];", "@p mbarrier.init.shared::cta.b64 [%smem], 2;"
    REUSE.edit(inval, "").caught(run_reuse, "mbarrier", again, "inval comes before")
    REUSE.edit(again, "").caught(run_reuse, "mbarrier", "arrive.release", "no initialised mbarrier", 2)
    REUSE.edit(inval, inval + inval).caught(run_reuse, "mbarrier", inval, "no mbarrier to invalidate")
    REUSE.edit("[%smem], 2;", "[%smem], 3;").caught(run_reuse, "deadlock", "test_wait.parity", "phase 0 lacks 1 of 3 arrivals")


# ------------------------------------------------------------------------------------------------------ cp.async and an mbarrier
# Every thread of warps 0 and 1 copies 16 bytes of x a round and lets the copies arrive; warps 2 and 3 read another thread's.

NOINC, INC = "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [full];", "cp.async.mbarrier.arrive.shared::cta.b64 [full];"
COPIES = Kernel("x out", f"""
.reg .b32 full, empty, at, v, w, sum, round, parity, r; .reg .b64 offset, from; .reg .pred p, producer;
mov.u32 full, %smem; add.u32 empty, %smem, 8; mov.u32 round, 0; mov.u32 sum, 0; setp.lt.u32 producer, %t, 64;
{only("%t eq 0", "mbarrier.init.shared::cta.b64 [full], 64; mbarrier.init.shared::cta.b64 [empty], 64;")}
bar.sync 0;
LOOP:
and.b32 parity, round, 1;
@!producer bra CONSUME;
xor.b32 parity, parity, 1;
{wait("empty", "parity")}
mad.lo.u32 at, %t, 16, %smem; mad.lo.u32 r, round, 64, %t; mul.wide.u32 offset, r, 16; add.u64 from, x, offset;
cp.async.ca.shared.global [at+16], [from], 8; cp.async.ca.shared.global [at+24], [from+8], 4;
cp.async.ca.shared.global [at+28], [from+12], 4, 0;
{NOINC}
bra NEXT;
CONSUME:
{wait("full", "parity")}
xor.b32 r, %t, 21; and.b32 r, r, 63; mad.lo.u32 at, r, 16, %smem;
ld.shared.v2.u32 {{v, w}}, [at+16]; add.u32 sum, sum, v; mad.lo.u32 sum, w, 3, sum;
ld.shared.v2.u32 {{v, w}}, [at+24]; mad.lo.u32 sum, v, 5, sum; mad.lo.u32 sum, w, 7, sum;
mbarrier.arrive.shared::cta.b64 _, [empty];
NEXT:
add.u32 round, round, 1; setp.lt.u32 p, round, 5; @p bra LOOP;
@producer bra END;
mul.wide.u32 offset, %t, 4; add.u64 from, out, offset; st.global.u32 [from+-256], sum;
END:
""", memory=16 + 1024)
WITH_INC = COPIES.edit(NOINC, f"{INC} mbarrier.arrive.shared::cta.b64 _, [full];")
GENERIC = COPIES.edit(
    NOINC, "cvt.u64.u32 offset, full; cvta.shared.u64 offset, offset; cp.async.mbarrier.arrive.noinc.b64 [offset];")


def run_copies(kernel, seed=0, random_completion=False, fresh=()):
    x = np.random.default_rng(seed).integers(0, 2**30, (5, 64, 4), dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    kernel.run(x, out, seed=seed, random_completion=random_completion, block=128, written={1}, fresh=fresh)
    np.testing.assert_array_equal(out, (x * np.array([1, 3, 5, 0], np.uint32)).sum((0, 2), dtype=np.uint32)[np.arange(64) ^ 21])


@pytest.mark.on_silicon
@pytest.mark.parametrize("random_completion", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kernel", [COPIES, WITH_INC, GENERIC], ids=["noinc", "inc and an arrival", "generic address"])
def test_copies_arrive(kernel, seed, random_completion):
    run_copies(kernel, seed, random_completion)


def test_copies_and_misuse():
    early = COPIES.edit(wait("full", "parity"), "")
    early.caught(run_copies, "in-flight|race", "{v, w}, [at+16]", "the copy|no barrier between", 2)
    # The pending count goes up by one, and the arrival of the copies takes it back: the phase never ends.
    COPIES.edit(NOINC, INC).caught(run_copies, "deadlock", wait("empty", "parity"), "phase 0 lacks 64 of 64 arrivals")
    for random_completion in (False, True):  # what is copied is as undefined as its source
        run = lambda k, seed: run_copies(k, seed, random_completion, {0})  # noqa: E731, B023
        COPIES.caught(run, "uninitialised", "st.global.u32", "reaches global memory")
    ordinary = COPIES.edit(NOINC, "mbarrier.arrive.shared::cta.b64 _, [full];")
    ordinary.caught(run_copies, "in-flight", "{v, w}, [at+16]", "the copy at k.cu")


# Two stages: the copies before the second arrival are those of both.
TWO_STAGES = Kernel("x out", f"""
.reg .b32 one, two, at, v, w; .reg .b64 offset, from;
add.u32 one, %smem, 1024; add.u32 two, %smem, 1032;
{only("%t eq 0", "mbarrier.init.shared::cta.b64 [one], 64; mbarrier.init.shared::cta.b64 [two], 64;")}
bar.sync 0;
mad.lo.u32 at, %t, 4, %smem; mul.wide.u32 offset, %t, 4; add.u64 from, x, offset;
cp.async.ca.shared.global [at], [from], 4;
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [one];
cp.async.ca.shared.global [at+256], [from+256], 4;
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [two];
xor.b32 at, %t, 21; mad.lo.u32 at, at, 4, %smem;
{wait("one", "0")} // one
ld.shared.u32 v, [at];
{wait("two", "0")} // two
ld.shared.u32 w, [at+256];
mad.lo.u32 v, w, 3, v; add.u64 from, out, offset; st.global.u32 [from], v;
""", memory=1040)


def run_stages(kernel, seed=0, random_completion=False):
    x, out = np.random.default_rng(seed).integers(0, 2**30, (2, 64), dtype=np.uint32), np.zeros(64, np.uint32)
    kernel.run(x, out, seed=seed, random_completion=random_completion, block=64, written={1})
    np.testing.assert_array_equal(out, (x[0] + 3 * x[1])[np.arange(64) ^ 21])


@pytest.mark.on_silicon
@pytest.mark.parametrize("random_completion", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_two_stages_of_copies(seed, random_completion):
    run_stages(TWO_STAGES, seed, random_completion)
    first, second = wait("one", "0") + " // one\nld.shared.u32 v, [at];", wait("two", "0") + " // two"
    late = TWO_STAGES.edit(first, "", second, second + "\nld.shared.u32 v, [at];")  # the second wait is enough
    run_stages(late, seed, random_completion)


def test_one_stage_of_copies_is_not_waited_for():
    TWO_STAGES.edit(wait("two", "0") + " // two", "").caught(run_stages, "in-flight|race", "ld.shared.u32 w", "the copy|no barrier between", 2)
