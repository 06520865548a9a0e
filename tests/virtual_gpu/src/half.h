// float16 and bfloat16 values of single elements. Local to each file that includes it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace vgpu {

static inline float bf16_to_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline float f16_to_float(uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float sign = x >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp((float)(fraction + 1024), exponent - 25) : std::ldexp((float)fraction, -24));
}

// Nearest, ties to even, of a value with `bits` fraction bits and least exponent `least`; NaN gives 0x7fff.
static inline uint16_t round_to_half(double x, int bits, int bias, uint16_t infinity) {
  if (std::isnan(x)) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (x == 0) return sign;
  int exponent;
  std::frexp(x, &exponent);  // x = m * 2^exponent, m in [0.5, 1)
  int e = exponent - 1 + bias;
  const int scale = e > 0 ? bits - (exponent - 1) : bits - (1 - bias);
  const double rounded = std::isinf(x) ? 0 : std::nearbyint(std::ldexp(x, scale));
  if (std::isinf(x)) return sign | infinity;
  // A fraction that rounds up to the next power carries into the exponent by itself.
  const double encoded = e > 0 ? (double)(e - 1) * std::ldexp(1.0, bits) + rounded : rounded;
  return encoded >= infinity ? sign | infinity : (uint16_t)(sign | (uint16_t)encoded);
}

static inline uint16_t bf16_from_double(double x) { return round_to_half(x, 7, 127, 0x7f80); }
static inline uint16_t f16_from_float(double x) { return round_to_half(x, 10, 15, 0x7c00); }

}  // namespace vgpu
