// Blocks of bf16 rows on AMX; all else (decode, f32, f16) is AVX-512's. As in attention_kernel.inc, with the rows along the
// columns of a tile, so keys are A tiles as they lie in memory:
//   scores[key][row] = K Q^T        per 32 keys x 32 rows: D/32 steps of 4 tile loads and 4 tdpbf16ps
//   softmax over keys               f32, lanes along the rows
//   sums[d][row] += V^T weights     per 32 d x 32 rows: 4 sums loaded and stored, kTileKeys/32 steps as above
//
//   tiles      0-3 C: 2 x 2 blocks of 16 x 16 f32     4-5 A: 16 keys x 32 d, or 16 d x 32 keys     6-7 B: 16 pairs x 16 rows
//   scratch (bytes at D = 128)
//     q        [row / 16][D/2][16][2] bf16     49152
//     sums     [panel][D][32] f32              98304
//     keys     [kTileKeys][D] bf16             16384   only for a tile that is short or spans two pieces
//     values   [D][kTileKeys] bf16             16384   V^T, packed once a tile for all rows of the block
//     weights  [kTileKeys][32] f32              8192
//     pairs    [2][kTileKeys/2][16][2] bf16     4096   the weights, rounded, as B tiles
//   of kTileKeys keys and 192 rows at D = 128: 6144 cycles of tdpbf16ps; about 1500 to transpose V, 768 vectors of exp2
#include <immintrin.h>

#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 16
constexpr int kVectors = 2;
#include "attention_vector.inc"
#include "amx_tiles.inc"

constexpr int64_t kTile = 16;  // rows of a tile

struct Block {
  alignas(64) uint16_t q[kBlockRows * 128];
  float sums[kBlockRows * 128];
  uint16_t keys[kTileKeys * 128];
  uint16_t values[kTileKeys * 128];
  float weights[kTileKeys * kPanel];
  uint16_t pairs[kTileKeys * kPanel];
  uint16_t zeros[128];
  BlockRows rows;
};
static_assert(sizeof(Block) <= kScratchBytes, "kScratchBytes holds a Block");

