#include "moe_routing_config.h"

namespace mixtral::api {

//   when                            launches  blocks     why
//   E <= 16, K <= 2, T <= 16384     1         up to 64   a second launch costs more than that every block reads all T rows (64 KB at
//                                                        T = 4096, E = 8, bf16). All blocks run at once, and 64 draw half as much from
//                                                        L2 as 128 would; a chunk is 32 tokens up to T = 2048, 256 at T = 16384
//   else                            2         up to 128  one a multiprocessor; a block sums all histograms: E * 128 * 4 <= 128 KB,
//                                                        however many tokens there are
cuda::RoutingConfig routing_config(int64_t tokens, int64_t top_k, int64_t experts) {
  const bool one_launch = experts <= cuda::kOneLaunchExperts && top_k <= cuda::kOneLaunchTopK && tokens <= cuda::kOneLaunchTokens;
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const auto at_least_1 = [](int64_t n) { return n > 1 ? n : 1; };
  const int64_t most_blocks = one_launch ? cuda::kOneLaunchTokens / cuda::kOneLaunchChunk : cuda::kRoutingChunks;

  cuda::RoutingConfig config;
  config.launches = one_launch ? 1 : 2;
  config.chunk_tokens = 32 * at_least_1(ceil_div(tokens, 32 * most_blocks));
  config.chunks = at_least_1(ceil_div(tokens, config.chunk_tokens));
  config.threads = one_launch && tokens < 1024 ? (int)(32 * at_least_1(ceil_div(tokens, 32))) : 1024;
  config.workspace_bytes = one_launch ? 0 : (size_t)(config.chunks * experts) * sizeof(int32_t);
  return config;
}

}  // namespace mixtral::api
