// Kernels of the sm_80 style for the tests of the virtual GPU: a correct one (kBug = kNone) and one for each planted bug. The line
// at which a bug must be reported ends in "caught: <bug>".
#include "cuda/common/ptx_sm80.cuh"

using namespace mixtral::sm80;
using bf16 = __nv_bfloat16;

enum Bug { kNone, kMissingWait, kWrongGroupCount, kMissingBarrier, kMissingFence, kMissingSyncwarp, kGlobalOffByOne, kSharedOffByOne,
           kMisaligned, kNeverWritten, kSplitRace, kDivergentBarrier };

// C[M, N] = A[M, K] B[N, K]^T in f32: tiles of 64 x 64 x 32 by four warps of 32 x 32, three stages of cp.async, fragments by
// ldmatrix. A row of a stage is 64 bytes: its four 16-byte units are swizzled by (row / 2) % 4, so that 8 rows meet all banks.
constexpr int kTile = 64, kTileK = 32, kStages = 3;

__device__ inline uint32_t unit_offset(int row, int unit) { return (uint32_t)(row * 64 + ((unit ^ row / 2 % 4) * 16)); }

template <int kBug>
__device__ void load_stage(uint32_t stage, const bf16 *a, const bf16 *b, int m, int n, int k, int from_k) {
  for (int i = threadIdx.x; i < 2 * kTile * 4; i += 128) {
    const int operand = i / (kTile * 4), row = i / 4 % kTile, unit = i % 4;
    const int global_row = (operand ? blockIdx.x : blockIdx.y) * kTile + row, rows = operand ? n : m, column = from_k + unit * 8;
    const bool inside = global_row < rows && column < k;
    const bf16 *from = (operand ? b : a) + (inside ? (int64_t)global_row * k + column : 0);
    cp_async_16(stage + operand * kTile * 64 + unit_offset(row, unit), from, inside);
  }
}

template <int kBug>
__device__ void gemm(const bf16 *a, const bf16 *b, float *c, int m, int n, int k) {
  __shared__ __align__(128) uint8_t stages[kStages][2 * kTile * 64];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = warp / 2 * 32, column0 = warp % 2 * 32;
  const uint32_t base = shared_address(stages);
  const int tiles = (k + kTileK - 1) / kTileK;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < tiles) load_stage<kBug>(base + s * 2 * kTile * 64, a, b, m, n, k, s * kTileK);
    cp_async_commit();
  }
  float sum[2][4][4] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    if (kBug == kWrongGroupCount)
      cp_async_wait<kStages - 1>();
    else if (kBug != kMissingWait)
      cp_async_wait<kStages - 2>();
    if (kBug != kMissingBarrier) __syncthreads();
    const int next = tile + kStages - 1;
    if (next < tiles) load_stage<kBug>(base + next % kStages * 2 * kTile * 64, a, b, m, n, k, next * kTileK);
    cp_async_commit();
    const uint32_t stage = base + tile % kStages * 2 * kTile * 64;
    for (int step = 0; step < 2; ++step) {
      uint32_t fa[2][4], fb[2][4];
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 16, unit = step * 2 + lane / 16;
        ldmatrix_x4(fa[i], stage + unit_offset(row0 + i * 16 + row, unit));  // caught: missing_wait, wrong_group_count, missing_barrier
        const int column = lane % 8 + lane / 16 * 8, unit_b = step * 2 + lane / 8 % 2;
        ldmatrix_x4(fb[i], stage + kTile * 64 + unit_offset(column0 + i * 16 + column, unit_b));
      }
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 4; ++j) mma_m16n8k16(sum[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1], bf16());
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int half = 0; half < 2; ++half) {
        const int row = blockIdx.y * kTile + row0 + i * 16 + half * 8 + lane / 4;
        const int column = blockIdx.x * kTile + column0 + j * 8 + lane % 4 * 2;
        for (int e = 0; e < 2; ++e)
          if (row < m && column + e < n) c[(int64_t)row * n + column + e] = sum[i][j][half * 2 + e];
      }
}

#define GEMM(name, bug)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(128) name(const bf16 *a, const bf16 *b, float *c, int m, int n, int k) {            \
    gemm<bug>(a, b, c, m, n, k);                                                                                                    \
  }
