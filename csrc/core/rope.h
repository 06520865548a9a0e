// The rotary frequency of pair i, the same bits on every device and in transformers (whose tensor ops round the power
// and its reciprocal to f32 one after the other).
#pragma once
#include <cmath>
#include <cstdint>

namespace mixtral {

static inline float rope_frequency(double theta, int64_t pair, int64_t head_dim) {
  return 1.0f / (float)std::pow(theta, 2.0 * (double)pair / (double)head_dim);
}

}  // namespace mixtral
