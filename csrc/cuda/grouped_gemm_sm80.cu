// Grouped product for many rows an expert: tiles on mma.sync, weights as they lie in memory.
//
//   tile       LargeTile: 128 rows x 256 weight rows x 64, 8 warps of 64 x 64, one block an SM; SmallTile: 64 x 128 x 64, 4 warps of
//              64 x 32, two blocks an SM where they fit. With SwiGLU half of the weight rows are gate and half the same of up, so both of a
//              column are in one thread
//   grid       all tiles there can be for `rows`; a block finds its tile from the offsets and ends at once if there is none
//   stages     2 of 48 KB, 4 of 24 KB: rows of A through a_rows, and weights, by cp.async, 16 bytes a thread: 96 KB of shared memory.
//              Rows are 128 bytes, their eight 16-byte units swizzled by row % 8: no bank conflict in copies or ldmatrix
//   registers  242 and 164 to 168: 128 or 64 accumulators, twice 32 or 24 of fragments: those of the next 16 of k are read while these
//              are multiplied
//   barriers   one a stage
//   order      16 tiles of rows by all columns, rows fastest: 132 blocks at work share 2048 rows of A and as many of weights
//   moved      tiles * (rows + weight rows) * k * 2 bytes from L2, rows that do not exist left out
//   FLOPs      rows in sixty-fours * n * k * 2 (SwiGLU: * 4): a warp without rows multiplies nothing
#include "common/launch.h"
#include "common/overlap.cuh"
#include "common/ptx_sm80.cuh"
#include "common/vector8.cuh"
#include "grouped_gemm_common.cuh"
#include "grouped_gemm_kernels.h"

namespace mixtral::cuda {
namespace {

using namespace mixtral::sm80;

constexpr int kGroup = 16;  // tiles of rows that share a pass over the weights

template <int rows, int columns, int warps_m, int warps_n, int stages, int blocks>
struct Tile {
  static constexpr int kRows = rows, kColumns = columns, kWarpsN = warps_n, kThreads = warps_m * warps_n * 32, kBlocks = blocks;
  static constexpr int kWarpRows = rows / warps_m, kWarpColumns = columns / warps_n, kStages = stages;
  static constexpr int kStageBytes = (rows + columns) * kRowBytes, kShared = stages * kStageBytes;
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture since sm_80");
  static_assert(kThreads / 8 == kWarpColumns / 2, "a pass of copies has the gate or the up rows of a warp");
};
using LargeTile = Tile<128, 256, 2, 4, 2, 1>;
using SmallTile = Tile<64, 128, 1, 4, 4, 2>;

template <class T, bool kSwiglu, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grouped_gemm_tiles_kernel(const __grid_constant__ GroupedGemm g, int column_tiles) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns, kThreads = Tile::kThreads, kStages = Tile::kStages;
  constexpr int kOutColumns = kSwiglu ? kColumns / 2 : kColumns;
  let_next_kernel_begin();
  const Segment segment = find_expert(g, blockIdx.x, [&](int rows) { return (int64_t)((rows + kRows - 1) / kRows) * column_tiles; });
  if (segment.index < 0) {
    if (blockIdx.x == 0) wait_for_kernels_before();  // no expert has rows: no other block waits either
    return;
  }

  // The tile: groups of kGroup tiles of rows, in a group rows fastest.
  const int row_tiles = (segment.rows + kRows - 1) / kRows, unit = (int)segment.unit;
  const int group = unit / (kGroup * column_tiles) * kGroup, in_group = min(kGroup, row_tiles - group);
  const int tile_row = group + (unit - group * column_tiles) % in_group, tile_column = (unit - group * column_tiles) / in_group;
  const int row0 = segment.begin + tile_row * kRows, rows = min(kRows, segment.rows - tile_row * kRows);
  const int64_t column0 = (int64_t)tile_column * kOutColumns;

