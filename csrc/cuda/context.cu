#include "attention_kernels.h"
#include "common/launch.h"
#include "grouped_gemm_kernels.h"
#include "ops.h"

namespace mixtral::cuda {

mixtral_status context_init(mixtral_context &context) {
  constexpr const char *kOp = "mixtral_context_create";
  int devices = 0;
  mixtral_status status = cuda_status(kOp, cudaGetDeviceCount(&devices));
  if (status != MIXTRAL_OK) return status;
  if (context.device_index < 0 || context.device_index >= devices)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: device_index: expected 0 to %d, got %d", kOp, devices - 1,
                context.device_index);

  const auto attribute = [&](cudaDeviceAttr which, int32_t *value) {
    if (status == MIXTRAL_OK) status = cuda_status(kOp, cudaDeviceGetAttribute(value, which, context.device_index));
  };
  int32_t major = 0, minor = 0;
  attribute(cudaDevAttrComputeCapabilityMajor, &major);
  attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  attribute(cudaDevAttrMultiProcessorCount, &context.sm_count);
  if (status != MIXTRAL_OK) return status;

  context.compute_capability = major * 10 + minor;
  if (context.compute_capability < 80)
    return fail(MIXTRAL_ERROR_NOT_SUPPORTED, "%s: device_index: expected compute capability 8.0 or more, got %d.%d", kOp, major,
                minor);
  const bool hopper = context.compute_capability == 90;  // sm_90a code runs on 9.0 alone
  if (context.arch == MIXTRAL_ARCH_CUDA_SM90 && !hopper)
    return fail(MIXTRAL_ERROR_NOT_SUPPORTED, "%s: arch: expected compute capability 9.0 for sm_90, got %d.%d", kOp, major, minor);
  if (context.arch == MIXTRAL_ARCH_AUTO) context.arch = hopper ? MIXTRAL_ARCH_CUDA_SM90 : MIXTRAL_ARCH_CUDA_SM80;

  // Function attributes belong to the current device.
  int current = 0;
  cudaError_t error = cudaGetDevice(&current);
  const bool other = current != context.device_index;  // to set the same one would make a CUDA context where there is none
  if (error == cudaSuccess && other) error = cudaSetDevice(context.device_index);
  if (error != cudaSuccess) return cuda_status(kOp, error);
  error = grouped_gemm_tiles_init();
  if (error == cudaSuccess) error = grouped_gemm_few_rows_init(&context.overlaps_kernels);
  if (error == cudaSuccess) error = attention_tiles_init();
  if (error == cudaSuccess) error = attention_split_init();
  const cudaError_t restored = other ? cudaSetDevice(current) : cudaSuccess;
  return cuda_status(kOp, error == cudaSuccess ? restored : error);
}

}  // namespace mixtral::cuda
