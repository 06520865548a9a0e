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
template <class T> constexpr uint32_t kBits = 8 * sizeof(T);

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
T low_mask(uint32_t bits) { return bits >= kBits<T> ? (T)~T(0) : (T)((T(1) << bits) - 1); }

// Shift amounts from the width on give what shifting everything out gives. (9.7.8 shl, shr)
struct ShiftLeft { template <class T> static T of(T a, uint32_t n) { return n < kBits<T> ? (T)((Wrap<T>)a << n) : T(0); } };
struct ShiftRight { template <class T> static T of(T a, uint32_t n) { return (T)(n < kBits<T> ? a >> n : a < 0 ? -1 : 0); } };

// 9.7.1 add, sub, mul, mad, div, rem, abs, neg, min, max
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
template <class T>
bool minus_one(T b) { return std::is_signed_v<T> && b == (T)-1; }  // least / -1 must not trap
struct Div { template <class T> static T of(T a, T b) { return b == 0 ? (T)-1 : minus_one(b) ? Sub::of(T(0), a) : (T)(a / b); } };
struct Rem { template <class T> static T of(T a, T b) { return b == 0 ? a : minus_one(b) ? T(0) : (T)(a % b); } };
struct Abs { template <class T> static T of(T a) { return a < 0 ? Sub::of(T(0), a) : a; } };
struct Neg { template <class T> static T of(T a) { return Sub::of(T(0), a); } };
struct Min { template <class T> static T of(T a, T b) { return a < b ? a : b; } };
struct Max { template <class T> static T of(T a, T b) { return a < b ? b : a; } };
struct Sad { template <class T> static T of(T a, T b, T c) { return Add::of(c, a < b ? Sub::of(b, a) : Sub::of(a, b)); } };  // 9.7.1 sad

// 9.7.1 popc, clz, bfind, brev
struct PopC { template <class T> static uint32_t of(T a) { return (uint32_t)__builtin_popcountll(a); } };
struct Clz { template <class T> static uint32_t of(T a) { return a ? __builtin_clzll(a) - (64 - kBits<T>) : kBits<T>; } };
template <bool kShift>  // .shiftamt: how far left the found bit would have to go; nothing found is all ones either way
struct BFind {
  template <class T> static uint32_t of(T a) {
    const auto x = (Unsigned<T>)(a < 0 ? ~a : a);
    return x ? (kShift ? Clz::of(x) : kBits<T> - 1 - Clz::of(x)) : ~0u;
  }
};
struct BRev {
  template <class T> static T of(T a) {
    T mask = (T)~T(0);
    for (uint32_t s = kBits<T> / 2; s; s /= 2) {
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
    const uint32_t position = b & 255, length = c & 255, last = std::min(position + length - 1, kBits<T> - 1);
    const bool sign = std::is_signed_v<T> && length && (U)a >> (last & (kBits<T> - 1)) & 1;
    const U mask = low_mask<U>(std::min(length, position < kBits<T> ? kBits<T> - position : 0));
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

// 9.7.8 and, or, xor, not, lop3, shf
struct And { template <class T> static T of(T a, T b) { return a & b; } };
struct Or { template <class T> static T of(T a, T b) { return a | b; } };
struct Xor { template <class T> static T of(T a, T b) { return a ^ b; } };
struct Not { template <class T> static T of(T a) { return (T)~a; } };
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
    const uint64_t both = (uint64_t)b << 32 | a, n = kClamp ? std::min(c, 32u) : c & 31;
    return (uint32_t)(kLeft ? both << n >> 32 : both >> n);
  }
};

// 9.7.9 prmt (an integer operation in spirit)
struct Prmt {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (uint32_t i = 0; i < 32; i += 8) {
      const uint32_t selector = c >> i / 2 & 15, byte = (uint32_t)(bytes >> 8 * (selector & 7)) & 255;
      r |= (selector & 8 ? (byte & 128 ? 255 : 0) : byte) << i;
    }
    return r;
  }
};

