// Weighted sum of each token's K rows, f32 in slot order, one rounding. (K + 1) * T * H elements moved; a task sums its
// tokens in pieces of 512 columns held in a 2 KB f32 buffer.
#include "../core/error.h"
#include "element.h"
#include "ops.h"

namespace mixtral::cpu {

mixtral_status moe_combine(const mixtral_context &context, const mixtral_moe_combine_params &p) {
  const int64_t tokens = p.out.shape[0], hidden = p.out.shape[1], top_k = p.slot_rows.shape[1], rows = p.rows.shape[0];
  const int32_t *slot_rows = (const int32_t *)p.slot_rows.data;
  const float *weights = (const float *)p.topk_weights.data;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < top_k; ++j) {
      const int32_t r = slot_rows[t * p.slot_rows.stride[0] + j];
      if (r < -1 || r >= rows)
        return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_moe_combine: slot_rows: expected -1 to %lld, got %d at [%lld, %lld]",
                    (long long)rows - 1, r, (long long)t, (long long)j);
    }

  constexpr int64_t kBlock = 4, kColumns = 512;  // tokens a task, columns a piece
  with_float_type(p.rows.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(context, (tokens + kBlock - 1) / kBlock, [&](int64_t block) {
      const int64_t end = block * kBlock + kBlock < tokens ? block * kBlock + kBlock : tokens;
      for (int64_t t = block * kBlock; t < end; ++t)
        for (int64_t column = 0; column < hidden; column += kColumns) {
          const int64_t n = hidden - column < kColumns ? hidden - column : kColumns;
          float sum[kColumns] = {};
          for (int64_t j = 0; j < top_k; ++j) {
            const int32_t r = slot_rows[t * p.slot_rows.stride[0] + j];
            if (r < 0) continue;
            const float weight = weights[t * p.topk_weights.stride[0] + j];
            const T *row = (const T *)p.rows.data + r * p.rows.stride[0] + column;
            for (int64_t i = 0; i < n; ++i) sum[i] += weight * to_float(row[i]);
          }
          T *out = (T *)p.out.data + t * p.out.stride[0] + column;
          for (int64_t i = 0; i < n; ++i) from_float(sum[i], out[i]);
        }
    });
  });
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
