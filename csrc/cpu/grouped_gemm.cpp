// grouped_gemm on the CPU: value checks, passes of kGemmRows rows, tasks, and the choice of kernel. The products themselves
// are in grouped_gemm_dot.inc (vectors along k) and grouped_gemm_amx.cpp.
//
//   a pass     1. pack: 16 rows of one expert a task, gathered through a_rows into the workspace
//              2. product: one expert x up to 128 weight rows (32 where experts have few rows) a task
//   workspace  (rows + 15 * experts with rows) * k packed elements: 4 bytes, or 2 where the kernel multiplies bf16 itself
//   moved      the weights of experts with rows once a pass; an expert without rows costs nothing
#include "grouped_gemm.h"

#include "../core/error.h"
#include "element.h"
#include "ops.h"

namespace mixtral::cpu {

mixtral_status check_expert_offsets(const char *op, const mixtral_tensor &expert_offsets, int64_t rows) {
  const int32_t *offsets = (const int32_t *)expert_offsets.data;
  const int64_t experts = expert_offsets.shape[0] - 1;
  if (offsets[0] != 0)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: expert_offsets: expected 0 at [0], got %d", op, offsets[0]);
  for (int64_t e = 0; e < experts; ++e)
    if (offsets[e + 1] < offsets[e] || offsets[e + 1] > rows)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: expert_offsets: expected %d to %lld at [%lld], got %d", op,
                  offsets[e], (long long)rows, (long long)e + 1, offsets[e + 1]);
  return MIXTRAL_OK;
}

mixtral_status check_a_rows(const char *op, const mixtral_tensor &a_rows, int64_t count, int64_t divisor, int64_t a_count) {
  const int32_t *rows = (const int32_t *)a_rows.data;
  for (int64_t r = 0; r < count; ++r)
    if (rows[r] < 0 || rows[r] / divisor >= a_count)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: a_rows: expected 0 to %lld, got %d in row %lld", op,
                  (long long)(a_count * divisor - 1), rows[r], (long long)r);
  return MIXTRAL_OK;
}

namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// AMX spends 16 cycles on 1 KB of weights however few of a tile's 16 tokens there are, and still keeps up with memory: a decoding step of
// Mistral 7B with 8 sequences takes 0.71 s, and 1.27 where vdpbf16ps serves up to 8 rows (python -m mixtral_model bench --random-weights
// mistral-7b --prompt-tokens 512 --new-tokens 16, bf16, 2 cores, 2026-11-27). One kernel for all makes a row's bits independent of its
// company, too.
GemmKernel kernel_for([[maybe_unused]] mixtral_arch arch, int32_t dtype) {
#if defined(__x86_64__)
  if (dtype == MIXTRAL_DTYPE_BF16 && arch >= MIXTRAL_ARCH_CPU_AVX512_BF16)
    return arch == MIXTRAL_ARCH_CPU_AMX ? grouped_gemm_kernel_amx() : grouped_gemm_kernel_avx512bf16();
  if (arch >= MIXTRAL_ARCH_CPU_AVX512) return grouped_gemm_kernel_avx512(dtype);
  if (arch >= MIXTRAL_ARCH_CPU_AVX2) return grouped_gemm_kernel_avx2(dtype);
#endif
  return grouped_gemm_kernel_portable(dtype);
}

int64_t packed_row_elements(int64_t k) { return (k + 31) / 32 * 32; }

struct ActiveExpert {
  int64_t expert, row_begin, rows, pack_tasks;
  char *packed;
};

}  // namespace

size_t grouped_gemm_pass_workspace_size(const mixtral_context &context, int32_t dtype, int64_t rows, int64_t experts,
                                        int64_t k) {
  rows = smaller(rows, kGemmRows);
  const int64_t packed_rows = rows + smaller(rows, experts) * (kGemmPackRows - 1);
  return (size_t)(packed_rows * packed_row_elements(k) * kernel_for(context.arch, dtype).packed_element_bytes);
}

