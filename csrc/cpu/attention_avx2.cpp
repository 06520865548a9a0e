// attention_kernel.inc on AVX2, FMA and F16C.
#include <immintrin.h>

#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 8
#define MIXTRAL_ATTENTION_WIDEN_F16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)(p)))
constexpr int kVectors = 3;
#include "attention_vector.inc"
#include "attention_kernel.inc"
}  // namespace

void task_avx2(const Task &t) { task(t); }

}  // namespace mixtral::cpu::attention
