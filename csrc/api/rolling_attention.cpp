#include "../cpu/ops.h"
#include "../cuda/ops.h"
#include "attention_config.h"
#include "check.h"

namespace mixtral::api {

mixtral_status check(const mixtral_context *context, const mixtral_rolling_attention_params *params) {
  Check c("mixtral_rolling_attention", context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const mixtral_rolling_attention_params &p = *params;
  c.require(p.reserved == 0, "reserved: expected 0, got %d", p.reserved);
  c.tensor("q", p.q, {kAny, kAny, kAny}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  const int64_t tokens = p.q.shape[0], heads = p.q.shape[1], head_dim = p.q.shape[2];
  c.require(head_dim == 64 || head_dim == 128, "q: expected head dim 64 or 128, got %lld", (long long)head_dim);
  c.range("q.shape[0] (tokens)", tokens, 0, INT32_MAX);

  c.tensor("k_cache", p.k_cache, {kAny, kAny, kAny, head_dim}, kFloats, kOutput);
  if (!c.ok()) return c.status();
  const int64_t slots = p.k_cache.shape[0], capacity = p.k_cache.shape[1], key_heads = p.k_cache.shape[2];
  c.tensor("v_cache", p.v_cache, {slots, capacity, key_heads, head_dim}, kFloats, kOutput);
  c.same_dtype("k_cache", p.k_cache, "q", p.q);
  c.same_dtype("v_cache", p.v_cache, "q", p.q);
  c.range("k_cache.shape[0] (slots)", slots, 0, INT32_MAX);
  c.range("k_cache.shape[1] (capacity)", capacity, 1, INT32_MAX);
  c.require(key_heads >= 1 && heads % key_heads == 0,
            "q: expected a number of heads that is a multiple of k_cache's %lld, got %lld", (long long)key_heads,
            (long long)heads);

  const bool append = present(p.k);
  c.require(append == present(p.v), "k, v: expected both or none, got %s", append ? "k alone" : "v alone");
  if (append) {
    c.tensor("k", p.k, {tokens, key_heads, head_dim}, kFloats, kStrided);
    c.tensor("v", p.v, {tokens, key_heads, head_dim}, kFloats, kStrided);
    c.same_dtype("k", p.k, "q", p.q);
    c.same_dtype("v", p.v, "q", p.q);
  }

  c.tensor("cu_seqlens_q", p.cu_seqlens_q, {kAny}, kI32, kContiguous);
  if (!c.ok()) return c.status();
  c.range("cu_seqlens_q.shape[0]", p.cu_seqlens_q.shape[0], 1, INT32_MAX);
  const int64_t sequences = p.cu_seqlens_q.shape[0] - 1;
  c.tensor("cache_lengths", p.cache_lengths, {sequences}, kI32, kContiguous);
  if (present(p.cache_slots))
    c.tensor("cache_slots", p.cache_slots, {sequences}, kI32, kContiguous);
  else
    c.require(sequences <= slots, "k_cache.shape[0] (slots): expected at least the %lld sequences, got %lld",
              (long long)sequences, (long long)slots);

  c.range("max_seqlen_q", p.max_seqlen_q, 0, INT32_MAX);
  c.range("max_cache_length", p.max_cache_length, -1, INT32_MAX);
  c.range("window", p.window, 0, capacity);
  const bool cuda = context->device_type == MIXTRAL_DEVICE_CUDA;  // where only the declared maxima can be checked
  if (p.window == 0 || !append)
    c.require(!cuda || p.max_seqlen_q > 0 || tokens == 0, "max_seqlen_q: expected a value of 1 or more on CUDA %s, got 0",
              append ? "without a window" : "without k and v");
  if (p.window == 0)
    c.require(!cuda || p.max_cache_length >= 0, "max_cache_length: expected a value of 0 or more on CUDA without a window, got -1");
  if (!append && p.window > 0 && p.max_seqlen_q > 0)
    c.require(p.window + p.max_seqlen_q - 1 <= capacity,
              "window: expected window + max_seqlen_q - 1 <= %lld (capacity) without k and v, got %lld + %lld - 1",
              (long long)capacity, (long long)p.window, (long long)p.max_seqlen_q);
  if (p.window == 0 && p.max_seqlen_q > 0 && p.max_cache_length >= 0)
    c.require(p.max_cache_length + p.max_seqlen_q <= capacity,
              "max_cache_length: expected max_cache_length + max_seqlen_q <= %lld (capacity) without a window, got %lld + %lld",
              (long long)capacity, (long long)p.max_cache_length, (long long)p.max_seqlen_q);
  c.require(p.softmax_scale >= -1e30 && p.softmax_scale <= 1e30, "softmax_scale: expected a finite number, got %g",
            p.softmax_scale);
  c.require(p.rope_theta == 0 || (p.rope_theta >= 1e-30 && p.rope_theta <= 1e30),
            "rope_theta: expected 0 or a number from 1e-30 to 1e30, got %g", p.rope_theta);
  c.tensor("out", p.out, {tokens, heads, head_dim}, kFloats, kOutput);
  c.same_dtype("out", p.out, "q", p.q);
  if (present(p.lse)) c.tensor("lse", p.lse, {heads, tokens}, kF32, kContiguous);
  if (c.ok()) c.range("out: rows (tokens * heads / heads of k_cache)", tokens * (heads / key_heads), 0, INT32_MAX);
  return c.status();
}

namespace {

cuda::Attention attention_of(const mixtral_context &context, const mixtral_rolling_attention_params &p) {
  cuda::Attention a = {};
  set_softmax(a, p.softmax_scale, p.window, p.q.shape[2]);
  a.dtype = p.q.dtype;
  a.key_heads = (int32_t)p.k_cache.shape[2];
  a.group = (int32_t)(p.q.shape[1] / p.k_cache.shape[2]);
  a.sequences = (int32_t)(p.cu_seqlens_q.shape[0] - 1);
  a.query_tokens = (int32_t)p.q.shape[0];
  a.longest_queries = (int32_t)(p.max_seqlen_q && p.max_seqlen_q < p.q.shape[0] ? p.max_seqlen_q : p.q.shape[0]);
  a.overlaps = context.overlaps_kernels;
  a.q = cuda::packed_heads(p.q);
  a.out = cuda::packed_heads(p.out);
  a.lse = (float *)p.lse.data;
  a.lse_head = p.q.shape[0];
  a.cu_seqlens_q = (const int32_t *)p.cu_seqlens_q.data;
  a.k_ring = cuda::batched_heads(p.k_cache);
  a.v_ring = cuda::batched_heads(p.v_cache);
  a.slots = (int32_t)p.k_cache.shape[0];
  a.capacity = (int32_t)p.k_cache.shape[1];
  a.longest_cache = p.max_cache_length >= 0 ? (int32_t)p.max_cache_length : INT32_MAX;
  a.cache_lengths = (const int32_t *)p.cache_lengths.data;
  a.cache_slots = (const int32_t *)p.cache_slots.data;
  return a;
}

size_t bytes(const mixtral_context &context, const mixtral_rolling_attention_params &p) {
  if constexpr (kWithCuda) {
    if (context.device_type == MIXTRAL_DEVICE_CUDA) {
      const cuda::Attention a = attention_of(context, p);
      return cuda::rolling_attention_workspace_size(p, a, attention_config(a, context.sm_count));
    }
  }
  return cpu::rolling_attention_workspace_size(context, p);
}

}  // namespace
}  // namespace mixtral::api

extern "C" size_t mixtral_rolling_attention_workspace_size(const mixtral_context *context, const mixtral_rolling_attention_params *params) {
  if (mixtral::api::check(context, params) != MIXTRAL_OK) return 0;
  return mixtral::api::padded(mixtral::api::bytes(*context, *params));
}

extern "C" mixtral_status mixtral_rolling_attention(const mixtral_context *context, const mixtral_rolling_attention_params *params,
    void *workspace, size_t workspace_bytes, void *stream) {
  using namespace mixtral;
  return api::run_with_workspace("mixtral_rolling_attention", context, params, workspace, workspace_bytes, stream, api::bytes,
                                 [&](const mixtral_context &c, const mixtral_rolling_attention_params &p, void *aligned) {
    if constexpr (api::kWithCuda) {
      if (c.device_type == MIXTRAL_DEVICE_CUDA) {
        const cuda::Attention a = api::attention_of(c, p);
        return cuda::rolling_attention(p, a, api::attention_config(a, c.sm_count), aligned, stream);
      }
    }
    return cpu::rolling_attention(c, p, aligned);
  });
}
