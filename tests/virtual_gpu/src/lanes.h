// Lane values of every PTX type, correctly rounded results, and opcodes taken apart: what arithmetic and conversions share.
// Everything here is written so that loops over 32 lanes vectorise.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "decode.h"
#include "machine.h"

namespace vgpu {

// ---------------------------------------------------------------------------------------------------------- lane values

struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };
struct F16x2 { uint32_t bits; };
struct BF16x2 { uint32_t bits; };

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <size_t kBytes> struct BitsOf;
template <> struct BitsOf<1> { using type = uint8_t; };
template <> struct BitsOf<2> { using type = uint16_t; };
template <> struct BitsOf<4> { using type = uint32_t; };
template <> struct BitsOf<8> { using type = uint64_t; };

template <class T>
using Lane32or64 = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;  // what a register's lane is stored as

template <class T>
inline T from_lane(Lane32or64<T> x) { return bit_cast<T>((typename BitsOf<sizeof(T)>::type)x); }
template <class T>
inline Lane32or64<T> to_lane(T x) { return bit_cast<typename BitsOf<sizeof(T)>::type>(x); }

// A floating-point format: its fraction with the leading one has kPrecision bits. Part: the element of a packed type.
template <class T> struct Format;
template <> struct Format<double> { using Part = double; };
template <> struct Format<float> { using Part = float; static constexpr int kPrecision = 24, kLeast = -126, kMost = 127; };
template <> struct Format<F16> { using Part = F16; static constexpr int kPrecision = 11, kLeast = -14, kMost = 15; };
template <> struct Format<BF16> { using Part = BF16; static constexpr int kPrecision = 8, kLeast = -126, kMost = 127; };
template <> struct Format<F16x2> { using Part = F16; };
template <> struct Format<BF16x2> { using Part = BF16; };
struct TF32;  // a float whose fraction is rounded
template <> struct Format<TF32> { static constexpr int kPrecision = 11, kLeast = -126, kMost = 127; };

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BF16 x) { return bit_cast<float>((uint32_t)x.bits << 16); }
inline float widen(F16 x) {
  const uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);  // moves the bias; subnormals turn normal
  return bit_cast<float>((magnitude < 0x0f800000 ? finite : magnitude | 0x7f800000) | (uint32_t)(x.bits & 0x8000) << 16);
}

// ------------------------------------------------------------------------------------------------------------- rounding

constexpr double power(int e) { return e < 0 ? 1 / power(-e) : e == 0 ? 1.0 : 2 * power(e - 1); }

enum Rounding : int { kNearest, kZero, kDown, kUp };

// a + b rounded to odd: the last bit is set if anything was cut off. Rounding that once more, to at least two bits less, gives
// what rounding the exact sum would have given, in every rounding mode.
inline double odd_sum(double a, double b) {
  const double sum = a + b, part = sum - a;
  const double rest = (a - (sum - part)) + (b - part);  // exact; NaN if the sum is not finite
  const uint64_t bits = bit_cast<uint64_t>(sum), apart = (bits ^ bit_cast<uint64_t>(rest)) >> 63;
  const uint64_t even = 0 - (~bits & 1), step = 1 - 2 * apart;  // towards the rest
  return bit_cast<double>(bits + (std::fabs(rest) > 0 ? step & even : 0));
}

// x rounded to the values of format T, as a double. Beyond the largest: infinity, or the largest where the mode says so.
template <class T>
inline double round_to(double x, int mode) {
  using F = Format<T>;
  constexpr int64_t kDrop = F::kPrecision - 1;
  constexpr double kLimit = power(F::kMost) * 2, kLargest = kLimit - power(F::kMost - F::kPrecision + 1);
  const double a = std::fabs(x);
  int64_t exponent = (int64_t)(bit_cast<uint64_t>(a) >> 52);
  exponent = exponent < F::kLeast + 1023 ? F::kLeast + 1023 : exponent > F::kMost + 1023 ? F::kMost + 1023 : exponent;
  const double unit = bit_cast<double>((exponent - kDrop) << 52), magic = bit_cast<double>((exponent - kDrop + 52) << 52);
  double r = (a + magic) - magic;  // a multiple of unit, ties to even
  const bool up = mode == (std::signbit(x) ? kDown : kUp), down = mode != kNearest && !up;
  r += up & (r < a) ? unit : 0;
  r -= down & (r > a) ? unit : 0;
  r = r >= kLimit ? (down & (a < HUGE_VAL) ? kLargest : HUGE_VAL) : r;
  return std::copysign(r, x);
}

// To the bits of a format that has the value. NaN becomes the canonical one. (PTX ISA "Floating-Point Instructions": NaN
// payloads of single precision are not kept, the result is 0x7fffffff; "Half Precision": 0x7fff.)
template <class T>
inline T encode(double x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    const float f = (float)x;
    const uint32_t bits = bit_cast<uint32_t>(f), sign = bits & 0x80000000u, magnitude = bits ^ sign;
    if constexpr (std::is_same_v<T, float>) {
      return bit_cast<float>(magnitude > 0x7f800000u ? 0x7fffffffu : bits);
    } else if constexpr (std::is_same_v<T, BF16>) {
      return {(uint16_t)(magnitude > 0x7f800000u ? 0x7fffu : bits >> 16)};
    } else {
      const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p-112f) >> 13;
      return {(uint16_t)(magnitude > 0x7f800000u ? 0x7fffu : (magnitude == 0x7f800000u ? 0x7c00u : finite) | sign >> 16)};
    }
  }
}

