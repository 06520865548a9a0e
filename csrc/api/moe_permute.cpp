#include "../cpu/ops.h"
#include "../cuda/ops.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_moe_permute_params *params) {
  Check c("mixtral_moe_permute", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_moe_permute_params &p = *params;
  c.require(p.reserved == 0, "reserved: expected 0, got %d", p.reserved);
  c.tensor("hidden", p.hidden, {kAny, kAny}, kFloats, kStrided);
  c.tensor("sorted_slots", p.sorted_slots, {kAny}, kI32, kContiguous);
  c.range("top_k", p.top_k, 1, MIXTRAL_MAX_TOP_K);
  if (!c.ok()) return c.status();
  c.range("hidden.shape[0] (tokens)", p.hidden.shape[0], 0, INT32_MAX / p.top_k);
  c.range("sorted_slots.shape[0] (rows)", p.sorted_slots.shape[0], 0, INT32_MAX);
  c.tensor("rows", p.rows, {p.sorted_slots.shape[0], p.hidden.shape[1]}, kFloats, kOutput);
  c.same_dtype("rows", p.rows, "hidden", p.hidden);
  return c.status();
}

}  // namespace mixtral::api

extern "C" size_t mixtral_moe_permute_workspace_size(const mixtral_context *, const mixtral_moe_permute_params *) { return 0; }

extern "C" mixtral_status mixtral_moe_permute(const mixtral_context *context, const mixtral_moe_permute_params *params, void *, size_t,
                                         void *stream) {
  mixtral_status status = mixtral::api::check(context, params);
  if (status == MIXTRAL_OK) status = mixtral::api::check_stream("mixtral_moe_permute", *context, stream);
  if (status != MIXTRAL_OK) return status;
  if constexpr (mixtral::api::kWithCuda) {
    if (context->device_type == MIXTRAL_DEVICE_CUDA) return mixtral::cuda::moe_permute(*context, *params, stream);
  }
  return mixtral::cpu::moe_permute(*context, *params);
}
