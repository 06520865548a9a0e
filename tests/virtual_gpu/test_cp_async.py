"""cp.async of the virtual GPU: sizes, zero fill and groups, with copies that complete as late as they may or at random moments; and
what goes wrong with them."""
import numpy as np
import pytest

import vgpu
from raw_ptx import caught, kernel, run, twins

RNG = np.random.default_rng(0)
SHARED = ".shared .align 16 .b8 s[2048];"
MODES = pytest.mark.parametrize("random_completion", (False, True), ids=("late", "random"))
HERE = "mov.u32 %r9, s; mad.lo.u32 %r9, %t, 16, %r9;\n"       # %r9: the thread's 16 bytes of s
STORE = " ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r9]; st.global.v4.u32 [%y1], {%r1, %r2, %r3, %r4};"


# ----------------------------------------------------------------------------------------------------------------- results


@pytest.mark.on_silicon
@MODES
@pytest.mark.parametrize("kind, size", (("ca ", 4), ("ca ", 8), ("ca ", 16), ("cg ", 16), ("cg .L2::128B", 16), ("ca .L2::64B", 4)))
def test_sizes_and_zero_fill(kind, size, random_completion):
    """With and without the number of bytes to read, which may be anything up to the size; the rest becomes zero and is defined."""
    for seed in range(3):
        source, out = RNG.integers(0, 256, (64, 16), np.uint8), np.zeros((64, 16), np.uint8)
        read = np.resize(np.arange(size + 1, dtype=np.uint32), 64)
        for argument in ("", ", %r5"):
            counters = run(HERE + f"""ld.global.u32 %r5, [%x2]; st.shared.v4.u32 [%r9], {{-1, -1, -1, -1}};
                cp.async.{kind.replace(" ", ".shared.global")} [%r9], [%y0], {size}{argument};
                cp.async.commit_group; cp.async.wait_group 0; {STORE}""", source, out, read, block=64, variables=SHARED, seed=seed,
                           random_completion=random_completion, written={1})
            wanted = np.full((64, 16), 255, np.uint8)
            count = read if argument else np.full(64, size)
            wanted[:, :size] = np.where(np.arange(size) < count[:, None], source[:, :size], 0)
            np.testing.assert_array_equal(out, wanted)
            assert counters is None or counters["async_load_bytes"] == count.sum()


@MODES
def test_nothing_is_read_where_the_size_is_zero(random_completion):
    """The address may lie outside of every array then."""
    source, out = RNG.integers(0, 256, (16, 16), np.uint8), np.full((32, 16), 9, np.uint8)
    run(HERE + "setp.lt.u32 %p1, %t, 16; selp.u32 %r5, 16, 0, %p1; cp.async.cg.shared.global [%r9], [%y0], 16, %r5; "
        "cp.async.wait_all;" + STORE,
        source, out, variables=SHARED, random_completion=random_completion)
    np.testing.assert_array_equal(out, np.r_[source, 0 * source])


@pytest.mark.on_silicon
@MODES
@pytest.mark.parametrize("kind, size", (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)))
@pytest.mark.parametrize("negated", ("", "!"))
def test_sources_that_are_ignored(negated, kind, size, random_completion):
    """By a predicate: zeros are written and nothing is read. The address may lie outside of every array then."""
    source, out = RNG.integers(1, 256, (16, 16), np.uint8), np.zeros((32, 16), np.uint8)
    counters = run(HERE + f"""st.shared.v4.u32 [%r9], {{-1, -1, -1, -1}}; setp.{"lt" if negated else "ge"}.u32 %p1, %t, 16;
        cp.async.{kind}.shared.global [%r9], [%y0], {size}, {negated}%p1; cp.async.wait_all;""" + STORE,
                   source, out, variables=SHARED, random_completion=random_completion, written={1})
    wanted = np.full((32, 16), 255, np.uint8)
    wanted[:16, :size], wanted[16:, :size] = source[:, :size], 0
    np.testing.assert_array_equal(out, wanted)
    assert counters is None or counters["async_load_bytes"] == 16 * size


