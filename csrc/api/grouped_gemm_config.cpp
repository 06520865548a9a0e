#include "grouped_gemm_config.h"

namespace mixtral::api {

// us of both products at the Mixtral layer (8 experts of 4096 x 14336, bf16, natural routing) on an H100 are from
// python/mixtral_bench/grouped_gemm_kernels.cu; its output of DATE is in python/mixtral_bench/results.
//
//   rows                       kernel               why
//   <= 64, or <= 16 an expert  few rows: 8 to 64    memory-bound: weights once, rows that do not exist cost nothing. T = 64: 986, tiles of
//                              of A a pass          64 x 128 1017. The least pass that holds an expert's rows: it has the most bytes in flight.
//                                                   8: one block an SM (T = 8: 958, two 970), more: two (T = 16: 967, one 993), which hide
//                                                   each other's multiplications
//   <= 160 an expert           tiles of 64 x 128    T = 512, 128 an expert: 1540, tiles of 128 x 256 1713
//   more                       tiles of 128 x 256   T = 768, 192 an expert: 1920, tiles of 64 x 128 2227; 85 FLOP for each byte from L2, the
//                                                   most that registers allow
cuda::GroupedGemmConfig grouped_gemm_config(int64_t rows, int64_t expert_rows, int64_t experts, int32_t sm_count) {
  if (rows > 64 && rows > 16 * experts) return {cuda::GroupedGemmKernel::kTiles, rows <= 160 * experts ? 64 : 128, 0};
  int32_t tile_rows = 8;
  while (tile_rows < 64 && tile_rows < expert_rows) tile_rows *= 2;
  return {cuda::GroupedGemmKernel::kFewRows, tile_rows, tile_rows == 8 ? sm_count : 2 * sm_count};
}

}  // namespace mixtral::api