GEMM(gemm_sm80, kNone)
GEMM(gemm_sm80_missing_wait, kMissingWait)
GEMM(gemm_sm80_wrong_group_count, kWrongGroupCount)
GEMM(gemm_sm80_missing_barrier, kMissingBarrier)

// Attention of one head of 64 in the same style: each block has 64 queries, walks tiles of 64 keys up to the diagonal and keeps
// the online softmax of its rows; q, k, v [n, 64], n a multiple of 64.
extern "C" __global__ void __launch_bounds__(128) attention_sm80(const bf16 *q, const bf16 *k, const bf16 *v, float *out, float scale) {
  constexpr int kRow = 128;  // bytes; 8 units, swizzled by row % 8
  __shared__ __align__(128) uint8_t memory[5][64 * kRow];  // q, two stages of k and v
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = shared_address(memory);
  const auto place = [](int row, int unit) { return (uint32_t)(row * kRow + (unit ^ row % 8) * 16); };
  const auto load = [&](int buffer, const bf16 *from) {
    for (int i = threadIdx.x; i < 64 * 8; i += 128) cp_async_16(base + buffer * 64 * kRow + place(i / 8, i % 8), from + i * 8);
  };
  const int tiles = blockIdx.x + 1;
  load(0, q + (int64_t)blockIdx.x * 64 * 64);
  load(1, k);
  load(2, v);
  cp_async_commit();
  float o[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile + 1 < tiles) {
      load(1 + (tile + 1) % 2 * 2, k + (int64_t)(tile + 1) * 64 * 64);
      load(2 + (tile + 1) % 2 * 2, v + (int64_t)(tile + 1) * 64 * 64);
      cp_async_commit();
    }
    const uint32_t kb = base + (1 + tile % 2 * 2) * 64 * kRow, vb = kb + 64 * kRow;
    float s[8][4] = {};
    for (int step = 0; step < 4; ++step) {
      uint32_t fq[4];
      ldmatrix_x4(fq, base + place(warp * 16 + lane % 16, step * 2 + lane / 16));
      for (int j = 0; j < 4; ++j) {
        uint32_t fk[4];
        ldmatrix_x4(fk, kb + place(j * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
        mma_m16n8k16(s[2 * j], fq, fk[0], fk[1], bf16());
        mma_m16n8k16(s[2 * j + 1], fq, fk[2], fk[3], bf16());
      }
    }
    for (int half = 0; half < 2; ++half) {
      const int row = blockIdx.x * 64 + warp * 16 + half * 8 + lane / 4;
      float most = row_max[half];
      for (int j = 0; j < 8; ++j)
        for (int e = 0; e < 2; ++e) {
          float &x = s[j][half * 2 + e];
          x = tile * 64 + j * 8 + lane % 4 * 2 + e <= row ? x * scale : -INFINITY;
          most = fmaxf(most, x);
        }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float shrink = expf(row_max[half] - most);
      row_max[half] = most;
      float sum = 0;
      for (int j = 0; j < 8; ++j)
        for (int e = 0; e < 2; ++e) {
          s[j][half * 2 + e] = expf(s[j][half * 2 + e] - most);
          sum += s[j][half * 2 + e];
          o[j][half * 2 + e] *= shrink;
        }
      row_sum[half] = row_sum[half] * shrink + sum;
    }
    for (int step = 0; step < 4; ++step) {
      uint32_t p[4];
      for (int i = 0; i < 4; ++i) {
        const float *x = s[step * 2 + i / 2] + i % 2 * 2;
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
        p[i] = *reinterpret_cast<const uint32_t *>(&pair);
      }
      for (int j = 0; j < 4; ++j) {
        uint32_t fv[4];
        ldmatrix_x4_trans(fv, vb + place(step * 16 + lane % 16, j * 2 + lane / 16));
        mma_m16n8k16(o[2 * j], p, fv[0], fv[1], bf16());
        mma_m16n8k16(o[2 * j + 1], p, fv[2], fv[3], bf16());
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    float sum = row_sum[half];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int row = blockIdx.x * 64 + warp * 16 + half * 8 + lane / 4;
    for (int j = 0; j < 8; ++j) {
      const float2 pair = {o[j][half * 2] / sum, o[j][half * 2 + 1] / sum};
      *reinterpret_cast<float2 *>(out + (int64_t)row * 64 + j * 8 + lane % 4 * 2) = pair;
    }
  }
}

// A sum over all blocks: each writes its part, the last to arrive adds them up.
template <int kBug>
__device__ void ticket_sum(const float *x, float *parts, unsigned *ticket, float *result, int n) {
  __shared__ float shared[128];
  __shared__ bool last;
  float sum = 0;
  for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) sum += x[i];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < 128; ++i) sum += shared[i];
    parts[blockIdx.x] = sum;
    if (kBug != kMissingFence) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (last && kBug != kMissingFence) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];  // caught: missing_fence
    *result = total;
  }
}

