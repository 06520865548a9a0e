#include "../cpu/ops.h"
#include "check.h"

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
  c.cpu_only();
  return c.status();
}

}  // namespace mixtral::api

extern "C" size_t mixtral_moe_gate_workspace_size(const mixtral_context *, const mixtral_moe_gate_params *) { return 0; }

extern "C" mixtral_status mixtral_moe_gate(const mixtral_context *context, const mixtral_moe_gate_params *params, void *, size_t,
                                         void *stream) {
  mixtral_status status = mixtral::api::check(context, params);
  if (status == MIXTRAL_OK) status = mixtral::api::check_stream("mixtral_moe_gate", *context, stream);
  if (status != MIXTRAL_OK) return status;
  return mixtral::cpu::moe_gate(*context, *params);
}
