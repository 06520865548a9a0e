#include "../cpu/ops.h"
#include "../cuda/ops.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_moe_combine_params *params) {
  Check c("mixtral_moe_combine", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_moe_combine_params &p = *params;
  c.tensor("rows", p.rows, {kAny, kAny}, kFloats, kStrided);
  c.tensor("slot_rows", p.slot_rows, {kAny, kAny}, kI32, kStrided);
  if (!c.ok()) return c.status();
  const int64_t tokens = p.slot_rows.shape[0], top_k = p.slot_rows.shape[1];
  c.range("slot_rows.shape[1] (top_k)", top_k, 1, MIXTRAL_MAX_TOP_K);
  c.range("slot_rows.shape[0] (tokens)", tokens, 0, INT32_MAX);
  c.range("rows.shape[0]", p.rows.shape[0], 0, INT32_MAX);
  c.tensor("topk_weights", p.topk_weights, {tokens, top_k}, kF32, kStrided);
  c.tensor("out", p.out, {tokens, p.rows.shape[1]}, kFloats, kOutput);
  c.same_dtype("out", p.out, "rows", p.rows);
  return c.status();
}

}  // namespace mixtral::api

extern "C" size_t mixtral_moe_combine_workspace_size(const mixtral_context *, const mixtral_moe_combine_params *) { return 0; }

extern "C" mixtral_status mixtral_moe_combine(const mixtral_context *context, const mixtral_moe_combine_params *params, void *, size_t,
                                         void *stream) {
  mixtral_status status = mixtral::api::check(context, params);
  if (status == MIXTRAL_OK) status = mixtral::api::check_stream("mixtral_moe_combine", *context, stream);
  if (status != MIXTRAL_OK) return status;
  if constexpr (mixtral::api::kWithCuda) {
    if (context->device_type == MIXTRAL_DEVICE_CUDA) return mixtral::cuda::moe_combine(*context, *params, false, stream);
  }
  return mixtral::cpu::moe_combine(*context, *params);
}
