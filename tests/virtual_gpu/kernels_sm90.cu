// Kernels of the Hopper style for the tests of the virtual GPU: correct ones (kBug = kNone) and one for each planted bug. The line
// at which a bug must be reported ends in "caught: <bug>".
#include "cuda/common/ptx_sm80.cuh"
#include "cuda/common/ptx_sm90.cuh"

using namespace mixtral::sm90;
using mixtral::sm80::shared_address;
using bf16 = __nv_bfloat16;

enum Bug { kNone, kWrongParity, kWrongBytes, kEarlyRelease, kReadBeforeWait, kNoProxyFenceStore, kReusedBeforeRead, kWrongSwizzle,
           kNoProxyFenceWgmma, kNoClusterBarrier, kNoInitFence, kNoDependencyWait };

// C[M, N] = A[M, K] B[N, K]^T in bf16, M and N multiples of 128, K of 64: persistent blocks walk tiles of 128 x 128.
//   warpgroup 0     one thread loads stages of 64 along k by tensor copies (128-byte swizzle)
//   warpgroups 1, 2 64 rows each: wgmma m64n128k16, one group in flight; stmatrix to shared memory, tensor store
//   full[stage]     one arrival (the loader's) and the bytes; empty[stage] one arrival of each consumer warpgroup of the cluster
// kCluster = 2: two blocks take neighbouring rows of tiles and load half of B each for both.
constexpr int kTile = 128, kTileK = 64, kStages = 3;
constexpr int kOperandBytes = kTile * kTileK * 2, kStageBytes = 2 * kOperandBytes, kOutBytes = 64 * kTile * 2;
constexpr int kOutOffset = kStages * kStageBytes, kBarrierOffset = kOutOffset + 2 * kOutBytes;

