// Device memory, streams and captured graphs: what a program calls beside the library.
#pragma once
#pragma GCC visibility push(default)  // the runtime's functions are for programs that are linked with the library
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

#include <functional>

namespace vgpu {

using Work = std::function<cudaError_t()>;

cudaError_t result(cudaError_t error);  // passes it on, and keeps it for cudaGetLastError
cudaError_t enqueue(cudaStream_t stream, Work work, bool kernel = false);  // runs it, or records it while the stream captures
bool follows_kernel(cudaStream_t stream);  // false where a captured launch has no kernel directly before it
bool in_one_array(const void *data, size_t bytes, bool writable);  // of device memory

}  // namespace vgpu