// 16 x 16 elements of 32 bits.
inline void transpose(U *x) {
  U y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = __builtin_shufflevector(x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    y[i + 1] = __builtin_shufflevector(x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 4)  // x[i + c] holds column 4b + c of rows i .. i+3 in its 16-byte group b
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      x[i + 2 * c] = __builtin_shufflevector(y[i + c], y[i + c + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      x[i + 2 * c + 1] = __builtin_shufflevector(y[i + c], y[i + c + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[8 * i + c] = __builtin_shufflevector(x[8 * i + c], x[8 * i + c + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      y[8 * i + c + 4] = __builtin_shufflevector(x[8 * i + c], x[8 * i + c + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      x[8 * i + c] = __builtin_shufflevector(y[4 * i + c], y[4 * i + c + 8], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      x[8 * i + c + 4] = __builtin_shufflevector(y[4 * i + c], y[4 * i + c + 8], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
}

// Rows of the block as B tiles; rows past the end are zeros.
template <int kD>
inline void pack_queries(const Task &t, int64_t panels, Block &s) {
  for (int64_t group = 0; group < panels * kPanel; group += kTile)
    for (int64_t d = 0; d < kD; d += 2 * kTile) {
      U x[kTile];
      for (int64_t i = 0; i < kTile; ++i) {
        const int64_t row = t.row_begin + group + i;
        const char *from = row < t.row_end ? query(t, row) : (const char *)s.zeros;
        x[i] = BF16::load_pairs(from + d * BF16::kBytes);
      }
      transpose(x);
      __builtin_memcpy(s.q + group * kD + d * kTile, x, sizeof x);
    }
}

// V^T of `count` values at rows[]; those from count on are zeros.
template <int kD>
inline void pack_values(const char *const *rows, Block &s) {
  for (int64_t j = 0; j < kTileKeys; j += 2 * kTile)
    for (int64_t d = 0; d < kD; d += kTile) {
      U x[kTile];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; ++i)
        x[i] = BF16::load_bits(rows[j + 2 * i] + d * BF16::kBytes) | BF16::load_bits(rows[j + 2 * i + 1] + d * BF16::kBytes) << 16;
      transpose(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kTile; ++i) __builtin_memcpy(s.values + (d + i) * kTileKeys + j, &x[i], sizeof x[i]);
    }
}

template <int kD>
inline bool all_finite(const Block &s) {
  U inf = {};
  for (int64_t i = 0; i < kTileKeys * kD; i += 2 * kWidth) {
    const U x = BF16::load_pairs((const char *)(s.values + i));
    inf |= (U)((x & 0x7f80u) == 0x7f80u) | (U)((x & 0x7f800000u) == 0x7f800000u);
  }
  uint32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= inf[i];
  return any == 0;
}

// weights[key][row] of a panel; k_token in bytes.
template <int kD>
inline void panel_scores(const uint16_t *q, const char *k, int64_t k_token, int64_t count, float *weights) {
  finish_stores();
  for (int64_t j = 0; j < count; j += 2 * kTile) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
#pragma GCC unroll 4
    for (int64_t d = 0; d < kD; d += 2 * kTile) {
      const char *key = k + j * k_token + d * 2;
      _tile_loadd(4, key, k_token);
      _tile_loadd(6, q + d * kTile, 64);
      _tile_loadd(7, q + kTile * kD + d * kTile, 64);
      _tile_loadd(5, key + kTile * k_token, k_token);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float *to = weights + j * kPanel;
    _tile_stored(0, to, kPanel * 4);
    _tile_stored(1, to + kTile, kPanel * 4);
    _tile_stored(2, to + kTile * kPanel, kPanel * 4);
    _tile_stored(3, to + kTile * kPanel + kTile, kPanel * 4);
  }
}

inline U rounded(F x) {
  const U bits = (U)x;
  return bits + 0x7fffu + (bits >> 16 & 1u);
}

// The weights of `count` keys as B tiles; zeros up to kTileKeys.
inline void pack_weights(const float *weights, int64_t count, uint16_t *pairs) {
  for (int64_t j = 0; j < kTileKeys; j += 2)
#pragma GCC unroll 2
    for (int64_t v = 0; v < kVectors; ++v) {
      const F even = j < count ? load(weights + j * kPanel + v * kWidth) : F{};
      const F odd = j + 1 < count ? load(weights + (j + 1) * kPanel + v * kWidth) : F{};
      const U both = rounded(even) >> 16 | (rounded(odd) & 0xffff0000u);
      __builtin_memcpy(pairs + (v * kTileKeys + j) * kTile, &both, sizeof both);
    }
}

// sums[d][row] += V^T weights of a panel.
template <int kD>
inline void panel_values(const uint16_t *values, const uint16_t *pairs, int64_t count, float *sums) {
  finish_stores();
  for (int64_t d = 0; d < kD; d += 2 * kTile) {
    float *to = sums + d * kPanel;
    _tile_loadd(0, to, kPanel * 4);
    _tile_loadd(1, to + kTile, kPanel * 4);
    _tile_loadd(2, to + kTile * kPanel, kPanel * 4);
    _tile_loadd(3, to + kTile * kPanel + kTile, kPanel * 4);
    for (int64_t j = 0; j < count; j += 2 * kTile) {
      const uint16_t *value = values + d * kTileKeys + j;
      _tile_loadd(4, value, kTileKeys * 2);
      _tile_loadd(6, pairs + j * kTile, 64);
      _tile_loadd(7, pairs + (kTileKeys + j) * kTile, 64);
      _tile_loadd(5, value + kTile * kTileKeys, kTileKeys * 2);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, kPanel * 4);
    _tile_stored(1, to + kTile, kPanel * 4);
    _tile_stored(2, to + kTile * kPanel, kPanel * 4);
    _tile_stored(3, to + kTile * kPanel + kTile, kPanel * 4);
  }
}

// The same where values are not finite, for the keys from `begin` on: rows ignore values that they do not see.
template <int kD>
void selective_values(const uint16_t *values, const float *weights, int64_t count, float *sums, int64_t begin, const BlockRows &rows,
                      int64_t row) {
  for (int64_t d = 0; d < kD; ++d)
    for (int64_t v = 0; v < kVectors; ++v) {
      F sum = load(sums + d * kPanel + v * kWidth);
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t bits = (uint32_t)values[d * kTileKeys + j] << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        const F w = (F)(rounded(load(weights + j * kPanel + v * kWidth)) & 0xffff0000u);
        sum = select(seeing(rows, row + v * kWidth, begin + j), sum + w * value, sum);
      }
      store(sums + d * kPanel + v * kWidth, sum);
    }
}

template <int kD>
void task_block(const Task &t) {
  Block &s = *(Block *)t.scratch;
  const int64_t rows = t.row_end - t.row_begin, panels = (rows + kPanel - 1) / kPanel;
  __builtin_memset(s.zeros, 0, sizeof s.zeros);
  __builtin_memset(s.sums, 0, (size_t)(panels * kPanel * kD) * sizeof(float));
  start_rows(t, s.rows);
  pack_queries<kD>(t, panels, s);
  _tile_loadconfig(&kConfig);

  for (int64_t begin = t.key_begin; begin < t.key_end; begin += kTileKeys) {
    const int64_t end = t.key_end - begin < kTileKeys ? t.key_end : begin + kTileKeys, count = end - begin;
    const char *k_rows[kTileKeys], *v_rows[kTileKeys];
    for_keys(t, begin, end, [&](int64_t position, const char *k, const char *v) {
      k_rows[position - begin] = k;
      v_rows[position - begin] = v;
    });
    for (int64_t j = count; j < kTileKeys; ++j) k_rows[j] = v_rows[j] = (const char *)s.zeros;
    pack_values<kD>(v_rows, s);
    const char *keys = k_rows[0];
    int64_t k_token = count == kTileKeys ? k_rows[1] - k_rows[0] : 0;
    bool evenly = count == kTileKeys;
    for (int64_t j = 2; j < kTileKeys && evenly; ++j) evenly = k_rows[j] - k_rows[j - 1] == k_token;
    if (!evenly) {
      for (int64_t j = 0; j < kTileKeys; ++j) __builtin_memcpy(s.keys + j * kD, k_rows[j], kD * 2);
      keys = (const char *)s.keys;
      k_token = kD * 2;
    }
    const bool edge = end - 1 > s.rows.last[0] || begin < s.rows.first[rows - 1];
    const bool not_finite = edge && !all_finite<kD>(s);

    for (int64_t row = 0; row < rows; row += kPanel) {
      const int64_t bottom = (rows < row + kPanel ? rows : row + kPanel) - 1;  // last row of the panel
      if (begin > s.rows.last[bottom] || end <= s.rows.first[row]) continue;
      const bool masked = end - 1 > s.rows.last[row] || begin < s.rows.first[bottom];
      float *sums = s.sums + row * kD;
      F factor[kVectors];
      panel_scores<kD>(s.q + row * kD, keys, k_token, count, s.weights);
      if (masked)
        block_softmax<kVectors, true, true>(s.weights, count, begin, t.problem.scale, s.rows, row, factor);
      else
        block_softmax<kVectors, false, true>(s.weights, count, begin, t.problem.scale, s.rows, row, factor);
      bool rescale = false;
      for (int v = 0; v < kVectors; ++v)
        for (int i = 0; i < kWidth; ++i) rescale = rescale || factor[v][i] != 1;
      if (rescale)
        for (int64_t d = 0; d < kD; ++d)
          for (int v = 0; v < kVectors; ++v)
            store(sums + d * kPanel + v * kWidth, load(sums + d * kPanel + v * kWidth) * factor[v]);
      if (masked && not_finite) {
        selective_values<kD>(s.values, s.weights, count, sums, begin, s.rows, row);
      } else {
        pack_weights(s.weights, count, s.pairs);
        panel_values<kD>(s.values, s.pairs, count, sums);
      }
    }
  }
  _tile_release();

  for (int64_t r = 0; r < rows; ++r) {
    const float *from = s.sums + r / kPanel * kD * kPanel + r % kPanel;
    float row[kD];
    for (int d = 0; d < kD; ++d) row[d] = from[d * kPanel];
    write_row<BF16, kD>(t, t.key_head, t.row_begin + r, row, s.rows.maximum[r], s.rows.weight[r]);
  }
}

}  // namespace

void task_amx(const Task &t) {
  if (t.problem.dtype != MIXTRAL_DTYPE_BF16 || is_few(t.problem, t.sequence))
    task_avx512(t);
  else if (t.problem.head_dim == 128)
    task_block<128>(t);
  else
    task_block<64>(t);
}

}  // namespace mixtral::cpu::attention
