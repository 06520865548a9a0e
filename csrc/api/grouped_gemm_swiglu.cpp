#include "../cpu/ops.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params) {
  return check_grouped("mixtral_grouped_gemm_swiglu", context, params, "w_gate_up", &mixtral_grouped_gemm_swiglu_params::w_gate_up, true);
}

}  // namespace mixtral::api

extern "C" size_t mixtral_grouped_gemm_swiglu_workspace_size(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::cpu::grouped_gemm_swiglu_workspace_size(*context, *params));
}

extern "C" mixtral_status mixtral_grouped_gemm_swiglu(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params,
    void *workspace, size_t workspace_bytes, void *stream) {
  return mixtral::api::run_with_workspace("mixtral_grouped_gemm_swiglu", context, params, workspace, workspace_bytes, stream,
                                          mixtral::cpu::grouped_gemm_swiglu_workspace_size, mixtral::cpu::grouped_gemm_swiglu);
}