  // Copies: thread t has unit t % 8 of rows t / 8 + kPass i. Pass i of the weights has columns kPass i and on; with SwiGLU columns
  // kPass (i / 2) and on of gate (i even) or of up: those of one warp follow each other.
  const int thread = threadIdx.x, lane = thread % 32, copy_row = thread / 8, copy_k = thread % 8 * 8;
  constexpr int kPass = kThreads / 8, kCopiesA = kRows / kPass, kCopiesW = kColumns / kPass;
  const T *a[kCopiesA];  // NULL: zeros
#pragma unroll
  for (int i = 0; i < kCopiesA; ++i) {
    a[i] = copy_row + i * kPass < rows ? a_row<T>(g, row0 + copy_row + i * kPass) : nullptr;
    if (a[i]) a[i] += copy_k;
  }
  const int columns_left = (int)min(g.n - column0 - copy_row, (int64_t)kColumns);
  const T *const w = (const T *)g.w + segment.index * g.w_expert_stride + (column0 + copy_row) * g.w_stride + copy_k;
  const int64_t up = g.n * g.w_stride;
  const uint32_t base = shared_address(shared), to = place(copy_row, thread % 8);
  const auto load = [&](int stage, int64_t k0) {
    const uint32_t at = base + stage * Tile::kStageBytes + to;
    const bool inside = k0 + copy_k < g.k;
#pragma unroll
    for (int i = 0; i < kCopiesA; ++i) cp_async_16(at + i * kPass * kRowBytes, a[i] + k0, a[i] && inside);
#pragma unroll
    for (int i = 0; i < kCopiesW; ++i) {
      const int column = (kSwiglu ? i / 2 : i) * kPass;
      const T *from = w + column * g.w_stride + k0 + (kSwiglu && i % 2 ? up : 0);
      cp_async_16(at + (kRows + i * kPass) * kRowBytes, from, column < columns_left && inside);
    }
  };

  // Warp (m, n); fragment i of A is rows 16 i, fragment j of the weights rows 16 j of the warp's.
  constexpr int kWarpRows = Tile::kWarpRows, kWarpColumns = Tile::kWarpColumns, kFragmentsA = kWarpRows / 16, kFragmentsW = kWarpColumns / 16;
  const int warp = __shfl_sync(~0u, thread / 32, 0);  // the same in all lanes, as ptxas sees too
  const int warp_m = warp / Tile::kWarpsN, warp_n = warp % Tile::kWarpsN;
  const bool busy = warp_m * kWarpRows < rows;
  const uint32_t a_from = base + place(warp_m * kWarpRows + lane % 16, lane / 16);
  const uint32_t w_from = base + kRows * kRowBytes + place(warp_n * kWarpColumns + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  uint32_t fa[2][kFragmentsA][4], fw[2][kFragmentsW][4];
  const auto read = [&](int buffer, int stage, int step) {
    const uint32_t at = stage * Tile::kStageBytes;
#pragma unroll
    for (int i = 0; i < kFragmentsA; ++i) ldmatrix_x4(fa[buffer][i], (a_from + at + i * 16 * kRowBytes) ^ (step * 32));
#pragma unroll
    for (int j = 0; j < kFragmentsW; ++j) ldmatrix_x4(fw[buffer][j], (w_from + at + j * 16 * kRowBytes) ^ (step * 32));
  };

  wait_for_kernels_before();
  const int depth_tiles = (int)((g.k + kDepth - 1) / kDepth);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < depth_tiles) load(s, (int64_t)s * kDepth);
    cp_async_commit();
  }
  float sum[kFragmentsA][2 * kFragmentsW][4] = {};
  cp_async_wait<kStages - 2>();
  __syncthreads();
  read(0, 0, 0);
  for (int tile = 0, stage = 0; tile < depth_tiles; ++tile) {
    const int next_stage = stage + 1 == kStages ? 0 : stage + 1, load_stage = stage ? stage - 1 : kStages - 1;
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
      if (step < kDepth / 16 - 1) {
        read((step + 1) % 2, stage, step + 1);
      } else {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        read((step + 1) % 2, next_stage, 0);
      }
      if (step == 0) {  // all warps are past the last reads of the stage before this one
        if (tile + kStages - 1 < depth_tiles) load(load_stage, (int64_t)(tile + kStages - 1) * kDepth);
        cp_async_commit();
      }
      if (busy) {  // the branch also keeps ptxas from spreading the copies among the products
#pragma unroll
        for (int i = 0; i < kFragmentsA; ++i)
#pragma unroll
          for (int j = 0; j < 2 * kFragmentsW; ++j)
            mma_m16n8k16(sum[i][j], fa[step % 2][i], fw[step % 2][j / 2][j % 2 * 2], fw[step % 2][j / 2][j % 2 * 2 + 1], T());
      }
    }
    stage = next_stage;
  }

  // The result goes through shared memory, [kRows, kOutColumns] with 16-byte units swizzled by row % 8, to be stored 16 bytes at a time.
  cp_async_wait<0>();
  __syncthreads();
  const auto out_place = [](int row, int unit) { return swizzled<kOutColumns * 2>(row, unit); };
  constexpr int kEights = kSwiglu ? kFragmentsW : 2 * kFragmentsW;  // of a warp's columns
