// Arithmetic, comparison, selection, logic and shifts (PTX ISA 9.0, sections 9.7.1 "Integer Arithmetic" to 9.7.8 "Logic and
// Shift", without 9.7.2 "Extended-Precision Arithmetic"). Each operation is a struct whose `of` computes one lane.
//
// Where the ISA leaves a value open: .approx operations give the nearest value of their type, integer division by zero
// poisons its lane.
#include <tuple>
#include <unordered_map>
#include <utility>

#include "lanes.h"

namespace vgpu {
namespace {

// ------------------------------------------------------------------------------------------------------ integer operations

template <class T> using Wrap = Lane32or64<T>;  // arithmetic that wraps around, at least 32 bits wide
template <class T> using Unsigned = std::make_unsigned_t<T>;
template <class T> constexpr int kBits = 8 * (int)sizeof(T);

template <class T> struct DoubleOf;
template <> struct DoubleOf<int16_t> { using type = int32_t; };
template <> struct DoubleOf<uint16_t> { using type = uint32_t; };
template <> struct DoubleOf<int32_t> { using type = int64_t; };
template <> struct DoubleOf<uint32_t> { using type = uint64_t; };
template <> struct DoubleOf<int64_t> { using type = __int128; };
template <> struct DoubleOf<uint64_t> { using type = unsigned __int128; };
template <class T> using Double = typename DoubleOf<T>::type;

// The `bits` low bits, 0 to all.
template <class T>
T low_mask(uint32_t bits) { return bits >= (uint32_t)kBits<T> ? (T)~T(0) : (T)((T(1) << bits) - 1); }

// Shift amounts from the width on give what shifting everything out gives. (9.7.8 shl, shr)
struct ShiftLeft {
  template <class T> static T of(T a, uint32_t n) { return n < (uint32_t)kBits<T> ? (T)((Wrap<T>)a << n) : T(0); }
};
struct ShiftRight {
  template <class T> static T of(T a, uint32_t n) { return (T)(n < (uint32_t)kBits<T> ? a >> n : a < 0 ? -1 : 0); }
};

// 9.7.1 add, sub, mul, mad, sad, div, rem, abs, neg, min, max
struct Add { template <class T> static T of(T a, T b) { return (T)((Wrap<T>)a + (Wrap<T>)b); } };
struct Sub { template <class T> static T of(T a, T b) { return (T)((Wrap<T>)a - (Wrap<T>)b); } };
template <class Op>
struct Saturate {  // .sat of add and sub, .s32 only
  static int32_t of(int32_t a, int32_t b) {
    using Limits = std::numeric_limits<int32_t>;
    return (int32_t)std::clamp<int64_t>(Op::template of<int64_t>(a, b), Limits::min(), Limits::max());
  }
};
struct MulLo { template <class T> static T of(T a, T b) { return (T)((Wrap<T>)a * (Wrap<T>)b); } };
struct MulHi { template <class T> static T of(T a, T b) { return (T)((Double<T>)a * (Double<T>)b >> kBits<T>); } };
struct MulWide { template <class T> static Double<T> of(T a, T b) { return (Double<T>)a * (Double<T>)b; } };
template <class Mul>
struct Mad { template <class T, class C> static C of(T a, T b, C c) { return Add::of<C>((C)Mul::of(a, b), c); } };
struct Sad { template <class T> static T of(T a, T b, T c) { return Add::of(c, a < b ? Sub::of(b, a) : Sub::of(a, b)); } };
template <class T>
bool minus_one(T b) { return std::is_signed_v<T> && b == (T)-1; }  // least / -1 must not trap
struct Div {
  template <class T> static T of(T a, T b) { return b == 0 ? (T)-1 : minus_one(b) ? Sub::of(T(0), a) : (T)(a / b); }
};
struct Rem {
  template <class T> static T of(T a, T b) { return b == 0 ? a : minus_one(b) ? T(0) : (T)(a % b); }
};
struct Abs { template <class T> static T of(T a) { return a < 0 ? Sub::of(T(0), a) : a; } };
struct Neg { template <class T> static T of(T a) { return Sub::of(T(0), a); } };
struct Min { template <class T> static T of(T a, T b) { return a < b ? a : b; } };
struct Max { template <class T> static T of(T a, T b) { return a < b ? b : a; } };

// 9.7.1 mul24, mad24: products of the low 24 bits, bits 0 to 31 or 16 to 47
template <bool kHigh>
struct Mul24 {
  template <class T> static T of(T a, T b) {
    const Double<T> x = (T)((uint32_t)a << 8) >> 8, y = (T)((uint32_t)b << 8) >> 8;
    return (T)(x * y >> (kHigh ? 16 : 0));
  }
};

// 9.7.1 popc, clz, bfind, brev
struct PopC { template <class T> static uint32_t of(T a) { return (uint32_t)__builtin_popcountll(a); } };
struct Clz {
  template <class T> static uint32_t of(T a) { return a ? (uint32_t)__builtin_clzll(a) - (64 - kBits<T>) : kBits<T>; }
};
template <bool kShift>  // .shiftamt: how far left the found bit would have to go; nothing found is all ones either way
struct BFind {
  template <class T> static uint32_t of(T a) {
    const auto x = (Unsigned<T>)(a < 0 ? ~a : a);
    return x ? (kShift ? Clz::of(x) : (uint32_t)kBits<T> - 1 - Clz::of(x)) : ~0u;
  }
};
struct BRev {
  template <class T> static T of(T a) {
    T mask = (T)~T(0);
    for (int s = kBits<T> / 2; s; s /= 2) {
      mask ^= mask << s;
      a = (a >> s & mask) | (a << s & ~mask);
    }
    return a;
  }
};

// 9.7.1 bfe: what lies beyond the top bit is the field's highest bit that exists, or 0 if unsigned or of no length
struct Bfe {
  template <class T> static T of(T a, uint32_t b, uint32_t c) {
    using U = Unsigned<T>;
    const uint32_t position = b & 255, length = c & 255, last = std::min(position + length - 1, (uint32_t)kBits<T> - 1);
    const bool sign = std::is_signed_v<T> && length && (U)a >> (last & (kBits<T> - 1)) & 1;
    const U mask = low_mask<U>(std::min(length, position < (uint32_t)kBits<T> ? (uint32_t)kBits<T> - position : 0));
    return (T)((ShiftRight::of((U)a, position) & mask) | (sign ? ~mask : 0));
  }
};
// 9.7.1 bfi
struct Bfi {
  template <class T> static T of(T a, T b, uint32_t c, uint32_t d) {
    const T mask = low_mask<T>(d & 255);
    return (b & ~ShiftLeft::of(mask, c & 255)) | ShiftLeft::of((T)(a & mask), c & 255);
  }
};
// 9.7.1 szext, bmsk
template <bool kClamp>
struct SzExt {
  template <class T> static T of(T a, uint32_t b) {
    const uint32_t bits = b & 31, mask = kClamp && b > 31 ? ~0u : low_mask<uint32_t>(bits);
    const bool sign = std::is_signed_v<T> && !(kClamp && b > 31) && bits && (uint32_t)a >> (bits - 1) & 1;
    return (T)(((uint32_t)a & mask) | (sign ? ~mask : 0));
  }
};
template <bool kClamp>
struct BMsk {
  static uint32_t of(uint32_t a, uint32_t b) {
    return ShiftLeft::of(low_mask<uint32_t>(kClamp ? b : b & 31), kClamp ? a : a & 31);
  }
};

// 9.7.8 and, or, xor, not, cnot, lop3, shf
struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };
struct Not { template <class T> static T of(T a) { return (T)~a; } };
struct CNot { template <class T> static T of(T a) { return a == 0; } };
struct Lop3 {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t r = 0;
    for (int i = 0; i < 8; ++i) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c) & (0 - (table >> i & 1));
    return r;
  }
};
template <bool kLeft, bool kClamp>
struct Shf {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t both = (uint64_t)b << 32 | a;
    const uint32_t n = kClamp ? std::min(c, 32u) : c & 31;
    return (uint32_t)(kLeft ? both << n >> 32 : both >> n);
  }
};