template <int kCluster, int kBug>
__device__ void gemm(const CUtensorMap &a_map, const CUtensorMap &b_map, const CUtensorMap &c_map, int m, int n, int k) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t base = shared_address(memory), full = base + kBarrierOffset, empty = full + kStages * 8;
  const int warpgroup = threadIdx.x / 128, steps = k / kTileK, rows = m / kTile / kCluster, tiles = rows * (n / kTile);
  const uint32_t rank = kCluster > 1 ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + s * 8, 1);
      mbarrier_init(empty + s * 8, 2 * kCluster);
    }
    if (kBug != kNoInitFence) fence_mbarrier_init();
  }
  __syncthreads();
  if (kCluster > 1 && kBug != kNoClusterBarrier) {
    cluster_arrive();
    cluster_wait();
  }

  if (warpgroup == 0) {
    setmaxnreg_dec<40>();
    if (threadIdx.x == 0) {
      int stage = 0, phase = 0;
      for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
        const int row = (tile % rows * kCluster + (int)rank) * kTile, column = tile / rows * kTile;
        for (int step = 0; step < steps; ++step) {
          while (!(kCluster > 1 ? mbarrier_try_wait_cluster(empty + stage * 8, phase ^ 1) : mbarrier_try_wait(empty + stage * 8, phase ^ 1))) {
          }
          const uint32_t to = base + stage * kStageBytes;
          mbarrier_arrive_expect_tx(full + stage * 8, kStageBytes + (kBug == kWrongBytes ? 16 : 0));
          tma_load_2d(to, &a_map, full + stage * 8, step * kTileK, row);  // caught: early_release, no_init_fence
          if (kCluster > 1)
            tma_load_2d_multicast(to + kOperandBytes + rank * kOperandBytes / 2, &b_map, full + stage * 8,  // caught: no_cluster_barrier
                                  step * kTileK, column + (int)rank * kTile / 2, 3);
          else
            tma_load_2d(to + kOperandBytes, &b_map, full + stage * 8, step * kTileK, column);  // caught: load_box
          if (++stage == kStages) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    setmaxnreg_inc<232>();
    const int group = warpgroup - 1, thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    const uint32_t out = base + kOutOffset + group * kOutBytes;
    const auto release = [&](int s) {
      if (thread < kCluster) {
        if (kCluster > 1)
          mbarrier_arrive_cluster(empty + s * 8, thread);
        else
          mbarrier_arrive(empty + s * 8);
      }
    };
    int stage = 0, phase = 0;
    for (int tile = blockIdx.x / kCluster; tile < tiles; tile += gridDim.x / kCluster) {
      float sum[64];
      for (int step = 0; step < steps; ++step) {
        while (!mbarrier_try_wait(full + stage * 8, kBug == kWrongParity ? phase ^ 1 : phase)) {  // caught: wrong_bytes
        }
        const uint32_t a = base + stage * kStageBytes + group * 64 * 128, b = base + stage * kStageBytes + kOperandBytes;
        uint64_t da = wgmma_descriptor(a), db = wgmma_descriptor(b);
        if (kBug == kWrongSwizzle) db ^= 3ull << 62;  // 2: 64 bytes
        wgmma_fence();
        for (int i = 0; i < kTileK / 16; ++i)
          wgmma_m64n128k16(sum, da + i * 2, db + i * 2, step + i > 0);  // caught: wrong_parity, wrong_swizzle
        wgmma_commit();
        if (kBug == kEarlyRelease) {
          release(stage);
        } else if (step > 0) {  // all but the latest group are complete: the stage before is free
          wgmma_wait<1>();
          release((stage + kStages - 1) % kStages);
        }
        if (++stage == kStages) stage = 0, phase ^= 1;
      }
      if (kBug != kReadBeforeWait) wgmma_wait<0>();
      if (kBug != kEarlyRelease) release((stage + kStages - 1) % kStages);
      // The last store must have read the staging memory before it is written again.
      if (thread == 0 && kBug != kReusedBeforeRead) bulk_wait_read<0>();
      named_barrier_sync(1 + group, 128);
      for (int half = 0; half < 2; ++half)  // 64 columns of 128-byte rows each, swizzled as the tensor map says
        for (int j = 0; j < 4; ++j) {
          uint32_t r[4];
          for (int i = 0; i < 4; ++i) {
            const float *x = sum + (half * 8 + j * 2 + i / 2) * 4 + i % 2 * 2;
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);  // caught: read_before_wait
            r[i] = *reinterpret_cast<const uint32_t *>(&pair);
          }
          const int row = warp * 16 + lane % 16, unit = j * 2 + lane / 16;
          stmatrix_x4(out + half * 64 * 128 + row * 128 + (unit ^ row % 8) * 16, r[0], r[1], r[2], r[3]);  // caught: reused_before_read
        }
      if (kBug != kNoProxyFenceStore) fence_proxy_async();
      named_barrier_sync(1 + group, 128);
      if (thread == 0) {
        const int row = (tile % rows * kCluster + (int)rank) * kTile + group * 64, column = tile / rows * kTile;
        for (int half = 0; half < 2; ++half)
          tma_store_2d(&c_map, out + half * 64 * 128, column + half * 64, row);  // caught: no_proxy_fence_store, store_box
        bulk_commit();
      }
    }
    if (thread == 0) bulk_wait_read<0>();
  }
  if (kCluster > 1) {  // nobody leaves while others still signal its barriers
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
}

#define GEMM(name, cluster, bug)                                                                                              \
  extern "C" __global__ void __launch_bounds__(384, 1)                                                                       \
      name(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap c,     \
           int m, int n, int k) {                                                                                              \
    gemm<cluster, bug>(a, b, c, m, n, k);                                                                                     \
  }
GEMM(gemm_sm90, 1, kNone)
GEMM(gemm_sm90_wrong_parity, 1, kWrongParity)
GEMM(gemm_sm90_wrong_bytes, 1, kWrongBytes)
GEMM(gemm_sm90_early_release, 1, kEarlyRelease)
GEMM(gemm_sm90_read_before_wait, 1, kReadBeforeWait)
GEMM(gemm_sm90_no_proxy_fence_store, 1, kNoProxyFenceStore)
GEMM(gemm_sm90_reused_before_read, 1, kReusedBeforeRead)
GEMM(gemm_sm90_wrong_swizzle, 1, kWrongSwizzle)
GEMM(gemm_sm90_no_init_fence, 1, kNoInitFence)
GEMM(gemm_cluster, 2, kNone)
GEMM(gemm_cluster_no_cluster_barrier, 2, kNoClusterBarrier)

// C[64, 128] = A[64, 64] B[128, 64]^T in f32 by one warpgroup, operands brought by ordinary loads and stores.
template <int kBug>
__device__ void product(const bf16 *a, const bf16 *b, float *c) {
  __shared__ __align__(1024) uint8_t memory[(64 + 128) * 128];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  for (int i = thread; i < (64 + 128) * 8; i += 128) {
    const int row = i / 8, unit = i % 8;
    const uint4 x = *reinterpret_cast<const uint4 *>((row < 64 ? a + row * 64 : b + (row - 64) * 64) + unit * 8);
    *reinterpret_cast<uint4 *>(memory + row * 128 + (unit ^ row % 8) * 16) = x;
  }
  if (kBug != kNoProxyFenceWgmma) fence_proxy_async();
  __syncthreads();
  float sum[64];
  const uint64_t da = wgmma_descriptor(shared_address(memory)), db = wgmma_descriptor(shared_address(memory) + 64 * 128);
  wgmma_fence();
  for (int i = 0; i < 4; ++i) wgmma_m64n128k16(sum, da + i * 2, db + i * 2, i > 0);  // caught: no_proxy_fence_wgmma
  wgmma_commit();
  wgmma_wait<0>();
  for (int j = 0; j < 16; ++j)
    for (int half = 0; half < 2; ++half) {
      const float2 pair = {sum[j * 4 + half * 2], sum[j * 4 + half * 2 + 1]};
      *reinterpret_cast<float2 *>(c + (warp * 16 + half * 8 + lane / 4) * 128 + j * 8 + lane % 4 * 2) = pair;
    }
}

extern "C" __global__ void __launch_bounds__(128) product_correct(const bf16 *a, const bf16 *b, float *c) { product<kNone>(a, b, c); }
extern "C" __global__ void __launch_bounds__(128) product_no_proxy_fence_wgmma(const bf16 *a, const bf16 *b, float *c) {
  product<kNoProxyFenceWgmma>(a, b, c);
}

// Doubles x into y, and adds y to z. The second may be launched before the first has ended.
extern "C" __global__ void double_values(const float *x, float *y) { y[blockIdx.x * 64 + threadIdx.x] = 2 * x[blockIdx.x * 64 + threadIdx.x]; }

template <int kBug>
__device__ void add_values(const float *y, float *z) {
  const int i = blockIdx.x * 64 + threadIdx.x;
  const float old = z[i];
  if (kBug != kNoDependencyWait) wait_for_dependencies();
  z[i] = old + y[i];  // caught: no_dependency_wait
}
extern "C" __global__ void add_values_correct(const float *y, float *z) { add_values<kNone>(y, z); }
extern "C" __global__ void add_values_no_dependency_wait(const float *y, float *z) { add_values<kNoDependencyWait>(y, z); }
