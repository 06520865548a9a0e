#include "grouped_gemm.h"

#include "../core/error.h"
#include "element.h"
#include "ops.h"

namespace mixtral::cpu {

mixtral_status check_expert_offsets(const char *op, const mixtral_tensor &expert_offsets, int64_t rows) {
  const int32_t *offsets = (const int32_t *)expert_offsets.data;
  const int64_t experts = expert_offsets.shape[0] - 1;
  if (offsets[0] != 0)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: expert_offsets: expected 0 at [0], got %d", op, offsets[0]);
  for (int64_t e = 0; e < experts; ++e)
    if (offsets[e + 1] < offsets[e] || offsets[e + 1] > rows)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: expert_offsets: expected %d to %lld at [%lld], got %d", op,
                  offsets[e], (long long)rows, (long long)e + 1, offsets[e + 1]);
  return MIXTRAL_OK;
}

mixtral_status check_a_rows(const char *op, const mixtral_tensor &a_rows, int64_t count, int64_t divisor, int64_t a_count) {
  const int32_t *rows = (const int32_t *)a_rows.data;
  for (int64_t r = 0; r < count; ++r)
    if (rows[r] < 0 || rows[r] / divisor >= a_count)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: a_rows: expected 0 to %lld, got %d in row %lld", op,
                  (long long)(a_count * divisor - 1), rows[r], (long long)r);
  return MIXTRAL_OK;
}

size_t grouped_gemm_pass_workspace_size(const mixtral_context &, int32_t, int64_t, int64_t, int64_t) { return 0; }

void grouped_gemm_pass(const mixtral_context &context, const GroupedGemm &g, void *) {
  with_float_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    parallel_for(context, g.n, [&](int64_t n) {
      int32_t e = 0;
      for (int64_t r = g.row_begin; r < g.row_end; ++r) {
        while (r >= g.expert_offsets[e + 1]) ++e;
        const T *a = (const T *)g.a + (g.a_rows ? g.a_rows[r] / g.a_rows_divisor : r - g.row_begin) * g.a_stride;
        const T *w = (const T *)g.w + e * g.w_expert_stride + n * g.w_stride;
        float sum = 0, up = 0;
        for (int64_t i = 0; i < g.k; ++i) sum += to_float(a[i]) * to_float(w[i]);
        if (g.swiglu) {
          for (int64_t i = 0; i < g.k; ++i) up += to_float(a[i]) * to_float(w[g.n * g.w_stride + i]);
          sum = sum / (1 + __builtin_expf(-sum)) * up;
        }
        from_float(sum, ((T *)g.out)[(r - g.row_begin) * g.out_stride + n]);
      }
    });
  });
}

size_t grouped_gemm_workspace_size(const mixtral_context &context, const mixtral_grouped_gemm_params &p) {
  return grouped_gemm_pass_workspace_size(context, p.a.dtype, p.out.shape[0], p.b.shape[0], p.a.shape[1]);
}

mixtral_status grouped_gemm(const mixtral_context &context, const mixtral_grouped_gemm_params &p, void *workspace) {
  return grouped_gemm_op(context, "mixtral_grouped_gemm", false, p.a, p.b, p.expert_offsets, p.a_rows, p.a_rows_divisor,
                         p.out, workspace);
}

mixtral_status grouped_gemm_op(const mixtral_context &context, const char *op, bool swiglu, const mixtral_tensor &a,
                               const mixtral_tensor &w, const mixtral_tensor &expert_offsets, const mixtral_tensor &a_rows,
                               int64_t a_rows_divisor, const mixtral_tensor &out, void *workspace) {
  mixtral_status status = check_expert_offsets(op, expert_offsets, out.shape[0]);
  if (status != MIXTRAL_OK) return status;
  const int64_t experts = w.shape[0];
  const int32_t *offsets = (const int32_t *)expert_offsets.data;
  if (a_rows.data) status = check_a_rows(op, a_rows, offsets[experts], a_rows_divisor, a.shape[0]);
  if (status != MIXTRAL_OK) return status;
  GroupedGemm g = {};
  g.dtype = a.dtype;
  g.swiglu = swiglu;
  g.n = out.shape[1];
  g.k = a.shape[1];
  g.a_stride = a.stride[0];
  g.a_rows = (const int32_t *)a_rows.data;
  g.a_rows_divisor = a_rows_divisor;
  g.w = w.data;
  g.w_expert_stride = w.stride[0];
  g.w_stride = w.stride[1];
  g.expert_offsets = offsets;
  g.experts = (int32_t)experts;
  g.out_stride = out.stride[0];
  const int64_t element = a.dtype == MIXTRAL_DTYPE_F32 ? 4 : 2;
  for (g.row_begin = 0; g.row_begin < offsets[experts]; g.row_begin = g.row_end) {
    g.row_end = g.row_begin + kGemmRows < offsets[experts] ? g.row_begin + kGemmRows : offsets[experts];
    g.a = (const char *)a.data + (g.a_rows ? 0 : g.row_begin * a.stride[0] * element);
    g.out = (char *)out.data + g.row_begin * out.stride[0] * element;
    grouped_gemm_pass(context, g, workspace);
  }
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
