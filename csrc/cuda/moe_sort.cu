// The permutation of routing made elsewhere, on the device; moe_routing.cuh has the plan.
//
//   one launch      a block reads all T*K ids: T = 4096, K = 2, i32: 32 KB, from L2 but for the first time
//   two launches    count_kernel: a histogram of each chunk, a warp's equal ids added at once; then place_kernel
//   registers       one launch: 44 (E <= 8), 54 to 59; count_kernel 26, place_kernel 42; 1024 threads
//   floor           latency: 2 (or 2 * 2) dependent global accesses and one (or four) barriers
#include "common/launch.h"
#include "moe_routing.cuh"

namespace mixtral::cuda {
namespace {

template <class Id>
struct SortTokens {
  static constexpr int kBatch = 4;
  struct Row {
    Id id[2];
  };
  const Id *ids;
  int64_t stride;
  int top_k, experts;

  __device__ Row load(int64_t token) const {
    const Id *p = ids + token * stride;
    return {{__ldg(p), top_k == 2 ? __ldg(p + 1) : (Id)-1}};
  }
  __device__ void choose(const Row &row, int (&id)[2]) const {
    id[0] = expert_or_skip(row.id[0], experts);
    id[1] = expert_or_skip(row.id[1], experts);
  }
  __device__ void choose_and_write(int64_t, const Row &row, int (&id)[2]) const { choose(row, id); }
};

template <class Id>
__global__ void __launch_bounds__(kThreads, 1)
    count_kernel(const Id *__restrict__ ids, int64_t ids_stride, int slots, int top_k, int experts, int64_t chunk_slots,
                 int32_t *__restrict__ chunk_counts) {
  __shared__ int counts[kExpertsLimit];
  if (threadIdx.x < kExpertsLimit) counts[threadIdx.x] = 0;
  __syncthreads();
  const int64_t chunk = blockIdx.x * chunk_slots, chunk_end = min(chunk + chunk_slots, (int64_t)slots);
  for (int64_t base = chunk + threadIdx.x / 32 * 32; base < chunk_end; base += kThreads)
    count(counts, slot_expert(ids, ids_stride, top_k, experts, base + threadIdx.x % 32, chunk_end));
  __syncthreads();
  store_histogram(counts, experts, chunk_counts);
}

}  // namespace

mixtral_status moe_sort(const mixtral_context &, const mixtral_moe_sort_params &p, const RoutingConfig &config, void *workspace,
                        void *stream) {
  const int64_t tokens = p.topk_ids.shape[0], top_k = p.topk_ids.shape[1], stride = p.topk_ids.stride[0];
  const int experts = p.num_experts;
  cudaError_t error = cudaSuccess;
  const auto sort = [&](const auto *ids) {
    if (config.launches == 1) {
      const SortTokens<std::decay_t<decltype(*ids)>> source{ids, stride, (int)top_k, experts};
      if (experts <= 8)
        error = route<8>(source, tokens, top_k, experts, config, maps_of(p), stream);
      else
        error = route<16>(source, tokens, top_k, experts, config, maps_of(p), stream);
      return;
    }
    error = launch(count_kernel<std::decay_t<decltype(*ids)>>, dim3((unsigned)config.chunks), kThreads, 0, stream, false, ids, stride,
                   (int)(tokens * top_k), (int)top_k, experts, config.chunk_tokens * top_k, (int32_t *)workspace);
    if (error == cudaSuccess) error = place(ids, stride, tokens, top_k, experts, config, (const int32_t *)workspace, maps_of(p), stream);
  };
  if (p.topk_ids.dtype == MIXTRAL_DTYPE_I64)
    sort((const int64_t *)p.topk_ids.data);
  else
    sort((const int32_t *)p.topk_ids.data);
  return cuda_status("mixtral_moe_sort", error);
}

}  // namespace mixtral::cuda
