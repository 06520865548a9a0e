// The torch ops: tensors become mixtral_tensor, the C API checks and computes, its message is raised.
//
// Only PyTorch's stable ABI is used (target 2.11), so one build loads in later torch versions, CPU or CUDA. Each op has
// its `.out` form here as the primitive; the functional form allocates the results and calls it. What can be checked
// by the C API is left to it: here are the checks that need torch (device, None against the C API's number for it).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../include/mixtral_ext.h"
#include "torch_schemas.h"

// In libtorch_cuda only, which is not linked: null on CPU torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void **stream);

namespace {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;
using OptionalFloat = std::optional<double>;

[[noreturn]] void raise(mixtral_status status, const std::string &message) {
  if (status == MIXTRAL_ERROR_INVALID_ARGUMENT) throw std::invalid_argument(message);  // ValueError
  throw std::runtime_error(message);                                                   // RuntimeError
}

// ----------------------------------------------------------------------------------------------------- contexts

// mixtral_parallel_for on torch's pool. Tasks differ in cost (causal tiles), so threads take them one by one.
void run_on_torch_pool(void *, int64_t count, mixtral_task task, void *task_data) {
  struct Work {
    mixtral_task task;
    void *data;
    int64_t count;
    std::atomic<int64_t> next;
  } work{task, task_data, count, {0}};
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  torch_parallel_for(0, std::min<int64_t>(count, threads), 1, [](int64_t, int64_t, void *data) {
    Work &work = *static_cast<Work *>(data);
    for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.task(work.data, i);
  }, &work);
}

mixtral_context *create_context(mixtral_device_type type, int32_t index) {
  mixtral_context_options options = {};
  options.struct_size = sizeof options;
  options.device_type = type;
  options.device_index = index;
  if (type == MIXTRAL_DEVICE_CPU) options.parallel_for = run_on_torch_pool;
  mixtral_context *context = nullptr;
  const mixtral_status status = mixtral_context_create(&options, &context);
  if (status != MIXTRAL_OK) raise(status, mixtral_last_error());
  return context;
}

// Contexts live as long as the process.
const mixtral_context *cpu_context() {
  static const mixtral_context *const context = create_context(MIXTRAL_DEVICE_CPU, 0);
  return context;
}

const mixtral_context *cuda_context(int32_t index) {
  constexpr int32_t kMaxDevices = 64;
  static std::mutex mutex;
  static const mixtral_context *contexts[kMaxDevices];
  if (index < 0 || index >= kMaxDevices) raise(MIXTRAL_ERROR_NOT_SUPPORTED, "mixtral_ext: expected at most 64 CUDA devices");
  std::lock_guard<std::mutex> lock(mutex);
  if (!contexts[index]) contexts[index] = create_context(MIXTRAL_DEVICE_CUDA, index);
  return contexts[index];
}

// ------------------------------------------------------------------------------------------------------ tensors

struct Device {
  int32_t type = -1, index = -1;  // torch's numbers; -1: not known yet
  bool operator==(const Device &other) const { return type == other.type && index == other.index; }
  bool is_cuda() const { return type == aoti_torch_device_type_cuda(); }
  std::string text() const {
    const std::string number = index >= 0 ? ":" + std::to_string(index) : "";
    if (is_cuda()) return "cuda" + number;
    if (type == aoti_torch_device_type_cpu()) return "cpu";
    if (type == aoti_torch_device_type_meta()) return "meta";
    return "another kind" + number;
  }
};

// A tensor that the caller gave as None is undefined; results are sized as if it were an empty one in f32 on the CPU,
// and Call::tensor refuses it by name.
Device device_of(const Tensor &t) {
  if (!t.defined()) return {aoti_torch_device_type_cpu(), -1};
  Device device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
  if (device.type == aoti_torch_device_type_cpu()) device.index = -1;
  return device;
}

int32_t torch_dtype(const Tensor &t) {
  if (!t.defined()) return aoti_torch_dtype_float32();
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// Uninitialised and contiguous, on the device of `like`.
template <size_t ndim>
Tensor empty(const char *op, const Tensor &like, const int64_t (&shape)[ndim], int32_t dtype) {
  int64_t strides[ndim], elements = 1;
  for (size_t i = ndim; i-- > 0; elements *= shape[i] > 0 ? shape[i] : 1) strides[i] = elements;
  const Device device = device_of(like);
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(ndim, shape, strides, dtype, device.type, device.index, &handle) != TORCH_SUCCESS)
    raise(MIXTRAL_ERROR_OUT_OF_MEMORY, std::string(op) + ": cannot allocate " + std::to_string(elements) +
                                           " elements on " + device.text());
  return Tensor(handle);
}

// Size of a dimension, 0 if there is none: results of a wrong rank are sized without complaint, and the C API, which
// sees the same tensors next, says what is wrong.
int64_t size(const Tensor &t, int64_t dim) { return t.defined() && dim < t.dim() ? t.size(dim) : 0; }

// One call of an op of the C API: converts its arguments, then runs it on their device.
class Call {
 public:
  explicit Call(const char *op) : op_(op) {}