// 9.7.9 prmt (an integer operation in spirit). The modes other than the default one stand for selectors by two bits of c.
enum PrmtMode { kDefault, kF4e, kB4e, kRc8, kEcl, kEcr, kRc16 };
template <PrmtMode kMode>
struct Prmt {
  static uint32_t select(uint32_t c, uint32_t n, uint32_t i) {
    switch (kMode) {
      case kDefault: return c >> 4 * i & 15;
      case kF4e: return n + i;
      case kB4e: return (n - i) & 7;
      case kRc8: return n;
      case kEcl: return std::max(n, i);
      case kEcr: return std::min(n, i);
      default: return (n & 1) * 2 + (i & 1);
    }
  }
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t selector = select(c, c & 3, i);
      const uint32_t byte = (uint32_t)(bytes >> 8 * (selector & 7)) & 255;
      r |= (selector & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
    }
    return r;
  }
};

template <class Op, class T>
struct Halves {  // .u16x2, .s16x2
  static uint32_t of(uint32_t a, uint32_t b) {
    return to_lane<T>(Op::of((T)a, (T)b)) | to_lane<T>(Op::of((T)(a >> 16), (T)(b >> 16))) << 16;
  }
};

// 9.7.6 slct
struct Slct { template <class T, class C> static T of(T a, T b, C c) { return c >= 0 ? a : b; } };

template <class Op, class D, class... S, size_t... I>
void integer_lanes(Warp &w, const Inst &in, Mask m, std::index_sequence<I...>) {
  const auto from = std::make_tuple(w.at<Lane32or64<S>>(in.r[1 + I])...);
  Lane32or64<D> to[32];
  for (int l = 0; l < 32; ++l) to[l] = to_lane<D>(Op::of(from_lane<S>(std::get<I>(from)[l])...));
  store_lanes(w, in.r[0], to, m, (w.unit_poison[in.r[1 + I]] | ...));
}
template <class Op, class D, class... S>
void integer(Warp &w, const Inst &in, Mask m) { integer_lanes<Op, D, S...>(w, in, m, std::index_sequence_for<S...>()); }

