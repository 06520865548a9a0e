// Which kernels an attention takes.
#include "attention_kernels.h"
#include "common/launch.h"

namespace mixtral::cuda {

size_t attention_workspace_size(const Attention &a, const AttentionConfig &config) {
  return partial_sums_bytes(a, config) + aligned((size_t)partial_rows(a, config) * sizeof(float2));
}

// The split kernel first: it is the one that may begin early.
mixtral_status attention(const char *op, const Attention &a, const AttentionConfig &config, void *workspace, void *stream) {
  cudaError_t error = cudaSuccess;
  if (config.split_blocks) error = attention_split(a, config, workspace, (cudaStream_t)stream);
  if (error == cudaSuccess && config.row_tiles) error = attention_tiles(a, config.row_tiles, config.heads_together, (cudaStream_t)stream);
  return cuda_status(op, error);
}

}  // namespace mixtral::cuda
