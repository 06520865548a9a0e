"""Loads, stores, atomics and address spaces of the virtual GPU against numpy."""
import numpy as np
import pytest

from c_api import to_bf16, to_f32
import vgpu
from raw_ptx import aligned, caught, kernel, run, twins

RNG = np.random.default_rng(0)
SIZES = {"b8": 1, "b16": 2, "b32": 4, "b64": 8}
REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%l"}
# Where a thread's own 16 bytes are, for %l1, and what ld and st call the space.
SPACES = {"global": ("mov.u64 %l1, %y0;", ".global"), "shared": ("mov.u64 %l1, s; mad.wide.u32 %l1, %t, 16, %l1;", ".shared"),
          "local": ("mov.u64 %l1, m;", ".local"), "generic": ("mov.u64 %l1, %y0;", "")}
SPACES |= {f"generic-{space}": (SPACES[space][0] + f" cvta.{space}.u64 %l1, %l1;", "") for space in ("shared", "local")}
DECLARED = dict(variables=".shared .align 16 .b8 s[1024]; .local .align 16 .b8 m[16];", block=64)


def random_bytes(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


# ------------------------------------------------------------------------------------------------------- loads and stores

EXTENDED = [(t, bits) for t in ("u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "f32", "u64", "s64", "b64", "f64")
            for bits in (16, 32, 64) if bits >= int(t[1:]) and (t[0] != "f" or bits == int(t[1:]))]


@pytest.mark.on_silicon
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("t, bits", EXTENDED, ids=[f"{t}-{bits}" for t, bits in EXTENDED])
def test_loads_extend(t, bits, space):
    """A narrow value fills its register: signed ones with the sign, others with zeros."""
    register = {"f32": "%f1", "f64": "%d1"}.get(t, {16: "%h1", 32: "%r1", 64: "%l3"}[bits])
    source, out, (where, suffix) = random_bytes(64, 16), np.zeros((64, 16), np.uint8), SPACES[space]
    source[:4, 0] = source[:4, int(t[1:]) // 8 - 1] = 0, 0x7F, 0x80, 0xFF
    run(f"""{where} ld.global.v2.b64 {{%l4, %l5}}, [%y1]; st{suffix}.v2.b64 [%l1], {{%l4, %l5}};
            ld{suffix}.{t} {register}, [%l1]; st.global.{t if t[0] == "f" else f"b{bits}"} [%y2], {register};""",
        np.zeros(1024, np.uint8), source, out, **DECLARED)
    narrow, wide = (f"{'i' if t[0] == 's' else 'u'}{n // 8}" for n in (int(t[1:]), bits))
    np.testing.assert_array_equal(out.view(wide)[:, 0], source.view(narrow)[:, 0])


VECTORS = [(t, n) for t in SIZES for n in (1, 2, 4) if SIZES[t] * n <= 16]


@pytest.mark.on_silicon
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("t, n", VECTORS, ids=[f"{t}x{n}" for t, n in VECTORS])
def test_vectors(t, n, space):
    """A vector store seen byte by byte, and a vector load of what was stored byte by byte."""
    size, total, (where, suffix) = SIZES[t], SIZES[t] * n, SPACES[space]
    names = [f"{REGISTER[size]}{20 + i}" for i in range(n)]
    vector, v = ("{" + ", ".join(names) + "}", f".v{n}") if n > 1 else (names[0], "")
    each = lambda statements: " ".join(statements.format(i=i, x=suffix) for i in range(total))
    elements = lambda statement: " ".join(statement.format(name=name, at=e * size) for e, name in enumerate(names))
    source, first, second = random_bytes(64, 16), np.zeros((64, 16), np.uint8), np.zeros((64, 16), np.uint8)
    run(f"""{where} {elements(f"ld.global.{t} {{name}}, [%y1+{{at}}];")}
            st{suffix}{v}.{t} [%l1], {vector};
            {each("ld{x}.u8 %h{i}, [%l1+{i}]; st.global.u8 [%y2+{i}], %h{i};")}
            {each("ld.global.u8 %h{i}, [%y1+{i}]; not.b16 %h{i}, %h{i}; st{x}.u8 [%l1+{i}], %h{i};")}
            ld{suffix}{v}.{t} {vector}, [%l1];
            {elements(f"st.global.{t} [%y3+{{at}}], {{name}};")}""",
        np.zeros(1024, np.uint8), source, first, second, **DECLARED)
    np.testing.assert_array_equal(first[:, :total], source[:, :total])
    np.testing.assert_array_equal(second[:, :total], ~source[:, :total])
    assert not first[:, total:].any() and not second[:, total:].any()


@pytest.mark.on_silicon
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("register, t", [("%l3", "b32"), ("%l3", "u16"), ("%l3", "b8"), ("%r1", "s16"), ("%r1", "u8"),
                                         ("%h1", "b8")])
def test_stores_truncate(register, t, space):
    """A register may be wider than what is stored of it."""
    bits, size, (where, suffix) = {"l": 64, "r": 32, "h": 16}[register[1]], int(t[1:]) // 8, SPACES[space]
    source, out = random_bytes(64, 16), np.zeros((64, 16), np.uint8)
    run(f"""{where} ld.global.b{bits} {register}, [%y1]; st{suffix}.v2.b32 [%l1], {{0, 0}};
            st{suffix}.{t} [%l1], {register}; ld{suffix}.b64 %l4, [%l1]; st.global.b64 [%y2], %l4;""",
        np.zeros(1024, np.uint8), source, out, **DECLARED)
    np.testing.assert_array_equal(out[:, :size], source[:, :size])
    assert not out[:, size:].any()


LOADS = ("ld.volatile", "ld.volatile.global", "ld.relaxed.sys", "ld.relaxed.gpu.global", "ld.relaxed.cta.global", "ld.acquire.cta",
         "ld.acquire.gpu.global", "ld.acquire.sys.global", "ld.weak.global", "ld.global.ca", "ld.global.cg", "ld.global.cs",
         "ld.global.lu", "ld.global.cv", "ld.global.L1::no_allocate", "ld.global.nc", "ld.global.nc.L1::evict_last",
         "ld.global.nc.L1::no_allocate.L2::128B")
STORES = ("st.volatile", "st.volatile.global", "st.relaxed.sys", "st.relaxed.gpu.global", "st.relaxed.cta.global", "st.release.cta",
          "st.release.gpu.global", "st.release.sys.global", "st.weak.global", "st.global.wb", "st.global.cg", "st.global.cs",
          "st.global.wt", "st.global.L1::no_allocate")


@pytest.mark.on_silicon
@pytest.mark.parametrize("instruction", LOADS + STORES)
def test_qualifiers_change_no_value(instruction):
    load, store = (instruction, "st.global") if instruction.startswith("ld") else ("ld.global", instruction)
    source, out = RNG.integers(0, 2**32, 32, np.uint32), np.zeros(32, np.uint32)
    run(f"{load}.u32 %r1, [%x0]; {store}.u32 [%x1], %r1;", source, out)
    np.testing.assert_array_equal(out, source)


@pytest.mark.on_silicon
def test_address_spaces():
    """cvta both ways, and isspacep of an address of each space for each space."""
    out, spaces = np.zeros((5, 5), np.uint32), ("global", "shared", "local", "const", "param")
    ask = "\n".join(f"isspacep.{to} %p1, %l{10 + i}; selp.u32 %r1, 1, 0, %p1; st.global.u32 [%a0+{4 * (5 * i + j)}], %r1;"
                    for i in range(5) for j, to in enumerate(spaces))
    run(f"""mov.u64 %l1, v; mov.u64 %l2, s; mov.u64 %l3, m;
            cvta.global.u64 %l10, %l1; cvta.shared.u64 %l11, %l2; cvta.local.u64 %l12, %l3;
            mov.u64 %l4, c; cvta.const.u64 %l13, %l4; mov.b64 %l5, q0; cvta.param.u64 %l14, %l5;
            {ask}
            st.u32 [%l10], 111; st.u32 [%l11+4], 222; st.u32 [%l12+8], 333;
            ld.global.u32 %r1, [v]; ld.shared.u32 %r2, [s+4]; ld.local.u32 %r3, [m+8];
            cvta.to.global.u64 %l4, %l10; cvta.to.shared.u64 %l5, %l11; cvta.to.local.u64 %l6, %l12;
            ld.global.u32 %r4, [%l4]; ld.shared.u32 %r5, [%l5+4]; ld.local.u32 %r6, [%l6+8];
            st.global.v2.u32 [%a1], {{%r1, %r2}}; st.global.v2.u32 [%a1+8], {{%r3, %r4}}; st.global.v2.u32 [%a1+16], {{%r5, %r6}};
            cvta.to.shared.u64 %l7, %l11; cvt.u32.u64 %r7, %l7; ld.shared.u32 %r8, [%r7+4]; st.global.u32 [%a1+24], %r8;""",
        out, seen := np.zeros(8, np.uint32), module_variables=".global .u32 v; .const .u32 c;", **DECLARED | dict(block=1))
    wanted = np.eye(5)
    wanted[4, 0] = 1  # the window of the parameters lies in the global one
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(seen, [111, 222, 333, 111, 222, 333, 222, 0])


@pytest.mark.on_silicon
def test_module_variables():
    """Initial values in every type, zero where none is given; constants; a later launch sees what an earlier one wrote."""
    variables = """.global .align 8 .u32 words[6] = {1, 2, 4294967295, -4};
        .visible .global .align 16 .b8 bytes[5] = {255, 0x10, 7, 010};
        .global .s16 half = -2; .global .u64 wide = 0x123456789abcdef0; .global .f32 f = 0f3FC00000;
        .global .f64 d = 0dC004000000000000; .const .align 4 .u32 table[3] = {10, 20, 30}; .global .align 4 .u32 counter;
        .global .u32 zeros[2];"""
    body = """mov.u64 %l1, words; ld.global.v2.u32 {%r1, %r2}, [%l1+8]; st.global.v2.u32 [%a0], {%r1, %r2};
        ld.global.v2.u32 {%r1, %r2}, [words+16]; st.global.v2.u32 [%a0+8], {%r1, %r2};
        ld.global.u32 %r1, [bytes]; ld.global.u8 %r2, [bytes+4]; st.global.v2.u32 [%a0+16], {%r1, %r2};
        ld.global.s16 %r1, [half]; ld.global.u32 %r2, [words]; st.global.v2.u32 [%a0+24], {%r1, %r2};
        ld.global.u64 %l2, [wide]; st.global.u64 [%a0+32], %l2;
        ld.global.f32 %f1, [f]; ld.global.f64 %d1, [d]; st.global.f32 [%a0+40], %f1; st.global.f64 [%a0+48], %d1;
        mov.u64 %l3, table; ld.const.u32 %r1, [%l3+4]; ld.const.u32 %r2, [table+8]; st.global.v2.u32 [%a0+56], {%r1, %r2};
        cvta.const.u64 %l4, %l3; ld.u32 %r1, [%l4]; ld.global.u32 %r2, [zeros+4]; st.global.v2.u32 [%a0+64], {%r1, %r2};
        ld.global.u32 %r1, [counter]; st.global.u32 [%a0+72], %r1; add.u32 %r1, %r1, 5; st.global.u32 [counter], %r1;"""
    out = np.zeros(19, np.uint32)
    module = vgpu.Gpu().module(kernel(body, [out], module_variables=variables))
    for launch in range(3):
        module.launch("k", block=1, args=[out])
        assert list(out[:8]) == [2**32 - 1, 2**32 - 4, 0, 0, 0x080710FF, 0, 2**32 - 2, 1]
        assert out[8:10].view(np.uint64) == 0x123456789ABCDEF0
        assert out[10:11].view(np.float32) == 1.5 and out[12:14].view(np.float64) == -2.5
        assert list(out[14:]) == [20, 30, 10, 0, 5 * launch]


@pytest.mark.on_silicon
def test_literals():
    """Hexadecimal, octal, negative and decimal ones."""
    out = np.zeros(8, np.uint32)
    run("""st.global.u32 [%a0], 0x1F; st.global.u32 [%a0+4], 017; st.global.s32 [%a0+8], -3;
           st.global.f32 [%a0+12], -2.5; st.global.f32 [%a0+16], 0fBF800000;
           st.global.f64 [%a0+24], 0.1; mov.f32 %f1, 0.5; add.f32 %f1, %f1, 1.0; st.global.f32 [%a0+20], %f1;""", out, block=1)
    assert list(out[:2]) == [31, 15] and out[2:3].view(np.int32) == -3
    assert list(out[3:6].view(np.float32)) == [-2.5, -1, 1.5] and out[6:].view(np.float64) == 0.1


@pytest.mark.on_silicon
def test_parameters():
    """Scalars of every size, and bytes of a structure."""
    structure = np.frombuffer(random_bytes(24).tobytes(), "V24")[0]
    out = np.zeros(9, np.uint32)
    run("""ld.param.v2.u32 {%r1, %r2}, [q1+8]; ld.param.u8 %r3, [q1+21]; ld.param.s16 %r4, [q1+6]; ld.param.u64 %l1, [q1+16];
           st.global.v4.u32 [%a0], {%r1, %r2, %r3, %r4}; st.global.u64 [%a0+16], %l1; st.global.u32 [%a0+24], %n2;
           mov.b64 {%r5, %r6}, %a3;
           st.global.u32 [%a0+28], %r5; st.global.u32 [%a0+32], %r6;""", out, structure, np.uint32(77), np.float64(-3), block=1)
    raw = np.frombuffer(structure.tobytes(), np.uint8)
    wanted = [*raw[8:16].view(np.uint32), raw[21], raw[6:8].view(np.int16)[0].astype(np.int32).view(np.uint32),
              *raw[16:24].view(np.uint32), 77]
    np.testing.assert_array_equal(out, [*wanted, *np.array([-3.0]).view(np.uint32)])


@pytest.mark.on_silicon
def test_dynamic_shared_memory():
    """It begins aligned behind the static one (and a gap of 1 KiB), has the size of the launch, and each block has its own."""
    out = np.zeros((3, 128), np.uint32)
    run("""mov.u32 %r1, d; mov.u32 %r2, s; sub.u32 %r3, %r1, %r2; and.b32 %r3, %r3, 1023; mov.u32 %r4, %dynamic_smem_size;
           shl.b32 %r5, %t, 2; add.u32 %r6, %r1, %r5; mad.lo.u32 %r7, %b, 1000, %t; st.shared.u32 [%r6], %r7; bar.sync 0;
           sub.u32 %r8, 508, %r5; add.u32 %r8, %r8, %r1; ld.shared.u32 %r9, [%r8]; 
           setp.eq.u32 %p1, %t, 0; @%p1 add.u32 %r9, %r3, %r4; st.global.u32 [%x0], %r9;""",
        out, grid=3, block=128, shared=512, variables=".shared .align 4 .b8 s[20];",
        module_variables=".extern .shared .align 128 .b8 d[];")
    wanted = np.arange(3)[:, None] * 1000 + np.arange(127, -1, -1)
    wanted[:, 0] = 128 + 512
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.on_silicon
def test_local_arrays():
    """Each thread has its own, indexed at run time; rotated by the lane through a pointer that changes."""
    out = np.zeros((64, 8), np.uint32)
    fill = " ".join(f"mad.lo.u32 %r1, %t, 100, {i}; st.local.u32 [m+{4 * i}], %r1;" for i in range(8))
    read = " ".join(f"add.u32 %r2, %t, {i}; and.b32 %r2, %r2, 7; mad.wide.u32 %l2, %r2, 4, %l1; ld.local.u32 %r3, [%l2]; "
                    f"st.global.u32 [%l3+{4 * i}], %r3;" for i in range(8))
    run(f"{fill} mov.u64 %l1, m; mad.wide.u32 %l3, %t, 32, %a0; {read}", out, block=64, variables=".local .align 4 .b8 m[32];")
    t, i = np.mgrid[:64, :8]
    np.testing.assert_array_equal(out, t * 100 + (t + i) % 8)


# ---------------------------------------------------------------------------------------------------------------- atomics

INTEGERS = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32, "b64": np.uint64,
            "b16": np.uint16}
OPS = {"add": lambda old, a, b: old + a, "min": lambda old, a, b: np.minimum(old, a), "max": lambda old, a, b: np.maximum(old, a),
       "and": lambda old, a, b: old & a, "or": lambda old, a, b: old | a, "xor": lambda old, a, b: old ^ a, "exch": lambda old, a,
       b: a,
       "cas": lambda old, a, b: np.where(old == a, b, old), "inc": lambda old, a,
       b: np.where(old >= a, 0, old + 1).astype(old.dtype),
       "dec": lambda old, a, b: np.where((old == 0) | (old > a), a, old - 1).astype(old.dtype)}
TYPES = {"add": "u32 s32 u64", "min": "u32 s32 u64 s64", "max": "u32 s32 u64 s64", "and": "b32 b64", "or": "b32 b64",
         "xor": "b32 b64",
         "exch": "b32 b64", "cas": "b32 b64 b16", "inc": "u32", "dec": "u32"}
ATOMS = [(op, t) for op, types in TYPES.items() for t in types.split()]
ATOM_SPACES = [space for space in SPACES if "local" not in space]


def slots(x):
    """64 values, each in 16 bytes of its own."""
    out = np.zeros((64, 16 // x.itemsize), x.dtype)
    out[:, 0] = x
    return out


def check_atom(op, t, space, old, a, b, wanted, register=None, arch=80, qualifier=""):
    """Each thread on a word of its own, with atom and with red."""
    bits, (where, suffix) = 8 * old.itemsize, SPACES[space]
    r = [f"{register or REGISTER[old.itemsize]}{i}" for i in range(10, 16)]
    for instruction in ("atom", "red") if op not in ("exch", "cas") else ("atom",):
        returned, now = np.zeros((2, *slots(old).shape), old.dtype)
        operands = (r[3] + ", " if instruction == "atom" else "") + f"[%l1], {r[1]}" + (", " + r[2] if op == "cas" else "")
        run(f"""{where} ld.global.b{bits} {r[0]}, [%y1]; ld.global.b{bits} {r[1]}, [%y2]; ld.global.b{bits} {r[2]}, [%y3];
                st{suffix}.b{bits} [%l1], {r[0]};
                {instruction}{qualifier}{suffix}.{op}.{t} {operands};
                {f"st.global.b{bits} [%y4], {r[3]};" if instruction == "atom" else ""}
                ld{suffix}.b{bits} {r[4]}, [%l1]; st.global.b{bits} [%y5], {r[4]};""",
            np.zeros(1024, np.uint8), slots(old), slots(a), slots(b), returned, now, arch=arch, **DECLARED)
        np.testing.assert_array_equal(now[:, 0], wanted.view(old.dtype))
        if instruction == "atom":
            np.testing.assert_array_equal(returned[:, 0], old)


@pytest.mark.on_silicon
@pytest.mark.parametrize("space", ATOM_SPACES)
@pytest.mark.parametrize("op, t", ATOMS, ids=[f"{op}-{t}" for op, t in ATOMS])
def test_integer_atomics(op, t, space):
    dtype = INTEGERS[t]
    info, size = np.iinfo(dtype), 15 * dtype().itemsize
    corners = np.array([info.min, info.max, 0, 1, info.max - 1, 2, info.min + 1], dtype)
    old = np.concatenate([np.repeat(corners, 7), random_bytes(size).view(dtype)])
    a, b = np.concatenate([np.tile(corners, 7), random_bytes(size).view(dtype)]), random_bytes(64 * dtype().itemsize).view(dtype)
    for qualifier in ("", ".release.gpu") if space == "global" else ("",):
        check_atom(op, t, space, old, a, b, OPS[op](old, a, b), qualifier=qualifier)


@pytest.mark.on_silicon
@pytest.mark.parametrize("space", ATOM_SPACES)
@pytest.mark.parametrize("t", ("f32", "f64", "noftz.f16x2", "noftz.bf16x2", "noftz.f16", "noftz.bf16"))
def test_float_atomics(t, space):
    kind = t.split(".")[-1].removesuffix("x2")
    x, y = RNG.standard_normal((2, 128)) * 10.0 ** RNG.integers(-2, 2, (2, 128))
    x[:4], y[:4] = (0.0, -0.0, np.inf, 1000), (-0.0, -0.0, 1, -1000)
    if kind == "bf16":
        x, y = to_bf16(x), to_bf16(y)
        wanted = to_bf16(to_f32(x) + to_f32(y))  # no exponents are so far apart that the f32 sum is rounded
    else:
        x, y = (v.astype({"f16": np.float16, "f32": np.float32, "f64": np.float64}[kind]) for v in (x, y))
        wanted = x + y
    n = 2 if t.endswith("x2") else 1
    old, a, wanted = (v[:64 * n].view(f"u{v.itemsize * n}") for v in (x, y, wanted))
    check_atom("add", t, space, old, a, a, wanted, register={"f32": "%f", "f64": "%d"}.get(t), arch=90)


@pytest.mark.on_silicon
@pytest.mark.parametrize("space", ATOM_SPACES)
def test_f32_atomics_flush_subnormals_in_global_memory_only(space):
    """PTX ISA, atom: sums of f32 take and give a zero of the same sign for what is subnormal, but not in shared memory."""
    e = 2.0 ** -126
    old, a = (np.resize(np.array(x, np.float32), 64) for x in ([e / 4, -e / 4, 0, e, 1, -e],
                                                               [e / 4, 0, -e / 4, -e / 2, e / 4, e / 2]))
    flush = lambda x: x if "shared" in space else np.where(np.abs(x) < np.float32(e), np.copysign(np.float32(0), x), x)
    wanted = flush(flush(old) + flush(a))
    check_atom("add", "f32", space, old.view(np.uint32), a.view(np.uint32), a.view(np.uint32), wanted, register="%f")


def check_vector(t, n, instruction, old, a, seed=0):
    """64 threads add their rows of a, from registers that the results overwrite in reverse, to the row that they share with others."""
    bits, rows = {"f32": 32, "f16": 16, "bf16": 16}.get(t, 32), len(old)
    r = [f"{ {16: '%h', 32: '%f' if t == 'f32' else '%r'}[bits]}{10 + i}" for i in range(n)]
    kind, noftz = "f32" if t == "f32" else f"b{bits}", "" if t == "f32" else ".noftz"
    size, result, backwards = n * bits // 8, np.zeros_like(a), ", ".join(r[::-1])
    run(f"""mul.wide.u32 %l1, %t, {size}; add.s64 %l2, %l1, %a1; add.s64 %l3, %l1, %a2;
            rem.u32 %r1, %t, {rows}; mul.wide.u32 %l4, %r1, {size}; add.s64 %l4, %l4, %a0;
            {" ".join(f"ld.global.{kind} {x}, [%l2+{i * bits // 8}];" for i, x in enumerate(r))}
            {instruction}.global.add{noftz}.v{n}.{t} {f"{{{backwards}}}, " if instruction == "atom" else ""}[%l4], {{{", ".join(r)}}};
            {" ".join(f"st.global.{kind} [%l3+{i * bits // 8}], {x};" for i, x in enumerate(r[::-1]))}""",
        old, a, result, arch=90, seed=seed, block=64)
    return result


VECTOR_ATOMS = [("f32", 2), ("f32", 4), *((t, n) for t in ("f16", "bf16") for n in (2, 4, 8)),
                *((t, n) for t in ("f16x2", "bf16x2") for n in (2, 4))]


@pytest.mark.on_silicon
@pytest.mark.parametrize("rows", (64, 3))
@pytest.mark.parametrize("t, n", VECTOR_ATOMS, ids=[f"{t}x{n}" for t, n in VECTOR_ATOMS])
def test_vector_atomics(t, n, rows):
    """Each element is an atomic, on words of one thread's own and on shared ones. Sums of small integers are exact."""
    elements = n * (1 + t.endswith("x2"))
    old, a = RNG.integers(-3, 4, (rows, elements)).astype(np.float32), RNG.integers(-1, 2, (64, elements)).astype(np.float32)
    encode, decode = {"f": (lambda x: x.astype(np.float16), lambda x: x.astype(np.float32)), "b": (to_bf16, to_f32)}[t[0]]
    if t == "f32":
        encode = decode = np.copy
    wanted = old.copy()
    np.add.at(wanted, np.arange(64) % rows, a)
    for instruction, seed in (("atom", 0), ("atom", 1), ("red", 2)):
        memory = encode(old)
        result = decode(check_vector(t, n, instruction, memory, encode(a), seed))
        np.testing.assert_array_equal(decode(memory), wanted)
        if instruction == "atom" and rows == 64:
            np.testing.assert_array_equal(result, old)


@pytest.mark.parametrize("t, n", [("f32", 2), ("f16", 8)])
def test_a_vector_atomic_is_aligned_as_a_whole(t, n):
    size = {"f32": 4, "f16": 2}[t]
    memory, registers = aligned(64, f"f{size}"), [f"%{'f' if t == 'f32' else 'h'}{i}" for i in range(1, n + 1)]
    instruction = f"red.global.add{'' if t == 'f32' else '.noftz'}.v{n}.{t}"
    wrong, right = twins(f"""{" ".join(f"ld.global.{'f32' if t == 'f32' else 'b16'} {r}, [%a0];" for r in registers)}
        {instruction} [%a0+<<{size}|{size * n}>>], {{{", ".join(registers)}}}; // caught""")
    caught("misaligned", wrong, memory, arch=90, block=1)
    run(right, memory, arch=90, block=1)


def test_a_vector_atomic_counts_its_bytes_once():
    counters = run("mov.f32 %f1, 0f3F800000; red.global.add.v4.f32 [%y0], {%f1, %f1, %f1, %f1};", aligned((32, 4), np.float32),
                   arch=90)
    assert (counters["global_store_bytes"], counters["global_store_sectors"]) == (512, 16)


@pytest.mark.parametrize("instruction", ["red.global.add.v4.u32 [%y0], {%r1, %r1, %r1, %r1}",
                                         "red.shared.add.v2.f32 [s], {%f1, %f1}",
                                         "red.global.max.noftz.v2.f16 [%y0], {%h1, %h1}", "ld.global.v8.b16 {%h1, %h2}, [%y0]"])
def test_vectors_that_are_not_covered(instruction):
    with pytest.raises(vgpu.Failure, match="uncovered"):
        run(f"mov.u32 %r1, 1; {instruction};", np.zeros((32, 4), np.float32), arch=90, variables=".shared .align 8 .b8 s[8];")


@pytest.mark.on_silicon
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("space", ("global", "shared"))
def test_atomics_on_one_word_by_everybody(space, seed):
    """No update is lost, each sees a different old value, and nothing is reported."""
    total, order = np.zeros(2, np.uint32), np.zeros((2, 96), np.uint32)
    begin = "setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [s], 0; bar.sync 0;" if space == "shared" else ""
    finish = "bar.sync 0; ld.shared.u32 %r2, [s]; mad.wide.u32 %l1, %b, 4, %a0; @%p1 st.global.u32 [%l1], %r2;" if begin else ""
    run(f"{begin} atom.{space}.add.u32 %r1, [{'s' if space == 'shared' else '%a0'}], 3; st.global.u32 [%x1], %r1; {finish}",
        total, order, grid=2, seed=seed, **DECLARED | dict(block=96))
    np.testing.assert_array_equal(total, [576, 0] if space == "global" else [288, 288])
    wanted = 3 * (np.arange(192).reshape(2, 96) if space == "global" else np.tile(np.arange(96), (2, 1)))
    np.testing.assert_array_equal(np.sort(order, None if space == "global" else 1).reshape(order.shape), wanted)
