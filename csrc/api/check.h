// Argument checks shared by all ops. A Check remembers the first violation; after it every further check is a no-op, so
// an op's check function reads as a list of its rules.
#pragma once
#include <initializer_list>

#include "../core/context.h"
#include "../core/error.h"

namespace mixtral::api {

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
  // The op has no CUDA kernel yet.
  void cpu_only();

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

}  // namespace mixtral::api
