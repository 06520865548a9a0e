// The grouped product inside the CPU backend: plain data handed by the ops (grouped_gemm, grouped_gemm_swiglu,
// moe_experts) to the driver in grouped_gemm.cpp, and by the driver to the kernel of one instruction set.
#pragma once
#include "../core/context.h"

namespace mixtral::cpu {

// The rows [row_begin, row_end) of out[r] = A(r) @ w[e]^T, or of silu(A(r) @ gate[e]^T) * (A(r) @ up[e]^T).
struct GroupedGemm {
  int32_t dtype;                    // of a, w and out
  bool swiglu;                      // w[e] is [gate; up], 2n rows
  int64_t n, k;                     // columns of out, length of a product
  int64_t row_begin, row_end;       // at most kGemmRows
  const void *a;                    // A(r) = a[a_rows[r] / a_rows_divisor]; without a_rows, a is A(row_begin)
  int64_t a_stride;                 // elements
  const int32_t *a_rows;            // indexed by r, or NULL
  int64_t a_rows_divisor;
  const void *w;                    // [E, n or 2n, k]
  int64_t w_expert_stride, w_stride;
  const int32_t *expert_offsets;    // [E+1]
  int32_t experts;
  void *out;                        // out is the output of row_begin
  int64_t out_stride;
};

// A part of one expert's product for one thread: rows [row_begin, row_begin + rows) x columns [column_begin, column_end).
struct GemmTask {
  int64_t expert, row_begin, rows;
  void *packed;  // the rows' activations in the kernel's own layout, (k rounded up to 32) elements a row
  int64_t column_begin, column_end;
};

// Columns of out a task covers at most; with swiglu half of it, so that it is the number of weight rows.
constexpr int64_t kGemmColumns = 128;
// pack() lays out up to so many rows at a time; an expert's packed rows begin at a multiple of it.
constexpr int64_t kGemmPackRows = 16;

// One instruction set's kernel for one dtype: pack() fills task.packed for at most kGemmPackRows rows, product() then
// computes a task over any number of packed rows.
struct GemmKernel {
  void (*pack)(const GroupedGemm &g, const GemmTask &task);
  void (*product)(const GroupedGemm &g, const GemmTask &task);
  int32_t packed_element_bytes;
};

GemmKernel grouped_gemm_kernel_portable(int32_t dtype);
GemmKernel grouped_gemm_kernel_avx2(int32_t dtype);
GemmKernel grouped_gemm_kernel_avx512(int32_t dtype);
GemmKernel grouped_gemm_kernel_avx512bf16();  // bf16 only
GemmKernel grouped_gemm_kernel_amx();         // bf16 only

// Longer inputs are done in passes of so many rows: it bounds the workspace, and rows being sorted by expert, a pass of
// a long input touches few experts, so weights are still read about once.
constexpr int64_t kGemmRows = 1024;

// Bytes for grouped_gemm_pass on parts of a product of `rows` rows.
size_t grouped_gemm_pass_workspace_size(const mixtral_context &context, int32_t dtype, int64_t rows, int64_t experts,
                                        int64_t k);
void grouped_gemm_pass(const mixtral_context &context, const GroupedGemm &g, void *workspace);

// The whole op behind grouped_gemm (w [E, n, k]) and grouped_gemm_swiglu (w [E, 2n, k]): checks values, runs the passes.
// `op` is the C name for messages.
mixtral_status grouped_gemm_op(const mixtral_context &context, const char *op, bool swiglu, const mixtral_tensor &a,
                               const mixtral_tensor &w, const mixtral_tensor &expert_offsets, const mixtral_tensor &a_rows,
                               int64_t a_rows_divisor, const mixtral_tensor &out, void *workspace);

// expert_offsets start at 0, do not decrease and end at `rows` or less; a_rows / divisor of the rows in range is in
// [0, a_count).
mixtral_status check_expert_offsets(const char *op, const mixtral_tensor &expert_offsets, int64_t rows);
mixtral_status check_a_rows(const char *op, const mixtral_tensor &a_rows, int64_t count, int64_t divisor, int64_t a_count);

}  // namespace mixtral::cpu
