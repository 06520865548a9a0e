// Attention of sequences with few rows (decoding): the keys of a sequence are divided into spans, each goes through them with 16 rows at a
// time, and a second kernel combines what the spans of a row found.
//
//   unit       16 rows x a key head x a span of keys (attention.h): the rows of a decoding step with groups of up to 16, so that keys and values
//              are read once for the group
//   grid       two blocks an SM, as fit on 8.0 and 9.0; block b takes the units b, b + gridDim.x, ..: key heads fastest, whose rows lie side by side
//   step       16 keys of one warp: warp w takes the keys 16 w, 16 w + 64, .. of a span with a softmax and sums of its own. Its copies are its
//              own, too, and run on into its next unit: no barrier among warps but at the end of a unit, where they add up
//   shared     4 warps x 2 steps x 16 rows of k and of v: D = 128 64 KB, D = 64 32 KB, and 16 rows of f32 for the sums. Rows of D * 2 bytes,
//              their 16-byte units swizzled by row % 8: no bank conflict in copies or ldmatrix
//   in flight  48 KB and more of keys and values a block with D = 128; 3.35 TB/s * 0.7 us / 132 SMs = 18 KB an SM are needed
//   registers  D = 128: 188 to 192, of them 64 sums, 32 of q, 8 scores; D = 64: 144 to 146
//   barriers   six a unit
//   moved      D * 4 bytes a key and key head, once; (D + 2) * 4 bytes a span, row and head out and back, where there are two spans or more
#include "attention_kernels.h"
#include "attention_rows.cuh"
#include "attention_softmax.cuh"
#include "common/launch.h"
#include "common/overlap.cuh"
#include "common/ptx_sm80.cuh"
#include "common/swizzle.cuh"
#include "common/vector8.cuh"

namespace mixtral::cuda {
namespace {

using namespace mixtral::sm80;

constexpr int kThreads = 128, kWarps = kThreads / 32, kRows = kSplitTile, kStep = 16, kSteps = 2;

template <int head_dim>
struct Shared {
  alignas(128) uint8_t keys[kWarps][kSteps][2][kStep * head_dim * 2];  // k, v
  float sums[kRows][head_dim + 8];  // the 8 keep the rows of a fragment in different banks
  RowSoftmax softmax[kWarps][kRows];
};

struct SplitUnit {
  Segment segment;  // index -1: there are no more units, and `end` is -1
  Sequence sequence;
  int head, row0, rows, span, spans, begin, end;  // keys [begin, end)
};

// Not inlined: with its four callers the kernel would be 100 KB of code.
__device__ __noinline__ SplitUnit unit_at(const Attention &a, int64_t index) {
  const auto shape = [&](int i, int first, int n) { return sequence_at(a, i, first, n, 1); };
  const auto tiles_of = [&](int n) { return is_split(a, n) ? count_row_tiles<kRows>(a, n) : 0; };
  SplitUnit u = {};
  u.segment = find_sequence(a, index, [&](int i, int n) {
    const Sequence s = shape(i, 0, n);
    return s.slot < 0 ? (int64_t)0 : (int64_t)tiles_of(n) * span_count(s.end - s.begin) * a.key_heads;
  });
  if (u.segment.index < 0) {
    u.end = -1;
    return u;
  }
  u.sequence = shape(u.segment.index, u.segment.begin, u.segment.rows);
  const int keys = u.sequence.end - u.sequence.begin, tiles = tiles_of(u.segment.rows), unit = (int)u.segment.unit;
  u.head = unit % a.key_heads;
  u.row0 = unit / a.key_heads % tiles * kRows;
  u.rows = min(kRows, u.segment.rows * a.group - u.row0);
  u.span = unit / a.key_heads / tiles;
  u.spans = span_count(keys);
  u.begin = u.sequence.begin + u.span * span_keys(keys);
  u.end = min(u.begin + span_keys(keys), u.sequence.end);
  return u;
}

// What the spans of a row leave: sums of weighted values, and the shift and the sum of their weights.
struct Partial {
  float *sums;      // [places * key heads][D]
  float2 *softmax;  // [places * key heads]
  AttentionConfig config;