template <class Op, class T>
void divide(Warp &w, const Inst &in, Mask m) {
  Mask by_zero = 0;
  for (int l = 0; l < 32; ++l) by_zero |= (Mask)(from_lane<T>(w.at<Lane32or64<T>>(in.r[2])[l]) == 0) << l;
  integer<Op, T, T, T>(w, in, m);
  if (in.r[0] != kNoSlot) w.unit_poison[in.r[0]] |= by_zero & m;
}

// --------------------------------------------------------------------------------------------- floating-point operations

// 9.7.3 and 9.7.4. Operands come as float or double; -0 < +0, and NaN only if both are NaN (or with .NaN, one).
struct RealAdd { template <class X> static X of(X a, X b) { return a + b; } };
struct RealSub { template <class X> static X of(X a, X b) { return a - b; } };
struct RealMul { template <class X> static X of(X a, X b) { return a * b; } };
struct RealFma { template <class X> static X of(X a, X b, X c) { return std::fma(a, b, c); } };
struct RealDiv { template <class X> static X of(X a, X b) { return a / b; } };
struct DivApprox {  // 9.7.3 div: 2^126 < |b| < 2^128 gives 0, or NaN for an infinite a
  static float of(float a, float b) {
    const bool large = std::fabs(b) > 0x1p126f && std::fabs(b) < HUGE_VALF;
    return large ? (std::fabs(a) < HUGE_VALF ? std::copysign(0.0f, a / b) : NAN) : a / b;
  }
};
struct RealAbs { template <class X> static X of(X a) { return std::fabs(a); } };
struct RealNeg { template <class X> static X of(X a) { return -a; } };
template <bool kNan>
struct RealMin {
  template <class X> static X of(X a, X b) {
    const bool first = (a < b) | ((a == b) & std::signbit(a)) | (kNan ? a != a : b != b);
    return first ? a : b;
  }
};
template <bool kNan>
struct RealMax {
  template <class X> static X of(X a, X b) {
    const bool first = (a > b) | ((a == b) & !std::signbit(a)) | (kNan ? a != a : b != b);
    return first ? a : b;
  }
};
struct Rcp { template <class X> static X of(X a) { return 1 / a; } };
struct Sqrt { template <class X> static X of(X a) { return std::sqrt(a); } };
struct Rsqrt { template <class X> static X of(X a) { return (X)(1 / std::sqrt((double)a)); } };
// 9.7.3 rcp.approx.ftz.f64, rsqrt.approx.ftz.f64: from and to the upper 32 bits of a double, to start Newton's method with
template <class Op>
struct Gross {
  static double of(double a) {
    const auto upper = [](double x, uint64_t half) {
      const double r = bit_cast<double>((bit_cast<uint64_t>(x) + half) & 0xffffffff00000000u);
      return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x == x ? r : bit_cast<double>(0x7fffffff00000000u);
    };
    return upper(Op::of(upper(a, 0)), 0x80000000u);
  }
};
struct Ex2 { static float of(float a) { return std::exp2(a); } };
struct Lg2 { static float of(float a) { return std::log2(a); } };
struct Sin { static float of(float a) { return (float)std::sin((double)a); } };
struct Cos { static float of(float a) { return (float)std::cos((double)a); } };
struct Tanh { static float of(float a) { return std::tanh(a); } };
struct CopySign { template <class X> static X of(X a, X b) { return std::copysign(b, a); } };

// The same results to be rounded later: exact, or rounded to odd. Products of two values of up to 24 bits are exact.
struct OddAdd {
  static double of(double a, double b, int mode) {
    const double sum = odd_sum(a, b);
    return (mode == kDown) & (sum == 0) & (std::signbit(a) != std::signbit(b)) ? -0.0 : sum;  // IEEE 754, 6.3
  }
};
struct OddSub { static double of(double a, double b, int mode) { return OddAdd::of(a, -b, mode); } };
struct OddMul { static double of(double a, double b, int) { return a * b; } };
struct OddFma { static double of(double a, double b, double c, int mode) { return OddAdd::of(a * b, c, mode); } };

template <class T>
auto part_of(Lane32or64<T> lane, int half) {
  using Part = typename Format<T>::Part;
  return widen(from_lane<Part>((Lane32or64<Part>)(lane >> 16 * half)));
}