extern "C" __global__ void ticket_sum_correct(const float *x, float *parts, unsigned *ticket, float *result, int n) {
  ticket_sum<kNone>(x, parts, ticket, result, n);
}
extern "C" __global__ void ticket_sum_missing_fence(const float *x, float *parts, unsigned *ticket, float *result, int n) {
  ticket_sum<kMissingFence>(x, parts, ticket, result, n);
}

// Two blocks each add half of the products; with kSplitRace both store into the same results, else each into its own.
template <int kBug>
__device__ void split_dot(const float *x, const float *y, float *out, int rows, int columns) {
  const int row = threadIdx.x;
  if (row >= rows) return;
  float sum = 0;
  for (int i = blockIdx.x * columns / 2; i < (blockIdx.x + 1) * columns / 2; ++i) sum += x[row * columns + i] * y[i];
  float *to = out + row + (kBug == kSplitRace ? 0 : blockIdx.x * rows);
  *to = sum;  // caught: split_race
}

extern "C" __global__ void split_dot_correct(const float *x, const float *y, float *out, int rows, int columns) {
  split_dot<kNone>(x, y, out, rows, columns);
}
extern "C" __global__ void split_dot_split_race(const float *x, const float *y, float *out, int rows, int columns) {
  split_dot<kSplitRace>(x, y, out, rows, columns);
}

// Reverses 256 numbers through shared memory, each warp its own 32 first, then the block, 16 bytes a thread at the end.
template <int kBug>
__device__ void reverse(const int *x, int *out, int n) {
  __shared__ __align__(16) int shared[256];
  const int t = threadIdx.x, lane = t % 32, slot = t;
  if (kBug != kNeverWritten || t != 7) shared[slot] = t < n ? x[t + (kBug == kGlobalOffByOne ? 1 : 0)] : 0;  // caught: global_off_by_one
  if (kBug != kMissingSyncwarp) __syncwarp();
  const int mine = shared[t - lane + 31 - lane];  // caught: missing_syncwarp
  __syncthreads();
  shared[224 - t / 32 * 32 + lane] = mine;
  if (kBug == kDivergentBarrier) {
    if (lane < 16)
      __syncthreads();  // caught: divergent_barrier
    else
      __threadfence_block();
  } else {
    __syncthreads();
  }
  if (kBug == kSharedOffByOne) {
    out[t] = shared[t + 1];  // caught: shared_off_by_one
  } else if (kBug == kMisaligned) {
    const int *from = shared + (t < 64 ? t * 4 : 0);
    if (t < 64) *reinterpret_cast<int4 *>(out + t * 4 + 1) = *reinterpret_cast<const int4 *>(from);  // caught: misaligned
  } else {
    out[t] = shared[t];  // caught: never_written
  }
}

#define REVERSE(name, bug) \
  extern "C" __global__ void __launch_bounds__(256) name(const int *x, int *out, int n) { reverse<bug>(x, out, n); }
REVERSE(reverse_correct, kNone)
REVERSE(reverse_missing_syncwarp, kMissingSyncwarp)
REVERSE(reverse_global_off_by_one, kGlobalOffByOne)
REVERSE(reverse_shared_off_by_one, kSharedOffByOne)
REVERSE(reverse_misaligned, kMisaligned)
REVERSE(reverse_never_written, kNeverWritten)
REVERSE(reverse_divergent_barrier, kDivergentBarrier)