  __device__ int64_t at(const Attention &a, const Segment &s, const Sequence &sequence, int head, int row, int span) const {
    if (config.layout == AttentionConfig::kSpansOfKeys) {
      // A sequence of several spans has more than kLeastSpan keys of its own, and so two places for each kLeastSpan are enough.
      const int64_t place = (int64_t)sequence.first_token * 2 / kLeastSpan + span;
      return (place * a.key_heads + head) * config.most_rows + row;
    }
    const int64_t first = config.layout == AttentionConfig::kRowsOfTokens ? (int64_t)s.begin * a.group : (int64_t)s.index * config.most_rows;
    return ((first + row) * a.key_heads + head) * config.most_spans + span;
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 2) attention_split_kernel(const __grid_constant__ Attention a, const __grid_constant__ Partial partial) {
  extern __shared__ __align__(128) uint8_t shared_bytes[];
  Shared<kHeadDim> &shared = *reinterpret_cast<Shared<kHeadDim> *>(shared_bytes);
  constexpr int kUnits = kHeadDim / 8, kRowBytes = kHeadDim * 2, kPass = 32 / kUnits, kSixteens = kHeadDim / 16;
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const auto place = [](unsigned row, unsigned unit) { return swizzled<kRowBytes>(row, unit); };

  // Copies: lane l has unit l % kUnits of rows l / kUnits + kPass i of its warp's next step.
  const unsigned copy_row = lane / kUnits, copy_unit = lane % kUnits;
  const uint32_t base = shared_address(shared.keys[warp]);
  int64_t load_index = blockIdx.x;
  Sequence sequence;
  KeyRows<T> k, v;
  int load_key = 0, load_end = 0, load_step = 0;  // keys of the unit at hand
  const auto find_keys = [&] {  // in the next unit that has some for this warp
    while (load_key >= load_end && load_end >= 0) {
      const SplitUnit unit = unit_at(a, load_index);
      load_index += gridDim.x;
      load_key = unit.begin + (int)warp * kStep;
      load_end = unit.end;
      sequence = unit.sequence;
      k = key_rows<T>(a.k_ring, a.k, sequence, unit.segment.index, unit.head);
      v = key_rows<T>(a.v_ring, a.v, sequence, unit.segment.index, unit.head);
    }
  };
  const auto load = [&](const KeyRows<T> &rows, int value) {  // k (0) or v (1) of the step at hand
    const auto to = [&](int i) { return base + (load_step * 2 + value) * kStep * kRowBytes + place(copy_row + i * kPass, copy_unit); };
    const int key = load_key + (int)copy_row, last = min(load_key + kStep, load_end) - 1;
    const bool in_chunk = load_key >= sequence.chunk;
    if (in_chunk || (last < sequence.chunk && ring_place(a, sequence, last) == ring_place(a, sequence, load_key) + last - load_key)) {
      const int64_t token = in_chunk ? rows.chunk_token : rows.ring_token;
      const T *from = (in_chunk ? rows.in_chunk(sequence, load_key) : rows.in_ring(a, sequence, load_key)) + copy_row * token + copy_unit * 8;
#pragma unroll
      for (int i = 0; i < kStep / kPass; ++i, from += kPass * token) cp_async_16(to(i), from, key + i * kPass <= last);
    } else {  // the ring wraps, or ends, within the step
#pragma unroll 1
      for (int i = 0; i < kStep / kPass; ++i) {
        const T *from = key + i * kPass < sequence.chunk ? rows.in_ring(a, sequence, key + i * kPass) : rows.in_chunk(sequence, key + i * kPass);
        cp_async_16(to(i), from + copy_unit * 8, key + i * kPass <= last);
      }
    }
  };
  const auto load_k = [&] {
    find_keys();
    if (load_key < load_end) load(k, 0);
    cp_async_commit();
  };
  const auto load_v = [&] {
    if (load_key < load_end) {
      load(v, 1);
      load_step = (load_step + 1) % kSteps;
      load_key += kWarps * kStep;
    }
    cp_async_commit();
  };

  let_next_kernel_begin();
  find_keys();
  // The kernel ahead may still be making keys of the chunk, or the last one of the ring. A span before those has kSteps steps for each warp.
  if (load_end > min(sequence.chunk, sequence.end - 1)) wait_for_kernels_before();
#pragma unroll 1
  for (int s = 0; s < kSteps; ++s) {
    load_k();
    load_v();
  }
  wait_for_kernels_before();
  const uint32_t k_from = base + place(lane % 8 + lane / 16 * 8, lane / 8 % 2), v_from = base + place(lane % 16, lane / 16);
  const uint32_t sign = a.negative ? 0x80008000u : 0;
  int step = 0;
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const SplitUnit unit = unit_at(a, index);
    if (unit.segment.index < 0) return;
    // A thread has rows lane / 4 and lane / 4 + 8.
    uint32_t fq[kSixteens][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + half * 8;
      const T *from = query_row<const T>(a.q, a, unit.segment, unit.head, unit.row0 + row) + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kSixteens; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) fq[i][j * 2 + half] = row < unit.rows ? *(const uint32_t *)(from + i * 16 + j * 8) ^ sign : 0;
    }
    const int last_row = unit.row0 + unit.rows - 1, position = unit.sequence.position;
    const KeyRange range(unit.sequence, a.window, position + unit.row0 / a.group, position + last_row / a.group);

