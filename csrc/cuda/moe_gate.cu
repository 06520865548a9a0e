// Router on the device: top-k, softmax and the maps; moe_routing.cuh has the plan of the sort.
//
//   one launch      E <= 16, K <= 2: a thread chooses for a whole row. A block reads all logits (T = 4096, E = 8, bf16: 64 KB, from L2
//                   but for the first time) and its own chunk's again; each row is one or two 16-byte loads where layout allows
//   two launches    chunk_kernel: top-k and softmax of a chunk, 1, 8 or 32 lanes a token with 8 experts each, and the chunk's
//                   histogram; then place_kernel on the ids
//   keys            the value's order as an integer above the inverted id: distinct, so the best is a maximum, and ties go to the lower
//                   id. 32 bits for 16-bit floats, made two at a time; 64 bits for f32
//   registers       one launch: 44 to 48 (E <= 8), 48 to 59, of 1024 threads; chunk_kernel: 45 to 96, of 512 threads
//   shared          one launch: as the sort; chunk_kernel: 1 KB, two barriers
//   floor           latency: 2 (or 2 * 2) dependent global accesses; by bandwidth T * (E * 2 + 16 * K) bytes, 0.1 us at T = 4096
#include <math_constants.h>

#include <type_traits>

#include "common/launch.h"
#include "common/ptx_sm80.cuh"
#include "common/vector8.cuh"
#include "moe_routing.cuh"

namespace mixtral::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline void from_float(float x, float &out) { out = x; }

namespace {

// ------------------------------------------------------------------------------------------------------------ keys

template <class T>
using Key = std::conditional_t<sizeof(T) == 2, int32_t, int64_t>;

// Below the key of -inf.
template <class K>
constexpr K kNone = std::is_same_v<K, int32_t> ? INT32_MIN : INT64_MIN;

// Sign and magnitude to two's complement less 1, and back. -0 has become +0 and NaN 0x7f..f before.
__device__ inline int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & INT32_MAX); }

__device__ inline void make_keys(const float *x, int first_expert, int64_t *keys) {
  const float y = x[0] + 0.0f;
  const int32_t order = y != y ? INT32_MAX : ordered(__float_as_int(y));
  keys[0] = (int64_t)((uint64_t)(uint32_t)order << 32 | (uint32_t)~first_expert);
}

// Two 16-bit floats at once; the value is the key's upper half, the expert its lower one.
template <class T>
__device__ void make_keys(const T *x, int first_expert, int32_t *keys) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair zero, minus_infinity, pair;
  from_float(0.0f, zero.x), from_float(-CUDART_INF_F, minus_infinity.x);
  zero.y = zero.x, minus_infinity.y = minus_infinity.x, pair.x = x[0], pair.y = x[1];
  pair = __hmax2_nan(__hadd2(pair, zero), minus_infinity);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  bits ^= sm80::signs_of_halves(bits) & 0x7fff7fffu;
  keys[0] = (int32_t)__byte_perm(bits, (uint32_t)~first_expert, 0x1054);
  keys[1] = (int32_t)__byte_perm(bits, (uint32_t)~(first_expert + 1), 0x3254);
}

template <class K>
__device__ int id_of(K key) {
  return (int)~key & (kExpertsLimit - 1);
}

// NaN comes back as NaN, -0 as +0.
template <class T>
__device__ float value_of(Key<T> key) {
  if constexpr (sizeof(T) == 4) {
    return __int_as_float(ordered((int32_t)(key >> 32)));
  } else {
    const uint16_t bits = (uint16_t)((uint32_t)ordered(key & (int32_t)0xffff0000u) >> 16);
    T x;
    memcpy(&x, &bits, sizeof x);
    return to_float(x);
  }
}

// ------------------------------------------------------------------------------------------------------------ rows

// kExperts logits of a row; those past the last expert are -inf, so they come after all others, which have lower ids, and add
// nothing to a sum of exponentials.
template <class T, int kExperts>
struct alignas(16) Logits {
  T x[kExperts];
};

// p: logit of the first expert, `experts` from there on. kVector: 16-byte loads, of which each lies inside the row or outside.
template <int kExperts, bool kVector, class T>
__device__ Logits<T, kExperts> load_logits(const T *p, int experts) {
  Logits<T, kExperts> row;
  constexpr int kPart = kVector ? 16 / sizeof(T) : 1;
#pragma unroll
  for (int i = 0; i < kExperts; i += kPart) {
    if (i < experts) {
      if constexpr (kVector)
        reinterpret_cast<uint4 &>(row.x[i]) = __ldg(reinterpret_cast<const uint4 *>(p + i));
      else
        row.x[i] = __ldg(p + i);
    } else {
#pragma unroll
      for (int e = i; e < i + kPart; ++e) from_float(-CUDART_INF_F, row.x[e]);
    }
  }
  return row;
}

