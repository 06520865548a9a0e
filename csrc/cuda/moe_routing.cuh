// The stable counting sort of (token, expert) slots by expert that moe_gate and moe_sort share. Integers alone: repeatable.
//
//   route_kernel    one launch: a block counts the choices of all tokens and places its own chunk's. E <= 16, K <= 2
//     grid          chunks of 32 to 256 tokens (at most 64 blocks), min(1024, T) threads; a thread counts tokens / threads of them
//     counters      per thread 8 bits an expert in registers, "all" and "before my chunk"; 16 bits a pair of experts between warps
//     shared        (2 * kExperts / 2) * 33 words + 8 * kExperts: 1.3 KB (8 experts), 2.6 KB (16); conflict-free; one barrier
//     ranks         ballots of the id's bits: lanes with my id = AND of 3 or 4 masks
//   place_kernel    the second of two launches: the first one left each chunk's histogram in the workspace, [E][chunks] i32
//     grid          chunks (at most 128 blocks), 1024 threads; a warp takes a run of slots, twice: counts them, then ranks them
//     shared        32 warps * 256 experts + 2 * 256 words = 34 KB; two barriers
//     bytes         a block reads the histograms of all chunks (E * chunks * 4, at most 128 KB, from L2) and its slots' ids twice
#pragma once
#include <cuda_runtime.h>

#include "ops.h"

namespace mixtral::cuda {
namespace {

constexpr int kThreads = 1024;  // of a block, at most
constexpr int kWarps = kThreads / 32;
constexpr int kExpertsLimit = MIXTRAL_MAX_EXPERTS;
constexpr uint32_t kAllLanes = ~0u;

struct Maps {
  int32_t *expert_offsets, *sorted_slots, *slot_rows;
};

template <class Params>
Maps maps_of(const Params &p) {
  return {(int32_t *)p.expert_offsets.data, (int32_t *)p.sorted_slots.data, (int32_t *)p.slot_rows.data};
}

template <class Id>
__device__ int expert_or_skip(Id id, int experts) {
  return id >= 0 && id < experts ? (int)id : -1;
}

// ------------------------------------------------------------------------------------------------------ one launch

// For each of two columns of ids in a warp, one a lane: who has a given id, from ballots of the ids' bits.
template <int kBits>
struct WarpIds {
  uint32_t used[2], bit[2][kBits];

  __device__ explicit WarpIds(const int (&id)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      used[j] = __ballot_sync(kAllLanes, id[j] >= 0);
#pragma unroll
      for (int b = 0; b < kBits; ++b) bit[j][b] = __ballot_sync(kAllLanes, id[j] >> b & 1);
    }
  }

  __device__ uint32_t lanes_with(int id, int j) const {
    uint32_t lanes = used[j];
#pragma unroll
    for (int b = 0; b < kBits; ++b) lanes &= id >> b & 1 ? bit[j][b] : ~bit[j][b];
    return lanes;
  }
};

// Source: Row load(token); choose(row, id), the token's ids, -1 for none; choose_and_write(token, row, id), which also writes
// the source's own outputs. kBatch rows are loaded before the first is used.
template <int kExperts, class Source>
__global__ void __launch_bounds__(kThreads, 1)
    route_kernel(const __grid_constant__ Source source, int tokens, int top_k, int experts, int chunk_tokens, Maps maps) {
  static_assert(kExperts == 8 || kExperts == 16, "two or four words of counters");
  constexpr int kFours = kExperts / 4;     // 32-bit words of 4 counters; a thread counts at most 16 tokens * 2
  constexpr int kPairs = kExperts / 2;     // 32-bit words of 2 counters; a block counts at most 16384 * 2
  __shared__ uint32_t warp_counts[2 * kPairs][33];  // [all, then before my chunk][warp]; 33: reads and writes without conflicts
  __shared__ int group_counts[kOneLaunchChunk / 32][kExperts];  // of my chunk, by groups of 32 tokens
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first = blockIdx.x * chunk_tokens;  // token
  const bool places = warp * 32 < chunk_tokens;  // the warp of a group

  const int token = first + thread;
  const bool mine = thread < chunk_tokens && token < tokens;

  uint32_t all[kFours] = {}, before[kFours] = {};
  for (int base = thread; base < tokens; base += Source::kBatch * blockDim.x) {
    typename Source::Row rows[Source::kBatch];
#pragma unroll
    for (int i = 0; i < Source::kBatch; ++i) {
      const int t = base + i * blockDim.x;
      if (t < tokens) rows[i] = source.load(t);
    }
#pragma unroll
    for (int i = 0; i < Source::kBatch; ++i) {
      const int t = base + i * blockDim.x;
      if (t >= tokens) continue;
      int id[2];
      source.choose(rows[i], id);
#pragma unroll
      for (int eight = 0; eight < kExperts / 8; ++eight) {
        uint64_t chosen = 0;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (id[j] >= 0 && (kExperts == 8 || id[j] / 8 == eight)) chosen += (uint64_t)1 << id[j] % 8 * 8;
        all[2 * eight] += (uint32_t)chosen;
        all[2 * eight + 1] += (uint32_t)(chosen >> 32);
        if (t < first) {
          before[2 * eight] += (uint32_t)chosen;
          before[2 * eight + 1] += (uint32_t)(chosen >> 32);
        }
      }
    }
  }

  // Of four 8-bit counters, the first and third make one pair, the second and fourth the next.
  uint32_t sums = 0;  // lane i keeps pair i
#pragma unroll
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int pair = i % kPairs;
    const uint32_t four = i < kPairs ? all[pair / 2] : before[pair / 2];
    const uint32_t sum = __reduce_add_sync(kAllLanes, four >> pair % 2 * 8 & 0x00ff00ffu);
    if (lane == i) sums = sum;
  }
  if (lane < 2 * kPairs) warp_counts[lane][warp] = sums;

