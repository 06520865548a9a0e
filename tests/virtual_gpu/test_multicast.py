"""Tensor copies into several blocks of a cluster, on the virtual GPU (PTX ISA 9.7.9.25.5.2, .multicast::cluster)."""
import numpy as np
import pytest

import vgpu
from raw_ptx import Kernel, only, wait
from test_bulk_copy import FENCE, INIT, INIT_FENCE, MODES, make_tensor, swizzle_bytes

# Block r of a cluster loads slice r for the blocks of masks[r]; every block expects its slices and writes them out.

MULTICAST = Kernel("m masks out rows", f"""
.reg .b32 bar, to, slice, i, a, v, mask, bytes, row, count; .reg .b64 o, at; .reg .pred p, more;
add.u32 bar, %smem, 4096; mov.u32 count, %cluster_nctarank; mul.lo.u32 slice, rows, 128;
{only("%t eq 0", f"{INIT}{chr(10)}{INIT_FENCE}")}
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
mov.u32 bytes, 0; mov.u32 i, 0; mov.b64 at, masks;
EXPECT: ld.global.u32 v, [at]; setp.eq.u32 p, i, %rank; @p mov.u32 mask, v; shr.u32 v, v, %rank; and.b32 v, v, 1;
mad.lo.u32 bytes, v, slice, bytes;
add.u32 i, i, 1; add.u64 at, at, 4; setp.lt.u32 p, i, count; @p bra EXPECT;
setp.eq.u32 p, bytes, 0; @p bra ISSUE;
{only("%t eq 0", "mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], bytes;")}
ISSUE: bar.sync 0;
setp.ne.u32 p, %t, 0; @p bra RECEIVE; setp.eq.u32 p, mask, 0; @p bra RECEIVE;
mul.lo.u32 row, %rank, rows; mad.lo.u32 to, %rank, slice, %smem; cvt.u16.u32 %h0, mask;
cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [to], [m, {{0, row}}], [bar], %h0;
RECEIVE: setp.eq.u32 p, bytes, 0; @p bra END;
{wait("bar", "0")}
mov.u32 i, %t;
WORD: mul.lo.u32 a, i, 4; div.u32 row, a, slice; mul.wide.u32 o, row, 4; add.u64 at, masks, o; ld.global.u32 v, [at];
shr.u32 v, v, %rank; and.b32 v, v, 1; setp.eq.u32 p, v, 0; @p bra NEXT;
add.u32 a, a, %smem;
ld.shared.u32 v, [a];
mad.lo.u32 a, %rank, 1024, i; mul.wide.u32 o, a, 4; add.u64 at, out, o; st.global.u32 [at], v;
NEXT: add.u32 i, i, 64; setp.lt.u32 more, i, 1024; @more bra WORD;
END:
""", memory=4096 + 16)


def run_multicast(kernel, seed=0, random_completion=False, masks=(3, 3), **more):
    size, tensor = len(masks), make_tensor((32, 64), np.uint16)
    out, masks = np.zeros((size, 4096), np.uint8), np.array(masks, np.uint32)
    kernel.run(vgpu.TensorMap(tensor, (32 // size, 64), 128), masks, out, np.uint32(32 // size), seed=seed,
               random_completion=random_completion, grid=size, block=64, cluster=(size,), written={2}, **more)
    slices = swizzle_bytes(tensor.view(np.uint8).reshape(-1), 128).reshape(size, -1)
    wanted = [[slices[r] * (masks[r] >> t & 1) for r in range(size)] for t in range(size)]
    np.testing.assert_array_equal(out, np.reshape(wanted, (size, 4096)))


@pytest.mark.on_silicon
@MODES
@pytest.mark.parametrize("arrive", ["arrive", "arrive.release", "arrive.relaxed"])
@pytest.mark.parametrize("masks", [(3, 3), (2, 0), (2, 1), (15, 15, 15, 15), (0b1010, 0, 0, 0), (0b0110, 0b0001, 0b1000, 0b1110)])
def test_multicast(masks, arrive, seed, random_completion):
    run_multicast(MULTICAST.edit("cluster.arrive.aligned", f"cluster.{arrive}.aligned"), seed, random_completion, masks)


ARRIVE_WAIT = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"
MULTICAST_BUGS = [
    ("a block that is not there", ("cvt.u16.u32 %h0, mask;", "cvt.u16.u32 %h0, mask; or.b16 %h0, %h0, 16;"), "out-of-range",
     "multicast::cluster", "not in the cluster"),
    ("no cluster barrier", (ARRIVE_WAIT, "bar.sync 0;"), "race|mbarrier", "multicast::cluster", ""),
    ("stored from another block", ("RECEIVE: setp", "mapa.shared::cluster.u32 to, %smem, 0;\n"
                                   "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [m, {0, row}], [to];\nRECEIVE: setp"),
     "out-of-range", "bulk_group", "from the shared memory of another block"),
    ("no fence after init", (INIT_FENCE, ""), "proxy", "multicast::cluster", "without fence.mbarrier_init"),
    ("a relaxed arrival needs that fence", (INIT_FENCE, FENCE, "arrive.aligned", "arrive.relaxed.aligned"), "race",
     "multicast::cluster", "initialised, without a barrier"),
    ("read before the wait", (wait("bar", "0"), ""), "in-flight|race", "ld.shared.u32 v", "", 4),
]


@pytest.mark.parametrize("bug", MULTICAST_BUGS, ids=[bug[0] for bug in MULTICAST_BUGS])
def test_misuse_of_multicast(bug):
    MULTICAST.edit(*bug[1]).caught(run_multicast, *bug[2:])
