// What the kernels of a grouped product share: how blocks find their work on the device, rows of A, a stage in shared memory.
#pragma once
#include <cstdint>

#include "common/segments.cuh"
#include "common/swizzle.cuh"

namespace mixtral::cuda {

// A stage has 64 of k of some rows, 128 bytes each. Unit `unit` (16 bytes) of row `row`:
constexpr int kDepth = 64, kRowBytes = kDepth * 2;
__device__ inline uint32_t place(int row, int unit) { return swizzled<kRowBytes>(row, unit); }

// The expert of unit `index`; an expert has units(rows) of them.
template <class Gemm, class Units>
__device__ inline Segment find_expert(const Gemm &g, int64_t index, const Units &units) {
  return find_segment(
      g.experts, index, [&](int e) { return min(max(g.expert_offsets[e], 0), g.rows); }, [&](int, int rows) { return units(rows); });
}

// A(r) of a GroupedGemm, or NULL if there is no such row.
template <class T, class Gemm>
__device__ inline const T *a_row(const Gemm &g, int row) {
  int index = row;
  if (g.a_rows) {
    index = g.a_rows[row];
    if (index < 0) return nullptr;
    index /= g.a_rows_divisor;
  }
  return index < g.a_count ? (const T *)g.a + index * g.a_stride : nullptr;
}

__device__ inline float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

}  // namespace mixtral::cuda
