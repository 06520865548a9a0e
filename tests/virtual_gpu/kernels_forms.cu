// What nvcc makes of atomics, calls and cooperative launches, for test_forms.py, which computes the same in Python.
#include <cuda_bf16.h>

#define KERNEL extern "C" __global__ void
#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)

// ---------------------------------------------------------------------------------- on sm_80 these are loops of compare-and-swap

KERNEL add_bf16(__nv_bfloat16 *sums, const __nv_bfloat16 *x, int n) {
  for (int i = THREAD; i < n; i += gridDim.x * blockDim.x) atomicAdd(sums + i % 3, x[i]);
}

KERNEL add_bf16_in_shared(__nv_bfloat16 *sums, const __nv_bfloat16 *x, int n) {
  __shared__ __nv_bfloat16 s[3];
  if (threadIdx.x < 3) s[threadIdx.x] = 0.0f;
  __syncthreads();
  for (int i = THREAD; i < n; i += gridDim.x * blockDim.x) atomicAdd(s + i % 3, x[i]);
  __syncthreads();
  if (threadIdx.x < 3) atomicAdd(sums + threadIdx.x, s[threadIdx.x]);
}

KERNEL add_bf16x2(__nv_bfloat162 *sums, const __nv_bfloat162 *x, __nv_bfloat162 *old) {
#pragma unroll
  for (int i = 0; i < 4; ++i) old[4 * THREAD + i] = atomicAdd(sums + i, x[4 * THREAD + i]);
}

// The same loop as the programming guide has it.
__device__ double add(double *sum, double x) {
  unsigned long long *p = (unsigned long long *)sum, old = *p, expected;
  do {
    expected = old;
    old = atomicCAS(p, expected, __double_as_longlong(x + __longlong_as_double(expected)));
  } while (expected != old);
  return __longlong_as_double(old);
}

KERNEL add_double(double *sum, const double *x) { add(sum + blockIdx.y, x[THREAD]); }

// The value that begins the loop is used for something else too.
KERNEL use_the_guess(int *sum, int *seen) {
  int old = *sum, expected;
  seen[THREAD] = old;
  do {
    expected = old;
    old = atomicCAS(sum, expected, expected * 3 + 1);
  } while (expected != old);
}

// A store that nothing orders with the loop.
KERNEL store_beside_the_loop(double *sum, const double *x) {
  if (THREAD == 0) *sum = 0;
  add(sum, x[THREAD]);
}
