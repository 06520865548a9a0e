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

size_t bytes(const mixtral_context &context, const mixtral_moe_sort_params &p) {
  return context.device_type == MIXTRAL_DEVICE_CUDA ? config_of(p).workspace_bytes : 0;
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_moe_sort_workspace_size(const mixtral_context *context, const mixtral_moe_sort_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::api::bytes(*context, *params));
}

extern "C" mixtral_status mixtral_moe_sort(const mixtral_context *context, const mixtral_moe_sort_params *params, void *workspace,
    size_t workspace_bytes, void *stream) {
  using namespace mixtral;
  return api::run_with_workspace("mixtral_moe_sort", context, params, workspace, workspace_bytes, stream, api::bytes,
                                 [&](const mixtral_context &c, const mixtral_moe_sort_params &p, void *aligned) {
    if constexpr (api::kWithCuda) {
      if (c.device_type == MIXTRAL_DEVICE_CUDA) return cuda::moe_sort(c, p, api::config_of(p), aligned, stream);
    }
    return cpu::moe_sort(c, p);
  });
}
