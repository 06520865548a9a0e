// What the kernels of a grouped product share: how blocks find their work on the device, rows of A, a stage in shared memory.
#pragma once
#include <cstdint>

namespace mixtral::cuda {

// A stage has 64 of k of some rows, 128 bytes each. Unit `unit` (16 bytes) of row `row`:
constexpr int kDepth = 64, kRowBytes = kDepth * 2;
__device__ inline uint32_t place(int row, int unit) { return (uint32_t)(row * kRowBytes + (unit ^ row % 8) * 16); }

struct Segment {
  int expert;    // -1: there are fewer units
  int begin;     // first row of the expert
  int rows;      // of the expert
  int64_t unit;  // index within the expert
};

// Experts follow each other with units(rows) units each, none without rows; finds unit `index`. Offsets count as the running maximum of
// their values clamped to [0, row_count]. Whole warps call it, each lane looks at experts / 32 experts; every lane gets the result.
template <class Units>
__device__ inline Segment find_segment(const int32_t *__restrict__ offsets, int experts, int row_count, int64_t index, const Units &units) {
  const int lane = threadIdx.x % 32, each = (experts + 31) / 32, first = lane * each;
  const auto offset = [&](int e) { return e <= experts ? min(max(offsets[e], 0), row_count) : 0; };

  int highest = 0;  // of this lane's first offsets, then of all up to them
  for (int e = first; e < first + each; ++e) highest = max(highest, offset(e));
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, highest, d);
    if (lane >= d) highest = max(highest, other);
  }
  const int before = __shfl_up_sync(~0u, highest, 1);
  const int start = max(lane ? before : 0, offset(first));

  int64_t count = 0;
  for (int e = first, begin = start; e < min(first + each, experts); ++e) {
    const int end = max(begin, offset(e + 1));
    count += units(end - begin);
    begin = end;
  }
  int64_t sum = count;
  for (int d = 1; d < 32; d *= 2) {
    const int64_t other = __shfl_up_sync(~0u, sum, d);
    if (lane >= d) sum += other;
  }

  Segment found = {-1, 0, 0, index - (sum - count)};
  const unsigned owner = __ballot_sync(~0u, found.unit >= 0 && found.unit < count);
  if (!owner) return found;
  if (found.unit >= 0 && found.unit < count) {
    for (int e = first, begin = start; found.expert < 0; ++e) {
      const int end = max(begin, offset(e + 1));
      if (found.unit < units(end - begin))
        found.expert = e, found.begin = begin, found.rows = end - begin;
      else
        found.unit -= units(end - begin);
      begin = end;
    }
  }
  const int from = __ffs(owner) - 1;
  return {__shfl_sync(~0u, found.expert, from), __shfl_sync(~0u, found.begin, from), __shfl_sync(~0u, found.rows, from),
          __shfl_sync(~0u, found.unit, from)};
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