// Op on lanes of T, or of both parts of T. kOdd: Op is one of the Odd ones. in.a: modifiers, in.b: rounding mode.
template <class Op, class T, bool kOdd, bool kModified, size_t... I>
void real_lanes(Warp &w, const Inst &in, Mask m, std::index_sequence<I...>) {
  using Part = typename Format<T>::Part;
  constexpr bool kPacked = sizeof(T) != sizeof(Part);
  const int modifiers = kModified ? in.a : 0, mode = kModified ? in.b : kNearest;
  const bool ftz = modifiers & kFtz;
  const auto from = std::make_tuple(w.at<Lane32or64<T>>(in.r[1 + I])...);
  Lane32or64<T> to[32];
  for (int half = 0; half < 1 + kPacked; ++half)
    for (int l = 0; l < 32; ++l) {
      const auto part = [&](const auto *lanes) { return flush<Part>(part_of<T>(lanes[l], half), ftz); };
      Lane32or64<Part> r;
      if constexpr (kOdd)
        r = to_lane(result<Part>(Op::of(part(std::get<I>(from))..., mode), modifiers, mode));
      else
        r = to_lane(result<Part>(Op::of(part(std::get<I>(from))...), modifiers, mode));
      to[l] = half ? to[l] | r << 16 : r;
    }
  store_lanes(w, in.r[0], to, m, (w.unit_poison[in.r[1 + I]] | ...));
}
template <class Op, class T, int kCount, bool kOdd, bool kModified>
void real(Warp &w, const Inst &in, Mask m) { real_lanes<Op, T, kOdd, kModified>(w, in, m, std::make_index_sequence<kCount>()); }

// --------------------------------------------------------------------------------------- comparison, selection, predicates

// 9.7.6 and 9.7.7. A comparison is the set of outcomes that it accepts.
enum Outcome : int { kLess = 1, kEqual = 2, kGreater = 4, kUnordered = 8 };

int accepted(Form &f) {
  static const struct {
    const char *name;
    int outcomes;
  } comparisons[] = {{"eq", 2}, {"ne", 5}, {"lt", 1}, {"le", 3}, {"gt", 4}, {"ge", 6}, {"lo", 1}, {"ls", 3}, {"hi", 4}, {"hs", 6},
                     {"equ", 10}, {"neu", 13}, {"ltu", 9}, {"leu", 11}, {"gtu", 12}, {"geu", 14}, {"num", 7}, {"nan", 8}};
  for (const auto &c : comparisons)
    if (f.take(c.name)) return c.outcomes;
  return 0;
}

enum BoolOp : int { kNoOp, kAnd, kOr, kXor };

int bool_op(Form &f) { return f.take("and") ? kAnd : f.take("or") ? kOr : f.take("xor") ? kXor : kNoOp; }

// A defined false decides an AND, a defined true an OR, whatever the other one is.
Predicate combine(int op, Predicate a, Predicate b) {
  const Mask poison = a.poison | b.poison;
  switch (op) {
    case kAnd: return {a.value & b.value, poison & (a.value | a.poison) & (b.value | b.poison)};
    case kOr: return {a.value | b.value, poison & (~a.value | a.poison) & (~b.value | b.poison)};
    case kXor: return {a.value ^ b.value, poison};
    default: return a;
  }
}

// in.a: outcomes, and modifiers from bit 4 on; in.b: the operation with the predicate r[4]; r[0] and r[1]: destinations.
template <class T>
Predicate compare(Warp &w, const Inst &in, int half) {
  const auto *a = w.at<Lane32or64<T>>(in.r[2]), *b = w.at<Lane32or64<T>>(in.r[3]);
  const int outcomes = in.a;
  const bool ftz = in.a >> 4 & kFtz;
  Mask value = 0;
  for (int l = 0; l < 32; ++l) {
    int outcome;
    if constexpr (std::is_integral_v<T>) {
      const T x = from_lane<T>(a[l]), y = from_lane<T>(b[l]);
      outcome = x < y ? kLess : x == y ? kEqual : kGreater;
    } else {
      using Part = typename Format<T>::Part;
      const auto x = flush<Part>(part_of<T>(a[l], half), ftz), y = flush<Part>(part_of<T>(b[l], half), ftz);
      outcome = x < y ? kLess : x == y ? kEqual : x > y ? kGreater : kUnordered;
    }
    value |= (Mask)((outcomes & outcome) != 0) << l;
  }
  return {value, w.unit_poison[in.r[2]] | w.unit_poison[in.r[3]]};
}

template <class T>
constexpr bool is_packed() { return std::is_same_v<T, F16x2> || std::is_same_v<T, BF16x2>; }

template <class T>
void setp(Warp &w, const Inst &in, Mask m) {
  const Predicate first = compare<T>(w, in, 0);
  Predicate second = {~first.value, first.poison};
  if constexpr (is_packed<T>()) second = compare<T>(w, in, 1);
  const Predicate other = in.b ? read_predicate(w, in, 4) : Predicate();
  write_predicate(w, in.r[0], combine(in.b, first, other), m);
  write_predicate(w, in.r[1], combine(in.b, second, other), m);
}

