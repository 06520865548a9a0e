// Which kernels an attention takes.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "attention_kernels.h"
#include "common/launch.h"

namespace mixtral::cuda {

void set_softmax(Attention &a, double softmax_scale, int64_t window, int64_t head_dim) {
  const double scale = softmax_scale == 0 ? 1 / std::sqrt((double)head_dim) : softmax_scale;
  a.head_dim = (int32_t)head_dim;
  a.window = window ? (int32_t)window : INT32_MAX;
  a.scale = std::max((float)(std::fabs(scale) * M_LOG2E), FLT_MIN);  // 0 times the -inf of what is not seen would be NaN
  a.negative = scale < 0;
}

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
