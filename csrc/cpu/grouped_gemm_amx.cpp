// grouped_gemm in AMX (bf16). out^T = W X^T: 16 weight rows as they lie are an A tile, so weights are never repacked; only
// the activations take the B tile's layout of pairs.
//
//   tiles        0-3 C: 2 x 2 blocks of 16 weight rows x 16 tokens, f32
//                4-5 A: 16 weight rows x 32 of k         6-7 B: 16 pairs of k x 16 tokens
//   packed       [16 tokens][k rounded up to 32]: per 16 tokens [k/2][token][2], zeros beyond tokens and k
//   task         one expert x up to 128 weight rows x all tokens in chunks of 96, over kBlock of k at a time: the B panel of
//                32 tokens (32 KB) stays in L1 while 128 weight rows pass. C waits in f32 scratch, 48 KB of stack
//   a step of k  4 tdpbf16ps (64 cycles) on 4 tile loads: 2 KB of weights from L2, 2 KB of tokens from L1
//   per kBlock   64 cycles * 16 and about 130 of storing and loading C (by count, not measured)
#include <immintrin.h>

#include <cstring>

#include "grouped_gemm.h"

namespace mixtral::cpu {
namespace {

constexpr int kVectorBytes = 64;
#include "grouped_gemm_vector.inc"
#include "amx_tiles.inc"

constexpr int64_t kTile = 16;                 // rows of a tile, and tokens
constexpr int64_t kStep = 32;                 // of k in a tile
constexpr int64_t kBlock = 512;               // of k between two visits of C
constexpr int64_t kTileFloats = kTile * kTile;
constexpr int64_t kChunkTiles = 6;            // of tokens; 2 at a time
static_assert(kTile == kGemmPackRows, "a packed group is a tile");
constexpr int64_t kScratchStride = kChunkTiles * kTileFloats;  // of a weight tile
constexpr int64_t kScratchFloats = kGemmColumns / kTile * kScratchStride;
static_assert(kScratchFloats * 4 + 2 * kTileFloats * 4 + 2 * kTile * kStep * 2 <= 60 * 1024,
              "scratch, turned and copy with some room in 64 KB of stack");

// A 4 x 4 block of 32-bit elements from four rows, which may lie at any address; to_stride in elements.
ALWAYS_INLINE void transpose4(const void *a, const void *b, const void *c, const void *d, float *to, int64_t to_stride) {
  typedef int32_t Index4 __attribute__((vector_size(16)));
  Vec4 r0, r1, r2, r3;
  memcpy(&r0, a, sizeof r0);
  memcpy(&r1, b, sizeof r1);
  memcpy(&r2, c, sizeof r2);
  memcpy(&r3, d, sizeof r3);
  const Vec4 low01 = __builtin_shuffle(r0, r1, Index4{0, 4, 1, 5}), low23 = __builtin_shuffle(r2, r3, Index4{0, 4, 1, 5});
  const Vec4 high01 = __builtin_shuffle(r0, r1, Index4{2, 6, 3, 7}), high23 = __builtin_shuffle(r2, r3, Index4{2, 6, 3, 7});
  *(Vec4Anywhere *)(to + 0 * to_stride) = __builtin_shuffle(low01, low23, Index4{0, 1, 4, 5});
  *(Vec4Anywhere *)(to + 1 * to_stride) = __builtin_shuffle(low01, low23, Index4{2, 3, 6, 7});
  *(Vec4Anywhere *)(to + 2 * to_stride) = __builtin_shuffle(high01, high23, Index4{0, 1, 4, 5});
  *(Vec4Anywhere *)(to + 3 * to_stride) = __builtin_shuffle(high01, high23, Index4{2, 3, 6, 7});
}

// 16 x 16 f32 [weight row][token] to [token][weight row].
void transpose_tile(const float *from, float *to) {
  for (int64_t i = 0; i < kTile; i += 4)
    for (int64_t j = 0; j < kTile; j += 4) {
      const float *block = from + i * kTile + j;
      transpose4(block, block + kTile, block + 2 * kTile, block + 3 * kTile, to + j * kTile + i, kTile);
    }
}

// Up to 16 tokens to [k/2][token][2]. A pair of bf16 moves as one 32-bit element.
void pack(const GroupedGemm &g, const GemmTask &t) {
  const int64_t length = (g.k + kStep - 1) / kStep * kStep;
  float *to = (float *)t.packed;
  const uint16_t *rows[kTile];
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t r = t.row_begin + i;
    rows[i] = (const uint16_t *)g.a + (g.a_rows ? g.a_rows[r] / g.a_rows_divisor : r - g.row_begin) * g.a_stride;
  }
  for (int64_t k = 0; k < length; k += 8)
    for (int64_t i = 0; i < kTile; i += 4) {
      alignas(16) uint16_t edge[4][8] = {};
      const uint16_t *four[4];
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t left = i + j < t.rows ? g.k - k : 0;
        four[j] = edge[j];
        if (left >= 8)
          four[j] = rows[i + j] + k;
        else if (left > 0)
          memcpy(edge[j], rows[i + j] + k, (size_t)left * sizeof edge[j][0]);
      }
      transpose4(four[0], four[1], four[2], four[3], to + k / 2 * kTile + i, kTile);
    }
}

