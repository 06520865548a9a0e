"""Arithmetic, comparisons, conversions and moves of the virtual GPU against Python integers, exact fractions, numpy and torch.

Every case is one instruction in a kernel of its own: it loads its operands, one set a thread, and stores the result. References
work on Python numbers and know nothing of the implementation; bodies were assembled with ptxas once.
"""
import itertools
import math
import operator
import random
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

import vgpu

COUNT, BLOCK = 1600, 160  # threads of a case, of a block

# ----------------------------------------------------------------------------------------------------- types and their values

# Precision, least and greatest exponent of normal numbers.
FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def bits_of(t):
    return {"pred": 32, "bf16": 16}.get(t) or (32 if t.endswith("x2") else int(t[1:]))


def decode(t, raw):
    """Bits to a Python number, or a pair (low, high)."""
    if t.endswith("x2"):
        return decode(t[:-2], raw), decode(t[:-2], raw >> 16)
    if t == "bf16":
        return decode("f32", raw << 16)
    size, kind = bits_of(t) // 8, {"s": "i", "f": "f"}.get(t[0], "u")
    number = np.array(raw & ((1 << bits_of(t)) - 1), f"u{size}").view(f"{kind}{size}").item()
    return bool(number) if t == "pred" else number


def encode(t, x):
    """A Python number that the type has, to its bits; NaN to the canonical one."""
    if t.endswith("x2"):
        return encode(t[:-2], x[0]) | encode(t[:-2], x[1]) << 16
    if t not in FORMATS:
        return int(x) & ((1 << bits_of(t)) - 1)
    if math.isnan(x):
        return {"f64": 0x7FF8000000000000, "f32": 0x7FFFFFFF}.get(t, 0x7FFF)
    size = bits_of(t) // 8
    return encode("f32", x) >> 16 if t == "bf16" else np.array(x, f"f{size}").view(f"u{size}").item()


def round_exact(x, t, mode="rn"):
    """A nonzero fraction rounded to a format, as a float."""
    precision, least, most = FORMATS[t]
    magnitude, two = abs(x), Fraction(2)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < two**exponent
    unit = two ** (max(exponent, least) - precision + 1)
    count, rest = divmod(magnitude / unit, 1)
    away = mode == ("rm" if x < 0 else "rp")
    r = (count + ((2 * rest, count % 2) > (1, 0) if mode == "rn" else away and rest > 0)) * unit
    if r >= two ** (most + 1):
        r = math.inf if mode == "rn" or away else two ** (most + 1) - two ** (most + 1 - precision)
    return -float(r) if x < 0 else float(r)


def flush(x, t):
    return math.copysign(0.0, x) if abs(x) < 2.0 ** FORMATS[t][1] else x


def modified(r, t, modifiers):
    r = flush(r, t) if "ftz" in modifiers else r
    if "sat" in modifiers:
        r = min(max(r, 0.0), 1.0) + 0.0 if r == r else 0.0
    return 0.0 if "relu" in modifiers and r <= 0 else r


def values(t):
    rng, bits = random.Random(t), bits_of(t)
    if t.endswith("x2"):
        low = values(t[:-2])
        return [v | rng.choice(low) << 16 for v in low]
    if t not in FORMATS:
        some = [(1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1), (1 << (bits - 1)) - 1, (1 << (bits - 1)) + 1, 0x10000]
        some += [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 300, 0x7FFF, 0x8000, 0xFFFF]
        some += [0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF, *(rng.getrandbits(bits) for _ in range(6))]
        return [0, 1] if t == "pred" else [v & ((1 << bits) - 1) for v in some]
    precision, least, most = FORMATS[t]
    ulp, tiny, normal = 2.0 ** (1 - precision), math.ldexp(1.0, least - precision + 1), 2.0**least
    positive = [0.0, 1.0, 1 + ulp, 1 - ulp / 2, 0.5, 1.5, 2.5, 3.0, 10.0, math.ldexp(2.0 - ulp, most), tiny, 3 * tiny, normal,
                normal - tiny, math.inf, 2.0 ** (precision - 1) + 1, 2.0 ** (precision - 2) + 0.5]
    some = [s * v for v in positive for s in (1, -1)] + [round_exact(Fraction(rng.gauss(0, 3)), t) for _ in range(3)]
    return [encode(t, v) for v in (*some, math.nan)] + [rng.getrandbits(bits) for _ in range(2)]


def cancelling(t, rng):
    """a, b and about -a * b."""
    a, b = (round_exact(Fraction(rng.gauss(0, 2)), t) for _ in range(2))
    scale = 1 + rng.choice([0, 1, -1]) * Fraction(2) ** rng.randrange(-60, 0)
    return [encode(t, v) for v in (a, b, -round_exact(Fraction(a) * Fraction(b) * scale, t))]


