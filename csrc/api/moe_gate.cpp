#include "../cpu/ops.h"
#include "check.h"
#include "moe_routing_config.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_moe_gate_params *params) {
  Check c("mixtral_moe_gate", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_moe_gate_params &p = *params;
  c.tensor("router_logits", p.router_logits, {kAny, kAny}, kLogits, kStrided);
  if (!c.ok()) return c.status();
  const int64_t tokens = p.router_logits.shape[0], experts = p.router_logits.shape[1];
  c.range("router_logits.shape[1] (experts)", experts, 1, MIXTRAL_MAX_EXPERTS);
  c.range("top_k", p.top_k, 1, experts < MIXTRAL_MAX_TOP_K ? experts : MIXTRAL_MAX_TOP_K);
  if (!c.ok()) return c.status();
  c.range("router_logits.shape[0] (tokens)", tokens, 0, INT32_MAX / p.top_k);
  c.tensor("topk_weights", p.topk_weights, {tokens, p.top_k}, kF32, kContiguous);
  c.tensor("topk_ids", p.topk_ids, {tokens, p.top_k}, kI32, kContiguous);
  c.tensor("expert_offsets", p.expert_offsets, {experts + 1}, kI32, kContiguous);
  c.tensor("sorted_slots", p.sorted_slots, {tokens * p.top_k}, kI32, kContiguous);
  c.tensor("slot_rows", p.slot_rows, {tokens, p.top_k}, kI32, kContiguous);
  return c.status();
}

namespace {

cuda::RoutingConfig config_of(const mixtral_moe_gate_params &p) {
  return routing_config(p.router_logits.shape[0], p.top_k, p.router_logits.shape[1]);
}

size_t bytes(const mixtral_context &context, const mixtral_moe_gate_params &p) {
  return context.device_type == MIXTRAL_DEVICE_CUDA ? config_of(p).workspace_bytes : 0;
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_moe_gate_workspace_size(const mixtral_context *context, const mixtral_moe_gate_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::api::bytes(*context, *params));
}

extern "C" mixtral_status mixtral_moe_gate(const mixtral_context *context, const mixtral_moe_gate_params *params, void *workspace,
    size_t workspace_bytes, void *stream) {
  using namespace mixtral;
  return api::run_with_workspace("mixtral_moe_gate", context, params, workspace, workspace_bytes, stream, api::bytes,
                                 [&](const mixtral_context &c, const mixtral_moe_gate_params &p, void *aligned) {
    if constexpr (api::kWithCuda) {
      if (c.device_type == MIXTRAL_DEVICE_CUDA) return cuda::moe_gate(c, p, api::config_of(p), aligned, stream);
    }
    return cpu::moe_gate(c, p);
  });
}
