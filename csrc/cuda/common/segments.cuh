// Segments of packed rows, described by an array of offsets on the device: the rows of experts, the tokens of sequences.
#pragma once
#include <cstdint>

namespace mixtral::cuda {

struct Segment {
  int index;     // -1: there are fewer units
  int begin;     // its first row
  int rows;
  int64_t unit;  // index within the segment
};

// Segments follow each other with units(index, rows) units each; finds unit `index`. offset(i), i from 0 to `segments`, is where segment i
// begins and the one before it ends, 0 or more; offsets count as the running maximum of their values. Whole warps call it, each lane looks
// at segments / 32 of them; every lane gets the result.
template <class Offset, class Units>
__device__ inline Segment find_segment(int segments, int64_t index, const Offset &offset, const Units &units) {
  const int lane = threadIdx.x % 32, each = (segments + 31) / 32, first = min(lane * each, segments), last = min(first + each, segments);

  int highest = 0;  // of this lane's first offsets, then of all up to them
#pragma unroll 1
  for (int i = first; i < last; ++i) highest = max(highest, offset(i));
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, highest, d);
    if (lane >= d) highest = max(highest, other);
  }
  const int before = __shfl_up_sync(~0u, highest, 1);
  const int start = max(lane ? before : 0, offset(first));

  int64_t count = 0;
#pragma unroll 1
  for (int i = first, begin = start; i < last; ++i) {
    const int end = max(begin, offset(i + 1));
    count += units(i, end - begin);
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
    for (int i = first, begin = start; found.index < 0; ++i) {
      const int end = max(begin, offset(i + 1));
      if (found.unit < units(i, end - begin))
        found.index = i, found.begin = begin, found.rows = end - begin;
      else
        found.unit -= units(i, end - begin);
      begin = end;
    }
  }
  const int from = __ffs(owner) - 1;
  return {__shfl_sync(~0u, found.index, from), __shfl_sync(~0u, found.begin, from), __shfl_sync(~0u, found.rows, from),
          __shfl_sync(~0u, found.unit, from)};
}

}  // namespace mixtral::cuda
