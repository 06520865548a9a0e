// How an attention divides its work among kernels: a pure function of shapes, for both ops.
#pragma once
#include "../cuda/attention.h"

namespace mixtral::api {

struct AttentionShape {
  int64_t sequences;
  int64_t queries;          // tokens of all sequences
  int64_t longest_queries;  // of a sequence at most
  bool equal_queries;       // every sequence has so many
  int64_t longest_keys;     // that a sequence may see before the window, at most
  int64_t packed_keys;      // of all sequences that lie one after the other in k, 0: they do not
  int64_t window;           // 0: none
  int64_t group, key_heads, head_dim;
};

cuda::AttentionConfig attention_config(const AttentionShape &s, int sm_count);

}  // namespace mixtral::api
