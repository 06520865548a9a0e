"""mma.sync, ldmatrix, stmatrix and movmatrix of the virtual GPU, with fragments as the tables of the PTX ISA lay them out, against
numpy; and the counters of shared and global memory."""
import numpy as np
import pytest

from c_api import to_bf16, to_f32
from raw_ptx import aligned, caught, run, twins

RNG = np.random.default_rng(0)
GROUP, IN_GROUP = np.divmod(np.arange(32), 4)  # "groupID" and "threadID_in_group" of each lane

# ---------------------------------------------------------------------------------------------------------------- mma.sync


def indices(matrix, k):
    """(rows, columns), [32, elements], of a lane's elements: PTX ISA 9.7.14.5, "Matrix Fragments for mma.m16n8k8", "..k16"."""
    i = np.arange({"A": k // 2, "B": k // 4, "C": 4}[matrix])
    g, t = GROUP[:, None], IN_GROUP[:, None]
    if matrix == "A":
        second = (i >= 2) & (i < 4) | (i >= 6)  # a2, a3 and a6, a7 belong to row groupID + 8; a4 to a7 are eight columns on
        return g + 8 * second, t * 2 + (i & 1) + 8 * (i >= 4)
    if matrix == "B":
        return t * 2 + (i & 1) + 8 * (i >= 2), g + 0 * i
    return g + 8 * (i >= 2), t * 2 + (i & 1)


def fragment(matrix, values, k):
    """The registers of each lane: two 16-bit values in one, the first in the lower half."""
    return np.ascontiguousarray(values[indices(matrix, k)]).view(np.uint32)


FORMATS = {"bf16": (to_bf16, to_f32), "f16": (lambda x: np.asarray(x, np.float16).view(np.uint16), lambda x: x.view(np.float16))}


def multiply(k, kind, accumulator, a, b, c):
    """d of one mma.sync; a, b: 16-bit patterns, c: f32 or f16 values."""
    words = lambda prefix, n: "{" + ", ".join(f"%r{prefix}{i}" for i in range(n)) + "}"
    na, nb, nc = k // 4, k // 8, 4 if accumulator == "f32" else 2
    load = lambda prefix, n, arg: " ".join(f"ld.global.u32 %r{prefix}{i}, [%l{arg + 1}+{4 * i}];" for i in range(n))
    at = " ".join(f"mul.wide.u32 %l{arg + 1}, %t, {4 * n}; add.s64 %l{arg + 1}, %l{arg + 1}, %a{arg};" for arg,
                  n in enumerate((na, nb, nc, nc)))
    out, types = np.zeros((32, nc), np.uint32), f"{accumulator}.{kind}.{kind}.{accumulator}"
    counters = run(f"""{at} {load(1, na, 0)} {load(2, nb, 1)} {load(3, nc, 2)}
            mma.sync.aligned.m16n8k{k}.row.col.{types} {words(4, nc)}, {words(1, na)}, {words(2, nb)}, {words(3, nc)};
            {" ".join(f"st.global.u32 [%l4+{4 * i}], %r4{i};" for i in range(nc))}""",
                   fragment("A", a, k), fragment("B", b, k), fragment("C", c, k), out, written={3}, fresh={3})
    assert counters is None or counters["matrix_flops"] == 2 * 16 * 8 * k
    d = np.zeros((16, 8), c.dtype)
    d[indices("C", k)] = out.view(c.dtype)
    return d


TYPES = ("bf16", "f32"), ("f16", "f32"), ("f16", "f16")
SHAPES = pytest.mark.parametrize("k, kind, accumulator", [(k, *types) for k in (8, 16) for types in TYPES])


@pytest.mark.on_silicon
@SHAPES
def test_products(k, kind, accumulator):
    narrow, wide = FORMATS[kind]
    dtype = np.float32 if accumulator == "f32" else np.float16
    for scale in (1, 2.0**-6, 30):
        a, b, c = (RNG.standard_normal(shape) for shape in ((16, k), (k, 8), (16, 8)))
        a, b, c = narrow(a * scale), narrow(b), (c * scale).astype(dtype)
        d = multiply(k, kind, accumulator, a, b, c)
        x, y = wide(a).astype(np.float64), wide(b).astype(np.float64)
        wanted, size = x @ y + c, np.abs(x) @ np.abs(y) + np.abs(c)
        tolerance = size * (k + 1) * 2.0**-23 + (np.abs(wanted) * 2.0**-11 + 2.0**-25 if accumulator == "f16" else 0)
        np.testing.assert_array_less(np.abs(d - wanted), tolerance + 1e-30)


@pytest.mark.on_silicon
@SHAPES
def test_whole_numbers_are_exact(k, kind, accumulator):
    """Every product of single ones, too: an element in a wrong place shows."""
    narrow, _ = FORMATS[kind]
    dtype = np.float32 if accumulator == "f32" else np.float16
    a, b, c = (RNG.integers(-8, 9, shape).astype(np.float64) for shape in ((16, k), (k, 8), (16, 8)))
    np.testing.assert_array_equal(multiply(k, kind, accumulator, narrow(a), narrow(b), c.astype(dtype)), a @ b + c)
    place = np.arange(16 * k).reshape(16, k)
    for column in range(k):
        b = np.eye(k)[:, column, None] * (np.arange(8) == column % 8)
        np.testing.assert_array_equal(multiply(k, kind, accumulator, narrow(place), narrow(b), np.zeros((16, 8), dtype)), place @ b)


@pytest.mark.on_silicon
def test_infinities_and_nan_stay_in_their_row_or_column():
    a, b, c = np.ones((16, 16)), np.ones((16, 8)), np.zeros((16, 8), np.float32)
    a[3, 5], b[9, 6], c[12, 1] = np.inf, np.nan, -np.inf
    d = multiply(16, "bf16", "f32", to_bf16(a), to_bf16(b), c)
    wanted = np.full((16, 8), 16.0)
    wanted[3], wanted[12, 1], wanted[:, 6] = np.inf, -np.inf, np.nan
    np.testing.assert_array_equal(d, wanted)


# ---------------------------------------------------------------------------------------------- ldmatrix, stmatrix, movmatrix


def places(count):
    """Byte offsets, multiples of 16, for 8 count rows: anywhere in 4096 bytes."""
    return np.r_[RNG.permutation(256)[:8 * count] * 16, np.full(32 - 8 * count, 16 * 255)].astype(np.uint32)


def matrices(count, memory, rows, trans):
    """What each lane holds of each matrix: [32, count] words."""
    out = []
    for i in range(count):
        m = np.stack([memory.view(np.uint16)[row // 2:row // 2 + 8] for row in rows[8 * i:8 * i + 8]])
        m = m.T if trans else m
        out.append(np.stack([m[GROUP, 2 * IN_GROUP], m[GROUP, 2 * IN_GROUP + 1]], 1).copy().view(np.uint32)[:, 0])
    return np.stack(out, 1)


FILL = """mov.u32 %r8, s; mov.u32 %r9, 0; mov.u64 %l1, %y0; mad.lo.u32 %r7, %t, 16, %r8;
F: ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%l1]; st.shared.v4.u32 [%r7], {%r1, %r2, %r3, %r4};
add.s64 %l1, %l1, 512; add.u32 %r7, %r7, 512; add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 8; @%p1 bra F;
bar.warp.sync -1; ld.global.u32 %r5, [%x1]; add.u32 %r5, %r5, %r8;
"""
SHARED = ".shared .align 128 .b8 s[8192];"


@pytest.mark.on_silicon
@pytest.mark.parametrize("trans", ("", ".trans"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix(count, trans):
    names = [f"%r{20 + i}" for i in range(count)]
    for _ in range(3):
        memory, rows, out = RNG.integers(0, 256, 4096, np.uint8), places(count), np.zeros((32, count), np.uint32)
        run(FILL + f"""ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(names)}}}, [%r5];
            mad.wide.u32 %l2, %t, {4 * count}, %a2;
            {" ".join(f"st.global.u32 [%l2+{4 * i}], {name};" for i, name in enumerate(names))}""",
            memory, rows, out, variables=SHARED)
        np.testing.assert_array_equal(out, matrices(count, memory, rows, trans))


@pytest.mark.on_silicon
@pytest.mark.parametrize("trans", ("", ".trans"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_stmatrix(count, trans):
    """What ldmatrix would read back, and nothing beside it."""
    names = [f"%r{20 + i}" for i in range(count)]
    memory, rows, out = RNG.integers(0, 256, 4096, np.uint8), places(count), np.zeros(4096, np.uint8)
    values = RNG.integers(0, 2**32, (32, count), np.uint32)
    run(FILL + f"""mad.wide.u32 %l2, %t, {4 * count}, %a2;
        {" ".join(f"ld.global.u32 {name}, [%l2+{4 * i}];" for i, name in enumerate(names))}
        bar.warp.sync -1; stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r5], {{{", ".join(names)}}};
        bar.warp.sync -1; mov.u32 %r9, 0; mad.lo.u32 %r7, %t, 4, %r8; mov.u64 %l1, %x3;
        G: ld.shared.u32 %r1, [%r7]; st.global.u32 [%l1], %r1; add.s64 %l1, %l1, 128; add.u32 %r7, %r7, 128;
        add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 32; @%p1 bra G;""",
        memory, rows, values, out, variables=SHARED, arch=90)
    np.testing.assert_array_equal(matrices(count, out, rows, trans), values)
    others = np.setdiff1d(np.arange(4096), rows[:8 * count, None] + np.arange(16))
    np.testing.assert_array_equal(out[others], memory[others])


@pytest.mark.on_silicon
def test_movmatrix():
    m, out = RNG.integers(0, 2**16, (8, 8), np.uint16), np.zeros((8, 8), np.uint16)
    run("ld.global.u32 %r1, [%x0]; movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.u32 [%x1], %r2;", m, out)
    np.testing.assert_array_equal(out, m.T)


# ---------------------------------------------------------------------------------------------------------------- counters


def wavefronts(addresses, size):
    """(needed, least): 32 banks of 4 bytes; 8 or 16 bytes a lane go in two or four parts of the warp."""
    needed = least = 0
    lanes = {1: 32, 2: 32, 4: 32, 8: 16, 16: 8}[size]
    for begin in range(0, 32, lanes):
        words = {int(a) // 4 + i for a in addresses[begin:begin + lanes] for i in range(max(1, size // 4))}
        needed += max(sum(w % 32 == bank for w in words) for bank in range(32))
        least += 1
    return needed, least


LANE = np.arange(32, dtype=np.uint32)
PATTERNS = [("stride_1", LANE * 4, 4, 0), ("stride_2", LANE * 8, 4, 1), ("stride_3", LANE * 12, 4, 0),
            ("stride_8", LANE * 32, 4, 7), ("stride_32", LANE * 128, 4, 31),
            ("stride_33", LANE * 132, 4, 0), ("broadcast", LANE * 0, 4, 0), ("pairs_of_a_column", LANE // 2 * 128, 4, 15),
            ("two_words_of_a_bank", LANE % 2 * 128, 4, 1),
            ("bytes", LANE, 1, 0), ("halves", LANE * 2, 2, 0), ("halves_of_a_column", LANE * 128 + 2, 2, 31),
            ("v2", LANE * 8, 8, 0), ("v2_stride_16", LANE * 16, 8, 2),
            ("v4", LANE * 16, 16, 0), ("v4_stride_32", LANE * 32, 16, 4), ("v4_rows_of_128", LANE * 128, 16, 28),
            ("v4_rows_of_144", LANE * 144, 16, 0), ("v4_broadcast", LANE * 0, 16, 0)]
PATTERNS += [(f"random_{size}_{i}", RNG.integers(0, 4096 // size, 32).astype(np.uint32) * size % (4096 >> i), size,
              None) for size in (1, 2, 4, 8, 16) for i in (0, 2, 4)]
ACCESS = {1: "u8 %h1", 2: "u16 %h1", 4: "u32 %r1", 8: "v2.u32 {%r1, %r2}", 16: "v4.u32 {%r1, %r2, %r3, %r4}"}
VALUES = "mov.u16 %h1, 1; mov.u32 %r1, 1; mov.u32 %r2, 1; mov.u32 %r3, 1; mov.u32 %r4, 1;"


@pytest.mark.parametrize("name, addresses, size, extra", PATTERNS, ids=[p[0] for p in PATTERNS])
def test_shared_memory_conflicts(name, addresses, size, extra):
    needed, least = wavefronts(addresses, size)
    assert extra in (None, needed - least)
    t, register = ACCESS[size].split(" ", 1)
    for instruction in (f"ld.volatile.shared.{t} {register}, [%r9];", f"st.volatile.shared.{t} [%r9], {register};"):
        body = f"ld.global.u32 %r9, [%x0]; mov.u32 %r8, s; add.u32 %r9, %r9, %r8; {VALUES}\n{instruction}"
        counters = run(body, addresses, variables=SHARED)
        assert (counters["shared_wavefronts"], counters["shared_conflicts"]) == (needed, needed - least)
        assert counters["conflicts_by_line"] == ({"k.cu:2": needed - least} if needed > least else {})


LAYOUTS = {"rows_of_128": (lambda row, unit: row * 128 + unit * 16, 28), "padded": (lambda row, unit: row * 144 + unit * 16, 0),
           "swizzled": (lambda row, unit: row * 128 + (unit ^ row % 8) * 16, 0),
           "rows_of_64": (lambda row, unit: row * 64 + unit % 4 * 16, 12),
           "rows_of_64_swizzled": (lambda row, unit: row * 64 + (unit % 4 ^ row // 2 % 4) * 16, 0)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ldmatrix_conflicts(layout):
    place, extra = LAYOUTS[layout]
    memory, rows = np.zeros(4096, np.uint8), np.array([place(lane % 16, lane // 16) for lane in range(32)], np.uint32)
    counters = run(FILL + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r5];", memory, rows,
                   variables=SHARED)
    assert counters["conflicts_by_line"] == ({"k.cu:5": extra} if extra else {})


SECTORS = [("contiguous", LANE * 4, 4, 0, 4), ("off_by_4", LANE * 4, 4, 4, 5), ("stride_2", LANE * 8, 4, 0, 8),
           ("stride_8", LANE * 32, 4, 0, 32), ("broadcast", LANE * 0, 4, 0, 1),
           ("backwards", LANE[::-1] * 4, 4, 0, 4), ("bytes", LANE, 1, 0, 1), ("bytes_off_by_1", LANE, 1, 1, 2),
           ("v2", LANE * 8, 8, 0, 8), ("v4", LANE * 16, 16, 0, 16),
           ("v4_off_by_16", LANE * 16, 16, 16, 17), ("rows_of_128", LANE // 8 * 128 + LANE % 8 * 4, 4, 0, 4),
           ("shuffled", RNG.permutation(LANE) * 4, 4, 0, 4)]


@pytest.mark.parametrize("name, addresses, size, offset, sectors", SECTORS, ids=[s[0] for s in SECTORS])
def test_global_memory_sectors(name, addresses, size, offset, sectors):
    assert len({(int(a) + offset + b) // 32 for a in addresses for b in range(size)}) == sectors
    t, register = ACCESS[size].split(" ", 1)
    memory = aligned(4096, np.uint8, offset)
    begin = "ld.global.u32 %r9, [%x0]; mad.wide.u32 %l1, %r9, 1, %a1;" + VALUES
    base = run(begin, at := aligned(32, np.uint32), memory)
    at[:] = addresses
    for kind, half, instruction in (("load", "", f"ld.volatile.global.{t} {register}, [%l1];"),
                                    ("store", "", f"st.volatile.global.{t} [%l1], {register};"),
                                    ("load", "setp.lt.u32 %p1, %lane, 16; @%p1", f"ld.volatile.global.{t} {register}, [%l1];")):
        counters = run(f"{begin}\n{half} {instruction}", at, memory)
        lanes = 16 if half else 32
        wanted = len({(int(a) + offset) // 32 for a in addresses[:lanes]})
        assert counters[f"global_{kind}_bytes"] - base[f"global_{kind}_bytes"] == lanes * size
        assert counters[f"global_{kind}_sectors"] - base[f"global_{kind}_sectors"] == wanted


# ------------------------------------------------------------------------------------------------------------ planted bugs

MMA = "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r2}, {%r3}, {%f5, %f6, %f7, %f8};"
SET = " ".join(f"mov.u32 %r{i}, 0; mov.f32 %f{i + 4}, 0f00000000;" for i in range(1, 5)) + "\n"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];"
STMATRIX = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r5], {%r1, %r2, %r3, %r4};"
ROW = "mov.u32 %r5, s; mad.lo.u32 %r5, %lane, 16, %r5;\n"
ZERO = ROW + "st.shared.v4.u32 [%r5], {0, 0, 0, 0};\nbar.warp.sync -1;\n"
ZERO_BUT_9 = ZERO.replace("st", "setp.ne.u32 %p1, %lane, 9; @%p1 st")
STORE_ROW = "setp.lt.u32 %p2, %lane, 4; @%p2 st.global.f32 [%x0], %f1; // caught"  # row 0, columns 0, 2, 4, 6
HALF = "setp.lt.u32 %p1, %lane, <<16|32>>; @!%p1 bra B;\n"
HALVES = "setp.lt.u32 %p1, %lane, <<16|32>>; @%p1 bra A;\n{0} // caught\nbra B;\nA: {0} // caught\nB:"


def but(register, wrong, right):
    """SET, with that register undefined in one lane."""
    kind = {"r": "u32", "f": "f32"}[register[0]]
    move = f"mov.{kind} %{register},"
    return f"setp.ne.u32 %p1, %lane, <<{wrong}|{right}>>;\n" + SET.replace(move, "@%p1 " + move)


PLANTED = {
    "mma_of_half_a_warp": ("divergent-collective", SET + HALF + MMA + " // caught\nB: bar.warp.sync -1; // caught"),
    "mma_behind_an_exit": ("divergent-collective", SET + "setp.lt.u32 %p1, %lane, <<31|32>>; @!%p1 exit;\n" + MMA + " // caught"),
    "mma_of_a_warp_that_is_not_whole": ("divergent-collective",
                                        SET + "setp.gt.u32 %p1, %blockdim, <<16|32>>; @!%p1 exit;\n" + MMA + " // caught",
                                        dict(block=24)),
    "mma_in_two_arms": ("divergent-collective", SET + HALVES.replace("{0}", MMA)),
    "ldmatrix_in_two_arms": ("divergent-collective", ZERO + HALVES.replace("{0}", LDMATRIX)),
    "movmatrix_of_half_a_warp": ("divergent-collective", SET + HALF + "movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; "
                                 "// caught\nB: bar.warp.sync -1; // caught"),
    "undefined_row_of_a": ("uninitialised", but("r1", 3, 7) + MMA + "\n" + STORE_ROW),
    "undefined_element_of_c": ("uninitialised", but("f5", 3, 4) + MMA + "\n" + STORE_ROW),
    "undefined_column_of_b": ("uninitialised", but("r3", 8, 7) + MMA + "\n" + STORE_ROW),
    "ldmatrix_without_a_barrier": ("race",
                                   ROW + "st.shared.v4.u32 [%r5], {0, 0, 0, 0};\n<<//|>> bar.warp.sync -1;\n" +
                                  LDMATRIX + " // caught"),
    "ldmatrix_of_another_warp": ("race", "mov.u32 %r5, s; mad.lo.u32 %r5, %t, 16, %r5;\n"
                                 "st.shared.v4.u32 [%r5], {0, 0, 0, 0}; // caught\nbar.<<warp.sync -1|sync 0>>;\n"
                                 + ROW + LDMATRIX + " // caught", dict(block=64)),
    "ldmatrix_misaligned": ("misaligned", ZERO + "add.u32 %r5, %r5, <<8|16>>;\n" + LDMATRIX + " // caught"),
    "ldmatrix_past_the_end": ("out-of-range", ZERO + "add.u32 %r5, %r5, <<7696|7680>>;\n" + LDMATRIX + " // caught"),
    "ldmatrix_of_a_row_never_written": ("uninitialised", ZERO_BUT_9 + LDMATRIX + "\nsetp.eq.u32 %p2, %lane, <<6|8>>; "
                                        "@%p2 st.global.u32 [%x0], %r2; // caught"),
    "ldmatrix_of_a_column_never_written": ("uninitialised", ZERO_BUT_9 + LDMATRIX.replace(".shared", ".trans.shared") +
                                           "\nand.b32 %r9, %lane, 3; setp.eq.u32 %p2, %r9, <<0|1>>; "
                                        "@%p2 st.global.u32 [%x0], %r2; // caught"),
    "ldmatrix_address_undefined": ("uninitialised",
                                   ZERO + "setp.ne.u32 %p1, %lane, <<9|33>>; @%p1 mov.u32 %r6, %r5;\n" +
                                   LDMATRIX.replace("r5", "r6") + " // caught"),
    "stmatrix_without_a_barrier": ("race",
                                   ROW + SET + STMATRIX + "\n<<//|>> bar.warp.sync -1;\n"
                                   "ld.shared.v4.u32 {%r1, %r2, %r3, %r4}, [%r5]; // caught", dict(arch=90)),
    "stmatrix_of_an_undefined_value": ("uninitialised", ROW + but("r4", 5, 32) + STMATRIX + "\nbar.warp.sync -1;"
                                       "ld.shared.u32 %r1, [%r5+4];\n"
                                       "setp.eq.u32 %p1, %lane, 25; @%p1 st.global.u32 [%x0], %r1; // caught", dict(arch=90)),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_bugs(case):
    kind, body, *options = PLANTED[case]
    options = dict(variables=SHARED) | (options[0] if options else {})
    wrong, right = twins(body)
    for seed in range(3):
        caught(kind, wrong, np.zeros(64, np.float32), seed=seed, **options)
        run(right, np.zeros(64, np.float32), seed=seed, **options)
