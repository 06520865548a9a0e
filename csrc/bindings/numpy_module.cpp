// The ops on numpy arrays, without torch: module _numpy, wrapped by mixtral_ext/numpy.py. One table a params struct says
// which keyword goes into which field; everything about shapes and values is checked by the C API itself.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../include/mixtral_ext.h"

namespace py = pybind11;

namespace {

// --------------------------------------------------------------------------------------------------------- threads

// Fixed workers behind mixtral_parallel_for. They serve one call at a time: a second Python thread that calls an op
// meanwhile does its own tasks alone.
class Pool {
 public:
  // Fewer threads where the system does not give so many.
  explicit Pool(int threads) {
    workers_.reserve((size_t)threads);
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::exception &) {  // system_error, bad_alloc
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread &worker : workers_) worker.join();
  }

  int threads() const { return (int)workers_.size() + 1; }

  static void parallel_for(void *pool, int64_t count, mixtral_task task, void *task_data) {
    static_cast<Pool *>(pool)->run({task, task_data, count, {0}});
  }

 private:
  struct Job {
    mixtral_task task;
    void *task_data;
    int64_t count;
    std::atomic<int64_t> next;

    void run() {
      for (int64_t i; (i = next.fetch_add(1)) < count;) task(task_data, i);
    }
  };

  void run(Job &&job) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy || workers_.empty()) return job.run();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;  // who has not woken by now has nothing left to do
    idle_.wait(lock, [this] { return active_ == 0; });
  }

  void work() {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || (job_ && generation_ != seen); });
      if (stop_) return;
      seen = generation_;
      Job *job = job_;
      ++active_;
      lock.unlock();
      job->run();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex busy_, mutex_;  // mutex_ guards all below
  std::condition_variable wake_, idle_;
  Job *job_ = nullptr;
  uint64_t generation_ = 0;
  int active_ = 0;
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

// A context with its pool. Calls share ownership, so set_num_threads never pulls one away.
struct Engine {
  explicit Engine(int threads) : pool(threads) {
    mixtral_context_options options = {};
    options.struct_size = sizeof options;
    options.device_type = MIXTRAL_DEVICE_CPU;
    options.parallel_for = Pool::parallel_for;
    options.pool = &pool;
    if (mixtral_context_create(&options, &context) != MIXTRAL_OK) throw std::runtime_error(mixtral_last_error());
  }
  ~Engine() { mixtral_context_destroy(context); }

  Pool pool;
  mixtral_context *context = nullptr;
  const pid_t process = getpid();
};

// Guarded by the GIL. Never destroyed: at exit and after a fork nobody waits for threads that may be gone.
std::shared_ptr<Engine> &current() {
  static auto *engine = new std::shared_ptr<Engine>;
  return *engine;
}

void replace_engine(int threads) {
  auto made = std::make_shared<Engine>(threads);
  std::shared_ptr<Engine> old = current();
  current() = std::move(made);
  if (old && old->process != getpid()) new std::shared_ptr<Engine>(std::move(old));  // its threads live in the parent only
}

// Workers do not survive a fork: the child's first call makes its own.
std::shared_ptr<Engine> engine() {
  if (!current())
    replace_engine((int)std::max(1u, std::thread::hardware_concurrency()));
  else if (current()->process != getpid())
    replace_engine(current()->pool.threads());
  return current();
}

// ---------------------------------------------------------------------------------------------------------- fields

// Of the optional numbers None is the C API's 0 (kNonzero...) or -1 (kLength), which itself must not be asked for.
enum Kind { kInput, kOutput, kInt32, kInt64, kDouble, kNonzeroInt64, kNonzeroDouble, kLength };

struct Field {
  const char *name;
  Kind kind;
  size_t offset;
};

struct Op {
  const char *name;
  size_t params_size;
  std::vector<Field> fields;
  size_t (*workspace_size)(const mixtral_context *, const void *);
  mixtral_status (*run)(const mixtral_context *, const void *, void *, size_t, void *);
};

