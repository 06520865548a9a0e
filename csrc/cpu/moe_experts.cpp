// The expert layer in one call: sort (if not given), then in passes of kGemmRows rows both products, then the combine.
//
//   workspace  packed activations of one pass, SwiGLU output of one pass [rows, I], all rows of the second product [S, H],
//              and the three maps when the call sorts. Every part begins on 64 bytes.
//   moved      the weights of the touched experts once, S*H in and 2*S*H out, 2*S*I through the cache
#include "../core/error.h"
#include "../core/workspace.h"
#include "grouped_gemm.h"
#include "ops.h"

namespace mixtral::cpu {
namespace {

struct Layout {
  size_t packed, activated, rows, expert_offsets, sorted_slots, slot_rows, total;  // byte offsets
};

Layout layout(const mixtral_context &context, const mixtral_moe_experts_params &p) {
  const int64_t slots = p.topk_ids.shape[0] * p.topk_ids.shape[1], pass = slots < kGemmRows ? slots : kGemmRows;
  const int64_t experts = p.w_gate_up.shape[0], hidden = p.hidden.shape[1], intermediate = p.w_down.shape[2];
  const size_t element = p.hidden.dtype == MIXTRAL_DTYPE_F32 ? 4 : 2;
  const size_t first = grouped_gemm_pass_workspace_size(context, p.hidden.dtype, slots, experts, hidden);
  const size_t second = grouped_gemm_pass_workspace_size(context, p.hidden.dtype, slots, experts, intermediate);
  const bool sorts = !p.expert_offsets.data;
  Layout at;
  at.packed = 0;
  at.activated = at.packed + aligned(first > second ? first : second);
  at.rows = at.activated + aligned((size_t)(pass * intermediate) * element);
  at.expert_offsets = at.rows + aligned((size_t)(slots * hidden) * element);
  at.sorted_slots = at.expert_offsets + (sorts ? aligned((size_t)(experts + 1) * 4) : 0);
  at.slot_rows = at.sorted_slots + (sorts ? aligned((size_t)slots * 4) : 0);
  at.total = at.slot_rows + (sorts ? aligned((size_t)slots * 4) : 0);
  return at;
}

// A given map is within range: what moe_sort makes always is.
mixtral_status check_map(const char *name, const mixtral_tensor &map, int64_t first, int64_t count, int64_t low) {
  const int32_t *values = (const int32_t *)map.data;
  for (int64_t i = 0; i < first; ++i)
    if (values[i] < low || values[i] >= count)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_moe_experts: %s: expected %lld to %lld, got %d at element %lld",
                  name, (long long)low, (long long)count - 1, values[i], (long long)i);
  return MIXTRAL_OK;
}

}  // namespace

size_t moe_experts_workspace_size(const mixtral_context &context, const mixtral_moe_experts_params &p) {
  return layout(context, p).total;
}

mixtral_status moe_experts(const mixtral_context &context, const mixtral_moe_experts_params &p, void *workspace) {
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1], slots = tokens * top_k;
  const int64_t experts = p.w_gate_up.shape[0], hidden = p.hidden.shape[1], intermediate = p.w_down.shape[2];
  const size_t element = p.hidden.dtype == MIXTRAL_DTYPE_F32 ? 4 : 2;
  const Layout at = layout(context, p);
  char *base = (char *)workspace;

  mixtral_moe_sort_params maps = {};
  maps.topk_ids = p.topk_ids;
  maps.num_experts = (int32_t)experts;
  maps.expert_offsets = p.expert_offsets;
  maps.sorted_slots = p.sorted_slots;
  maps.slot_rows = p.slot_rows;
  mixtral_status status = MIXTRAL_OK;
  if (p.expert_offsets.data) {
    status = check_expert_offsets("mixtral_moe_experts", p.expert_offsets, slots);
    const int64_t used = status == MIXTRAL_OK ? ((const int32_t *)p.expert_offsets.data)[experts] : 0;
    if (status == MIXTRAL_OK) status = check_map("sorted_slots", p.sorted_slots, used, slots, 0);
    if (status == MIXTRAL_OK) status = check_map("slot_rows", p.slot_rows, slots, used, -1);
  } else {
    maps.expert_offsets = contiguous(base + at.expert_offsets, MIXTRAL_DTYPE_I32, experts + 1, 0);
    maps.sorted_slots = contiguous(base + at.sorted_slots, MIXTRAL_DTYPE_I32, slots, 0);
    maps.slot_rows = contiguous(base + at.slot_rows, MIXTRAL_DTYPE_I32, tokens, top_k);
    status = moe_sort(context, maps);
  }
  if (status != MIXTRAL_OK) return status;

  const int32_t *offsets = (const int32_t *)maps.expert_offsets.data;
  GroupedGemm up = {};
  up.dtype = p.hidden.dtype;
  up.swiglu = true;
  up.n = intermediate;
  up.k = hidden;
  up.a = p.hidden.data;
  up.a_stride = p.hidden.stride[0];
  up.a_rows = (const int32_t *)maps.sorted_slots.data;
  up.a_rows_divisor = top_k;
  up.w = p.w_gate_up.data;
  up.w_expert_stride = p.w_gate_up.stride[0];
  up.w_stride = p.w_gate_up.stride[1];
  up.expert_offsets = offsets;
  up.experts = (int32_t)experts;
  up.out = base + at.activated;
  up.out_stride = intermediate;
  GroupedGemm down = up;
  down.swiglu = false;
  down.n = hidden;
  down.k = intermediate;
  down.a = up.out;
  down.a_stride = intermediate;
  down.a_rows = nullptr;
  down.w = p.w_down.data;
  down.w_expert_stride = p.w_down.stride[0];
  down.w_stride = p.w_down.stride[1];
  down.out_stride = hidden;
  for (int64_t row = 0; row < offsets[experts]; row += kGemmRows) {
    up.row_begin = down.row_begin = row;
    up.row_end = down.row_end = row + kGemmRows < offsets[experts] ? row + kGemmRows : offsets[experts];
    down.out = base + at.rows + (size_t)(row * hidden) * element;
    grouped_gemm_pass(context, up, base + at.packed);
    grouped_gemm_pass(context, down, base + at.packed);
  }

  mixtral_moe_combine_params combine = {};
  combine.rows = contiguous(base + at.rows, p.hidden.dtype, slots, hidden);
  combine.slot_rows = maps.slot_rows;
  combine.topk_weights = p.topk_weights;
  combine.out = p.out;
  return moe_combine(context, combine);
}

}  // namespace mixtral::cpu
