// Stands in for the compiler's <immintrin.h>, so that the *_avx2, *_avx512, *_avx512bf16 and *_amx sources run on any
// machine: every intrinsic our kernels use, and no other, in plain C++. A test's tool, slow on purpose.
//
// How to add one: take the operation from Intel's Intrinsics Guide or the Software Developer's Manual (SDM, volume 2), name
// the instruction above the function, keep rounding, denormals, NaN and faults as the manual has them. Where the hardware
// would fault (an unconfigured tile, shapes that do not match), the shim aborts with a message.
//
// Vector types are GCC's, as in the real header; the sources are compiled without any instruction-set flag.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

typedef long long __m128i __attribute__((vector_size(16), may_alias));
typedef long long __m128i_u __attribute__((vector_size(16), may_alias, aligned(1)));
typedef long long __m256i __attribute__((vector_size(32), may_alias));
typedef long long __m256i_u __attribute__((vector_size(32), may_alias, aligned(1)));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef float __m256 __attribute__((vector_size(32), may_alias));
typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));
typedef unsigned short __mmask16;

namespace emulated {

template <class To, class From>
inline To bits_as(const From &from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

[[noreturn]] inline void fault(const char *what) {
  fprintf(stderr, "emulated instruction would fault: %s\n", what);
  abort();
}

// VCVTPH2PS: exact; subnormal halves become normal floats (DAZ is not consulted), signalling NaNs quiet ones.
inline float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half >> 15 ? -1.0f : 1.0f;
  if (exponent == 31 && mantissa) return bits_as<float>((uint32_t)(half & 0x8000) << 16 | 0x7fc00000u | (uint32_t)mantissa << 13);
  if (exponent == 31) return sign * INFINITY;
  return sign * (exponent ? ldexpf((float)(1024 + mantissa), exponent - 25) : ldexpf((float)mantissa, -24));
}

// make_fp32 of the SDM, with denormals treated as zero as VDPBF16PS and TDPBF16PS do.
inline float bf16_to_float(uint16_t bits) {
  if ((bits & 0x7f80) == 0) bits &= 0x8000;
  return bits_as<float>((uint32_t)bits << 16);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

// One FP32 FMA with DAZ = FTZ = 1 and round to nearest even, whatever MXCSR says.
inline float fma_flushed(float a, float b, float c) { return flushed(std::fma(a, b, flushed(c))); }

}  // namespace emulated

// ---------------------------------------------------------------------------------------------------------- load, widen

// VMOVDQU, VMOVDQU, VMOVDQU32
inline __m128i _mm_loadu_si128(const __m128i_u *p) { return *p; }
inline __m256i _mm256_loadu_si256(const __m256i_u *p) { return *p; }
inline __m512i _mm512_loadu_si512(const void *p) {
  __m512i value;
  memcpy(&value, p, sizeof value);
  return value;
}

// VCVTPH2PS ymm, xmm
inline __m256 _mm256_cvtph_ps(__m128i halves) {
  __m256 result;
  for (int i = 0; i < 8; ++i) result[i] = emulated::half_to_float((uint16_t)((uint64_t)halves[i / 4] >> 16 * (i % 4)));
  return result;
}

// VPMOVZXWD ymm, xmm
inline __m256i _mm256_cvtepu16_epi32(__m128i words) {
  uint16_t from[8];
  uint32_t to[8];
  memcpy(from, &words, sizeof from);
  for (int i = 0; i < 8; ++i) to[i] = from[i];
  return emulated::bits_as<__m256i>(to);
}

// VPSLLD ymm, ymm, imm8: counts above 31 give zero.
inline __m256i _mm256_slli_epi32(__m256i values, int count) {
  uint32_t lanes[8];
  memcpy(lanes, &values, sizeof lanes);
  for (uint32_t &lane : lanes) lane = count > 31 ? 0 : lane << count;
  return emulated::bits_as<__m256i>(lanes);
}

// VCVTPH2PS zmm{k}{z}, ymm
inline __m512 _mm512_maskz_cvtph_ps(__mmask16 mask, __m256i halves) {
  __m512 result;
  for (int i = 0; i < 16; ++i)
    result[i] = mask >> i & 1 ? emulated::half_to_float((uint16_t)((uint64_t)halves[i / 4] >> 16 * (i % 4))) : 0.0f;
  return result;
}

// --------------------------------------------------------------------------------------------------------- AVX512_BF16

// VDPBF16PS: srcdest[i] += a[2i+1] * b[2i+1], then += a[2i] * b[2i], each one FMA that rounds to nearest even with
// denormals as zero on both sides.
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  for (int i = 0; i < 16; ++i) {
    float x = sum[i];
    for (int j = 2 * i + 1; j >= 2 * i; --j)
      x = emulated::fma_flushed(emulated::bf16_to_float((uint16_t)a[j]), emulated::bf16_to_float((uint16_t)b[j]), x);
    sum[i] = x;
  }
  return sum;
}

