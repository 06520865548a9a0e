// Which keys a block of rows sees: the range it goes through, the part of it that needs no mask, and the mask.
#pragma once
#include <cmath>

#include "attention_sequence.cuh"

namespace mixtral::cuda {

// The first key that a query at `position` sees; the last one is its own.
__device__ inline int first_key(const Sequence &s, int window, int position) { return max(s.begin, max(position, -1) - window + 1); }

// Rows of the tokens at positions low to high.
struct KeyRange {
  int begin, end;            // keys that some row sees
  int full_begin, full_end;  // keys that every row sees: outside, at the window's left edge and at the diagonal, scores are masked

  __device__ KeyRange(const Sequence &s, int window, int low, int high)
      : begin(first_key(s, window, low)), end(high + 1), full_begin(first_key(s, window, high)), full_end(low + 1) {}
  // Does a tile of keys need the mask?
  __device__ bool edge(int key, int keys) const { return key < full_begin || key + keys > full_end; }
};

// One row's mask.
struct RowMask {
  int first, last;  // keys that it sees

  __device__ RowMask(const Sequence &s, int window, int position) : first(first_key(s, window, position)), last(position) {}
  __device__ bool sees(int key) const { return key >= first && key <= last; }
};

// Row lane / 4 + 8 h of scores, 8 keys a fragment, of the keys from `key` on: -inf where it does not see them.
template <int kEights>
__device__ inline void mask_row(float (&score)[kEights][4], int h, const RowMask &mask, int key) {
  const int first = key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < kEights; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      if (!mask.sees(first + j * 8 + e)) score[j][h * 2 + e] = -INFINITY;
}

}  // namespace mixtral::cuda
