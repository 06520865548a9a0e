"""Operations of a warp's lanes together on the virtual GPU: results from the definitions of the PTX ISA, in straight and divergent
code, with whole and partial member masks; and what goes wrong with them."""
import numpy as np
import pytest

from raw_ptx import caught, run, twins

RNG = np.random.default_rng(0)
ALL = 0xFFFFFFFF
LANE = np.arange(32)


def words(*shape):
    return RNG.integers(0, 2**32, shape, np.uint32)


def lanes_of(mask):
    return np.array([lane for lane in range(32) if mask >> lane & 1])


# -------------------------------------------------------------------------------------------------------------- shfl.sync


def shuffled(mode, a, b, c):
    """(d, p) of a whole warp, as PTX ISA 9.7.9.6 defines them."""
    d, p = [], []
    for lane in range(32):
        bval, cval, segmask = int(b[lane]) & 31, int(c[lane]) & 31, int(c[lane]) >> 8 & 31
        max_lane, min_lane = (lane & segmask) | (cval & ~segmask), lane & segmask
        j = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": min_lane | (bval & ~segmask)}[mode]
        pval = j >= max_lane if mode == "up" else j <= max_lane
        d.append(a[j if pval else lane])
        p.append(pval)
    return np.array(d, np.uint32), np.array(p, np.uint32)


@pytest.mark.on_silicon
@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
def test_shuffle_with_operands_of_each_lane(mode):
    """Random offsets, clamps and segments that differ from lane to lane, bits beyond those that count included."""
    warps = 200
    a, b, c = words(warps, 32), words(warps, 32) & 0xFF, words(warps, 32)
    b[:50] &= 7
    c[50:100] = c[50:100, :1]
    d, p, alone = np.zeros((3, warps, 32), np.uint32)
    run(f"""ld.global.u32 %r1, [%x0]; ld.global.u32 %r2, [%x1]; ld.global.u32 %r3, [%x2];
            shfl.sync.{mode}.b32 %r4|%p1, %r1, %r2, %r3, -1; selp.u32 %r5, 1, 0, %p1;
            shfl.sync.{mode}.b32 %r6, %r1, %r2, %r3, 0xffffffff;
            st.global.u32 [%x3], %r4; st.global.u32 [%x4], %r5; st.global.u32 [%x5], %r6;""", a, b, c, d, p, alone, grid=warps // 4,
        block=128)
    wanted = [shuffled(mode, a[i], b[i], c[i]) for i in range(warps)]
    np.testing.assert_array_equal(d, [w[0] for w in wanted])
    np.testing.assert_array_equal(p, [w[1] for w in wanted])
    np.testing.assert_array_equal(alone, d)


@pytest.mark.on_silicon
@pytest.mark.parametrize("width", (32, 16, 8, 4, 2, 1))
@pytest.mark.parametrize("mode", ("up", "down", "bfly", "idx"))
def test_shuffle_as_cuda_calls_it(mode, width):
    """__shfl_*_sync(mask, a, b, width): c is (32 - width) << 8 with 31, but for up."""
    for b in (0, 1, 2, 3, 5, 16, 31):
        a, d = words(32), np.zeros(32, np.uint32)
        c = (32 - width) << 8 | (0 if mode == "up" else 31)
        run(f"ld.global.u32 %r1, [%x0]; shfl.sync.{mode}.b32 %r2, %r1, {b}, {c}, -1; st.global.u32 [%x1], %r2;", a, d)
        first = LANE // width * width
        j = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": first + b % width}[mode]
        inside = j >= first if mode == "up" else j < first + width
        np.testing.assert_array_equal(d, a[np.where(inside, j, LANE)])


# ------------------------------------------------------------------------------------- all of them, in straight and split code


def vote(p, mask):
    return sum(1 << i for i in lanes_of(mask) if p[i])


def same(v, mask, lane):
    return sum(1 << i for i in lanes_of(mask) if v[i] == v[lane])


def reduced(f, dtype):
    return lambda v, mask, lane: int(np.array([f.reduce(v[lanes_of(mask)].view(dtype), dtype=dtype)], dtype).view(np.uint32)[0])


