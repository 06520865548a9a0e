// Rows in shared memory without bank conflicts.
#pragma once
#include <cstdint>

namespace mixtral::cuda {

// Byte of 16-byte unit `unit` of row `row`: the units of rows of kRowBytes, a multiple of 128, change places by row % 8, so that a unit of
// eight rows that follow each other is in all 32 banks.
template <int kRowBytes>
__device__ inline uint32_t swizzled(unsigned row, unsigned unit) {
  static_assert(kRowBytes % 128 == 0);
  return row * kRowBytes + (unit ^ row % 8) * 16;
}

}  // namespace mixtral::cuda
