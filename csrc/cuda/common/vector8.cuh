// Eight 16-bit floats as one 16-byte access, and their conversion to f32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace mixtral::cuda {

template <class T>
struct alignas(16) Vector8 {
  T x[8];
};

__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float x, __nv_bfloat16 &out) { out = __float2bfloat16_rn(x); }
__device__ inline void from_float(float x, __half &out) { out = __float2half_rn(x); }

// Two floats as the halves of a register, the first one low.
__device__ inline uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
__device__ inline uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// The first n of the 8 elements at p (all if n >= 8), the rest zero. p is 16-byte aligned.
template <class T>
__device__ inline Vector8<T> load8(const T *p, int64_t n) {
  if (n >= 8) return *reinterpret_cast<const Vector8<T> *>(p);
  Vector8<T> v;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n)
      v.x[i] = p[i];
    else
      from_float(0.0f, v.x[i]);
  return v;
}

template <class T>
__device__ inline void store8(T *p, const Vector8<T> &v, int64_t n) {
  if (n >= 8) {
    uint4 bits;
    memcpy(&bits, &v, sizeof bits);
    __stwb(reinterpret_cast<uint4 *>(p), bits);  // a plain store is merged with the tail's into 2-byte stores (nvcc 13.0)
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < n) p[i] = v.x[i];
}

}  // namespace mixtral::cuda