# Statement: %r1 is the value, %r2 the mask, %p1 whether the value is odd, %l1 the value twice; the result in %r3. Reference: of the
# 32 values, the mask and a lane of it.
OPERATIONS = {
    "ballot": ("vote.sync.ballot.b32 %r3, %p1, %r2;", lambda v, m, l: vote(v & 1, m)),
    "ballot_not": ("vote.sync.ballot.b32 %r3, !%p1, %r2;", lambda v, m, l: vote(~v & 1, m)),
    "all": ("vote.sync.all.pred %p2, %p1, %r2; selp.u32 %r3, 1, 0, %p2;", lambda v, m, l: vote(v & 1, m) == m),
    "any": ("vote.sync.any.pred %p2, %p1, %r2; selp.u32 %r3, 1, 0, %p2;", lambda v, m, l: vote(v & 1, m) != 0),
    "uni": ("vote.sync.uni.pred %p2, %p1, %r2; selp.u32 %r3, 1, 0, %p2;", lambda v, m, l: vote(v & 1, m) in (0, m)),
    "match_any": ("match.any.sync.b32 %r3, %r1, %r2;", same),
    "match_any_64": ("match.any.sync.b64 %r3, %l1, %r2;", same),
    "match_all": ("match.all.sync.b32 %r3, %r1, %r2;", lambda v, m, l: m * (same(v, m, l) == m)),
    "match_all_64_p": ("match.all.sync.b64 %r4|%p2, %l1, %r2; selp.u32 %r3, %r4, 7, %p2;", lambda v, m,
                       l: m if same(v, m, l) == m else 7),
    "shuffle": ("clz.b32 %r5, %r2; sub.u32 %r5, 31, %r5;"
                "shfl.sync.idx.b32 %r3, %r1, %r5, 31, %r2;", lambda v, m, l: v[lanes_of(m)[-1]]),
    "redux_add": ("redux.sync.add.u32 %r3, %r1, %r2;", reduced(np.add, np.uint32)),
    "redux_add_s": ("redux.sync.add.s32 %r3, %r1, %r2;", reduced(np.add, np.int32)),
    "redux_min": ("redux.sync.min.u32 %r3, %r1, %r2;", reduced(np.minimum, np.uint32)),
    "redux_min_s": ("redux.sync.min.s32 %r3, %r1, %r2;", reduced(np.minimum, np.int32)),
    "redux_max": ("redux.sync.max.u32 %r3, %r1, %r2;", reduced(np.maximum, np.uint32)),
    "redux_max_s": ("redux.sync.max.s32 %r3, %r1, %r2;", reduced(np.maximum, np.int32)),
    "redux_and": ("redux.sync.and.b32 %r3, %r1, %r2;", reduced(np.bitwise_and, np.uint32)),
    "redux_or": ("redux.sync.or.b32 %r3, %r1, %r2;", reduced(np.bitwise_or, np.uint32)),
    "redux_xor": ("redux.sync.xor.b32 %r3, %r1, %r2;", reduced(np.bitwise_xor, np.uint32)),
}
LOAD = """ld.global.u32 %r1, [%x0]; and.b32 %r9, %r1, 1; setp.eq.u32 %p1, %r9, 1; mov.b64 %l1, {%r1, %r1}; mov.u32 %r3, 12345;"""
SHAPES = {  # how the lanes get there, and who belongs together: the masks of a warp's groups
    "straight": ("mov.u32 %r2, -1; {op}", [ALL]),
    "arms": ("mov.u32 %r2, -1; setp.lt.u32 %p3, %lane, 11; @%p3 bra A;\n{op}\nbra B;\nA: {op}\nB:", [ALL]),
    "arms_of_odd_lanes": ("mov.u32 %r2, -1; and.b32 %r8, %lane, 1; setp.eq.u32 %p3, %r8, 0; @%p3 bra A;\n{op}\nbra B;\nA: {op}\nB:",
                          [ALL]),
    "some": ("mov.u32 %r2, 0x00ff1001; shr.u32 %r8, %r2, %lane; and.b32 %r8, %r8, 1; setp.eq.u32 %p3, %r8, 0; @%p3 bra B;\n"
             "{op}\nB:", [0x00FF1001]),
    "two_groups_in_arms": ("mov.u32 %r2, 0x0f0f0f0f; shr.u32 %r8, %lane, 2; and.b32 %r8, %r8, 1; setp.eq.u32 %p3, %r8, 0; "
                           "@%p3 bra A;\n"
                           "mov.u32 %r2, 0xf0f0f0f0; {op}\nbra B;\nA: {op}\nB:", [0x0F0F0F0F, 0xF0F0F0F0]),
    "two_groups_at_once": ("and.b32 %r8, %lane, 1; shl.b32 %r2, 0x55555555, %r8; {op}", [0x55555555, 0xAAAAAAAA]),
    "one_lane_each": ("mov.u32 %r2, 1; shl.b32 %r2, %r2, %lane; {op}", [1 << lane for lane in range(32)]),
    "exited": ("mov.u32 %r2, -1; setp.gt.u32 %p3, %lane, 20; @%p3 exit;\n{op}", [(1 << 21) - 1]),
          # lanes that are gone do not count
    "exit_later": ("mov.u32 %r2, -1; setp.gt.u32 %p3, %lane, 20; @!%p3 bra A;\n mov.u32 %r8, 40;\n"
                   "L: sub.u32 %r8, %r8, 1; setp.ne.u32 %p4, %r8, 0; @%p4 bra L;\nexit;\nA: {op}",
                   [(1 << 21) - 1]),
}


