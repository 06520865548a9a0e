// The permutation of routing made elsewhere: two serial passes over T*K ids, about 1 ns an id.
#include "moe_routing.h"
#include "ops.h"

namespace mixtral::cpu {

mixtral_status moe_sort(const mixtral_context &, const mixtral_moe_sort_params &p) {
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1], stride = p.topk_ids.stride[0];
  if (p.topk_ids.dtype == MIXTRAL_DTYPE_I64)
    sort_slots((const int64_t *)p.topk_ids.data, stride, tokens, top_k, p.num_experts, p.expert_offsets, p.sorted_slots,
               p.slot_rows);
  else
    sort_slots((const int32_t *)p.topk_ids.data, stride, tokens, top_k, p.num_experts, p.expert_offsets, p.sorted_slots,
               p.slot_rows);
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
