"""Barriers of a block on the virtual GPU, and order between blocks through flags, tickets and fences: what is correct passes under
every schedule, what is not is reported."""
import re

import numpy as np
import pytest

from raw_ptx import caught, run, twins

SHARED = ".shared .align 16 .b8 s[4096];"
OWN = "mov.u32 %r9, s; mad.lo.u32 %r9, %t, 4, %r9;\n"


def numbers(*shape):
    return np.random.default_rng(0).integers(0, 2**31, shape, np.uint32)


# ---------------------------------------------------------------------------------------------------------------- barriers

# %r1 in, %r2 out: from another thread of the block. Name: (exchange, partner of each thread, threads of the block).
THREADS = np.arange(128)
EXCHANGES = {
    "bar.sync": ("st.shared.u32 [%r9], %r1; bar.sync 0; mov.u32 %r8, s; sub.u32 %r7, 127, %t; mad.lo.u32 %r8, %r7, 4, %r8; "
                 "ld.shared.u32 %r2, [%r8];", 127 - THREADS),
    "barrier.sync": ("st.shared.u32 [%r9], %r1; barrier.sync 3; xor.b32 %r8, %r9, 256; ld.shared.u32 %r2, [%r8];", THREADS ^ 64),
    "barrier.sync.aligned": ("st.shared.u32 [%r9], %r1; barrier.sync.aligned 3, 128; xor.b32 %r8, %r9, 256; "
                             "ld.shared.u32 %r2, [%r8];", THREADS ^ 64),
    "barrier.cta.sync": ("st.shared.u32 [%r9], %r1; barrier.cta.sync 15; xor.b32 %r8, %r9, 256; ld.shared.u32 %r2, [%r8];",
                         THREADS ^ 64),
    "pairs_of_warps": ("shr.u32 %r6, %warp, 1; add.u32 %r6, %r6, 1; st.shared.u32 [%r9], %r1; bar.sync %r6, 64; "
                       "xor.b32 %r8, %r9, 128; ld.shared.u32 %r2, [%r8];", THREADS ^ 32),
    "pairs_of_warps_count_in_a_register": (
        "and.b32 %r6, %warp, 1; add.u32 %r6, %r6, 7; mov.u32 %r5, 64; st.shared.u32 [%r9], %r1; bar.sync %r6, %r5; "
        "xor.b32 %r8, %r9, 256; ld.shared.u32 %r2, [%r8];", THREADS ^ 64),
    "unaligned_in_arms": ("st.shared.u32 [%r9], %r1; setp.lt.u32 %p1, %lane, 7; @%p1 bra A;\nbarrier.sync 0; bra B;\n"
                          "A: barrier.sync 0;\n"
                          "B: xor.b32 %r8, %r9, 128; ld.shared.u32 %r2, [%r8];", THREADS ^ 32),
    "twice": ("mov.u32 %r2, %r1; mov.u32 %r10, 0;\nL: xor.b32 %r8, %r9, 128; st.shared.u32 [%r9], %r2; bar.sync 0; "
              "ld.shared.u32 %r3, [%r8]; bar.sync 0;\n"
              "add.u32 %r2, %r3, 1; add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, 8; @%p1 bra L;\n"
              "sub.u32 %r2, %r2, 8; st.shared.u32 [%r9], %r2; bar.sync 0; ld.shared.u32 %r2, [%r8];",
              THREADS ^ 32),
}
BARRIERS = {"unaligned_in_arms": 2, "twice": 17}  # that a warp executes, if not one; its lanes in arms do so apart


@pytest.mark.on_silicon
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_exchange(exchange):
    body, partner = EXCHANGES[exchange]
    for seed in range(10):
        source, out = numbers(3, 128), np.zeros((3, 128), np.uint32)
        counters = run(OWN + f"ld.global.u32 %r1, [%x0]; {body} st.global.u32 [%x1], %r2;", source, out, grid=3, block=128,
                       variables=SHARED, seed=seed)
        np.testing.assert_array_equal(out, source[:, partner])
        assert counters is None or counters["barriers"] == 3 * 4 * BARRIERS.get(exchange, 1)


