// attention_kernel.inc on 16-byte vectors: what every x86-64 and most other machines have.
#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 4
constexpr int kVectors = 2;
#include "attention_vector.inc"
#include "attention_kernel.inc"
}  // namespace

void task_portable(const Task &t) { task(t); }

}  // namespace mixtral::cpu::attention
