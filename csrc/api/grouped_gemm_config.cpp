#include "grouped_gemm_config.h"

namespace mixtral::api {

// | rows                            | kernel                | why                                                                       |
// |---------------------------------|-----------------------|---------------------------------------------------------------------------|
// | <= 64, or <= 16 an expert       | few rows, 8 to 64     | memory-bound: weights once, rows that do not exist cost nothing. The least |
// |                                 |                       | tile that holds an expert's rows: the fewer, the more bytes in flight      |
// | <= 192 an expert                | tiles of 64 x 128     | half empty tiles cost less than with 128 rows                              |
// | more                            | tiles of 128 x 256    | 85 FLOP for each byte from L2, the most that registers allow               |
cuda::GroupedGemmConfig grouped_gemm_config(int64_t rows, int64_t expert_rows, int64_t experts, int32_t sm_count) {
  if (rows > 64 && rows > 16 * experts) return {cuda::GroupedGemmKernel::kTiles, rows <= 192 * experts ? 64 : 128, 0};
  int32_t tile_rows = 8;
  while (tile_rows < 64 && tile_rows < expert_rows) tile_rows *= 2;
  return {cuda::GroupedGemmKernel::kFewRows, tile_rows, tile_rows == 8 ? sm_count : 2 * sm_count};
}

}  // namespace mixtral::api
