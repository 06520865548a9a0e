// Rotation of the heads of one token, for apply_rope (in place) and rolling_attention (into its workspace).
#pragma once
#include <cstdint>

#include "../include/mixtral_ext.h"

namespace mixtral::cpu {

constexpr int64_t kMaxRopePairs = 64;  // D/2

struct RopeHeads {
  const char *from;
  char *to;  // may equal from
  int64_t from_head, to_head, count;  // bytes between heads, heads
};

// f32, one rounding. `frequencies` has head_dim / 2 entries from rope_frequency().
void rope_token(int32_t dtype, int64_t head_dim, bool interleaved, const float *frequencies, int64_t position,
                const RopeHeads &q, const RopeHeads &k);

// Bytes of an element of a floating-point mixtral_dtype.
inline int64_t element_bytes(int32_t dtype) { return (dtype >> 8 & 0xff) / 8; }
// Bytes between neighbours of a dimension; a stride that the header says is ignored may hold anything and counts as 0.
inline int64_t stride_bytes(const mixtral_tensor &x, int64_t dimension) {
  return x.shape[dimension] > 1 ? x.stride[dimension] * element_bytes(x.dtype) : 0;
}

}  // namespace mixtral::cpu
