// Work runs to its end before the call that enqueues it returns, so streams are in order by themselves. On a stream that captures it is
// recorded instead: a graph is the list of what was recorded, each launch with a copy of its arguments, and runs in that order. All
// streams are blocking ones (cudaStreamCreate), so none may capture while the legacy stream is used.
#include "streams.h"

#include <cstdlib>
#include <cstring>
#include <set>
#include <vector>

#include "runtime.h"

struct Node {
  vgpu::Work work;
  bool kernel;
};

struct CUgraph_st {
  std::vector<Node> nodes;
};

struct CUgraphExec_st {
  std::vector<Node> nodes;
};

struct CUstream_st {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  std::vector<Node> recorded;
};

using vgpu::device;
using vgpu::in_one_array;
using vgpu::result;

namespace {

thread_local cudaError_t last_error = cudaSuccess;

std::set<cudaStream_t> streams;
std::set<void *> allocated;
uint64_t allocations = 0;

// What is not allowed while a stream captures ends its capture as well: what it recorded is of no use.
cudaError_t refuse(cudaStream_t stream, cudaError_t error) {
  if (stream->status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
  stream->status = cudaStreamCaptureStatusInvalidated;
  return error;
}

// A call that uses the legacy stream would have to wait for every stream, also for those that capture.
cudaError_t use_legacy_stream() {
  cudaError_t error = cudaSuccess;
  for (cudaStream_t s : streams)
    if (s->status != cudaStreamCaptureStatusNone) error = cudaErrorStreamCaptureImplicit, refuse(s, error);
  return error;
}

// A call that may synchronise in secret, as cudaMalloc; a relaxed capture bears it.
cudaError_t may_synchronise() {
  cudaError_t error = cudaSuccess;
  for (cudaStream_t s : streams)
    if (s->status != cudaStreamCaptureStatusNone && s->mode != cudaStreamCaptureModeRelaxed)
      error = cudaErrorStreamCaptureUnsupported, refuse(s, error);
  return error;
}

bool is_legacy(cudaStream_t stream) { return !stream || stream == cudaStreamLegacy; }

// Where a program learns of what kernels did wrong.
cudaError_t synchronise() {
  device().last_runs = false;
  return device().reports.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  if (!bytes) return cudaSuccess;
  if (kind == cudaMemcpyHostToDevice ? !in_one_array(to, bytes, true) : !in_one_array(from, bytes, false)) return cudaErrorInvalidValue;
  memcpy(to, from, bytes);
  if (kind == cudaMemcpyHostToDevice) device().memory.set_initialised((uint64_t)to, bytes);
  return cudaSuccess;
}

bool known(cudaMemcpyKind kind) { return kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToHost; }

cudaError_t run(const std::vector<Node> &nodes) {
  for (const Node &node : nodes)
    if (cudaError_t error = node.work()) return error;
  return cudaSuccess;
}

}  // namespace

namespace vgpu {

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t enqueue(cudaStream_t stream, Work work, bool kernel) {
  if (is_legacy(stream)) {
    const cudaError_t error = use_legacy_stream();
    return error ? error : work();
  }
  if (!streams.count(stream)) return cudaErrorInvalidResourceHandle;
  if (stream->status == cudaStreamCaptureStatusInvalidated) return cudaErrorStreamCaptureInvalidated;
  if (stream->status == cudaStreamCaptureStatusNone) return work();
  stream->recorded.push_back({std::move(work), kernel});
  return cudaSuccess;
}

bool follows_kernel(cudaStream_t stream) {
  if (!streams.count(stream) || stream->status == cudaStreamCaptureStatusNone) return true;
  return !stream->recorded.empty() && stream->recorded.back().kernel;
}

bool in_one_array(const void *data, size_t bytes, bool writable) {
  const Allocation *a = device().memory.find((uint64_t)data);
  return a && (uint64_t)data + bytes <= a->address + a->bytes && (a->writable || !writable);
}

}  // namespace vgpu

extern "C" {

cudaError_t cudaGetLastError(void) {
  const cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

// ---- memory: it is the host's, undefined to kernels until written, and 0xff (NaN) to who copies it

cudaError_t cudaMalloc(void **data, size_t bytes) {
  if (cudaError_t error = may_synchronise()) return result(error);
  *data = nullptr;
  if (!bytes) return cudaSuccess;
  void *made = bytes > SIZE_MAX - 256 ? nullptr : aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!made) return result(cudaErrorMemoryAllocation);
  memset(made, 0xff, bytes);
  device().memory.map((uint64_t)made, bytes, "cudaMalloc " + std::to_string(++allocations), true, false);
  allocated.insert(made);
  *data = made;
  return cudaSuccess;
}

cudaError_t cudaFree(void *data) {
  if (cudaError_t error = may_synchronise()) return result(error);
  if (!data) return cudaSuccess;
  if (!allocated.erase(data)) return result(cudaErrorInvalidValue);
  device().memory.unmap((uint64_t)data);
  free(data);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
  if (!known(kind)) return result(cudaErrorNotSupported);
  if (cudaError_t error = use_legacy_stream()) return result(error);
  if (cudaError_t error = copy(to, from, bytes, kind)) return result(error);
  return result(synchronise());
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (!known(kind)) return result(cudaErrorNotSupported);
  return result(vgpu::enqueue(stream, [=] { return copy(to, from, bytes, kind); }));
}

cudaError_t cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t stream) {
  return result(vgpu::enqueue(stream, [=] {
    if (!bytes) return cudaSuccess;
    if (!in_one_array(data, bytes, true)) return cudaErrorInvalidValue;
    memset(data, value, bytes);
    device().memory.set_initialised((uint64_t)data, bytes);
    return cudaSuccess;
  }));
}

// ---- streams

cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  *stream = *streams.insert(new CUstream_st).first;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (!streams.count(stream)) return result(cudaErrorInvalidResourceHandle);
  if (stream->status != cudaStreamCaptureStatusNone) return result(refuse(stream, cudaErrorStreamCaptureUnsupported));
  streams.erase(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_legacy(stream)) {
    const cudaError_t error = use_legacy_stream();
    return result(error ? error : synchronise());
  }
  if (!streams.count(stream)) return result(cudaErrorInvalidResourceHandle);
  if (stream->status != cudaStreamCaptureStatusNone) return result(refuse(stream, cudaErrorStreamCaptureUnsupported));
  return result(synchronise());
}

// ---- capture and graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (is_legacy(stream)) return result(cudaErrorStreamCaptureUnsupported);
  if (!streams.count(stream)) return result(cudaErrorInvalidResourceHandle);
  if (stream->status != cudaStreamCaptureStatusNone) return result(cudaErrorIllegalState);
  stream->status = cudaStreamCaptureStatusActive;
  stream->mode = mode;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = nullptr;
  if (!streams.count(stream)) return result(cudaErrorInvalidResourceHandle);
  if (stream->status == cudaStreamCaptureStatusNone) return result(cudaErrorIllegalState);
  const bool invalid = stream->status == cudaStreamCaptureStatusInvalidated;
  if (!invalid) *graph = new CUgraph_st{std::move(stream->recorded)};
  stream->recorded.clear();
  stream->status = cudaStreamCaptureStatusNone;
  return result(invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  if (!streams.count(stream)) return result(cudaErrorInvalidResourceHandle);
  *status = stream->status;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
  if (flags) return result(cudaErrorNotSupported);
  *exec = new CUgraphExec_st{graph->nodes};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  return result(vgpu::enqueue(stream, [nodes = exec->nodes] { return run(nodes); }));
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

}  // extern "C"
