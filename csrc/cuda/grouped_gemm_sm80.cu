// Grouped product for many rows an expert: tiles of 128 rows x 256 weight rows on mma.sync, weights as they lie in memory.
//
//   grid       all tiles there can be for `rows`; a block finds its tile from the offsets and ends at once if there is none
//   tile       128 x 256 x 32, 8 warps of 64 x 64; with SwiGLU the 256 weight rows are 128 of gate and the same 128 of up, 32 and 32
//              a warp, so both halves of a column are in one thread
//   stages     4 of 24 KB (128 x 32 of A through a_rows, 256 x 32 of weights) by cp.async, 16 bytes a thread: 96 KB of shared
//              memory. Rows are 64 bytes, their four 16-byte units swizzled by (row / 2) % 4: no bank conflict in copies or ldmatrix
//   registers  128 accumulators, 32 of fragments; one block an SM
//   barriers   one a stage
//   order      16 tiles of rows by all columns, rows fastest: 132 blocks at work share 2048 rows of A and as many of weights
//   moved      tiles * (128 + 256) * k * 2 bytes from L2; FLOPs: tiles * 128 * 256 * k * 2, less the halves of 64 rows that are empty
//   floor      85 FLOP a byte from L2: 5.5 TB/s of L2 allow 470 TFLOP/s
#include "common/launch.h"
#include "common/ptx_sm80.cuh"
#include "common/vector8.cuh"
#include "grouped_gemm_kernels.h"
#include "grouped_gemm_segments.cuh"

namespace mixtral::cuda {
namespace {

using namespace mixtral::sm80;

constexpr int kRows = 128, kColumns = 256, kDepth = 32, kStages = 4, kThreads = 256;
constexpr int kRowBytes = kDepth * 2, kStageBytes = (kRows + kColumns) * kRowBytes;
constexpr int kGroup = 16;  // tiles of rows that share a pass over the weights
static_assert(kStages * kStageBytes <= 99 * 1024, "what a block may have on every architecture since sm_80");

// Of unit `unit` (16 bytes) in row `row` of a stage.
__device__ inline uint32_t place(int row, int unit) { return (uint32_t)(row * kRowBytes + (unit ^ (row / 2 % 4)) * 16); }

template <class T, bool kSwiglu>
__global__ void __launch_bounds__(kThreads, 1) grouped_gemm_tiles_kernel(const __grid_constant__ GroupedGemm g, int column_tiles) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kOutColumns = kSwiglu ? kColumns / 2 : kColumns;
  const Segment segment = find_segment(g.expert_offsets, g.experts, g.rows, blockIdx.x,
                                       [&](int rows) { return (int64_t)((rows + kRows - 1) / kRows) * column_tiles; });
  if (segment.expert < 0) return;

  // The tile: groups of kGroup tiles of rows, in a group rows fastest.
  const int row_tiles = (segment.rows + kRows - 1) / kRows, unit = (int)segment.unit;
  const int group = unit / (kGroup * column_tiles) * kGroup, in_group = min(kGroup, row_tiles - group);
  const int tile_row = group + (unit - group * column_tiles) % in_group, tile_column = (unit - group * column_tiles) / in_group;
  const int row0 = segment.begin + tile_row * kRows, rows = min(kRows, segment.rows - tile_row * kRows);
  const int64_t column0 = (int64_t)tile_column * kOutColumns;

  // Copies: thread t has unit t % 4 of rows t / 4 + 64 i of both operands.
  const int thread = threadIdx.x, lane = thread % 32, copy_row = thread / 4;
  const int64_t copy_k = thread % 4 * 8;
  const T *a[2];
  bool a_inside[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T *row = copy_row + i * 64 < rows ? a_row<T>(g, row0 + copy_row + i * 64) : nullptr;
    a_inside[i] = row != nullptr;
    a[i] = (row ? row : (const T *)g.a) + copy_k;
  }
  // Weight row 64 i + j of a stage is column 64 i + j, with SwiGLU 32 i + j % 32 of gate (j < 32) or of up.
  const int64_t w_column = column0 + (kSwiglu ? copy_row % 32 : copy_row);
  const int64_t w_row = w_column + (kSwiglu && copy_row >= 32 ? g.n : 0);
  constexpr int kStep = kSwiglu ? 32 : 64;
  const T *w = (const T *)g.w + segment.expert * g.w_expert_stride + w_row * g.w_stride + copy_k;

