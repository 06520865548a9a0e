// The kernels of a grouped product, for rows and n of 1 or more. init sets their attributes on the current device; of the few rows' it
// tells whether the code that the device runs is sm_90's, and so can be launched early.
#pragma once
#include <cuda_runtime_api.h>

#include "grouped_gemm.h"

namespace mixtral::cuda {

// Tiles of so many rows that all experts together can have, whatever the offsets.
inline int64_t most_row_tiles(const GroupedGemm &g, int tile_rows) {
  return ((int64_t)g.rows + (int64_t)(g.experts < g.rows ? g.experts : g.rows) * (tile_rows - 1)) / tile_rows;
}

cudaError_t grouped_gemm_tiles_init();
cudaError_t grouped_gemm_tiles(const GroupedGemm &g, int tile_rows, cudaStream_t stream);

cudaError_t grouped_gemm_few_rows_init(bool *overlaps);
cudaError_t grouped_gemm_few_rows(const GroupedGemm &g, int tile_rows, int blocks, cudaStream_t stream);

}  // namespace mixtral::cuda
