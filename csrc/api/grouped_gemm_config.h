// Which kernel and tiles a grouped product on CUDA gets: a pure function of shapes and the device.
#pragma once
#include "../cuda/ops.h"

namespace mixtral::api {

// `rows`: of all experts together, at most; `expert_rows`: that one expert is expected to have at most (more are right too, but read
// the weights again).
cuda::GroupedGemmConfig grouped_gemm_config(int64_t rows, int64_t expert_rows, int64_t experts, int32_t sm_count);

// A checked grouped_gemm or grouped_gemm_swiglu on CUDA; `w` is its weights.
template <class Params>
mixtral_status grouped_gemm_cuda(const char *op, const mixtral_context &context, const Params &p, const mixtral_tensor &w, bool swiglu,
                                 void *stream) {
  cuda::GroupedGemm g = {};
  g.dtype = p.a.dtype;
  g.swiglu = swiglu;
  g.experts = (int32_t)w.shape[0];
  g.rows = (int32_t)p.out.shape[0];
  g.n = p.out.shape[1];
  g.k = p.a.shape[1];
  g.a = p.a.data;
  g.a_rows = (const int32_t *)p.a_rows.data;
  g.a_rows_divisor = p.a_rows_divisor;
  g.a_count = (int32_t)p.a.shape[0];
  g.w = w.data;
  g.expert_offsets = (const int32_t *)p.expert_offsets.data;
  g.out = p.out.data;
  g.a_stride = p.a.stride[0];
  g.w_expert_stride = w.stride[0];
  g.w_stride = w.stride[1];
  g.out_stride = p.out.stride[0];
  const int64_t expert_rows = ((int64_t)g.rows + g.a_rows_divisor - 1) / g.a_rows_divisor;  // each of the `divisor` has its own expert
  return cuda::grouped_gemm(op, g, grouped_gemm_config(g.rows, expert_rows, g.experts, context.sm_count), stream);
}

}  // namespace mixtral::api
