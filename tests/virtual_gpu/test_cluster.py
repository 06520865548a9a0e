"""Clusters on the virtual GPU: ranks, shared memory and mbarriers of other blocks, barrier.cluster, shapes that a launch refuses;
and elect.sync, setmaxnreg, griddepcontrol."""
import numpy as np
import pytest

import vgpu
from raw_ptx import Kernel, aligned, wait

SIZES = pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
ARRIVE, WAIT = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
BARRIER, LAST = f"{ARRIVE}\n{WAIT}", f"{ARRIVE} // second\n{WAIT} // last"


# ------------------------------------------------------------------------------------------------------------ ranks and shapes

TRIPLES = ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid", "ctaid")
SPECIAL = ["cluster_ctarank", "cluster_nctarank", *(f"{name}.{axis}" for name in TRIPLES for axis in "xyz")]
RANKS = Kernel("out", f"""
.reg .b32 r, i; .reg .b64 o;
mov.u32 i, %ctaid.z; mov.u32 r, %nctaid.y; mul.lo.u32 i, i, r; mov.u32 r, %ctaid.y; add.u32 i, i, r; mov.u32 r, %nctaid.x;
mad.lo.u32 i, i, r, %b;
mul.lo.u32 i, i, {len(SPECIAL)}; mul.wide.u32 o, i, 4; add.u64 o, out, o;
{chr(10).join(f"mov.u32 r, %{name}; st.global.u32 [o+{4 * i}], r;" for i, name in enumerate(SPECIAL))}
""")


@pytest.mark.on_silicon
@pytest.mark.parametrize("directive", [False, True])
@pytest.mark.parametrize("grid, cluster", [
    ((4, 1, 1), (2, 1, 1)), ((4, 4, 6), (2, 2, 3)), ((8, 2, 1), (8, 2, 1)), ((3, 2, 4), (1, 1, 2)), ((2, 2, 2), (1, 1, 1))])
