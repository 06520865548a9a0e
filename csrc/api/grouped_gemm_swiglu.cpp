#include "../cpu/ops.h"
#include "check.h"
#include "grouped_gemm_config.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params) {
  return check_grouped("mixtral_grouped_gemm_swiglu", context, params, "w_gate_up", &mixtral_grouped_gemm_swiglu_params::w_gate_up, true);
}

namespace {

size_t bytes(const mixtral_context &context, const mixtral_grouped_gemm_swiglu_params &p) {
  return context.device_type == MIXTRAL_DEVICE_CUDA ? 0 : cpu::grouped_gemm_swiglu_workspace_size(context, p);
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_grouped_gemm_swiglu_workspace_size(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::api::bytes(*context, *params));
}

extern "C" mixtral_status mixtral_grouped_gemm_swiglu(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params,
    void *workspace, size_t workspace_bytes, void *stream) {
  using namespace mixtral;
  return api::run_with_workspace("mixtral_grouped_gemm_swiglu", context, params, workspace, workspace_bytes, stream, api::bytes,
                                 [&](const mixtral_context &c, const mixtral_grouped_gemm_swiglu_params &p, void *aligned) {
    if constexpr (api::kWithCuda) {
      if (c.device_type == MIXTRAL_DEVICE_CUDA) return api::grouped_gemm_cuda("mixtral_grouped_gemm_swiglu", c, p, p.w_gate_up, true, stream);
    }
    return cpu::grouped_gemm_swiglu(c, p, aligned);
  });
}