// Operations that move bits or combine them one by one, and how many of their operands, the first ones, hold those bits; the others
// say how. Of these it is known which parts of the result are undefined: those that change if undefined bits do.
template <class Op> constexpr int kBitOperands = 0;
template <> constexpr int kBitOperands<ShiftLeft> = 1;
template <> constexpr int kBitOperands<ShiftRight> = 1;
template <> constexpr int kBitOperands<And> = 2;
template <> constexpr int kBitOperands<Or> = 2;
template <> constexpr int kBitOperands<Xor> = 2;
template <> constexpr int kBitOperands<Not> = 1;
template <> constexpr int kBitOperands<Lop3> = 3;
template <bool kLeft, bool kClamp> constexpr int kBitOperands<Shf<kLeft, kClamp>> = 2;
template <> constexpr int kBitOperands<Prmt> = 2;
template <> constexpr int kBitOperands<Bfe> = 1;
template <> constexpr int kBitOperands<Bfi> = 2;

template <class Op, class D, class... S, size_t... I>
Parts changed_parts(Warp &w, const Inst &in, Mask m, std::index_sequence<I...>) {
  constexpr size_t kOperands = kBitOperands<Op>;
  const auto from = std::make_tuple(w.at<Lane32or64<S>>(in.r[1 + I])...);
  Parts poison{};
  for (; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const auto undefined = [&](size_t i) {  // bits of an operand
      uint64_t bits = 0;
      for (int part = 0; part < 4; ++part) bits |= (w.part_poison(in.r[1 + i], part) >> l & 1 ? 0xffffull : 0) << 16 * part;
      return bits;
    };
    const bool says = ((I >= kOperands && w.unit_poison[in.r[1 + I]] >> l & 1) | ...);  // what says how is undefined
    Lane32or64<D> change = says ? (Lane32or64<D>)~0ull : 0;
    const Lane32or64<D> as_is = to_lane<D>(Op::of(from_lane<S>(std::get<I>(from)[l])...));
    for (int flipped = 1; flipped < 1 << kOperands; ++flipped)
      change |= as_is ^ to_lane<D>(Op::of(from_lane<S>((Lane32or64<S>)(std::get<I>(from)[l] ^ (flipped >> I & 1 ? undefined(I) : 0)))...));
    for (size_t i = 0; i < sizeof(change) / 2; ++i) poison[i] |= (Mask)((change >> 16 * i & 0xffff) != 0) << l;
  }
  return poison;
}

template <class Op, class D, class... S, size_t... I>
void integer_lanes(Warp &w, const Inst &in, Mask m, std::index_sequence<I...>) {
  const auto from = std::make_tuple(w.at<Lane32or64<S>>(in.r[1 + I])...);
  Lane32or64<D> to[32];
  for (int l = 0; l < 32; ++l) to[l] = to_lane<D>(Op::of(from_lane<S>(std::get<I>(from)[l])...));
  const Mask poison = (w.unit_poison[in.r[1 + I]] | ...);
  if constexpr (kBitOperands<Op> > 0)
    if (poison & m) return store_lanes(w, in.r[0], to, m, changed_parts<Op, D, S...>(w, in, poison & m, std::index_sequence<I...>()));
  store_lanes(w, in.r[0], to, m, poison);
}
template <class Op, class D, class... S>
void integer(Warp &w, const Inst &in, Mask m) { integer_lanes<Op, D, S...>(w, in, m, std::index_sequence_for<S...>()); }

template <class Op, class T>
void divide(Warp &w, const Inst &in, Mask m) {
  Mask by_zero = 0;
  for (int l = 0; l < 32; ++l) by_zero |= (Mask)(from_lane<T>(w.at<Lane32or64<T>>(in.r[2])[l]) == 0) << l;
  integer<Op, T, T, T>(w, in, m);
  if (in.r[0] != kNoSlot) w.set_poison(in.r[0], by_zero & m, kAllLanes);
}

// --------------------------------------------------------------------------------------------- floating-point operations

template <class T>
constexpr bool is_packed() { return std::is_same_v<T, F16x2> || std::is_same_v<T, BF16x2>; }

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
    return (a < b) | ((a == b) & std::signbit(a)) | (kNan ? a != a : b != b) ? a : b;
  }
};
template <bool kNan>
struct RealMax { template <class X> static X of(X a, X b) { return -RealMin<kNan>::of(-a, -b); } };
struct Rcp { template <class X> static X of(X a) { return 1 / a; } };
struct Sqrt { template <class X> static X of(X a) { return std::sqrt(a); } };
struct Rsqrt { template <class X> static X of(X a) { return (X)(1 / std::sqrt((double)a)); } };
template <class Op>
struct UpperHalf {  // 9.7.3 rcp and rsqrt .approx.ftz.f64: of the upper 32 bits of a; the lower ones of the result are zero
  static double flushed(double x) { return std::fabs(x) < 0x1p-1022 ? std::copysign(0.0, x) : x; }
  static double of(double a) {
    const double r = flushed(Op::of(flushed(bit_cast<double>(bit_cast<uint64_t>(a) >> 32 << 32))));
    return a != a || r != r ? NAN : bit_cast<double>((bit_cast<uint64_t>(r) + 0x80000000) >> 32 << 32);
  }
};
struct Ex2 { static float of(float a) { return std::exp2(a); } };
struct Lg2 { static float of(float a) { return std::log2(a); } };
struct Sin { static float of(float a) { return (float)std::sin((double)a); } };
struct Cos { static float of(float a) { return (float)std::cos((double)a); } };
struct Tanh { static float of(float a) { return std::tanh(a); } };
struct CopySign { template <class X> static X of(X a, X b) { return std::copysign(b, a); } };