void grouped_gemm_pass(const mixtral_context &context, const GroupedGemm &g, void *workspace) {
  const GemmKernel kernel = kernel_for(context.arch, g.dtype);
  const int64_t row_bytes = packed_row_elements(g.k) * kernel.packed_element_bytes;
  ActiveExpert active[MIXTRAL_MAX_EXPERTS];
  int64_t experts = 0, pack_tasks = 0;
  char *packed = (char *)workspace;
  for (int64_t e = 0; e < g.experts; ++e) {
    const int64_t begin = g.expert_offsets[e] > g.row_begin ? g.expert_offsets[e] : g.row_begin;
    const int64_t rows = smaller(g.expert_offsets[e + 1], g.row_end) - begin;
    if (rows <= 0) continue;
    const int64_t blocks = (rows + kGemmPackRows - 1) / kGemmPackRows;
    active[experts++] = {e, begin, rows, blocks, packed};
    packed += blocks * kGemmPackRows * row_bytes;
    pack_tasks += blocks;
  }
  if (experts == 0 || g.n == 0) return;

  parallel_for(context, pack_tasks, [&](int64_t i) {
    const ActiveExpert *x = active;
    for (; i >= x->pack_tasks; ++x) i -= x->pack_tasks;
    const int64_t first = i * kGemmPackRows;
    kernel.pack(g, {x->expert, x->row_begin + first, smaller(x->rows - first, kGemmPackRows), x->packed + first * row_bytes, 0, 0});
  });

  // Order of tasks: all experts' first sixteenth of the columns, then their second, and so on. Equal ranges of tasks are
  // equal work (a pool may split [0, count) into contiguous halves), while one thread stays with an expert's tokens.
  constexpr int64_t kParts = 16;
  const bool few = (g.row_end - g.row_begin) / experts <= 16;  // tokens fit the cache anyway: small tasks balance better
  const int64_t columns = (few ? kGemmColumns / 4 : kGemmColumns) / (g.swiglu ? 2 : 1);
  const int64_t blocks = (g.n + columns - 1) / columns;
  parallel_for(context, experts * blocks, [&](int64_t i) {
    int64_t part = 0;
    while (blocks * (part + 1) / kParts <= i / experts) ++part;
    const int64_t first = blocks * part / kParts, width = blocks * (part + 1) / kParts - first;
    const int64_t within = i - experts * first;
    const ActiveExpert &x = active[within / width];
    const int64_t column = (first + within % width) * columns;
    kernel.product(g, {x.expert, x.row_begin, x.rows, x.packed, column, smaller(column + columns, g.n)});
  });
}

size_t grouped_gemm_workspace_size(const mixtral_context &context, const mixtral_grouped_gemm_params &p) {
  return grouped_gemm_pass_workspace_size(context, p.a.dtype, p.out.shape[0], p.b.shape[0], p.a.shape[1]);
}

mixtral_status grouped_gemm(const mixtral_context &context, const mixtral_grouped_gemm_params &p, void *workspace) {
  return grouped_gemm_op(context, "mixtral_grouped_gemm", false, p.a, p.b, p.expert_offsets, p.a_rows, p.a_rows_divisor,
                         p.out, workspace);
}

mixtral_status grouped_gemm_op(const mixtral_context &context, const char *op, bool swiglu, const mixtral_tensor &a,
                               const mixtral_tensor &w, const mixtral_tensor &expert_offsets, const mixtral_tensor &a_rows,
                               int64_t a_rows_divisor, const mixtral_tensor &out, void *workspace) {
  mixtral_status status = check_expert_offsets(op, expert_offsets, out.shape[0]);
  if (status != MIXTRAL_OK) return status;
  const int64_t experts = w.shape[0];
  const int32_t *offsets = (const int32_t *)expert_offsets.data;
  if (a_rows.data) status = check_a_rows(op, a_rows, offsets[experts], a_rows_divisor, a.shape[0]);
  if (status != MIXTRAL_OK) return status;
  GroupedGemm g = {};
  g.dtype = a.dtype;
  g.swiglu = swiglu;
  g.n = out.shape[1];
  g.k = a.shape[1];
  g.a_stride = a.stride[0];
  g.a_rows = (const int32_t *)a_rows.data;
  g.a_rows_divisor = a_rows_divisor;
  g.w = w.data;
  g.w_expert_stride = w.stride[0];
  g.w_stride = w.stride[1];
  g.expert_offsets = offsets;
  g.experts = (int32_t)experts;
  g.out_stride = out.stride[0];
  const int64_t element = a.dtype == MIXTRAL_DTYPE_F32 ? 4 : 2;
  for (g.row_begin = 0; g.row_begin < offsets[experts]; g.row_begin = g.row_end) {
    g.row_end = g.row_begin + kGemmRows < offsets[experts] ? g.row_begin + kGemmRows : offsets[experts];
    g.a = (const char *)a.data + (g.a_rows ? 0 : g.row_begin * a.stride[0] * element);
    g.out = (char *)out.data + g.row_begin * out.stride[0] * element;
    grouped_gemm_pass(context, g, workspace);
  }
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
