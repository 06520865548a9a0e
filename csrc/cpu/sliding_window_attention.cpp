// Checks the bounds, describes each sequence, and leaves the rest to attention.cpp.
#include "../core/error.h"
#include "attention.h"
#include "ops.h"
#include "rope.h"

namespace mixtral::cpu {
namespace {

constexpr char kOp[] = "mixtral_sliding_window_attention";

attention::Problem problem(const mixtral_sliding_window_attention_params &p) {
  const bool batched = p.q.ndim == 4;
  attention::Problem a = {};
  a.dtype = p.q.dtype;
  a.head_dim = p.q.shape[2 + batched];
  a.query_heads = p.q.shape[1 + batched];
  a.key_heads = p.k.shape[1 + batched];
  a.group = a.query_heads / a.key_heads;
  a.window = p.window;
  a.scale = attention::log2_scale(p.softmax_scale, a.head_dim);
  a.q_token = stride_bytes(p.q, batched);
  a.q_head = stride_bytes(p.q, 1 + batched);
  a.out_token = stride_bytes(p.out, batched);
  a.out_head = stride_bytes(p.out, 1 + batched);
  a.lse_head = p.q.shape[batched];
  return a;
}

attention::Bounds bounds(const mixtral_sliding_window_attention_params &p) {
  const int64_t queries = p.q.shape[0], keys = p.k.shape[0];
  if (p.q.ndim == 4) return {queries, queries * p.q.shape[1], p.q.shape[1], p.k.shape[1]};
  if (p.cu_seqlens_q.ndim == 0) return {1, queries, queries, keys};
  return {p.cu_seqlens_q.shape[0] - 1, queries, p.max_seqlen_q ? p.max_seqlen_q : queries, p.max_seqlen_k ? p.max_seqlen_k : keys};
}

mixtral_status check_ranges(const mixtral_sliding_window_attention_params &p) {
  const int32_t *starts = (const int32_t *)p.k_start.data, *lengths = (const int32_t *)p.k_length.data;
  const int64_t keys = p.k.shape[1];
  for (int64_t b = 0; b < p.q.shape[0]; ++b) {
    const int64_t start = starts ? starts[b] : 0;
    if (start < 0 || start > keys)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: k_start: expected 0 to %lld, got %lld at [%lld]", kOp, (long long)keys,
                  (long long)start, (long long)b);
    if (lengths && (lengths[b] < 0 || lengths[b] > keys - start))
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: k_length: expected 0 to %lld (keys after k_start), got %d at [%lld]", kOp,
                  (long long)(keys - start), lengths[b], (long long)b);
    const int64_t length = lengths ? lengths[b] : keys - start;
    if (p.max_seqlen_k && length > p.max_seqlen_k)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: max_seqlen_k: expected at least %lld (keys of sequence %lld), got %lld", kOp,
                  (long long)length, (long long)b, (long long)p.max_seqlen_k);
  }
  return MIXTRAL_OK;
}

}  // namespace

size_t sliding_window_attention_workspace_size(const mixtral_context &, const mixtral_sliding_window_attention_params &p) {
  return attention::workspace_size(problem(p), bounds(p));
}

mixtral_status sliding_window_attention(const mixtral_context &context, const mixtral_sliding_window_attention_params &p,
                                        void *workspace) {
  const bool batched = p.q.ndim == 4;
  const int32_t *q_bounds = (const int32_t *)p.cu_seqlens_q.data, *k_bounds = (const int32_t *)p.cu_seqlens_k.data;
  mixtral_status status = MIXTRAL_OK;
  if (batched) status = check_ranges(p);
  if (q_bounds) status = attention::check_bounds(kOp, "cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0], p.max_seqlen_q);
  if (q_bounds && status == MIXTRAL_OK) status = attention::check_bounds(kOp, "cu_seqlens_k", p.cu_seqlens_k, p.k.shape[0], p.max_seqlen_k);
  if (status != MIXTRAL_OK) return status;

  const attention::Bounds limits = bounds(p);
  attention::Problem a = problem(p);
  a.sequence_count = limits.sequences;
  a.sequences = attention::sequences(workspace);
  for (int64_t b = 0; b < limits.sequences; ++b) {
    // Offsets of the sequence's first query and key: in batches, tokens.
    int64_t batch = 0, query = 0, key = 0, queries = limits.longest_queries, keys = limits.longest_keys;
    if (batched) {
      batch = b;
      key = p.k_start.data ? ((const int32_t *)p.k_start.data)[b] : 0;
      keys = p.k_length.data ? ((const int32_t *)p.k_length.data)[b] : keys - key;
    } else if (q_bounds) {
      query = q_bounds[b];
      queries = q_bounds[b + 1] - query;
      key = k_bounds[b];
      keys = k_bounds[b + 1] - key;
    }
    const auto at = [&](const mixtral_tensor &x, int64_t token) {
      return (char *)x.data + (batched ? batch * stride_bytes(x, 0) : 0) + token * stride_bytes(x, batched);
    };
    attention::Sequence &s = a.sequences[b];
    s = {};
    s.queries = queries;
    s.position = keys - queries;
    s.q = at(p.q, query);
    s.out = at(p.out, query);
    if (p.lse.data) s.lse = (float *)p.lse.data + batch * a.query_heads * a.lse_head + query;
    s.pieces[0] = {0, keys, at(p.k, key), at(p.v, key), stride_bytes(p.k, batched), stride_bytes(p.v, batched),
                   stride_bytes(p.k, 1 + batched), stride_bytes(p.v, 1 + batched)};
  }
  attention::run(context, a, limits, workspace);
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
