#include "../cpu/ops.h"
#include "check.h"

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
  c.cpu_only();
  return c.status();
}

}  // namespace mixtral::api

extern "C" size_t mixtral_moe_sort_workspace_size(const mixtral_context *, const mixtral_moe_sort_params *) { return 0; }

extern "C" mixtral_status mixtral_moe_sort(const mixtral_context *context, const mixtral_moe_sort_params *params, void *, size_t,
                                         void *stream) {
  mixtral_status status = mixtral::api::check(context, params);
  if (status == MIXTRAL_OK) status = mixtral::api::check_stream("mixtral_moe_sort", *context, stream);
  if (status != MIXTRAL_OK) return status;
  return mixtral::cpu::moe_sort(*context, *params);
}
