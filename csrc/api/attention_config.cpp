#include "attention_config.h"

#include <algorithm>

namespace mixtral::api {

//   rows of a sequence         kernel   why
//   (tokens * group)
//   1 to 64                    split    its keys are divided among all multiprocessors: one decoding step of 8 key heads has 8 tiles of rows
//   65 and more                tiles    128 rows share what they read
// A sequence's own length decides on the device, so that its bits do not depend on the others; both kernels run where both can be needed.
//
//   heads_together   as many key heads as have 24 MB of keys and values that are read at the same time: half of the L2 of an A100 or H100
//   layout           the one with the fewest places: a step of decoding has few tokens, packed prompts have few keys for each of many sequences
cuda::AttentionConfig attention_config(const AttentionShape &s, int sm_count) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t most_rows = s.longest_queries * s.group;
  cuda::AttentionConfig config = {};
  if (s.sequences == 0 || s.queries == 0 || most_rows == 0) return config;

  if (most_rows > cuda::kSplitRows) {
    const int64_t each = s.sequences * ceil_div(most_rows, cuda::kTileRows);
    const int64_t all = (s.queries * s.group + s.sequences * (cuda::kTileRows - 1)) / cuda::kTileRows;
    config.row_tiles = std::min(each, all);
    const int64_t read = s.window ? std::min(s.longest_keys, s.window + 2048) : s.longest_keys;
    const int64_t together = std::clamp<int64_t>((24 << 20) / std::max<int64_t>(read * s.head_dim * 4, 1), 1, s.key_heads);
    config.heads_together = (int32_t)ceil_div(s.key_heads, ceil_div(s.key_heads, together));
  }
  if (s.group <= cuda::kSplitRows && (most_rows <= cuda::kSplitRows || !s.equal_queries)) {
    const int64_t rows = std::min<int64_t>(most_rows, cuda::kSplitRows);
    const int64_t keys = s.window ? std::min(s.longest_keys, s.window - 1 + ceil_div(rows, s.group)) : s.longest_keys;
    const int64_t spans = std::clamp<int64_t>(ceil_div(keys, cuda::kLeastSpan), 1, cuda::kMostSpans);
    const int64_t all_spans = s.packed_keys ? std::min(s.sequences * spans, s.packed_keys / cuda::kLeastSpan + s.sequences) : s.sequences * spans;
    config.most_rows = (int32_t)rows;
    config.most_spans = (int32_t)spans;
    config.split_blocks = (int32_t)std::min<int64_t>(all_spans * ceil_div(rows, cuda::kSplitTile) * s.key_heads, 2 * sm_count);
    if (spans > 1) {
      const int64_t of_sequences = s.sequences * rows, of_tokens = s.queries * s.group;
      config.layout = of_tokens < of_sequences ? config.kRowsOfTokens : config.kRowsOfSequences;
      config.places = std::min(of_tokens, of_sequences) * spans;
      const int64_t of_keys = (2 * s.packed_keys / cuda::kLeastSpan + 1) * rows;
      if (s.packed_keys && of_keys < config.places) {
        config.layout = config.kSpansOfKeys;
        config.places = of_keys;
      }
      config.combine_blocks = (int32_t)std::min<int64_t>(ceil_div(std::min(of_tokens, of_sequences) * s.key_heads, 4), 8 * sm_count);
    }
  }
  return config;
}

}  // namespace mixtral::api