@pytest.mark.on_silicon
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation, shape):
    statement, reference = OPERATIONS[operation]
    body, masks = SHAPES[shape]
    if "exit" in shape and operation == "shuffle":
        statement = "shfl.sync.idx.b32 %r3, %r1, 20, 31, %r2;"
    values = words(6, 32)
    values[1] = values[1, 0]
    values[2] = 0x80000000 + LANE // 8
    values[3], values[4] = values[3] | 1, 6
    wanted = np.full((6, 32), 12345 if "exit" not in shape else 0, np.uint32)
    for v, w in zip(values, wanted):
        for mask in masks:
            for lane in lanes_of(mask):
                # A mask that names lanes that have exited is compared with those that are left.
                w[lane] = reference(v, mask, lane)
    for seed in range(4):
        out = np.zeros((6, 32), np.uint32)
        run(LOAD + body.format(op=statement) + " st.global.u32 [%x1], %r3;", values, out, grid=3, block=64, seed=seed)
        np.testing.assert_array_equal(out, wanted)


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", range(3))
def test_active_mask(seed):
    """Nothing promises that lanes stay together: those of an arm, and the lane itself."""
    out = np.zeros((4, 32), np.uint32)
    run("setp.lt.u32 %p1, %lane, 9; @%p1 bra A;\nactivemask.b32 %r1; st.global.u32 [%x0], %r1; bra B;\n"
        "A: activemask.b32 %r1; st.global.u32 [%x0], %r1;\nB:",
        out, block=128, seed=seed)
    arms = np.where(LANE < 9, 0x1FF, ALL - 0x1FF).astype(np.uint32)
    assert (out & ~arms == 0).all() and (out >> LANE.astype(np.uint32) & 1).all()
    assert (out == arms).mean() > 0.5


@pytest.mark.on_silicon
@pytest.mark.parametrize("mask", (ALL, 0x00F0, 0x80000001))
def test_elect(mask):
    """One lane of the mask leads, all know which, and it is the same one each time."""
    for seed in range(4):
        leader, leads, again = np.full((3, 32), 99, np.uint32)
        run("""shr.u32 %r1, %n3, %lane; and.b32 %r1, %r1, 1; setp.eq.u32 %p1, %r1, 0; @%p1 exit;
               elect.sync %r2|%p2, %n3; selp.u32 %r3, 1, 0, %p2; st.global.u32 [%x0], %r2; st.global.u32 [%x1], %r3;
               elect.sync %r4|%p2, %n3; st.global.u32 [%x2], %r4;""", leader, leads, again, np.uint32(mask), arch=90, seed=seed)
        members = lanes_of(mask)
        assert len(set(leader[members])) == 1 and leader[members[0]] in members and (leader == again).all()
        np.testing.assert_array_equal(leads[members], members == leader[members[0]])


# ------------------------------------------------------------------------------------------------------------ planted bugs