template <class T>
void set(Warp &w, const Inst &in, Mask m) {  // in.c: what true is (of each half)
  const Predicate other = in.b ? read_predicate(w, in, 4) : Predicate();
  uint32_t to[32] = {};
  Mask poison = 0;
  for (int half = 0; half < 1 + is_packed<T>(); ++half) {
    const Predicate p = combine(in.b, compare<T>(w, in, half), other);
    for (int l = 0; l < 32; ++l) to[l] |= p.value >> l & 1 ? (uint32_t)in.c << 16 * half : 0;
    poison |= p.poison;
  }
  store_lanes(w, in.r[0], to, m, poison);
}

// 9.7.3 testp
enum TestKind : int { kFinite, kInfinite, kNumber, kNotANumber, kNormal, kSubnormal };
template <class T>
void testp(Warp &w, const Inst &in, Mask m) {
  Mask value = 0;
  for (int l = 0; l < 32; ++l) {
    const int c = std::fpclassify(from_lane<T>(w.at<Lane32or64<T>>(in.r[1])[l]));
    const bool nan = c == FP_NAN, infinite = c == FP_INFINITE;
    const bool all[] = {!nan && !infinite, infinite, !nan, nan, c == FP_NORMAL, c == FP_SUBNORMAL};
    value |= (Mask)all[in.a] << l;
  }
  write_predicate(w, in.r[0], {value, w.unit_poison[in.r[1]]}, m);
}

// 9.7.6 selp: undefined where what was chosen is, or what chose
template <class T>
void selp(Warp &w, const Inst &in, Mask m) {
  const auto *a = w.at<T>(in.r[1]), *b = w.at<T>(in.r[2]);
  const Predicate p = read_predicate(w, in, 3);
  T to[32];
  for (int l = 0; l < 32; ++l) to[l] = p.value >> l & 1 ? a[l] : b[l];
  store_lanes(w, in.r[0], to, m, p.poison | (p.value & w.unit_poison[in.r[1]]) | (~p.value & w.unit_poison[in.r[2]]));
}

// 9.7.8 and, or, xor, not of .pred
void logic(Warp &w, const Inst &in, Mask m) {
  write_predicate(w, in.r[0], combine(in.b, read_predicate(w, in, 1), read_predicate(w, in, 2)), m);
}
void logic_not(Warp &w, const Inst &in, Mask m) {
  const Predicate p = read_predicate(w, in, 1);
  write_predicate(w, in.r[0], {~p.value, p.poison}, m);
}

// ---------------------------------------------------------------------------------------------------------------- decoding

struct Plan {
  Exec exec = nullptr;
  Class klass = Class::kInteger;
  Type destination = Type::kNone;
  std::vector<Type> sources;     // kPred: a predicate
  bool two = false;              // r[1] is a second destination, or kNoSlot
  int a = 0, b = 0, c = 0;

  bool set(Exec e, Type to, std::vector<Type> from, Class k = Class::kInteger) {
    exec = e;
    destination = to;
    sources = std::move(from);
    klass = k;
    return e;
  }
};

using Integers = Types<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>;
using Signed = Types<int16_t, int32_t, int64_t>;
using Bits = Types<uint16_t, uint32_t, uint64_t>;
using Words = Types<uint32_t, uint64_t>;
using SignedWords = Types<uint32_t, int32_t, uint64_t, int64_t>;

// d and all `kCount` sources of one type.
template <class Op, int kCount, class List>
bool same(Form &f, Plan &p) {
  const Type t = f.type();
  return p.set(List::choose(t, [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    if constexpr (kCount == 1)
      return integer<Op, T, T>;
    else if constexpr (kCount == 2)
      return integer<Op, T, T, T>;
    else if constexpr (kCount == 3)
      return integer<Op, T, T, T, T>;
    else
      return integer<Op, T, T, T, T, T>;
  }), t, std::vector<Type>(kCount, t), t == Type::kF32 || t == Type::kF64 ? Class::kFloat : Class::kInteger);
}

template <class Op, class List>
bool count_bits(Form &f, Plan &p) {  // .u32 whatever the source is
  const Exec e = List::choose(f.type(), [](auto tag) -> Exec { return integer<Op, uint32_t, typename decltype(tag)::type>; });
  return p.set(e, Type::kU32, {f.type()});
}

template <class Op>
bool halves(Form &f, Plan &p) {
  const Exec e = f.take("u16x2") ? integer<Halves<Op, uint16_t>, uint32_t, uint32_t, uint32_t>
                 : f.take("s16x2") ? integer<Halves<Op, int16_t>, uint32_t, uint32_t, uint32_t> : nullptr;
  return p.set(e, Type::kB32, {Type::kB32, Type::kB32});
}

using Reals = Types<float, double, F16, F16x2, BF16, BF16x2>;
using Singles = Types<float, double>;
using Small = Types<float, F16, F16x2, BF16, BF16x2>;
using Single = Types<float>;