template <int kExperts, class T>
__device__ void make_keys(const Logits<T, kExperts> &row, int first_expert, Key<T> (&keys)[kExperts]) {
  constexpr int kStep = 4 / sizeof(T);
#pragma unroll
  for (int e = 0; e < kExperts; e += kStep) make_keys(row.x + e, first_expert + e, keys + e);
}

// The top_k best of the keys in kLanes neighbouring lanes, best first, the same in every lane.
template <int kLanes, int kMost, int kExperts, class K>
__device__ void choose_best(K (&keys)[kExperts], int top_k, K (&best)[kMost]) {
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    if (j >= top_k) break;
    K most = keys[0];
#pragma unroll
    for (int e = 1; e < kExperts; ++e) most = max(most, keys[e]);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, offset));
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
      if (keys[e] == most) keys[e] = kNone<K>;
    best[j] = most;
  }
}

// What the softmax divides by: a sum over the chosen, or over all logits in kLanes neighbouring lanes.
template <int kLanes, int kMost, int kExperts, class T>
__device__ float denominator(const Logits<T, kExperts> &row, const Key<T> (&best)[kMost], int top_k, bool renormalize) {
  const float greatest = value_of<T>(best[0]);
  float sum = 0.0f;
  if (renormalize) {
#pragma unroll
    for (int j = 0; j < kMost; ++j)
      if (j < top_k) sum += expf(value_of<T>(best[j]) - greatest);
    return sum;
  }
#pragma unroll
  for (int e = 0; e < kExperts; ++e) sum += expf(to_float(row.x[e]) - greatest);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  return sum;
}

template <class T>
struct Gate {
  const T *logits;
  int64_t stride;
  int experts, top_k;
  bool renormalize;
  float *weights;
  int32_t *ids;
};

// ------------------------------------------------------------------------------------------------------ one launch

template <class T, int kExperts, bool kVector>
struct GateTokens : Gate<T> {
  using Row = Logits<T, kExperts>;
  static constexpr int kRowRegisters = kVector ? sizeof(Row) / 4 : kExperts;
  static constexpr int kBatch = kRowRegisters <= 4 ? 4 : kRowRegisters <= 8 ? 2 : 1;  // 16 registers

  __device__ Row load(int64_t token) const { return load_logits<kExperts, kVector>(this->logits + token * this->stride, this->experts); }

  __device__ void best_of(const Row &row, Key<T> (&best)[2]) const {
    Key<T> keys[kExperts];
    make_keys(row, 0, keys);
    best[0] = keys[0];
    best[1] = kNone<Key<T>>;
#pragma unroll
    for (int e = 1; e < kExperts; ++e) {
      best[1] = max(best[1], min(best[0], keys[e]));
      best[0] = max(best[0], keys[e]);
    }
  }

  __device__ void choose(const Row &row, int (&id)[2]) const {
    Key<T> best[2];
    best_of(row, best);
    id[0] = id_of(best[0]);
    id[1] = this->top_k == 2 ? id_of(best[1]) : -1;
  }

  __device__ void choose_and_write(int64_t token, const Row &row, int (&id)[2]) const {
    Key<T> best[2];
    best_of(row, best);
    const float sum = denominator<1>(row, best, this->top_k, this->renormalize), greatest = value_of<T>(best[0]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j >= this->top_k) break;
      id[j] = id_of(best[j]);
      this->weights[token * this->top_k + j] = expf(value_of<T>(best[j]) - greatest) / sum;
      this->ids[token * this->top_k + j] = id[j];
    }
  }
};

// ---------------------------------------------------------------------------------------------------- two launches

constexpr int kChunkThreads = 512;  // more than 64 registers for 64-bit keys

