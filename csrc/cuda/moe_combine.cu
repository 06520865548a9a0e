// Weighted sum of each token's K rows on the device, f32 in slot order, one rounding.
//
//   grid      tokens x ceil(H / 1024), 128 threads; a thread sums 8 columns
//   bytes     (K + 1) * T * H * 2 + 8 * T * K (T = 4096, K = 2, H = 4096: 101 MB, 30 us at 3.35 TB/s)
//   8 accumulators a thread; no shared memory, no barrier, no atomics: bitwise repeatable
#include "common/launch.h"
#include "common/overlap.cuh"
#include "common/vector8.cuh"
#include "ops.h"

namespace mixtral::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = kThreads * 8;  // a block's part of a row

// `rows` may still be written when the kernel begins, so they may not be read as constant memory (ld.global.nc, which const
// __restrict__ allows).
template <class T>
__global__ void __launch_bounds__(kThreads)
    moe_combine_kernel(const T *rows, int64_t rows_stride, int64_t row_count, int64_t columns,
                       const int32_t *__restrict__ slot_rows, int64_t slot_rows_stride, const float *__restrict__ weights,
                       int64_t weights_stride, int top_k, T *__restrict__ out, int64_t out_stride) {
  wait_for_kernels_before();
  const int64_t token = blockIdx.x;
  for (int64_t column = blockIdx.y * (int64_t)kColumns + threadIdx.x * 8; column < columns; column += gridDim.y * (int64_t)kColumns) {
    const int64_t n = columns - column;
    float sum[8] = {};
    for (int j = 0; j < top_k; ++j) {
      const int32_t row = slot_rows[token * slot_rows_stride + j];
      if (row < 0 || row >= row_count) continue;
      const float weight = weights[token * weights_stride + j];
      const Vector8<T> v = load8(rows + row * rows_stride + column, n);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += weight * to_float(v.x[i]);
    }
    Vector8<T> result;
#pragma unroll
    for (int i = 0; i < 8; ++i) from_float(sum[i], result.x[i]);
    store8(out + token * out_stride + column, result, n);
  }
}

}  // namespace

mixtral_status moe_combine(const mixtral_context &, const mixtral_moe_combine_params &p, bool early, void *stream) {
  const int64_t tokens = p.out.shape[0], columns = p.out.shape[1];
  if (tokens == 0 || columns == 0) return MIXTRAL_OK;
  cudaError_t error = cudaSuccess;
  with_half_type(p.rows.dtype, [&](auto type) {
    using T = decltype(type);
    error = launch(moe_combine_kernel<T>, row_grid(tokens, columns, kColumns), kThreads, 0, stream, early, (const T *)p.rows.data,
                   p.rows.stride[0], p.rows.shape[0], columns, (const int32_t *)p.slot_rows.data, p.slot_rows.stride[0],
                   (const float *)p.topk_weights.data, p.topk_weights.stride[0], (int)p.slot_rows.shape[1], (T *)p.out.data, p.out.stride[0]);
  });
  return cuda_status("mixtral_moe_combine", error);
}

}  // namespace mixtral::cuda