// ----------------------------------------------------------------------------------------------------------------- AMX

namespace emulated {

struct Tiles {
  bool configured = false;
  uint16_t row_bytes[16];
  uint8_t rows[16];
  uint8_t data[8][16][64];
};
inline thread_local Tiles tiles;

inline void require_tile(int tile) {
  if (!tiles.configured) fault("AMX instruction without LDTILECFG");
  if (tile < 0 || tile > 7 || tiles.rows[tile] == 0) fault("tile not in the configuration");
}

}  // namespace emulated

// LDTILECFG: 64 bytes: palette, start_row, 14 reserved, colsb[16] as words, rows[16]; clears all tiles.
inline void _tile_loadconfig(const void *config) {
  const uint8_t *bytes = (const uint8_t *)config;
  emulated::Tiles &tiles = emulated::tiles;
  if (bytes[0] != 1 || bytes[1] != 0) emulated::fault("LDTILECFG: palette 1 and start_row 0 expected");
  for (int i = 2; i < 16; ++i)
    if (bytes[i]) emulated::fault("LDTILECFG: reserved bytes");
  memcpy(tiles.row_bytes, bytes + 16, sizeof tiles.row_bytes);
  memcpy(tiles.rows, bytes + 48, sizeof tiles.rows);
  for (int i = 0; i < 16; ++i)
    if (tiles.row_bytes[i] > 64 || tiles.rows[i] > 16 || (i > 7 && (tiles.row_bytes[i] || tiles.rows[i])))
      emulated::fault("LDTILECFG: tile too large");
  memset(tiles.data, 0, sizeof tiles.data);
  tiles.configured = true;
}

// TILERELEASE
inline void _tile_release() { emulated::tiles.configured = false; }

// TILEZERO
inline void _tile_zero(int tile) {
  emulated::require_tile(tile);
  memset(emulated::tiles.data[tile], 0, sizeof emulated::tiles.data[tile]);
}

// TILELOADD: rows `stride` bytes apart; what is beyond the configured rows and columns becomes zero.
inline void _tile_loadd(int tile, const void *base, int64_t stride) {
  _tile_zero(tile);
  for (int i = 0; i < emulated::tiles.rows[tile]; ++i)
    memcpy(emulated::tiles.data[tile][i], (const char *)base + i * stride, emulated::tiles.row_bytes[tile]);
}

// TILESTORED
inline void _tile_stored(int tile, void *base, int64_t stride) {
  emulated::require_tile(tile);
  for (int i = 0; i < emulated::tiles.rows[tile]; ++i)
    memcpy((char *)base + i * stride, emulated::tiles.data[tile][i], emulated::tiles.row_bytes[tile]);
}

// TDPBF16PS: c[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]. Even and odd products are summed apart,
// each by FMAs in order of k from zero; then the two sums are added, then that to c. Denormals are zero on both sides.
inline void _tile_dpbf16ps(int c, int a, int b) {
  emulated::Tiles &tiles = emulated::tiles;
  emulated::require_tile(c);
  emulated::require_tile(a);
  emulated::require_tile(b);
  if (c == a || a == b || b == c || tiles.rows[a] != tiles.rows[c] || tiles.row_bytes[b] != tiles.row_bytes[c] ||
      tiles.row_bytes[a] != 4 * tiles.rows[b])
    emulated::fault("TDPBF16PS: tile shapes");
  const auto element = [&](int tile, int row, int i) {
    uint16_t bits;
    memcpy(&bits, &tiles.data[tile][row][2 * i], sizeof bits);
    return emulated::bf16_to_float(bits);
  };
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < tiles.rows[b]; ++k) {
        even = emulated::fma_flushed(element(a, m, 2 * k), element(b, k, 2 * n), even);
        odd = emulated::fma_flushed(element(a, m, 2 * k + 1), element(b, k, 2 * n + 1), odd);
      }
      memcpy(&sum, &tiles.data[c][m][4 * n], sizeof sum);
      sum = emulated::flushed(emulated::flushed(sum) + emulated::flushed(even + odd));
      memcpy(&tiles.data[c][m][4 * n], &sum, sizeof sum);
    }
}