template <class T, int kLanes, bool kVector>
__global__ void __launch_bounds__(kChunkThreads, 1)
    chunk_kernel(const __grid_constant__ Gate<T> gate, int64_t tokens, int64_t chunk_tokens, int32_t *__restrict__ chunk_counts) {
  constexpr int kExperts = 8;           // of a lane
  constexpr int kTokens = 32 / kLanes;  // of a warp at a time
  constexpr int kMost = MIXTRAL_MAX_TOP_K;
  __shared__ int counts[kExpertsLimit];
  if (threadIdx.x < kExpertsLimit) counts[threadIdx.x] = 0;
  __syncthreads();

  const int warp = threadIdx.x / 32, member = threadIdx.x % kLanes, first_expert = member * kExperts, top_k = gate.top_k;
  const int64_t chunk = blockIdx.x * chunk_tokens, chunk_end = min(chunk + chunk_tokens, tokens);
  for (int64_t base = chunk + warp * kTokens; base < chunk_end; base += kChunkThreads / 32 * kTokens) {
    const int64_t token = base + threadIdx.x % 32 / kLanes, present = min(token, chunk_end - 1);
    const Logits<T, kExperts> row =
        load_logits<kExperts, kVector>(gate.logits + present * gate.stride + first_expert, gate.experts - first_expert);
    Key<T> keys[kExperts], best[kMost];
    make_keys(row, first_expert, keys);
    choose_best<kLanes>(keys, top_k, best);
    const float sum = denominator<kLanes>(row, best, top_k, gate.renormalize), greatest = value_of<T>(best[0]);

    // Lane i of a token writes its j = i, or the only lane all.
#pragma unroll
    for (int round = 0; round < kMost; round += kLanes) {
      if (round >= top_k) break;
      Key<T> key = best[round];
#pragma unroll
      for (int i = 1; i < kLanes && i < kMost; ++i)
        if (member == i) key = best[i];
      const int j = round + member;
      const bool used = token < chunk_end && j < top_k;
      if (used) {
        gate.weights[token * top_k + j] = expf(value_of<T>(key) - greatest) / sum;
        gate.ids[token * top_k + j] = id_of(key);
      }
      count(counts, used ? id_of(key) : -1);
    }
  }
  __syncthreads();
  store_histogram(counts, gate.experts, chunk_counts);
}

// 16-byte loads fit: rows of whole vectors, aligned.
bool vector_rows(const mixtral_tensor &t, size_t element) {
  return (uintptr_t)t.data % 16 == 0 && t.shape[1] * element % 16 == 0 && (t.shape[0] <= 1 || t.stride[0] * element % 16 == 0);
}

}  // namespace

mixtral_status moe_gate(const mixtral_context &, const mixtral_moe_gate_params &p, const RoutingConfig &config, void *workspace,
                        void *stream) {
  const int64_t tokens = p.router_logits.shape[0], top_k = p.top_k;
  const int experts = (int)p.router_logits.shape[1];
  cudaError_t error = cudaSuccess;
  const auto vector_or_not = [&](auto type, auto vector) {
    using T = decltype(type);
    constexpr bool kVector = decltype(vector)::value;
    const Gate<T> gate{(const T *)p.router_logits.data, p.router_logits.stride[0], experts, p.top_k, p.renormalize != 0,
                       (float *)p.topk_weights.data, (int32_t *)p.topk_ids.data};
    if (config.launches == 1) {
      if (experts <= 8)
        error = route<8>(GateTokens<T, 8, kVector>{gate}, tokens, top_k, experts, config, maps_of(p), stream);
      else
        error = route<16>(GateTokens<T, 16, kVector>{gate}, tokens, top_k, experts, config, maps_of(p), stream);
      return;
    }
    const auto choose = [&](auto kernel) {
      error = launch(kernel, dim3((unsigned)config.chunks), kChunkThreads, 0, stream, false, gate, tokens, config.chunk_tokens,
                     (int32_t *)workspace);
    };
    if (experts <= 8)
      choose(chunk_kernel<T, 1, kVector>);
    else if (experts <= 64)
      choose(chunk_kernel<T, 8, kVector>);
    else
      choose(chunk_kernel<T, 32, kVector>);
    if (error == cudaSuccess) error = place(gate.ids, top_k, tokens, top_k, experts, config, (const int32_t *)workspace, maps_of(p), stream);
  };
  const auto with_type = [&](auto type) {
    if (vector_rows(p.router_logits, sizeof type))
      vector_or_not(type, std::true_type());
    else
      vector_or_not(type, std::false_type());
  };
  if (p.router_logits.dtype == MIXTRAL_DTYPE_F32)
    with_type(float());
  else
    with_half_type(p.router_logits.dtype, with_type);
  return cuda_status("mixtral_moe_gate", error);
}

}  // namespace mixtral::cuda
