#include "check.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace mixtral::api {
namespace {

bool dtype_allowed(int32_t dtype, Dtypes dtypes, bool cuda) {
  const bool half = dtype == MIXTRAL_DTYPE_BF16 || dtype == MIXTRAL_DTYPE_F16;
  switch (dtypes) {
    case kFloats: return half || (dtype == MIXTRAL_DTYPE_F32 && !cuda);
    case kLogits: return half || dtype == MIXTRAL_DTYPE_F32;
    case kF32: return dtype == MIXTRAL_DTYPE_F32;
    case kI32: return dtype == MIXTRAL_DTYPE_I32;
    case kI32OrI64: return dtype == MIXTRAL_DTYPE_I32 || dtype == MIXTRAL_DTYPE_I64;
  }
  return false;
}

const char *dtypes_text(Dtypes dtypes, bool cuda) {
  switch (dtypes) {
    case kFloats: return cuda ? "bfloat16 or float16" : "float32, bfloat16 or float16";
    case kLogits: return "float32, bfloat16 or float16";
    case kF32: return "float32";
    case kI32: return "int32";
    case kI32OrI64: return "int32 or int64";
  }
  return "";
}

int64_t dtype_bytes(int32_t dtype) { return (dtype >> 8 & 0xff) / 8; }

// "[2, 3]" into `text`; with `pattern` kAny prints as "any".
void shape_text(char *text, size_t bytes, const int64_t *shape, int ndim, bool pattern) {
  size_t used = (size_t)snprintf(text, bytes, "[");
  for (int i = 0; i < ndim && used < bytes; ++i) {
    const char *separator = i ? ", " : "";
    used += pattern && shape[i] == kAny ? (size_t)snprintf(text + used, bytes - used, "%sany", separator)
                             : (size_t)snprintf(text + used, bytes - used, "%s%lld", separator, (long long)shape[i]);
  }
  if (used < bytes) snprintf(text + used, bytes - used, "]");
}

// Number of elements, or -1 if it or a byte extent does not fit 63 bits. That is asked of an empty array as if its
// dimensions of 0 were 1, so that the products of its other dimensions, which kernels form, are safe too.
int64_t element_count(const mixtral_tensor &t) {
  int64_t count = 1, last = 0;
  bool empty = false;
  for (int i = 0; i < t.ndim; ++i) {
    empty |= t.shape[i] == 0;
    if (t.shape[i] <= 1) continue;
    int64_t extent;
    if (__builtin_mul_overflow(count, t.shape[i], &count)) return -1;
    if (__builtin_mul_overflow(t.shape[i] - 1, t.stride[i], &extent) || __builtin_add_overflow(last, extent, &last) ||
        last > INT64_MAX / 16)
      return -1;
  }
  return empty ? 0 : count;
}

// No two elements share memory: with dimensions in order of stride, each stride passes over all smaller dimensions.
bool overlaps_itself(const mixtral_tensor &t) {
  int order[4], n = 0;
  for (int i = 0; i < t.ndim; ++i)
    if (t.shape[i] > 1) order[n++] = i;
  for (int i = 0; i < n; ++i)
    for (int j = i + 1; j < n; ++j)
      if (t.stride[order[j]] < t.stride[order[i]]) {
        int swap = order[i];
        order[i] = order[j];
        order[j] = swap;
      }
  int64_t reach = 0;  // offset of the last element so far
  for (int i = 0; i < n; ++i) {
    if (t.stride[order[i]] <= reach) return true;
    reach += (t.shape[order[i]] - 1) * t.stride[order[i]];
  }
  return false;
}

}  // namespace

Check::Check(const char *op, const mixtral_context *context, const void *params, size_t expected_struct_size)
    : op_(op), context_(context) {
  if (!context) set(MIXTRAL_ERROR_INVALID_ARGUMENT, "context: expected a context, got NULL");
  if (!params) set(MIXTRAL_ERROR_INVALID_ARGUMENT, "params: expected a params struct, got NULL");
  if (!ok()) return;
  size_t struct_size;
  memcpy(&struct_size, params, sizeof struct_size);  // every params struct begins with it
  if (struct_size != expected_struct_size)
    set(MIXTRAL_ERROR_INVALID_ARGUMENT, "struct_size: expected %zu (library version %d), got %zu", expected_struct_size,
        mixtral_version(), struct_size);
}

void Check::set(mixtral_status status, const char *format, ...) {
  if (!ok()) return;
  char text[400];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  status_ = fail(status, "%s: %s", op_, text);
}

