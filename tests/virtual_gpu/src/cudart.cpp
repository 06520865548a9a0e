// The substitute CUDA runtime: what host code that nvcc compiled needs, with the library's own calls.
#include "streams.h"

#include <cstring>
#include <stdexcept>

#include "runtime.h"
#include "tensor_map.h"

using vgpu::device;
using vgpu::result;

namespace {

struct PendingCall {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local PendingCall pending_call;

cudaError_t launch(const void *host, dim3 grid, dim3 block, dim3 cluster, void **args, size_t shared, cudaStream_t stream,
                   bool programmatic = false) {
  const auto found = device().functions.find(host);
  if (found == device().functions.end()) return result(cudaErrorInvalidDeviceFunction);
  const vgpu::Function &function = found->second;
  vgpu::LoadedModule *module = function.binary->select(device().options.architecture);
  if (!module) return result(cudaErrorNoKernelImageForDevice);
  vgpu::LaunchShape shape;
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z}, c[3] = {cluster.x, cluster.y, cluster.z};
  for (int i = 0; i < 3; ++i) shape.grid[i] = g[i], shape.block[i] = b[i], shape.cluster[i] = c[i];
  shape.dynamic_shared = shared;
  shape.programmatic = programmatic && vgpu::follows_kernel(stream);
  vgpu::Launch checked;
  if (!device().prepare(*module, function, shape, checked)) return result(cudaErrorInvalidConfiguration);
  const auto work = [module, function, shape, params = vgpu::arguments(*checked.program, args)] {
    return device().launch(*module, function, shape, params) ? cudaSuccess : cudaErrorInvalidConfiguration;
  };
  return result(vgpu::enqueue(stream, work, true));
}

}  // namespace

extern "C" {

// ---- what nvcc's host code calls

void **__cudaRegisterFatBinary(void *wrapper) {
  struct Wrapper {
    int magic, version;
    const void *data;
    void *file;
  };
  std::unique_ptr<vgpu::FatBinary> binary(new vgpu::FatBinary);
  for (const std::string &ptx : vgpu::ptx_of_fat_binary(((const Wrapper *)wrapper)->data)) {
    try {
      binary->modules.push_back(device().load(ptx));
    } catch (const std::exception &e) {
      fprintf(stderr, "virtual GPU: %s\n", e.what());
      abort();  // the library cannot be loaded
    }
  }
  device().binaries.push_back(std::move(binary));
  return (void **)device().binaries.back().get();
}

void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}

void __cudaRegisterFunction(void **handle, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  vgpu::Function &f = device().functions[host];
  f.binary = (vgpu::FatBinary *)handle;
  f.name = name;
}

// Device variables are reached by kernels alone.
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}

char __cudaInitModule(void **) { return 1; }

cudaError_t __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pending_call = {grid, block, shared, stream};
  return cudaSuccess;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pending_call.grid;
  *block = pending_call.block;
  *shared = pending_call.shared;
  *(cudaStream_t *)stream = pending_call.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
  return launch((const void *)kernel, grid, block, dim3(0, 0, 0), args, shared, stream);
}

// ---- the runtime API

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, dim3(0, 0, 0), args, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **args) {
  dim3 cluster(0, 0, 0);
  bool programmatic = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute &a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension)
      cluster = dim3(a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z);
    else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      programmatic = a.val.programmaticStreamSerializationAllowed != 0;
    else
      return result(cudaErrorNotSupported);
  }
  return launch(function, config->gridDim, config->blockDim, cluster, args, config->dynamicSmemBytes, config->stream, programmatic);
}

cudaError_t cudaFuncSetAttribute(const void *function, cudaFuncAttribute attribute, int value) {
  const auto found = device().functions.find(function);
  if (found == device().functions.end()) return result(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > device().max_shared()) return result(cudaErrorInvalidValue);
    found->second.max_dynamic_shared = value;
  } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    found->second.wide_clusters = value != 0;
  } else if (attribute != cudaFuncAttributePreferredSharedMemoryCarveout) {
    return result(cudaErrorNotSupported);
  }
  return cudaSuccess;
}

// The versions alone: nothing else of it can be told from the PTX.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *function) {
  const auto found = device().functions.find(function);
  const vgpu::LoadedModule *module = found == device().functions.end() ? nullptr : found->second.binary->select(device().options.architecture);
  if (!module) return result(cudaErrorInvalidDeviceFunction);
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = module->module->target;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) { return index == 0 ? cudaSuccess : result(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return result(cudaErrorInvalidDevice);
  const vgpu::Options &o = device().options;
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = o.architecture / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = o.architecture % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = o.sm_count; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device().max_shared(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device().max_shared() + 1024; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrL2CacheSize: *value = o.architecture >= 90 ? 50 << 20 : 40 << 20; break;
    default: return result(cudaErrorNotSupported);
  }
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult *status) {
  const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? (void *)vgpu::encode_tiled : nullptr;
  if (status) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

const char *cudaGetErrorName(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalState: return "cudaErrorIllegalState";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    default: return "cudaErrorUnknown";
  }
}

const char *cudaGetErrorString(cudaError_t e) {
  static std::string reports;
  if (e == cudaErrorInvalidConfiguration) return device().error.c_str();
  if (e != cudaErrorLaunchFailure) return cudaGetErrorName(e);
  reports = device().reports.json();
  return reports.c_str();
}

}  // extern "C"
