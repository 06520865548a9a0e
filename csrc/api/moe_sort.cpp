#include "../cpu/ops.h"
#include "check.h"
#include "moe_routing_config.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_moe_sort_params *params) {
  Check c("mixtral_moe_sort", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_moe_sort_params &p = *params;
  c.require(p.reserved == 0, "reserved: expected 0, got %d", p.reserved);
  c.tensor("topk_ids", p.topk_ids, {kAny, kAny}, kI32OrI64, kStrided);
  if (!c.ok()) return c.status();
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1];
  c.range("topk_ids.shape[1] (top_k)", top_k, 1, MIXTRAL_MAX_TOP_K);
  c.range("num_experts", p.num_experts, 1, MIXTRAL_MAX_EXPERTS);
  if (!c.ok()) return c.status();
  c.range("topk_ids.shape[0] (tokens)", tokens, 0, INT32_MAX / top_k);
  c.tensor("expert_offsets", p.expert_offsets, {(int64_t)p.num_experts + 1}, kI32, kContiguous);
  c.tensor("sorted_slots", p.sorted_slots, {tokens * top_k}, kI32, kContiguous);
  c.tensor("slot_rows", p.slot_rows, {tokens, top_k}, kI32, kContiguous);
  return c.status();
}

namespace {

cuda::RoutingConfig config_of(const mixtral_moe_sort_params &p) {
  return routing_config(p.topk_ids.shape[0], p.topk_ids.shape[1], p.num_experts);
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_moe_sort_workspace_size(const mixtral_context *context, const mixtral_moe_sort_params *params) {
  using namespace mixtral::api;
  if (check(context, params) != MIXTRAL_OK || context->device_type == MIXTRAL_DEVICE_CPU) return 0;
  return padded(config_of(*params).workspace_bytes);
}

extern "C" mixtral_status mixtral_moe_sort(const mixtral_context *context, const mixtral_moe_sort_params *params, void *given,
                                         size_t given_bytes, void *stream) {
  using namespace mixtral::api;
  mixtral_status status = check(context, params);
  if (status == MIXTRAL_OK) status = check_stream("mixtral_moe_sort", *context, stream);
  if (status != MIXTRAL_OK) return status;
#ifdef MIXTRAL_EXT_WITH_CUDA
  if (context->device_type == MIXTRAL_DEVICE_CUDA) {
    const mixtral::cuda::RoutingConfig config = config_of(*params);
    void *aligned = workspace("mixtral_moe_sort", padded(config.workspace_bytes), given, given_bytes, &status);
    return status == MIXTRAL_OK ? mixtral::cuda::moe_sort(*context, *params, config, aligned, stream) : status;
  }
#endif
  (void)given, (void)given_bytes;  // the CPU needs none
  return mixtral::cpu::moe_sort(*context, *params);
}