@pytest.mark.on_silicon
@pytest.mark.parametrize("threads", (1, 31, 33, 40, 95, 127))
def test_a_last_warp_that_is_not_full(threads):
    """It counts as a whole warp at a barrier; a reduction counts threads."""
    for seed in range(5):
        source, out = numbers(threads), np.zeros((5, threads), np.uint32)
        run(OWN + f"""ld.global.u32 %r1, [%x0]; st.shared.u32 [%r9], %r1; bar.sync 0;
            mov.u32 %r7, s; sub.u32 %r8, {threads - 1}, %t; mad.lo.u32 %r8, %r8, 4, %r7; ld.shared.u32 %r2, [%r8];
            st.global.u32 [%x1], %r2; and.b32 %r3, %r1, 1; setp.eq.u32 %p1, %r3, 1; setp.lt.u32 %p2, %t, 1000;
            bar.red.popc.u32 %r4, 0, %p1; add.s64 %x1, %x1, {4 * threads}; st.global.u32 [%x1], %r4;
            bar.red.popc.u32 %r4, 0, !%p1; add.s64 %x1, %x1, {4 * threads}; st.global.u32 [%x1], %r4;
            bar.red.and.pred %p3, 0, %p2; selp.u32 %r4, 1, 0, %p3; add.s64 %x1, %x1, {4 * threads}; st.global.u32 [%x1], %r4;
            bar.red.or.pred %p3, 1, {(threads + 31) // 32 * 32}, !%p2; selp.u32 %r4, 1, 0, %p3;
            add.s64 %x1, %x1, {4 * threads}; st.global.u32 [%x1], %r4;""", source, out, block=threads, variables=SHARED, seed=seed)
        odd = int((source & 1).sum())
        np.testing.assert_array_equal(out, [source[::-1], *(threads * [n] for n in (odd, threads - odd, 1, 0))])


@pytest.mark.on_silicon
@pytest.mark.parametrize("kind", ("and", "or", "popc"))
def test_reductions(kind):
    """Of a block's thread values: none, one, all but one, all, some."""
    t = np.arange(96)
    for which in (t < 0, t == 70, t != 5, t >= 0, t % 3 == 0):
        source, out = which.astype(np.uint32), np.zeros(96, np.uint32)
        into = "bar.red.popc.u32 %r2, 2, %p1;"
        if kind != "popc":
            into = f"bar.red.{kind}.pred %p2, 2, 96, %p1; selp.u32 %r2, 1, 0, %p2;"
        run(f"ld.global.u32 %r1, [%x0]; setp.ne.u32 %p1, %r1, 0; {into} st.global.u32 [%x1], %r2;", source, out, block=96)
        assert set(out) == {{"and": which.all(), "or": which.any(), "popc": which.sum()}[kind]}


def test_a_reduction_in_two_arms():
    """An unaligned one, with registers of its own in each arm."""
    for seed in range(5):
        out = np.zeros(64, np.uint32)
        run("""setp.lt.u32 %p1, %lane, 20; setp.ge.u32 %p2, %t, 10; setp.lt.u32 %p3, %t, 60; @%p1 bra A;
            barrier.red.popc.u32 %r1, 1, %p3; add.u32 %r1, %r1, 100; st.global.u32 [%x0], %r1; bra B;
            A: barrier.red.popc.u32 %r2, 1, %p2; add.u32 %r2, %r2, 200; st.global.u32 [%x0], %r2;
            B:""", out, block=64, seed=seed)
        t = np.arange(64)
        first = t % 32 < 20
        np.testing.assert_array_equal(out, np.where(first, 200, 100) + (t[first] >= 10).sum() + (t[~first] < 60).sum())