// Odd is void, or does Op for rounding modes other than the nearest, and for 16-bit types.
template <class Op, class Odd, int kCount, class List>
bool real(Form &f, Plan &p) {
  const Type t = f.type();
  p.a = take_modifiers(f);
  p.b = f.take("rz") ? kZero : f.take("rm") ? kDown : f.take("rp") ? kUp : kNearest;
  f.take("rn");
  const bool modified = p.a || p.b, directed = p.b;
  if (directed && (t != Type::kF32 || std::is_void_v<Odd>)) return false;
  if (modified && t == Type::kF64) return false;
  return p.set(List::choose(t, [&](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    constexpr bool kHalf = sizeof(typename Format<T>::Part) == 2;
    if constexpr (!std::is_void_v<Odd> && kHalf) {
      return modified ? real<Odd, T, kCount, true, true> : real<Odd, T, kCount, true, false>;
    } else if constexpr (std::is_same_v<T, double>) {
      return real<Op, T, kCount, false, false>;
    } else {
      if constexpr (!std::is_void_v<Odd>)
        if (directed) return real<Odd, T, kCount, true, true>;
      return modified ? real<Op, T, kCount, false, true> : real<Op, T, kCount, false, false>;
    }
  }), t, std::vector<Type>(kCount, t), Class::kFloat);
}

template <class Op, class List>
bool approximate(Form &f, Plan &p) { return f.take("approx") && real<Op, void, 1, List>(f, p); }

template <template <bool> class Op, class Integer>
bool min_max(Form &f, Plan &p) {
  if (halves<Integer>(f, p) || same<Integer, 2, Integers>(f, p)) return true;
  return f.take("NaN") ? real<Op<true>, void, 2, Reals>(f, p) : real<Op<false>, void, 2, Reals>(f, p);
}

template <class Op, class Odd, class Integer>
bool add_sub(Form &f, Plan &p) {
  if (f.type() == Type::kS32 && f.take("sat")) return same<Saturate<Integer>, 2, Types<int32_t>>(f, p);
  if (std::is_same_v<Integer, Add> && halves<Integer>(f, p)) return true;
  return same<Integer, 2, Integers>(f, p) || real<Op, Odd, 2, Reals>(f, p);
}

Type twice(Type t) {
  switch (t) {
    case Type::kU16: return Type::kU32;
    case Type::kS16: return Type::kS32;
    case Type::kU32: return Type::kU64;
    default: return Type::kS64;
  }
}

bool mul(Form &f, Plan &p) {
  if (f.take("lo")) return same<MulLo, 2, Integers>(f, p);
  if (f.take("hi")) return same<MulHi, 2, Integers>(f, p);
  if (!f.take("wide")) return real<RealMul, OddMul, 2, Reals>(f, p);
  return p.set(Types<uint16_t, int16_t, uint32_t, int32_t>::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<MulWide, Double<T>, T, T>;
  }), twice(f.type()), {f.type(), f.type()});
}

bool mad(Form &f, Plan &p) {
  if (f.take("lo")) return same<Mad<MulLo>, 3, Integers>(f, p);
  if (f.take("hi")) return same<Mad<MulHi>, 3, Integers>(f, p);
  if (!f.take("wide")) return real<RealFma, OddFma, 3, Singles>(f, p);
  return p.set(Types<uint16_t, int16_t, uint32_t, int32_t>::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<Mad<MulWide>, Double<T>, T, T, Double<T>>;
  }), twice(f.type()), {f.type(), f.type(), twice(f.type())});
}

bool mul24(Form &f, Plan &p) {
  using List = Types<uint32_t, int32_t>;
  return f.take("hi") ? same<Mul24<true>, 2, List>(f, p) : f.take("lo") && same<Mul24<false>, 2, List>(f, p);
}
bool mad24(Form &f, Plan &p) {
  using List = Types<uint32_t, int32_t>;
  return f.take("hi") ? same<Mad<Mul24<true>>, 3, List>(f, p) : f.take("lo") && same<Mad<Mul24<false>>, 3, List>(f, p);
}

template <class Op>
bool div_rem(Form &f, Plan &p) {
  const Exec e = Integers::choose(f.type(), [](auto tag) -> Exec { return divide<Op, typename decltype(tag)::type>; });
  return p.set(e, f.type(), {f.type(), f.type()});
}
bool div(Form &f, Plan &p) {
  if (div_rem<Div>(f, p)) return true;
  if (f.take("approx")) return real<DivApprox, void, 2, Single>(f, p);
  return f.take("full") ? real<RealDiv, void, 2, Single>(f, p) : real<RealDiv, void, 2, Singles>(f, p);
}

template <class Op>
bool shift(Form &f, Plan &p) {
  return p.set(Integers::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<Op, T, T, uint32_t>;
  }), f.type(), {f.type(), Type::kU32});
}

bool bfe(Form &f, Plan &p) {
  return p.set(SignedWords::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<Bfe, T, T, uint32_t, uint32_t>;
  }), f.type(), {f.type(), Type::kU32, Type::kU32});
}
bool bfi(Form &f, Plan &p) {
  return p.set(Words::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<Bfi, T, T, T, uint32_t, uint32_t>;
  }), f.type(), {f.type(), f.type(), Type::kU32, Type::kU32});
}
template <bool kClamp>
bool extend(Form &f, Plan &p) {
  return p.set(Types<uint32_t, int32_t>::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<SzExt<kClamp>, T, T, uint32_t>;
  }), f.type(), {f.type(), Type::kU32});
}

