// grouped_gemm in AVX-512. Tile 4 x 5: 20 of 32 registers accumulate, 5 hold activations, 2 a weight and the mask (with 6
// tokens the compiler spills accumulators). Taking bf16 apart (a shift, a mask) costs 8 operations for every 40 products.
#include <immintrin.h>

#include <cstring>

#include "grouped_gemm.h"

namespace mixtral::cpu {
namespace {

constexpr int kVectorBytes = 64, kTokens = 5;
#include "grouped_gemm_vector.inc"

inline Vec widen_f16(const uint16_t *p) { return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i_u *)p)); }

#include "grouped_gemm_operands.inc"
#include "grouped_gemm_dot.inc"

}  // namespace

GemmKernel grouped_gemm_kernel_avx512(int32_t dtype) {
  if (dtype == MIXTRAL_DTYPE_BF16) return kernel<OperandBf16Pairs>();
  if (dtype == MIXTRAL_DTYPE_F16) return kernel<OperandWidened<widen_f16>>();
  return kernel<OperandF32>();
}

}  // namespace mixtral::cpu