  int id[2] = {-1, -1};
  if (mine) source.choose_and_write(token, source.load(token), id);  // in L1 by now; keeping it costs registers
  const WarpIds<kExperts == 8 ? 3 : 4> group(id);
  if (places && lane < kExperts) group_counts[warp][lane] = __popc(group.lanes_with(lane, 0)) + __popc(group.lanes_with(lane, 1));
  __syncthreads();
  if (!places) return;

  // Lane e: the first row of expert e, lane E: the number of rows.
  int next = 0, rows = 0, skipped = 0;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const bool counted = lane < (int)blockDim.x / 32;
    const uint32_t a = __reduce_add_sync(kAllLanes, counted ? warp_counts[pair][lane] : 0);
    const uint32_t b = __reduce_add_sync(kAllLanes, counted ? warp_counts[kPairs + pair][lane] : 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int e = pair / 2 * 4 + pair % 2 + half * 2, n = a >> half * 16 & 0xffff;
      rows += n;
      if (e < lane) next += n;
      if (e == lane) skipped = b >> half * 16 & 0xffff;
    }
  }
  if (blockIdx.x == 0 && warp == 0 && lane <= experts) maps.expert_offsets[lane] = next;
  next += skipped;
  if (lane < kExperts)
    for (int g = 0; g < warp; ++g) next += group_counts[g][lane];

  const uint32_t lanes_before = (1u << lane) - 1;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int start = __shfl_sync(kAllLanes, next, id[j] & 31);
    if (!mine || j >= top_k) continue;
    const int earlier = __popc(group.lanes_with(id[j], 0) & lanes_before) + __popc(group.lanes_with(id[j], 1) & lanes_before) +
                        (j == 1 && id[0] == id[1]);
    const int slot = token * top_k + j;
    maps.slot_rows[slot] = id[j] >= 0 ? start + earlier : -1;
    if (id[j] >= 0) maps.sorted_slots[start + earlier] = slot;
    if (slot >= rows) maps.sorted_slots[slot] = -1;
  }
}

template <int kExperts, class Source>
cudaError_t route(const Source &source, int64_t tokens, int64_t top_k, int64_t experts, const RoutingConfig &config, const Maps &maps,
           void *stream) {
  return launch(route_kernel<kExperts, Source>, dim3((unsigned)config.chunks), config.threads, 0, stream, false, source, (int)tokens,
                (int)top_k, (int)experts, (int)config.chunk_tokens, maps);
}

// ---------------------------------------------------------------------------------------------------- two launches

// The expert of a slot before `end`, -1 for a skip marker and from there on.
template <class Id>
__device__ int slot_expert(const Id *ids, int64_t stride, int top_k, int experts, int64_t slot, int64_t end) {
  if (slot >= end) return -1;
  const int s = (int)slot;
  return expert_or_skip(__ldg(ids + s / top_k * stride + s % top_k), experts);
}

// counts[id] += the lanes of this warp with that id; id -1 counts nowhere. All lanes take part.
__device__ inline void count(int *counts, int id) {
  const uint32_t peers = __match_any_sync(kAllLanes, id);
  if (id >= 0 && (int)threadIdx.x % 32 == __ffs(peers) - 1) atomicAdd(&counts[id], __popc(peers));
}

