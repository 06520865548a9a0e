// attention_kernel.inc on AVX-512.
#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 16
constexpr int kVectors = 3;
#include "attention_vector.inc"
#include "attention_kernel.inc"
}  // namespace

void task_avx512(const Task &t) { task(t); }

}  // namespace mixtral::cpu::attention
