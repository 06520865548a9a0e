// Arrays that an op keeps in its workspace.
#pragma once
#include <cstddef>

#include "../include/mixtral_ext.h"

namespace mixtral {

// Each begins on 64 bytes.
static inline size_t aligned(size_t bytes) { return (bytes + 63) & ~(size_t)63; }

// [rows, columns], or [rows] with columns 0.
static inline mixtral_tensor contiguous(void *data, int32_t dtype, int64_t rows, int64_t columns) {
  mixtral_tensor t = {};
  t.data = data;
  t.dtype = dtype;
  t.ndim = columns ? 2 : 1;
  t.shape[0] = rows;
  t.shape[1] = columns;
  t.stride[0] = columns ? columns : 1;
  t.stride[1] = 1;
  return t;
}

}  // namespace mixtral
