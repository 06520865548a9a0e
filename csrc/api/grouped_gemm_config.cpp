#include "grouped_gemm_config.h"

namespace mixtral::api {

// us of both products at the Mixtral layer (8 experts of 4096 x 14336, bf16, natural routing) on an H100 at 435ae3c, from
// python/mixtral_bench/grouped_gemm_kernels.cu: python/mixtral_bench/results/2026-11-26-h100-grouped-gemm-kernels.json.
//
//   rows                       kernel               why
//   <= 64, or <= 16 an expert  few rows: 8 to 64    memory-bound: weights once, rows that do not exist cost nothing. T = 64: 983, tiles of
//                              of A a pass          64 x 128 1012. The least pass that holds an expert's rows has the most bytes in flight.
//                                                   8: one block an SM (T = 1: 255, two 262), more: two, which hide each other's
//                                                   multiplications (T = 16: 964, one 997)
//   <= 160 an expert           tiles of 64 x 128    half empty tiles cost less: T = 640: 1627, tiles of 128 x 256 1855. At T = 768 and 1024
//                                                   the remainders of tiles decide (1826 to 1888, 2387 to 2440)
//   more                       tiles of 128 x 256   85 FLOP for each byte from L2, the most that registers allow: T = 4096: 7682, tiles of
//                                                   64 x 128 9126
cuda::GroupedGemmConfig grouped_gemm_config(int64_t rows, int64_t expert_rows, int64_t experts, int32_t sm_count) {
  if (rows > 64 && rows > 16 * experts) return {cuda::GroupedGemmKernel::kTiles, rows <= 160 * experts ? 64 : 128, 0};
  int32_t tile_rows = 8;
  while (tile_rows < 64 && tile_rows < expert_rows) tile_rows *= 2;
  return {cuda::GroupedGemmKernel::kFewRows, tile_rows, tile_rows == 8 ? sm_count : 2 * sm_count};
}

}  // namespace mixtral::api
