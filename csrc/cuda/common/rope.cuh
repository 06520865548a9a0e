// Rotary embedding of the heads of a token by a block of threads.
#pragma once
#include "../../core/rope.h"
#include "vector8.cuh"

namespace mixtral::cuda {

constexpr int kMaxPairs = 64;  // D/2

struct Frequencies {
  float x[kMaxPairs];  // rope_frequency() of every pair, from the host
};

inline Frequencies rope_frequencies(double theta, int pairs) {
  Frequencies f = {};
  for (int i = 0; i < pairs; ++i) f.x[i] = rope_frequency(theta, i, 2 * pairs);
  return f;
}

// cos and sin of a position's angles, in shared memory; the block's next barrier is behind it.
struct Rotation {
  float cosine[kMaxPairs], sine[kMaxPairs];

  __device__ void set(const Frequencies &frequencies, float position, int pairs) {
    if ((int)threadIdx.x >= pairs) return;
    const float angle = position * frequencies.x[threadIdx.x];
    cosine[threadIdx.x] = cosf(angle);
    sine[threadIdx.x] = sinf(angle);
  }
};

// A thread turns 8 pairs (half-split: two 16-byte vectors D/2 apart) or 4 pairs (interleaved: one vector). `to` may be `from`.
template <bool kInterleaved, class T>
__device__ void rotate_heads(const T *from, int64_t from_head, T *to, int64_t to_head, int64_t heads, int pairs, const Rotation &r) {
  if (kInterleaved) {
    const int vectors = pairs / 4;
    for (int64_t i = threadIdx.x; i < heads * vectors; i += blockDim.x) {
      const int first = (int)(i % vectors) * 4;  // pair
      Vector8<T> v = load8(from + i / vectors * from_head + first * 2, 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = to_float(v.x[2 * j]), b = to_float(v.x[2 * j + 1]), c = r.cosine[first + j], s = r.sine[first + j];
        from_float(a * c - b * s, v.x[2 * j]);
        from_float(a * s + b * c, v.x[2 * j + 1]);
      }
      store8(to + i / vectors * to_head + first * 2, v, 8);
    }
  } else {
    const int vectors = pairs / 8;
    for (int64_t i = threadIdx.x; i < heads * vectors; i += blockDim.x) {
      const int first = (int)(i % vectors) * 8;  // pair
      const T *p = from + i / vectors * from_head + first;
      T *const out = to + i / vectors * to_head + first;
      Vector8<T> low = load8(p, 8), high = load8(p + pairs, 8);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float a = to_float(low.x[j]), b = to_float(high.x[j]), c = r.cosine[first + j], s = r.sine[first + j];
        from_float(a * c - b * s, low.x[j]);
        from_float(a * s + b * c, high.x[j]);
      }
      store8(out, low, 8);
      store8(out + pairs, high, 8);
    }
  }
}

}  // namespace mixtral::cuda
