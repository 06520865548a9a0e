"""wgmma of the virtual GPU (PTX ISA 9.7.15): every shape, layout and operand form against numpy, and reports of misuse."""
import numpy as np
import pytest

import vgpu
from raw_ptx import Kernel

FENCE, COMMIT, WAIT, PROXY = ("wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;",
                              "fence.proxy.async.shared::cta;")


# ------------------------------------------------------------------------------------------------ operands in shared memory


class Layout:
    """Where element (row, k) lies, rows along M or N, before the swizzle; leading and stride byte offset; and the offsets at which
    the blocks of 16 k start (PTX ISA 9.7.15.5.1.2: canonical layouts)."""

    def __init__(self, rows, k, k_major, swizzle, apart=1, other=False):
        """swizzle: 0, 32, 64, 128 bytes. apart: distance of the atoms, in atoms. other: the other dimension is the outer one."""
        self.k_major, self.swizzle, width = k_major, swizzle, swizzle or 16
        r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
        atom, per_row = 8 * width * apart, width // 2  # bytes of eight rows of an atom; elements of one row
        if k_major:
            panels, groups = k // per_row, rows // 8
            self.stride = atom * panels if other else atom
            panel = atom if other else atom * groups
            self.leading = panel if not swizzle else 16
            self.offset = c // per_row * panel + r // 8 * self.stride + r % 8 * width + c % per_row * 2
            self.starts = [k0 // per_row * panel + k0 % per_row * 2 for k0 in range(0, k, 16)]
        else:
            panels, groups = -(-rows // per_row), k // 8
            along_k, along_mn = (atom * panels, atom) if other else (atom, atom * groups)
            self.leading, self.stride = (along_mn, along_k) if swizzle else (along_k, along_mn)
            self.offset = r // per_row * along_mn + c // 8 * along_k + c % 8 * width + r % per_row * 2
            self.starts = [k0 // 8 * along_k for k0 in range(0, k, 16)]
        self.bytes = -(-(int(self.offset.max()) + 2) // 1024) * 1024

    def image(self, matrix):
        """The bytes of shared memory that hold bits [rows, k]; -1 (NaN) where there are none."""
        at = self.offset ^ (self.offset >> 7 & max(self.swizzle // 16 - 1, 0)) << 4
        memory = np.full(self.bytes // 2, 0xFFFF, np.uint16)
        memory[at // 2] = matrix
        return memory

    def descriptors(self, base):
        """One a block of 16 k, for an operand `base` bytes into the block's shared memory."""
        mode = {0: 0, 128: 1, 64: 2, 32: 3}[self.swizzle]
        return [((base + s) >> 4) | (self.leading >> 4) << 16 | (self.stride >> 4) << 32 | mode << 62 for s in self.starts]


# ------------------------------------------------------------------------------------------------------------------- kernels


def instruction(n, step, kind, accumulator, a_registers, transposes, scale, signs):
    outputs = ", ".join(f"d{i}" for i in range(n // (2 if accumulator == "f32" else 4)))
    a = "{" + ", ".join(f"a{step}_{i}" for i in range(4)) + "}" if a_registers else f"a{step}"
    modes = ", ".join(map(str, signs + (transposes[1:] if a_registers else transposes)))
    shape = f"m64n{n}k16.{accumulator}.{kind}.{kind}"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{outputs}}}, {a}, b{step}, {scale}, {modes}; // step {step}"


def product(n=64, steps=2, kind="bf16", accumulator="f32", a_registers=False, transposes=(0, 0), scales=None, signs=(1, 1),
            nbytes=0):
    """D (+)= sum of A B over the steps. image: shared memory. operands: a and b descriptors of each step. fragments: A's registers
    [step][4][thread]. d: accumulators [register][thread], in and out. accumulate: the predicate p."""
    count = n // (2 if accumulator == "f32" else 4)
    load = []
    for s in range(steps):
        load += [f"ld.global.u64 {x}{s}, [operands+{16 * s + 8 * i}]; add.u64 {x}{s}, {x}{s}, o;" for i, x in enumerate("ab")]
        if a_registers:
            load += [f"ld.global.u32 a{s}_{i}, [fragments+{512 * (4 * s + i)}];" for i in range(4)]
    scales = scales or ["p"] + ["1"] * (steps - 1)
    products = [instruction(n, s, kind, accumulator, a_registers, transposes, scales[s], signs) for s in range(steps)]
    return Kernel("image operands fragments d accumulate", f"""
.reg .b32 i, v; .reg .b64 o, at; .reg .pred more, p; .reg .b64 {", ".join(f"a{s}, b{s}" for s in range(steps))};
{"".join(f".reg .b32 a{s}_0, a{s}_1, a{s}_2, a{s}_3; " for s in range(steps)) if a_registers else ""}
.reg .{"f32" if accumulator == "f32" else "b32"} d<{count}>;
mov.u32 i, %t;
FILL: mul.wide.u32 o, i, 4; add.u64 at, image, o; ld.global.u32 v, [at]; mad.lo.u32 i, i, 4, %smem;
st.shared.u32 [i], v;
sub.u32 i, i, %smem; shr.u32 i, i, 2; add.u32 i, i, 128; setp.lt.u32 more, i, {nbytes // 4}; @more bra FILL;
{PROXY}
bar.sync 0;
mul.wide.u32 o, %t, 4; add.u64 d, d, o; add.u64 fragments, fragments, o; shr.u32 v, %smem, 4; cvt.u64.u32 o, v;
setp.ne.u32 p, accumulate, 0;
{chr(10).join(load)}
{chr(10).join(f"ld.global.b32 d{i}, [d+{512 * i}];" for i in range(count))}
{FENCE}
{chr(10).join(products)}
{COMMIT}
{WAIT}
{chr(10).join(f"st.global.b32 [d+{512 * i}], d{i};" for i in range(count))}
""", memory=nbytes)


ROUND = {"bf16": lambda x: (np.float32(x).view(np.uint32) >> 16).astype(np.uint16),
         "f16": lambda x: np.float16(x).view(np.uint16)}


def fragments_of(a):
    """A [64, k] bits as registers [4 step + i][thread] (9.7.15.5.1.1, figure of A)."""
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    pair = [[a[row + i % 2 * 8, k0 + column + i // 2 * 8 + e] for e in range(2)] for k0 in range(0, a.shape[1], 16) for i in range(4)]
    return np.array(pair, np.uint16).transpose(0, 2, 1).copy().view(np.uint32)[..., 0]


def accumulators_of(d):
    """D [64, n] as registers [register][thread]: f32, or pairs of f16 (figure of D)."""
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    registers = [(half, block) for block in range(d.shape[1] // 8) for half in range(2)]
    parts = np.array([[d[row + half * 8, block * 8 + column + e] for e in range(2)] for half, block in registers])
    if d.dtype == np.float16:
        return parts.transpose(0, 2, 1).copy().view(np.uint32)[..., 0]
    return parts.reshape(-1, 128).astype(np.float32).view(np.uint32)


def run_product(kernel, seed=0, n=64, k=32, kind="bf16", accumulator="f32", a=None, b=None, a_registers=False, accumulate=1,
                start=None, factor=1, change=None, extra=lambda x, y: (), **shape):
    """Small integers, so that every order of summation gives the same. accumulate: the predicate; start: whether D counts, if it is
    not that; factor: of the product; change: of the descriptors; extra: arguments more, of the bits of A and B."""
    rng = np.random.default_rng(seed)
    a, b = a or Layout(64, k, True, 128), b or Layout(n, k, True, 128)
    x, y = rng.integers(-4, 5, (64, k)), rng.integers(-4, 5, (n, k))
    c = rng.integers(-9, 10, (64, n)).astype(np.float32 if accumulator == "f32" else np.float16)
    image = np.concatenate([a.image(ROUND[kind](x)), b.image(ROUND[kind](y))])
    operands = np.array(list(zip(a.descriptors(0), b.descriptors(a.bytes))), np.uint64)
    if change:
        change(operands)
    d, fragments = accumulators_of(c), fragments_of(ROUND[kind](x))
    shape = dict(block=128) | shape
    kernel.run(image, operands, fragments, d, np.uint32(accumulate), *extra(ROUND[kind](x), ROUND[kind](y)), seed=seed, written={3}, **shape)
    wanted = c * (accumulate if start is None else start) + factor * (x.astype(np.float64) @ y.T)
    np.testing.assert_array_equal(d.view(c.dtype), accumulators_of(wanted.astype(c.dtype)).view(c.dtype))


def image_bytes(*layouts):
    return sum(x.bytes for x in layouts)


@pytest.mark.on_silicon
@pytest.mark.parametrize("kind, accumulator", [("bf16", "f32"), ("f16", "f32"), ("f16", "f16")])
def test_shapes(kind, accumulator):
    """Every N, K-major, swizzled by 32 bytes; the product replaces D or adds to it."""
    for n in range(8, 257, 8):
        a, b = Layout(64, 16, True, 32), Layout(n, 16, True, 32)
        kernel = product(n, 1, kind, accumulator, nbytes=image_bytes(a, b))
        run_product(kernel, n, n, 16, kind, accumulator, a, b, accumulate=n // 8 % 2)


MAJORS = [(k_major, swizzle) for k_major in (True, False) for swizzle in (0, 32, 64, 128)]
NAMES = [f"{'K' if k_major else 'MN'}{swizzle}" for k_major, swizzle in MAJORS]


@pytest.mark.on_silicon
@pytest.mark.parametrize("b_form", MAJORS, ids=NAMES)
@pytest.mark.parametrize("a_form", [*MAJORS, None], ids=[*NAMES, "registers"])
def test_layouts(a_form, b_form):
    """64 k: along K inside an atom and from atom to atom; the distances between atoms vary."""
    which = (MAJORS.index(a_form) if a_form else 3) * 3 + MAJORS.index(b_form)
    a = Layout(64, 64, *(a_form or (True, 128)), apart=1 + which % 2, other=which // 2 % 2)
    b = Layout(64, 64, *b_form, apart=1 + which // 4 % 2, other=which // 8 % 2)
    transposes = (int(not a.k_major), int(not b.k_major))
    for kind, accumulator in [("bf16", "f32"), ("f16", "f16" if which % 3 else "f32")]:
        kernel = product(64, 4, kind, accumulator, a_form is None, transposes, nbytes=image_bytes(a, b))
        run_product(kernel, which, 64, 64, kind, accumulator, a, b, accumulate=which % 2)


@pytest.mark.on_silicon
@pytest.mark.parametrize("b_form", MAJORS, ids=NAMES)
def test_widths(b_form):
    for n in (8, 16, 24, 64, 96, 128, 136, 192, 256):
        a, b = Layout(64, 64, False, 64), Layout(n, 64, *b_form)
        if not b.k_major and n % ((b.swizzle or 16) // 2):
            continue  # the atoms along N would not be whole
        run_product(product(n, 4, transposes=(1, int(not b.k_major)), nbytes=image_bytes(a, b)), n, n, 64, a=a, b=b)


@pytest.mark.on_silicon
@pytest.mark.parametrize("scales, accumulate, start, factor", [
    (("p", "1"), 0, 0, 1), (("p", "1"), 1, 1, 1), (("!p", "1"), 1, 0, 1), (("!p", "p"), 1, 0, 1), (("1", "1"), 0, 1, 1),
    (("0", "1"), 1, 0, 1)])
@pytest.mark.parametrize("signs", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_scales(scales, accumulate, start, factor, signs):
    a, b = Layout(64, 32, True, 64), Layout(64, 32, True, 64)
    for registers in (False, True):
        kernel = product(scales=scales, signs=signs, a_registers=registers, nbytes=image_bytes(a, b))
        run_product(kernel, a=a, b=b, accumulate=accumulate, start=start, factor=signs[0] * signs[1] * factor)


# ------------------------------------------------------------------------------------------------------------------- reports

A, B = Layout(64, 64, True, 128), Layout(64, 64, True, 128)
PRODUCT, REGISTERS = (product(64, 4, a_registers=r, nbytes=image_bytes(A, B)) for r in (False, True))


def run_reports(kernel, seed=0, **more):
    run_product(kernel, seed, 64, 64, a=A, b=B, **more)


SMALL = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {d0, d1, d2, d3}, a0, b0, 1, 1, 1, 0, 0; // small"
FIRST = "st.global.b32 [d+0], d0;"
BUGS = [  # name, edits, kind, where, text
    ("accumulator read before the wait", (WAIT, ""), "wgmma", FIRST, "reads an accumulator of the wgmma at k.cu"),
    ("accumulator read between", (COMMIT, "add.f32 %f0, d9, d9;\n" + COMMIT), "wgmma", "add.f32 %f0", "reads an accumulator"),
    ("accumulator written in flight", (COMMIT, "mov.f32 d3, 0f00000000;\n" + COMMIT), "wgmma", "mov.f32 d3",
     "writes an accumulator"),
    ("no commit", (COMMIT, ""), "wgmma", FIRST, "reads an accumulator"),
    ("no fence", (FENCE, ""), "wgmma", "// step 0", "no wgmma.fence before the first product"),
    ("a fence before the accumulators", (FENCE, FENCE + "mov.f32 d5, 0f00000000;"), "wgmma", "// step 0",
     "after the last wgmma.fence"),
    ("no proxy fence", (PROXY, ""), "proxy", "// step 0", "ordinary store, without fence.proxy.async"),
    ("no barrier", ("bar.sync 0;", ""), "race", "// step 0", "wrote: no (barrier|__syncwarp) between"),
    ("shared memory overwritten in flight", (COMMIT, COMMIT + "\nst.shared.u32 [%smem+16], v;"), "in-flight", "[%smem+16], v",
     "the matrix product at k.cu"),
    ("the warp ends", (WAIT, "ret;"), "in-flight", "// step 0", "did not wait for this matrix product"),
    ("a warp never issues", (FENCE, "setp.eq.u32 more, %warp, 3; @more ret;\n" + FENCE), "deadlock", WAIT, "polls near"),
    ("half a warp", (FENCE, FENCE + "setp.lt.u32 more, %lane, 16; @more ret;"), "divergent-collective|deadlock", "// step 0", ""),
    ("another B in a warp", (FENCE, "setp.eq.u32 more, %warp, 2; @more add.u64 b1, b1, 64;\n" + FENCE), "divergent-collective",
     "// step 1", "different products"),
    ("another A in a warp", (FENCE, "setp.eq.u32 more, %warp, 2; @more add.u64 a1, a1, 64;\n" + FENCE), "divergent-collective",
     "// step 1", "different products"),
    ("another scale in a warp", (FENCE, "setp.ne.u32 p, %warp, 1;\n" + FENCE), "divergent-collective", "// step 0",
     "different products"),
    ("another scale in a lane", (FENCE, "setp.ne.u32 p, %lane, 17;\n" + FENCE), "descriptor", "// step 0", "scale-d differs"),
    ("another descriptor in a lane", (FENCE, "setp.eq.u32 more, %lane, 17; @more add.u64 a0, a0, 64;\n" + FENCE), "descriptor",
     "// step 0", "differs between the lanes"),
    ("an undefined descriptor", ("ld.global.u64 b2, [operands+40];", ""), "uninitialised", "// step 2", "descriptor or scale"),
    ("an undefined operand", ("setp.lt.u32 more, i, 4096;", "setp.lt.u32 more, i, 3968;"), "uninitialised", "[d+14336], d28",
     "reaches global memory"),
    ("another shape in flight", (" // step 1", f" // step 1\n{SMALL}"), "wgmma", "// small", "with another shape"),
]


@pytest.mark.parametrize("bug", BUGS, ids=[bug[0] for bug in BUGS])
def test_misuse(bug):
    run_reports(PRODUCT)
    PRODUCT.edit(*bug[1]).caught(run_reports, *bug[2:])


@pytest.mark.parametrize("edits, said", [
    ((WAIT, ""), "(C7517) warpgroup.wait is injected"), ((FENCE, ""), "(C7519) warpgroup.arrive is injected"),
    ((COMMIT, "mov.f32 d3, 0f00000000;\n" + COMMIT), "wgmma.mma_async instructions are serialized"),
    ((WAIT, "wgmma.stop;"), "ptxas fatal")])
def test_what_ptxas_says(edits, said):
    """It is part of the report; also that it refuses the text."""
    with pytest.raises(vgpu.Failure) as failure:
        run_reports(PRODUCT.edit(*edits))
    assert said in str(failure.value) and str(failure.value).startswith(failure.value.reports[0]["kind"])


A_BUGS = [
    ("overwritten in flight", (COMMIT, "mov.b32 a1_2, 0;\n" + COMMIT), "wgmma", "mov.b32 a1_2", "writes an A register"),
    ("written after the fence", (FENCE, FENCE + "mov.b32 a3_0, a2_0;"), "wgmma", "// step 3", "an A register was accessed"),
]


@pytest.mark.parametrize("bug", A_BUGS, ids=[bug[0] for bug in A_BUGS])
def test_misuse_of_a_registers(bug):
    run_reports(REGISTERS.edit(COMMIT, "mov.b32 v, a1_2;\n" + COMMIT))  # to read them is allowed
    REGISTERS.edit(*bug[1]).caught(run_reports, *bug[2:])


def test_descriptors_out_of_range():
    def changed(index, add):
        def change(operands):
            operands[index] += np.uint64(add)
        return lambda kernel, seed: run_reports(kernel, seed, change=change)

    PRODUCT.caught(changed((1, 1), 8192 >> 4), "out-of-range", "// step 1", "descriptor of B reaches 16 bytes of shared memory, ending")
    PRODUCT.caught(changed((2, 0), 8192 << 28), "out-of-range", "// step 2", "descriptor of A reaches 16 bytes of shared memory, ending")
    PRODUCT.caught(changed((1, 1), 1 << 49), "uncovered", "// step 1", "base offset")
    for by in (128, 256, 512, 384):  # not a multiple of the 1024 bytes after which the swizzle repeats: it would need one
        PRODUCT.caught(changed((1, 1), by >> 4), "descriptor", "// step 1",
                       f"descriptor of B starts at shared byte {8192 + 32 + by}, inside of the 1024 bytes")
    low = PRODUCT.edit("add.u64 a0, a0, o;", "")
    low.caught(run_reports, "out-of-range", "// step 0", "descriptor of A reaches .*, beginning 1024 bytes before")
    low.caught(changed((0, 0), 1008 >> 4), "out-of-range|descriptor", "// step 0", "")


def test_wrong_numbers():
    """What reads other elements that are there: only the numbers tell."""
    def wrong(kernel, **more):
        with pytest.raises(AssertionError) as failure:
            run_reports(kernel, **more)
        assert not isinstance(failure.value, vgpu.Failure), failure.value

    wrong(product(64, 4, transposes=(0, 1), nbytes=image_bytes(A, B)))
    wrong(product(64, 4, transposes=(1, 0), nbytes=image_bytes(A, B)))
    wrong(product(64, 4, kind="f16", nbytes=image_bytes(A, B)))
    wrong(product(64, 4, signs=(1, -1), nbytes=image_bytes(A, B)))

    def swizzle(operands):
        operands[:, 1] ^= np.uint64(3 << 62)
    wrong(PRODUCT, change=swizzle)


# Two groups with accumulators of their own: a wait for all but the latest lets the first be read.
TWO = Kernel("d", f"""
.reg .b32 v; .reg .b64 o, a, b; .reg .f32 c<4>, d<4>;
mad.lo.u32 v, %t, 8, %smem; mov.b64 o, 0x3c003c003c003c00; st.shared.u64 [v], o; st.shared.u64 [v+1024], o;
{PROXY}
bar.sync 0;
shr.u32 v, %smem, 4; cvt.u64.u32 a, v; or.b64 a, a, 0x800400000; add.u64 b, a, 0; mul.wide.u32 o, %t, 4; add.u64 o, d, o;
{FENCE}
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{c0, c1, c2, c3}}, a, b, 0, 1, 1, 0, 0; // one
{COMMIT} // one
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{d0, d1, d2, d3}}, a, b, 0, 1, -1, 0, 0; // two
{COMMIT} // two
wgmma.wait_group.sync.aligned 1; // but one
st.global.f32 [o], c1;
{WAIT} // all
st.global.f32 [o+512], d1;
""", memory=2048)


def run_two(kernel, seed=0):
    d = np.zeros((2, 128), np.float32)
    kernel.run(d, seed=seed, block=128)
    np.testing.assert_array_equal(d, [[16] * 128, [-16] * 128])


def test_groups():
    for seed in range(3):
        run_two(TWO, seed)
    but_one = "wgmma.wait_group.sync.aligned 1;"
    for edits, at in [((f"{WAIT} // all", f"{but_one} // all"), "[o+512], d1"), ((f"{but_one} // but one", ""), "[o], c1"),
                      ((f"{COMMIT} // one", ""),
                       "[o], c1"), ((f"{but_one} // but one", "wgmma.wait_group.sync.aligned 2; // but two"), "[o], c1")]:
        TWO.edit(*edits).caught(run_two, "wgmma", at, "reads an accumulator")


# A fifth warp overwrites shared memory once warp 0 has waited and said so.
REUSED = PRODUCT.edit(
    "mov.u32 i, %t;\nFILL:", """mov.u32 i, %t; setp.eq.u32 more, %warp, 4; @more bra OTHER;
setp.eq.u32 more, %t, 0; @more st.shared.u32 [%smem+16384], 0;
FILL:""", WAIT, f"{WAIT} setp.eq.u32 more, %t, 0; @more st.release.cta.shared.u32 [%smem+16384], 1;",
    "[d+15872], d31;", """[d+15872], d31;
bra END;
OTHER: bar.sync 0; setp.ne.u32 more, %lane, 0; @more bra END;
SPIN: ld.acquire.cta.shared.u32 v, [%smem+16384]; setp.eq.u32 more, v, 0; @more bra SPIN;
st.shared.u32 [%smem+16], v;
st.shared.u32 [%smem+8208], v;
END:""", memory=16384 + 16)


def test_shared_memory_reused():
    def run(kernel, seed=0):
        run_reports(kernel, seed, block=160)

    for seed in range(4):
        run(REUSED, seed)
    for a, b in ("release", "relaxed"), ("acquire", "relaxed"):
        for at in "[%smem+16], v", "[%smem+8208], v":
            REUSED.edit(f".{a}.", f".{b}.").caught(run, "race", at, "a matrix product .* read: no barrier between")


# Operands by tensor copies: A and B rows of 128 bytes of one tensor.
LOADED = Kernel(PRODUCT.options["names"] + " m", PRODUCT.body[:PRODUCT.body.index("mov.u32 i, %t;")] + """
add.u32 v, %smem, 16384; setp.eq.u32 p, %t, 0;
@p mbarrier.init.shared::cta.b64 [v], 1;
@p fence.mbarrier_init.release.cluster;
bar.sync 0;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [v], 16384;
@p cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [m, {0, 0}], [v];
AGAIN: mbarrier.try_wait.parity.shared::cta.b64 more, [v], 0; @!more bra AGAIN;
""" + PRODUCT.body[PRODUCT.body.index("mul.wide.u32 o, %t, 4;"):], memory=16400)
SECOND_COPY = """bar.sync 0;
@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [v], 16384;
@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%smem], [image], 16384, [v];
AGAIN2: mbarrier.try_wait.parity.shared::cta.b64 more, [v], 1; @!more bra AGAIN2;
mul.wide.u32 o, %t, 4;"""


def test_swizzle_of_a_tensor_copy():
    def run(kernel, seed=0, swizzle=128, mode=1):
        def change(operands):
            operands[:, 1] ^= np.uint64((1 ^ mode) << 62)
        run_reports(kernel, seed, change=change, extra=lambda x, y: [vgpu.TensorMap(np.concatenate([x, y]), (128, 64), swizzle)])

    for seed in range(3):
        run(LOADED, seed)
    LOADED.caught(lambda k, seed: run(k, seed, swizzle=0), "descriptor", "// step 0",
                  "descriptor of A says a swizzle of 128 bytes, the tensor copy that wrote it one of 0")
    LOADED.caught(lambda k, seed: run(k, seed, mode=2), "descriptor", "// step 0",
                  "descriptor of B says a swizzle of 64 bytes, the tensor copy that wrote it one of 128")
    # What a later copy without a swizzle brings is what its bytes are.
    run(LOADED.edit("mul.wide.u32 o, %t, 4;", SECOND_COPY), swizzle=0)
