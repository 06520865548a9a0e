// attention_bf16.inc on AVX512_BF16; all else (decode, f32, f16) is AVX-512's.
//   a step of 8 x 48 sums and 2 products each: 24 of 32 registers accumulate, 3 hold rows, 1 a key's (value's) pair
//   of kTileKeys keys and 192 rows at D = 128: 98304 vdpbf16ps (AVX-512 alone: 196608 FMA), 768 vectors of exp2
#include <immintrin.h>

#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 16
constexpr int kVectors = 3;
#include "attention_vector.inc"

template <bool kAccumulate>
inline void product(const char *a, int64_t a_row, int64_t rows, const uint16_t *b, int64_t b_vector, int64_t depth, float *c) {
  constexpr int kRows = 8;
  for (int64_t i = 0; i < rows; i += kRows) {
    float *to = c + i * kPanel;
    F sums[kRows][kVectors] = {};
    if (kAccumulate)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = load(to + r * kPanel + v * kWidth);
    for (int64_t k = 0; k < depth; k += 2) {
      __m512bh x[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) x[v] = (__m512bh)_mm512_loadu_si512(b + v * b_vector + k * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        uint32_t pair;
        __builtin_memcpy(&pair, a + (i + r) * a_row + k * 2, sizeof pair);
        const __m512bh y = (__m512bh)(U{} + pair);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[r][v] = (F)_mm512_dpbf16_ps((__m512)sums[r][v], x[v], y);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(to + r * kPanel + v * kWidth, sums[r][v]);
  }
}

#include "attention_bf16.inc"
}  // namespace

void task_avx512bf16(const Task &t) { is_bf16_block(t) ? task_block(t) : task_avx512(t); }

}  // namespace mixtral::cpu::attention
