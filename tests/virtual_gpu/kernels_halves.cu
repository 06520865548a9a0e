// Pairs of which one half was never written, for test_undefined_halves.py. "_wrong" ones use that half.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define KERNEL extern "C" __global__ void

template <bool kWrong>
__device__ void shared_pair(float *out) {
  __shared__ __nv_bfloat162 pairs[64];
  const int t = threadIdx.x;
  pairs[t].x = __float2bfloat16(t);
  __syncthreads();
  const __nv_bfloat162 pair = pairs[63 - t];
  out[t] = __bfloat162float(kWrong ? pair.y : pair.x);
}
KERNEL shared_pair_right(float *out) { shared_pair<false>(out); }
KERNEL shared_pair_wrong(float *out) { shared_pair<true>(out); }

template <bool kWrong>
__device__ void global_pair(float *out, __nv_bfloat162 *pairs) {
  const int t = threadIdx.x;
  pairs[t].y = __float2bfloat16(t);
  const float2 pair = __bfloat1622float2(__hadd2(pairs[t], pairs[t]));
  out[t] = kWrong ? pair.x : pair.y;
}
KERNEL global_pair_right(float *out, __nv_bfloat162 *pairs) { global_pair<false>(out, pairs); }
KERNEL global_pair_wrong(float *out, __nv_bfloat162 *pairs) { global_pair<true>(out, pairs); }

// An odd row of `n`: pairs are loaded, worked on and rounded as pairs; what lies behind the row is dropped at the end.
template <bool kWrong>
__device__ void odd_row(float *out, __nv_bfloat162 *pairs, int n) {
  const int t = threadIdx.x;
  __nv_bfloat16 *const row = (__nv_bfloat16 *)pairs;
  for (int i = t; i < n; i += blockDim.x) row[i] = __float2bfloat16(i);
  __syncthreads();
  if (2 * t >= n) return;
  float2 pair = __bfloat1622float2(pairs[t]);
  __nv_bfloat162 rounded = __floats2bfloat162_rn(pair.x * 3.0f, pair.y * 3.0f);
  rounded = __hmax2(rounded, __hneg2(rounded));
  out[2 * t] = __low2float(rounded);
  if (2 * t + 1 < n + kWrong) out[2 * t + 1] = __high2float(rounded);
}
KERNEL odd_row_right(float *out, __nv_bfloat162 *pairs, int n) { odd_row<false>(out, pairs, n); }
KERNEL odd_row_wrong(float *out, __nv_bfloat162 *pairs, int n) { odd_row<true>(out, pairs, n); }

// The same with eight at a time, as words.
template <bool kWrong>
__device__ void eights(float *out, uint4 *rows, int n) {
  const int t = threadIdx.x;
  __half *const row = (__half *)(rows + t);
  for (int i = 0; i < n; ++i) row[i] = __int2half_rn(t + i);
  __syncthreads();
  const uint4 all = rows[t ^ 1];
  const __half *h = (const __half *)&all;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n + kWrong) out[8 * t + i] = __half2float(h[i]);
}
KERNEL eights_right(float *out, uint4 *rows, int n) { eights<false>(out, rows, n); }
KERNEL eights_wrong(float *out, uint4 *rows, int n) { eights<true>(out, rows, n); }
