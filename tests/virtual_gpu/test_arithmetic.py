"""Arithmetic, comparisons, conversions and moves of the virtual GPU against Python integers, exact fractions, numpy and torch.

Every case is one instruction in a kernel of its own: it loads its operands, one set a thread, and stores the result. References
work on Python numbers and know nothing of the implementation; bodies were assembled with ptxas once.
"""

import itertools
import math
import operator
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

import vgpu

if vgpu.missing():
    pytest.skip(vgpu.missing(), allow_module_level=True)

COUNT, BLOCK = 1600, 160  # threads of a case, of a block

# ----------------------------------------------------------------------------------------------------- types and their values

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023),
           "tf32": (11, -126, 127)}  # precision, least and greatest exponent of normal numbers


def bits_of(t):
    return {"pred": 32, "bf16": 16, "tf32": 32}.get(t) or (32 if t.endswith("x2") else int(t[1:]))


def is_float(t):
    return t in FORMATS


def part_of(t):
    return t[:-2] if t.endswith("x2") else t


def decode(t, raw):
    """Bits to a Python number, or a pair (low, high)."""
    if t.endswith("x2"):
        return decode(t[:-2], raw & 0xFFFF), decode(t[:-2], raw >> 16)
    if t == "f64":
        return float(np.uint64(raw).view(np.float64))
    if t in ("f32", "tf32"):
        return float(np.uint32(raw).view(np.float32))
    if t == "bf16":
        return decode("f32", raw << 16)
    if t == "f16":
        return float(np.uint16(raw).view(np.float16))
    if t == "pred":
        return bool(raw)
    bits = bits_of(t)
    raw &= (1 << bits) - 1
    return raw - (1 << bits) if t[0] == "s" and raw >> (bits - 1) else raw


def encode(t, x):
    """A Python number that the type has, to its bits; NaN to the canonical one."""
    if t.endswith("x2"):
        return encode(t[:-2], x[0]) | encode(t[:-2], x[1]) << 16
    if is_float(t) and math.isnan(x):
        return {"f64": 0x7FF8000000000000, "f32": 0x7FFFFFFF, "tf32": 0x7FFFFFFF}.get(t, 0x7FFF)
    if t == "f64":
        return int(np.float64(x).view(np.uint64))
    if t in ("f32", "tf32"):
        return int(np.float32(x).view(np.uint32))
    if t == "bf16":
        return int(np.float32(x).view(np.uint32)) >> 16
    if t == "f16":
        return int(np.float16(x).view(np.uint16))
    return int(x) & ((1 << bits_of(t)) - 1)


def round_exact(x, t, mode="rn"):
    """A nonzero fraction rounded to a format, as a float."""
    precision, least, most = FORMATS[t]
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    count = magnitude // unit
    rest = magnitude / unit - count
    up = {"rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and count % 2 == 1), "rna": rest >= Fraction(1, 2), "rz": False,
          "rm": rest > 0 and x < 0, "rp": rest > 0 and x > 0}[mode]
    r = (count + up) * unit
    if r >= Fraction(2) ** (most + 1):
        to_infinity = mode in ("rn", "rna") or mode == ("rm" if x < 0 else "rp")
        r = math.inf if to_infinity else float(Fraction(2) ** (most + 1) - Fraction(2) ** (most + 1 - precision))
    return -float(r) if x < 0 else float(r)


def flush(x, t):
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FORMATS[t][1] else x


