// What nvcc makes of atomics, calls and cooperative launches, for test_forms.py, which computes the same in Python.
#include <cassert>
#include <cstdio>

#include <cooperative_groups.h>
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

#if __CUDA_ARCH__ >= 900
KERNEL add_float2(float2 *sums, const float2 *x, float2 *old) { old[THREAD] = atomicAdd(sums + THREAD % 3, x[THREAD]); }
KERNEL add_float4(float4 *sums, const float4 *x, float4 *) { atomicAdd(sums + THREAD % 3, x[THREAD]); }
#endif

// ------------------------------------------------------------------------------------------------------------------------- calls

struct Numbers {
  float x;
  int n[5];
};

__device__ __noinline__ float power(float x, int n) {
  float r = 1;
  for (int i = 0; i < n; ++i) {
    if (r > 100) return -r;
    r *= x;
  }
  return r;
}

__device__ __noinline__ Numbers change(Numbers s, const float *p, int i) {
  s.n[i] += 3;
  s.x = s.n[i & 3] + p[i];
  return s;
}

__device__ __noinline__ int look_up(const Numbers &s, int i) { return s.n[i]; }

// What the thread beside this one has.
__device__ __noinline__ float beside(float x) {
  __shared__ float s[128];
  __syncthreads();
  s[threadIdx.x] = x;
  __syncthreads();
  return s[threadIdx.x ^ 1];
}

__device__ __noinline__ bool less_or_more(char a, short b, bool more) { return more ? a > b : a < b; }

__device__ __noinline__ float nested(float x, int n) { return power(x, n) + power(x + 1, 2); }

// The lanes of a warp call from two places.
KERNEL call_scalars(const float *x, float *out) {
  const int t = THREAD;
  if (t % 3 == 0)
    out[t] = power(x[t], t % 7);
  else
    out[t] = nested(x[t], t % 5) + 1;
}

KERNEL call_structures(const float *x, int *out) {
  const int t = THREAD;
  Numbers s = {x[t], {1, 2, 3, 4, t}};
  s = change(s, x, t % 5);
  out[2 * t] = (int)s.x + 10 * s.n[2] + 100 * s.n[4];
  out[2 * t + 1] = look_up(s, t % 5);
}

KERNEL call_with_barriers(float *x) {
  const float y = beside(x[threadIdx.x]);
  x[threadIdx.x] = y + 2 * beside(3 * y);
}

KERNEL call_small_types(const char *a, const short *b, bool *out) {
  const int t = THREAD;
  out[t] = less_or_more(a[t], b[t], out[t]);
}

KERNEL call_pow(double *x) { x[THREAD] = pow(x[THREAD], 1.7); }

__device__ __noinline__ void write(int *out, int i) { out[i] = i; }

KERNEL call_out_of_range(int *out) {
  write(out, THREAD);
  if (THREAD == 5) write(out, 64);
}

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

KERNEL call_recursive(int *x) { x[0] = fibonacci(x[0]); }

__device__ __noinline__ int twice(int a) { return 2 * a; }
__device__ __noinline__ int thrice(int a) { return 3 * a; }

KERNEL call_pointer(int *x) {
  int (*f)(int) = x[0] ? twice : thrice;
  x[1] = f(x[2]);
}

KERNEL call_printf(int *x) {
  if (x[0]) printf("%d\n", x[1]);
  x[1] = 5;
}

KERNEL call_assert(int *x) {
  assert(x[THREAD] > 0 && "all are positive");
  x[THREAD] = 1;
}

// ----------------------------------------------------------------------------------------------------------- cooperative launches

// Each round a thread takes what the block behind it had, plus one.
template <bool kSync>
__device__ void rotate(int *x, int rounds) {
  int *const mine = x + THREAD, *const next = x + (THREAD + blockDim.x) % (gridDim.x * blockDim.x);
  for (int i = 0; i < rounds; ++i) {
    const int value = *next + 1;
    cooperative_groups::this_grid().sync();
    *mine = value;
    if (kSync) cooperative_groups::this_grid().sync();
  }
}

KERNEL grid_sync_correct(int *x, int rounds) { rotate<true>(x, rounds); }
KERNEL grid_sync_missing(int *x, int rounds) { rotate<false>(x, rounds); }

KERNEL grid_sync_not_by_all(int *x) {
  if (blockIdx.x != 1) cooperative_groups::this_grid().sync();
  x[THREAD] = 1;
}

// Nothing for an older architecture.
extern "C" __global__ void only_sm90(int *out) {
#if __CUDA_ARCH__ >= 900
  out[threadIdx.x] = 1;
#endif
}
