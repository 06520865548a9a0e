// The rotary frequency of pair i, the same bits on every device: the power in double, rounded to f32, and its reciprocal in
// f32. transformers takes the power in f32: of the 288 frequencies of D = 64 and 128, theta = 1e4, 5e5 and 1e6, one is an
// ulp off ours (pair 37 of D = 128, theta = 1e6).
#pragma once
#include <cmath>
#include <cstdint>

namespace mixtral {

static inline float rope_frequency(double theta, int64_t pair, int64_t head_dim) {
  return 1.0f / (float)std::pow(theta, 2.0 * (double)pair / (double)head_dim);
}

}  // namespace mixtral