#define OP(op, ...)                                                                                           \
  []() -> Op {                                                                                                \
    using Params = mixtral_##op##_params;                                                                     \
    return {"mixtral_" #op, sizeof(Params), {__VA_ARGS__},                                                    \
            [](const mixtral_context *c, const void *p) { return mixtral_##op##_workspace_size(c, (const Params *)p); }, \
            [](const mixtral_context *c, const void *p, void *workspace, size_t bytes, void *stream) {        \
              return mixtral_##op(c, (const Params *)p, workspace, bytes, stream);                            \
            }};                                                                                               \
  }()
#define FIELD(kind, name) Field{#name, kind, offsetof(Params, name)}

// Inputs first, in the order of the header: the first bad one is the one reported.
const Op kOps[] = {
    OP(moe_gate, FIELD(kInput, router_logits), FIELD(kInt32, top_k), FIELD(kInt32, renormalize),
       FIELD(kOutput, topk_weights), FIELD(kOutput, topk_ids), FIELD(kOutput, expert_offsets),
       FIELD(kOutput, sorted_slots), FIELD(kOutput, slot_rows)),
    OP(moe_sort, FIELD(kInput, topk_ids), FIELD(kInt32, num_experts), FIELD(kOutput, expert_offsets),
       FIELD(kOutput, sorted_slots), FIELD(kOutput, slot_rows)),
    OP(moe_permute, FIELD(kInput, hidden), FIELD(kInput, sorted_slots), FIELD(kInt32, top_k), FIELD(kOutput, rows)),
    OP(moe_combine, FIELD(kInput, rows), FIELD(kInput, slot_rows), FIELD(kInput, topk_weights), FIELD(kOutput, out)),
    OP(grouped_gemm, FIELD(kInput, a), FIELD(kInput, b), FIELD(kInput, expert_offsets), FIELD(kInput, a_rows),
       FIELD(kInt32, a_rows_divisor), FIELD(kOutput, out)),
    OP(grouped_gemm_swiglu, FIELD(kInput, a), FIELD(kInput, w_gate_up), FIELD(kInput, expert_offsets),
       FIELD(kInput, a_rows), FIELD(kInt32, a_rows_divisor), FIELD(kOutput, out)),
    OP(moe_experts, FIELD(kInput, hidden), FIELD(kInput, w_gate_up), FIELD(kInput, w_down), FIELD(kInput, topk_weights),
       FIELD(kInput, topk_ids), FIELD(kInput, expert_offsets), FIELD(kInput, sorted_slots), FIELD(kInput, slot_rows),
       FIELD(kOutput, out)),
    OP(sliding_window_attention, FIELD(kInput, q), FIELD(kInput, k), FIELD(kInput, v), FIELD(kInput, cu_seqlens_q),
       FIELD(kInput, cu_seqlens_k), FIELD(kInput, k_start), FIELD(kInput, k_length), FIELD(kInt64, max_seqlen_q),
       FIELD(kInt64, max_seqlen_k), FIELD(kNonzeroInt64, window), FIELD(kNonzeroDouble, softmax_scale), FIELD(kOutput, out),
       FIELD(kOutput, lse)),
    OP(rolling_attention, FIELD(kInput, q), FIELD(kInput, k), FIELD(kInput, v), FIELD(kOutput, k_cache),
       FIELD(kOutput, v_cache), FIELD(kInput, cu_seqlens_q), FIELD(kInput, cache_lengths), FIELD(kInput, cache_slots),
       FIELD(kInt64, max_seqlen_q), FIELD(kLength, max_cache_length), FIELD(kNonzeroInt64, window),
       FIELD(kNonzeroDouble, softmax_scale), FIELD(kNonzeroDouble, rope_theta), FIELD(kInt32, rope_interleaved),
       FIELD(kOutput, out), FIELD(kOutput, lse)),
    OP(apply_rope, FIELD(kOutput, q), FIELD(kOutput, k), FIELD(kInput, positions), FIELD(kDouble, theta),
       FIELD(kInt32, interleaved)),
};

[[noreturn]] void refuse(const Op &op, const char *name, const std::string &expected, const std::string &got) {
  throw py::value_error(std::string(op.name) + ": " + name + ": expected " + expected + ", got " + got);
}

std::string type_of(py::handle value) { return py::str(py::type::handle_of(value).attr("__name__")); }

// The DLPack code; bfloat16 is any dtype of that name (ml_dtypes has one) or its bits as uint16. What the argument does
// not take is refused by the C API, which knows what it does take.
int32_t dtype_code(const Op &op, const char *name, const py::dtype &dtype) {
  const char kind = dtype.kind();
  const ssize_t bytes = dtype.itemsize();
  const std::string text = py::str(dtype);
  if (!dtype.attr("isnative").cast<bool>()) refuse(op, name, "native byte order", "dtype " + text);
  if ((kind == 'u' && bytes == 2) || text == "bfloat16") return MIXTRAL_DTYPE_BF16;
  const char *const kinds = "iuf..cb", *const found = strchr(kinds, kind);  // at the place of their DLPack code
  if (kind == '.' || !found || bytes > 16) refuse(op, name, "numbers", "dtype " + text);
  return 1 << 16 | (int32_t)bytes << 11 | (int32_t)(found - kinds);
}

mixtral_tensor tensor(const Op &op, const Field &field, py::handle value) {
  if (!py::isinstance<py::array>(value))
    throw py::type_error(std::string(op.name) + ": " + field.name + ": expected a numpy array, got " + type_of(value));
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (array.ndim() < 1 || array.ndim() > 4) refuse(op, field.name, "1 to 4 dimensions", std::to_string(array.ndim()));
  if (field.kind == kOutput && !array.writeable()) refuse(op, field.name, "a writeable array", "a read-only one");
  mixtral_tensor t = {};
  t.dtype = dtype_code(op, field.name, array.dtype());
  t.data = const_cast<void *>(array.data());
  t.ndim = (int32_t)array.ndim();
  for (int i = 0; i < t.ndim; ++i) {
    if (array.strides(i) % array.itemsize()) refuse(op, field.name, "strides of whole elements", "fields of a structured array");
    t.shape[i] = array.shape(i);
    t.stride[i] = array.strides(i) / array.itemsize();
  }
  return t;
}

int64_t integer(const Op &op, const Field &field, py::handle value) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!index) {
    PyErr_Clear();
    throw py::type_error(std::string(op.name) + ": " + field.name + ": expected an integer, got " + type_of(value));
  }
  int overflow;
  const long long number = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow || (field.kind == kInt32 && number != (int32_t)number))
    refuse(op, field.name, field.kind == kInt32 ? "an integer of 32 bits" : "an integer of 64 bits", py::str(index));
  return number;
}

