// Argument checks shared by all ops. A Check remembers the first violation; after it every further check is a no-op, so
// an op's check function reads as a list of its rules.
#pragma once
#include <initializer_list>

#include "../core/context.h"
#include "../core/error.h"

namespace mixtral::api {

// Under `if constexpr` the CUDA backend is compiled against, but not linked to, where there is none.
#ifdef MIXTRAL_EXT_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

constexpr int64_t kAny = -1;  // a dimension of any size

enum Dtypes {
  kFloats,  // f32 (CPU only), bf16, f16; 16-byte aligned on CUDA, where kernels move 16 bytes at a time
  kLogits,  // f32, bf16, f16
  kF32,
  kI32,
  kI32OrI64,
};

enum Layout {
  kStrided,     // innermost stride 1, other strides free
  kOutput,      // the same, and no two elements may share memory
  kContiguous,  // row-major without gaps
};

class Check {
 public:
  // `op` is the C name, the prefix of every message.
  Check(const char *op, const mixtral_context *context, const void *params, size_t expected_struct_size);

  bool ok() const { return status_ == MIXTRAL_OK; }
  mixtral_status status() const { return status_; }

  // Present, rank, shape (kAny matches all), dtype, layout, alignment, data not NULL unless empty.
  void tensor(const char *name, const mixtral_tensor &t, std::initializer_list<int64_t> shape, Dtypes dtypes, Layout layout);
  void same_dtype(const char *name, const mixtral_tensor &t, const char *other_name, const mixtral_tensor &other);
  void range(const char *name, int64_t value, int64_t low, int64_t high);
  // Records a violation described by a printf format; the op name is put in front.
  __attribute__((format(printf, 3, 4))) void require(bool condition, const char *format, ...);
  // A size that CUDA kernels go through 16 bytes at a time; any on the CPU.
  void cuda_multiple_of_8(const char *name, int64_t value);

 private:
  __attribute__((format(printf, 3, 4))) void set(mixtral_status status, const char *format, ...);

  const char *op_;
  const mixtral_context *context_;
  mixtral_status status_ = MIXTRAL_OK;
};

inline bool present(const mixtral_tensor &t) { return t.ndim != 0 || t.data != nullptr; }

// Bytes an op asks for so that a 64-byte aligned block of `bytes` fits whatever the alignment of what it is given.
inline size_t padded(size_t bytes) { return bytes ? bytes + 63 : 0; }

// The aligned block inside the caller's workspace; on a short one sets `status` and returns nullptr.
void *workspace(const char *op, size_t needed, void *given, size_t given_bytes, mixtral_status *status);

// stream must be NULL on the CPU.
mixtral_status check_stream(const char *op, const mixtral_context &context, const void *stream);

// What the two grouped products ask of their params alike; `gated` weights hold two rows an output column.
template <class Params>
mixtral_status check_grouped(const char *op, const mixtral_context *context, const Params *params, const char *weights_name,
                             mixtral_tensor Params::*weights_field, bool gated) {
  Check c(op, context, params, sizeof *params);
  if (!c.ok()) return c.status();
  const Params &p = *params;
  const mixtral_tensor &weights = p.*weights_field;
  c.require(p.reserved == 0, "reserved: expected 0, got %d", p.reserved);
  c.tensor("a", p.a, {kAny, kAny}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  c.tensor(weights_name, weights, {kAny, kAny, p.a.shape[1]}, kFloats, kStrided);
  if (!c.ok()) return c.status();
  c.same_dtype(weights_name, weights, "a", p.a);
  const int64_t experts = weights.shape[0];
  c.require(experts >= 1 && experts <= MIXTRAL_MAX_EXPERTS, "%s.shape[0] (experts): expected 1 to %d, got %lld", weights_name,
            MIXTRAL_MAX_EXPERTS, (long long)experts);
  c.require(!gated || weights.shape[1] % 2 == 0, "%s.shape[1]: expected an even number of rows (gate, then up), got %lld",
            weights_name, (long long)weights.shape[1]);
  c.tensor("expert_offsets", p.expert_offsets, {experts + 1}, kI32, kContiguous);
  int64_t rows = p.a.shape[0];
  if (present(p.a_rows)) {
    c.tensor("a_rows", p.a_rows, {kAny}, kI32, kContiguous);
    rows = p.a_rows.shape[0];
    c.range("a_rows_divisor", p.a_rows_divisor, 1, INT32_MAX);
  } else {
    c.require(p.a_rows_divisor == 1, "a_rows_divisor: expected 1 without a_rows, got %d", p.a_rows_divisor);
  }
  c.range("a.shape[0]", p.a.shape[0], 0, INT32_MAX);
  c.range("out.shape[0] (rows)", rows, 0, INT32_MAX);
  c.tensor("out", p.out, {rows, weights.shape[1] / (gated ? 2 : 1)}, kFloats, kOutput);
  c.same_dtype("out", p.out, "a", p.a);
  c.cuda_multiple_of_8("a.shape[1]", p.a.shape[1]);
  return c.status();
}

// One per op: all that mixtral_<op> checks before it calls a backend.
mixtral_status check(const mixtral_context *context, const mixtral_moe_gate_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_moe_sort_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_moe_permute_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_moe_combine_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_grouped_gemm_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_grouped_gemm_swiglu_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_moe_experts_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_sliding_window_attention_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_rolling_attention_params *params);
mixtral_status check(const mixtral_context *context, const mixtral_apply_rope_params *params);

// An op with a workspace: all checks, then run(context, params, aligned workspace).
template <class Params, class Run>
mixtral_status run_with_workspace(const char *op, const mixtral_context *context, const Params *params, void *given,
                                  size_t given_bytes, void *stream, size_t (*bytes)(const mixtral_context &, const Params &),
                                  const Run &run) {
  mixtral_status status = check(context, params);
  if (status == MIXTRAL_OK) status = check_stream(op, *context, stream);
  if (status != MIXTRAL_OK) return status;
  void *aligned = workspace(op, padded(bytes(*context, *params)), given, given_bytes, &status);
  return status == MIXTRAL_OK ? run(*context, *params, aligned) : status;
}

}  // namespace mixtral::api
