// In place of csrc/cpu and core/cpu_features.cpp: this build of the library runs CUDA contexts only.
#include "../../../csrc/core/cpu_features.h"
#include "../../../csrc/core/error.h"
#include "../../../csrc/cpu/ops.h"

namespace mixtral {

bool cpu_has(mixtral_arch arch) { return arch == MIXTRAL_ARCH_CPU_PORTABLE; }

namespace cpu {
namespace {

mixtral_status refuse() { return fail(MIXTRAL_ERROR_NOT_SUPPORTED, "the virtual GPU build has no CPU kernels"); }

}  // namespace

mixtral_status moe_gate(const mixtral_context &, const mixtral_moe_gate_params &) { return refuse(); }
mixtral_status moe_sort(const mixtral_context &, const mixtral_moe_sort_params &) { return refuse(); }
mixtral_status moe_permute(const mixtral_context &, const mixtral_moe_permute_params &) { return refuse(); }
mixtral_status moe_combine(const mixtral_context &, const mixtral_moe_combine_params &) { return refuse(); }
mixtral_status apply_rope(const mixtral_context &, const mixtral_apply_rope_params &) { return refuse(); }
size_t grouped_gemm_workspace_size(const mixtral_context &, const mixtral_grouped_gemm_params &) { return 0; }
mixtral_status grouped_gemm(const mixtral_context &, const mixtral_grouped_gemm_params &, void *) { return refuse(); }
size_t grouped_gemm_swiglu_workspace_size(const mixtral_context &, const mixtral_grouped_gemm_swiglu_params &) { return 0; }
mixtral_status grouped_gemm_swiglu(const mixtral_context &, const mixtral_grouped_gemm_swiglu_params &, void *) { return refuse(); }
size_t moe_experts_workspace_size(const mixtral_context &, const mixtral_moe_experts_params &) { return 0; }
mixtral_status moe_experts(const mixtral_context &, const mixtral_moe_experts_params &, void *) { return refuse(); }
size_t sliding_window_attention_workspace_size(const mixtral_context &, const mixtral_sliding_window_attention_params &) { return 0; }
mixtral_status sliding_window_attention(const mixtral_context &, const mixtral_sliding_window_attention_params &, void *) { return refuse(); }
size_t rolling_attention_workspace_size(const mixtral_context &, const mixtral_rolling_attention_params &) { return 0; }
mixtral_status rolling_attention(const mixtral_context &, const mixtral_rolling_attention_params &, void *) { return refuse(); }

}  // namespace cpu
}  // namespace mixtral
