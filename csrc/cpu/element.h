// f32, bf16 and f16 elements in portable C++, for the files compiled with the build's baseline instructions. Kernels of
// a particular instruction set have their own conversions (see DESIGN: no shared inline code across instruction sets).
#pragma once
#include <cstdint>
#include <cstring>

#include "../include/mixtral_ext.h"

namespace mixtral::cpu {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
inline float to_float(F16 x) {
  // The exponent moves from bias 15 to 127 by a product with 2^112, which also normalises subnormals.
  const uint32_t magnitude = x.bits & 0x7fffu, sign = (uint32_t)(x.bits & 0x8000u) << 16;
  const uint32_t scaled = float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f);
  const uint32_t value = magnitude >= 0x7c00u ? (magnitude << 13 | 0x7f800000u) : scaled;  // inf and NaN
  return bits_to_float(value | sign);
}

// Round to nearest, ties to even.
inline void from_float(float x, float &out) { out = x; }
inline void from_float(float x, Bf16 &out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  out.bits = (uint16_t)(x == x ? rounded : (bits >> 16 | 0x40u));  // NaN stays NaN
}
inline void from_float(float x, F16 &out) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded by the addition itself, in the low mantissa.
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = (uint16_t)(sign | half);
}

// Calls body(T()) with the C++ type of a floating-point mixtral_dtype.
template <class Body>
auto with_float_type(int32_t dtype, const Body &body) {
  if (dtype == MIXTRAL_DTYPE_BF16) return body(Bf16());
  if (dtype == MIXTRAL_DTYPE_F16) return body(F16());
  return body(float());
}

}  // namespace mixtral::cpu
