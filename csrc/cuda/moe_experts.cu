// The expert layer: sort (if the maps are not given), GEMM 1 with SwiGLU, GEMM 2, combine; 3 launches with maps, one or two more without.
//
//   workspace  SwiGLU output [S, I] and rows of the second product [S, H], and without maps the three of them and what the sort needs;
//              each part begins on 64 bytes
//   overlap    on Hopper GEMM 2 and the combine are launched early: the first weights are under way when GEMM 1 ends
//   moved      touched experts' weights; hidden gathered by GEMM 1, 2 * S * I and 2 * S * H through memory
#include "../core/workspace.h"
#include "ops.h"

namespace mixtral::cuda {
namespace {

struct Layout {
  size_t activated, rows, expert_offsets, sorted_slots, slot_rows, sort, total;  // byte offsets
};

Layout layout(const mixtral_moe_experts_params &p, const MoeExpertsConfig &config) {
  const int64_t slots = p.topk_ids.shape[0] * p.topk_ids.shape[1], experts = p.w_gate_up.shape[0];
  const bool sorts = !p.expert_offsets.ndim;
  Layout at = {};
  at.rows = at.activated + aligned((size_t)(slots * p.w_down.shape[2]) * 2);
  at.expert_offsets = at.rows + aligned((size_t)(slots * p.hidden.shape[1]) * 2);
  at.sorted_slots = at.expert_offsets + (sorts ? aligned((size_t)(experts + 1) * 4) : 0);
  at.slot_rows = at.sorted_slots + (sorts ? aligned((size_t)slots * 4) : 0);
  at.sort = at.slot_rows + (sorts ? aligned((size_t)slots * 4) : 0);
  at.total = at.sort + (sorts ? config.sort.workspace_bytes : 0);
  return at;
}

// moe_sort's params for the maps that the call makes itself, at `base`.
mixtral_moe_sort_params own_maps(const mixtral_moe_experts_params &p, const Layout &at, char *base) {
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1], experts = p.w_gate_up.shape[0];
  mixtral_moe_sort_params maps = {};
  maps.struct_size = sizeof maps;
  maps.topk_ids = p.topk_ids;
  maps.num_experts = (int32_t)experts;
  maps.expert_offsets = contiguous(base + at.expert_offsets, MIXTRAL_DTYPE_I32, experts + 1, 0);
  maps.sorted_slots = contiguous(base + at.sorted_slots, MIXTRAL_DTYPE_I32, tokens * top_k, 0);
  maps.slot_rows = contiguous(base + at.slot_rows, MIXTRAL_DTYPE_I32, tokens, top_k);
  return maps;
}

}  // namespace

size_t moe_experts_workspace_size(const mixtral_moe_experts_params &p, const MoeExpertsConfig &config) { return layout(p, config).total; }

mixtral_status moe_experts(const mixtral_context &context, const mixtral_moe_experts_params &p, const MoeExpertsConfig &config,
                           void *workspace, void *stream) {
  constexpr const char *kOp = "mixtral_moe_experts";
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1], slots = tokens * top_k;
  const int64_t hidden = p.hidden.shape[1], intermediate = p.w_down.shape[2];
  if (tokens == 0 || hidden == 0) return MIXTRAL_OK;
  const Layout at = layout(p, config);
  char *base = (char *)workspace;

  mixtral_tensor expert_offsets = p.expert_offsets, sorted_slots = p.sorted_slots, slot_rows = p.slot_rows;
  mixtral_status status = MIXTRAL_OK;
  if (!expert_offsets.ndim) {
    const mixtral_moe_sort_params maps = own_maps(p, at, base);
    status = moe_sort(context, maps, config.sort, base + at.sort, stream);
    expert_offsets = maps.expert_offsets, sorted_slots = maps.sorted_slots, slot_rows = maps.slot_rows;
  }

  GroupedGemm up = {};
  up.dtype = p.hidden.dtype;
  up.swiglu = true;
  up.experts = (int32_t)p.w_gate_up.shape[0];
  up.rows = (int32_t)slots;
  up.n = intermediate;
  up.k = hidden;
  up.a = p.hidden.data;
  up.a_rows = (const int32_t *)sorted_slots.data;
  up.a_rows_divisor = (int32_t)top_k;
  up.a_count = (int32_t)tokens;
  up.w = p.w_gate_up.data;
  up.expert_offsets = (const int32_t *)expert_offsets.data;
  up.out = base + at.activated;
  up.a_stride = p.hidden.stride[0];
  up.w_expert_stride = p.w_gate_up.stride[0];
  up.w_stride = p.w_gate_up.stride[1];
  up.out_stride = intermediate;

  GroupedGemm down = up;
  down.swiglu = false;
  down.early = context.overlaps_kernels && intermediate > 0;  // else there is no GEMM 1 between it and what writes the maps
  down.n = hidden;
  down.k = intermediate;
  down.a = up.out;
  down.a_rows = nullptr;
  down.a_rows_divisor = 1;
  down.a_count = (int32_t)slots;
  down.w = p.w_down.data;
  down.out = base + at.rows;
  down.a_stride = up.out_stride;
  down.w_expert_stride = p.w_down.stride[0];
  down.w_stride = p.w_down.stride[1];
  down.out_stride = hidden;

  mixtral_moe_combine_params combine = {};
  combine.rows = contiguous(down.out, p.hidden.dtype, slots, hidden);
  combine.slot_rows = slot_rows;
  combine.topk_weights = p.topk_weights;
  combine.out = p.out;

  if (status == MIXTRAL_OK) status = grouped_gemm(kOp, up, config.gemm, stream);
  if (status == MIXTRAL_OK) status = grouped_gemm(kOp, down, config.gemm, stream);
  return status == MIXTRAL_OK ? moe_combine(context, combine, context.overlaps_kernels, stream) : status;
}

}  // namespace mixtral::cuda