using Word = Types<uint32_t>;

bool prmt(Form &f, Plan &p) {
  if (f.take("f4e")) return same<Prmt<kF4e>, 3, Word>(f, p);
  if (f.take("b4e")) return same<Prmt<kB4e>, 3, Word>(f, p);
  if (f.take("rc8")) return same<Prmt<kRc8>, 3, Word>(f, p);
  if (f.take("ecl")) return same<Prmt<kEcl>, 3, Word>(f, p);
  if (f.take("ecr")) return same<Prmt<kEcr>, 3, Word>(f, p);
  return f.take("rc16") ? same<Prmt<kRc16>, 3, Word>(f, p) : same<Prmt<kDefault>, 3, Word>(f, p);
}
template <bool kLeft>
bool funnel(Form &f, Plan &p) {
  return f.take("clamp") ? same<Shf<kLeft, true>, 3, Word>(f, p) : f.take("wrap") && same<Shf<kLeft, false>, 3, Word>(f, p);
}
bool shf(Form &f, Plan &p) { return f.take("l") ? funnel<true>(f, p) : f.take("r") && funnel<false>(f, p); }
bool lop3(Form &f, Plan &p) { return same<Lop3, 4, Word>(f, p); }
bool bmsk(Form &f, Plan &p) {
  return f.take("clamp") ? same<BMsk<true>, 2, Word>(f, p) : f.take("wrap") && same<BMsk<false>, 2, Word>(f, p);
}
bool szext(Form &f, Plan &p) { return f.take("clamp") ? extend<true>(f, p) : f.take("wrap") && extend<false>(f, p); }

template <class Op, int kOp>
bool binary_logic(Form &f, Plan &p) {
  p.b = kOp;
  return f.type() == Type::kPred ? p.set(logic, Type::kPred, {Type::kPred, Type::kPred}) : same<Op, 2, Bits>(f, p);
}

bool logic_inverse(Form &f, Plan &p) {
  return f.type() == Type::kPred ? p.set(logic_not, Type::kPred, {Type::kPred}) : same<Not, 1, Bits>(f, p);
}

bool setp(Form &f, Plan &p) {
  const Type t = f.type();
  p.a = accepted(f);
  p.a |= f.take("ftz") ? kFtz << 4 : 0;
  p.b = bool_op(f);
  p.two = true;
  const Exec integers = Integers::choose(t, [](auto tag) -> Exec { return setp<typename decltype(tag)::type>; });
  const Exec reals = Reals::choose(t, [](auto tag) -> Exec { return setp<typename decltype(tag)::type>; });
  std::vector<Type> sources{t, t};
  if (p.b) sources.push_back(Type::kPred);
  return (p.a & 15) && p.set(integers ? integers : reals, Type::kPred, sources, integers ? Class::kInteger : Class::kFloat);
}

bool set(Form &f, Plan &p) {
  if (f.types.size() != 2) return false;
  const Type to = f.types[0], from = f.types[1];
  f.types = {from};
  if (!setp(f, p)) return false;
  const bool packed = from == Type::kF16x2 || from == Type::kBF16x2;
  switch (to) {
    case Type::kU16: case Type::kS16: p.c = 0xffff; break;
    case Type::kU32: case Type::kS32: p.c = packed ? 0xffff : -1; break;
    case Type::kF32: p.c = 0x3f800000; break;
    case Type::kF16: case Type::kF16x2: p.c = 0x3c00; break;
    case Type::kBF16: case Type::kBF16x2: p.c = 0x3f80; break;
    default: return false;
  }
  if (packed && type_bytes(to) != 4) return false;
  const Exec integers = Integers::choose(from, [](auto tag) -> Exec { return set<typename decltype(tag)::type>; });
  p.exec = integers ? integers : Reals::choose(from, [](auto tag) -> Exec { return set<typename decltype(tag)::type>; });
  p.destination = to;
  return true;
}

bool selp(Form &f, Plan &p) {
  const Type t = f.type();
  const Exec e = type_bytes(t) == 8 ? selp<uint64_t> : type_bytes(t) >= 2 ? selp<uint32_t> : nullptr;
  return p.set(e, t, {t, t, Type::kPred});
}

bool slct(Form &f, Plan &p) {
  if (f.types.size() != 2 || (f.types[1] != Type::kS32 && f.types[1] != Type::kF32)) return false;
  const bool real = f.types[1] == Type::kF32;
  const Type t = f.types[0];
  const Type bits = type_bytes(t) == 8 ? Type::kB64 : type_bytes(t) == 4 ? Type::kB32 : Type::kB16;
  const Exec e = Bits::choose(bits, [&](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return real ? integer<Slct, T, T, T, float> : integer<Slct, T, T, T, int32_t>;
  });
  return p.set(e, t, {t, t, f.types[1]});
}

