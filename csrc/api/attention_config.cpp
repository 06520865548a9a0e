#include "attention_config.h"

#include <algorithm>
#include <cfloat>
#include <cmath>

namespace mixtral::api {

void set_softmax(cuda::Attention &a, double softmax_scale, int64_t window, int64_t head_dim) {
  const double scale = softmax_scale == 0 ? 1 / std::sqrt((double)head_dim) : softmax_scale;
  a.head_dim = (int32_t)head_dim;
  a.window = window ? (int32_t)window : INT32_MAX;
  a.scale = std::max((float)(std::fabs(scale) * M_LOG2E), FLT_MIN);  // 0 times the -inf of what is not seen would be NaN
  a.negative = scale < 0;
}

//   rows of a sequence         kernel   why
//   (tokens * group)
//   1 to 64                    split    its keys are divided among all multiprocessors: one decoding step of 8 key heads has 8 tiles of rows
//   65 and more                tiles    128 rows share what they read
// A sequence's own length decides on the device, so that its bits do not depend on the others; both kernels run where both can be needed.
//
//   heads_together   as many key heads as have 24 MB of keys and values that are read at the same time: half of the L2 of an A100 or H100
//   layout           the one with the fewest places: a step of decoding has few tokens, packed prompts have few keys for each of many sequences
cuda::AttentionConfig attention_config(const cuda::Attention &a, int sm_count) {
  const auto ceil_div = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
  const int64_t sequences = a.sequences, queries = a.cu_seqlens_q ? a.query_tokens : sequences * a.query_tokens;  // of all of them
  const int64_t longest_keys = a.capacity ? (int64_t)std::min(a.longest_cache, a.capacity) + a.longest_queries : a.longest_keys;
  const int64_t packed_keys = a.cu_seqlens_k ? a.key_tokens : 0;  // of all sequences, one after the other
  const int64_t most_rows = (int64_t)a.longest_queries * a.group;
  cuda::AttentionConfig config = {};
  if (queries == 0 || most_rows == 0) return config;

  if (most_rows > cuda::kSplitRows) {
    const int64_t of_each = sequences * ceil_div(most_rows, cuda::kTileRows);
    const int64_t all = (queries * a.group + sequences * (cuda::kTileRows - 1)) / cuda::kTileRows;
    config.row_tiles = std::min(of_each, all);
    const int64_t read = std::min<int64_t>(longest_keys, (int64_t)a.window + 2048);
    const int64_t together = std::clamp<int64_t>((24 << 20) / std::max<int64_t>(read * a.head_dim * 4, 1), 1, a.key_heads);
    config.heads_together = (int32_t)ceil_div(a.key_heads, ceil_div(a.key_heads, together));
  }
  if (a.group <= cuda::kSplitRows && (most_rows <= cuda::kSplitRows || a.cu_seqlens_q)) {
    const int64_t rows = std::min<int64_t>(most_rows, cuda::kSplitRows);
    const int64_t keys = std::min<int64_t>(longest_keys, (int64_t)a.window - 1 + ceil_div(rows, a.group));
    const int64_t spans = std::clamp<int64_t>(ceil_div(keys, cuda::kLeastSpan), 1, cuda::kMostSpans);
    const int64_t all_spans = packed_keys ? std::min(sequences * spans, packed_keys / cuda::kLeastSpan + sequences) : sequences * spans;
    config.most_rows = (int32_t)rows;
    config.most_spans = (int32_t)spans;
    config.split_blocks = (int32_t)std::min<int64_t>(all_spans * ceil_div(rows, cuda::kSplitTile) * a.key_heads, 2 * sm_count);
    if (spans > 1) {
      const int64_t of_sequences = sequences * rows, of_tokens = queries * a.group;
      config.layout = of_tokens < of_sequences ? config.kRowsOfTokens : config.kRowsOfSequences;
      config.places = std::min(of_tokens, of_sequences) * spans;
      const int64_t of_keys = (2 * packed_keys / cuda::kLeastSpan + 1) * rows;
      if (packed_keys && of_keys < config.places) {
        config.layout = config.kSpansOfKeys;
        config.places = of_keys;
      }
      config.combine_blocks = (int32_t)std::min<int64_t>(ceil_div(std::min(of_tokens, of_sequences) * a.key_heads, 4), 8 * sm_count);
    }
  }
  return config;
}

}  // namespace mixtral::api