#pragma unroll
  for (int i = 0; i < kFragmentsA; ++i)
#pragma unroll
    for (int j = 0; j < kEights; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T pair[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = sum[i][j][half * 2 + e];
          from_float(kSwiglu ? silu(x) * sum[i][(j + kFragmentsW) % (2 * kFragmentsW)][half * 2 + e] : x, pair[e]);
        }
        uint32_t bits;
        memcpy(&bits, pair, 4);
        const int row = warp_m * kWarpRows + i * 16 + half * 8 + lane / 4;
        *(uint32_t *)(shared + out_place(row, warp_n * kEights + j) + lane % 4 * 4) = bits;
      }
  __syncthreads();
  for (int i = thread; i < rows * (kOutColumns / 8); i += kThreads) {
    const int row = i / (kOutColumns / 8), unit_of_row = i % (kOutColumns / 8);
    const int64_t column = column0 + unit_of_row * 8;
    if (column < g.n)
      store8((T *)g.out + (row0 + row) * g.out_stride + column, *(const Vector8<T> *)(shared + out_place(row, unit_of_row)), g.n - column);
  }
}

// Calls body(kernel, tile) with the kernel for these types.
template <class Body>
void with_kernel(int32_t dtype, bool swiglu, int tile_rows, const Body &body) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (tile_rows == LargeTile::kRows)
      body(swiglu ? grouped_gemm_tiles_kernel<T, true, LargeTile> : grouped_gemm_tiles_kernel<T, false, LargeTile>, LargeTile());
    else
      body(swiglu ? grouped_gemm_tiles_kernel<T, true, SmallTile> : grouped_gemm_tiles_kernel<T, false, SmallTile>, SmallTile());
  });
}

}  // namespace

cudaError_t grouped_gemm_tiles_init() {
  cudaError_t error = cudaSuccess;
  for (const int32_t dtype : {MIXTRAL_DTYPE_BF16, MIXTRAL_DTYPE_F16})
    for (const bool swiglu : {false, true})
      for (const int tile_rows : {LargeTile::kRows, SmallTile::kRows})
        with_kernel(dtype, swiglu, tile_rows, [&](auto kernel, auto tile) {
          if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.kShared);
        });
  return error;
}

cudaError_t grouped_gemm_tiles(const GroupedGemm &g, int tile_rows, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_kernel(g.dtype, g.swiglu, tile_rows, [&](auto kernel, auto tile) {
    const int64_t out_columns = g.swiglu ? tile.kColumns / 2 : tile.kColumns, column_tiles = (g.n + out_columns - 1) / out_columns;
    // Fewer than 2^31: all tiles but an expert's last are full, 4096 elements of out or more, so that 2^31 would be 16 TiB.
    const dim3 grid((unsigned)(most_row_tiles(g, tile.kRows) * column_tiles));
    error = launch(kernel, grid, tile.kThreads, tile.kShared, stream, g.early, g, (int)column_tiles);
  });
  return error;
}

}  // namespace mixtral::cuda
