// What the CUDA examples share: errors end the program, arrays in device memory, numbers to fill them with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <mixtral_ext.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

inline void check(bool ok, const char *message) {
  if (!ok) fprintf(stderr, "%s\n", message), exit(1);
}
inline void check(cudaError_t error) { check(error == cudaSuccess, cudaGetErrorString(error)); }
inline void check(mixtral_status status) { check(status == MIXTRAL_OK, mixtral_last_error()); }

inline mixtral_context *cuda_context() {
  mixtral_context_options options = {};  // device_index 0: it has to be the thread's current device, as it is from the beginning
  options.struct_size = sizeof options;
  options.device_type = MIXTRAL_DEVICE_CUDA;
  mixtral_context *context;
  check(mixtral_context_create(&options, &context));
  return context;
}

// A contiguous array in device memory, of up to four dimensions (the unused ones are 0).
inline mixtral_tensor array(int32_t dtype, int64_t d0, int64_t d1 = 0, int64_t d2 = 0, int64_t d3 = 0) {
  mixtral_tensor t = {nullptr, dtype, d3 ? 4 : d2 ? 3 : d1 ? 2 : 1, {d0, d1, d2, d3}, {0, 0, 0, 0}};
  int64_t count = 1;
  for (int i = t.ndim - 1; i >= 0; count *= t.shape[i--]) t.stride[i] = count;
  check(cudaMalloc(&t.data, (size_t)count * (dtype == MIXTRAL_DTYPE_BF16 ? 2 : 4)));
  return t;
}

// Numbers in (-0.5, 0.5) that are exact in bf16, from the `first` of a sequence on. The copy has read them when it returns.
inline void fill(const mixtral_tensor &t, int64_t first, cudaStream_t stream) {
  std::vector<__nv_bfloat16> numbers((size_t)(t.shape[0] * t.stride[0]));
  for (__nv_bfloat16 &number : numbers) number = __float2bfloat16((float)(first++ * 7919 % 251 - 125) / 256);
  check(cudaMemcpyAsync(t.data, numbers.data(), numbers.size() * 2, cudaMemcpyHostToDevice, stream));
}