bool testp(Form &f, Plan &p) {
  static const char *const names[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  for (int i = 0; i < 6; ++i)
    if (f.take(names[i])) {
      p.a = i;
      const Exec e = Singles::choose(f.type(), [](auto tag) -> Exec { return testp<typename decltype(tag)::type>; });
      return p.set(e, Type::kPred, {f.type()}, Class::kFloat);
    }
  return false;
}

bool abs(Form &f, Plan &p) { return same<Abs, 1, Signed>(f, p) || real<RealAbs, void, 1, Reals>(f, p); }
bool neg(Form &f, Plan &p) { return same<Neg, 1, Signed>(f, p) || real<RealNeg, void, 1, Reals>(f, p); }
template <class Op>
bool gross(Form &f, Plan &p) {
  if (f.type() != Type::kF64 || !f.take("ftz")) return false;
  return p.set(integer<Gross<Op>, double, double>, Type::kF64, {Type::kF64}, Class::kFloat);
}
bool rcp(Form &f, Plan &p) {
  if (f.take("approx")) return gross<Rcp>(f, p) || real<Rcp, void, 1, Single>(f, p);
  return real<Rcp, void, 1, Singles>(f, p);
}
bool rsqrt(Form &f, Plan &p) { return f.take("approx") && (gross<Rsqrt>(f, p) || real<Rsqrt, void, 1, Singles>(f, p)); }
bool sqrt(Form &f, Plan &p) { return f.take("approx") ? real<Sqrt, void, 1, Single>(f, p) : real<Sqrt, void, 1, Singles>(f, p); }
bool bfind(Form &f, Plan &p) {
  return f.take("shiftamt") ? count_bits<BFind<true>, SignedWords>(f, p) : count_bits<BFind<false>, SignedWords>(f, p);
}

}  // namespace

bool decode_arithmetic(Decoder &d, const Statement &s, Inst &in) {
  static const std::unordered_map<std::string, bool (*)(Form &, Plan &)> families = {
      {"add", add_sub<RealAdd, OddAdd, Add>}, {"sub", add_sub<RealSub, OddSub, Sub>}, {"mul", mul}, {"mad", mad},
      {"fma", real<RealFma, OddFma, 3, Reals>}, {"mul24", mul24}, {"mad24", mad24}, {"sad", same<Sad, 3, Integers>}, {"div", div},
      {"rem", div_rem<Rem>}, {"abs", abs}, {"neg", neg}, {"min", min_max<RealMin, Min>}, {"max", min_max<RealMax, Max>},
      {"popc", count_bits<PopC, Words>}, {"clz", count_bits<Clz, Words>}, {"bfind", bfind}, {"brev", same<BRev, 1, Words>},
      {"bfe", bfe}, {"bfi", bfi}, {"szext", szext}, {"bmsk", bmsk}, {"prmt", prmt}, {"lop3", lop3}, {"shf", shf},
      {"shl", shift<ShiftLeft>}, {"shr", shift<ShiftRight>}, {"and", binary_logic<And, kAnd>}, {"or", binary_logic<Or, kOr>},
      {"xor", binary_logic<Xor, kXor>}, {"not", logic_inverse}, {"cnot", same<CNot, 1, Bits>}, {"setp", setp}, {"set", set},
      {"selp", selp}, {"slct", slct}, {"testp", testp}, {"copysign", same<CopySign, 2, Singles>}, {"rcp", rcp}, {"sqrt", sqrt},
      {"rsqrt", rsqrt}, {"ex2", approximate<Ex2, Small>}, {"lg2", approximate<Lg2, Single>},
      {"sin", approximate<Sin, Single>}, {"cos", approximate<Cos, Single>}, {"tanh", approximate<Tanh, Small>}};
  const auto family = families.find(s.parts[0]);
  if (family == families.end()) return false;
  Form form(s);
  Plan plan;
  if (!family->second(form, plan) || !form.rest.empty() || s.operands.size() != 1 + plan.sources.size()) return false;

  const Operand &to = s.operands[0];
  const bool predicate = plan.destination == Type::kPred, pair = to.kind == Operand::kVector;
  if (pair ? !predicate || !plan.two || to.elements.size() != 2 : !predicate && !fits(d, to, plan.destination)) return false;
  d.destination(to);
  if (plan.two && !pair) d.destination(Operand());
  for (size_t i = 0; i < plan.sources.size(); ++i) {
    const Operand &o = s.operands[1 + i];
    if (plan.sources[i] == Type::kPred) {
      predicate_source(d, o, in, (int)i + (plan.two ? 2 : 1));
    } else {
      if (o.kind == Operand::kVector || !fits(d, o, plan.sources[i])) return false;
      d.source(o, plan.sources[i]);
    }
  }
  in.exec = plan.exec;
  in.klass = plan.klass;
  in.type = plan.destination;
  in.a = plan.a;
  in.b = plan.b;
  in.c = plan.c;
  return true;
}

}  // namespace vgpu