OWN = "mov.u32 %r9, s; mad.lo.u32 %r9, %t, 4, %r9; mov.u32 %r1, %t;\n"
HALF = "setp.lt.u32 %p1, %lane, 16;\n"
PLANTED = {
    "missing_syncwarp_read": ("race", OWN + "st.shared.u32 [%r9], %r1;\n<<//|>> bar.warp.sync -1;\n"
                              "xor.b32 %r9, %r9, 4; ld.shared.u32 %r2, [%r9]; // caught"),
    "missing_syncwarp_write": ("race", OWN + "st.shared.u32 [%r9], %r1; bar.warp.sync -1; xor.b32 %r8, %r9, 4;\n"
                               "ld.shared.u32 %r2, [%r8];\n<<//|>> bar.warp.sync -1;\n"
                               "st.shared.u32 [%r9], %r2; // caught"),
    "a_shuffle_orders_no_memory": ("race",
                                   OWN + "st.shared.u32 [%r9], %r1;\n<<shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1|bar.warp.sync -1>>;\n"
                                   "xor.b32 %r9, %r9, 4; ld.shared.u32 %r2, [%r9]; // caught"),
    "syncwarp_of_other_lanes": ("race", OWN + "st.shared.u32 [%r9], %r1; and.b32 %r3, %lane, 1; shl.b32 %r4, 0x55555555, %r3;\n"
                                "bar.warp.sync <<%r4|-1>>;\n"
                                "xor.b32 %r9, %r9, 4; ld.shared.u32 %r2, [%r9]; // caught"),
    "syncwarp_does_not_order_other_warps": ("race", OWN + "st.shared.u32 [%r9], %r1; // caught\n"
                                        "<<bar.warp.sync -1|bar.sync 0>>;\nxor.b32 %r9, %r9, 128; ld.shared.u32 %r2, [%r9]; "
                                        "// caught",
                                            dict(block=64)),
    "lane_outside_its_mask": ("divergent-collective", "setp.eq.u32 %p1, %lane, 1; mov.u32 %r2, <<0x7fffffff|-1>>;\n"
                              "vote.sync.ballot.b32 %r3, %p1, %r2; // caught"),
    "shuffle_from_a_lane_outside_the_mask": ("uninitialised", HALF + "@!%p1 exit; mov.u32 %r1, 1;\n"
                                        "shfl.sync.down.b32 %r2, %r1, <<8|0>>, 31, 0xffff;\nst.global.u32 [%x0], %r2; // caught"),
    "shuffle_from_a_lane_that_never_was": ("uninitialised", "mov.u32 %r1, 1;\nshfl.sync.bfly.b32 %r2, %r1, <<16|4>>, 31, -1;\n"
                                        "st.global.u32 [%x0], %r2; // caught", dict(block=24)),
    "shuffle_of_an_undefined_value": ("uninitialised", "setp.eq.u32 %p1, %lane, <<3|33>>; @!%p1 mov.u32 %r1, 1; "
                                      "shfl.sync.idx.b32 %r2, %r1, 3, 31, -1;\nst.global.u32 [%x0], %r2; // caught"),
    "shuffle_by_an_undefined_lane": ("uninitialised", "<<//|>> mov.u32 %r2, 1;\nmov.u32 %r1, 1;\n"
                                     "shfl.sync.idx.b32 %r2, %r1, %r2, 31, -1; // caught"),
    "vote_of_an_undefined_value": ("uninitialised", "<<//|>> mov.u32 %r1, 1;\nsetp.eq.u32 %p1, %r1, 1;\n"
                                   "vote.sync.any.pred %p2, %p1, -1; // caught"),
    "redux_of_an_undefined_value": ("uninitialised", "setp.eq.u32 %p1, %lane, <<3|33>>; @!%p1 mov.u32 %r1, 1; "
                                    "redux.sync.add.u32 %r2, %r1, -1;\nst.global.u32 [%x0], %r2; // caught"),
    "half_a_warp_shuffles": ("divergent-collective",
                             HALF + "mov.u32 %r1, 1; @!%p1 bra B;\nshfl.sync.idx.b32 %r2, %r1, 0, 31, <<-1|0xffff>>; // caught\n"
                             "B: bar.warp.sync -1; // caught"),
    "arms_with_different_operations": ("divergent-collective", HALF + "mov.u32 %r1, 1; @!%p1 bra A;\n"
                                       "shfl.sync.<<bfly|idx>>.b32 %r2, %r1, 0, 31, -1; // caught\nbra B;\n"
                                       "A: shfl.sync.idx.b32 %r2, %r1, 0, 31, -1; // caught\nB:"),
    "arms_with_different_types": ("divergent-collective",
                                  HALF + "mov.u32 %r1, 1; @!%p1 bra A;\nredux.sync.max.<<s32|u32>> %r2, %r1, -1; // caught\n"
                                  "bra B;\n"
                                  "A: redux.sync.max.u32 %r2, %r1, -1; // caught\nB:"),
    "arms_with_different_masks": ("divergent-collective",
                                  HALF + "mov.u32 %r1, 1; @!%p1 bra A;\nredux.sync.max.u32 %r2, %r1, <<0x1ffff|-1>>; // caught\n"
                                  "bra B;\n"
                                  "A: redux.sync.max.u32 %r2, %r1, -1; // caught\nB:"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_bugs(case):
    kind, body, *options = PLANTED[case]
    options = dict(variables=".shared .align 4 .b8 s[512];") | (options[0] if options else {})
    wrong, right = twins(body)
    for seed in range(5):
        caught(kind, wrong, np.zeros(64, np.uint32), seed=seed, **options)
        run(right, np.zeros(64, np.uint32), seed=seed, **options)
