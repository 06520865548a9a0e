// Attention of both ops as the launchers of every architecture take it. The keys of a sequence are numbered in order of position; the first
// of them lie in a ring, the rest in k and v. Either part may be empty.
#pragma once
#include "../core/context.h"

#ifdef __CUDACC__
#define MIXTRAL_HOST_DEVICE __host__ __device__
#else
#define MIXTRAL_HOST_DEVICE
#endif

namespace mixtral::cuda {

// An array [sequences, tokens, heads, D], innermost stride 1; the others in elements.
struct HeadArray {
  void *data;
  int64_t sequence, token, head;
};

struct Attention {
  int32_t dtype;     // of all arrays but lse: bf16 or f16
  int32_t head_dim;  // D
  int32_t key_heads, group;  // query head h reads key head h / group
  int32_t sequences;
  int32_t query_tokens;     // of q: of each sequence, or of all if cu_seqlens_q is given
  int32_t key_tokens;       // of k, likewise
  int32_t longest_queries;  // of a sequence at most: tokens beyond are left alone
  int32_t longest_keys;     // without a ring, of a sequence at most: keys beyond are not there
  int32_t window;           // INT32_MAX: none
  float scale;              // |softmax_scale| * log2(e), positive: weights are powers of two
  bool negative;            // softmax_scale is: q counts with the other sign
  bool overlaps;            // kernels may begin while the one ahead of them ends (common/overlap.cuh)
  bool early;               // so may the first one, of the kernel ahead of it
  HeadArray q, out, k, v;
  float *lse;  // may be NULL
  int64_t lse_sequence, lse_head;
  const int32_t *cu_seqlens_q;            // NULL: each sequence has all of query_tokens
  const int32_t *cu_seqlens_k, *k_start, *k_length;  // without a ring; may be NULL

  // The ring. With one k and v have a token for each query, or k.data is NULL and the ring holds those, too.
  HeadArray k_ring, v_ring;  // `sequence`: between slots
  int32_t slots, capacity;        // capacity 0: there is no ring
  int32_t longest_cache;          // keys before a sequence's new tokens at most: older ones are not there
  const int32_t *cache_lengths, *cache_slots;  // cache_slots may be NULL: sequence b has slot b
};

// A sequence's rows are its query tokens times `group`, row = token * group + head. Up to this many of them go to the split kernel, which
// divides the keys among blocks, more to the tile kernel. Both, and the spans below, depend on the sequence's own lengths alone: so do the
// bits of its result.
constexpr int kSplitRows = 64;

// Keys of a span, of a sequence that sees so many: at least 512, at most 64 spans, two for a lane of the warp that combines them. us of a
// decoding step with 4096 keys on an H200 (Mistral's heads; results/2026-11-26-h200-attention-spans.md), a unit's search and end cost:
//   keys       B = 1     4    16    32    64   128
//    256        21.9  36.0   104   190   412  1011
//    512        23.9  34.2    88   151   294   668
//   1024        31.4  33.8    86   148   283   548
constexpr int kLeastSpan = 512, kMostSpans = 64;
MIXTRAL_HOST_DEVICE inline int span_keys(int keys) { return kLeastSpan * (1 + (keys - 1) / (kLeastSpan * kMostSpans)); }
// Their number, 1 without keys.
MIXTRAL_HOST_DEVICE inline int span_count(int keys) { return keys > 0 ? 1 + (keys - 1) / span_keys(keys) : 1; }

constexpr int kTileRows = 128;  // of a block of the tile kernel
constexpr int kSplitTile = 16;  // of a unit of the split kernel

// What api/ chooses by shapes and device (attention_config.h).
struct AttentionConfig {
  int64_t row_tiles;       // that all sequences can have in the tile kernel; 0: no sequence can need it
  int32_t heads_together;  // key heads whose tiles run at the same time
  int32_t split_blocks;    // of the split kernel, at most; 0: no sequence can need it
  int32_t combine_blocks;  // 0: no sequence can have more than one span

  // Where the spans of a row leave what they found, for each key head: `places` in all.
  enum { kRowsOfTokens, kRowsOfSequences, kSpansOfKeys } layout;
  int64_t places;
  int32_t most_rows;   // of a sequence in the split kernel
  int32_t most_spans;  // of a row
};

// [T, heads, D] and [B, T, heads, D] as the ops describe them.
inline HeadArray packed_heads(const mixtral_tensor &x) { return {x.data, 0, x.stride[0], x.stride[1]}; }
inline HeadArray batched_heads(const mixtral_tensor &x) { return {x.data, x.stride[0], x.stride[1], x.stride[2]}; }

// Bytes of the partial results of the spans.
size_t attention_workspace_size(const Attention &a, const AttentionConfig &config);
mixtral_status attention(const char *op, const Attention &a, const AttentionConfig &config, void *workspace, void *stream);

}  // namespace mixtral::cuda
