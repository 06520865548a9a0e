// Grouped product for few rows an expert (decoding): the weights are the 16-row operand of mma.sync and the rows of A its 8 columns, so
// that 1 to 64 rows ride along while the weights of the experts that have rows stream through once.
//
//   unit       64 weight rows (with SwiGLU 32 of gate and the same 32 of up) x up to kRows rows of an expert x all of k
//   grid       one or two blocks an SM, block b takes the units b, b + gridDim.x, ..: all SMs read to the end, and a block's copies run on
//              into its next unit. Experts without rows have no units
//   step       64 of k, 4 warps of 16 weight rows (8 of gate and the 8 of up); groups of 8 rows of A beyond the expert's are neither
//              loaded nor multiplied
//   kRows          8       16       32       64    rows of A that one pass over the weights serves
//   stages        10        9        7        5    of 8 KB of weights + 128 bytes a row of A, by cp.async. Rows are 128 bytes, their eight
//                                                  16-byte units swizzled by row % 8: no bank conflict in copies or ldmatrix
//   shared       91 KB    92 KB    88 KB    88 KB  with the result's 128 bytes a row of A
//   registers    80 to   94 to    102 to   124 to  with 4, 8, 16, 32 accumulators
//                82      96       108      125
//   in flight    72 KB    64 KB    48 KB    32 KB  of weights a block; 3.35 TB/s * 0.7 us / 132 SMs = 18 KB an SM are needed
//   barriers   one a step, one a unit
//   moved      touched experts * n * k * 2 bytes once for every kRows rows of an expert; A from L2
#include "common/launch.h"
#include "common/overlap.cuh"
#include "common/ptx_sm80.cuh"
#include "common/vector8.cuh"
#include "grouped_gemm_common.cuh"
#include "grouped_gemm_kernels.h"

namespace mixtral::cuda {
namespace {

using namespace mixtral::sm80;

template <int rows, int warps, int stages>
struct Tile {
  static constexpr int kRows = rows, kThreads = warps * 32, kStages = stages, kWeightRows = warps * 16;
  static constexpr int kStageBytes = (kWeightRows + rows) * kRowBytes, kShared = stages * kStageBytes + rows * kWeightRows * 2;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture since sm_80");
};
using Tile8 = Tile<8, 4, 10>;
using Tile16 = Tile<16, 4, 9>;
using Tile32 = Tile<32, 4, 7>;
using Tile64 = Tile<64, 4, 5>;

template <class T, bool kSwiglu, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) grouped_gemm_few_rows_kernel(const __grid_constant__ GroupedGemm g, int column_tiles) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kRows = Tile::kRows, kWeightRows = Tile::kWeightRows, kThreads = Tile::kThreads, kStages = Tile::kStages;
  constexpr int kStageBytes = Tile::kStageBytes, kOutColumns = kSwiglu ? kWeightRows / 2 : kWeightRows;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int depth_tiles = max(1, (int)((g.k + kDepth - 1) / kDepth));

  struct Unit {
    int expert, row0, rows;  // expert -1: none
    int64_t column0;
  };
  // The parts of an expert's rows follow each other, then the columns: the weights of one are read by neighbours, at the same time.
  const auto unit_at = [&](int64_t index) {
    const Segment s = find_expert(g, index, [&](int rows) { return (int64_t)((rows + kRows - 1) / kRows) * column_tiles; });
    if (s.index < 0) return Unit{-1, 0, 0, 0};
    const int parts = (s.rows + kRows - 1) / kRows, part = (int)(s.unit % parts);
    return Unit{s.index, s.begin + part * kRows, min(kRows, s.rows - part * kRows), s.unit / parts * kOutColumns};
  };

