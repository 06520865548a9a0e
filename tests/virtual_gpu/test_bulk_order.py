"""What orders bulk copies of the virtual GPU with other accesses (PTX ISA 9.7.9.25.4): through global memory and back, sources that
are overwritten, neighbours of what is in flight, groups."""
import numpy as np
import pytest

import vgpu
from raw_ptx import Kernel, aligned, wait
from test_bulk_copy import BULK_LOAD, BULK_STORE, COMMIT, FENCE, INIT, INIT_FENCE, MODES, TENSOR_LOAD, load_kernel

# Through global memory within a kernel: what a block wrote by ordinary stores (with a proxy fence) or by a bulk store comes back.
ORDINARY = "cvt.u64.u32 o, i; add.u64 o, out, o; ld.shared.u32 v, [a]; st.global.u32 [o], v;"
BACK = Kernel("x out bytes", f"""
.reg .b32 to, bar, i, a, v; .reg .b64 o; .reg .pred p, lead;
mov.u32 to, %smem; add.u32 bar, %smem, 1024; setp.eq.u32 lead, %t, 0; mul.lo.u32 i, %t, 4; add.u32 a, to, i;
cvt.u64.u32 o, i; add.u64 o, x, o; ld.global.u32 v, [o]; add.u32 v, v, 1; st.shared.u32 [a], v;
@lead {INIT}
fence.proxy.async;
bar.sync 0;
@lead {BULK_STORE} @lead cp.async.bulk.commit_group;
@lead cp.async.bulk.wait_group 0;
bar.sync 0;
add.u32 to, %smem, 512;
@lead mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], bytes;
@lead {BULK_LOAD.replace("[x]", "[out]")}
{wait("bar", "0")}
ld.shared.u32 v, [a+512]; sub.u32 v, v, 1; cvt.u64.u32 o, i; add.u64 o, x, o;
ld.global.u32 i, [o]; setp.ne.u32 p, i, v; @p trap;
""", memory=1024 + 16)
BY_STORES = BACK.edit(f"@lead {BULK_STORE} @lead cp.async.bulk.commit_group;",
                      f"{ORDINARY}\nfence.proxy.async; // of global memory", "@lead cp.async.bulk.wait_group 0;\n", "")


def run_back(kernel, seed=0, random_completion=False):
    x, out = aligned(64, np.uint32), aligned(64, np.uint32)
    x[:] = np.arange(64)
    kernel.run(x, out, np.uint32(256), seed=seed, random_completion=random_completion, block=64, written=(1,))
    np.testing.assert_array_equal(out, x + np.uint32(1))


@pytest.mark.on_silicon
@MODES
def test_there_and_back(seed, random_completion):
    run_back(BACK, seed, random_completion)
    run_back(BY_STORES, seed, random_completion)


LOAD_BACK = BULK_LOAD.replace("[x]", "[out]")


def test_there_and_back_too_soon():
    BACK.edit("wait_group 0;", "wait_group.read 0;").caught(run_back, "in-flight", LOAD_BACK, "reads byte 0 of argument 1")
    for fence in "", "fence.proxy.async.shared::cta;":
        BY_STORES.edit("fence.proxy.async; // of global memory", fence).caught(run_back, "proxy", LOAD_BACK, "ordinary store")
    run_back(BY_STORES.edit("fence.proxy.async; // of global memory", "fence.proxy.async.global;"))


# Thread 32 overwrites the source of a load that thread 0 has waited for.
SOURCE = Kernel("x out", f"""
.reg .b32 bar, v, flag; .reg .b64 o; .reg .pred p, lead, other;
add.u32 bar, %smem, 256; add.u32 flag, %smem, 264; setp.eq.u32 lead, %t, 0; setp.eq.u32 other, %t, 32;
@lead {INIT}
@lead {INIT_FENCE}
@lead st.shared.u32 [flag], 0;
bar.sync 0;
@!lead bra OTHER;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [x], 256, [bar];
{wait("bar", "0")}
st.release.cta.shared.u32 [flag], 1;
ld.shared.u32 v, [%smem+132]; st.global.u32 [out], v;
OTHER: @!other bra END;
SPIN: ld.acquire.cta.shared.u32 v, [flag]; setp.eq.u32 p, v, 0; @p bra SPIN;
st.global.u32 [x+132], 99;
END:
""", memory=272)


def run_source(kernel, seed=0, random_completion=False):
    x, out = aligned(64, np.uint32), np.zeros(1, np.uint32)
    x[:] = np.arange(64)
    kernel.run(x, out, seed=seed, random_completion=random_completion, block=64)
    assert out[0] == 33 and x[33] == 99