// The same in double, to be rounded later: exact, or rounded to odd. Products of two values of up to 24 bits are exact. 16-bit
// types need that for products, which may be subnormal, and fma; sums may be rounded to float first, as 24 >= 2 * 11 + 2.
template <int kMode>
struct OddAdd {
  static double of(double a, double b) {
    const double sum = odd_sum(a, b);
    return (kMode == kDown) & (sum == 0) & (std::signbit(a) != std::signbit(b)) ? -0.0 : sum;  // IEEE 754, 6.3
  }
};
struct OddMul { static double of(double a, double b) { return a * b; } };
template <int kMode>
struct OddFma { static double of(double a, double b, double c) { return OddAdd<kMode>::of(a * b, c); } };

template <class T>
auto part_of(Lane32or64<T> lane, int half) {
  using Part = typename Format<T>::Part;
  return widen(from_lane<Part>((Lane32or64<Part>)(lane >> 16 * half)));
}

// Op on lanes of T, or of both parts of T. in.a: modifiers.
template <class Op, class T, bool kModified, int kMode, size_t... I>
void real_lanes(Warp &w, const Inst &in, Mask m, std::index_sequence<I...>) {
  using Part = typename Format<T>::Part;
  const int modifiers = kModified ? in.a : 0;
  const auto from = std::make_tuple(w.at<Lane32or64<T>>(in.r[1 + I])...);
  Lane32or64<T> to[32];
  for (int half = 0; half < (int)(sizeof(T) / sizeof(Part)); ++half)
    for (int l = 0; l < 32; ++l) {
      const auto part = [&](const auto *lanes) { return flush<Part>(part_of<T>(lanes[l], half), modifiers & kFtz); };
      const Lane32or64<Part> r = to_lane(result<Part>(Op::of(part(std::get<I>(from))...), modifiers, kMode));
      to[l] = half ? to[l] | r << 16 : r;
    }
  if constexpr (is_packed<T>())
    store_lanes(w, in.r[0], to, m, {(w.part_poison(in.r[1 + I], 0) | ...), (w.part_poison(in.r[1 + I], 1) | ...)});
  else
    store_lanes(w, in.r[0], to, m, (w.unit_poison[in.r[1 + I]] | ...));
}
template <class Op, class T, int kCount, bool kModified, int kMode = kNearest>
void real(Warp &w, const Inst &in, Mask m) { real_lanes<Op, T, kModified, kMode>(w, in, m, std::make_index_sequence<kCount>()); }

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
  return {value, is_packed<T>() ? w.part_poison(in.r[2], half) | w.part_poison(in.r[3], half) : w.unit_poison[in.r[2]] | w.unit_poison[in.r[3]]};
}

template <class T>
void setp(Warp &w, const Inst &in, Mask m) {
  const Predicate first = compare<T>(w, in, 0);
  Predicate second = {~first.value, first.poison};
  if constexpr (is_packed<T>()) second = compare<T>(w, in, 1);
  const Predicate other = in.b ? read_predicate(w, in, 4) : Predicate();
  write_predicate(w, in.r[0], combine(in.b, first, other), m);
  write_predicate(w, in.r[1], combine(in.b, second, other), m);
}

// 9.7.6 and 9.7.7 set. in.b: what true is (of each half); false is 0
template <class T>
void set(Warp &w, const Inst &in, Mask m) {
  uint32_t to[32] = {};
  Parts poison{};
  for (int half = 0; half < 1 + is_packed<T>(); ++half) {
    const Predicate p = compare<T>(w, in, half);
    for (int l = 0; l < 32; ++l) to[l] |= p.value >> l & 1 ? (uint32_t)in.b << 16 * half : 0;
    poison[(size_t)half] = p.poison;
  }
  if (!is_packed<T>()) poison[1] = poison[0];
  store_lanes(w, in.r[0], to, m, poison);
}