    RowSoftmax softmax[2];
    float sum[2 * kSixteens][4] = {};
#pragma unroll 1
    for (int key = unit.begin + (int)warp * kStep; key < unit.end; key += kWarps * kStep, step = (step + 1) % kSteps) {
      cp_async_wait<2 * kSteps - 1>();
      __syncwarp();  // k is there
      float score[2][4] = {};
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        uint32_t fk[4];
        ldmatrix_x4(fk, (k_from + step * 2 * kStep * kRowBytes) ^ (i * 32));
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_m16n8k16(score[j], fq[i], fk[2 * j], fk[2 * j + 1], T());
      }
      __syncwarp();  // all lanes are past k
      load_k();

      if (range.edge(key, kStep)) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const RowMask mask(unit.sequence, a.window, position + (unit.row0 + (int)lane / 4 + h * 8) / a.group);
          mask_row(score, h, mask, key);
        }
      }
      uint32_t weights[1][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor = to_weights(score, h, a.scale, softmax[h], weights, T());
        scale_row(sum, h, factor);
      }

      cp_async_wait<2 * kSteps - 1>();
      __syncwarp();  // v is there
#pragma unroll
      for (int i = 0; i < kSixteens; ++i) {
        uint32_t fv[4];
        ldmatrix_x4_trans(fv, (v_from + (step * 2 + 1) * kStep * kRowBytes) ^ (i * 32));
#pragma unroll
        for (int j = 0; j < 2; ++j) mma_m16n8k16(sum[2 * i + j], weights[0], fv[2 * j], fv[2 * j + 1], T());
      }
      __syncwarp();  // all lanes are past v
      load_v();
    }

    // The warps' results together, one warp after the other.
    __syncthreads();  // all warps are past what they read of the last unit's
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      softmax[h].sum = quad_sum(softmax[h].sum);
      if (lane % 4 == 0) shared.softmax[warp][lane / 4 + h * 8] = softmax[h];
    }
    __syncthreads();
    const auto whole = [&](int row) {  // the softmax of a row
      RowSoftmax r;
      for (int w = 0; w < kWarps; ++w) r.highest = fmaxf(r.highest, shared.softmax[w][row].highest);
      const float shift = softmax_shift(r.highest, a.scale);
      for (int w = 0; w < kWarps; ++w) r.sum += shared.softmax[w][row].sum * exp2_approx(fmaf(shared.softmax[w][row].highest, a.scale, -shift));
      return r;
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shift = softmax_shift(whole(lane / 4 + h * 8).highest, a.scale), factor = exp2_approx(fmaf(softmax[h].highest, a.scale, -shift));
      scale_row(sum, h, factor);
    }
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = lane / 4 + h * 8;
          if (row >= unit.rows) break;
#pragma unroll
          for (int i = 0; i < 2 * kSixteens; ++i) {
            float2 *to = (float2 *)&shared.sums[row][i * 8 + lane % 4 * 2];
            *to = w ? make_float2(to->x + sum[i][h * 2], to->y + sum[i][h * 2 + 1]) : make_float2(sum[i][h * 2], sum[i][h * 2 + 1]);
          }
        }
      }
      __syncthreads();
    }

    constexpr int kFours = kHeadDim / 4;  // four columns a thread
    for (int row = thread / kFours; row < unit.rows; row += kThreads / kFours) {
      const float4 x = *(const float4 *)&shared.sums[row][thread % kFours * 4];
      const RowSoftmax r = whole(row);
      const int at_row = unit.row0 + row;
      if (unit.spans == 1) {
        const float inverse = softmax_inverse(r.sum);
        const uint2 pairs = make_uint2(pack(x.x * inverse, x.y * inverse, T()), pack(x.z * inverse, x.w * inverse, T()));
        *(uint2 *)(query_row<T>(a.out, a, unit.segment, unit.head, at_row) + thread % kFours * 4) = pairs;
        if (a.lse && thread % kFours == 0)
          *lse_of_row(a, unit.segment, unit.head, at_row) = log_sum_exp(softmax_shift(r.highest, a.scale), r.sum);
      } else {
        const int64_t to = partial.at(a, unit.segment, unit.sequence, unit.head, at_row, unit.span);
        *(float4 *)(partial.sums + to * kHeadDim + thread % kFours * 4) = x;
        if (thread % kFours == 0) partial.softmax[to] = make_float2(r.sum == 0.0f ? -INFINITY : softmax_shift(r.highest, a.scale), r.sum);
      }
    }
  }
}

