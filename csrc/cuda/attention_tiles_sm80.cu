// Attention of sequences with many rows: a block keeps 128 rows of q and goes through the keys that one of them sees, 64 at a time.
//
//   tile       128 rows x 64 keys, 4 warps of 32 rows. The rows of a key head's query heads are packed, row = token * group + head: with
//              groups of 4 a block is 32 tokens, so it sees 32 + W - 1 keys, not 128 + W - 1, and reads them once for its 4 heads
//   keys       from the diagonal down to the window's left edge; tiles with keys that some row does not see are masked, those between are not
//   grid       all tiles of rows there can be, of a sequence the last ones first: they see most keys, and what ends a grid are short ones
//   shared     q 128 rows, k and v 64 rows each: D = 128 64 KB, two blocks an SM on 8.0 and 9.0, one on 8.6 and 8.9; D = 64 32 KB. Rows of
//              D * 2 bytes, their 16-byte units swizzled by row % 8: no bank conflict in copies, ldmatrix or the result's way out
//   copies     cp.async, 16 bytes a thread: v while the scores are made, the next k while v is multiplied
//   registers  D = 128: 254 to 255, of them 128 sums of values, 64 scores, 16 + 8 fragments of q and k; D = 64: 230 to 238, 64 sums
//   barriers   two a tile of keys
//   moved      (W + 32) * D * 4 bytes of k and v a block, from L2
//   FLOPs      tiles of keys * 128 * 64 * D * 4, in warps that have rows; per row of a tile 64 powers of two
#include "attention_kernels.h"
#include "attention_rows.cuh"
#include "attention_softmax.cuh"
#include "common/launch.h"
#include "common/ptx_sm80.cuh"
#include "common/swizzle.cuh"
#include "common/vector8.cuh"