  mixtral_tensor tensor(const char *name, const Tensor &t) {
    if (!t.defined()) fail(name, "expected a tensor, got None");
    const Device device = device_of(t);
    if (!first_name_) {
      first_ = t;
      device_ = device;
      first_name_ = name;
    }
    if (!(device == device_)) fail(name, "expected device " + device_.text() + " (as " + first_name_ + "), got " + device.text());
    const int64_t ndim = t.dim();
    if (ndim < 1 || ndim > 4) fail(name, "expected 1 to 4 dimensions, got " + std::to_string(ndim));
    mixtral_tensor result = {};
    result.data = t.data_ptr();
    result.dtype = dtype(t);
    result.ndim = (int32_t)ndim;
    memcpy(result.shape, t.sizes().data(), sizeof(int64_t) * ndim);
    memcpy(result.stride, t.strides().data(), sizeof(int64_t) * ndim);
    return result;
  }

  mixtral_tensor tensor(const char *name, const OptionalTensor &t) { return t ? tensor(name, *t) : mixtral_tensor{}; }

  int32_t i32(const char *name, int64_t value) {
    if (value != (int32_t)value) fail(name, "expected a 32-bit integer, got " + std::to_string(value));
    return (int32_t)value;
  }

  // None is the C API's 0, so a 0 that was given means something else.
  template <class T>
  T or_zero(const char *name, const std::optional<T> &value) {
    if (value && *value == 0) fail(name, "expected None or a value other than 0, got 0");
    return value.value_or(0);
  }

  // None is the C API's -1.
  int64_t or_minus_one(const char *name, const OptionalInt &value) {
    if (value && *value < 0) fail(name, "expected None or a value of 0 or more, got " + std::to_string(*value));
    return value.value_or(-1);
  }