def operands(types, seed):
    """COUNT sets of operands, all combinations if they fit into it; of a single operand fewer, random bits beside values()."""
    rng, lists = random.Random(seed), [values(t) for t in types]
    t, part = types[0], types[0].removesuffix("x2")
    if len(types) == 1:
        return [lists[0] + [rng.getrandbits(1 if t == "pred" else bits_of(t)) for _ in range(2 * BLOCK - len(lists[0]))]]
    sets = list(itertools.product(*lists)) if math.prod(len(x) for x in lists) <= COUNT else []
    while len(sets) < COUNT:
        if types == [t] * 3 and part in FORMATS and rng.random() < 0.4:
            halves = [cancelling(part, rng) for _ in range(1 + (t != part))]
            sets.append([sum(v << 16 * i for i, v in enumerate(column)) for column in zip(*halves)])
        else:
            sets.append([rng.choice(x) for x in lists])
    return [list(column) for column in zip(*sets)]


# --------------------------------------------------------------------------------------------------------------------- cases

CASES = []


class Case:
    """One of CASES. op: the opcode, or a whole statement with {d} for the destination and {0}, {1}, .. for the operands. to: the
    type of the result. sources: types; "s8:64" is an s8 in a 64-bit register. close(got, want): if an inexact result is right."""

    def __init__(self, op, to, sources, reference, close=None, inputs=None):
        CASES.append(self)
        self.op, self.reference, self.close, self.inputs = op, reference, close, inputs
        split = [t.partition(":") for t in (to, *sources)]
        self.to, *self.sources = (t for t, _, _ in split)
        self.size, *self.sizes = (int(register) if register else max(16, bits_of(t)) for t, _, register in split)

    def kernel(self, name):
        def element(i, size, use):
            return f"ld.param.u64 %l1, [p{i}]; mul.wide.u32 %l2, %r3, {size // 8}; add.s64 %l1, %l1, %l2; {use}"
        prefix = {16: "%h", 32: "%r", 64: "%l"}
        names = [f"{prefix[size]}{10 + i}" for i, size in enumerate(self.sizes)]
        lines = [f".visible .entry {name}({', '.join(f'.param .u64 p{i}' for i in range(1 + len(names)))}) {{",
                 ".reg .pred %p<10>; .reg .b16 %h<20>; .reg .b32 %r<20>; .reg .b64 %l<20>;",
                 "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r0, %r1, %r2;"]
        for i, (t, size) in enumerate(zip(self.sources, self.sizes)):
            lines.append(element(i + 1, size, f"ld.global.b{size} {names[i]}, [%l1];"))
            if t == "pred":
                lines.append(f"setp.ne.u32 %p{i + 1}, {names[i]}, 0;")
                names[i] = f"%p{i + 1}"
        d = f"{prefix[self.size]}4"
        statement = self.op if "{" in self.op else self.op + " {d}" + "".join(f", {{{i}}}" for i in range(len(names))) + ";"
        lines.append(statement.format(*names, d="%p0" if self.to == "pred" else d))
        lines += ["selp.u32 %r4, 1, 0, %p0;"] * (self.to == "pred")
        return "\n".join([*lines, element(0, self.size, f"st.global.b{self.size} [%l1], {d}; ret; }}")])

    def right(self, got, want):
        if self.close:
            pairs = zip(decode(self.to, got), want) if self.to.endswith("x2") else [(decode(self.to, got), want)]
            return all(self.close(*pair) for pair in pairs)
        if self.to[0] == "s":  # extended to the register
            return got == want & ((1 << self.size) - 1)
        return got == encode(self.to, want) or (self.to == "f64" and want != want and decode("f64", got) != decode("f64", got))

    def check(self, module, name):
        raw = self.inputs or operands(self.sources, self.op)
        noise, arrays = random.Random(1), []
        for t, size, column in zip(self.sources, self.sizes, raw):  # what a register has beyond its type must not matter
            arrays.append(np.array([v | noise.getrandbits(size) >> bits_of(t) << bits_of(t) for v in column], f"u{size // 8}"))
        out = np.zeros(len(raw[0]), f"u{self.size // 8}")
        module.launch(name, len(out) // BLOCK, BLOCK, args=[out, *arrays])
        wrong = []
        for got, *bits in zip(out.tolist(), *raw):
            arguments = [decode(t, b) for t, b in zip(self.sources, bits)]
            want = self.reference(*arguments)
            if want is not None and not self.right(got, want):
                wrong.append(f"{self.op} {arguments} ({[hex(b) for b in bits]}) gives {hex(got)}, not {want}")
        assert not wrong, f"{len(wrong)} wrong: " + "; ".join(wrong[:5])


def each(t, f):
    """f of values of type t: of both halves of a packed one."""
    return (lambda *pairs: tuple(f(*(p[h] for p in pairs)) for h in range(2))) if t.endswith("x2") else f


def clamp(x, t):
    most = (1 << bits_of(t) - (t[0] == "s")) - 1
    return min(max(x, -most - 1 if t[0] == "s" else 0), most)


ADD, SUB, MUL, DIV, FMA = operator.add, operator.sub, operator.mul, operator.truediv, lambda a, b, c: a * b + c

# 9.7.1 Integer Arithmetic
for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
    bits, wide = bits_of(t), t[0] + str(2 * bits_of(t))
    nonzero = [[v if i == 0 or v else 3 for v in column] for i, column in enumerate(operands([t, t], f"div{t}"))]
    for name, f in {"add": ADD, "sub": SUB, "mul.lo": MUL, "min": min, "max": max}.items():
        Case(f"{name}.{t}", t, [t, t], f)
    Case(f"mul.hi.{t}", t, [t, t], lambda a, b, n=bits: a * b >> n)
    Case(f"mad.lo.{t}", t, [t, t, t], FMA)
    Case(f"mad.hi.{t}", t, [t, t, t], lambda a, b, c, n=bits: (a * b >> n) + c)
    if bits < 64:
        Case(f"mul.wide.{t}", wide, [t, t], MUL)
        Case(f"mad.wide.{t}", wide, [t, t, wide], FMA)
    if bits == 32:
        Case(f"sad.{t}", t, [t, t, t], lambda a, b, c: c + abs(a - b))
    Case(f"div.{t}", t, [t, t], lambda a, b: math.trunc(Fraction(a, b)), inputs=nonzero)
    Case(f"rem.{t}", t, [t, t], lambda a, b: a - b * math.trunc(Fraction(a, b)), inputs=nonzero)
    if t[0] == "s":
        Case(f"abs.{t}", t, [t], abs)
        Case(f"neg.{t}", t, [t], operator.neg)
Case("add.sat.s32", "s32", ["s32", "s32"], lambda a, b: clamp(a + b, "s32"))
Case("sub.sat.s32", "s32", ["s32", "s32"], lambda a, b: clamp(a - b, "s32"))
for t, n in (("b32", 32), ("b64", 64)):
    Case(f"popc.{t}", "u32", [t], lambda a: bin(a).count("1"))
    Case(f"clz.{t}", "u32", [t], lambda a, n=n: n - a.bit_length())
    Case(f"brev.{t}", t, [t], lambda a, n=n: int(format(a, f"0{n}b")[::-1], 2))
    Case(f"bfi.{t}", t, [t, t, "u32", "u32"], lambda a, b, c, d: b ^ (a << (c & 255) ^ b) & ((1 << (d & 255)) - 1) << (c & 255))
for t, n in (("u32", 32), ("s32", 32), ("u64", 64), ("s64", 64)):
    Case(f"bfind.{t}", "u32", [t], lambda a: (a ^ a >> 64).bit_length() - 1)
    Case(f"bfind.shiftamt.{t}", "u32", [t], lambda a, n=n: -1 if a in (0, -1) else n - (a ^ a >> 64).bit_length())
    Case(f"bfe.{t}", t, [t, "u32", "u32"], lambda a, b, c, s=t[0] == "s": (
        (a >> (b & 255) & (1 << (c & 255)) - 1) ^ s << (c & 255) >> 1) - (s << (c & 255) >> 1))

# 9.7.8 Logic and Shift, 9.7.9 prmt
for t in ("b16", "b32", "b64", "pred"):
    for name, f in {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.items():
        Case(f"{name}.{t}", t, [t, t], f)
    Case(f"not.{t}", t, [t], operator.not_ if t == "pred" else operator.invert)
    if t != "pred":
        Case(f"shl.{t}", t, [t, "u32"], lambda a, n: a << min(n, 64))
for t in ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64"):
    Case(f"shr.{t}", t, [t, "u32"], lambda a, n: a >> min(n, 64))
for mode, amount in {"wrap": lambda c: c & 31, "clamp": lambda c: min(c, 32)}.items():
    Case(f"shf.l.{mode}.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c, n=amount: (b << 32 | a) << n(c) >> 32)
    Case(f"shf.r.{mode}.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c, n=amount: (b << 32 | a) >> n(c))
for table in (0x80, 0x96, 0xE8, 0xCA, 0x01, 0xF4, 0x3C):
    Case(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", "b32", ["b32"] * 3, lambda a, b, c, table=table: sum(
        (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)))
Case("prmt.b32", "b32", ["b32"] * 3, lambda a, b, c: sum(
    ((b << 32 | a) >> 8 * (s & 7) & 255 if s < 8 else ((b << 32 | a) >> 8 * (s & 7) & 128) // 128 * 255) << 8 * i
    for i, s in enumerate(c >> 4 * i & 15 for i in range(4))))

# 9.7.6 Comparison and Selection
ORDERED = {"eq": operator.eq, "ne": lambda a, b: a < b or a > b, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
           "ge": operator.ge}
UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
UNORDERED = {"num": lambda a, b: a == a and b == b, "nan": lambda a, b: a != a or b != b}
UNORDERED |= {name + "u": lambda a, b, f=f: a != a or b != b or f(a, b) for name, f in ORDERED.items()}
for t in ("b16", "b32", "b64", "u16", "s16", "u32", "s32", "u64", "s64", *FORMATS):
    for name, f in (ORDERED | (UNORDERED if t in FORMATS else UNSIGNED if t[0] == "u" else {})).items():
        if t[0] != "b" or t in FORMATS or name in ("eq", "ne"):
            Case(f"setp.{name}.{t}", "pred", [t, t], f)
BOTH = " %p8|%p9, {0}, {1}, {2}; selp.u32 %r5, 1, 0, %p8; selp.u32 {d}, 2, 0, %p9; or.b32 {d}, {d}, %r5;"
for op, f in {"and": lambda a, b: a and b, "or": lambda a, b: a or b, "xor": lambda a, b: a != b}.items():
    for t in ("s32", "f32"):
        Case(f"setp.lt.{op}.{t}{BOTH}", "u32", [t, t, "pred"], lambda a, b, c, f=f: f(a < b, c) | f(not a < b, c) << 1)
    Case(f"setp.ge.{op}.u64 {{d}}, {{0}}, {{1}}, !{{2}};", "pred", ["u64", "u64", "pred"], lambda a, b, c, f=f: f(a >= b, not c))
    for t in ("f16x2", "bf16x2"):
        Case(f"setp.gtu.{op}.{t}{BOTH}", "u32", [t, t, "pred"],
             lambda a, b, c, f=f, gtu=UNORDERED["gtu"]: f(gtu(a[0], b[0]), c) | f(gtu(a[1], b[1]), c) << 1)
Case("setp.eq.ftz.f32", "pred", ["f32", "f32"], lambda a, b: flush(a, "f32") == flush(b, "f32"))
for name, f in (ORDERED | UNORDERED).items():
    one = lambda *x, f=f: float(f(*x))
    for t in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        Case(f"set.{name}.{t}.{t}", t, [t, t], each(t, one))
    for t in ("f16x2", "bf16x2"):
        Case(f"set.{name}.u32.{t}", "u32", [t, t], lambda a, b, f=f: 0xFFFF * f(a[0], b[0]) | 0xFFFF0000 * f(a[1], b[1]))
for t in ("b16", "u16", "s32", "b32", "f32", "b64", "f64"):
    Case(f"selp.{t}", f"b{bits_of(t)}", [f"b{bits_of(t)}"] * 2 + ["pred"], lambda a, b, p: a if p else b)


# 9.7.3 Floating-Point and 9.7.4 Half Precision Floating-Point
def real(op, t, mode, modifiers, *x):
    """The exact result of `op`, which works on fractions as on numpy floats, rounded once."""
    x = [flush(v, t) if "ftz" in modifiers else v for v in x]
    finite = all(math.isfinite(v) for v in x)
    with np.errstate(all="ignore"):  # beside infinities only the sign of the others counts
        r = float(op(*(np.float64(v if finite or not v or not math.isfinite(v) else math.copysign(1, v)) for v in x)))
    try:
        exact = op(*(Fraction(v) for v in x)) if finite else None
    except ZeroDivisionError:
        exact = None
    if exact:
        r = round_exact(exact, t, mode)
    elif exact == 0:  # the sign of a zero: of a sum, the one that both terms have, else -0 only when rounding down
        terms = {ADD: x, SUB: (x[0], -x[-1]), FMA: (x[0] * x[1 % len(x)], x[-1])}.get(op)
        signs = {math.copysign(1, v) for v in terms or [r]}
        r = math.copysign(0.0, signs.pop() if len(signs) == 1 else -1 if mode == "rm" else 1)
    return modified(r, t, modifiers)


def lesser(a, b):
    return min((x for x in (a, b) if x == x), key=lambda x: (x, math.copysign(1, x)), default=math.nan)


OPS = {"add": ADD, "sub": SUB, "mul": MUL, "fma": FMA, "mad": FMA, "div": DIV, "rcp": lambda a: 1 / a}
FORMS = {"f16": "add sub mul add.ftz add.sat sub.sat mul.sat fma.rn fma.rn.ftz fma.rn.relu fma.rn.sat",
         "bf16": "add.rn sub.rn mul.rn fma.rn fma.rn.relu",
         "f32": "add add.rn add.ftz add.sat add.rz add.rz.ftz sub sub.rn sub.ftz sub.sat mul mul.rn mul.ftz mul.sat mad.rn "
                "fma.rn fma.rn.ftz fma.rn.ftz.sat fma.rm fma.rm.ftz.sat fma.rz div.rn div.rn.ftz rcp.rn",
         "f64": "add sub mul div.rn rcp.rn fma.rn"}
for t, part in ((t, t.removesuffix("x2")) for t in (*FORMATS, "f16x2", "bf16x2")):
    for form in FORMS[part].split():
        name, *modifiers = form.split(".")
        mode = next((m for m in modifiers if m in ("rz", "rm")), "rn")
        exact = partial(real, OPS[name], part, mode, modifiers)
        Case(f"{form}.{t}", t, [t] * {"fma": 3, "mad": 3, "rcp": 1}.get(name, 2), each(t, exact))
    for name, f in {"min": lesser, "max": lambda a, b: -lesser(-a, -b)}.items():
        Case(f"{name}.{t}", t, [t, t], each(t, f))
        if t != "f64":
            Case(f"{name}.NaN.{t}", t, [t, t], each(t, lambda a, b, f=f: math.nan if a != a or b != b else f(a, b)))
    Case(f"abs.{t}", t, [t], each(t, abs))
    Case(f"neg.{t}", t, [t], each(t, operator.neg))
Case("max.ftz.f32", "f32", ["f32"] * 2, lambda a, b: -lesser(-flush(a, "f32"), -flush(b, "f32")))
for t, f in (("f32", np.float32), ("f64", np.float64)):
    Case(f"sqrt.rn.{t}", t, [t], lambda a, f=f: math.nan if a < 0 else float(np.sqrt(f(a))))
    Case(f"copysign.{t}", t, [t, t], lambda a, b: math.copysign(b, a) if b == b else None)


def within(relative=0.0, absolute=0.0, t="f32"):
    """Close to the exact value, in which results that are not normal numbers count as their neighbours do."""
    precision, least, most = FORMATS[t]

    def close(got, want):
        if not math.isfinite(want) or want == 0:
            return got == want or (got != got and want != want)
        if abs(want) >= math.ldexp(1 - relative, most + 1):
            return abs(got) >= math.ldexp(1 - relative, most) and (got < 0) == (want < 0)
        return abs(got - want) <= max(absolute, relative * abs(want), math.ldexp(1.0, least - precision + 1))
    return close


def inexact(f, t, *x):
    """f of numpy floats, by f64; with .ftz of type t."""
    with np.errstate(all="ignore"):
        r = float(f(*(np.float64(flush(v, t) if t else v) for v in x)))
    return flush(r, t) if t else r


ULP = 2.0**-23
for suffix, t in (("", None), (".ftz", "f32")):  # the errors are those of the ISA's descriptions
    for name, f, close, most in (
            ("rcp", OPS["rcp"], within(ULP), math.inf), ("rsqrt", lambda a: 1 / np.sqrt(a), within(2.0**-22.9), math.inf),
            ("sqrt", np.sqrt, within(ULP), math.inf), ("ex2", np.exp2, within(2 * ULP), math.inf),
            ("lg2", np.log2, within(2 * ULP, 2 * ULP), math.inf),
            ("sin", np.sin, within(0, 2.0**-20.5), 6.28), ("cos", np.cos, within(0, 2.0**-20.5), 6.28)):
        Case(f"{name}.approx{suffix}.f32", "f32", ["f32"],
             lambda a, f=partial(inexact, f, t), most=most: None if abs(a) > most else f(a), close=close)
    Case(f"div.full{suffix}.f32", "f32", ["f32", "f32"], partial(inexact, DIV, t), close=within(2 * ULP))


def of_upper_half(f, a):
    """What the 20 bits of the fraction in the upper half of a double give. (9.7.3 rcp.approx.ftz.f64)"""
    return inexact(f, "f64", a if a != a else decode("f64", encode("f64", a) >> 32 << 32))


for name, f in {"rcp": OPS["rcp"], "rsqrt": lambda a: 1 / np.sqrt(a)}.items():
    Case(f"{name}.approx.ftz.f64", "f64", ["f64"], partial(of_upper_half, f), close=lambda got, want, near=within(2.0**-20, 0, "f64"): (
        near(got, want) and (got != got or encode("f64", got) % 2**32 == 0)))
Case("rsqrt.approx.f64", "f64", ["f64"], partial(inexact, lambda a: 1 / np.sqrt(a), None), close=within(2.0**-51, 0, "f64"))
Case("div.approx.f32", "f32", ["f32", "f32"], lambda a, b: (0.0 if math.isfinite(a) else math.nan) if 2.0**126 < abs(b) < 2.0**128
     else None if 0 < abs(b) < 2.0**-126 else inexact(DIV, None, a, b), close=within(2 * ULP))
Case("tanh.approx.f32", "f32", ["f32"], partial(inexact, np.tanh, None), close=within(2.0**-11))
for t, suffix, exponential, tangent in (("f16", "", 2.0**-9.9, 2.0**-10.987), ("bf16", ".ftz", 2.0**-7, 2.0**-8)):
    for tt in (t, t + "x2"):
        exp2, tanh = partial(inexact, np.exp2, t if suffix else None), partial(inexact, np.tanh, None)
        Case(f"ex2.approx{suffix}.{tt}", tt, [tt], each(tt, exp2), close=within(exponential, 0, t))
        Case(f"tanh.approx.{tt}", tt, [tt], each(tt, tanh), close=within(tangent, 0, t))

# 9.7.9 cvt
INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
INTEGRAL = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
MODES = ("rn", "rz", "rm", "rp")
for to, t in itertools.product(INTEGERS, INTEGERS):
    Case(f"cvt.{to}.{t}", to, [t], lambda a, to=to: decode(to, a))
    if any(clamp(a, to) != a for a in (clamp(-math.inf, t), clamp(math.inf, t))):
        Case(f"cvt.sat.{to}.{t}", to, [t], lambda a, to=to: clamp(a, to))
for to, t in (("s64", "s8:64"), ("s64", "s32:64"), ("u64", "u16:32"), ("s32", "s8:32"), ("u32", "u8:64"), ("s8:32", "s32"),
              ("s16:32", "s32"), ("s8:64", "s64"), ("u8:32", "u32"), ("s32:64", "s64"), ("u16:64", "s32")):
    Case(f"cvt.{to.split(':')[0]}.{t.split(':')[0]}", to, [t], lambda a, to=to.split(":")[0]: decode(to, a))


def to_integer(to, t, rounding, ftz, a):
    if a != a:
        return decode(to, 1 << (bits_of(to) - 1) if t == "f64" or bits_of(to) == 64 else 0)
    return clamp(rounding(Fraction(flush(a, t) if ftz else a)) if math.isfinite(a) else a, to)


def to_real(to, t, mode, modifiers, a):
    a = flush(a, "f32") if "ftz" in modifiers and t == "f32" else a
    r = round_exact(Fraction(a), to, mode) if math.isfinite(a) and a else float(a)
    return modified(r, to, [m for m in modifiers if m != "ftz" or to == "f32"])


for t, to, (mode, rounding) in itertools.product(FORMATS, INTEGERS, INTEGRAL.items()):
    if not (t == "bf16" and bits_of(to) == 8):
        Case(f"cvt.{mode}.{to}.{t}", to, [t], partial(to_integer, to, t, rounding, False))
Case("cvt.rpi.ftz.s32.f32", "s32", ["f32"], partial(to_integer, "s32", "f32", math.ceil, True))
forms = [f"{mode}.{types}" for mode in MODES for types in ("f16.f32", "bf16.f32", "f16.f64", "bf16.f64", "f32.f64")]
forms += [f"{mode}.{to}.{t}" for to, t, mode in itertools.product(FORMATS, INTEGERS, MODES)
          if not (to == "f64" and bits_of(t) == 64 and mode != "rn") and not (to == "bf16" and bits_of(t) == 8)]
forms += ["f32.f16", "f32.bf16", "f64.f16", "f64.bf16", "f64.f32", "rn.bf16.f16", "rn.f16.bf16", "rn.relu.bf16.f32",
          "ftz.f32.f32", "sat.f32.f32", "ftz.sat.f32.f16", "rn.ftz.f32.f64", "rn.ftz.f16.f32"]
for *modifiers, to, t in (form.split(".") for form in forms):
    mode = modifiers[0] if modifiers and modifiers[0] in MODES else "rn"
    Case(f"cvt.{'.'.join([*modifiers, to, t])}", to, [t], partial(to_real, to, t, mode, modifiers))
for t, (mode, rounding) in itertools.product(FORMATS, INTEGRAL.items()):
    Case(f"cvt.{mode}.{t}.{t}", t, [t], lambda a, f=rounding: math.copysign(float(f(Fraction(a))), a) if math.isfinite(a) else a)
for t, (mode, *modifiers) in itertools.product(("f16", "bf16"), (["rn"], ["rz"], ["rn", "relu"])):
    Case(f"cvt.{'.'.join([mode, *modifiers])}.{t}x2.f32", f"{t}x2", ["f32", "f32"],
         lambda a, b, f=partial(to_real, t, "f32", mode, modifiers): (f(b), f(a)))

# 9.7.9 mov, and immediates
for t in ("b16", "u16", "s16", "b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64", "pred"):
    Case(f"mov.{t}", raw := "pred" if t == "pred" else f"b{bits_of(t)}", [raw], lambda a: a)
for op, to, sources, reference in (
        ("mov.b32 {d}, {{{0}, {1}}};", "b32", ["b16"] * 2, lambda a, b: a | b << 16),
        ("{{ .reg .b8 %c<2>; cvt.s8.s32 %c0, {0}; cvt.u8.u32 %c1, {1}; mov.b16 {d}, {{%c0, %c1}}; }}", "b16", ["b32"] * 2,
         lambda a, b: a & 255 | (b & 255) << 8),
        ("{{ .reg .b8 %c; cvt.u8.u32 %c, {0}; mov.b16 {d}, {{%c, 0}}; }}", "b16", ["b32"], lambda a: a & 255),
        ("mov.b64 {d}, {{{0}, {1}}};", "b64", ["b32"] * 2, lambda a, b: a | b << 32),
        ("mov.b64 {d}, {{{0}, {1}, {2}, {3}}};", "b64", ["b16"] * 4, lambda a, b, c, d: a | b << 16 | c << 32 | d << 48),
        ("mov.b32 {{%h8, {d}}}, {0};", "b16", ["b32"], lambda a: a >> 16),
        ("mov.b32 {{{d}, _}}, {0};", "b16", ["b32"], lambda a: a),
        ("mov.b64 {{_, {d}}}, {0};", "b32", ["b64"], lambda a: a >> 32),
        ("mov.b64 {{%h6, {d}, %h7, %h8}}, {0};", "b16", ["b64"], lambda a: a >> 16),
        ("mov.b64 {{%r5, %r6}}, {0}; mov.b64 {d}, {{%r6, %r5}};", "b64", ["b64"], lambda a: a >> 32 | a << 32),
        ("mov.u32 {d}, -5;", "u32", ["b32"], lambda a: -5), ("mov.u32 {d}, WARP_SZ;", "u32", ["b32"], lambda a: 32),
        ("sub.u32 {d}, {0}, WARP_SZ;", "u32", ["u32"], lambda a: a - 32), ("mov.b16 {d}, 0x8000;", "b16", ["b32"], lambda a: 0x8000),
        ("mov.f32 {d}, 0f3FC00000;", "f32", ["b32"], lambda a: 1.5),
        ("mov.f64 {d}, 0d3FF8000000000000;", "f64", ["b32"], lambda a: 1.5),
        ("add.s64 {d}, {0}, -1;", "s64", ["s64"], lambda a: a - 1),
        ("mul.f32 {d}, {0}, 0fBF000000;", "f32", ["f32"], partial(real, lambda a: a / -2, "f32", "rn", []))):
    Case(op, to, sources, reference)

HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"


@pytest.fixture(scope="module")
def module():
    return vgpu.Gpu(arch=90, seed=0).module(HEAD + "\n".join(c.kernel(f"k{i}") for i, c in enumerate(CASES)))


@pytest.mark.parametrize("number", range(len(CASES)), ids=[c.op.split(" ")[0] for c in CASES])
def test_instruction(module, number):
    CASES[number].check(module, f"k{number}")


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_narrow_conversion_agrees_with_libraries(module, t):
    x = np.random.default_rng(0).integers(0, 1 << 32, COUNT, np.uint32)
    x[:64] = (np.arange(64, dtype=np.uint32) << 12) + 0x3F800000  # halfway cases
    x, out = x.view(np.float32), np.zeros(COUNT, np.uint16)
    module.launch(f"k{[c.op for c in CASES].index(f'cvt.rn.{t}.f32')}", COUNT // BLOCK, BLOCK, args=[out, x])
    with np.errstate(all="ignore"):
        want = x.astype(np.float16) if t == "f16" else torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()
    assert (out == np.where(np.isnan(x), 0x7FFF, want.view(np.uint16))).all()


def run(body):
    """What a kernel of `body` leaves in %r1; %r0 is the thread."""
    out = np.zeros(32, np.uint32)
    vgpu.Gpu(arch=90, seed=0).module(HEAD + f""".visible .entry k(.param .u64 p0) {{
        .reg .pred %p<10>; .reg .b16 %h<10>; .reg .b32 %r<20>; .reg .b64 %l<10>; .shared .align 4 .b8 never[128];
        ld.param.u64 %l0, [p0]; mov.u32 %r0, %tid.x; mul.wide.u32 %l1, %r0, 4; add.s64 %l0, %l0, %l1;
        {body} st.global.u32 [%l0], %r1; ret; }}""").launch("k", block=32, args=[out])
    return out


ODD = "and.b32 %r2, %r0, 1; setp.ne.u32 %p1, %r2, 0; add.u32 %r3, %r0, 100; mov.u32 %r1, 7; mov.pred %p2, 0; "


@pytest.mark.parametrize("statements", [
    "@%p1 add.s32 %r1, %r0, 100;", "@%p1 div.u32 %r1, %r3, 1;", "@!%p1 bra even; selp.u32 %r1, %r3, 0, %p1; even:",
    "mov.f32 %r3, 0f3F800000; cvt.rn.f32.u32 %r4, %r0; @%p1 add.f32 %r1, %r3, %r4; @%p1 cvt.rzi.u32.f32 %r1, %r1; "
    "@%p1 add.u32 %r1, %r1, 99;",
    "mov.b64 %l3, 7; cvt.u64.u32 %l4, %r0; @%p1 add.u64 %l3, %l4, 100; cvt.u32.u64 %r1, %l3;",
    "mov.b16 %h1, 7; cvt.u16.u32 %h2, %r0; @%p1 add.u16 %h1, %h2, 100; cvt.u32.u16 %r1, %h1;",
    "setp.eq.u32 %p3, %r0, %r0; @%p1 setp.ge.and.u32 %p2, %r0, 0, %p3; selp.u32 %r1, %r3, 7, %p2;",
    "mov.pred %p3, -1; @%p1 setp.eq.u32 %p2|%p3, %r0, %r0; not.pred %p3, %p3; and.pred %p2, %p2, %p3; selp.u32 %r1, %r3, 7, %p2;",
    "mov.pred %p3, 1; @%p1 mov.pred %p2, %p3; selp.u32 %r1, %r3, 7, %p2;",
    "mov.u32 %r5, 0; mov.b64 %l3, {%r3, %r5}; @%p1 mov.b64 {%r1, %r5}, %l3;",
])
def test_inactive_lanes_keep_their_values(statements):
    assert run(ODD + statements).tolist() == [lane + 100 if lane & 1 else 7 for lane in range(32)]


UNDEFINED = ("mov.u32 %r9, never; ld.shared.u32 %r3, [%r9]; mov.f32 %r5, 0f40000000; mov.u32 %r6, 1; mov.u32 %r4, 0; "
             "mov.pred %p4, 0; mov.pred %p5, 1; setp.lt.s32 %p2, %r3, 5; ")
MATTERS = (
    "add.s32 %r1, %r3, 1;", "fma.rn.f32 %r1, %r5, %r3, %r5;", "mad.lo.s32 %r1, %r6, %r6, %r3;", "ex2.approx.f32 %r1, %r3;",
    "cvt.rn.bf16x2.f32 %r1, %r5, %r3;", "cvt.u64.u32 %l3, %r3; cvt.u32.u64 %r1, %l3;", "fma.rn.bf16x2 %r1, %r5, %r5, %r3;",
    "set.lt.f32.f32 %r1, %r5, %r3;",
    "mov.b64 %l3, {%r6, %r3}; mov.b64 {_, %r1}, %l3;", "cvt.u16.u32 %h1, %r3; mov.b32 %r1, {%h1, %h1};", "mov.b32 %r1, %r3;",
    "selp.u32 %r1, 1, 0, %p2;", "selp.b32 %r1, %r6, %r3, %p4;", "and.pred %p2, %p2, %p5; selp.u32 %r1, 1, 0, %p2;",
    "setp.lt.or.s32 %p2|%p3, %r3, 5, %p4; selp.u32 %r1, 1, 0, %p3;", "prmt.b32 %r1, %r6, %r3, 0x5410;",
    "mov.pred %p3, %p2; not.pred %p3, %p3; selp.u32 %r1, 1, 0, %p3;", "cvt.rzi.s32.f32 %r1, %r3;", "div.u32 %r1, %r6, %r4;",
    "rem.s32 %r1, %r6, %r4;")
DOES_NOT = (
    "selp.b32 %r1, %r6, %r3, %p5;", "and.pred %p2, %p2, %p4; selp.u32 %r1, 2, 1, %p2;", "mov.u32 %r1, %r3; mov.u32 %r1, 1;",
    "setp.lt.or.s32 %p2, %r3, 5, %p5; selp.u32 %r1, 1, 2, %p2;", "setp.lt.and.s32 %p2, %r3, 5, %p4; selp.u32 %r1, 2, 1, %p2;",
    "div.u32 %r1, %r6, %r4; add.u32 %r1, %r6, 0;", "mov.b64 %l3, {%r6, %r3}; mov.b64 {%r1, _}, %l3;",
    "setp.ne.u32 %p2, %r0, 99; mov.u32 %r1, %r3; @%p2 mov.u32 %r1, 1;")


@pytest.mark.parametrize("statements", MATTERS + DOES_NOT)
def test_undefined_values_reach_stores_if_they_matter(statements):
    if statements in DOES_NOT:
        assert (run(UNDEFINED + statements) == 1).all()
    else:
        with pytest.raises(vgpu.Failure, match="uninitialised"):
            run(UNDEFINED + statements)


@pytest.mark.parametrize("statement", [
    "add.cc.u32 %r1, %r3, %r3;", "mul24.lo.u32 %r1, %r3, %r3;", "sad.u16 %h1, %h1, %h1, %h1;", "bmsk.wrap.b32 %r1, %r3, %r3;",
    "szext.clamp.s32 %r1, %r3, %r3;", "max.s16x2 %r1, %r3, %r3;", "prmt.b32.f4e %r1, %r3, %r3, %r3;", "cnot.b32 %r1, %r3;",
    "set.lt.u32.s32 %r1, %r3, %r3;", "set.lt.and.f32.f32 %r1, %r3, %r3, %p1;", "set.lt.u32.f16 %r1, %h1, %h1;",
    "set.eq.ftz.f32.f32 %r1, %r3, %r3;", "testp.finite.f32 %p2, %r3;", "mul.rz.f32 %r1, %r3, %r3;",
    "cvt.rna.tf32.f32 %r1, %r3;", "fma.rp.f32 %r1, %r3, %r3, %r3;", "add.sat.bf16x2 %r1, %r3, %r3;", "add.rz.f64 %l1, %l1, %l1;",
    "slct.s32.s32 %r1, %r3, %r3, %r3;", "rcp.approx.f64 %l1, %l1;", "mov.b16 {%r1, %r2}, %h1;"])
def test_uncovered_forms_stop(statement):
    with pytest.raises(vgpu.Failure, match="uncovered"):
        run("mov.u32 %r3, 1; " + statement)