// 9.7.6 selp: undefined where what was chosen is, or what chose
template <class T>
void selp(Warp &w, const Inst &in, Mask m) {
  const auto *a = w.at<T>(in.r[1]), *b = w.at<T>(in.r[2]);
  const Predicate p = read_predicate(w, in, 3);
  T to[32];
  for (int l = 0; l < 32; ++l) to[l] = p.value >> l & 1 ? a[l] : b[l];
  Parts poison;
  for (int i = 0; i < 4; ++i) poison[(size_t)i] = p.poison | (p.value & w.part_poison(in.r[1], i)) | (~p.value & w.part_poison(in.r[2], i));
  store_lanes(w, in.r[0], to, m, poison);
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
  int a = 0, b = 0;

  bool set(Exec e, Type to, std::vector<Type> from, Class k = Class::kInteger) {
    exec = e;
    destination = to;
    sources = std::move(from);
    klass = k;
    return e;
  }
};

using Integers = Types<uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>;
using Narrow = Types<uint16_t, int16_t, uint32_t, int32_t>;
using Signed = Types<int16_t, int32_t, int64_t>;
using Bits = Types<uint16_t, uint32_t, uint64_t>;
using Words = Types<uint32_t, uint64_t>;
using SignedWords = Types<uint32_t, int32_t, uint64_t, int64_t>;
using Word = Types<uint32_t>;

// What the operands of an instruction of type T are: T, an integer twice as wide, or just uint32_t.
struct Self;
struct Twice;
template <class T, class S> struct As { using type = S; };
template <class T> struct As<T, Self> { using type = T; };
template <class T> struct As<T, Twice> { using type = Double<T>; };
template <class S>
Type as(Type t) {  // .u16 .u32 .u64 follow one another
  return std::is_same_v<S, Self> ? t : std::is_same_v<S, Twice> ? (Type)((int)t + 1) : Type::kU32;
}

// Op for an integer type of the list, with destination D and sources S.
template <class Op, class List, class D, class... S>
bool typed(Form &f, Plan &p) {
  const Exec e = List::choose(f.type(), [](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    return integer<Op, typename As<T, D>::type, typename As<T, S>::type...>;
  });
  return p.set(e, as<D>(f.type()), {as<S>(f.type())...});
}
template <class Op, class List> constexpr auto unary = typed<Op, List, Self, Self>;
template <class Op, class List> constexpr auto binary = typed<Op, List, Self, Self, Self>;
template <class Op, class List> constexpr auto ternary = typed<Op, List, Self, Self, Self, Self>;
template <class Op, class List> constexpr auto shift = typed<Op, List, Self, Self, uint32_t>;
template <class Op, class List> constexpr auto count = typed<Op, List, uint32_t, Self>;

using Reals = Types<float, double, F16, F16x2, BF16, BF16x2>;
using Singles = Types<float, double>;
using Small = Types<float, F16, F16x2, BF16, BF16x2>;
using Single = Types<float>;

// Op for floating-point types of the list; Half: for 16-bit ones.
template <class Op, int kCount, class List, class Half = Op>
bool real(Form &f, Plan &p) {
  const Type t = f.type();
  p.a = take_modifiers(f);
  f.take("rn");
  if ((p.a && t == Type::kF64) || (p.a & kSat && t != Type::kF32 && t != Type::kF16 && t != Type::kF16x2)) return false;
  const Exec e = List::choose(t, [&](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    using Of = std::conditional_t<sizeof(typename Format<T>::Part) == 2, Half, Op>;
    return p.a ? real<Of, T, kCount, true> : real<Of, T, kCount, false>;
  });
  return p.set(e, t, std::vector<Type>(kCount, t), Class::kFloat);
}

// The directed roundings that CUDA's own functions use: expf has fma.rm, fmodf fma.rz, roundf add.rz, all of f32.
template <template <int> class Odd, int kCount, int kMode>
bool directed(Form &f, Plan &p) {
  p.a = take_modifiers(f);
  return p.set(f.type() == Type::kF32 ? real<Odd<kMode>, float, kCount, true, kMode> : nullptr, Type::kF32,
               std::vector<Type>(kCount, Type::kF32), Class::kFloat);
}

