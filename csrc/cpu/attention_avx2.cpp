// attention_kernel.inc on AVX2 and FMA.
#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 8
constexpr int kVectors = 3;
#include "attention_vector.inc"
#include "attention_kernel.inc"
}  // namespace

void task_avx2(const Task &t) { task(t); }

}  // namespace mixtral::cpu::attention
