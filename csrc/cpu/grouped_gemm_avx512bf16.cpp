// grouped_gemm in AVX512_BF16: vdpbf16ps takes weights and tokens as they are, two products a lane, so packing is only the
// gather. Tile 4 x 6: 24 of 32 registers accumulate, 6 hold activations, 1 a weight.
#include <immintrin.h>

#include <cstring>

#include "grouped_gemm.h"

namespace mixtral::cpu {
namespace {

constexpr int kVectorBytes = 64, kTokens = 6;
#include "grouped_gemm_vector.inc"

struct OperandBf16Dot {
  typedef uint16_t Stored;
  typedef uint16_t Packed;
  typedef __m512bh Register;
  static constexpr int kParts = 1, kGroup = 32;
  static ALWAYS_INLINE __m512bh load(const uint16_t *p, int) { return (__m512bh)_mm512_loadu_si512(p); }
  static ALWAYS_INLINE Vec multiply_add(__m512bh w, __m512bh x, Vec sum) { return _mm512_dpbf16_ps(sum, w, x); }
};

#include "grouped_gemm_dot.inc"

}  // namespace

GemmKernel grouped_gemm_kernel_avx512bf16() { return kernel<OperandBf16Dot>(); }

}  // namespace mixtral::cpu