double real(const Op &op, const Field &field, py::handle value) {
  const double number = PyFloat_AsDouble(value.ptr());
  if (number == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw py::type_error(std::string(op.name) + ": " + field.name + ": expected a number, got " + type_of(value));
  }
  return number;
}

void fill(char *params, const Op &op, const Field &field, py::handle value) {
  char *at = params + field.offset;
  const auto put = [at](const auto &converted) { memcpy(at, &converted, sizeof converted); };
  if (field.kind == kInput || field.kind == kOutput) return put(tensor(op, field, value));
  if (field.kind == kInt32) return put((int32_t)integer(op, field, value));
  if (field.kind == kDouble || field.kind == kNonzeroDouble) {
    const double number = real(op, field, value);
    if (field.kind == kNonzeroDouble && number == 0) refuse(op, field.name, "None or a value other than 0", "0");
    return put(number);
  }
  const int64_t number = value.is_none() ? -1 : integer(op, field, value);
  if (field.kind == kNonzeroInt64 && number == 0) refuse(op, field.name, "None or a value other than 0", "0");
  if (field.kind == kLength && number < 0 && !value.is_none()) refuse(op, field.name, "None or a value of 0 or more", std::to_string(number));
  put(number);
}

// ------------------------------------------------------------------------------------------------------------- run

// Fields that are not given or None stay zero, which is "absent" for a tensor; a length that is None is -1.
void run(size_t number, const py::kwargs &values) {
  const Op &op = kOps[number];
  const auto params = std::make_unique<char[]>(op.params_size);  // zeroed
  memcpy(params.get(), &op.params_size, sizeof op.params_size);
  size_t used = 0;
  for (const Field &field : op.fields) {
    if (!values.contains(field.name)) continue;
    ++used;
    const py::object value = values[field.name];
    if (!value.is_none() || field.kind == kLength) fill(params.get(), op, field, value);
  }
  if (used != values.size()) throw py::type_error(std::string(op.name) + ": unknown field in " + std::string(py::str(values)));

  const std::shared_ptr<Engine> use = engine();
  std::string error;
  {
    py::gil_scoped_release release;
    const size_t bytes = op.workspace_size(use->context, params.get());
    const std::unique_ptr<char[]> workspace(bytes ? new char[bytes] : nullptr);  // uninitialised
    if (op.run(use->context, params.get(), workspace.get(), bytes, nullptr) != MIXTRAL_OK) error = mixtral_last_error();
  }
  if (!error.empty()) throw py::value_error(error);
}

}  // namespace

PYBIND11_MODULE(_numpy, m) {
  for (size_t i = 0; i < sizeof kOps / sizeof *kOps; ++i)
    m.def(kOps[i].name + strlen("mixtral_"), [i](const py::kwargs &values) { run(i, values); });
  m.def("version", mixtral_version);
  m.def("get_num_threads", [] { return engine()->pool.threads(); });
  m.def("set_num_threads", [](int threads) {
    if (threads < 1 || threads > 4096)
      throw py::value_error("set_num_threads: expected 1 to 4096, got " + std::to_string(threads));
    replace_engine(threads);
  });
}