@MODES
def test_an_ignored_source_may_be_written(random_completion):
    """It is not read: neither in flight nor a race."""
    source, out = RNG.integers(0, 256, (64, 16), np.uint8), np.full((64, 16), 9, np.uint8)
    run(HERE + "setp.eq.u32 %p1, %t, %t; sub.s64 %l1, %y0, %a0; xor.b64 %l1, %l1, 512; add.s64 %l1, %l1, %a0;"
        "cp.async.cg.shared.global [%r9], [%y0], 16, %p1; st.global.u32 [%l1], 1; cp.async.wait_all;" + STORE,
        source, out, block=64, variables=SHARED, random_completion=random_completion)
    assert not out.any()


@pytest.mark.on_silicon
@MODES
def test_address_forms(random_completion):
    """64-bit and 32-bit shared addresses, offsets on both sides, a cache policy, a guard."""
    source, out = RNG.integers(0, 2**32, (32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    run(HERE + """cvt.u64.u32 %l1, %r9; mov.u64 %l2, %y0; add.s64 %l2, %l2, 64; setp.lt.u32 %p1, %t, 99;
        cp.async.ca.shared.global [%l1], [%y0], 4; cp.async.ca.shared.global [%r9+4], [%l2+-60], 4;
        createpolicy.fractional.L2::evict_last.b64 %l3, 1.0; cp.async.ca.shared.global.L2::cache_hint [%l1+8], [%y0+8], 4, %l3;
        @!%p1 cp.async.ca.shared.global [%r9], [%y0+4], 4; @%p1 cp.async.ca.shared::cta.global [%r9+12], [%y0+12], 4;
        cp.async.wait_all;""" + STORE,
        source, out, variables=SHARED, random_completion=random_completion)
    np.testing.assert_array_equal(out, source)


@pytest.mark.on_silicon
@MODES
@pytest.mark.parametrize("seed", range(3))
def test_a_ring_of_stages(seed, random_completion):
    """Rows of 16 bytes a thread through three stages, the next two in flight; each thread adds up what another one copied."""
    rounds = 9
    source, out = RNG.integers(0, 2**20, (rounds, 64, 4), np.uint32), np.zeros((64, 4), np.uint32)
    issue = """setp.lt.u32 %p2, %r20, {0}; rem.u32 %r21, %r20, 3; mad.lo.u32 %r22, %r21, 1024, %r9;
        mad.wide.u32 %l1, %r20, 1024, %y0;
        @%p2 cp.async.cg.shared.global [%r22], [%l1], 16; cp.async.commit_group; add.u32 %r20, %r20, 1;""".format(rounds)
    run(HERE + f"""mov.u32 %r20, 0; {issue} {issue} {" ".join(f"mov.u32 %r{i}, 0;" for i in range(10, 15))}
        L: cp.async.wait_group 1; bar.sync 0; {issue}
        rem.u32 %r21, %r10, 3; xor.b32 %r23, %r9, 512; mad.lo.u32 %r22, %r21, 1024, %r23;
        ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r22];
        add.u32 %r11, %r11, %r1; add.u32 %r12, %r12, %r2; add.u32 %r13, %r13, %r3; add.u32 %r14, %r14, %r4;
        add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, {rounds}; @%p1 bra L;
        st.global.v4.u32 [%y1], {{%r11, %r12, %r13, %r14}};""", source, out, block=64, variables=".shared .align 1024 .b8 s[3072];",
        seed=seed,
        random_completion=random_completion, written={1})
    np.testing.assert_array_equal(out, source.sum(0)[np.arange(64) ^ 32])


GROUPS = [(wait, read) for wait in (0, 1, 2, 3, 4, "all") for read in range(5)]


@pytest.mark.parametrize("wait, read", GROUPS)
def test_which_groups_a_wait_covers(wait, read):
    """Copies 0 to 3 in groups 0, 0, 2, 3 (group 1 is empty), 4 in none: wait_group N leaves the last N groups and copy 4."""
    source, out = np.arange(5 * 128, dtype=np.uint32).reshape(5, 32, 4), np.zeros((32, 4), np.uint32)
    copy = lambda i: f"add.s64 %l1, %y0, {512 * i}; cp.async.cg.shared.global [%r9+{512 * i}], [%l1], 16;"
    body = HERE + f"""{copy(0)} {copy(1)} cp.async.commit_group; cp.async.commit_group; {copy(2)} cp.async.commit_group;
        {copy(3)} cp.async.commit_group; {copy(4)}
        cp.async.wait_{wait if wait == "all" else f"group {wait}"};
        ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r9+{512 * read}]; // caught
        st.global.v4.u32 [%y1], {{%r1, %r2, %r3, %r4}}; cp.async.wait_all;"""
    done = wait == "all" or (read < 4 and (0, 0, 2, 3)[read] < 4 - wait)
    options = dict(variables=".shared .align 16 .b8 s[2560];", written={1})
    if not done:
        caught("in-flight", body, source, out, also=[("uninitialised", 6)], **options)
    for seed in range(3 if done else 0):
        run(body, source, out, seed=seed, random_completion=seed > 0, **options)
        np.testing.assert_array_equal(out, source[read])


def test_a_launch_that_stopped_leaves_nothing_in_flight():
    """A later launch may write what the earlier one had begun to copy."""
    body = HERE + "setp.eq.u32 %p1, %n0, 0; @%p1 bra B;\ncp.async.ca.shared.global [%r9], [v], 4; trap;\nB: st.global.u32 [v], 1;"
    module = vgpu.Gpu(arch=80).module(kernel(body, [np.uint32(0)], variables=SHARED, module_variables=".global .u32 v;"))
    with pytest.raises(vgpu.Failure) as failure:
        module.launch("k", block=1, args=[np.uint32(1)])
    assert [(r["kind"], r["where"]) for r in failure.value.reports] == [("trap", "k.cu:3")]
    module.launch("k", block=1, args=[np.uint32(0)])


# ------------------------------------------------------------------------------------------------------------ planted bugs

COPY = "cp.async.cg.shared.global [%r9], [%y0], 16;"
GROUP = COPY + " cp.async.commit_group;\n"
LOAD = "ld.shared.u32 %r1, [%r9]; // caught"
WAIT = "\ncp.async.wait_all;"
# Argument 0: 64 times 16 bytes, which may be written; argument 1: so many undefined ones.
PLANTED = {  # Late copies are caught in every schedule; if copies complete at random, some schedules may hide it: marked "some".
    "missing_wait": ("in-flight", "some", HERE + GROUP + "<<//|>> cp.async.wait_group 0;\n" + LOAD + WAIT),
    "missing_commit": ("in-flight", "some", HERE + COPY + "<<//|>> cp.async.commit_group;\ncp.async.wait_group 0;\n" + LOAD + WAIT),
    "wrong_group_count": ("in-flight", "some", HERE + GROUP + "cp.async.wait_group <<1|0>>;\n" + LOAD + WAIT),
    "write_without_wait": ("in-flight", "some",
                           HERE + GROUP + "<<//|>> cp.async.wait_group 0;\nst.shared.u8 [%r9+3], 1; // caught" + WAIT),
    "copy_into_a_copy": ("in-flight", "some",
                         HERE + GROUP + "<<//|>> cp.async.wait_group 0;\n"
                        "cp.async.ca.shared.global [%r9+4], [%y0], 4; // caught" + WAIT),
    "atomic_without_wait": ("in-flight", "some", HERE + "st.shared.u32 [%r9+12], 0;" + GROUP + "<<//|>> cp.async.wait_group 0;\n"
                            "red.shared.add.u32 [%r9+12], 1; // caught" + WAIT),
    "source_overwritten": ("in-flight", "some", HERE + GROUP + "<<//|>> cp.async.wait_group 0;\n"
                           "st.global.u8 [%y0+15], 1; // caught" + WAIT),
    "wait_without_barrier": ("race", "all", HERE + COPY + " // caught\ncp.async.wait_all; <<//|>> bar.sync 0;\n"
                             "xor.b32 %r9, %r9, 512; " + LOAD),
    "wait_without_barrier_in_a_warp": ("race", "all", HERE + COPY + " // caught\ncp.async.wait_all; <<//|>> bar.warp.sync -1;\n"
                                       "xor.b32 %r9, %r9, 16; " + LOAD),
    "barrier_before_the_wait": ("race|in-flight", "some", HERE + COPY + " // caught\n<<bar.sync 0; "
                                "cp.async.wait_all|cp.async.wait_all; bar.sync 0>>;\nxor.b32 %r9, %r9, 512; " + LOAD),
    "copy_over_what_others_read": ("race", "all", HERE + "xor.b32 %r8, %r9, 512; st.shared.u32 [%r9], 0; bar.sync 0;\n"
                                   "ld.shared.u32 %r1, [%r8]; // caught\n<<//|>> bar.sync 0;\n" +
                                   COPY + " // caught" + WAIT),
    "copy_of_what_others_write": ("race", "all", HERE + "sub.s64 %l1, %y0, %a0; xor.b64 %l1, %l1, 512; add.s64 %l1, %l1, %a0; "
                                  "st.global.u32 [%l1], 0; // caught\n<<//|>> bar.sync 0;\n" +
                                  COPY + " // caught" + WAIT),
    "the_warp_ends": ("in-flight", "some", HERE + COPY + " // caught\ncp.async.commit_group;\n<<//|>> cp.async.wait_group 0;"),
    "a_lane_ends": ("in-flight", "some", HERE + COPY + " // caught\nsetp.lt.u32 %p1, %lane, 3; <<@%p1|>> cp.async.wait_all;"),
    "misaligned_destination": ("misaligned", "all", HERE + "cp.async.cg.shared.global [%r9+<<8|16>>], [%y0], 16; // caught" + WAIT),
    "misaligned_source": ("misaligned", "all", HERE + "cp.async.ca.shared.global [%r9], [%y0+<<4|8>>], 8; // caught" + WAIT),
    "source_past_the_end": ("out-of-range", "all", HERE + "cp.async.cg.shared.global [%r9], [%y0+<<16|0>>], 16; // caught" + WAIT),
    "destination_past_the_end": ("out-of-range", "all", HERE + "cp.async.cg.shared.global [%r9+<<1040|1024>>], [%y0], 16; "
                                 "// caught" + WAIT),
    "more_bytes_than_the_copy_has": ("out-of-range", "all", HERE + "mov.u32 %r5, <<9|8>>; "
                                     "cp.async.ca.shared.global [%r9], [%y0], 8, %r5; // caught" + WAIT),
    "undefined_source": ("uninitialised", "all", HERE + "cp.async.cg.shared.global [%r9], [<<%y1|%y0>>], 16; cp.async.wait_all; "
                         "ld.shared.u32 %r1, [%r9];\nst.global.u32 [%y1], %r1; // caught"),
    "undefined_size": ("uninitialised", "all", HERE + "<<//|>> mov.u32 %r5, 4;\ncp.async.ca.shared.global [%r9], [%y0], 4, %r5; "
                       "// caught" + WAIT),
    "undefined_predicate": ("uninitialised", "all", HERE + "<<//|>> mov.u32 %r5, 4;\nsetp.eq.u32 %p1, %r5, 4; "
                            "cp.async.ca.shared.global [%r9], [%y0], 4, %p1; // caught" + WAIT),
    "ignored_where_it_is_read": ("out-of-range", "all", HERE + "setp.eq.u32 %p1, %t, %t;\n"
                                 "cp.async.cg.shared.global [%r9], [%y0+1024], 16, <<!|>>%p1; // caught" + WAIT),
    "undefined_address": ("uninitialised", "all",
                          "<<//|>> mov.u64 %l1, %y0;\n" + HERE + "cp.async.ca.shared.global [%r9], [%l1], 4; // caught" + WAIT),
}


@MODES
@pytest.mark.parametrize("case", PLANTED)
def test_planted_bugs(case, random_completion):
    kind, often, body = PLANTED[case]
    wrong, right = twins(body)
    hits, seeds = 0, range(20 if random_completion and often == "some" else 4)
    options = dict(block=64, variables=SHARED, written={0, 1}, fresh={1}, random_completion=random_completion)
    for seed in seeds:
        arguments = np.zeros((64, 4), np.uint32), np.zeros((64, 4), np.uint32)
        run(right, *arguments, seed=seed, **options)
        try:
            caught(kind, wrong, *arguments, seed=seed, **options)
            hits += 1
        except pytest.fail.Exception:  # nothing was reported
            pass
    assert hits == len(seeds) or hits > 0 and random_completion and often == "some"