template <class Op, class List>
bool approximate(Form &f, Plan &p) { return f.take("approx") && real<Op, 1, List>(f, p); }

template <template <bool> class Op, class Integer>
bool min_max(Form &f, Plan &p) {
  if (binary<Integer, Integers>(f, p)) return true;
  return f.take("NaN") ? real<Op<true>, 2, Reals>(f, p) : real<Op<false>, 2, Reals>(f, p);
}

template <class Op, class Integer>
bool add_sub(Form &f, Plan &p) {
  if (f.type() == Type::kS32 && f.take("sat")) return binary<Saturate<Integer>, Types<int32_t>>(f, p);
  if (std::is_same_v<Integer, Add> && f.take("rz")) return directed<OddAdd, 2, kZero>(f, p);
  return binary<Integer, Integers>(f, p) || real<Op, 2, Reals>(f, p);
}

bool mul(Form &f, Plan &p) {
  if (f.take("lo")) return binary<MulLo, Integers>(f, p);
  if (f.take("hi")) return binary<MulHi, Integers>(f, p);
  return f.take("wide") ? typed<MulWide, Narrow, Twice, Self, Self>(f, p) : real<RealMul, 2, Reals, OddMul>(f, p);
}

bool mad(Form &f, Plan &p) {
  if (f.take("lo")) return ternary<Mad<MulLo>, Integers>(f, p);
  if (f.take("hi")) return ternary<Mad<MulHi>, Integers>(f, p);
  return f.take("wide") ? typed<Mad<MulWide>, Narrow, Twice, Self, Self, Twice>(f, p) : real<RealFma, 3, Singles>(f, p);
}

bool fma(Form &f, Plan &p) {
  if (f.take("rz")) return directed<OddFma, 3, kZero>(f, p);
  return f.take("rm") ? directed<OddFma, 3, kDown>(f, p) : real<RealFma, 3, Reals, OddFma<kNearest>>(f, p);
}

template <class Op>
bool div_rem(Form &f, Plan &p) {
  const Exec e = Integers::choose(f.type(), [](auto tag) -> Exec { return divide<Op, typename decltype(tag)::type>; });
  return p.set(e, f.type(), {f.type(), f.type()});
}
bool div(Form &f, Plan &p) {
  if (div_rem<Div>(f, p)) return true;
  if (f.take("approx")) return real<DivApprox, 2, Single>(f, p);
  return f.take("full") ? real<RealDiv, 2, Single>(f, p) : real<RealDiv, 2, Singles>(f, p);
}
template <class Op>
bool upper_half(Form &f, Plan &p) { return f.type() == Type::kF64 && f.take("ftz") && real<UpperHalf<Op>, 1, Types<double>>(f, p); }
bool rcp(Form &f, Plan &p) {
  return f.take("approx") ? upper_half<Rcp>(f, p) || real<Rcp, 1, Single>(f, p) : real<Rcp, 1, Singles>(f, p);
}
bool sqrt(Form &f, Plan &p) { return f.take("approx") ? real<Sqrt, 1, Single>(f, p) : real<Sqrt, 1, Singles>(f, p); }
bool rsqrt(Form &f, Plan &p) { return f.take("approx") && (upper_half<Rsqrt>(f, p) || real<Rsqrt, 1, Singles>(f, p)); }

template <bool kLeft>
bool funnel(Form &f, Plan &p) {
  return f.take("clamp") ? ternary<Shf<kLeft, true>, Word>(f, p) : f.take("wrap") && ternary<Shf<kLeft, false>, Word>(f, p);
}
bool shf(Form &f, Plan &p) { return f.take("l") ? funnel<true>(f, p) : f.take("r") && funnel<false>(f, p); }

bool bfind(Form &f, Plan &p) {
  return f.take("shiftamt") ? count<BFind<true>, SignedWords>(f, p) : count<BFind<false>, SignedWords>(f, p);
}

template <class Op, int kOp>
bool binary_logic(Form &f, Plan &p) {
  p.b = kOp;
  return f.type() == Type::kPred ? p.set(logic, Type::kPred, {Type::kPred, Type::kPred}) : binary<Op, Bits>(f, p);
}
bool logic_inverse(Form &f, Plan &p) {
  return f.type() == Type::kPred ? p.set(logic_not, Type::kPred, {Type::kPred}) : unary<Not, Bits>(f, p);
}