// The first launch's histogram goes to column blockIdx.x of chunk_counts [E][chunks].
__device__ inline void store_histogram(const int *counts, int experts, int32_t *chunk_counts) {
  for (int e = threadIdx.x; e < experts; e += blockDim.x) chunk_counts[e * gridDim.x + blockIdx.x] = counts[e];
}

template <class Id>
__global__ void __launch_bounds__(kThreads, 1)
    place_kernel(const Id *__restrict__ ids, int64_t ids_stride, int slots, int top_k, int experts, int64_t chunk_slots,
                 const int32_t *__restrict__ chunk_counts, Maps maps) {
  __shared__ int next[kWarps][kExpertsLimit];  // first the counts of a warp's run, then its next rows
  __shared__ int expert_rows[kExpertsLimit], rows_before[kExpertsLimit], rows;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, chunks = gridDim.x;
  const uint32_t lanes_before = (1u << lane) - 1;
  const int64_t chunk = blockIdx.x * chunk_slots, chunk_end = min(chunk + chunk_slots, (int64_t)slots);
  const int64_t run_slots = (chunk_slots + kThreads - 1) / kThreads * 32;
  const int64_t run = chunk + warp * run_slots, run_end = min(run + run_slots, chunk_end);
  const auto expert_of = [&](int64_t slot) { return slot_expert(ids, ids_stride, top_k, experts, slot, run_end); };

  for (int e = lane; e < experts; e += 32) next[warp][e] = 0;
  __syncwarp();
  for (int64_t base = run; base < run_end; base += 32) count(next[warp], expert_of(base + lane));

  // A warp sums the histograms of every 32nd expert, a lane every 32nd chunk; the loads come first.
  constexpr int kRounds = kExpertsLimit / kWarps;
  int all[kRounds] = {}, before[kRounds] = {};
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int e = i * kWarps + warp;
    if (e >= experts) break;
#pragma unroll
    for (int c = lane; c < kRoutingChunks; c += 32) {
      const int n = c < chunks ? chunk_counts[e * chunks + c] : 0;
      all[i] += n;
      if (c < (int)blockIdx.x) before[i] += n;
    }
  }
#pragma unroll
  for (int i = 0; i < kRounds; ++i) {
    const int e = i * kWarps + warp;
    if (e >= experts) break;
    const int a = __reduce_add_sync(kAllLanes, all[i]), b = __reduce_add_sync(kAllLanes, before[i]);
    if (lane == 0) {
      expert_rows[e] = a;
      rows_before[e] = b;
    }
  }
  __syncthreads();

  if (warp * 32 < experts) {  // thread e: expert e
    const int n = thread < experts ? expert_rows[thread] : 0;
    int end = n;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int left = __shfl_up_sync(kAllLanes, end, offset);
      if (lane >= offset) end += left;
    }
    for (int e = lane; e < warp * 32; e += 32) end += __reduce_add_sync(kAllLanes, expert_rows[e]);
    if (thread < experts) {
      if (blockIdx.x == 0) maps.expert_offsets[thread + 1] = end;
      if (blockIdx.x == 0 && thread == 0) maps.expert_offsets[0] = 0;
      if (thread == experts - 1) rows = end;
      int row = end - n + rows_before[thread];
#pragma unroll 8
      for (int w = 0; w < kWarps; ++w) {
        const int run_rows = next[w][thread];
        next[w][thread] = row;
        row += run_rows;
      }
    }
  }
  __syncthreads();

  for (int64_t base = run; base < run_end; base += 32) {
    const int64_t slot = base + lane;
    const int id = expert_of(slot);
    const uint32_t peers = __match_any_sync(kAllLanes, id);
    const int row = id >= 0 ? next[warp][id] + __popc(peers & lanes_before) : -1;
    __syncwarp();
    if (id >= 0 && (peers & lanes_before) == 0) next[warp][id] = row + __popc(peers);
    __syncwarp();
    if (slot >= run_end) continue;
    maps.slot_rows[slot] = row;
    if (id >= 0) maps.sorted_slots[row] = (int32_t)slot;
    if (slot >= rows) maps.sorted_slots[slot] = -1;
  }
}

template <class Id>
cudaError_t place(const Id *ids, int64_t ids_stride, int64_t tokens, int64_t top_k, int64_t experts, const RoutingConfig &config,
           const int32_t *chunk_counts, const Maps &maps, void *stream) {
  return launch(place_kernel<Id>, dim3((unsigned)config.chunks), kThreads, 0, stream, false, ids, ids_stride, (int)(tokens * top_k),
                (int)top_k, (int)experts, config.chunk_tokens * top_k, chunk_counts, maps);
}

}  // namespace
}  // namespace mixtral::cuda
