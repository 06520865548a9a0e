// Sequences of an attention as the device finds them: how many tokens, where its keys lie. All values are clamped to what is there.
#pragma once
#include "attention.h"
#include "common/segments.cuh"

namespace mixtral::cuda {

__device__ inline int clamped(int x, int low, int high) { return min(max(x, low), high); }

// The sequence that has unit `index`; sequence i with n queries has units(i, n) of them. Its tokens begin at `begin` in q, out and lse.
template <class Units>
__device__ inline Segment find_sequence(const Attention &a, int64_t index, const Units &units) {
  const auto offset = [&](int i) { return a.cu_seqlens_q ? clamped(a.cu_seqlens_q[i], 0, a.query_tokens) : i * a.query_tokens; };
  Segment s = find_segment(a.sequences, index, offset, [&](int i, int n) { return units(i, min(n, a.longest_queries)); });
  s.rows = min(s.rows, a.longest_queries);
  if (!a.cu_seqlens_q) s.begin = 0;
  return s;
}

// Which kernel has a sequence of n queries; tiles of kRows rows that it has there.
__device__ inline bool is_split(const Attention &a, int n) { return n * a.group <= kSplitRows; }
template <int kRows>
__device__ inline int count_row_tiles(const Attention &a, int n) {
  return (n * a.group + kRows - 1) / kRows;
}

struct Sequence {
  int position;    // of query 0, counted as the keys are; negative for a query before the first key
  int begin, end;  // its keys
  int chunk;       // those from here on lie in k and v, the others in the ring
  int first_token; // in k and v, of key `chunk`
  int slot;        // of the ring; -1: there is none such, and nothing to do
  int ring_begin;  // place in it of key `begin`
};

// cache_lengths[index], of a sequence with n new tokens.
__device__ inline int cached_tokens(const Attention &a, int index, int n) {
  return clamped(a.cache_lengths[index], 0, INT32_MAX - n);
}

__device__ inline int cache_slot(const Attention &a, int index) {
  const int slot = a.cache_slots ? a.cache_slots[index] : index;
  return slot >= 0 && slot < a.slots ? slot : -1;
}

// Sequence `index`, whose n queries begin at token `first` of all. With a ring keys count from the first one that a query sees, or from up
// to align - 1 before it, so that the key of query 0 is a multiple of `align`.
__device__ inline Sequence sequence_at(const Attention &a, int index, int first, int n, int align) {
  Sequence s = {};
  if (!a.capacity) {
    int keys = a.key_tokens;
    if (a.cu_seqlens_k) {
      s.first_token = clamped(a.cu_seqlens_k[index], 0, keys);
      keys = clamped(a.cu_seqlens_k[index + 1], s.first_token, keys) - s.first_token;
    } else {
      if (a.k_start) s.first_token = clamped(a.k_start[index], 0, keys);
      keys -= s.first_token;
      if (a.k_length) keys = clamped(a.k_length[index], 0, keys);
    }
    keys = min(keys, a.longest_keys);
    s.position = keys - n;
    s.begin = max(max(s.position, -1) - a.window + 1, 0);
    s.end = keys;
    return s;
  }
  const bool chunk = a.k.data;
  const int length = cached_tokens(a, index, n), stored = chunk ? length : length + n;  // positions below are in the ring
  const int oldest = max(max(length - a.window + 1, length - a.longest_cache), max(stored - a.capacity, 0));
  s.begin = (align - (length - oldest) % align) % align;
  s.chunk = s.begin + stored - oldest;
  s.position = s.begin + length - oldest;
  s.end = s.position + n;
  s.first_token = first;
  s.slot = cache_slot(a, index);
  s.ring_begin = oldest % a.capacity;
  return s;
}

// Keys of the ring are at most `capacity`: it wraps once.
__device__ inline int ring_place(const Attention &a, const Sequence &s, int key) {
  const int place = s.ring_begin - s.begin + key;
  return place >= a.capacity ? place - a.capacity : place;
}

// Keys or values of one head of a sequence.
template <class T>
struct KeyRows {
  const T *ring, *chunk;
  int64_t ring_token, chunk_token;

  __device__ const T *in_chunk(const Sequence &s, int key) const { return chunk + (int64_t)(key - s.chunk) * chunk_token; }
  __device__ const T *in_ring(const Attention &a, const Sequence &s, int key) const { return ring + (int64_t)ring_place(a, s, key) * ring_token; }
};

template <class T>
__device__ inline KeyRows<T> key_rows(const HeadArray &ring, const HeadArray &chunk, const Sequence &s, int index, int head) {
  return {(const T *)ring.data + s.slot * ring.sequence + head * ring.head,
          (const T *)chunk.data + index * chunk.sequence + s.first_token * chunk.token + head * chunk.head, ring.token, chunk.token};
}

// Row `row` of a sequence, in q or out: its token, and the query head of key head `head`.
template <class T>
__device__ inline T *query_row(const HeadArray &x, const Attention &a, const Segment &s, int head, int row) {
  const int token = row / a.group;
  return (T *)x.data + s.index * x.sequence + (s.begin + token) * x.token + (head * a.group + row - token * a.group) * x.head;
}

__device__ inline float *lse_of_row(const Attention &a, const Segment &s, int head, int row) {
  const int token = row / a.group;
  return a.lse + s.index * a.lse_sequence + s.begin + token + (head * a.group + row - token * a.group) * a.lse_head;
}

}  // namespace mixtral::cuda