  const uint32_t base = shared_address(shared), to = place(copy_row, thread % 4);
  const auto load = [&](int stage, int64_t k0) {
    const uint32_t at = base + stage * kStageBytes + to;
    const int bytes = bytes_left(g.k, k0 + copy_k);
#pragma unroll
    for (int i = 0; i < 2; ++i) cp_async_16(at + i * 64 * kRowBytes, a_inside[i] && bytes ? a[i] + k0 : (const T *)g.a, a_inside[i] ? bytes : 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool inside = w_column + i * kStep < g.n && bytes;
      cp_async_16(at + (kRows + i * 64) * kRowBytes, inside ? w + i * kStep * g.w_stride + k0 : (const T *)g.w, inside ? bytes : 0);
    }
  };

  const int depth_tiles = (int)((g.k + kDepth - 1) / kDepth);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < depth_tiles) load(s, (int64_t)s * kDepth);
    cp_async_commit();
  }

  // Warp (m, n) of 2 x 4 has rows 64 m and weight rows 64 n; fragment i of A is rows 16 i, j of the weights rows 8 j.
  const int warp_m = thread / 32 / 4, warp_n = thread / 32 % 4;
  const bool busy = warp_m * 64 < rows;
  const uint32_t a_from = base + place(warp_m * 64 + lane % 16, lane / 16);
  const uint32_t w_from = base + kRows * kRowBytes + place(warp_n * 64 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  float sum[4][8][4] = {};
  for (int tile = 0, stage = 0; tile < depth_tiles; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int next = tile + kStages - 1;
    if (next < depth_tiles) load((stage + kStages - 1) % kStages, (int64_t)next * kDepth);
    cp_async_commit();
    if (busy) {
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step) {
        uint32_t fa[4][4], fw[4][4];  // 16 x 16 each
#pragma unroll
        for (int i = 0; i < 4; ++i) ldmatrix_x4(fa[i], (a_from + stage * kStageBytes + i * 16 * kRowBytes) ^ (step * 32));
#pragma unroll
        for (int j = 0; j < 4; ++j) ldmatrix_x4(fw[j], (w_from + stage * kStageBytes + j * 16 * kRowBytes) ^ (step * 32));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) mma_m16n8k16(sum[i][j], fa[i], fw[j / 2][j % 2 * 2], fw[j / 2][j % 2 * 2 + 1], T());
      }
    }
    stage = (stage + 1) % kStages;
  }

  // The result goes through shared memory, [128, kOutColumns] with 16-byte units swizzled by row % 8, to be stored 16 bytes at a time.
  cp_async_wait<0>();
  __syncthreads();
  constexpr int kOutBytes = kOutColumns * 2;
  const auto out_place = [](int row, int unit) { return row * kOutBytes + (unit ^ row % 8) * 16; };
  if (busy) {
    constexpr int kFragments = kSwiglu ? 4 : 8;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kFragments; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float x[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            x[e] = sum[i][j][half * 2 + e];
            if (kSwiglu) x[e] = silu(x[e]) * sum[i][(j + 4) % 8][half * 2 + e];
          }
          T pair[2];
          from_float(x[0], pair[0]);
          from_float(x[1], pair[1]);
          uint32_t bits;
          memcpy(&bits, pair, 4);
          const int row = warp_m * 64 + i * 16 + half * 8 + lane / 4;
          *(uint32_t *)(shared + out_place(row, warp_n * kFragments + j) + lane % 4 * 4) = bits;
        }
  }
  __syncthreads();
  for (int i = thread; i < rows * (kOutColumns / 8); i += kThreads) {
    const int row = i / (kOutColumns / 8), unit_of_row = i % (kOutColumns / 8);
    const int64_t column = column0 + unit_of_row * 8;
    if (column < g.n)
      store8((T *)g.out + (row0 + row) * g.out_stride + column, *(const Vector8<T> *)(shared + out_place(row, unit_of_row)), g.n - column);
  }
}

}  // namespace

cudaError_t grouped_gemm_tiles_init() {
  for (const void *kernel : {(const void *)grouped_gemm_tiles_kernel<__nv_bfloat16, false>, (const void *)grouped_gemm_tiles_kernel<__nv_bfloat16, true>,
                             (const void *)grouped_gemm_tiles_kernel<__half, false>, (const void *)grouped_gemm_tiles_kernel<__half, true>}) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kStages * kStageBytes);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t grouped_gemm_tiles(const GroupedGemm &g, cudaStream_t stream) {
  const int out_columns = g.swiglu ? kColumns / 2 : kColumns;
  const int64_t column_tiles = (g.n + out_columns - 1) / out_columns;
  with_half_type(g.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = g.swiglu ? grouped_gemm_tiles_kernel<T, true> : grouped_gemm_tiles_kernel<T, false>;
    kernel<<<(unsigned)(most_row_tiles(g, kRows) * column_tiles), kThreads, kStages * kStageBytes, stream>>>(g, (int)column_tiles);
  });
  return cudaGetLastError();
}

}  // namespace mixtral::cuda
