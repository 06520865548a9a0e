// Attention over keys that lie in k and v: what the kernels need of the params.
#include "ops.h"

namespace mixtral::cuda {
namespace {

Attention attention_of(const mixtral_context &context, const mixtral_sliding_window_attention_params &p) {
  const bool batched = p.q.ndim == 4;
  const int64_t *q = p.q.shape + batched, *k = p.k.shape + batched;  // tokens, heads, D
  const auto heads = batched ? batched_heads : packed_heads;
  Attention a = {};
  set_softmax(a, p.softmax_scale, p.window, q[2]);
  a.dtype = p.q.dtype;
  a.key_heads = (int32_t)k[1];
  a.group = (int32_t)(q[1] / k[1]);
  a.sequences = batched ? (int32_t)p.q.shape[0] : p.cu_seqlens_q.ndim ? (int32_t)(p.cu_seqlens_q.shape[0] - 1) : 1;
  a.query_tokens = (int32_t)q[0];
  a.key_tokens = (int32_t)k[0];
  a.longest_keys = p.max_seqlen_k ? (int32_t)p.max_seqlen_k : INT32_MAX;
  a.longest_queries = (int32_t)(p.cu_seqlens_q.ndim && p.max_seqlen_q ? p.max_seqlen_q : q[0]);
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

}  // namespace

size_t sliding_window_attention_workspace_size(const mixtral_context &context, const mixtral_sliding_window_attention_params &p,
                                               const AttentionConfig &config) {
  return attention_workspace_size(attention_of(context, p), config);
}

mixtral_status sliding_window_attention(const mixtral_context &context, const mixtral_sliding_window_attention_params &p,
                                        const AttentionConfig &config, void *workspace, void *stream) {
  return attention("mixtral_sliding_window_attention", attention_of(context, p), config, workspace, stream);
}

}  // namespace mixtral::cuda