// One warp a row of a sequence with several spans; lane l has spans l and l + 32, and kHeadDim / 32 columns.
template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 8)
    attention_combine_kernel(const __grid_constant__ Attention a, const __grid_constant__ Partial partial) {
  constexpr int kColumns = kHeadDim / 32;
  const int lane = threadIdx.x % 32;
  for (int64_t index = blockIdx.x * kWarps + threadIdx.x / 32;; index += gridDim.x * kWarps) {
    const Segment segment = find_sequence(a, index, [&](int i, int n) {
      const Sequence s = sequence_at(a, i, 0, n, 1);
      const bool several = s.slot >= 0 && is_split(a, n) && span_count(s.end - s.begin) > 1;
      return several ? (int64_t)n * a.group * a.key_heads : (int64_t)0;
    });
    wait_for_kernels_before();
    if (segment.index < 0) return;
    const Sequence sequence = sequence_at(a, segment.index, segment.begin, segment.rows, 1);
    const int rows = segment.rows * a.group, head = (int)segment.unit / rows, row = (int)segment.unit % rows;
    const int spans = span_count(sequence.end - sequence.begin);
    const auto place = [&](int span) { return partial.at(a, segment, sequence, head, row, span); };

    float2 one[2];
    float shift = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      one[i] = lane + 32 * i < spans ? partial.softmax[place(lane + 32 * i)] : make_float2(-INFINITY, 0.0f);
      shift = fmaxf(shift, one[i].x);
    }
    for (int d = 16; d; d /= 2) shift = fmaxf(shift, __shfl_xor_sync(~0u, shift, d));
    if (shift == -INFINITY) shift = 0.0f;
    float total = 0.0f, factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = exp2_approx(one[i].x - shift);
      total += factor[i] * one[i].y;
    }
    for (int d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
    const float inverse = softmax_inverse(total);

    float sum[kColumns] = {};
#pragma unroll 8
    for (int span = 0; span < spans; ++span) {
      const float weight = __shfl_sync(~0u, span < 32 ? factor[0] : factor[1], span % 32);
      const float *from = partial.sums + place(span) * kHeadDim + lane * kColumns;
      float x[kColumns];
      if constexpr (kColumns == 4)
        *(float4 *)x = *(const float4 *)from;
      else
        *(float2 *)x = *(const float2 *)from;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) sum[i] += weight * x[i];
    }
    uint32_t *to = (uint32_t *)(query_row<T>(a.out, a, segment, head, row) + lane * kColumns);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) to[i] = pack(sum[2 * i] * inverse, sum[2 * i + 1] * inverse, T());
    if (a.lse && lane == 0) *lse_of_row(a, segment, head, row) = log_sum_exp(shift, total);
  }
}

// Calls body(split kernel, combine kernel, bytes of shared memory) with the kernels for these types.
template <class Body>
void with_kernels(int32_t dtype, int head_dim, const Body &body) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (head_dim == 128)
      body(attention_split_kernel<T, 128>, attention_combine_kernel<T, 128>, (int)sizeof(Shared<128>));
    else
      body(attention_split_kernel<T, 64>, attention_combine_kernel<T, 64>, (int)sizeof(Shared<64>));
  });
}

}  // namespace

cudaError_t attention_split_init() {
  cudaError_t error = cudaSuccess;
  for (const int32_t dtype : {MIXTRAL_DTYPE_BF16, MIXTRAL_DTYPE_F16})
    for (const int head_dim : {64, 128})
      with_kernels(dtype, head_dim, [&](auto split, auto, int shared) {
        if (error == cudaSuccess) error = cudaFuncSetAttribute(split, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
      });
  return error;
}

cudaError_t attention_split(const Attention &a, const AttentionConfig &config, void *workspace, cudaStream_t stream) {
  Partial partial = {};
  partial.sums = (float *)workspace;
  partial.softmax = (float2 *)((char *)workspace + partial_sums_bytes(a, config));
  partial.config = config;
  cudaError_t error = cudaSuccess;
  with_kernels(a.dtype, a.head_dim, [&](auto split, auto combine, int shared) {
    error = launch(split, dim3((unsigned)config.split_blocks), kThreads, shared, stream, a.early, a, partial);
    if (error == cudaSuccess && config.combine_blocks)
      error = launch(combine, dim3((unsigned)config.combine_blocks), kThreads, 0, stream, a.overlaps, a, partial);
  });
  return error;
}

}  // namespace mixtral::cuda
