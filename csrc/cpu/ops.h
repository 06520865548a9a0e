// The CPU backend as api/ calls it. Params are validated as far as shapes go; each function first checks the values of
// its index arrays and returns an error before it writes anything. `workspace` is 64-byte aligned and at least
// <op>_workspace_size bytes long; ops without such a function need none.
#pragma once
#include "../core/context.h"

namespace mixtral::cpu {

mixtral_status moe_gate(const mixtral_context &context, const mixtral_moe_gate_params &p);
mixtral_status moe_sort(const mixtral_context &context, const mixtral_moe_sort_params &p);
mixtral_status moe_permute(const mixtral_context &context, const mixtral_moe_permute_params &p);
mixtral_status moe_combine(const mixtral_context &context, const mixtral_moe_combine_params &p);
mixtral_status apply_rope(const mixtral_context &context, const mixtral_apply_rope_params &p);

size_t grouped_gemm_workspace_size(const mixtral_context &context, const mixtral_grouped_gemm_params &p);
mixtral_status grouped_gemm(const mixtral_context &context, const mixtral_grouped_gemm_params &p, void *workspace);

size_t grouped_gemm_swiglu_workspace_size(const mixtral_context &context, const mixtral_grouped_gemm_swiglu_params &p);
mixtral_status grouped_gemm_swiglu(const mixtral_context &context, const mixtral_grouped_gemm_swiglu_params &p,
                                   void *workspace);

size_t moe_experts_workspace_size(const mixtral_context &context, const mixtral_moe_experts_params &p);
mixtral_status moe_experts(const mixtral_context &context, const mixtral_moe_experts_params &p, void *workspace);

size_t sliding_window_attention_workspace_size(const mixtral_context &context,
                                               const mixtral_sliding_window_attention_params &p);
mixtral_status sliding_window_attention(const mixtral_context &context,
                                        const mixtral_sliding_window_attention_params &p, void *workspace);

size_t rolling_attention_workspace_size(const mixtral_context &context, const mixtral_rolling_attention_params &p);
mixtral_status rolling_attention(const mixtral_context &context, const mixtral_rolling_attention_params &p,
                                 void *workspace);

}  // namespace mixtral::cpu