def integers(bits):
    rng = random.Random(bits)
    values = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 300, 0x7FFF, 0x8000, 0xFFFF]
    values += [(1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1]
    values += [0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF] + [rng.getrandbits(bits) for _ in range(7)]
    return [v & ((1 << bits) - 1) for v in values]


def floats(t):
    precision, least, most = FORMATS[t]
    rng = random.Random(t)
    top = math.ldexp(2.0 - 2.0 ** (1 - precision), most)
    tiny = math.ldexp(1.0, least - precision + 1) if t != "f64" else 5e-324
    ulp = 2.0 ** (1 - precision)
    positive = [0.0, 1.0, 1 + ulp, 1 - ulp / 2, 0.5, 1.5, 2.5, 3.0, 10.0, top, tiny, 3 * tiny, 2.0**least, 2.0**least - tiny,
                math.inf, 2.0 ** (precision - 1) + 1, 2.0 ** (precision - 2) + 0.5]
    values = [s * v for v in positive for s in (1, -1)] + [math.nan]
    raw = [encode(t, v) for v in values]
    raw += [encode(t, round_exact(Fraction(rng.gauss(0, 3)), t)) for _ in range(3)]
    return raw + [rng.getrandbits(bits_of(t)) for _ in range(2)]


def values(t):
    if t == "pred":
        return [0, 1]
    if t.endswith("x2"):
        low = values(t[:-2])
        rng = random.Random(t)
        return [v | rng.choice(low) << 16 for v in low]
    return floats(t) if is_float(t) else integers(bits_of(t))


def operands(types, seed):
    """Sets of operands: all combinations where they fit into COUNT, else as many random ones; a single operand also takes
    random bits, and fewer of them."""
    rng = random.Random(seed)
    lists = [values(t) for t in types]
    if len(types) == 1:
        more = [rng.getrandbits(bits_of(types[0])) for _ in range(2 * BLOCK - len(lists[0]))]
        return [lists[0] + [v & 1 if types[0] == "pred" else v for v in more]]
    sets = list(itertools.product(*lists)) if math.prod(len(x) for x in lists) <= COUNT else []
    while len(sets) < COUNT:
        chosen = [rng.choice(x) for x in lists]
        if len(types) == 3 and is_float(part_of(types[0])) and len(set(types)) == 1 and rng.random() < 0.4:  # nearly cancels
            a, b = (rng.gauss(0, 2) for _ in range(2))
            halves = []
            for _ in range(2 if types[0].endswith("x2") else 1):
                t = part_of(types[0])
                x, y = (round_exact(Fraction(v), t) for v in (a, b))
                product = Fraction(x) * Fraction(y)
                scale = Fraction(1) + rng.choice([0, 1, -1]) * Fraction(2) ** rng.randrange(-60, 0)
                halves.append([encode(t, v) for v in (x, y, -round_exact(product * scale, t))])
            chosen = [h[0] | (h[1] << 16) for h in zip(*halves)] if len(halves) == 2 else halves[0]
        sets.append(chosen)
    return [[s[i] for s in sets] for i in range(len(types))]


# --------------------------------------------------------------------------------------------------------------------- cases


class Case:
    """op: the opcode, or a whole statement with {d} for the destination and {0}, {1}, .. for the operands. to: the type of the
    result. sources: types; "s8:64" is an s8 in a 64-bit register. close(got, want): whether an inexact result is right."""

    def __init__(self, op, to, sources, reference, close=None, inputs=None):
        self.op, self.reference, self.close, self.inputs = op, reference, close, inputs
        self.to, self.to_register = self.split(to)
        self.sources = [self.split(s)[0] for s in sources]
        self.registers = [self.split(s)[1] for s in sources]

    @staticmethod
    def split(t):
        name, _, register = t.partition(":")
        return name, "p" if name == "pred" else int(register) if register else max(16, bits_of(name))

    def kernel(self, name):
        params = ", ".join(f".param .u64 p{i}" for i in range(len(self.sources) + 1))
        lines = [f".visible .entry {name}({params}) {{",
                 ".reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<20>; .reg .b64 %l<20>;",
                 "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r0, %r1, %r2;"]
        names = []
        for i, (t, register) in enumerate(zip(self.sources, self.registers)):
            size = max(bits_of(t), 32 if register == "p" else register)
            prefix = {16: "%h", 32: "%r", 64: "%l"}[size]
            lines.append(f"ld.param.u64 %l1, [p{i + 1}]; mul.wide.u32 %l2, %r3, {size // 8}; add.s64 %l1, %l1, %l2;")
            lines.append(f"ld.global.b{size} {prefix}{10 + i}, [%l1];")
            names.append(f"{prefix}{10 + i}")
            if t == "pred":
                lines.append(f"setp.ne.u32 %p{i + 1}, %r{10 + i}, 0;")
                names[-1] = f"%p{i + 1}"
        size = 32 if self.to_register == "p" else self.to_register
        d = {"p": "%p0", 16: "%h0", 32: "%r4", 64: "%l4"}[self.to_register]
        statement = self.op if "{" in self.op else self.op + " {d}" + "".join(f", {{{i}}}" for i in range(len(names))) + ";"
        lines.append(statement.format(*names, d=d))
        if self.to == "pred":
            lines.append("selp.u32 %r4, 1, 0, %p0;")
            d = "%r4"
        lines.append(f"ld.param.u64 %l1, [p0]; mul.wide.u32 %l2, %r3, {size // 8}; add.s64 %l1, %l1, %l2;")
        lines.append(f"st.global.b{size} [%l1], {d}; ret; }}")
        return "\n".join(lines)

    def check(self, module, name):
        raw = self.inputs or operands(self.sources, self.op)
        count = len(raw[0])
        numpy_of = {16: np.uint16, 32: np.uint32, 64: np.uint64, "p": np.uint32}
        noise = random.Random(1)
        arrays = []
        for t, register, column in zip(self.sources, self.registers, raw):  # what a register has beyond its type must not matter
            beyond = 0 if register == "p" else register - bits_of(t)
            noisy = [v | (noise.getrandbits(beyond) << bits_of(t) if beyond else 0) for v in column]
            arrays.append(np.array(noisy, numpy_of[register]))
        out = np.zeros(count, numpy_of[self.to_register])
        module.launch(name, count // BLOCK, BLOCK, args=[out, *arrays])
        wrong = []
        for i, got in enumerate(out.tolist()):
            arguments = [decode(t, column[i]) for t, column in zip(self.sources, raw)]
            want = self.reference(*arguments)
            if want is None:
                continue
            if self.close:
                pairs = zip(decode(self.to, got), want) if self.to.endswith("x2") else [(decode(self.to, got), want)]
                good = all(self.close(g, w) for g, w in pairs)
            else:
                value = encode(self.to, want)
                if self.to[0] == "s" and self.to_register != bits_of(self.to):
                    value = want & ((1 << self.to_register) - 1)
                good = got == value or (self.to == "f64" and want != want and decode("f64", got) != decode("f64", got))
            if not good:
                wrong.append(f"{self.op} {arguments} ({[hex(c[i]) for c in raw]}) gives {hex(got)}, not {want}")
        assert not wrong, f"{len(wrong)} wrong: " + "; ".join(wrong[:5])


CASES = {}


def case(op, to, sources, reference, **more):
    key = op.split(" ")[0] if "{" in op else op
    while key in CASES:
        key += "'"
    CASES[key] = Case(op, to, sources, reference, **more)


def wrap(x, t):
    return decode(t, int(x) & ((1 << bits_of(t)) - 1))


def clamp(x, t):
    bits = bits_of(t)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if t[0] == "s" else (0, (1 << bits) - 1)
    return min(max(x, low), high)


def each_half(f):
    return lambda *pairs: tuple(f(*(p[h] for p in pairs)) for h in range(2))


def divided(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


# 9.7.1 Integer Arithmetic
for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
    bits, wide = bits_of(t), t[0] + str(2 * bits_of(t))
    case(f"add.{t}", t, [t, t], lambda a, b: a + b)
    case(f"sub.{t}", t, [t, t], lambda a, b: a - b)
    case(f"mul.lo.{t}", t, [t, t], lambda a, b: a * b)
    case(f"mul.hi.{t}", t, [t, t], lambda a, b, bits=bits: a * b >> bits)
    case(f"mad.lo.{t}", t, [t, t, t], lambda a, b, c: a * b + c)
    case(f"mad.hi.{t}", t, [t, t, t], lambda a, b, c, bits=bits: (a * b >> bits) + c)
    if bits < 64:
        case(f"mul.wide.{t}", wide, [t, t], lambda a, b: a * b)
        case(f"mad.wide.{t}", wide, [t, t, wide], lambda a, b, c: a * b + c)
    case(f"sad.{t}", t, [t, t, t], lambda a, b, c: c + abs(a - b))
    nonzero = [[v if i == 0 or v else 3 for v in column] for i, column in enumerate(operands([t, t], f"div{t}"))]
    case(f"div.{t}", t, [t, t], divided, inputs=nonzero)
    case(f"rem.{t}", t, [t, t], lambda a, b: a - b * divided(a, b), inputs=nonzero)
    case(f"min.{t}", t, [t, t], min)
    case(f"max.{t}", t, [t, t], max)
    if t[0] == "s":
        case(f"abs.{t}", t, [t], abs)
        case(f"neg.{t}", t, [t], lambda a: -a)
case("add.sat.s32", "s32", ["s32", "s32"], lambda a, b: clamp(a + b, "s32"))
case("sub.sat.s32", "s32", ["s32", "s32"], lambda a, b: clamp(a - b, "s32"))
for t in ("u16x2", "s16x2"):
    case(f"add.{t}", t, [t, t], each_half(lambda a, b: a + b))
    case(f"min.{t}", t, [t, t], each_half(min))
    case(f"max.{t}", t, [t, t], each_half(max))
for t in ("u32", "s32"):
    def low24(x, t=t):
        return decode(t, (x << 8) & 0xFFFFFFFF) >> 8
    case(f"mul24.lo.{t}", t, [t, t], lambda a, b, low=low24: low(a) * low(b))
    case(f"mul24.hi.{t}", t, [t, t], lambda a, b, low=low24: low(a) * low(b) >> 16)
    case(f"mad24.lo.{t}", t, [t, t, t], lambda a, b, c, low=low24: low(a) * low(b) + c)
    case(f"mad24.hi.{t}", t, [t, t, t], lambda a, b, c, low=low24: (low(a) * low(b) >> 16) + c)

for t in ("b32", "b64"):
    bits = bits_of(t)
    case(f"popc.{t}", "u32", [t], lambda a: bin(a).count("1"))
    case(f"clz.{t}", "u32", [t], lambda a, bits=bits: bits - a.bit_length())
    case(f"brev.{t}", t, [t], lambda a, bits=bits: int(format(a, f"0{bits}b")[::-1], 2))

    def bfi(a, b, c, d, bits=bits):
        r = b
        for i in range(d & 255):
            position = (c & 255) + i
            if position < bits and i < bits:
                r = (r & ~(1 << position)) | (a >> i & 1) << position
        return r
    case(f"bfi.{t}", t, [t, t, "u32", "u32"], bfi)
for t in ("u32", "s32", "u64", "s64"):
    bits = bits_of(t)

    def found(a):
        return (~a if a < 0 else a).bit_length() - 1
    case(f"bfind.{t}", "u32", [t], found)
    case(f"bfind.shiftamt.{t}", "u32", [t], lambda a, bits=bits: -1 if found(a) < 0 else bits - 1 - found(a))

    def bfe(a, b, c, t=t, bits=bits):
        position, length, raw = b & 255, c & 255, a & ((1 << bits) - 1)
        sign = 0 if t[0] == "u" or length == 0 else raw >> min(position + length - 1, bits - 1) & 1
        digits = [raw >> (position + i) & 1 if i < length and position + i < bits else sign for i in range(bits)]
        return sum(digit << i for i, digit in enumerate(digits))
    case(f"bfe.{t}", t, [t, "u32", "u32"], bfe)
for mode in ("wrap", "clamp"):
    for t in ("u32", "s32"):
        def szext(a, b, t=t, mode=mode):
            if mode == "clamp" and b > 31:
                return a
            n = b & 31
            return (a & ((1 << n) - 1)) - ((1 << n) if t == "s32" and n and a >> (n - 1) & 1 else 0)
        case(f"szext.{mode}.{t}", t, [t, "u32"], szext)
    case(f"bmsk.{mode}.b32", "b32", ["b32", "b32"], lambda a, b, mode=mode: sum(1 << i for i in range(32) if (
        a <= i < a + b if mode == "clamp" else (a & 31) <= i < (a & 31) + (b & 31))))

# 9.7.8 Logic and Shift
for t in ("b16", "b32", "b64", "pred"):
    case(f"and.{t}", t, [t, t], lambda a, b: a & b)
    case(f"or.{t}", t, [t, t], lambda a, b: a | b)
    case(f"xor.{t}", t, [t, t], lambda a, b: a ^ b)
    case(f"not.{t}", t, [t], lambda a, t=t: not a if t == "pred" else ~a)
    if t != "pred":
        case(f"cnot.{t}", t, [t], lambda a: a == 0)
        case(f"shl.{t}", t, [t, "u32"], lambda a, n: a << min(n, 64))
for t in ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64"):
    case(f"shr.{t}", t, [t, "u32"], lambda a, n: a >> min(n, 64))
for mode in ("wrap", "clamp"):
    amount = (lambda c: c & 31) if mode == "wrap" else (lambda c: min(c, 32))
    case(f"shf.l.{mode}.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c, n=amount: (b << 32 | a) << n(c) >> 32)
    case(f"shf.r.{mode}.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c, n=amount: (b << 32 | a) >> n(c))
for table in (0x80, 0x96, 0xE8, 0xCA, 0x01, 0xF4, 0x3C):
    case(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", "b32", ["b32"] * 3, lambda a, b, c, table=table: sum(
        (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)))


def prmt(selectors):
    def reference(a, b, c):
        data, r = [(b << 32 | a) >> 8 * i & 255 for i in range(8)], 0
        for i, s in enumerate(selectors(c)):
            byte = data[s & 7]
            r |= ((255 if byte & 128 else 0) if s & 8 else byte) << 8 * i
        return r
    return reference


case("prmt.b32", "b32", ["b32"] * 3, prmt(lambda c: [c >> 4 * i & 15 for i in range(4)]))
# The tables of 9.7.9 prmt, by c & 3; columns: d.b3 to d.b0.
for mode, table in {"f4e": "3210 4321 5432 6543", "b4e": "5670 6701 7012 0123", "rc8": "0000 1111 2222 3333",
                    "ecl": "3210 3211 3222 3333", "ecr": "0000 1110 2210 3210", "rc16": "1010 3232 1010 3232"}.items():
    case(f"prmt.b32.{mode}", "b32", ["b32"] * 3, prmt(lambda c, rows=table.split(): [int(x) for x in reversed(rows[c & 3])]))

# 9.7.6 Comparison and Selection
ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


def compare(name, a, b):
    unordered = a != a or b != b
    if name in ("num", "nan"):
        return unordered == (name == "nan")
    if name in ORDERED:
        return not unordered and ORDERED[name](a, b)
    name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    return unordered or ORDERED[name[:2]](a, b) if len(name) == 3 else ORDERED[name](a, b)


BOOL = {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}
for t in ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64"):
    names = list(ORDERED) if t[0] != "b" or is_float(t) else ["eq", "ne"]
    names += ["lo", "ls", "hi", "hs"] if t[0] == "u" else []
    names += ["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"] if is_float(t) else []
    for name in names:
        case(f"setp.{name}.{t}", "pred", [t, t], lambda a, b, name=name: compare(name, a, b))
BOTH = " %p8|%p9, {0}, {1}, {2}; selp.u32 %r5, 1, 0, %p8; selp.u32 {d}, 2, 0, %p9; or.b32 {d}, {d}, %r5;"
for op, combined in BOOL.items():
    for t in ("s32", "f32"):
        case(f"setp.lt.{op}.{t}{BOTH}", "u32", [t, t, "pred"],
             lambda a, b, c, f=combined: f(a < b, c) | f(not a < b, c) << 1)
    case(f"setp.ge.{op}.u64 {{d}}, {{0}}, {{1}}, !{{2}};", "pred", ["u64", "u64", "pred"],
         lambda a, b, c, f=combined: f(a >= b, not c))
    for t in ("f16x2", "bf16x2"):
        case(f"setp.gtu.{op}.{t}{BOTH}", "u32", [t, t, "pred"],
             lambda a, b, c, f=combined: f(compare("gtu", a[0], b[0]), c) | f(compare("gtu", a[1], b[1]), c) << 1)
case("setp.eq.ftz.f32", "pred", ["f32", "f32"], lambda a, b: flush(a, "f32") == flush(b, "f32"))
for to in ("u32", "s32", "f32"):
    for t in ("u32", "s64", "f32"):
        case(f"set.lt.{to}.{t}", to, [t, t], lambda a, b, to=to: (1.0 if to == "f32" else -1) * (a < b))
case("set.le.and.u32.f32", "u32", ["f32", "f32", "pred"], lambda a, b, c: -(a <= b and c))
case("set.eq.f16.f16", "f16", ["f16", "f16"], lambda a, b: float(a == b))
case("set.gtu.bf16.bf16", "bf16", ["bf16", "bf16"], lambda a, b: float(compare("gtu", a, b)))
for t in ("f16x2", "bf16x2"):
    case(f"set.le.{t}.{t}", t, [t, t], each_half(lambda a, b: float(a <= b)))
    case(f"set.ne.u32.{t}", "u16x2", [t, t], each_half(lambda a, b: -compare("ne", a, b)))
for t in ("b16", "u16", "s32", "b32", "f32", "b64", "f64"):
    raw_type = f"b{bits_of(t)}"
    case(f"selp.{t}", raw_type, [raw_type, raw_type, "pred"], lambda a, b, p: a if p else b)
    case(f"slct.{t}.s32", raw_type, [raw_type, raw_type, "s32"], lambda a, b, c: a if c >= 0 else b)
    case(f"slct.{t}.f32", raw_type, [raw_type, raw_type, "f32"], lambda a, b, c: a if c >= 0 else b)
for t in ("f32", "f64"):
    smallest = 2.0 ** FORMATS[t][1]
    case(f"testp.finite.{t}", "pred", [t], math.isfinite)
    case(f"testp.infinite.{t}", "pred", [t], math.isinf)
    case(f"testp.number.{t}", "pred", [t], lambda a: not math.isnan(a))
    case(f"testp.notanumber.{t}", "pred", [t], math.isnan)
    case(f"testp.normal.{t}", "pred", [t], lambda a, s=smallest: math.isfinite(a) and abs(a) >= s)
    case(f"testp.subnormal.{t}", "pred", [t], lambda a, s=smallest: 0 < abs(a) < s)
    case(f"copysign.{t}", t, [t, t], lambda a, b: math.copysign(b, a) if b == b else None)


# 9.7.3 Floating-Point and 9.7.4 Half Precision Floating-Point
def real(op, t, mode="rn", modifiers=()):
    """The exact result of `op`, which works on fractions as on numpy floats, rounded once."""
    def reference(*x):
        if "ftz" in modifiers:
            x = [flush(v, t) for v in x]
        finite = all(math.isfinite(v) for v in x)
        with np.errstate(all="ignore"):  # beside infinities only the sign of the others counts
            special = float(op(*(np.float64(v if finite or not v or not math.isfinite(v) else math.copysign(1, v)) for v in x)))
        if not finite or math.isnan(special) or (math.isinf(special) and t != "f64"):
            r = special
        else:
            try:
                exact = op(*(Fraction(v) for v in x))
            except ZeroDivisionError:
                exact = None
            if exact is None:
                r = special
            elif exact:
                r = round_exact(exact, t, mode)
            else:  # the sign of a zero: of a sum, the one that both terms have, else -0 only when rounding down
                terms = {ADD: x, SUB: (x[0], -x[-1]), FMA: (x[0] * x[1 % len(x)], x[-1])}.get(op)
                signs = {math.copysign(1, v) for v in terms or [special]}
                r = math.copysign(0.0, signs.pop() if len(signs) == 1 else -1 if mode == "rm" else 1)
        if "ftz" in modifiers:
            r = flush(r, t)
        if "sat" in modifiers:
            r = min(max(r, 0.0), 1.0) + 0.0 if r == r else 0.0
        if "relu" in modifiers:
            r = r if r != r or r > 0 else 0.0
        return r
    return reference


def ADD(a, b):
    return a + b


def SUB(a, b):
    return a - b


def MUL(a, b):
    return a * b


def FMA(a, b, c):
    return a * b + c


def DIV(a, b):
    return a / b


def lesser(a, b):
    if a != a or b != b:
        return b if a != a else a
    return a if (a, math.copysign(1, a)) < (b, math.copysign(1, b)) else b


def greater(a, b):
    return -lesser(-a, -b)


def or_nan(f):
    return lambda a, b: math.nan if a != a or b != b else f(a, b)


OPS = (("add", ADD), ("sub", SUB), ("mul", MUL))
for name, op in OPS:
    case(f"{name}.f32", "f32", ["f32"] * 2, real(op, "f32"))
    case(f"{name}.ftz.f32", "f32", ["f32"] * 2, real(op, "f32", "rn", ["ftz"]))
    case(f"{name}.sat.f32", "f32", ["f32"] * 2, real(op, "f32", "rn", ["sat"]))
    case(f"{name}.f64", "f64", ["f64"] * 2, real(op, "f64"))
for mode in ("rn", "rz", "rm", "rp"):
    for name, op in (*OPS, ("fma", FMA)):
        case(f"{name}.{mode}.f32", "f32", ["f32"] * (3 if op is FMA else 2), real(op, "f32", mode))
    case(f"fma.{mode}.ftz.sat.f32", "f32", ["f32"] * 3, real(FMA, "f32", mode, ["ftz", "sat"]))
case("mad.rn.f32", "f32", ["f32"] * 3, real(FMA, "f32"))
case("fma.rn.ftz.f32", "f32", ["f32"] * 3, real(FMA, "f32", "rn", ["ftz"]))
case("fma.rn.f64", "f64", ["f64"] * 3, real(FMA, "f64"))
for t in ("f32", "f64"):
    case(f"div.rn.{t}", t, [t, t], real(DIV, t))
    case(f"rcp.rn.{t}", t, [t], real(lambda a: 1 / a, t))
    case(f"sqrt.rn.{t}", t, [t],
         lambda a, f={"f32": np.float32, "f64": np.float64}[t]: math.nan if a < 0 else float(np.sqrt(f(a))))
case("div.rn.ftz.f32", "f32", ["f32"] * 2, real(DIV, "f32", "rn", ["ftz"]))
for t in ("f16", "bf16"):
    for packed in ("", "x2"):
        lift = each_half if packed else lambda f: f
        tt = t + packed
        for name, op in OPS:
            case(f"{name}.{'rn.' if t == 'bf16' else ''}{tt}", tt, [tt] * 2, lift(real(op, t)))
        case(f"fma.rn.{tt}", tt, [tt] * 3, lift(real(FMA, t)))
        case(f"fma.rn.relu.{tt}", tt, [tt] * 3, lift(real(FMA, t, "rn", ["relu"])))
        if t == "f16":
            case(f"fma.rn.ftz.sat.{tt}", tt, [tt] * 3, lift(real(FMA, t, "rn", ["ftz", "sat"])))
            case(f"add.ftz.{tt}", tt, [tt] * 2, lift(real(ADD, t, "rn", ["ftz"])))
for t in ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64"):
    lift = each_half if t.endswith("x2") else lambda f: f
    case(f"min.{t}", t, [t, t], lift(lesser))
    case(f"max.{t}", t, [t, t], lift(greater))
    if t != "f64":
        case(f"min.NaN.{t}", t, [t, t], lift(or_nan(lesser)))
        case(f"max.NaN.{t}", t, [t, t], lift(or_nan(greater)))
    case(f"abs.{t}", t, [t], lift(abs))
    case(f"neg.{t}", t, [t], lift(lambda a: -a))
case("max.ftz.f32", "f32", ["f32"] * 2, lambda a, b: greater(flush(a, "f32"), flush(b, "f32")))


def within(relative=0.0, absolute=0.0, t="f32"):
    """Close to the exact value, in which results that are not normal numbers count as their neighbours do."""
    _, least, most = FORMATS[t]

    def close(got, want):
        if want is None:
            return True
        if math.isnan(want) or math.isinf(want) or want == 0:
            return got == want or (got != got and want != want)
        if abs(want) >= math.ldexp(1 - relative, most + 1):
            return abs(got) >= math.ldexp(1 - relative, most) and (got < 0) == (want < 0)
        return abs(got - want) <= max(absolute, relative * abs(want), math.ldexp(1.0, least - FORMATS[t][0] + 1))
    return close


def quiet(f):
    def reference(*x):
        with np.errstate(all="ignore"):
            return float(f(*(np.float64(v) for v in x)))
    return reference


def ftz(f, t="f32"):
    return lambda *x: flush(f(*(flush(v, t) for v in x)), t)


ULP = 2.0**-23
for suffix, wrapped in (("", quiet), (".ftz", lambda f: ftz(quiet(f)))):  # the errors that the ISA's descriptions give
    case(f"rcp.approx{suffix}.f32", "f32", ["f32"], wrapped(lambda a: 1 / a), close=within(ULP))
    case(f"sqrt.approx{suffix}.f32", "f32", ["f32"], wrapped(np.sqrt), close=within(2.0**-23))
    case(f"rsqrt.approx{suffix}.f32", "f32", ["f32"], wrapped(lambda a: 1 / np.sqrt(a)), close=within(2.0**-22.9))
    case(f"ex2.approx{suffix}.f32", "f32", ["f32"], wrapped(np.exp2), close=within(2.0**-22))
    case(f"lg2.approx{suffix}.f32", "f32", ["f32"], wrapped(np.log2), close=within(2.0**-22, 2.0**-22))
    case(f"div.full{suffix}.f32", "f32", ["f32", "f32"], wrapped(lambda a, b: a / b), close=within(2 * ULP))
    for name, function in (("sin", np.sin), ("cos", np.cos)):
        case(f"{name}.approx{suffix}.f32", "f32", ["f32"], lambda a, f=wrapped(function): f(a) if abs(a) < 6.28 else None,
             close=within(0, 2.0**-20.5))


def divide_approx(a, b):
    if 2.0**126 < abs(b) < 2.0**128:
        return math.nan if not math.isfinite(a) else 0.0
    return None if 0 < abs(b) < 2.0**-126 else quiet(lambda x, y: x / y)(a, b)


case("div.approx.f32", "f32", ["f32", "f32"], divide_approx, close=within(2 * ULP))
for name, function in (("rcp", lambda a: 1 / a), ("rsqrt", lambda a: 1 / np.sqrt(a))):
    case(f"{name}.approx.ftz.f64", "f64", ["f64"], ftz(quiet(function), "f64"), close=lambda got, want: (
        encode("f64", got) & 0xFFFFFFFF == 0 and within(2.0**-19, 0, "f64")(got, want)))
case("tanh.approx.f32", "f32", ["f32"], quiet(np.tanh), close=within(2.0**-11))
for t, exponential, tangent in (("f16", 2.0**-9.9, 2.0**-10.987), ("bf16", 2.0**-7, 2.0**-8)):
    for packed in ("", "x2"):
        lift = each_half if packed else lambda f: f
        name, function = ("ex2.approx", quiet(np.exp2)) if t == "f16" else ("ex2.approx.ftz", ftz(quiet(np.exp2), t))
        case(f"{name}.{t}{packed}", t + packed, [t + packed], lift(function), close=within(exponential, 0, t))
        case(f"tanh.approx.{t}{packed}", t + packed, [t + packed], lift(quiet(np.tanh)), close=within(tangent, 0, t))

# 9.7.9 cvt
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
for to, t in itertools.product(INTEGERS, INTEGERS):
    case(f"cvt.{to}.{t}", to, [t], lambda a, to=to: wrap(a, to))
    if any(clamp(a, to) != a for a in (clamp(-math.inf, t), clamp(math.inf, t))):
        case(f"cvt.sat.{to}.{t}", to, [t], lambda a, to=to: clamp(a, to))
for to, t in (("s64", "s8:64"), ("s64", "s32:64"), ("u64", "u16:32"), ("s32", "s8:32"), ("u32", "u8:64"), ("s8:32", "s32"),
              ("s16:32", "s32"), ("s8:64", "s64"), ("u8:32", "u32"), ("s32:64", "s64"), ("u16:64", "s32")):
    name, source = to.partition(":")[0], t.partition(":")[0]
    case(f"cvt.{name}.{source}", to, [t], lambda a, to=name: wrap(a, to))

INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}


def to_integer(to, t, rounding):
    def reference(a):
        if a != a:
            return 1 << (bits_of(to) - 1) if t == "f64" or bits_of(to) == 64 else 0
        return clamp(rounding(Fraction(a)), to) if math.isfinite(a) else clamp(1 << 70 if a > 0 else -(1 << 70), to)
    return reference


for t, to, (mode, rounding) in itertools.product(FORMATS, INTEGERS, INTEGRAL.items()):
    if t != "tf32" and not (t == "bf16" and bits_of(to) == 8):
        case(f"cvt.{mode}.{to}.{t}", to, [t], lambda a, f=to_integer(to, t, rounding), to=to: wrap(f(a), to))
case("cvt.rpi.ftz.s32.f32", "s32", ["f32"], lambda a: to_integer("s32", "f32", math.ceil)(flush(a, "f32")))

for to, t, mode in itertools.product(("f16", "bf16", "f32", "f64"), INTEGERS, ("rn", "rz", "rm", "rp")):
    if not (to == "f64" and bits_of(t) == 64 and mode != "rn") and not (to == "bf16" and bits_of(t) == 8):
        case(f"cvt.{mode}.{to}.{t}", to, [t], lambda a, to=to, mode=mode: round_exact(Fraction(a), to, mode) if a else 0.0)


def to_real(to, mode="rn", modifiers=(), t="f32"):
    def reference(a):
        if "ftz" in modifiers and t == "f32":
            a = flush(a, "f32")
        r = round_exact(Fraction(a), to, mode) if math.isfinite(a) and a else a
        if "ftz" in modifiers and to == "f32":
            r = flush(r, "f32")
        if "sat" in modifiers:
            r = min(max(r, 0.0), 1.0) + 0.0 if r == r else 0.0
        return (r if r != r or r > 0 else 0.0) if "relu" in modifiers else r
    return reference


for to, t in (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64")):
    for mode in ("rn", "rz", "rm", "rp"):
        case(f"cvt.{mode}.{to}.{t}", to, [t], to_real(to, mode))
for to, t in (("f32", "f16"), ("f32", "bf16"), ("f64", "f16"), ("f64", "bf16"), ("f64", "f32")):
    case(f"cvt.{to}.{t}", to, [t], to_real(to))
case("cvt.rn.bf16.f16", "bf16", ["f16"], to_real("bf16"))
case("cvt.rn.f16.bf16", "f16", ["bf16"], to_real("f16"))
case("cvt.rn.relu.bf16.f32", "bf16", ["f32"], to_real("bf16", "rn", ["relu"]))
case("cvt.ftz.f32.f32", "f32", ["f32"], to_real("f32", "rn", ["ftz"]))
case("cvt.sat.f32.f32", "f32", ["f32"], to_real("f32", "rn", ["sat"]))
case("cvt.ftz.sat.f32.f16", "f32", ["f16"], to_real("f32", "rn", ["ftz", "sat"], "f16"))
case("cvt.rn.ftz.f32.f64", "f32", ["f64"], to_real("f32", "rn", ["ftz"], "f64"))
case("cvt.rn.ftz.f16.f32", "f16", ["f32"], to_real("f16", "rn", ["ftz"]))
for t, (mode, rounding) in itertools.product(("f16", "bf16", "f32", "f64"), INTEGRAL.items()):
    case(f"cvt.{mode}.{t}.{t}", t, [t], lambda a, f=rounding: math.copysign(float(f(Fraction(a))), a) if math.isfinite(a) else a)
for t in ("f16", "bf16"):
    for name, mode, modifiers in (("rn", "rn", []), ("rz", "rz", []), ("rn.relu", "rn", ["relu"])):
        case(f"cvt.{name}.{t}x2.f32", f"{t}x2", ["f32", "f32"], lambda a, b, f=to_real(t, mode, modifiers): (f(b), f(a)))
for name, mode in (("rna", "rna"), ("rn", "rn"), ("rz", "rz")):
    case(f"cvt.{name}.tf32.f32", "tf32", ["f32"], to_real("tf32", mode))

# 9.7.9 mov
for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "pred"):
    case(f"mov.{t}", "pred" if t == "pred" else f"b{bits_of(t)}", ["pred" if t == "pred" else f"b{bits_of(t)}"], lambda a: a)
case("mov.b32 {d}, {{{0}, {1}}};", "b32", ["b16", "b16"], lambda a, b: a | b << 16)
case("mov.b64 {d}, {{{0}, {1}}};", "b64", ["b32", "b32"], lambda a, b: a | b << 32)
case("mov.b64 {d}, {{{0}, {1}, {2}, {3}}};", "b64", ["b16"] * 4, lambda a, b, c, d: a | b << 16 | c << 32 | d << 48)
case("mov.b32 {{%h8, {d}}}, {0};", "b16", ["b32"], lambda a: a >> 16)
case("mov.b32 {{{d}, _}}, {0};", "b16", ["b32"], lambda a: a & 0xFFFF)
case("mov.b64 {{_, {d}}}, {0};", "b32", ["b64"], lambda a: a >> 32)
case("mov.b64 {{%h6, {d}, %h7, %h8}}, {0};", "b16", ["b64"], lambda a: a >> 16 & 0xFFFF)
case("mov.b64 {{%r5, %r6}}, {0}; mov.b64 {d}, {{%r6, %r5}};", "b64", ["b64"], lambda a: a >> 32 | (a & 0xFFFFFFFF) << 32)
case("mov.u32 {d}, -5;", "u32", ["b32"], lambda a: -5)
case("mov.f32 {d}, 0f3FC00000;", "f32", ["b32"], lambda a: 1.5)
case("mov.f64 {d}, 0d3FF8000000000000;", "f64", ["b32"], lambda a: 1.5)
case("mov.b16 {d}, 0x8000;", "b16", ["b32"], lambda a: 0x8000)
case("add.s64 {d}, {0}, -1;", "s64", ["s64"], lambda a: a - 1)
case("mul.f32 {d}, {0}, 0fBF000000;", "f32", ["f32"], real(lambda a: a / -2, "f32"))

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


@pytest.fixture(scope="module")
def gpu():
    return vgpu.Gpu(arch=90, seed=0)


@pytest.fixture(scope="module")
def module(gpu):
    return gpu.module(HEAD + "\n".join(c.kernel(f"k{i}") for i, c in enumerate(CASES.values())))


@pytest.mark.parametrize("key", CASES)
def test_instruction(module, key):
    CASES[key].check(module, f"k{list(CASES).index(key)}")


# ---------------------------------------------------------------------------------------- against other libraries, and by hand


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_narrow_conversion_agrees_with_libraries(module, t):
    x = np.random.default_rng(0).integers(0, 1 << 32, COUNT, np.uint32)
    x[:64] = (np.arange(64, dtype=np.uint32) << 12) + 0x3F800000  # halfway cases
    out = np.zeros(COUNT, np.uint16)
    key = f"cvt.rn.{t}.f32"
    module.launch(f"k{list(CASES).index(key)}", COUNT // BLOCK, BLOCK, args=[out, x])
    with np.errstate(all="ignore"):
        want = x.view(np.float32).astype(np.float16).view(np.uint16) if t == "f16" else torch.from_numpy(
            x.view(np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(x.view(np.float32))
    assert (out == want)[number].all()
    assert (out[~number] == 0x7FFF).all()


def run(gpu, body, count=32):
    """What a kernel of `body` leaves in %r1; %r0 is the thread."""
    text = HEAD + f""".visible .entry k(.param .u64 p0) {{
        .reg .pred %p<10>; .reg .b16 %h<10>; .reg .b32 %r<20>; .reg .b64 %l<10>;
        .shared .align 4 .b8 never[128];
        ld.param.u64 %l0, [p0]; mov.u32 %r0, %tid.x; mul.wide.u32 %l1, %r0, 4; add.s64 %l0, %l0, %l1;
        {body}
        st.global.u32 [%l0], %r1; ret; }}"""
    out = np.zeros(count, np.uint32)
    gpu.module(text).launch("k", block=count, args=[out])
    return out


ODD = "and.b32 %r2, %r0, 1; setp.ne.u32 %p1, %r2, 0;"


@pytest.mark.parametrize("statements", [
    "mov.u32 %r1, 7; @%p1 add.s32 %r1, %r0, 100;",
    "mov.u32 %r1, 7; mov.f32 %r3, 0f3F800000; cvt.rn.f32.u32 %r4, %r0; @%p1 add.f32 %r1, %r3, %r4; "
    "@%p1 cvt.rzi.u32.f32 %r1, %r1; @%p1 add.u32 %r1, %r1, 99;",
    "mov.b64 %l3, 7; cvt.u64.u32 %l4, %r0; @%p1 add.u64 %l3, %l4, 100; cvt.u32.u64 %r1, %l3;",
    "mov.b16 %h1, 7; cvt.u16.u32 %h2, %r0; @%p1 add.u16 %h1, %h2, 100; cvt.u32.u16 %r1, %h1;",
    "mov.pred %p2, 0; setp.eq.u32 %p3, %r0, %r0; @%p1 setp.ge.and.u32 %p2, %r0, 0, %p3; add.u32 %r3, %r0, 100; "
    "selp.u32 %r1, %r3, 7, %p2;",
    "mov.pred %p2, 0; mov.pred %p3, -1; @%p1 setp.eq.u32 %p2|%p3, %r0, %r0; not.pred %p3, %p3; and.pred %p2, %p2, %p3; "
    "add.u32 %r3, %r0, 100; selp.u32 %r1, %r3, 7, %p2;",
    "mov.pred %p2, 0; mov.pred %p3, 1; @%p1 mov.pred %p2, %p3; add.u32 %r3, %r0, 100; selp.u32 %r1, %r3, 7, %p2;",
    "mov.u32 %r1, 7; mov.u32 %r5, 0; add.u32 %r3, %r0, 100; mov.b64 %l3, {%r3, %r5}; @%p1 mov.b64 {%r1, %r5}, %l3;",
    "mov.u32 %r1, 7; add.u32 %r3, %r0, 100; mov.u32 %r4, 3; @%p1 div.u32 %r1, %r3, 1;",
    "mov.u32 %r1, 7; add.u32 %r3, %r0, 100; @!%p1 bra even; selp.u32 %r1, %r3, 0, %p1; even:",
])
def test_inactive_lanes_keep_their_values(gpu, statements):
    lanes = np.arange(32)
    assert (run(gpu, ODD + statements) == np.where(lanes & 1, lanes + 100, 7)).all()


UNDEFINED = ("mov.u32 %r9, never; ld.shared.u32 %r3, [%r9]; "
             "mov.f32 %r5, 0f40000000; mov.u32 %r6, 1; mov.pred %p4, 0; mov.pred %p5, 1;")


@pytest.mark.parametrize("statements", [
    "add.s32 %r1, %r3, 1;", "fma.rn.f32 %r1, %r5, %r3, %r5;", "mad.lo.s32 %r1, %r6, %r6, %r3;", "ex2.approx.f32 %r1, %r3;",
    "cvt.rn.bf16x2.f32 %r1, %r5, %r3;", "cvt.u64.u32 %l3, %r3; cvt.u32.u64 %r1, %l3;",
    "mov.b64 %l3, {%r6, %r3}; mov.b64 {%r1, _}, %l3;",
    "cvt.u16.u32 %h1, %r3; mov.b32 %r1, {%h1, %h1};", "setp.lt.s32 %p2, %r3, 5; selp.u32 %r1, 1, 0, %p2;",
    "selp.b32 %r1, %r6, %r3, %p4;",
    "setp.lt.s32 %p2, %r3, 5; and.pred %p2, %p2, %p5; selp.u32 %r1, 1, 0, %p2;", "set.lt.u32.s32 %r1, %r3, 5;",
    "setp.lt.or.s32 %p2|%p3, %r3, 5, %p4; selp.u32 %r1, 1, 0, %p3;", "prmt.b32 %r1, %r6, %r3, 0x5410;",
    "fma.rn.bf16x2 %r1, %r5, %r5, %r3;",
    "mov.b32 %r1, %r3;", "setp.lt.s32 %p2, %r3, 5; mov.pred %p3, %p2; not.pred %p3, %p3; selp.u32 %r1, 1, 0, %p3;",
    "cvt.rzi.s32.f32 %r1, %r3;", "sub.s32 %r4, %r6, 1; div.u32 %r1, %r6, %r4;", "sub.s32 %r4, %r6, 1; rem.s32 %r1, %r6, %r4;",
])
def test_undefined_values_reach_stores(gpu, statements):
    with pytest.raises(Exception, match="uninitialised"):
        run(gpu, UNDEFINED + statements)


@pytest.mark.parametrize("statements", [
    "selp.b32 %r1, %r6, %r3, %p5;", "setp.lt.s32 %p2, %r3, 5; and.pred %p2, %p2, %p4; selp.u32 %r1, 2, 1, %p2;",
    "setp.lt.or.s32 %p2, %r3, 5, %p5; selp.u32 %r1, 1, 2, %p2;", "setp.lt.and.s32 %p2, %r3, 5, %p4; selp.u32 %r1, 2, 1, %p2;",
    "mov.u32 %r1, %r3; mov.u32 %r1, 1;", "sub.s32 %r4, %r6, 1; div.u32 %r1, %r6, %r4; add.u32 %r1, %r6, 0;",
    "setp.ne.u32 %p2, %r0, 99; mov.u32 %r1, %r3; @%p2 mov.u32 %r1, 1;",
])
def test_undefined_values_that_do_not_matter(gpu, statements):
    assert (run(gpu, UNDEFINED + statements) == 1).all()


def test_uncovered_forms_stop(gpu):
    with pytest.raises(Exception, match="uncovered"):
        run(gpu, "mov.u32 %r3, 1; add.cc.u32 %r1, %r3, %r3;")
