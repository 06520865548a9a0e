// Gather of token rows on the device.
//
//   grid      rows x ceil(H / 1024), 128 threads; a thread moves 8 elements (16 bytes)
//   bytes     2 * S * H * 2 + 4 * S; floor = bytes / memory bandwidth (T = 4096, K = 2, H = 4096: 134 MB, 40 us at 3.35 TB/s)
//   no shared memory, no barrier
#include "common/launch.h"
#include "common/vector8.cuh"
#include "ops.h"

namespace mixtral::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = kThreads * 8;  // a block's part of a row

template <class T>
__global__ void __launch_bounds__(kThreads)
    moe_permute_kernel(const T *__restrict__ hidden, int64_t hidden_stride, int64_t tokens, int64_t columns,
                       const int32_t *__restrict__ sorted_slots, int top_k, T *__restrict__ rows, int64_t rows_stride) {
  const int64_t row = blockIdx.x;
  const int32_t slot = sorted_slots[row];
  if (slot < 0 || slot / top_k >= tokens) return;
  const T *from = hidden + slot / top_k * hidden_stride;
  T *to = rows + row * rows_stride;
  for (int64_t column = blockIdx.y * (int64_t)kColumns + threadIdx.x * 8; column < columns; column += gridDim.y * (int64_t)kColumns)
    store8(to + column, load8(from + column, columns - column), columns - column);
}

}  // namespace

mixtral_status moe_permute(const mixtral_context &, const mixtral_moe_permute_params &p, void *stream) {
  const int64_t rows = p.rows.shape[0], columns = p.rows.shape[1];
  if (rows == 0 || columns == 0) return MIXTRAL_OK;
  cudaError_t error = cudaSuccess;
  with_half_type(p.hidden.dtype, [&](auto type) {
    using T = decltype(type);
    error = launch(moe_permute_kernel<T>, row_grid(rows, columns, kColumns), kThreads, 0, stream, false, (const T *)p.hidden.data,
                   p.hidden.stride[0], p.hidden.shape[0], columns, (const int32_t *)p.sorted_slots.data, p.top_k, (T *)p.rows.data,
                   p.rows.stride[0]);
  });
  return cuda_status("mixtral_moe_permute", error);
}

}  // namespace mixtral::cuda