def test_source_overwritten():
    run_source(SOURCE)
    for old in "st.release", "ld.acquire":
        SOURCE.edit(old, old[:3] + "relaxed").caught(run_source, "race", "st.global.u32 [x+132]",
                                                     "an asynchronous copy .*read: no barrier between")


def test_neighbour_of_a_copy_in_flight():
    """A row of 7 elements of 2 bytes is loaded while the 8th, in the same 4 bytes as the 7th, is written."""
    load = load_kernel(2, 256)
    load = load.edit(TENSOR_LOAD, f"{TENSOR_LOAD}\nmov.u16 %h0, 9;\nst.global.u16 [beside], %h0;", names="m out x1 x0 beside")

    def run(kernel, seed=0, element=7):
        whole, out = aligned((16, 8), np.uint16), np.zeros((16, 8), np.uint16)
        whole[:] = np.arange(1, 129).reshape(16, 8)
        wanted = whole * (np.arange(8) < 7)
        with vgpu.Gpu().mapped([("whole", whole, True, True)]):
            kernel.run(vgpu.TensorMap(whole[:, :7], (16, 8), 0), out, np.int32(0), np.int32(0), np.uint64(whole.ctypes.data + 2 * element),
                       seed=seed, block=64)
        np.testing.assert_array_equal(out, wanted)
        assert whole[0, 7] == 9

    run(load)
    load.caught(lambda k, seed: run(k, seed, 6), "in-flight", "st.global.u16 [beside]", "writes byte 12 of whole, which the copy")


# Threads 0 and 1 store 16 bytes each; then thread 0 overwrites what both read from.
OWN_GROUPS = Kernel("out", f"""
.reg .b32 at; .reg .b64 o; .reg .pred p;
mad.lo.u32 at, %t, 16, %smem; st.shared.v4.u32 [at], {{%t, %t, %t, 7}}; mul.wide.u32 o, %t, 16; add.u64 o, out, o;
{FENCE}
cp.async.bulk.global.shared::cta.bulk_group [o], [at], 16;
{COMMIT}
cp.async.bulk.wait_group.read 0;
bar.warp.sync 3; setp.ne.u32 p, %t, 0; @p bra END;
st.shared.u32 [%smem+4], 9;
st.shared.u32 [%smem+20], 9;
END:
""", memory=32)


def run_own_groups(kernel, seed=0, random_completion=False):
    out = aligned((2, 4), np.uint32)
    kernel.run(out, seed=seed, random_completion=random_completion, block=2)
    np.testing.assert_array_equal(out, [[0, 0, 0, 7], [1, 1, 1, 7]])


def test_groups_belong_to_threads():
    for seed, random_completion in ((0, False), (1, True)):
        run_own_groups(OWN_GROUPS, seed, random_completion)
    first = OWN_GROUPS.edit("cp.async.bulk.wait_group.read 0;", "setp.eq.u32 p, %t, 0; @p cp.async.bulk.wait_group.read 0;")
    first.caught(run_own_groups, "in-flight", "[%smem+20], 9", "writes shared byte 20, which the copy")


# What block 0 stored to global memory, block 1 copies into its shared memory: the proxy fence may be on either side of the flag.
BETWEEN = Kernel("x flag", f"""
.reg .b32 bar, v, i; .reg .b64 o; .reg .pred p, first, lead;
add.u32 bar, %smem, 256; setp.eq.u32 first, %b, 0; setp.eq.u32 lead, %t, 0;
@lead {INIT}
@lead {INIT_FENCE}
@!first bra READER;
mul.lo.u32 i, %t, 4; cvt.u64.u32 o, i; add.u64 o, x, o;
st.global.u32 [o], 7;
fence.proxy.async.global; // of the writer
bar.sync 0;
@lead st.release.gpu.global.u32 [flag], 1;
bra END;
READER: @!lead bra END;
SPIN: ld.acquire.gpu.global.u32 v, [flag]; setp.eq.u32 p, v, 0; @p bra SPIN;
// of the reader
mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 256;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [x], 256, [bar];
{wait("bar", "0")}
ld.shared.u32 v, [%smem+252]; setp.ne.u32 p, v, 7; @p trap;
END:""", memory=256 + 16)


def run_between(kernel, seed=0, random_completion=False):
    kernel.run(aligned(64, np.uint32), np.zeros(1, np.uint32), seed=seed, random_completion=random_completion, grid=2, block=64)


@MODES
def test_proxy_fence_on_either_side(seed, random_completion):
    run_between(BETWEEN, seed, random_completion)
    run_between(BETWEEN.edit("fence.proxy.async.global; // of the writer", "").edit("// of the reader", "fence.proxy.async;"), seed,
                random_completion)
    without = BETWEEN.edit("fence.proxy.async.global; // of the writer", "fence.proxy.async.shared::cta;")
    without.caught(run_between, "proxy", "[%smem], [x], 256", "ordinary store")
