// grouped_gemm in AVX2, FMA and F16C. Tile 4 x 3: 12 of 16 registers accumulate, 3 hold activations, 1 a weight.
#include <immintrin.h>

#include <cstring>

#include "grouped_gemm.h"

namespace mixtral::cpu {
namespace {

constexpr int kVectorBytes = 32, kTokens = 3;
#include "grouped_gemm_vector.inc"

inline Vec widen_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)p)); }

// Two operations for one vector, against one for OperandBf16Pairs; but that needs a 17th register, and its spills cost
// more: at k = 4096 and 126 tokens this reached 60 to 64 % of an FMA loop's rate, pairs 54 to 63 % (one thread of a shared
// Zen 3, 2026-11-23).
inline Vec widen_bf16(const uint16_t *p) {
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)p)), 16);
}

#include "grouped_gemm_operands.inc"
#include "grouped_gemm_dot.inc"

}  // namespace

GemmKernel grouped_gemm_kernel_avx2(int32_t dtype) {
  if (dtype == MIXTRAL_DTYPE_BF16) return kernel<OperandWidened<widen_bf16>>();
  if (dtype == MIXTRAL_DTYPE_F16) return kernel<OperandWidened<widen_f16>>();
  return kernel<OperandF32>();
}

}  // namespace mixtral::cpu