@pytest.mark.on_silicon
@pytest.mark.parametrize("late", (False, True))
def test_warps_that_exit_early(late):
    """A barrier of the whole block does without them, also when they leave after the others have arrived."""
    delay = "mov.u32 %r8, 300;\nL: sub.u32 %r8, %r8, 1; setp.ne.u32 %p2, %r8, 0; @%p2 bra L;\n" if late else ""
    for seed in range(10):
        source, out = numbers(128), np.zeros(128, np.uint32)
        run(OWN + f"setp.lt.u32 %p1, %t, 64; @%p1 bra A;\n{delay} exit;\n"
            f"A: ld.global.u32 %r1, [%x0]; st.shared.u32 [%r9], %r1; bar.sync 0; xor.b32 %r8, %r9, 128;\n"
            "ld.shared.u32 %r2, [%r8]; st.global.u32 [%x1], %r2;", source, out, block=128, variables=SHARED, seed=seed)
        np.testing.assert_array_equal(out[:64], source[THREADS[:64] ^ 32])


PIPE = OWN + """setp.ge.u32 %p1, %t, 32; mov.u32 %r2, 0; mov.u32 %r3, 0; @%p1 bra CONSUMER;
PRODUCER: and.b32 %r4, %r2, 1; mad.lo.u32 %r5, %r4, 128, %r9; mad.lo.u32 %r6, %r2, 100, %t;
add.u32 %r7, %r4, 1; add.u32 %r8, %r4, 3; setp.lt.u32 %p2, %r2, 2;
<<st.shared.u32 [%r5], %r6; // caught|>>
@!%p2 bar.sync %r8, 64;
<<|st.shared.u32 [%r5], %r6;>>
bar.arrive %r7, 64; add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 6; @%p2 bra PRODUCER;
exit;
CONSUMER: and.b32 %r4, %r2, 1; add.u32 %r7, %r4, 1; add.u32 %r8, %r4, 3;
xor.b32 %r5, %r9, 140; mad.lo.u32 %r5, %r4, 128, %r5; setp.lt.u32 %p2, %r2, 4;
bar.sync %r7, 64; ld.shared.u32 %r6, [%r5]; // caught
add.u32 %r3, %r3, %r6; @%p2 bar.arrive %r8, 64;
add.u32 %r2, %r2, 1; setp.lt.u32 %p2, %r2, 6; @%p2 bra CONSUMER;
st.global.u32 [%x0], %r3;"""


def test_producer_and_consumer():
    """Two buffers go to and fro with bar.arrive and bar.sync; planted: a buffer is filled before it is waited for."""
    wrong, right = twins(PIPE)
    for seed in range(10):
        out = np.zeros(64, np.uint32)
        run(right, out, block=64, variables=SHARED, seed=seed)
        np.testing.assert_array_equal(out, np.r_[32 * [0], sum(100 * i + (np.arange(32) ^ 3) for i in range(6))])
        caught("race", wrong, out, block=64, variables=SHARED, seed=seed)


# ------------------------------------------------------------------------------------------------------------ planted bugs