  template <class Params>
  void run(const Params &params, size_t (*workspace_size)(const mixtral_context *, const Params *),
           mixtral_status (*op)(const mixtral_context *, const Params *, void *, size_t, void *)) {
    std::optional<torch::stable::accelerator::DeviceGuard> guard;
    const mixtral_context *context;
    void *stream = nullptr;
    if (device_.is_cuda()) {
      if (!aoti_torch_get_current_cuda_stream) raise(MIXTRAL_ERROR_NOT_SUPPORTED, std::string(op_) + ": this torch has no CUDA");
      guard.emplace(device_.index);
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_.index, &stream));
      context = cuda_context(device_.index);
    } else {
      context = cpu_context();
    }
    const size_t bytes = workspace_size(context, &params);
    OptionalTensor workspace;
    if (bytes) workspace = empty(op_, *first_, {(int64_t)bytes}, aoti_torch_dtype_uint8());
    const mixtral_status status = op(context, &params, workspace ? workspace->data_ptr() : nullptr, bytes, stream);
    if (status != MIXTRAL_OK) raise(status, mixtral_last_error());
  }

 private:
  [[noreturn]] void fail(const char *name, const std::string &what) {
    raise(MIXTRAL_ERROR_INVALID_ARGUMENT, std::string(op_) + ": " + name + ": " + what);
  }

  // The DLPack code.
  static int32_t dtype(const Tensor &t) {
    const int32_t dtype = torch_dtype(t);
    if (dtype == aoti_torch_dtype_bfloat16()) return MIXTRAL_DTYPE_BF16;
    if (dtype == aoti_torch_dtype_float16()) return MIXTRAL_DTYPE_F16;
    if (dtype == aoti_torch_dtype_float32()) return MIXTRAL_DTYPE_F32;
    if (dtype == aoti_torch_dtype_int32()) return MIXTRAL_DTYPE_I32;
    if (dtype == aoti_torch_dtype_int64()) return MIXTRAL_DTYPE_I64;
    // Refused by the C API, which knows what this argument takes; these are the codes that it has names for.
    if (dtype == aoti_torch_dtype_float64()) return 0x00014002;
    if (dtype == aoti_torch_dtype_bool()) return 0x00010806;
    if (dtype == aoti_torch_dtype_uint8()) return 0x00010801;
    if (dtype == aoti_torch_dtype_int8()) return 0x00010800;
    if (dtype == aoti_torch_dtype_int16()) return 0x00011000;
    if (dtype == aoti_torch_dtype_complex64()) return 0x00014005;
    return 0;
  }

  const char *op_, *first_name_ = nullptr;
  OptionalTensor first_;
  Device device_;
};

// ------------------------------------------------------------------------------------------------------ routing

