// What every launcher does around its kernel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../core/error.h"

namespace mixtral::cuda {

// The status of a CUDA call as a mixtral_status; the message names the op and what the runtime said. The runtime also
// keeps the error of a failed call, and the next launch would report it as its own: it is taken away here.
inline mixtral_status cuda_status(const char *op, cudaError_t error) {
  if (error == cudaSuccess) return MIXTRAL_OK;
  (void)cudaGetLastError();
  return fail(MIXTRAL_ERROR_CUDA, "%s: CUDA: %s: %s", op, cudaGetErrorName(error), cudaGetErrorString(error));
}

// Calls body(T()) with the device type of a 16-bit mixtral_dtype.
template <class Body>
void with_half_type(int32_t dtype, const Body &body) {
  if (dtype == MIXTRAL_DTYPE_BF16)
    body(__nv_bfloat16());
  else
    body(__half());
}

// Launches a kernel and gives this launch's own status, not that of an earlier call. `early`: it begins while the one before it in the
// stream ends, and waits for that one itself.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, void *stream, bool early, const Args &...args) {
  static_assert(sizeof...(Params) == sizeof...(Args));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3((unsigned)threads);
  config.dynamicSmemBytes = (size_t)shared_bytes;
  config.stream = (cudaStream_t)stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Blocks for rows whose columns they share, block_columns each: [rows, blocks of a row], at most as many of a row as a grid
// may have; a kernel's loop takes the columns beyond.
inline dim3 row_grid(int64_t rows, int64_t columns, int64_t block_columns) {
  constexpr int64_t kMost = 65535;
  const int64_t blocks = columns / block_columns + (columns % block_columns != 0);
  return dim3((unsigned)rows, (unsigned)(blocks < kMost ? blocks : kMost));
}

}  // namespace mixtral::cuda