  // Copies: thread t has unit t % 8 of rows t / 8 + 16 i. Weight row 16 i + j of a stage is column 16 i + j; with SwiGLU column 8 i + j % 8
  // of gate (j < 8) or of up.
  constexpr int kPass = kThreads / 8, kCopiesW = kWeightRows / kPass, kCopiesA = (kRows + kPass - 1) / kPass, kStep = kSwiglu ? 8 : 16;
  static_assert(kPass == 16);
  const int copy_row = thread / 8, copy_k = thread % 8 * 8;
  const uint32_t base = shared_address(shared), to = place(copy_row, thread % 8);
  const int64_t step = kStep * g.w_stride;
  int64_t load_index = blockIdx.x;
  int load_tile = 0, load_rows = 0;  // rows: in whole groups of 8
  int columns_left = 0;
  bool more = false;
  const T *w = nullptr, *a[kCopiesA];  // a: NULL for zeros
  const auto begin_loads = [&] {
    const Unit unit = unit_at(load_index);
    more = unit.expert >= 0;
    if (!more) return;
    load_tile = 0;
    load_rows = (unit.rows + 7) / 8 * 8;
    const int64_t column = unit.column0 + (kSwiglu ? copy_row % 8 : copy_row);
    columns_left = (int)min(g.n - column, (int64_t)kOutColumns);
    w = (const T *)g.w + unit.expert * g.w_expert_stride + (column + (kSwiglu && copy_row >= 8 ? g.n : 0)) * g.w_stride + copy_k;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      a[i] = copy_row + i * kPass < unit.rows ? a_row<T>(g, unit.row0 + copy_row + i * kPass) : nullptr;
      if (a[i]) a[i] += copy_k;
    }
  };
  const auto load_weights = [&](int stage, int64_t k0) {
    const uint32_t at = base + stage * kStageBytes + to;
    const bool inside = k0 + copy_k < g.k;
#pragma unroll
    for (int i = 0; i < kCopiesW; ++i) cp_async_16(at + i * kPass * kRowBytes, w + i * step + k0, i * kStep < columns_left && inside);
  };
  // The next 64 of k of the unit at hand, or the first of the next unit.
  const auto load = [&](int stage, bool weights) {
    if (!more) return;
    const uint32_t at = base + stage * kStageBytes + to;
    const int64_t k0 = (int64_t)load_tile * kDepth;
    const bool inside = k0 + copy_k < g.k;
    if (weights) load_weights(stage, k0);
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) {
      if (copy_row + i * kPass < load_rows) cp_async_16(at + (kWeightRows + i * kPass) * kRowBytes, a[i] + k0, a[i] && inside);
    }
    if (++load_tile == depth_tiles) {
      load_index += gridDim.x;
      begin_loads();
    }
  };

  begin_loads();
  let_next_kernel_begin();
  const int ahead = g.early && more ? min(kStages - 1, depth_tiles) : 0;  // stages whose weights need not wait for A
  for (int s = 0; s < ahead; ++s) load_weights(s, (int64_t)s * kDepth);
  wait_for_kernels_before();
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) {
    load(s, s >= ahead);
    cp_async_commit();
  }
  const uint32_t w_from = base + place(warp * 16 + lane % 16, lane / 16);
  const uint32_t a_from = base + kWeightRows * kRowBytes + place(lane % 8, lane / 8);
  int stage = 0;
#pragma unroll 1
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const Unit unit = unit_at(index);
    if (unit.expert < 0) return;
    const int groups = (unit.rows + 7) / 8;
    float sum[kRows / 8][4] = {};
#pragma unroll 1
    for (int tile = 0; tile < depth_tiles; ++tile) {
      cp_async_wait<kStages - 2>();
      __syncthreads();
      uint32_t fw[4][4], fa[2][2][4];  // 16 weight rows x 16; 8 rows of A x 32, those of the next group while one is multiplied
      const auto read = [&](int j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) ldmatrix_x4(fa[j % 2][half], (a_from + stage * kStageBytes + j * 8 * kRowBytes) ^ (half * 64));
      };