namespace mixtral::cuda {
namespace {

using namespace mixtral::sm80;

template <int head_dim>
struct Tile {
  static constexpr int kHeadDim = head_dim, kRows = kTileRows, kKeys = 64, kThreads = 128, kBlocks = 2;
  static constexpr int kUnits = head_dim / 8, kRowBytes = head_dim * 2;
  static constexpr int kK = kRows * kRowBytes, kV = kK + kKeys * kRowBytes, kShared = kV + kKeys * kRowBytes;  // bytes: q, then k, then v
  __device__ static uint32_t place(unsigned row, unsigned unit) { return swizzled<kRowBytes>(row, unit); }  // of q, k or v
};
using Tile128 = Tile<128>;
using Tile64 = Tile<64>;

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attention_tiles_kernel(const __grid_constant__ Attention a, int row_tiles, int heads_together) {
  extern __shared__ __align__(128) uint8_t shared[];
  constexpr int kRows = Tile::kRows, kKeys = Tile::kKeys, kThreads = Tile::kThreads, kRowBytes = Tile::kRowBytes, kHeadDim = Tile::kHeadDim;

  // The block's tile: `heads_together` key heads at a time.
  const int per_section = row_tiles * heads_together, in_section = blockIdx.x % per_section;
  const int head = blockIdx.x / per_section * heads_together + in_section % heads_together;
  if (head >= a.key_heads) return;
  const Segment segment = find_sequence(a, in_section / heads_together, [&](int, int n) { return is_split(a, n) ? 0 : count_row_tiles<kRows>(a, n); });
  if (segment.index < 0) return;
  const Sequence sequence = sequence_at(a, segment.index, segment.begin, segment.rows, kKeys);
  if (sequence.slot < 0) return;
  const int row0 = (count_row_tiles<kRows>(a, segment.rows) - 1 - (int)segment.unit) * kRows, rows = min(kRows, segment.rows * a.group - row0);
  const KeyRange range(sequence, a.window, sequence.position + row0 / a.group, sequence.position + (row0 + rows - 1) / a.group);

  // Copies: thread t has unit t % kUnits of rows t / kUnits + kPass i.
  constexpr int kPass = kThreads / Tile::kUnits, kCopies = kKeys / kPass;
  const unsigned thread = threadIdx.x, lane = thread % 32;
  const int copy_row = thread / Tile::kUnits, copy_unit = thread % Tile::kUnits;
  const uint32_t base = shared_address(shared), to = base + Tile::place(copy_row, copy_unit);
  const KeyRows<T> k = key_rows<T>(a.k_ring, a.k, sequence, segment.index, head), v = key_rows<T>(a.v_ring, a.v, sequence, segment.index, head);
  const auto load = [&](int place, const KeyRows<T> &rows_of, int tile) {  // only keys that some row sees
    const int key = tile * kKeys + copy_row;
    const auto seen = [&](int i) { return key + i * kPass >= range.begin && key + i * kPass < range.end; };
    if (tile * kKeys >= sequence.chunk) {  // the ring ends with a tile
      const T *from = rows_of.in_chunk(sequence, key) + copy_unit * 8;
#pragma unroll
      for (int i = 0; i < kCopies; ++i, from += kPass * rows_of.chunk_token) cp_async_16(to + place + i * kPass * kRowBytes, from, seen(i));
    } else {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
        cp_async_16(to + place + i * kPass * kRowBytes, rows_of.in_ring(a, sequence, key + i * kPass) + copy_unit * 8, seen(i));
    }
  };

  const int first_tile = range.begin / kKeys;
  int tile = range.end > range.begin ? (range.end - 1) / kKeys : first_tile - 1;
  for (int i = 0; i < kRows / kPass; ++i) {
    const int row = copy_row + i * kPass;
    cp_async_16(to + i * kPass * kRowBytes, query_row<const T>(a.q, a, segment, head, row0 + row) + copy_unit * 8, row < rows);
  }
  if (tile >= first_tile) load(Tile::kK, k, tile);
  cp_async_commit();
  if (a.negative) {  // the copies of this thread, before the barrier that shows them to the others
    cp_async_wait<0>();
    for (int i = 0; i < kRows / kPass; ++i) {
      uint4 *x = (uint4 *)(shared + Tile::place(copy_row, copy_unit) + i * kPass * kRowBytes);
      *x = make_uint4(x->x ^ 0x80008000u, x->y ^ 0x80008000u, x->z ^ 0x80008000u, x->w ^ 0x80008000u);
    }
  }

  // Warp w has rows 32 w and on, as two fragments of 16: a thread has rows lane / 4 + 8 (h % 2) of fragment h / 2.
  const int warp = __shfl_sync(~0u, thread / 32, 0);  // the same in all lanes, as ptxas sees too
  const bool busy = warp * 32 < rows;
  const uint32_t q_from = base + Tile::place(warp * 32 + lane % 16, lane / 16);
  const uint32_t k_from = base + Tile::kK + Tile::place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const uint32_t v_from = base + Tile::kV + Tile::place(lane % 16, lane / 16);
  constexpr int kSteps = kHeadDim / 16, kSixteens = kKeys / 16;
  RowSoftmax softmax[4];
  float sum[2][2 * kSteps][4] = {};  // [fragment][8 columns]: of values
  for (; tile >= first_tile; --tile) {
    cp_async_wait<0>();
    __syncthreads();  // k is there, and all warps are past the values of the tile before
    load(Tile::kV, v, tile);
    cp_async_commit();
    uint32_t weights[2][kSixteens][4];
    if (busy) {
      // Scores: fragments of q are those of 16 rows x 16 of D, of k 16 keys x 16; the next are read while these are multiplied.
      float score[2][2 * kSixteens][4] = {};
      uint32_t fq[2][2][4], fk[2][4];
      const auto read_q = [&](int step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) ldmatrix_x4(fq[step % 2][i], (q_from + i * 16 * kRowBytes) ^ (step * 32));
      };
      const auto read_k = [&](int n) { ldmatrix_x4(fk[n % 2], (k_from + n % kSixteens * 16 * kRowBytes) ^ (n / kSixteens * 32)); };
      read_q(0);
      read_k(0);
#pragma unroll
      for (int n = 0; n < kSteps * kSixteens; ++n) {
        const int step = n / kSixteens, j = n % kSixteens;
        if (j == 0 && step + 1 < kSteps) read_q(step + 1);
        if (n + 1 < kSteps * kSixteens) read_k(n + 1);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            mma_m16n8k16(score[i][2 * j + half], fq[step % 2][i], fk[n % 2][2 * half], fk[n % 2][2 * half + 1], T());
      }

      if (range.edge(tile * kKeys, kKeys)) {
#pragma unroll
        for (int h = 0; h < 4; ++h) {
          const RowMask mask(sequence, a.window, sequence.position + (row0 + warp * 32 + h * 8 + lane / 4) / a.group);
          mask_row(score[h / 2], h % 2, mask, tile * kKeys);
        }
      }

#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const float factor = to_weights(score[h / 2], h % 2, a.scale, softmax[h], weights[h / 2], T());
        scale_row(sum[h / 2], h % 2, factor);
      }
    }

