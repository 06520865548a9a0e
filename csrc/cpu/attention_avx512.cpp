// attention_kernel.inc on AVX-512.
#include <immintrin.h>

#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 16
#define MIXTRAL_ATTENTION_WIDEN_F16(p) _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i_u *)(p)))
constexpr int kVectors = 3;
#include "attention_vector.inc"
#include "attention_kernel.inc"
}  // namespace

void task_avx512(const Task &t) { task(t); }

}  // namespace mixtral::cpu::attention