// Modifiers of floating-point results, in Inst::a.
enum Modifier : int { kFtz = 1, kSat = 2, kRelu = 4 };

// .ftz: subnormals become zeros of their sign.
template <class T, class X>
inline X flush(X x, bool ftz) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return ftz & (std::fabs(x) < (X)power(Format<T>::kLeast)) ? std::copysign(X(0), x) : x;
}

// .sat: to [0, 1], NaN to +0. .relu: negative values to 0, NaN stays.
template <class X>
inline X clamp_result(X x, int modifiers) {
  x = modifiers & kSat ? (x > 0 ? (x < 1 ? x : X(1)) : X(0)) : x;
  return modifiers & kRelu ? (x <= 0 ? X(0) : x) : x;
}

// A computed value to format T: a double is rounded here, a float is one unless T is narrower.
template <class T, class X>
inline T result(X x, int modifiers, int mode) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    using R = std::conditional_t<std::is_same_v<T, X>, float, double>;
    R r;
    if constexpr (std::is_same_v<T, X>)
      r = x;
    else
      r = round_to<T>(x, mode);
    return encode<T>(clamp_result(flush<T>(r, modifiers & kFtz), modifiers));
  }
}

// ----------------------------------------------------------------------------------------------------------- predicates

struct Predicate {
  Mask value, poison;
};

// Source `i` of an instruction. An immediate has no slot; its value is bit i of Inst::d.
inline Predicate read_predicate(const Warp &w, const Inst &in, int i) {
  const Slot s = in.r[i];
  if (s == kNoSlot) return {in.d >> i & 1 ? kAllLanes : 0, 0};
  const Slot slot = s & (Slot)~kNegated;
  return {s & kNegated ? ~w.predicates[slot] : w.predicates[slot], w.predicate_poison[slot]};
}

inline void write_predicate(Warp &w, Slot slot, Predicate p, Mask m) {
  if (slot == kNoSlot) return;
  w.predicates[slot] = (w.predicates[slot] & ~m) | (p.value & m);
  w.predicate_poison[slot] = (w.predicate_poison[slot] & ~m) | (p.poison & m);
}

inline void predicate_source(Decoder &d, const Operand &o, Inst &in, int i) {
  if (o.kind != Operand::kImmediate) return d.predicate(o);
  in.d |= (int)(o.immediate != 0) << i;
  d.destination(Operand());
}

// -------------------------------------------------------------------------------------------------------------- opcodes

// The parts of an opcode after its name. Decoders take what they know; a form with anything left over is not covered.
struct Form {
  std::vector<Type> types;
  std::vector<std::string> rest;

  explicit Form(const Statement &s) {
    for (size_t i = 1; i < s.parts.size(); ++i) {
      const Type t = parse_type(s.parts[i]);
      if (t != Type::kNone)
        types.push_back(t);
      else
        rest.push_back(s.parts[i]);
    }
  }
  bool take(const char *modifier) {
    const auto found = std::find(rest.begin(), rest.end(), modifier);
    if (found == rest.end()) return false;
    rest.erase(found);
    return true;
  }
  Type type() const { return types.size() == 1 ? types[0] : Type::kNone; }
};

inline int take_modifiers(Form &f) {
  return (f.take("ftz") ? kFtz : 0) | (f.take("sat") ? kSat : 0) | (f.take("relu") ? kRelu : 0);
}

// Whether an operand that must have the width of its type does. (PTX ISA 9.2 "Type Information for Instructions and Operands")
inline bool fits(const Decoder &d, const Operand &o, Type t) {
  return o.kind != Operand::kRegister || (d.wide(o) == (type_bytes(t) == 8) && d.narrow(o) == (type_bytes(t) == 2));
}

template <class T>
inline bool represents(Type t) {
  if (std::is_same_v<T, uint8_t>) return t == Type::kU8 || t == Type::kB8;
  if (std::is_same_v<T, int8_t>) return t == Type::kS8;
  if (std::is_same_v<T, uint16_t>) return t == Type::kU16 || t == Type::kB16;
  if (std::is_same_v<T, int16_t>) return t == Type::kS16;
  if (std::is_same_v<T, uint32_t>) return t == Type::kU32 || t == Type::kB32;
  if (std::is_same_v<T, int32_t>) return t == Type::kS32;
  if (std::is_same_v<T, uint64_t>) return t == Type::kU64 || t == Type::kB64;
  if (std::is_same_v<T, int64_t>) return t == Type::kS64;
  if (std::is_same_v<T, float>) return t == Type::kF32;
  if (std::is_same_v<T, double>) return t == Type::kF64;
  if (std::is_same_v<T, F16>) return t == Type::kF16;
  if (std::is_same_v<T, BF16>) return t == Type::kBF16;
  if (std::is_same_v<T, F16x2>) return t == Type::kF16x2;
  return std::is_same_v<T, BF16x2> && t == Type::kBF16x2;
}

template <class T>
struct Tag { using type = T; };

// C++ types, and f(Tag<T>()) for the one that a PTX type stands for; null if it is none of them.
template <class... T>
struct Types {
  template <class F>
  static Exec choose(Type t, F f) {
    Exec exec = nullptr;
    ((represents<T>(t) ? (void)(exec = f(Tag<T>())) : (void)0), ...);
    return exec;
  }
};

}  // namespace vgpu
