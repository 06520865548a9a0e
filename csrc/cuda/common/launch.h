// What every launcher does around its kernel.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../../core/error.h"

namespace mixtral::cuda {

// The status of a CUDA call as a mixtral_status; the message names the op and what the runtime said.
inline mixtral_status cuda_status(const char *op, cudaError_t error) {
  if (error == cudaSuccess) return MIXTRAL_OK;
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

inline unsigned div_up(int64_t a, int64_t b) { return (unsigned)((a + b - 1) / b); }

}  // namespace mixtral::cuda