void moe_gate_out(const Tensor &router_logits, int64_t top_k, bool renormalize, const Tensor &topk_weights,
                  const Tensor &topk_ids, const Tensor &expert_offsets, const Tensor &sorted_slots,
                  const Tensor &slot_rows) {
  Call call("mixtral_moe_gate");
  mixtral_moe_gate_params p = {};
  p.struct_size = sizeof p;
  p.router_logits = call.tensor("router_logits", router_logits);
  p.top_k = call.i32("top_k", top_k);
  p.renormalize = renormalize;
  p.topk_weights = call.tensor("topk_weights", topk_weights);
  p.topk_ids = call.tensor("topk_ids", topk_ids);
  p.expert_offsets = call.tensor("expert_offsets", expert_offsets);
  p.sorted_slots = call.tensor("sorted_slots", sorted_slots);
  p.slot_rows = call.tensor("slot_rows", slot_rows);
  call.run(p, mixtral_moe_gate_workspace_size, mixtral_moe_gate);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_gate(const Tensor &router_logits, int64_t top_k, bool renormalize) {
  const char *op = "mixtral_moe_gate";
  const int32_t i32 = aoti_torch_dtype_int32();
  const int64_t tokens = size(router_logits, 0), k = std::clamp<int64_t>(top_k, 0, MIXTRAL_MAX_TOP_K);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> r{
      empty(op, router_logits, {tokens, k}, aoti_torch_dtype_float32()), empty(op, router_logits, {tokens, k}, i32),
      empty(op, router_logits, {size(router_logits, 1) + 1}, i32), empty(op, router_logits, {tokens * k}, i32),
      empty(op, router_logits, {tokens, k}, i32)};
  moe_gate_out(router_logits, top_k, renormalize, std::get<0>(r), std::get<1>(r), std::get<2>(r), std::get<3>(r),
               std::get<4>(r));
  return r;
}

void moe_sort_out(const Tensor &topk_ids, int64_t num_experts, const Tensor &expert_offsets, const Tensor &sorted_slots,
                  const Tensor &slot_rows) {
  Call call("mixtral_moe_sort");
  mixtral_moe_sort_params p = {};
  p.struct_size = sizeof p;
  p.topk_ids = call.tensor("topk_ids", topk_ids);
  p.num_experts = call.i32("num_experts", num_experts);
  p.expert_offsets = call.tensor("expert_offsets", expert_offsets);
  p.sorted_slots = call.tensor("sorted_slots", sorted_slots);
  p.slot_rows = call.tensor("slot_rows", slot_rows);
  call.run(p, mixtral_moe_sort_workspace_size, mixtral_moe_sort);
}

std::tuple<Tensor, Tensor, Tensor> moe_sort(const Tensor &topk_ids, int64_t num_experts) {
  const char *op = "mixtral_moe_sort";
  const int32_t i32 = aoti_torch_dtype_int32();
  const int64_t tokens = size(topk_ids, 0), k = size(topk_ids, 1);
  std::tuple<Tensor, Tensor, Tensor> r{empty(op, topk_ids, {std::clamp<int64_t>(num_experts, 0, MIXTRAL_MAX_EXPERTS) + 1}, i32),
                                       empty(op, topk_ids, {tokens * k}, i32), empty(op, topk_ids, {tokens, k}, i32)};
  moe_sort_out(topk_ids, num_experts, std::get<0>(r), std::get<1>(r), std::get<2>(r));
  return r;
}

void moe_permute_out(const Tensor &hidden, const Tensor &sorted_slots, int64_t top_k, const Tensor &rows) {
  Call call("mixtral_moe_permute");
  mixtral_moe_permute_params p = {};
  p.struct_size = sizeof p;
  p.hidden = call.tensor("hidden", hidden);
  p.sorted_slots = call.tensor("sorted_slots", sorted_slots);
  p.top_k = call.i32("top_k", top_k);
  p.rows = call.tensor("rows", rows);
  call.run(p, mixtral_moe_permute_workspace_size, mixtral_moe_permute);
}

Tensor moe_permute(const Tensor &hidden, const Tensor &sorted_slots, int64_t top_k) {
  Tensor rows = empty("mixtral_moe_permute", hidden, {size(sorted_slots, 0), size(hidden, 1)}, torch_dtype(hidden));
  moe_permute_out(hidden, sorted_slots, top_k, rows);
  return rows;
}

void moe_combine_out(const Tensor &rows, const Tensor &slot_rows, const Tensor &topk_weights, const Tensor &out) {
  Call call("mixtral_moe_combine");
  mixtral_moe_combine_params p = {};
  p.struct_size = sizeof p;
  p.rows = call.tensor("rows", rows);
  p.slot_rows = call.tensor("slot_rows", slot_rows);
  p.topk_weights = call.tensor("topk_weights", topk_weights);
  p.out = call.tensor("out", out);
  call.run(p, mixtral_moe_combine_workspace_size, mixtral_moe_combine);
}

Tensor moe_combine(const Tensor &rows, const Tensor &slot_rows, const Tensor &topk_weights) {
  Tensor out = empty("mixtral_moe_combine", rows, {size(slot_rows, 0), size(rows, 1)}, torch_dtype(rows));
  moe_combine_out(rows, slot_rows, topk_weights, out);
  return out;
}

// ------------------------------------------------------------------------------------------------------ experts

void grouped_gemm_out(const Tensor &a, const Tensor &b, const Tensor &expert_offsets, const OptionalTensor &a_rows,
                      int64_t a_rows_divisor, const Tensor &out) {
  Call call("mixtral_grouped_gemm");
  mixtral_grouped_gemm_params p = {};
  p.struct_size = sizeof p;
  p.a = call.tensor("a", a);
  p.b = call.tensor("b", b);
  p.expert_offsets = call.tensor("expert_offsets", expert_offsets);
  p.a_rows = call.tensor("a_rows", a_rows);
  p.a_rows_divisor = call.i32("a_rows_divisor", a_rows_divisor);
  p.out = call.tensor("out", out);
  call.run(p, mixtral_grouped_gemm_workspace_size, mixtral_grouped_gemm);
}

Tensor grouped_gemm(const Tensor &a, const Tensor &b, const Tensor &expert_offsets, const OptionalTensor &a_rows,
                    int64_t a_rows_divisor) {
  Tensor out = empty("mixtral_grouped_gemm", a, {size(a_rows ? *a_rows : a, 0), size(b, 1)}, torch_dtype(a));
  grouped_gemm_out(a, b, expert_offsets, a_rows, a_rows_divisor, out);
  return out;
}

void grouped_gemm_swiglu_out(const Tensor &a, const Tensor &w_gate_up, const Tensor &expert_offsets,
                             const OptionalTensor &a_rows, int64_t a_rows_divisor, const Tensor &out) {
  Call call("mixtral_grouped_gemm_swiglu");
  mixtral_grouped_gemm_swiglu_params p = {};
  p.struct_size = sizeof p;
  p.a = call.tensor("a", a);
  p.w_gate_up = call.tensor("w_gate_up", w_gate_up);
  p.expert_offsets = call.tensor("expert_offsets", expert_offsets);
  p.a_rows = call.tensor("a_rows", a_rows);
  p.a_rows_divisor = call.i32("a_rows_divisor", a_rows_divisor);
  p.out = call.tensor("out", out);
  call.run(p, mixtral_grouped_gemm_swiglu_workspace_size, mixtral_grouped_gemm_swiglu);
}

Tensor grouped_gemm_swiglu(const Tensor &a, const Tensor &w_gate_up, const Tensor &expert_offsets,
                           const OptionalTensor &a_rows, int64_t a_rows_divisor) {
  Tensor out = empty("mixtral_grouped_gemm_swiglu", a, {size(a_rows ? *a_rows : a, 0), size(w_gate_up, 1) / 2}, torch_dtype(a));
  grouped_gemm_swiglu_out(a, w_gate_up, expert_offsets, a_rows, a_rows_divisor, out);
  return out;
}

void moe_experts_out(const Tensor &hidden, const Tensor &w_gate_up, const Tensor &w_down, const Tensor &topk_weights,
                     const Tensor &topk_ids, const OptionalTensor &expert_offsets, const OptionalTensor &sorted_slots,
                     const OptionalTensor &slot_rows, const Tensor &out) {
  Call call("mixtral_moe_experts");
  mixtral_moe_experts_params p = {};
  p.struct_size = sizeof p;
  p.hidden = call.tensor("hidden", hidden);
  p.w_gate_up = call.tensor("w_gate_up", w_gate_up);
  p.w_down = call.tensor("w_down", w_down);
  p.topk_weights = call.tensor("topk_weights", topk_weights);
  p.topk_ids = call.tensor("topk_ids", topk_ids);
  p.expert_offsets = call.tensor("expert_offsets", expert_offsets);
  p.sorted_slots = call.tensor("sorted_slots", sorted_slots);
  p.slot_rows = call.tensor("slot_rows", slot_rows);
  p.out = call.tensor("out", out);
  call.run(p, mixtral_moe_experts_workspace_size, mixtral_moe_experts);
}

Tensor moe_experts(const Tensor &hidden, const Tensor &w_gate_up, const Tensor &w_down, const Tensor &topk_weights,
                   const Tensor &topk_ids, const OptionalTensor &expert_offsets, const OptionalTensor &sorted_slots,
                   const OptionalTensor &slot_rows) {
  Tensor out = empty("mixtral_moe_experts", hidden, {size(hidden, 0), size(hidden, 1)}, torch_dtype(hidden));
  moe_experts_out(hidden, w_gate_up, w_down, topk_weights, topk_ids, expert_offsets, sorted_slots, slot_rows, out);
  return out;
}

// ---------------------------------------------------------------------------------------------------- attention

// out like q, and lse [Hq, Tq] or [B, Hq, Sq].
std::tuple<Tensor, Tensor> attention_results(const char *op, const Tensor &q) {
  const int32_t f32 = aoti_torch_dtype_float32();
  if (q.defined() && q.dim() == 4)
    return {empty(op, q, {q.size(0), q.size(1), q.size(2), q.size(3)}, torch_dtype(q)),
            empty(op, q, {q.size(0), q.size(2), q.size(1)}, f32)};
  return {empty(op, q, {size(q, 0), size(q, 1), size(q, 2)}, torch_dtype(q)), empty(op, q, {size(q, 1), size(q, 0)}, f32)};
}

void sliding_window_attention_out(const Tensor &q, const Tensor &k, const Tensor &v, const OptionalTensor &cu_seqlens_q,
                                  const OptionalTensor &cu_seqlens_k, OptionalInt max_seqlen_q, OptionalInt max_seqlen_k,
                                  OptionalInt window, OptionalFloat softmax_scale, const OptionalTensor &k_start,
                                  const OptionalTensor &k_length, const Tensor &out, const OptionalTensor &lse) {
  Call call("mixtral_sliding_window_attention");
  mixtral_sliding_window_attention_params p = {};
  p.struct_size = sizeof p;
  p.q = call.tensor("q", q);
  p.k = call.tensor("k", k);
  p.v = call.tensor("v", v);
  p.cu_seqlens_q = call.tensor("cu_seqlens_q", cu_seqlens_q);
  p.cu_seqlens_k = call.tensor("cu_seqlens_k", cu_seqlens_k);
  p.k_start = call.tensor("k_start", k_start);
  p.k_length = call.tensor("k_length", k_length);
  p.max_seqlen_q = max_seqlen_q.value_or(0);
  p.max_seqlen_k = max_seqlen_k.value_or(0);
  p.window = call.or_zero("window", window);
  p.softmax_scale = call.or_zero("softmax_scale", softmax_scale);
  p.out = call.tensor("out", out);
  p.lse = call.tensor("lse", lse);
  call.run(p, mixtral_sliding_window_attention_workspace_size, mixtral_sliding_window_attention);
}

std::tuple<Tensor, Tensor> sliding_window_attention(const Tensor &q, const Tensor &k, const Tensor &v,
                                                    const OptionalTensor &cu_seqlens_q, const OptionalTensor &cu_seqlens_k,
                                                    OptionalInt max_seqlen_q, OptionalInt max_seqlen_k, OptionalInt window,
                                                    OptionalFloat softmax_scale, const OptionalTensor &k_start,
                                                    const OptionalTensor &k_length) {
  auto r = attention_results("mixtral_sliding_window_attention", q);
  sliding_window_attention_out(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window, softmax_scale,
                               k_start, k_length, std::get<0>(r), std::get<1>(r));
  return r;
}

void rolling_attention_out(const Tensor &q, const OptionalTensor &k, const OptionalTensor &v, const Tensor &k_cache,
                           const Tensor &v_cache, const Tensor &cu_seqlens_q, const Tensor &cache_lengths,
                           OptionalInt window, OptionalFloat softmax_scale, const OptionalTensor &cache_slots,
                           OptionalInt max_seqlen_q, OptionalInt max_cache_length, OptionalFloat rope_theta,
                           bool rope_interleaved, const Tensor &out, const OptionalTensor &lse) {
  Call call("mixtral_rolling_attention");
  mixtral_rolling_attention_params p = {};
  p.struct_size = sizeof p;
  p.q = call.tensor("q", q);
  p.k = call.tensor("k", k);
  p.v = call.tensor("v", v);
  p.k_cache = call.tensor("k_cache", k_cache);
  p.v_cache = call.tensor("v_cache", v_cache);
  p.cu_seqlens_q = call.tensor("cu_seqlens_q", cu_seqlens_q);
  p.cache_lengths = call.tensor("cache_lengths", cache_lengths);
  p.cache_slots = call.tensor("cache_slots", cache_slots);
  p.max_seqlen_q = max_seqlen_q.value_or(0);
  p.max_cache_length = call.or_minus_one("max_cache_length", max_cache_length);
  p.window = call.or_zero("window", window);
  p.softmax_scale = call.or_zero("softmax_scale", softmax_scale);
  p.rope_theta = call.or_zero("rope_theta", rope_theta);
  p.rope_interleaved = rope_interleaved;
  p.out = call.tensor("out", out);
  p.lse = call.tensor("lse", lse);
  call.run(p, mixtral_rolling_attention_workspace_size, mixtral_rolling_attention);
}

std::tuple<Tensor, Tensor> rolling_attention(const Tensor &q, const OptionalTensor &k, const OptionalTensor &v,
                                             const Tensor &k_cache, const Tensor &v_cache, const Tensor &cu_seqlens_q,
                                             const Tensor &cache_lengths, OptionalInt window, OptionalFloat softmax_scale,
                                             const OptionalTensor &cache_slots, OptionalInt max_seqlen_q,
                                             OptionalInt max_cache_length, OptionalFloat rope_theta, bool rope_interleaved) {
  auto r = attention_results("mixtral_rolling_attention", q);
  rolling_attention_out(q, k, v, k_cache, v_cache, cu_seqlens_q, cache_lengths, window, softmax_scale, cache_slots,
                        max_seqlen_q, max_cache_length, rope_theta, rope_interleaved, std::get<0>(r), std::get<1>(r));
  return r;
}

void apply_rope(const Tensor &q, const OptionalTensor &k, const Tensor &positions, double theta, bool interleaved) {
  Call call("mixtral_apply_rope");
  mixtral_apply_rope_params p = {};
  p.struct_size = sizeof p;
  p.q = call.tensor("q", q);
  p.k = call.tensor("k", k);
  p.positions = call.tensor("positions", positions);
  p.theta = theta;
  p.interleaved = interleaved;
  call.run(p, mixtral_apply_rope_workspace_size, mixtral_apply_rope);
}

// ------------------------------------------------------------------------------------------------- registration

void implement(torch::stable::detail::StableLibrary &m) {
  m.impl("moe_gate", TORCH_BOX(&moe_gate));
  m.impl("moe_gate.out", TORCH_BOX(&moe_gate_out));
  m.impl("moe_sort", TORCH_BOX(&moe_sort));
  m.impl("moe_sort.out", TORCH_BOX(&moe_sort_out));
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_permute.out", TORCH_BOX(&moe_permute_out));
  m.impl("moe_combine", TORCH_BOX(&moe_combine));
  m.impl("moe_combine.out", TORCH_BOX(&moe_combine_out));
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_gemm.out", TORCH_BOX(&grouped_gemm_out));
  m.impl("grouped_gemm_swiglu", TORCH_BOX(&grouped_gemm_swiglu));
  m.impl("grouped_gemm_swiglu.out", TORCH_BOX(&grouped_gemm_swiglu_out));
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts.out", TORCH_BOX(&moe_experts_out));
  m.impl("sliding_window_attention", TORCH_BOX(&sliding_window_attention));
  m.impl("sliding_window_attention.out", TORCH_BOX(&sliding_window_attention_out));
  m.impl("rolling_attention", TORCH_BOX(&rolling_attention));
  m.impl("rolling_attention.out", TORCH_BOX(&rolling_attention_out));
  m.impl("apply_rope", TORCH_BOX(&apply_rope));
}

}  // namespace

STABLE_TORCH_LIBRARY(mixtral_ext, m) {
  for (const char *schema : mixtral::schemas::kAll) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(mixtral_ext, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(mixtral_ext, CUDA, m) { implement(m); }
