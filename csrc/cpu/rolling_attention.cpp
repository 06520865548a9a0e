// Checks the values, rotates q and k into the workspace if asked to, describes each sequence as at most two pieces of its
// ring and the chunk itself, attends, and only then stores the last tokens of every chunk.
//
// Workspace: [attention.cpp's | rotated q | rotated k | one bit a cache slot, to find one used twice].
#include "../core/error.h"
#include "../core/rope.h"
#include "attention.h"
#include "ops.h"
#include "rope.h"

#include <cstring>

namespace mixtral::cpu {
namespace {

constexpr char kOp[] = "mixtral_rolling_attention";

struct Layout {
  attention::Bounds bounds;
  int64_t rotated_q, rotated_k, slot_bits, total;  // byte offsets
};

attention::Problem problem(const mixtral_rolling_attention_params &p) {
  const int64_t bytes = element_bytes(p.q.dtype);
  attention::Problem a = {};
  a.dtype = p.q.dtype;
  a.head_dim = p.q.shape[2];
  a.query_heads = p.q.shape[1];
  a.key_heads = p.k_cache.shape[2];
  a.group = a.query_heads / a.key_heads;
  a.window = p.window;
  a.scale = attention::log2_scale(p.softmax_scale, a.head_dim);
  a.q_token = p.rope_theta > 0 ? a.query_heads * a.head_dim * bytes : stride_bytes(p.q, 0);
  a.q_head = p.rope_theta > 0 ? a.head_dim * bytes : stride_bytes(p.q, 1);
  a.out_token = stride_bytes(p.out, 0);
  a.out_head = stride_bytes(p.out, 1);
  a.lse_head = p.q.shape[0];
  return a;
}

Layout layout(const mixtral_rolling_attention_params &p) {
  const auto aligned = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const attention::Problem a = problem(p);
  const int64_t tokens = p.q.shape[0], capacity = p.k_cache.shape[1], bytes = element_bytes(a.dtype);
  const int64_t longest = p.max_seqlen_q ? p.max_seqlen_q : tokens;
  const int64_t cached = p.max_cache_length >= 0 && p.max_cache_length < capacity ? p.max_cache_length : capacity;
  Layout l;
  l.bounds = {p.cu_seqlens_q.shape[0] - 1, tokens, longest, cached + longest};
  l.rotated_q = aligned((int64_t)attention::workspace_size(a, l.bounds));
  l.rotated_k = l.rotated_q + (p.rope_theta > 0 ? aligned(tokens * a.query_heads * a.head_dim * bytes) : 0);
  l.slot_bits = l.rotated_k + (p.rope_theta > 0 && p.k.ndim ? aligned(tokens * a.key_heads * a.head_dim * bytes) : 0);
  l.total = l.slot_bits + (p.cache_slots.ndim ? aligned(p.k_cache.shape[0] / 8 + 1) : 0);
  return l;
}

mixtral_status check_values(const mixtral_rolling_attention_params &p, uint8_t *slot_bits) {
  const int64_t capacity = p.k_cache.shape[1], slots = p.k_cache.shape[0];
  const mixtral_status status = attention::check_bounds(kOp, "cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0], p.max_seqlen_q);
  if (status != MIXTRAL_OK) return status;
  const int32_t *bounds = (const int32_t *)p.cu_seqlens_q.data, *lengths = (const int32_t *)p.cache_lengths.data;
  const int32_t *cache_slots = (const int32_t *)p.cache_slots.data;
  if (p.cache_slots.ndim) memset(slot_bits, 0, (size_t)slots / 8 + 1);
  for (int64_t b = 0; b < p.cache_lengths.shape[0]; ++b) {
    const int64_t n = bounds[b + 1] - bounds[b], length = lengths[b];
    if (length < 0 || length + n > INT32_MAX)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: cache_lengths: expected 0 to %lld (2^31 - 1 less the %lld new tokens), got %lld at [%lld]",
                  kOp, INT32_MAX - (long long)n, (long long)n, (long long)length, (long long)b);
    if (p.max_cache_length >= 0 && length > p.max_cache_length)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: cache_lengths: expected at most %lld (max_cache_length), got %lld at [%lld]", kOp,
                  (long long)p.max_cache_length, (long long)length, (long long)b);
    if (p.window == 0 && length + n > capacity)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT,
                  "%s: cache_lengths: expected length + new tokens <= %lld (capacity) without a window, got %lld + %lld at [%lld]", kOp,
                  (long long)capacity, (long long)length, (long long)n, (long long)b);
    if (p.window > 0 && p.k.ndim == 0 && p.window + n - 1 > capacity)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT,
                  "%s: window: expected window + new tokens - 1 <= %lld (capacity) without k and v, got %lld + %lld - 1 at [%lld]", kOp,
                  (long long)capacity, (long long)p.window, (long long)n, (long long)b);
    if (!p.cache_slots.ndim) continue;
    const int64_t slot = cache_slots[b];
    if (slot < 0 || slot >= slots)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: cache_slots: expected 0 to %lld, got %lld at [%lld]", kOp, (long long)slots - 1,
                  (long long)slot, (long long)b);
    if (slot_bits[slot / 8] >> slot % 8 & 1)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: cache_slots: expected distinct slots, got %lld again at [%lld]", kOp, (long long)slot,
                  (long long)b);
    slot_bits[slot / 8] |= (uint8_t)(1 << slot % 8);
  }
  return MIXTRAL_OK;
}