WRITE = OWN + "st.shared.u32 [%r9], %t; // caught\n"
READ = "\nxor.b32 %r9, %r9, 128; ld.shared.u32 %r2, [%r9]; // caught"
FIRST = "setp.lt.u32 %p1, %t, 32;\n"
PLANTED = {
    "missing": ("race", WRITE + "<<//|>> bar.sync 0;" + READ),
    "barriers_of_other_numbers": ("race", WRITE + "add.u32 %r3, %warp, 1; bar.sync <<%r3, 32|1, 64>>;" + READ),
    "too_few_threads": ("race", WRITE + "bar.sync 1, <<32|64>>;" + READ),
    "arrive_does_not_wait": ("race", WRITE + "bar.arrive 1, 128; <<//|>> bar.sync 2;" + READ + "\nbar.sync 1, 128;",
                             dict(also=[("barrier", 3)], skip_right=True)),
    "nobody_comes": ("deadlock", FIRST + "@!%p1 bra B;\nbar.sync 1, <<64|32>>; // caught\nB:"),
    "more_threads_than_the_block_has": ("deadlock", "bar.sync 1, <<96|64>>; // caught"),
    "count_of_another_arrival": ("barrier", FIRST + "@%p1 bra A;\nbar.sync 1, 64; // caught\nbra B;\n"
                                 "A: bar.sync 1, <<96|64>>; // caught\nB:", dict(also=[("deadlock", 3), ("deadlock", 5)])),
    "count_and_no_count": ("barrier", FIRST + "@%p1 bra A;\nbar.sync 1, 64; // caught\nbra B;\n"
                           "A: bar.sync 1<<|, 64>>; // caught\nB:", dict(also=[("deadlock", 3), ("deadlock", 5)])),
    "count_that_is_not_whole_warps": ("barrier", "mov.u32 %r1, <<48|64>>;\nbar.sync 1, %r1; // caught"),
    "barrier_16": ("barrier", "mov.u32 %r1, <<16|15>>;\nbar.sync %r1; // caught"),
    "arrivals_that_nobody_waits_for": ("barrier", FIRST + "@!%p1 bra B;\nbar.arrive 1, <<64|32>>; // caught\nB:"),
    "undefined_number": ("uninitialised", "<<//|>> mov.u32 %r1, 1;\nbar.sync %r1; // caught", dict(also=[("barrier", 2)])),
    "undefined_value_in_a_reduction": ("uninitialised", "<<//|>> mov.u32 %r1, 1;\nsetp.eq.u32 %p1, %r1, 1;\n"
                                       "bar.red.popc.u32 %r2, 0, %p1; // caught"),
    "arms": ("divergent-collective", "setp.lt.u32 %p1, %lane, <<16|0>>; @%p1 bra A;\nbar.sync 0; // caught\nbra B;\n"
             "A: bar.sync 0; // caught\nB:"),
    "half_a_warp": ("divergent-collective", "setp.lt.u32 %p1, %lane, <<16|32>>; @!%p1 bra B;\nbar.sync 0; // caught\n"
                    "B: bar.warp.sync -1; // caught"),
    "half_a_warp_behind_an_exit": ("divergent-collective", "setp.lt.u32 %p1, %t, <<48|32>>; @!%p1 exit;\nbar.sync 0; // caught"),
    "half_a_warp_before_an_exit": ("divergent-collective", "setp.lt.u32 %p1, %t, <<48|32>>; @%p1 bra A;\nmov.u32 %r8, 300;\n"
                                   "L: sub.u32 %r8, %r8, 1; setp.ne.u32 %p2, %r8, 0; @%p2 bra L;\n"
                                   "exit;\nA: bar.sync 0; // caught"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_bugs(case):
    kind, body, *options = PLANTED[case]
    options = dict(block=64, variables=SHARED) | (options[0] if options else {})
    skip_right = options.pop("skip_right", False)
    wrong, right = twins(body)
    for seed in range(5):
        reports = caught(kind, wrong, seed=seed, **options)
        assert kind != "deadlock" or re.search(r"waits at k\.cu:\d+: bar", reports[0]["text"])
        if not skip_right:
            run(right, seed=seed, **{k: v for k, v in options.items() if k != "also"})


# ---------------------------------------------------------------------------------------------------------- between blocks

# The block that draws the last ticket adds up what the others have stored. Argument 0: a word a block; 1: the ticket; 2: the sum.
TICKET = """setp.ne.u32 %p1, %t, 0; @%p1 exit;
mul.wide.u32 %l1, %b, 4; add.s64 %l1, %l1, %a0; add.u32 %r1, %b, 10; st.global.u32 [%l1], %r1;
{release}
atom{order}.global.inc.u32 %r2, [%a1], 5; setp.ne.u32 %p1, %r2, 5; @%p1 exit;
{acquire}
mov.u64 %l1, %a0; mov.u32 %r3, 0; mov.u32 %r4, 0;
L: ld.global.u32 %r5, [%l1]; // caught
add.u32 %r3, %r3, %r5; add.s64 %l1, %l1, 4; add.u32 %r4, %r4, 1; setp.lt.u32 %p1, %r4, 6; @%p1 bra L;
st.global.u32 [%a2], %r3;"""
TICKETS = {  # before the ticket, its qualifier, behind it, whether that is correct
    "fences": ("membar.gl;", "", "membar.gl;", True),
    "wider_fences": ("membar.sys;", "", "fence.sc.sys;", True),
    "fence.acq_rel": ("fence.acq_rel.gpu;", ".relaxed.gpu", "fence.acq_rel.gpu;", True),
    "acq_rel": ("", ".acq_rel.gpu", "", True),
    "fence_and_acquire": ("membar.gl;", ".acquire.gpu", "", True),
    "release_and_fence": ("", ".release.gpu", "membar.gl;", True),
    "no_fence": ("", "", "", False),
    "fence_before_only": ("membar.gl;", "", "", False),
    "fence_behind_only": ("", "", "membar.gl;", False),
    "release_only": ("", ".release.gpu", "", False),
    "acquire_only": ("", ".acquire.gpu", "", False),
    "fence_of_a_block_before": ("membar.cta;", "", "membar.gl;", False),
    "fence_of_a_block_behind": ("membar.gl;", "", "membar.cta;", False),
    "acq_rel_of_a_block": ("", ".acq_rel.cta", "", False),
    "release_of_a_block": ("", ".release.cta", "membar.gl;", False),
    "acquire_of_a_block": ("membar.gl;", ".acquire.cta", "", False),
}


@pytest.mark.parametrize("case", TICKETS)
def test_the_last_block_adds_up(case):
    """Whatever the schedule, a missing fence leaves the last block's loads unordered: it is caught in every one."""
    release, order, acquire, correct = TICKETS[case]
    body = TICKET.format(release=release, order=order, acquire=acquire)
    if ".cta" in order:  # an atomic of block scope on a word of several blocks is a race itself
        body = body.replace("exit;\n" + acquire, "exit; // caught\n" + acquire)
    for seed in range(20):
        args = [np.zeros(6, np.uint32), np.zeros(1, np.uint32), np.zeros(1, np.uint32)]
        if correct:
            run(body, *args, grid=6, seed=seed, fresh={0, 2})
            assert args[2][0] == 75
        else:
            caught("race", body, *args, grid=6, seed=seed, fresh={0, 2})


# Block 0 hands 32 words to block 1 with a flag.
FLAG = """setp.eq.u32 %p1, %b, 1; setp.eq.u32 %p2, %t, 0; @%p1 bra WAIT;
st.global.u32 [%x0], %t; // caught
{publish}
exit;
WAIT: {wait}
mad.wide.u32 %l1, %t, 4, %a0; ld.global.u32 %r1, [%l1]; add.u32 %r1, %r1, 1; st.global.u32 [%l1+128], %r1; // caught"""
SPIN = "L: ld.{}.global.u32 %r2, [%a1]; setp.eq.u32 %p3, %r2, 0; @%p3 bra L;"
ONE = "@!%p2 bra M;\n" + SPIN.format("acquire.gpu") + "\nM: bar.sync 0;"
VOLATILE_ONE = "@!%p2 bra M;\n" + SPIN.format("volatile") + "\nM: bar.sync 0;"
FLAGS = {
    "release_acquire": ("bar.warp.sync -1; @%p2 st.release.gpu.global.u32 [%a1], 1;", SPIN.format("acquire.gpu"), True),
    "volatile_and_fences": ("bar.sync 0; membar.gl; @%p2 st.volatile.global.u32 [%a1], 1;",
                            SPIN.format("volatile") + " membar.gl;", True),
    "one_thread_waits": ("bar.sync 0; @%p2 st.release.gpu.global.u32 [%a1], 1;", ONE, True),
    "one_thread_waits_with_naps": ("bar.sync 0; @%p2 st.release.gpu.global.u32 [%a1], 1;",
                                   ONE.replace("setp", "nanosleep.u32 40; setp"), True),
    "exchange": ("bar.sync 0; membar.gl; @%p2 atom.global.exch.b32 %r3, [%a1], 1;",
                 "L: atom.global.or.b32 %r2, [%a1], 0; setp.eq.u32 %p3, %r2, 0; @%p3 bra L;\nmembar.gl;", True),
    # All fence what they wrote and meet, one sets the flag; one sees it, they meet, all fence.
    "all_fence_and_meet": ("membar.gl; bar.sync 0; @%p2 st.volatile.global.u32 [%a1], 1;", VOLATILE_ONE + " membar.gl;", True),
    "all_meet_behind": ("membar.gl; bar.sync 0; @%p2 st.volatile.global.u32 [%a1], 1;", VOLATILE_ONE, False),
    "all_meet_before": ("bar.sync 0; @%p2 st.volatile.global.u32 [%a1], 1;", VOLATILE_ONE + " membar.gl;", False),
    "no_barrier_before_the_flag": ("@%p2 st.release.gpu.global.u32 [%a1], 1;", SPIN.format("acquire.gpu"), False),
    "relaxed_store": ("bar.sync 0; @%p2 st.relaxed.gpu.global.u32 [%a1], 1;", SPIN.format("acquire.gpu"), False),
    "relaxed_load": ("bar.sync 0; @%p2 st.release.gpu.global.u32 [%a1], 1;", SPIN.format("relaxed.gpu"), False),
    "load_of_a_block": ("bar.sync 0; @%p2 st.release.gpu.global.u32 [%a1], 1;",
                        SPIN.format("acquire.cta") + " // caught", False),
    "flag_first": ("@%p2 st.release.gpu.global.u32 [%a1], 1; bar.sync 0;", SPIN.format("acquire.gpu"), False),
    "no_wait": ("bar.sync 0; @%p2 st.release.gpu.global.u32 [%a1], 1;", "", False),
    # A failed cas writes nothing, so it publishes nothing.
    "failed_cas": ("bar.sync 0; membar.gl; @%p2 atom.global.cas.b32 %r3, [%a1], 5, 1;",
                   "ld.acquire.gpu.global.u32 %r2, [%a1];", False),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_between_blocks(case):
    publish, wait, correct = FLAGS[case]
    body = FLAG.format(publish=publish, wait=wait)
    if case == "load_of_a_block":
        body = body.replace("1;\nexit", "1; // caught\nexit")
    for seed in range(10):
        data, flag = np.zeros(64, np.uint32), np.zeros(1, np.uint32)
        if correct:
            run(body, data, flag, grid=2, seed=seed, fresh={0})
            np.testing.assert_array_equal(data, np.r_[:32, 1:33])
        else:
            lines = body.split("\n")
            caught("race", body, data, flag, grid=2, seed=seed, fresh={0},
                   also=[("uninitialised", n) for n, line in enumerate(lines, 1) if "%l1+128" in line])


def test_a_store_ends_a_release_sequence():
    """Block 1 changes the flag that block 0 released, block 2 waits for that: what block 0 did is known behind an atomic only."""
    wait = "L{0}: ld.relaxed.gpu.global.u32 %r1, [%a1]; setp.ne.u32 %p3, %r1, {0}; @%p3 bra L{0};"
    wrong, right = twins(f"""setp.eq.u32 %p1, %b, 1; @%p1 bra SECOND; setp.eq.u32 %p1, %b, 2; @%p1 bra THIRD;
        st.global.u32 [%a0], 5; st.release.gpu.global.u32 [%a1], 1; exit;
        SECOND: {wait.format(1)}
        <<st.relaxed.gpu.global.u32 [%a1], 2|red.relaxed.gpu.global.add.u32 [%a1], 1>>; exit;
        THIRD: {wait.format(2)} ld.acquire.gpu.global.u32 %r1, [%a1];
        ld.global.u32 %r1, [%a0]; st.global.u32 [%a0+4], %r1; // caught""")
    for seed in range(5):
        caught("race", wrong, np.zeros(2, np.uint32), np.zeros(1, np.uint32), grid=3, block=1, seed=seed)
        run(right, data := np.zeros(2, np.uint32), np.zeros(1, np.uint32), grid=3, block=1, seed=seed)
        assert list(data) == [5, 5]


@pytest.mark.parametrize("order", ("release", "relaxed"))
def test_flags_within_a_cluster(order):
    """Block 1 hands a word to block 0 in the shared memory of block 0."""
    body = f"""setp.eq.u32 %p2, %b, 1; st.shared.u32 [s], 0; barrier.cluster.arrive; barrier.cluster.wait; @%p2 bra SEND;
        L: ld.acquire.cluster.shared.u32 %r1, [s]; setp.eq.u32 %p3, %r1, 0; @%p3 bra L;
        ld.shared.u32 %r2, [s+4]; st.global.u32 [%a0], %r2; bra END; // caught
        SEND: mov.u32 %r3, s; mapa.shared::cluster.u32 %r4, %r3, 0;
        st.shared::cluster.u32 [%r4+4], 55; st.{order}.cluster.shared::cluster.u32 [%r4], 1;
        END: barrier.cluster.arrive; barrier.cluster.wait;"""
    for seed in range(10):
        out = np.zeros(1, np.uint32)
        options = dict(grid=2, block=1, cluster=(2,), arch=90, seed=seed, variables=SHARED)
        if order == "release":
            run(body, out, **options)
            assert out[0] == 55
        else:
            caught("race", body, out, **options)


def test_locks_within_a_warp():
    """Lanes of one warp take a lock in turn: each of them goes on, whatever the others wait for."""
    body = """L: atom.acquire.gpu.global.cas.b32 %r1, [%a0], 0, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra L;
        ld.global.u32 %r2, [%a0+4]; add.u32 %r2, %r2, %t; <<st.global.u32 [%a0+4], %r2; // caught
        |st.global.u32 [%a0+4], %r2;
        >> atom<<.relaxed|.release>>.gpu.global.exch.b32 %r3, [%a0], 0;"""
    wrong, right = twins(body)
    wrong = wrong.replace("%t; st", "%t; // caught\nst")
    for seed in range(10):
        x = np.zeros(2, np.uint32)
        run(right, x, grid=2, block=64, seed=seed)
        assert list(x) == [0, 2 * 2016]
        caught("race", wrong, x, grid=2, block=64, seed=seed)


@pytest.mark.parametrize("wait", ("", "nanosleep.u32 100;"))
def test_a_spin_that_never_ends(wait):
    for seed in range(5):
        x = np.zeros(2, np.uint32)
        reports = caught("deadlock", f"setp.eq.u32 %p1, %b, 0; @%p1 exit;\nL: ld.acquire.gpu.global.u32 %r1, [%a0]; "
                         f"{wait} setp.eq.u32 %p2, %r1, 0; @%p2 bra L; // caught", x, grid=2, seed=seed)
        assert "block (1,0,0) warp 0 polls near k.cu:2" in reports[0]["text"]


def test_blocks_that_are_not_resident_cannot_be_waited_for():
    """The first block waits for the last: there is room for all of them on four multiprocessors, not on one."""
    body = """setp.eq.u32 %p1, %b, 15; setp.eq.and.u32 %p1, %t, 0, %p1; @%p1 st.release.gpu.global.u32 [%a0], 1;
        L: ld.acquire.gpu.global.u32 %r1, [%a0]; setp.eq.u32 %p2, %r1, 0; @%p2 bra L; // caught"""
    for seed in range(5):
        run(body, np.zeros(1, np.uint32), grid=16, seed=seed)
        caught("deadlock", body, np.zeros(1, np.uint32), grid=16, seed=seed, options=dict(sm_count=1))