#pragma unroll
      for (int step = 0; step < 4; ++step) ldmatrix_x4(fw[step], (w_from + stage * kStageBytes) ^ (step * 32));
      read(0);
      load(stage ? stage - 1 : kStages - 1, true);
      cp_async_commit();
#pragma unroll
      for (int j = 0; j < kRows / 8; ++j) {
        if (j >= groups) break;
        if (j + 1 < kRows / 8 && j + 1 < groups) read(j + 1);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const uint32_t(&pair)[4] = fa[j % 2][step / 2];
          mma_m16n8k16(sum[j], fw[step], pair[step % 2 * 2], pair[step % 2 * 2 + 1], T());
        }
      }
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }

    // Lane l holds weight rows l / 4 and l / 4 + 8 of rows 2 (l % 4) and the next of A. Through shared memory, [kRows, kOutColumns],
    // to stores of 16 bytes; the next unit's first barrier is behind them.
    T *const out = (T *)(shared + kStages * kStageBytes);
#pragma unroll
    for (int j = 0; j < kRows / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        T *const row = out + (j * 8 + lane % 4 * 2 + e) * kOutColumns;
        if (kSwiglu) {
          from_float(silu(sum[j][e]) * sum[j][2 + e], row[warp * 8 + lane / 4]);
        } else {
          from_float(sum[j][e], row[warp * 16 + lane / 4]);
          from_float(sum[j][2 + e], row[warp * 16 + lane / 4 + 8]);
        }
      }
    __syncthreads();
    for (int i = thread; i < unit.rows * (kOutColumns / 8); i += kThreads) {
      const int row = i / (kOutColumns / 8), column = i % (kOutColumns / 8) * 8;
      if (unit.column0 + column < g.n)
        store8((T *)g.out + (unit.row0 + row) * g.out_stride + unit.column0 + column, *(const Vector8<T> *)(out + row * kOutColumns + column),
               g.n - unit.column0 - column);
    }
  }
}

// Calls body(kernel, tile) with the kernel for these types.
template <class Tile, class Body>
void with_types(int32_t dtype, bool swiglu, const Body &body) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    body(swiglu ? grouped_gemm_few_rows_kernel<T, true, Tile> : grouped_gemm_few_rows_kernel<T, false, Tile>, Tile());
  });
}

template <class Body>
void with_kernel(int32_t dtype, bool swiglu, int tile_rows, const Body &body) {
  switch (tile_rows) {
    case 8: return with_types<Tile8>(dtype, swiglu, body);
    case 16: return with_types<Tile16>(dtype, swiglu, body);
    case 32: return with_types<Tile32>(dtype, swiglu, body);
    case 64: return with_types<Tile64>(dtype, swiglu, body);
  }
}

}  // namespace

cudaError_t grouped_gemm_few_rows_init(bool *overlaps) {
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, grouped_gemm_few_rows_kernel<__half, true, Tile8>);
  *overlaps = attributes.ptxVersion >= 90;
  for (const int32_t dtype : {MIXTRAL_DTYPE_BF16, MIXTRAL_DTYPE_F16})
    for (const bool swiglu : {false, true})
      for (const int tile_rows : {8, 16, 32, 64})
        with_kernel(dtype, swiglu, tile_rows, [&](auto kernel, auto tile) {
          if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.kShared);
        });
  return error;
}

cudaError_t grouped_gemm_few_rows(const GroupedGemm &g, int tile_rows, int blocks, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_kernel(g.dtype, g.swiglu, tile_rows, [&](auto kernel, auto tile) {
    const int64_t out_columns = tile.kWeightRows / (g.swiglu ? 2 : 1), column_tiles = (g.n + out_columns - 1) / out_columns;
    const int64_t units = most_row_tiles(g, tile_rows) * column_tiles;
    const dim3 grid((unsigned)(units < blocks ? units : blocks));
    error = launch(kernel, grid, tile.kThreads, tile.kShared, stream, g.early, g, (int)column_tiles);
  });
  return error;
}

}  // namespace mixtral::cuda