// A token-major array with head rows of D elements.
struct Rows {
  char *data;
  int64_t token, head;  // bytes
};

Rows rows(const mixtral_tensor &x, int64_t outer = 0) {
  return {(char *)x.data, stride_bytes(x, outer), stride_bytes(x, outer + 1)};
}

// The last sequence that starts at or before a token.
int64_t sequence_of(const int32_t *bounds, int64_t sequences, int64_t token) {
  int64_t low = 0, high = sequences;
  while (high - low > 1) (bounds[(low + high) / 2] <= token ? low : high) = (low + high) / 2;
  return low;
}

void rotate(const mixtral_context &context, const mixtral_rolling_attention_params &p, const attention::Problem &a, const Rows &q,
            const Rows &k) {
  float frequencies[kMaxRopePairs];
  for (int64_t i = 0; i < a.head_dim / 2; ++i) frequencies[i] = rope_frequency(p.rope_theta, i, a.head_dim);
  const int32_t *bounds = (const int32_t *)p.cu_seqlens_q.data, *lengths = (const int32_t *)p.cache_lengths.data;
  const int64_t tokens = bounds[a.sequence_count];
  const Rows q_from = rows(p.q), k_from = rows(p.k);
  constexpr int64_t kBlock = 4;
  parallel_for(context, (tokens + kBlock - 1) / kBlock, [&](int64_t block) {
    int64_t b = sequence_of(bounds, a.sequence_count, block * kBlock);
    for (int64_t t = block * kBlock; t < tokens && t < (block + 1) * kBlock; ++t) {
      while (t >= bounds[b + 1]) ++b;
      rope_token(a.dtype, a.head_dim, p.rope_interleaved, frequencies, lengths[b] + t - bounds[b],
                 {q_from.data + t * q_from.token, q.data + t * q.token, q_from.head, q.head, a.query_heads},
                 {k_from.data + t * k_from.token, k.data + t * k.token, k_from.head, k.head, p.k.ndim ? a.key_heads : 0});
    }
  });
}

