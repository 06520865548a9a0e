// The kernels of an attention (attention.cu chooses). init sets their attributes on the current device.
#pragma once
#include <cuda_runtime_api.h>

#include "../core/workspace.h"
#include "attention.h"

namespace mixtral::cuda {

// row_tiles: tiles of rows that all sequences together can have.
cudaError_t attention_tiles_init();
cudaError_t attention_tiles(const Attention &a, int64_t row_tiles, int heads_together, cudaStream_t stream);

// The split kernel, and the one that combines its spans if there can be several. The workspace holds their sums, then shift and sum of weights.
inline int64_t partial_rows(const Attention &a, const AttentionConfig &config) { return config.places * a.key_heads; }
inline size_t partial_sums_bytes(const Attention &a, const AttentionConfig &config) {
  return aligned((size_t)(partial_rows(a, config) * a.head_dim) * sizeof(float));
}
cudaError_t attention_split_init();
cudaError_t attention_split(const Attention &a, const AttentionConfig &config, void *workspace, cudaStream_t stream);

}  // namespace mixtral::cuda
