#include "../cpu/ops.h"
#include "../cuda/ops.h"
#include "attention_config.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_sliding_window_attention_params *params) {
  Check c("mixtral_sliding_window_attention", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_sliding_window_attention_params &p = *params;
  c.require(present(p.q), "q: expected a tensor, got none");
  c.require(p.q.ndim == 3 || p.q.ndim == 4, "q: expected 3 dimensions (packed) or 4 (batched), got %d", p.q.ndim);
  if (!c.ok()) return c.status();

  const bool packed = p.q.ndim == 3;
  if (packed) {
    c.tensor("q", p.q, {kAny, kAny, kAny}, kFloats, kStrided);
    c.tensor("k", p.k, {kAny, kAny, p.q.shape[2]}, kFloats, kStrided);
    c.tensor("v", p.v, {p.k.shape[0], p.k.shape[1], p.q.shape[2]}, kFloats, kStrided);
  } else {
    c.tensor("q", p.q, {kAny, kAny, kAny, kAny}, kFloats, kStrided);
    c.tensor("k", p.k, {p.q.shape[0], kAny, kAny, p.q.shape[3]}, kFloats, kStrided);
    c.tensor("v", p.v, {p.q.shape[0], p.k.shape[1], p.k.shape[2], p.q.shape[3]}, kFloats, kStrided);
  }
  c.same_dtype("k", p.k, "q", p.q);
  c.same_dtype("v", p.v, "q", p.q);
  if (!c.ok()) return c.status();

  const int64_t *query = p.q.shape + !packed, *key = p.k.shape + !packed;  // [tokens, heads, D]
  c.require(query[2] == 64 || query[2] == 128, "q: expected head dim 64 or 128, got %lld", (long long)query[2]);
  c.require(key[1] >= 1 && query[1] % key[1] == 0, "q: expected a number of heads that is a multiple of k's %lld, got %lld",
            (long long)key[1], (long long)query[1]);
  c.range("q: sequences", packed ? 1 : p.q.shape[0], 0, INT32_MAX);
  c.range("q: tokens", query[0], 0, INT32_MAX);
  c.range("k: tokens", key[0], 0, INT32_MAX);

  const bool bounds = present(p.cu_seqlens_q) || present(p.cu_seqlens_k), ranges = present(p.k_start) || present(p.k_length);
  c.require(!bounds || packed, "cu_seqlens_q, cu_seqlens_k: expected none with a batched q, got some");
  c.require(!ranges || !packed, "k_start, k_length: expected none with a packed q, got some");
  if (bounds) {
    c.tensor("cu_seqlens_q", p.cu_seqlens_q, {kAny}, kI32, kContiguous);
    c.tensor("cu_seqlens_k", p.cu_seqlens_k, {p.cu_seqlens_q.shape[0]}, kI32, kContiguous);
    c.range("cu_seqlens_q.shape[0]", p.cu_seqlens_q.shape[0], 1, INT32_MAX);
  }
  if (present(p.k_start)) c.tensor("k_start", p.k_start, {p.q.shape[0]}, kI32, kContiguous);
  if (present(p.k_length)) c.tensor("k_length", p.k_length, {p.q.shape[0]}, kI32, kContiguous);
  c.range("max_seqlen_q", p.max_seqlen_q, 0, INT32_MAX);
  c.range("max_seqlen_k", p.max_seqlen_k, 0, INT32_MAX);
  c.require(bounds || p.max_seqlen_q == 0 || p.max_seqlen_q >= query[0],
            "max_seqlen_q: expected 0 or at least %lld (tokens of q) without cu_seqlens_q, got %lld", (long long)query[0],
            (long long)p.max_seqlen_q);
  c.require(bounds || ranges || p.max_seqlen_k == 0 || p.max_seqlen_k >= key[0],
            "max_seqlen_k: expected 0 or at least %lld (tokens of k) without cu_seqlens_k, got %lld", (long long)key[0],
            (long long)p.max_seqlen_k);
  c.range("window", p.window, 0, INT32_MAX);
  c.require(p.softmax_scale >= -1e30 && p.softmax_scale <= 1e30, "softmax_scale: expected a finite number, got %g",
            p.softmax_scale);

  if (packed) {
    c.tensor("out", p.out, {query[0], query[1], query[2]}, kFloats, kOutput);
    if (present(p.lse)) c.tensor("lse", p.lse, {query[1], query[0]}, kF32, kContiguous);
  } else {
    c.tensor("out", p.out, {p.q.shape[0], query[0], query[1], query[2]}, kFloats, kOutput);
    if (present(p.lse)) c.tensor("lse", p.lse, {p.q.shape[0], query[1], query[0]}, kF32, kContiguous);
  }
  c.same_dtype("out", p.out, "q", p.q);
  const int64_t sequences = packed ? 1 : p.q.shape[0];
  if (c.ok()) c.range("out: rows (tokens * heads / heads of k)", sequences * query[0] * (query[1] / key[1]), 0, INT32_MAX);
  return c.status();
}