// 16 weight rows, or fewer at the end of the matrix.
struct WeightTile {
  const uint16_t *rows;
  int64_t count, stride;
};

// The A tile at k: as it lies, or a copy with zeros where rows or k end.
struct Source {
  const uint16_t *data;
  int64_t stride_bytes;
};
ALWAYS_INLINE Source source(const WeightTile &w, int64_t k, int64_t left, uint16_t (&copy)[kTile][kStep]) {
  if (w.count == kTile && left >= kStep) return {w.rows + k, w.stride * 2};
  finish_stores();  // below the last tile load of `copy`
  memset(copy, 0, sizeof copy);
  for (int64_t i = 0; i < w.count; ++i)
    memcpy(copy[i], w.rows + i * w.stride + k, (size_t)(left < kStep ? left : kStep) * sizeof copy[i][0]);
  finish_stores();
  return {copy[0], kStep * 2};
}

// C of two weight tiles and one or two token tiles over [k, k_end): c and c + c_stride are the weight tiles' scratch, each
// with its token tiles side by side; x and x + x_stride are the packed token tiles.
template <bool kTwo>
void multiply(const WeightTile (&w)[2], const uint16_t *x, int64_t x_stride, int64_t k, int64_t k_end, int64_t k_total,
              float *c, int64_t c_stride) {
  constexpr int64_t kCBytes = kTile * 4;
  alignas(64) uint16_t copy[2][kTile][kStep];
  if (k == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, kCBytes);
    _tile_loadd(2, c + c_stride, kCBytes);
    if (kTwo) {
      _tile_loadd(1, c + kTileFloats, kCBytes);
      _tile_loadd(3, c + c_stride + kTileFloats, kCBytes);
    }
  }
  for (; k < k_end; k += kStep) {
    const Source a0 = source(w[0], k, k_total - k, copy[0]), a1 = source(w[1], k, k_total - k, copy[1]);
    _tile_loadd(6, x + k * kTile, 64);
    _tile_loadd(4, a0.data, a0.stride_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, a1.data, a1.stride_bytes);
    _tile_dpbf16ps(2, 5, 6);
    if (kTwo) {
      _tile_loadd(7, x + x_stride + k * kTile, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, kCBytes);
  _tile_stored(2, c + c_stride, kCBytes);
  if (kTwo) {
    _tile_stored(1, c + kTileFloats, kCBytes);
    _tile_stored(3, c + c_stride + kTileFloats, kCBytes);
  }
}

void product(const GroupedGemm &g, const GemmTask &t) {
  const int64_t columns = t.column_end - t.column_begin, length = (g.k + kStep - 1) / kStep * kStep;
  const int64_t tiles = (columns + kTile - 1) / kTile, weight_tiles = g.swiglu ? 2 * tiles : tiles;  // gate tiles, up tiles
  const uint16_t *w = (const uint16_t *)g.w + t.expert * g.w_expert_stride + t.column_begin * g.w_stride;
  alignas(64) float scratch[kScratchFloats];  // [weight tile][token tile][16 x 16]
  if (g.k == 0) memset(scratch, 0, sizeof scratch);

  _tile_loadconfig(&kConfig);
  const int64_t token_tiles = (t.rows + kTile - 1) / kTile;
  for (int64_t first = 0; first < token_tiles; first += kChunkTiles) {
    const int64_t end = token_tiles < first + kChunkTiles ? token_tiles : first + kChunkTiles;
    for (int64_t k = 0; k < g.k; k += kBlock)
      for (int64_t m = first; m < end; m += 2)
        for (int64_t i = 0; i < weight_tiles; i += 2) {
          WeightTile pair[2] = {};
          for (int64_t j = 0; j < 2 && i + j < weight_tiles; ++j) {
            const int64_t column = (i + j) % tiles * kTile;
            pair[j] = {w + (column + (i + j < tiles ? 0 : g.n)) * g.w_stride,
                       columns - column < kTile ? columns - column : kTile, g.w_stride};
          }
          float *c = scratch + i * kScratchStride + (m - first) * kTileFloats;
          const uint16_t *x = (const uint16_t *)t.packed + m * kTile * length;
          const int64_t k_end = g.k - k < kBlock ? g.k : k + kBlock;
          if (m + 1 < end)
            multiply<true>(pair, x, kTile * length, k, k_end, g.k, c, kScratchStride);
          else
            multiply<false>(pair, x, kTile * length, k, k_end, g.k, c, kScratchStride);
        }
    for (int64_t m = first; m < end; ++m)
      for (int64_t i = 0; i < tiles; ++i) {
        float turned[2][kTileFloats];  // gate, up: [token][column]
        transpose_tile(scratch + i * kScratchStride + (m - first) * kTileFloats, turned[0]);
        if (g.swiglu) transpose_tile(scratch + (tiles + i) * kScratchStride + (m - first) * kTileFloats, turned[1]);
        for (int64_t token = m * kTile; token < t.rows && token < (m + 1) * kTile; ++token)
          finish_row(g, turned[0] + token % kTile * kTile, kTileFloats,
                     columns - i * kTile < kTile ? columns - i * kTile : kTile, t.row_begin + token,
                     t.column_begin + i * kTile);
      }
  }
  _tile_release();
}

}  // namespace

GemmKernel grouped_gemm_kernel_amx() { return {pack, product, 2}; }

}  // namespace mixtral::cpu
