// What a launcher asks of the CUDA runtime, for test_runtime.py: attributes of functions and launches, the encoder of tensor maps by
// its driver entry point, memset, streams.
#include "cuda/common/ptx_sm80.cuh"
#include "cuda/common/ptx_sm90.cuh"

using namespace mixtral::sm90;
using mixtral::sm80::shared_address;

// A box of the map into dynamic shared memory and out again, by every block of the cluster: out[block] = the box plus the rank.
__global__ void copy_box(const __grid_constant__ CUtensorMap map, int *out, int words) {
  extern __shared__ __align__(1024) int box[];
  __shared__ __align__(8) unsigned long long full;
  const uint32_t bar = shared_address(&full);
  if (threadIdx.x == 0) {
    mbarrier_init(bar, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(bar, words * 4);
    tma_load_2d(shared_address(box), &map, bar, 0, 0);
  }
  __syncthreads();
  while (!mbarrier_try_wait(bar, 0)) {}
  for (int i = threadIdx.x; i < words; i += blockDim.x) out[blockIdx.x * words + i] = box[i] + (int)cluster_rank();
}

__global__ void add_one(int *x) {
  wait_for_dependencies();
  x[threadIdx.x] += 1;
}

__global__ void add_one_at_once(int *x) { x[threadIdx.x] += 1; }

// Twice or once, each launch allowed to start before the end of the one before it.
extern "C" __attribute__((visibility("default"))) int add_overlapping(int *x, int times, cudaStream_t stream) {
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1), config.blockDim = dim3(64), config.stream = stream, config.attrs = attribute, config.numAttrs = 1;
  while (times--)
    if (int error = cudaLaunchKernelEx(&config, add_one_at_once, x)) return error;
  return 0;
}

// 0, or the number of the step that failed times 1000 and the error. allowed: dynamic shared memory that is asked for first.
extern "C" __attribute__((visibility("default")))
int runtime_calls(int *in, int *out, int *zeros, int rows, int columns, int cluster, int wide, int allowed, cudaStream_t stream) {
  const auto step = [](int number, int error) { return error ? number * 1000 + error : 0; };
  void *found = nullptr, *missing = nullptr;
  cudaDriverEntryPointQueryResult status;
  if (int e = step(1, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status))) return e;
  if (!found || status != cudaDriverEntryPointSuccess) return 1999;
  if (int e = step(2, cudaGetDriverEntryPointByVersion("cuNoSuchThing", &missing, 12000, cudaEnableDefault, &status))) return e;
  if (missing || status != cudaDriverEntryPointSymbolNotFound) return 2999;
  CUtensorMap map;
  const cuuint64_t shape[] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[] = {(cuuint64_t)columns * 4};
  const cuuint32_t box[] = {(cuuint32_t)columns, (cuuint32_t)rows}, ones[] = {1, 1};
  using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  if (int e = step(3, ((Encode)found)(&map, CU_TENSOR_MAP_DATA_TYPE_INT32, 2, in, shape, strides, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))) return e;
  if (allowed)
    if (int e = step(4, cudaFuncSetAttribute(copy_box, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed))) return e;
  if (int e = step(5, cudaFuncSetAttribute(copy_box, cudaFuncAttributeNonPortableClusterSizeAllowed, wide))) return e;
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim.x = (unsigned)cluster, attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)cluster * 2), config.blockDim = dim3(64), config.dynamicSmemBytes = (size_t)(rows * columns * 4);
  config.stream = stream, config.attrs = attribute, config.numAttrs = 1;
  if (int e = step(6, cudaLaunchKernelEx(&config, copy_box, map, out, rows * columns))) return cudaGetLastError(), e;
  if (int e = step(7, cudaMemsetAsync(zeros, 0, 64 * sizeof(int), stream))) return e;
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  config.gridDim = dim3(1), config.dynamicSmemBytes = 0;
  if (int e = step(8, cudaLaunchKernelEx(&config, add_one, zeros))) return e;
  attribute[0].id = cudaLaunchAttributePriority;
  if (cudaLaunchKernelEx(&config, add_one, zeros) != cudaErrorNotSupported || cudaPeekAtLastError() != cudaErrorNotSupported) return 9999;
  return step(10, cudaGetLastError() != cudaErrorNotSupported || cudaGetLastError() != cudaSuccess);
}