    cp_async_wait<0>();
    __syncthreads();  // v is there, and all warps are past k
    if (tile > first_tile) load(Tile::kK, k, tile - 1);
    cp_async_commit();
    if (busy) {  // fragments of v: 16 keys x 16 of D
      uint32_t fv[2][4];
      const auto read_v = [&](int n) { ldmatrix_x4_trans(fv[n % 2], (v_from + n / kSteps * 16 * kRowBytes) ^ (n % kSteps * 32)); };
      read_v(0);
#pragma unroll
      for (int n = 0; n < kSixteens * kSteps; ++n) {
        if (n + 1 < kSixteens * kSteps) read_v(n + 1);
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            mma_m16n8k16(sum[i][n % kSteps * 2 + half], weights[i][n / kSteps], fv[n % 2][2 * half], fv[n % 2][2 * half + 1], T());
      }
    }
  }

  // The result goes through the shared memory of q, each warp its own rows, to be stored 16 bytes at a time.
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 4; ++h) {
    const int row = warp * 32 + h * 8 + lane / 4;
    const float total = quad_sum(softmax[h].sum), inverse = softmax_inverse(total);
#pragma unroll
    for (int j = 0; j < 2 * kSteps; ++j)
      *(uint32_t *)(shared + Tile::place(row, j) + lane % 4 * 4) =
          pack(sum[h / 2][j][h % 2 * 2] * inverse, sum[h / 2][j][h % 2 * 2 + 1] * inverse, T());
    if (a.lse && lane % 4 == 0 && row < rows)
      *lse_of_row(a, segment, head, row0 + row) = log_sum_exp(softmax_shift(softmax[h].highest, a.scale), total);
  }
  __syncthreads();
  for (int i = 0; i < kRows / kPass; ++i) {
    const int row = copy_row + i * kPass;
    if (row < rows)
      store8(query_row<T>(a.out, a, segment, head, row0 + row) + copy_unit * 8, *(const Vector8<T> *)(shared + Tile::place(row, copy_unit)), 8);
  }
}

// Calls body(kernel, tile) with the kernel for these types.
template <class Body>
void with_kernel(int32_t dtype, int head_dim, const Body &body) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (head_dim == Tile128::kHeadDim)
      body(attention_tiles_kernel<T, Tile128>, Tile128());
    else
      body(attention_tiles_kernel<T, Tile64>, Tile64());
  });
}

}  // namespace

cudaError_t attention_tiles_init() {
  cudaError_t error = cudaSuccess;
  for (const int32_t dtype : {MIXTRAL_DTYPE_BF16, MIXTRAL_DTYPE_F16})
    for (const int head_dim : {64, 128})
      with_kernel(dtype, head_dim, [&](auto kernel, auto tile) {
        if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, tile.kShared);
      });
  return error;
}

cudaError_t attention_tiles(const Attention &a, int64_t row_tiles, int heads_together, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  with_kernel(a.dtype, a.head_dim, [&](auto kernel, auto tile) {
    const int sections = (a.key_heads + heads_together - 1) / heads_together;
    const dim3 grid((unsigned)(row_tiles * heads_together * sections));
    error = launch(kernel, grid, tile.kThreads, tile.kShared, stream, false, a, (int)row_tiles, heads_together);
  });
  return error;
}

}  // namespace mixtral::cuda