def test_ranks(grid, cluster, directive):
    """Cluster dimensions from the launch, or from .reqnctapercluster alone."""
    out = np.zeros((grid[2], grid[1], grid[0], len(SPECIAL)), np.uint32)
    required = f".explicitcluster .reqnctapercluster {cluster[0]}, {cluster[1]}, {cluster[2]}"
    RANKS.edit(directives=required if directive else "").run(out, grid=grid, block=1, cluster=() if directive else cluster)
    for z, y, x in np.ndindex(out.shape[:3]):
        at, g, c = np.array((x, y, z)), np.array(grid), np.array(cluster)
        inside = at % c
        rank = inside[0] + c[0] * (inside[1] + c[1] * inside[2])
        np.testing.assert_array_equal(out[z, y, x], [rank, c.prod(), *inside, *c, *(at // c), *(g // c), *at])


@pytest.mark.parametrize("shape, required, why", [
    (dict(grid=3, cluster=(2,)), 0, "not whole clusters in dimension 0"),
    (dict(grid=(4, 3), cluster=(2, 2)), 0, "not whole clusters in dimension 1"),
    (dict(grid=17, cluster=(17,)), 0, "a cluster of 17"), (dict(grid=(8, 4), cluster=(8, 4)), 0, "a cluster of 32"),
    (dict(grid=3), 2, "not whole clusters"), (dict(grid=4, cluster=(4,)), 2, "the kernel requires 2")])
def test_refused_shapes(shape, required, why):
    out = np.zeros(1024, np.uint32)
    with pytest.raises(vgpu.LaunchError, match=why):
        RANKS.edit(directives=f".explicitcluster .reqnctapercluster {required}" if required else "").run(out, block=1, **shape)
    assert not out.any()


# ------------------------------------------------------------------------------------------------- shared memory of other blocks
# Each block writes to its own memory, reads the next block's, writes to the one after; and all of it comes out.

READ, WRITE = "ld.shared::cluster.u32 v, [there];", "st.shared::cluster.u32 [there+256], v;"
SHARED = Kernel("out", f"""
.reg .b32 v, w, next, count, here, there; .reg .b64 o; .reg .pred p;
mov.u32 count, %cluster_nctarank; add.u32 next, %rank, 1; rem.u32 next, next, count;
mad.lo.u32 here, %t, 4, %smem; mad.lo.u32 v, %b, 1000, %t; st.shared.u32 [here], v;
{BARRIER} // first
mapa.shared::cluster.u32 there, here, next;
{READ}
add.u32 next, next, 1; rem.u32 next, next, count;
mapa.shared::cluster.u32 there, here, next;
{WRITE}
{LAST}
ld.shared.u32 w, [here+256]; mad.lo.u32 v, w, 7, v;
mad.lo.u32 w, %b, 64, %t; mul.wide.u32 o, w, 4; add.u64 o, out, o; st.global.u32 [o], v;
""", memory=512)
GENERIC = SHARED.edit(READ, "{ .reg .b64 g; cvt.u64.u32 g, here; cvta.shared.u64 g, g; mapa.u64 g, g, next; ld.u32 v, [g]; }",
                      WRITE, "{ .reg .b64 g; cvt.u64.u32 g, here; cvta.shared.u64 g, g; mapa.u64 g, g, next; st.u32 [g+256], v; }")
SYMBOL = SHARED.edit("mapa.shared::cluster.u32 there, here, next;\nld",
                     "mapa.shared::cluster.u32 there, memory, next; mad.lo.u32 there, %t, 4, there;\nld")


def run_shared(kernel, seed=0, size=4, clusters=2):
    n = size * clusters
    out = np.zeros((n, 64), np.uint32)
    kernel.run(out, seed=seed, grid=n, block=64, cluster=(size,))
    block = np.arange(n)
    neighbour = lambda by: block // size * size + (block % size + by) % size  # noqa: E731
    first = neighbour(1)[:, None] * 1000 + np.arange(64)
    np.testing.assert_array_equal(out, first + 7 * first[neighbour(-2)])


@pytest.mark.on_silicon
@SIZES
@pytest.mark.parametrize("kernel", [SHARED, GENERIC, SYMBOL], ids=["shared::cluster", "generic", "symbol"])
def test_shared_memory(kernel, size):
    for seed in range(3):
        run_shared(kernel, seed, size)


LATER = "mov.u32 w, 0;\nSPIN: add.u32 w, w, 1; setp.lt.u32 p, w, 2000; @p bra SPIN;"
SHARED_BUGS = [  # name, edits, kind, where, text, in how many of 8 schedules at least
    ("no first barrier", (f"{BARRIER} // first", "bar.sync 0;"), "race", READ, "may not have begun"),
    ("no wait", (f"{WAIT} // first", "bar.sync 0; // first"), "race", READ, "may not have begun|wrote: nothing orders them"),
    ("a relaxed first barrier", (f"{BARRIER} // first", "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;"),
     "race", READ, "wrote: nothing orders them"),
    ("no last barrier", (LAST, "bar.sync 0;"), "exited-block|race", "ld.shared.u32 w, [here+256]", "", 1),
    ("the block has ended", (f"{LAST}\nld.shared.u32 w, [here+256];", "mov.u32 w, 0;"), "exited-block", WRITE,
     "ends, and no barrier makes sure|which has exited"),
    ("the block ends much later", (f"{LAST}\nld.shared.u32 w, [here+256];", LATER), "exited-block", WRITE,
     "ends, and no barrier makes sure"),
    ("a relaxed last barrier", (LAST, "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;"), "race",
     "w, [here+256]", "(read|wrote): nothing orders them"),
    ("no such block", ("mapa.shared::cluster.u32 there, here, next;\nld", "mapa.shared::cluster.u32 there, here, count;\nld"),
     "out-of-range", "here, count", "block 4 of a cluster of 4"),
    ("beyond its memory", (READ, "ld.shared::cluster.u32 v, [there+512];"), "out-of-range", "[there+512]",
     "ending \\d+ bytes behind the 512 bytes of"),
    ("through the own window", (READ, "ld.shared::cta.u32 v, [there];"), "out-of-range", "ld.shared::cta",
     "of the shared memory of block"),
    ("an arrival too many", (f"{WAIT} // first", f"{WAIT} // first\n{ARRIVE}"), "barrier",
     "barrier.cluster.arrive.aligned; // second", "arrives twice"),
    ("a wait too many", (f"{WAIT} // first", f"{WAIT} // first\n{WAIT} // again"), "barrier", "// again", "without an arrival"),
]


@pytest.mark.parametrize("bug", SHARED_BUGS, ids=[bug[0] for bug in SHARED_BUGS])
def test_misuse_of_shared_memory(bug):
    SHARED.edit(*bug[1]).caught(run_shared, *bug[2:])


# --------------------------------------------------------------------------------------------------- mbarriers of other blocks
# Every block stores to block 0 and arrives at its mbarrier, `rounds` times; block 0 sums and lets them go on by theirs.

REMOTE_ARRIVE = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [full];"
WAIT_FULL = wait("%smem", "parity", "try_wait.parity.acquire.cluster")
WAIT_EMPTY = wait("empty", "parity", "test_wait.parity.acquire.cluster")
SIGNALS = Kernel("out rounds", f"""
.reg .b32 v, count, full, to, round, parity, sum, i, empty; .reg .b64 o; .reg .pred p, more;
mov.u32 count, %cluster_nctarank; mov.u32 sum, 0; mov.u32 round, 0;
setp.eq.u32 p, %t, 0;
@p mbarrier.init.shared::cta.b64 [%smem], count; @p mbarrier.init.shared::cta.b64 [%smem+8], 1;
@p fence.mbarrier_init.release.cluster;
{BARRIER}
ROUND: and.b32 parity, round, 1;
mapa.shared::cluster.u32 full, %smem, 0; mad.lo.u32 to, %rank, 128, full; mad.lo.u32 to, %t, 4, to;
mad.lo.u32 v, %rank, 10, %t; mad.lo.u32 v, round, 100, v;
st.shared::cluster.u32 [to+16], v;
bar.warp.sync -1;
setp.eq.u32 p, %t, 0;
@p {REMOTE_ARRIVE}
setp.ne.u32 p, %rank, 0; @p bra FOLLOW;
{WAIT_FULL}
mov.u32 i, 0;
ADD: mad.lo.u32 to, i, 128, %smem; mad.lo.u32 to, %t, 4, to;
ld.shared.u32 v, [to+16];
add.u32 sum, sum, v; add.u32 i, i, 1; setp.lt.u32 p, i, count; @p bra ADD;
bar.warp.sync -1;
setp.lt.u32 p, %t, count; @p mapa.shared::cluster.u32 empty, %smem, %t;
@p mbarrier.arrive.release.cluster.shared::cluster.b64 _, [empty+8];
FOLLOW: add.u32 empty, %smem, 8;
{WAIT_EMPTY}
add.u32 round, round, 1; setp.lt.u32 p, round, rounds; @p bra ROUND;
{LAST}
setp.eq.u32 p, %rank, 0; mul.wide.u32 o, %t, 4; add.u64 o, out, o; @p st.global.u32 [o], sum;
""", memory=16 + 128 * 16)


def run_signals(kernel, seed=0, size=4, rounds=3):
    out = np.zeros(32, np.uint32)
    kernel.run(out, np.uint32(rounds), seed=seed, grid=size, block=32, cluster=(size,))
    np.testing.assert_array_equal(out, sum(100 * k + 10 * r + np.arange(32) for k in range(rounds) for r in range(size)))


@pytest.mark.on_silicon
@SIZES
def test_signals(size):
    for seed in range(3):
        run_signals(SIGNALS, seed, size)


SIGNALS_BUGS = [
    ("no first barrier", (f"\n{BARRIER}\nROUND", "\nbar.sync 0;\nROUND"), "race", "[to+16], v;", "may not have begun"),
    ("arrival at what is no mbarrier", (REMOTE_ARRIVE, REMOTE_ARRIVE.replace("[full]", "[full+16]")), "mbarrier", "[full+16]",
     "no initialised mbarrier at shared address 16"),
    ("in the own window", (REMOTE_ARRIVE, "mbarrier.arrive.release.cluster.shared::cta.b64 _, [full];"), "out-of-range",
     "cluster.shared::cta.b64 _, [full]", "of another block by its address in shared::cta"),
    ("relaxed arrival", (REMOTE_ARRIVE, REMOTE_ARRIVE.replace("release", "relaxed")), "race", "ld.shared.u32 v, [to+16]",
     "wrote: nothing orders them"),
    ("only one lane's stores", ("bar.warp.sync -1;\nsetp.eq.u32 p, %t, 0;", "setp.eq.u32 p, %t, 0;"), "race",
     "ld.shared.u32 v, [to+16]", "wrote: nothing orders them"),
    ("no wait for the others", (WAIT_FULL, ""), "race", "ld.shared.u32 v, [to+16]", "wrote: nothing orders them", 4),
    ("waits at another block's", (WAIT_EMPTY, wait("full", "parity")), "mbarrier", "[full], parity", "of another block"),
    ("an arrival too few", ("[%smem], count;", "[%smem], i;", "mov.u32 sum, 0;", "mov.u32 sum, 0; add.u32 i, count, 1;"),
     "deadlock", WAIT_FULL, "mbarrier at shared address 0 of block 0: phase 0 lacks 1 of 5"),
    ("nobody waits for the last arrival",
     (LAST, "", "add.u32 round, round, 1; setp.lt.u32 p, round, rounds; @p bra ROUND;", "", WAIT_EMPTY, ""),
     "exited-block", "_, [empty+8];", "no barrier makes sure that this arrival|has exited"),
    ("that comes in time by chance",
     (LAST, LATER, "add.u32 round, round, 1; setp.lt.u32 p, round, rounds; @p bra ROUND;", ".reg .b32 w;", WAIT_EMPTY, ""),
     "exited-block", "_, [empty+8];", "no barrier makes sure that this arrival"),
]


@pytest.mark.parametrize("bug", SIGNALS_BUGS, ids=[bug[0] for bug in SIGNALS_BUGS])
def test_misuse_of_signals(bug):
    SIGNALS.edit(*bug[1]).caught(run_signals, *bug[2:])


# --------------------------------------------------------------------------------------------------------- who arrives and exits

# Most threads of block 0 arrive and exit: they do not stand for those of block 1, which write there and arrive late. Some of block 1
# exit without arriving, before or after all others have arrived.
EXITS = Kernel("out early", f"""
.reg .b32 v, i, there; .reg .b64 o; .reg .pred p, first;
setp.eq.u32 first, %t, 0;
{BARRIER}
setp.eq.u32 p, %rank, 1; @p bra LATE;
barrier.cluster.arrive;
@!first ret;
barrier.cluster.wait; // of block 0
ld.shared.u32 v, [%smem]; st.global.u32 [out], v;
ret;
LATE: mov.u32 i, 0; setp.ge.u32 p, %t, early; @p ret;
SPIN: add.u32 i, i, 1; setp.lt.u32 p, i, 2000; @p bra SPIN;
mapa.shared::cluster.u32 there, %smem, 0;
@first st.shared::cluster.u32 [there], 5;
setp.ge.u32 p, %t, 20; @p bra NEVER;
barrier.cluster.arrive; // late
barrier.cluster.wait;
ret;
NEVER: add.u32 i, i, 1; setp.lt.u32 p, i, 9000; @p bra NEVER;
""")


def run_exits(kernel, seed=0, early=25):
    out = np.zeros(1, np.uint32)
    kernel.run(out, np.uint32(early), seed=seed, grid=2, block=32, cluster=(2,))
    assert out[0] == 5


def test_exits():
    for seed in range(4):
        run_exits(EXITS, seed)
        run_exits(EXITS, seed, 32)
    EXITS.edit("barrier.cluster.wait; // of block 0", "").caught(run_exits, "race|uninitialised", "ld.shared.u32 v, [%smem]", "", 4)


# ------------------------------------------------------------------------------------------------------------ single instructions

def test_elect():
    """One lane of a warp leads, which one differs between runs; what it alone issues is issued once."""
    kernel = Kernel("x out", f"""
.reg .b32 leader, v, bar; .reg .b64 o; .reg .pred p, q;
add.u32 bar, %smem, 128;
elect.sync leader|p, 0xffffffff;
@p mbarrier.init.shared::cta.b64 [bar], 1;
@p fence.mbarrier_init.release.cluster;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 128;
@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [x], 128, [bar];
bar.warp.sync -1;
{wait("bar", "0")}
mad.lo.u32 v, %lane, 4, %smem; ld.shared.u32 v, [v]; mul.wide.u32 o, %lane, 4; add.u64 o, out, o; st.global.u32 [o], v;
st.global.u32 [o+128], leader;
setp.lt.u32 q, %lane, 16; @q ret;
elect.sync _|q, 0xffff0000; selp.u32 v, 1, 0, q; st.global.u32 [o+256], v;
""", memory=144)
    x = aligned(32, np.uint32)
    x[:] = np.arange(32) + 7
    leaders = set()
    for seed in range(5):
        out = np.zeros((3, 32), np.uint32)
        kernel.run(x, out, seed=seed, block=32, written={1})
        np.testing.assert_array_equal(out[0], x)
        leaders |= set(out[1])
        assert len(set(out[1])) == 1 and out[2].sum() == 1 and not out[2, :16].any()
    assert len(leaders) > 1


OWN_WORD = ".reg .b64 o; mul.wide.u32 o, %t, 4; add.u64 out, out, o; st.global.u32 [out], %t;"


def run_words(kernel, seed=0):
    out = np.full(128, 999, np.uint32)
    kernel.run(out, seed=seed, block=128)
    np.testing.assert_array_equal(out, np.arange(128))


@pytest.mark.parametrize("which", ["inc", "dec"])
def test_setmaxnreg(which):
    """A multiple of 8 from 24 to 256; others (which ptxas refuses too) do not pass."""
    for n in (24, 40, 232, 256, 16, 44, 264):
        kernel = Kernel("out", f"setmaxnreg.{which}.sync.aligned.u32 {n};\n{OWN_WORD}", directives=".maxntid 128")
        if n % 8 == 0 and 24 <= n <= 256:
            run_words(kernel)
        else:
            kernel.caught(run_words, "uncovered", "setmaxnreg")


def test_griddepcontrol():
    run_words(Kernel("out", f"griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n{OWN_WORD}"))


# A word in block 0's memory says that the others have stored there: released by one path to it, acquired by another.
FLAG = Kernel("out", f"""
.reg .b32 v, flag, to, count, r; .reg .b64 o; .reg .pred p, first;
mov.u32 count, %cluster_nctarank; setp.eq.u32 first, %t, 0; sub.u32 count, count, 1;
@first st.shared.u32 [%smem+4], 0;
{BARRIER}
mapa.shared::cluster.u32 flag, %smem, 0; mad.lo.u32 to, %rank, 4, flag;
setp.eq.u32 p, %rank, 0; @p bra OWNER;
@first st.shared::cluster.u32 [to+64], %rank;
@first red.release.cluster.shared::cluster.add.u32 [flag+4], 1;
bra END;
OWNER: @!first bra END;
SPIN: ld.acquire.cluster.shared::cta.u32 v, [%smem+4]; setp.lt.u32 p, v, count; @p bra SPIN;
ld.shared.u32 v, [%smem+68]; ld.shared.u32 r, [%smem+72]; mad.lo.u32 v, v, 10, r; st.global.u32 [out], v;
END:
{LAST}
""", memory=128)


def run_flag(kernel, seed=0):
    out = np.zeros(1, np.uint32)
    kernel.run(out, seed=seed, grid=4, block=32, cluster=(4,))
    assert out[0] == 12


def test_flag_in_another_block():
    for seed in range(3):
        run_flag(FLAG, seed)
    FLAG.edit("red.release", "red.relaxed").caught(run_flag, "race", "[%smem+68]", "wrote: nothing orders them")
    FLAG.edit("ld.acquire.cluster", "ld.relaxed.cluster").caught(run_flag, "race", "[%smem+68]", "wrote: nothing orders them")