void Check::require(bool condition, const char *format, ...) {
  if (condition || !ok()) return;
  char text[400];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  set(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s", text);
}

void Check::range(const char *name, int64_t value, int64_t low, int64_t high) {
  require(value >= low && value <= high, "%s: expected %lld to %lld, got %lld", name, (long long)low, (long long)high,
          (long long)value);
}

void Check::cuda_multiple_of_8(const char *name, int64_t value) {
  if (ok() && context_->device_type == MIXTRAL_DEVICE_CUDA && value % 8 != 0)
    set(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: expected a multiple of 8 on CUDA, got %lld", name, (long long)value);
}

void Check::same_dtype(const char *name, const mixtral_tensor &t, const char *other_name, const mixtral_tensor &other) {
  require(t.dtype == other.dtype, "%s: expected dtype %s (as %s), got %s", name, dtype_name(other.dtype), other_name,
          dtype_name(t.dtype));
}

void Check::tensor(const char *name, const mixtral_tensor &t, std::initializer_list<int64_t> shape, Dtypes dtypes,
                   Layout layout) {
  if (!ok()) return;
  require(present(t), "%s: expected a tensor, got none", name);
  const int ndim = (int)shape.size();
  if (!ok()) return;
  require(t.ndim == ndim, "%s: expected %d dimensions, got %d", name, ndim, t.ndim);
  if (!ok()) return;

  const bool cuda = context_->device_type == MIXTRAL_DEVICE_CUDA;
  require(dtype_allowed(t.dtype, dtypes, cuda), "%s: expected dtype %s, got %s", name, dtypes_text(dtypes, cuda),
          dtype_name(t.dtype));
  bool match = true;
  for (int i = 0; i < ndim; ++i) match &= t.shape[i] >= 0 && (shape.begin()[i] == kAny || shape.begin()[i] == t.shape[i]);
  if (!match) {
    char expected[100], got[100];
    shape_text(expected, sizeof expected, shape.begin(), ndim, true);
    shape_text(got, sizeof got, t.shape, ndim, false);
    require(false, "%s: expected shape %s, got %s", name, expected, got);
  }
  if (!ok()) return;

  for (int i = 0; i < ndim; ++i)
    require(t.shape[i] <= 1 || t.stride[i] >= 0, "%s: expected strides of 0 or more, got %lld in dimension %d", name,
            (long long)t.stride[i], i);
  const int64_t count = ok() ? element_count(t) : 0;
  require(count >= 0, "%s: expected less than 2^59 elements from first to last, got a shape and strides beyond", name);
  if (!ok() || count == 0) return;

  require(t.shape[ndim - 1] <= 1 || t.stride[ndim - 1] == 1, "%s: expected innermost stride 1, got %lld", name,
          (long long)t.stride[ndim - 1]);
  if (layout == kContiguous) {
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      require(t.shape[i] <= 1 || t.stride[i] == expected, "%s: expected a contiguous tensor, got stride %lld in dimension %d",
              name, (long long)t.stride[i], i);
      expected *= t.shape[i];
    }
  }
  if (layout == kOutput)
    require(!overlaps_itself(t), "%s: expected an output whose elements do not share memory, got overlapping strides", name);

  require(t.data != nullptr, "%s: expected data, got NULL", name);
  const int64_t align = cuda && dtypes == kFloats ? 16 : dtype_bytes(t.dtype);
  require((uintptr_t)t.data % (uintptr_t)align == 0, "%s: expected data aligned to %lld bytes, got %p", name,
          (long long)align, t.data);
  for (int i = 0; i + 1 < ndim; ++i)
    require(t.shape[i] <= 1 || t.stride[i] * dtype_bytes(t.dtype) % align == 0,
            "%s: expected strides that are multiples of %lld bytes, got %lld elements in dimension %d", name,
            (long long)align, (long long)t.stride[i], i);
}

void *workspace(const char *op, size_t needed, void *given, size_t given_bytes, mixtral_status *status) {
  *status = MIXTRAL_OK;
  if (needed == 0) return nullptr;
  if (!given || given_bytes < needed) {
    *status = given ? fail(MIXTRAL_ERROR_WORKSPACE, "%s: workspace: expected %zu bytes, got %zu", op, needed, given_bytes)
                    : fail(MIXTRAL_ERROR_WORKSPACE, "%s: workspace: expected %zu bytes, got NULL", op, needed);
    return nullptr;
  }
  return (void *)(((uintptr_t)given + 63) & ~(uintptr_t)63);
}

mixtral_status check_stream(const char *op, const mixtral_context &context, const void *stream) {
  if (context.device_type == MIXTRAL_DEVICE_CPU && stream)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: stream: expected NULL on the CPU, got %p", op, stream);
  return MIXTRAL_OK;
}

}  // namespace mixtral::api
