// Floating-point numbers of the formats that PTX has, and correctly rounded results.
// Everything here is written so that loops over 32 lanes vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vgpu {

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

// A format: its fraction with the leading one has kPrecision bits. Part: the element of a packed type.
template <class T> struct Format;
template <> struct Format<double> { using Part = double; };
template <> struct Format<float> { using Part = float; static constexpr int kPrecision = 24, kLeast = -126, kMost = 127; };
template <> struct Format<F16> { using Part = F16; static constexpr int kPrecision = 11, kLeast = -14, kMost = 15; };
template <> struct Format<BF16> { using Part = BF16; static constexpr int kPrecision = 8, kLeast = -126, kMost = 127; };
template <> struct Format<F16x2> { using Part = F16; };
template <> struct Format<BF16x2> { using Part = BF16; };

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
  constexpr int64_t kDrop = F::kPrecision - 1, kFirst = F::kLeast + 1023, kLast = F::kMost + 1023;
  constexpr double kLimit = power(F::kMost) * 2, kLargest = kLimit - power(F::kMost - F::kPrecision + 1);
  const double a = std::fabs(x);
  int64_t exponent = (int64_t)(bit_cast<uint64_t>(a) >> 52);
  exponent = exponent < kFirst ? kFirst : exponent > kLast ? kLast : exponent;
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
  if constexpr (std::is_same_v<T, double>) return x;
  const uint32_t bits = bit_cast<uint32_t>((float)x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const bool nan = magnitude > 0x7f800000u;
  if constexpr (std::is_same_v<T, float>) return bit_cast<float>(nan ? 0x7fffffffu : bits);
  if constexpr (std::is_same_v<T, BF16>) return {(uint16_t)(nan ? 0x7fffu : bits >> 16)};
  if constexpr (std::is_same_v<T, F16>) {
    const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p-112f) >> 13;
    return {(uint16_t)(nan ? 0x7fffu : (magnitude == 0x7f800000u ? 0x7c00u : finite) | sign >> 16)};
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
inline T result(X x, int modifiers = 0, int mode = kNearest) {
  const auto finish = [&](auto r) { return encode<T>(clamp_result(flush<T>(r, modifiers & kFtz), modifiers)); };
  if constexpr (std::is_same_v<T, double>)
    return clamp_result(x, modifiers);
  else if constexpr (std::is_same_v<T, X>)
    return finish(x);
  else
    return finish(round_to<T>(x, mode));
}

// Single elements by their bits.
inline float half_to_float(bool bf16, uint16_t bits) { return bf16 ? widen(BF16{bits}) : widen(F16{bits}); }
inline uint16_t f16_bits(double x) { return encode<F16>(round_to<F16>(x, kNearest)).bits; }
inline uint16_t bf16_bits(double x) { return encode<BF16>(round_to<BF16>(x, kNearest)).bits; }

}  // namespace vgpu
