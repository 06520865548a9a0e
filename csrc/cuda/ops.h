// The CUDA backend as api/ calls it: validated params in, kernels enqueued on `stream` (a cudaStream_t).
#pragma once
#include "attention.h"
#include "grouped_gemm.h"

namespace mixtral::cuda {

// Fills device properties and sets function attributes; the context's device_index and requested arch are set.
mixtral_status context_init(mixtral_context &context);

// How moe_gate and moe_sort divide their tokens; api/moe_routing_config.h chooses.
struct RoutingConfig {
  int launches;             // 1: every block counts the choices of all tokens; 2: histograms of chunks go through the workspace
  int threads;              // a block, whole warps, at least chunk_tokens if launches is 1
  int64_t chunk_tokens;     // whose maps a block writes: a multiple of 32
  int64_t chunks;           // blocks, at least 1
  size_t workspace_bytes;   // aligned to 4
};
constexpr int kOneLaunchTokens = 16384, kOneLaunchExperts = 16, kOneLaunchTopK = 2;  // what the counters of one launch hold
constexpr int kOneLaunchChunk = 256;                                                 // tokens a block at most
constexpr int kRoutingChunks = 128;                                                  // of two launches at most

mixtral_status moe_gate(const mixtral_context &context, const mixtral_moe_gate_params &p, const RoutingConfig &config,
                        void *workspace, void *stream);
mixtral_status moe_sort(const mixtral_context &context, const mixtral_moe_sort_params &p, const RoutingConfig &config,
                        void *workspace, void *stream);
mixtral_status moe_permute(const mixtral_context &context, const mixtral_moe_permute_params &p, void *stream);
// early: launched while the kernel ahead ends (common/launch.h).
mixtral_status moe_combine(const mixtral_context &context, const mixtral_moe_combine_params &p, bool early, void *stream);
mixtral_status apply_rope(const mixtral_context &context, const mixtral_apply_rope_params &p, void *stream);

mixtral_status grouped_gemm(const char *op, const GroupedGemm &g, const GroupedGemmConfig &config, void *stream);

struct MoeExpertsConfig {
  RoutingConfig sort;      // where the call sorts
  GroupedGemmConfig gemm;  // of both products
};

size_t moe_experts_workspace_size(const mixtral_moe_experts_params &p, const MoeExpertsConfig &config);
mixtral_status moe_experts(const mixtral_context &context, const mixtral_moe_experts_params &p, const MoeExpertsConfig &config,
                           void *workspace, void *stream);

// p of an attention `a` that its api/ file has described; sliding_window_attention needs no more than attention() itself (attention.h).
size_t rolling_attention_workspace_size(const mixtral_rolling_attention_params &p, const Attention &a, const AttentionConfig &config);
mixtral_status rolling_attention(const mixtral_rolling_attention_params &p, Attention a, const AttentionConfig &config, void *workspace,
                                 void *stream);

}  // namespace mixtral::cuda
