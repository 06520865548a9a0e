#include "../cpu/ops.h"
#include "check.h"
#include "grouped_gemm_config.h"
#include "moe_routing_config.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_moe_experts_params *params) {
  Check c("mixtral_moe_experts", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_moe_experts_params &p = *params;
  c.tensor("hidden", p.hidden, {kAny, kAny}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  const int64_t tokens = p.hidden.shape[0], hidden = p.hidden.shape[1];
  c.tensor("w_gate_up", p.w_gate_up, {kAny, kAny, hidden}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  const int64_t experts = p.w_gate_up.shape[0];
  c.range("w_gate_up.shape[0] (experts)", experts, 1, MIXTRAL_MAX_EXPERTS);
  c.require(p.w_gate_up.shape[1] % 2 == 0, "w_gate_up.shape[1]: expected an even number of rows (gate, then up), got %lld",
            (long long)p.w_gate_up.shape[1]);
  c.same_dtype("w_gate_up", p.w_gate_up, "hidden", p.hidden);
  c.tensor("w_down", p.w_down, {experts, hidden, p.w_gate_up.shape[1] / 2}, kFloats, kStrided);
  c.same_dtype("w_down", p.w_down, "hidden", p.hidden);
  c.tensor("topk_ids", p.topk_ids, {tokens, kAny}, kI32OrI64, kStrided);
  if (!c.ok()) return c.status();
  const int64_t top_k = p.topk_ids.shape[1];
  c.range("topk_ids.shape[1] (top_k)", top_k, 1, MIXTRAL_MAX_TOP_K);
  if (!c.ok()) return c.status();
  c.range("hidden.shape[0] (tokens)", tokens, 0, INT32_MAX / top_k);
  c.tensor("topk_weights", p.topk_weights, {tokens, top_k}, kF32, kStrided);
  const int maps = present(p.expert_offsets) + present(p.sorted_slots) + present(p.slot_rows);
  c.require(maps == 0 || maps == 3, "expert_offsets, sorted_slots, slot_rows: expected all or none, got %d of 3", maps);
  if (maps == 3) {
    c.tensor("expert_offsets", p.expert_offsets, {experts + 1}, kI32, kContiguous);
    c.tensor("sorted_slots", p.sorted_slots, {tokens * top_k}, kI32, kContiguous);
    c.tensor("slot_rows", p.slot_rows, {tokens, top_k}, kI32, kContiguous);
  }
  c.tensor("out", p.out, {tokens, hidden}, kFloats, kOutput);
  c.same_dtype("out", p.out, "hidden", p.hidden);
  c.cuda_multiple_of_8("hidden.shape[1]", hidden);
  c.cuda_multiple_of_8("w_down.shape[2]", p.w_down.shape[2]);
  return c.status();
}

namespace {

cuda::MoeExpertsConfig config_of(const mixtral_context &context, const mixtral_moe_experts_params &p) {
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1], experts = p.w_gate_up.shape[0];
  // A token goes to an expert once.
  return {routing_config(tokens, top_k, experts), grouped_gemm_config(tokens * top_k, tokens, experts, context.sm_count)};
}

size_t bytes(const mixtral_context &context, const mixtral_moe_experts_params &p) {
  if constexpr (kWithCuda) {
    if (context.device_type == MIXTRAL_DEVICE_CUDA) return cuda::moe_experts_workspace_size(p, config_of(context, p));
  }
  return cpu::moe_experts_workspace_size(context, p);
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_moe_experts_workspace_size(const mixtral_context *context, const mixtral_moe_experts_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::api::bytes(*context, *params));
}

extern "C" mixtral_status mixtral_moe_experts(const mixtral_context *context, const mixtral_moe_experts_params *params,
    void *workspace, size_t workspace_bytes, void *stream) {
  using namespace mixtral;
  return api::run_with_workspace("mixtral_moe_experts", context, params, workspace, workspace_bytes, stream, api::bytes,
                                 [&](const mixtral_context &c, const mixtral_moe_experts_params &p, void *aligned) {
    if constexpr (api::kWithCuda) {
      if (c.device_type == MIXTRAL_DEVICE_CUDA) return cuda::moe_experts(c, p, api::config_of(c, p), aligned, stream);
    }
    return cpu::moe_experts(c, p, aligned);
  });
}
