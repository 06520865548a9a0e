// A chunk over the ring: rotation and store around the attention.
//
//   launches   chunks of one token: rotate + store, split, combine; the token is then read from the ring (without rope and without k and v the
//              first is not needed). Longer ones: rotate, attention (up to three), store: the ring is read before it is written
//   grid       one block of 128 threads a token: D/2 threads compute its cos and sin once, all rotate and copy its heads
//   workspace  rotated q, and rotated k of longer chunks, contiguous; partial results of the attention
//   bytes      q twice, k and v twice
//   32 bytes of stack for the exact range reduction of sinf and cosf at large angles
#include "../core/workspace.h"
#include "attention_sequence.cuh"
#include "common/launch.h"
#include "common/overlap.cuh"
#include "common/rope.cuh"
#include "ops.h"

namespace mixtral::cuda {
namespace {

constexpr int kThreads = 128;
enum class Rotate { kNo, kHalves, kPairs };

struct Chunk {
  HeadArray q, rotated_q;  // with rotation
  HeadArray k, rotated_k;  // with rotation k goes to rotated_k, unless it is stored
  HeadArray v;
  bool store;  // k and v go to the ring; those that a later token of the chunk overwrites do not, nor do those beyond it without a window
};

template <class T>
__device__ T *head_rows(const HeadArray &x, int64_t sequence, int64_t token) {
  return (T *)x.data + sequence * x.sequence + token * x.token;
}

template <class T>
__device__ void copy_heads(const T *from, int64_t from_head, T *to, int64_t to_head, int64_t heads, int head_dim) {
  const int vectors = head_dim / 8;
  for (int64_t i = threadIdx.x; i < heads * vectors; i += kThreads)
    store8(to + i / vectors * to_head + i % vectors * 8, load8(from + i / vectors * from_head + i % vectors * 8, 8), 8);
}

template <class T, Rotate kRotate>
__global__ void __launch_bounds__(kThreads)
    rotate_store_kernel(const __grid_constant__ Attention a, const __grid_constant__ Chunk c, const __grid_constant__ Frequencies frequencies) {
  __shared__ Rotation rotation;
  constexpr bool kInterleaved = kRotate == Rotate::kPairs;
  let_next_kernel_begin();
  const Segment s = find_sequence(a, blockIdx.x, [](int, int n) { return (int64_t)n; });
  if (s.index < 0) return;
  const int slot = cache_slot(a, s.index), token = s.begin + (int)s.unit, position = cached_tokens(a, s.index, s.rows) + (int)s.unit;
  if (slot < 0) return;
  const bool stored = c.store && s.unit >= s.rows - a.capacity && (a.window < INT32_MAX || position < a.capacity);
  const int place = position % a.capacity;
  T *const k_ring = head_rows<T>(a.k_ring, slot, place);
  const T *const k = head_rows<const T>(c.k, 0, token);
  if (kRotate != Rotate::kNo) {
    const int pairs = a.head_dim / 2;
    rotation.set(frequencies, (float)position, pairs);
    __syncthreads();
    rotate_heads<kInterleaved>(head_rows<const T>(c.q, 0, token), c.q.head, head_rows<T>(c.rotated_q, 0, token), c.rotated_q.head,
                               a.key_heads * a.group, pairs, rotation);
    if (stored)
      rotate_heads<kInterleaved>(k, c.k.head, k_ring, a.k_ring.head, a.key_heads, pairs, rotation);
    else if (c.rotated_k.data)
      rotate_heads<kInterleaved>(k, c.k.head, head_rows<T>(c.rotated_k, 0, token), c.rotated_k.head, a.key_heads, pairs, rotation);
  } else if (stored) {
    copy_heads(k, c.k.head, k_ring, a.k_ring.head, a.key_heads, a.head_dim);
  }
  if (stored) copy_heads(head_rows<const T>(c.v, 0, token), c.v.head, head_rows<T>(a.v_ring, slot, place), a.v_ring.head, a.key_heads, a.head_dim);
}

cudaError_t rotate_store(const Attention &a, const Chunk &c, Rotate rotate, const Frequencies &frequencies, void *stream) {
  cudaError_t error = cudaSuccess;
  with_half_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto kernel = rotate == Rotate::kNo       ? rotate_store_kernel<T, Rotate::kNo>
                        : rotate == Rotate::kHalves ? rotate_store_kernel<T, Rotate::kHalves>
                                                    : rotate_store_kernel<T, Rotate::kPairs>;
    error = launch(kernel, dim3((unsigned)a.query_tokens), kThreads, 0, stream, false, a, c, frequencies);
  });
  return error;
}

bool single(const Attention &a) { return a.longest_queries == 1; }

struct Layout {
  size_t rotated_q, rotated_k, attention;  // byte offsets
};

Layout layout(const mixtral_rolling_attention_params &p, const Attention &a) {
  const size_t tokens = (size_t)p.q.shape[0], head_bytes = (size_t)p.q.shape[2] * 2;
  const bool rotates = p.rope_theta > 0;
  Layout at = {};
  at.rotated_k = at.rotated_q + (rotates ? aligned(tokens * (size_t)p.q.shape[1] * head_bytes) : 0);
  at.attention = at.rotated_k + (rotates && p.k.ndim && !single(a) ? aligned(tokens * (size_t)p.k_cache.shape[2] * head_bytes) : 0);
  return at;
}

HeadArray contiguous_heads(void *data, int64_t heads, int64_t head_dim) { return {data, 0, heads * head_dim, head_dim}; }

}  // namespace

size_t rolling_attention_workspace_size(const mixtral_rolling_attention_params &p, const Attention &a, const AttentionConfig &config) {
  return layout(p, a).attention + attention_workspace_size(a, config);
}

mixtral_status rolling_attention(const mixtral_rolling_attention_params &p, Attention a, const AttentionConfig &config, void *workspace,
                                 void *stream) {
  constexpr const char *kOp = "mixtral_rolling_attention";
  if (a.sequences == 0 || a.query_tokens == 0) return MIXTRAL_OK;
  const Layout at = layout(p, a);
  char *const base = (char *)workspace;
  const bool append = p.k.ndim, rotates = p.rope_theta > 0;

  Chunk chunk = {};
  chunk.q = a.q;
  chunk.store = append && single(a);
  if (append) chunk.k = packed_heads(p.k), chunk.v = packed_heads(p.v);
  if (append && !chunk.store) a.k = chunk.k, a.v = chunk.v;
  if (rotates) {
    a.q = chunk.rotated_q = contiguous_heads(base + at.rotated_q, p.q.shape[1], p.q.shape[2]);
    if (a.k.data) a.k = chunk.rotated_k = contiguous_heads(base + at.rotated_k, a.key_heads, p.q.shape[2]);
  }
  mixtral_status status = MIXTRAL_OK;
  if (rotates || chunk.store) {
    const Rotate rotate = !rotates ? Rotate::kNo : p.rope_interleaved ? Rotate::kPairs : Rotate::kHalves;
    status = cuda_status(kOp, rotate_store(a, chunk, rotate, rotates ? rope_frequencies(p.rope_theta, a.head_dim / 2) : Frequencies{}, stream));
    a.early = a.overlaps;
  }
  if (status == MIXTRAL_OK) status = attention(kOp, a, config, base + at.attention, stream);
  if (status == MIXTRAL_OK && append && !chunk.store) {
    chunk.k = a.k;
    chunk.store = true;
    status = cuda_status(kOp, rotate_store(a, chunk, Rotate::kNo, Frequencies{}, stream));
  }
  return status;
}

}  // namespace mixtral::cuda
