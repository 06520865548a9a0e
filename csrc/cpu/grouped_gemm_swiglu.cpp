// The first product of an expert layer with its activation; the work is grouped_gemm.cpp's with gate and up rows paired.
#include "grouped_gemm.h"
#include "ops.h"

namespace mixtral::cpu {

size_t grouped_gemm_swiglu_workspace_size(const mixtral_context &context, const mixtral_grouped_gemm_swiglu_params &p) {
  return grouped_gemm_pass_workspace_size(context, p.a.dtype, p.out.shape[0], p.w_gate_up.shape[0], p.a.shape[1]);
}

mixtral_status grouped_gemm_swiglu(const mixtral_context &context, const mixtral_grouped_gemm_swiglu_params &p,
                                   void *workspace) {
  return grouped_gemm_op(context, "mixtral_grouped_gemm_swiglu", true, p.a, p.w_gate_up, p.expert_offsets, p.a_rows,
                         p.a_rows_divisor, p.out, workspace);
}

}  // namespace mixtral::cpu