void append(const mixtral_context &context, const mixtral_rolling_attention_params &p, const attention::Problem &a, const Rows &k,
            const Rows &v) {
  const int32_t *bounds = (const int32_t *)p.cu_seqlens_q.data, *lengths = (const int32_t *)p.cache_lengths.data;
  const int32_t *cache_slots = (const int32_t *)p.cache_slots.data;
  const int64_t capacity = p.k_cache.shape[1], bytes = element_bytes(a.dtype), tokens = bounds[a.sequence_count];
  const Rows k_ring = rows(p.k_cache, 1), v_ring = rows(p.v_cache, 1);
  constexpr int64_t kBlock = 16;
  parallel_for(context, (tokens + kBlock - 1) / kBlock, [&](int64_t block) {
    int64_t b = sequence_of(bounds, a.sequence_count, block * kBlock);
    for (int64_t t = block * kBlock; t < tokens && t < (block + 1) * kBlock; ++t) {
      while (t >= bounds[b + 1]) ++b;
      if (t < bounds[b + 1] - capacity) continue;  // a later token of the chunk takes its slot
      const int64_t slot = cache_slots ? cache_slots[b] : b, to = (lengths[b] + t - bounds[b]) % capacity;
      for (int64_t head = 0; head < a.key_heads; ++head) {
        memcpy(k_ring.data + slot * stride_bytes(p.k_cache, 0) + to * k_ring.token + head * k_ring.head,
               k.data + t * k.token + head * k.head, (size_t)(a.head_dim * bytes));
        memcpy(v_ring.data + slot * stride_bytes(p.v_cache, 0) + to * v_ring.token + head * v_ring.head,
               v.data + t * v.token + head * v.head, (size_t)(a.head_dim * bytes));
      }
    }
  });
}

}  // namespace

size_t rolling_attention_workspace_size(const mixtral_context &, const mixtral_rolling_attention_params &p) {
  return (size_t)layout(p).total;
}

mixtral_status rolling_attention(const mixtral_context &context, const mixtral_rolling_attention_params &p, void *workspace) {
  const Layout l = layout(p);
  char *const space = (char *)workspace;
  const mixtral_status status = check_values(p, (uint8_t *)space + l.slot_bits);
  if (status != MIXTRAL_OK) return status;

  attention::Problem a = problem(p);
  a.sequence_count = l.bounds.sequences;
  a.sequences = attention::sequences(workspace);
  if (a.sequence_count == 0) return MIXTRAL_OK;
  const int64_t capacity = p.k_cache.shape[1], bytes = element_bytes(a.dtype);
  const bool chunk = p.k.ndim != 0;
  Rows q = rows(p.q), k = rows(p.k);
  const Rows v = rows(p.v), k_ring = rows(p.k_cache, 1), v_ring = rows(p.v_cache, 1);
  if (p.rope_theta > 0) {
    q = {space + l.rotated_q, a.q_token, a.q_head};
    if (chunk) k = {space + l.rotated_k, a.key_heads * a.head_dim * bytes, a.head_dim * bytes};
    rotate(context, p, a, q, k);
  }

  const int32_t *bounds = (const int32_t *)p.cu_seqlens_q.data, *lengths = (const int32_t *)p.cache_lengths.data;
  for (int64_t b = 0; b < a.sequence_count; ++b) {
    const int64_t first = bounds[b], n = bounds[b + 1] - first, length = lengths[b];
    const int64_t slot = p.cache_slots.ndim ? ((const int32_t *)p.cache_slots.data)[b] : b;
    attention::Sequence &s = a.sequences[b];
    s = {};
    s.queries = n;
    s.position = length;
    s.q = q.data + first * q.token;
    s.out = (char *)p.out.data + first * a.out_token;
    if (p.lse.data) s.lse = (float *)p.lse.data + first;
    // Positions that some query sees in the ring: W - 1 before the chunk, and the chunk itself if it is there already.
    const int64_t begin = p.window && length - p.window + 1 > 0 ? length - p.window + 1 : 0, end = chunk ? length : length + n;
    const int64_t wrap = (begin / capacity + 1) * capacity;
    const auto ring = [&](int64_t from, int64_t to) {
      const int64_t at = from % capacity;
      return attention::Piece{from, to,
                              k_ring.data + slot * stride_bytes(p.k_cache, 0) + at * k_ring.token,
                              v_ring.data + slot * stride_bytes(p.v_cache, 0) + at * v_ring.token,
                              k_ring.token, v_ring.token, k_ring.head, v_ring.head};
    };
    s.pieces[0] = ring(begin, wrap < end ? wrap : end);
    s.pieces[1] = ring(s.pieces[0].end, end);
    if (chunk)
      s.pieces[2] = {length, length + n, k.data + first * k.token, v.data + first * v.token, k.token, v.token, k.head, v.head};
    else
      s.pieces[2] = {end, end, nullptr, nullptr, 0, 0, 0, 0};
  }
  attention::run(context, a, l.bounds, workspace);
  if (chunk) append(context, p, a, k, v);
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
