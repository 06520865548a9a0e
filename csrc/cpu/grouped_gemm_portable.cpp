// grouped_gemm in 16-byte vectors: SSE2, NEON, or plain code where there are none. Tile 4 x 2: 8 of 16 registers
// accumulate.
#include <cstring>

#include "grouped_gemm.h"

namespace mixtral::cpu {
namespace {

constexpr int kVectorBytes = 16, kTokens = 2;
#include "grouped_gemm_vector.inc"

// The exponent moves from bias 15 to 127 by a product with 2^112, which also normalises subnormals.
inline Vec widen_f16(const uint16_t *p) {
  const Bits half = {p[0], p[1], p[2], p[3]};
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits finite = (Bits)((Vec)magnitude * 0x1p112f);
  const Bits value = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;  // infinity and NaN
  return (Vec)(value | (half & 0x8000u) << 16);
}

#include "grouped_gemm_operands.inc"
#include "grouped_gemm_dot.inc"

}  // namespace

GemmKernel grouped_gemm_kernel_portable(int32_t dtype) {
  if (dtype == MIXTRAL_DTYPE_BF16) return kernel<OperandBf16Pairs>();
  if (dtype == MIXTRAL_DTYPE_F16) return kernel<OperandWidened<widen_f16>>();
  return kernel<OperandF32>();
}

}  // namespace mixtral::cpu