bool setp(Form &f, Plan &p) {
  const Type t = f.type();
  p.a = accepted(f);
  p.a |= f.take("ftz") ? kFtz << 4 : 0;
  p.b = bool_op(f);
  p.two = true;
  const auto choose = [](auto tag) -> Exec { return setp<typename decltype(tag)::type>; };
  const Exec integers = Integers::choose(t, choose), reals = Reals::choose(t, choose);
  std::vector<Type> sources{t, t};
  if (p.b) sources.push_back(Type::kPred);
  return (p.a & 15) && p.set(integers ? integers : reals, Type::kPred, sources, integers ? Class::kInteger : Class::kFloat);
}

// The result has the type of the operands, or is .u32 of halves that are all ones.
bool set(Form &f, Plan &p) {
  if (f.types.size() != 2) return false;
  const Type to = f.types[0], from = f.types[1];
  const bool ones = to == Type::kU32 && (from == Type::kF16x2 || from == Type::kBF16x2);
  if (to != from && !ones) return false;
  p.a = accepted(f);
  p.two = true;  // operands where setp has them
  const Exec e = Small::choose(from, [&](auto tag) -> Exec {
    using T = typename decltype(tag)::type;
    p.b = ones ? 0xffff : (int)to_lane(encode<typename Format<T>::Part>(1));
    return set<T>;
  });
  return p.a && p.set(e, to, {from, from}, Class::kFloat);
}

bool selp(Form &f, Plan &p) {
  const Type t = f.type();
  const Exec e = type_bytes(t) == 8 ? selp<uint64_t> : type_bytes(t) >= 2 ? selp<uint32_t> : nullptr;
  return p.set(e, t, {t, t, Type::kPred});
}

bool abs(Form &f, Plan &p) { return unary<Abs, Signed>(f, p) || real<RealAbs, 1, Reals>(f, p); }
bool neg(Form &f, Plan &p) { return unary<Neg, Signed>(f, p) || real<RealNeg, 1, Reals>(f, p); }

}  // namespace

bool decode_arithmetic(Decoder &d, const Statement &s, Inst &in) {
  static const std::unordered_map<std::string, bool (*)(Form &, Plan &)> families = {
      {"add", add_sub<RealAdd, Add>}, {"sub", add_sub<RealSub, Sub>}, {"mul", mul}, {"mad", mad}, {"fma", fma},
      {"div", div}, {"rem", div_rem<Rem>}, {"abs", abs}, {"neg", neg}, {"min", min_max<RealMin, Min>},
      {"max", min_max<RealMax, Max>}, {"sad", ternary<Sad, Types<uint32_t, int32_t>>}, {"popc", count<PopC, Words>}, {"clz", count<Clz, Words>},
      {"bfind", bfind},
      {"brev", unary<BRev, Words>}, {"bfe", typed<Bfe, SignedWords, Self, Self, uint32_t, uint32_t>},
      {"bfi", typed<Bfi, Words, Self, Self, Self, uint32_t, uint32_t>}, {"prmt", ternary<Prmt, Word>},
      {"lop3", typed<Lop3, Word, Self, Self, Self, Self, Self>}, {"shf", shf}, {"shl", shift<ShiftLeft, Integers>},
      {"shr", shift<ShiftRight, Integers>}, {"and", binary_logic<And, kAnd>}, {"or", binary_logic<Or, kOr>},
      {"xor", binary_logic<Xor, kXor>}, {"not", logic_inverse}, {"setp", setp}, {"set", set}, {"selp", selp},
      {"copysign", binary<CopySign, Singles>}, {"rcp", rcp}, {"sqrt", sqrt}, {"rsqrt", rsqrt},
      {"ex2", approximate<Ex2, Small>}, {"lg2", approximate<Lg2, Single>}, {"sin", approximate<Sin, Single>},
      {"cos", approximate<Cos, Single>}, {"tanh", approximate<Tanh, Small>}};
  const auto family = families.find(s.parts[0]);
  if (family == families.end()) return false;
  Form form(s);
  Plan plan;
  if (!family->second(form, plan) || !form.rest.empty() || s.operands.size() != 1 + plan.sources.size()) return false;

  const Operand &to = s.operands[0];
  const bool predicate = plan.destination == Type::kPred, pair = to.kind == Operand::kVector;
  if (pair ? !predicate || !plan.two || to.elements.size() != 2 : !predicate && !fits(d, to, plan.destination)) return false;
  d.destination(to, plan.destination);
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
  return true;
}

}  // namespace vgpu
