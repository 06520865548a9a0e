// attention_bf16.inc on AMX; all else (decode, f32, f16) is AVX-512's.
//   tiles      0-3 C: 2 x 2 blocks of 16 x 16 f32     4-5 A: 16 keys x 32 d, or 16 d x 32 keys     6-7 B: 16 pairs x 16 rows
//   a step of 32 x 32 sums and 32 products each: 4 tile loads, 4 tdpbf16ps
//   of kTileKeys keys and 192 rows at D = 128, by count, not measured: 6144 cycles of tdpbf16ps; about 1500 to transpose V,
//   768 vectors of exp2
#include <immintrin.h>

#include <cmath>

#include "attention.h"

namespace mixtral::cpu::attention {
namespace {
#define MIXTRAL_ATTENTION_WIDTH 16
constexpr int kVectors = 2;
#include "attention_vector.inc"
#include "amx_tiles.inc"

template <bool kAccumulate>
inline void product(const char *a, int64_t a_row, int64_t rows, const uint16_t *b, int64_t b_vector, int64_t depth, float *c) {
  finish_stores();
  for (int64_t i = 0; i < rows; i += 32) {
    float *to = c + i * kPanel;
    if (kAccumulate) {
      _tile_loadd(0, to, kPanel * 4);
      _tile_loadd(1, to + 16, kPanel * 4);
      _tile_loadd(2, to + 16 * kPanel, kPanel * 4);
      _tile_loadd(3, to + 16 * kPanel + 16, kPanel * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      const char *from = a + i * a_row + k * 2;
      _tile_loadd(4, from, a_row);
      _tile_loadd(6, b + k * 16, 64);
      _tile_loadd(7, b + b_vector + k * 16, 64);
      _tile_loadd(5, from + 16 * a_row, a_row);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to, kPanel * 4);
    _tile_stored(1, to + 16, kPanel * 4);
    _tile_stored(2, to + 16 * kPanel, kPanel * 4);
    _tile_stored(3, to + 16 * kPanel + 16, kPanel * 4);
  }
}

#include "attention_bf16.inc"
}  // namespace

void task_amx(const Task &t) {
  if (!is_bf16_block(t)) return task_avx512(t);
  _tile_loadconfig(&kConfig);
  task_block(t);
  _tile_release();
}

}  // namespace mixtral::cpu::attention
