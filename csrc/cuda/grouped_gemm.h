// One grouped product as the launchers of every architecture take it.
#pragma once
#include "../core/context.h"

namespace mixtral::cuda {

// out[r] = A(r) w[e]^T for the rows r of expert e, or silu(A(r) gate^T) * (A(r) up^T) with w[e] = [gate; up]. Offsets are clamped to
// a monotone range within [0, rows]; a row whose a_rows is out of range counts as zeros.
struct GroupedGemm {
  int32_t dtype;  // of a, w and out: bf16 or f16
  bool swiglu;
  bool early;  // launched while the kernel ahead ends, which writes a, but neither offsets, a_rows nor w
  int32_t experts;
  int32_t rows;  // R
  int64_t n;     // columns of out: N, or I with swiglu
  int64_t k;
  const void *a;          // [a_count, k]
  const int32_t *a_rows;  // [rows]: A(r) = a[a_rows[r] / a_rows_divisor]; NULL: A(r) = a[r]
  int32_t a_rows_divisor;
  int32_t a_count;
  const void *w;  // [experts, n or 2 n, k]
  const int32_t *expert_offsets;  // [experts + 1]
  void *out;                      // [rows, n]
  int64_t a_stride, w_expert_stride, w_stride, out_stride;  // elements
};

enum class GroupedGemmKernel : int32_t { kTiles, kFewRows };

// What api/ chooses by shapes and device (grouped_gemm_config.h).
struct GroupedGemmConfig {
  GroupedGemmKernel kernel;
  int32_t tile_rows;  // of an expert that one pass over its weights serves: kTiles 64 or 128, kFewRows 8, 16, 32 or 64
  int32_t blocks;     // kFewRows: of the grid, at most
};

}  // namespace mixtral::cuda
