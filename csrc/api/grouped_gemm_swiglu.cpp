#include "../cpu/ops.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params) {
  Check c("mixtral_grouped_gemm_swiglu", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_grouped_gemm_swiglu_params &p = *params;
  c.require(p.reserved == 0, "reserved: expected 0, got %d", p.reserved);
  c.tensor("a", p.a, {kAny, kAny}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  c.tensor("w_gate_up", p.w_gate_up, {kAny, kAny, p.a.shape[1]}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  c.same_dtype("w_gate_up", p.w_gate_up, "a", p.a);
  const int64_t experts = p.w_gate_up.shape[0];
  c.range("w_gate_up.shape[0] (experts)", experts, 1, MIXTRAL_MAX_EXPERTS);
  c.require(p.w_gate_up.shape[1] % 2 == 0, "w_gate_up.shape[1]: expected an even number of rows (gate, then up), got %lld",
            (long long)p.w_gate_up.shape[1]);
  c.tensor("expert_offsets", p.expert_offsets, {experts + 1}, kI32, kContiguous);
  int64_t rows = p.a.shape[0];
  if (present(p.a_rows)) {
    c.tensor("a_rows", p.a_rows, {kAny}, kI32, kContiguous);
    rows = p.a_rows.shape[0];
    c.range("a_rows_divisor", p.a_rows_divisor, 1, INT32_MAX);
  } else {
    c.require(p.a_rows_divisor == 1, "a_rows_divisor: expected 1 without a_rows, got %d", p.a_rows_divisor);
  }
  c.range("a.shape[0]", p.a.shape[0], 0, INT32_MAX);
  c.range("out.shape[0] (rows)", rows, 0, INT32_MAX);
  c.tensor("out", p.out, {rows, p.w_gate_up.shape[1] / 2}, kFloats, kOutput);
  c.same_dtype("out", p.out, "a", p.a);
  c.cpu_only();
  return c.status();
}

}  // namespace mixtral::api

extern "C" size_t mixtral_grouped_gemm_swiglu_workspace_size(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::cpu::grouped_gemm_swiglu_workspace_size(*context, *params));
}

extern "C" mixtral_status mixtral_grouped_gemm_swiglu(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params, void *workspace,
                                         size_t workspace_bytes, void *stream) {
  mixtral_status status = mixtral::api::check(context, params);
  if (status == MIXTRAL_OK) status = mixtral::api::check_stream("mixtral_grouped_gemm_swiglu", *context, stream);
  if (status != MIXTRAL_OK) return status;
  const size_t needed = mixtral::api::padded(mixtral::cpu::grouped_gemm_swiglu_workspace_size(*context, *params));
  workspace = mixtral::api::workspace("mixtral_grouped_gemm_swiglu", needed, workspace, workspace_bytes, &status);
  if (status != MIXTRAL_OK) return status;
  return mixtral::cpu::grouped_gemm_swiglu(*context, *params, workspace);
}