namespace {

cuda::Attention attention_of(const mixtral_context &context, const mixtral_sliding_window_attention_params &p) {
  const bool batched = p.q.ndim == 4, bounds = p.cu_seqlens_q.ndim;
  const int64_t *q = p.q.shape + batched, *k = p.k.shape + batched;  // tokens, heads, D
  const auto heads = batched ? cuda::batched_heads : cuda::packed_heads;
  cuda::Attention a = {};
  set_softmax(a, p.softmax_scale, p.window, q[2]);
  a.dtype = p.q.dtype;
  a.key_heads = (int32_t)k[1];
  a.group = (int32_t)(q[1] / k[1]);
  a.sequences = batched ? (int32_t)p.q.shape[0] : bounds ? (int32_t)(p.cu_seqlens_q.shape[0] - 1) : 1;
  a.query_tokens = (int32_t)q[0];
  a.key_tokens = (int32_t)k[0];
  a.longest_queries = (int32_t)(bounds && p.max_seqlen_q && p.max_seqlen_q < q[0] ? p.max_seqlen_q : q[0]);
  a.longest_keys = (int32_t)(p.max_seqlen_k && p.max_seqlen_k < k[0] ? p.max_seqlen_k : k[0]);
  a.overlaps = context.overlaps_kernels;
  a.q = heads(p.q);
  a.k = heads(p.k);
  a.v = heads(p.v);
  a.out = heads(p.out);
  a.lse = (float *)p.lse.data;
  a.lse_sequence = batched ? q[1] * q[0] : 0;
  a.lse_head = q[0];
  a.cu_seqlens_q = (const int32_t *)p.cu_seqlens_q.data;
  a.cu_seqlens_k = (const int32_t *)p.cu_seqlens_k.data;
  a.k_start = (const int32_t *)p.k_start.data;
  a.k_length = (const int32_t *)p.k_length.data;
  return a;
}

size_t bytes(const mixtral_context &context, const mixtral_sliding_window_attention_params &p) {
  if constexpr (kWithCuda) {
    if (context.device_type == MIXTRAL_DEVICE_CUDA) {
      const cuda::Attention a = attention_of(context, p);
      return cuda::attention_workspace_size(a, attention_config(a, context.sm_count));
    }
  }
  return cpu::sliding_window_attention_workspace_size(context, p);
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_sliding_window_attention_workspace_size(const mixtral_context *context, const mixtral_sliding_window_attention_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::api::bytes(*context, *params));
}

extern "C" mixtral_status mixtral_sliding_window_attention(const mixtral_context *context, const mixtral_sliding_window_attention_params *params,
    void *workspace, size_t workspace_bytes, void *stream) {
  using namespace mixtral;
  return api::run_with_workspace("mixtral_sliding_window_attention", context, params, workspace, workspace_bytes, stream, api::bytes,
                                 [&](const mixtral_context &c, const mixtral_sliding_window_attention_params &p, void *aligned) {
    if constexpr (api::kWithCuda) {
      if (c.device_type == MIXTRAL_DEVICE_CUDA) {
        const cuda::Attention a = api::attention_of(c, p);
        return cuda::attention("mixtral_sliding_window_attention", a, api::attention_config(a, c.sm_count), aligned, stream);
      }
    }
    return cpu::sliding_window_attention(c, p, aligned);
  });
}
