// Launch of a grouped product with the kernel that api/ chose.
#include "common/launch.h"
#include "grouped_gemm_kernels.h"
#include "ops.h"

namespace mixtral::cuda {

mixtral_status grouped_gemm(const char *op, const GroupedGemm &g, const GroupedGemmConfig &config, void *stream) {
  if (g.rows == 0 || g.n == 0) return MIXTRAL_OK;
  switch (config.kernel) {
    case GroupedGemmKernel::kTiles: return cuda_status(op, grouped_gemm_tiles(g, config.tile_rows, (cudaStream_t)stream));
    case GroupedGemmKernel::kFewRows: return cuda_status(op, grouped_gemm_few_rows(g, config.tile_rows, config.blocks, (cudaStream_t)stream));
  }
  return MIXTRAL_OK;
}

}  // namespace mixtral::cuda
