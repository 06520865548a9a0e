// Gather of token rows: 2 * S * H elements moved, one memcpy a row.
#include <cstring>

#include "../core/error.h"
#include "ops.h"

namespace mixtral::cpu {

mixtral_status moe_permute(const mixtral_context &context, const mixtral_moe_permute_params &p) {
  const int64_t tokens = p.hidden.shape[0], rows = p.rows.shape[0];
  const int32_t *slots = (const int32_t *)p.sorted_slots.data;
  for (int64_t r = 0; r < rows; ++r)
    if (slots[r] < -1 || slots[r] >= tokens * p.top_k)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_moe_permute: sorted_slots: expected -1 to %lld, got %d in row %lld",
                  (long long)(tokens * p.top_k - 1), slots[r], (long long)r);

  const size_t element = p.hidden.dtype == MIXTRAL_DTYPE_F32 ? 4 : 2;
  const size_t row_bytes = (size_t)p.hidden.shape[1] * element;
  constexpr int64_t kBlock = 16;  // rows a task
  if (row_bytes == 0) return MIXTRAL_OK;
  parallel_for(context, (rows + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t end = block * kBlock + kBlock < rows ? block * kBlock + kBlock : rows;
    for (int64_t r = block * kBlock; r < end; ++r) {
      if (slots[r] < 0) continue;
      const char *from = (const char *)p.hidden.data + (size_t)(slots[r] / p.top_k * p.hidden.stride[0]) * element;
      memcpy((char *)p.rows.data + (size_t)(r * p.rows.stride[0]) * element, from, row_bytes);
    }
  });
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
