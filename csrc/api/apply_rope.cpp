#include "../cpu/ops.h"
#include "../cuda/ops.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_apply_rope_params *params) {
  Check c("mixtral_apply_rope", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_apply_rope_params &p = *params;
  c.require(p.reserved == 0, "reserved: expected 0, got %d", p.reserved);
  c.tensor("q", p.q, {kAny, kAny, kAny}, kFloats, kOutput);
  if (!c.ok()) return c.status();
  const int64_t tokens = p.q.shape[0], head_dim = p.q.shape[2];
  c.require(head_dim == 64 || head_dim == 128, "q: expected head dim 64 or 128, got %lld", (long long)head_dim);
  c.range("q.shape[0] (tokens)", tokens, 0, INT32_MAX);
  if (present(p.k)) {
    c.tensor("k", p.k, {tokens, kAny, head_dim}, kFloats, kOutput);
    c.same_dtype("k", p.k, "q", p.q);
  }
  c.tensor("positions", p.positions, {tokens}, kI32OrI64, kContiguous);
  c.require(p.theta >= 1e-30 && p.theta <= 1e30, "theta: expected a number from 1e-30 to 1e30, got %g", p.theta);
  return c.status();
}

}  // namespace mixtral::api

extern "C" size_t mixtral_apply_rope_workspace_size(const mixtral_context *, const mixtral_apply_rope_params *) { return 0; }

extern "C" mixtral_status mixtral_apply_rope(const mixtral_context *context, const mixtral_apply_rope_params *params, void *, size_t,
                                         void *stream) {
  mixtral_status status = mixtral::api::check(context, params);
  if (status == MIXTRAL_OK) status = mixtral::api::check_stream("mixtral_apply_rope", *context, stream);
  if (status != MIXTRAL_OK) return status;
  if constexpr (mixtral::api::kWithCuda) {
    if (context->device_type == MIXTRAL_DEVICE_CUDA) return mixtral::cuda::apply_rope(*context, *params, stream);
  }
  return mixtral::cpu::apply_rope(*context, *params);
}
