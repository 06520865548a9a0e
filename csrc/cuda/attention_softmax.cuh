// The softmax of a row whose scores come tile by tile (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018), in powers
// of two: weights are 2^(scale * score - shift), shift = scale * the highest score so far.
#pragma once
#include <cmath>

#include "common/ptx_sm80.cuh"
#include "common/vector8.cuh"

namespace mixtral::cuda {

constexpr float kLn2 = 0.69314718055994531f;

// The exponent's shift for a highest score; a row whose scores are all -inf has weights 0, not NaN.
__device__ inline float softmax_shift(float highest, float scale) { return highest == -INFINITY ? 0.0f : highest * scale; }

struct RowSoftmax {
  float highest = -INFINITY;
  float sum = 0.0f;  // of the weights, or of a thread's part of them

  // The next tile has this highest score: -> shift for its weights. What was summed before counts `factor` times from now on.
  __device__ float next(float tile_highest, float scale, float *factor) {
    const float before = highest;
    highest = fmaxf(before, tile_highest);
    const float shift = softmax_shift(highest, scale);
    *factor = sm80::exp2_approx(fmaf(before, scale, -shift));
    sum *= *factor;
    return shift;
  }
};

// Of the four lanes that hold a row of a fragment.
__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores of 16 rows, 8 keys a fragment, of the next kEights * 8 keys: those of row lane / 4 (h 0) or lane / 4 + 8 (h 1) become weights, as
// the operand of a product that takes 16 keys a time. -> what the row's sums so far count for.
template <int kEights, class T>
__device__ inline float to_weights(float (&score)[kEights][4], int h, float scale, RowSoftmax &softmax, uint32_t (&weights)[kEights / 2][4], T type) {
  float highest = -INFINITY, factor;
#pragma unroll
  for (int j = 0; j < kEights; ++j) highest = fmaxf(highest, fmaxf(score[j][h * 2], score[j][h * 2 + 1]));
  const float shift = softmax.next(quad_max(highest), scale, &factor);
#pragma unroll
  for (int j = 0; j < kEights; ++j) {
    float pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) pair[e] = sm80::exp2_approx(fmaf(score[j][h * 2 + e], scale, -shift));
    softmax.sum += pair[0] + pair[1];
    weights[j / 2][j % 2 * 2 + h] = pack(pair[0], pair[1], type);
  }
  return factor;
}

// The same row's sums, 8 columns a fragment.
template <int kEights>
__device__ inline void scale_row(float (&sum)[kEights][4], int h, float factor) {
#pragma unroll
  for (int j = 0; j < kEights; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) sum[j][h * 2 + e] *= factor;
}

// What a sum of weighted values is multiplied by; 0 for a row that saw nothing.
__device__ inline float softmax_inverse(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
// Natural logarithm of the sum of e^(softmax_scale * score).
__device__ inline float log_sum_exp(float shift, float sum) { return sum == 0.0f ? -INFINITY : (shift + log2f(sum)) * kLn2; }

}  // namespace mixtral::cuda
