/* The C API from C99: `test_c_api [values|errors|context|threads]` prints what is wrong and returns the number of faults. */
#define _POSIX_C_SOURCE 200809L
#include "cases.h"
#include <pthread.h>

/* Two threads take tasks from both ends, so they run in no particular order. */
typedef struct {
  mixtral_task task;
  void *task_data;
  int64_t low, high;
  pthread_mutex_t lock;
} job;

static void *take_from_top(void *data) {
  job *j = data;
  for (;;) {
    int64_t index;
    pthread_mutex_lock(&j->lock);
    index = j->low < j->high ? --j->high : -1;
    pthread_mutex_unlock(&j->lock);
    if (index < 0) return NULL;
    j->task(j->task_data, index);
  }
}

static void two_threads(void *pool, int64_t count, mixtral_task task, void *task_data) {
  job j = {task, task_data, 0, count, PTHREAD_MUTEX_INITIALIZER};
  pthread_t other;
  if (pthread_create(&other, NULL, take_from_top, &j)) abort();
  for (;;) {
    int64_t index;
    pthread_mutex_lock(&j.lock);
    index = j.low < j.high ? j.low++ : -1;
    pthread_mutex_unlock(&j.lock);
    if (index < 0) break;
    task(task_data, index);
  }
  pthread_join(other, NULL);
  pthread_mutex_lock(pool); /* the pool is what the context was given */
  pthread_mutex_unlock(pool);
}

/* ------------------------------------------------------------------------------------------- context, version, errors */

static void expect_no_context(const char *what, const mixtral_context_options *options, mixtral_status status, const char *message) {
  mixtral_context *context = (mixtral_context *)&failures; /* set to NULL by a call that fails */
  const mixtral_status result = mixtral_context_create(options, &context);
  EXPECT(result == status, "%s: status %d, expected %d (%s)", what, (int)result, (int)status, mixtral_last_error());
  EXPECT(context == NULL, "%s: a context was made", what);
  EXPECT(strstr(mixtral_last_error(), message) != NULL, "%s: message \"%s\" lacks \"%s\"", what, mixtral_last_error(), message);
}

static void do_nothing(void *pool, int64_t count, mixtral_task task, void *task_data) {
  (void)pool, (void)count, (void)task, (void)task_data;
}

static void test_context(void) {
  const mixtral_context_options good = {sizeof good, MIXTRAL_DEVICE_CPU, 0, MIXTRAL_ARCH_AUTO, 0, NULL, NULL};
  mixtral_context_options options;
  mixtral_context *context;
  const char *first_error;
  int i, arch;
  EXPECT(!strcmp(mixtral_last_error(), ""), "last error before any: \"%s\"", mixtral_last_error());
  EXPECT(mixtral_version() == MIXTRAL_VERSION_MAJOR * 10000 + MIXTRAL_VERSION_MINOR * 100 + MIXTRAL_VERSION_PATCH, "version %d", mixtral_version());

  EXPECT(mixtral_context_create(&good, NULL) == MIXTRAL_ERROR_INVALID_ARGUMENT, "context pointer NULL was accepted");
  EXPECT(strstr(mixtral_last_error(), "context: expected a pointer, got NULL") != NULL, "%s", mixtral_last_error());
  expect_no_context("options NULL", NULL, MIXTRAL_ERROR_INVALID_ARGUMENT, "options: expected options, got NULL");
#define WITH(change, status, message) (options = good, change, expect_no_context(#change, &options, status, message))
  WITH(options.struct_size = 8, MIXTRAL_ERROR_INVALID_ARGUMENT, "struct_size: expected 40");
  WITH(options.device_type = 0, MIXTRAL_ERROR_INVALID_ARGUMENT, "device_type: expected 1 (CPU) or 2 (CUDA), got 0");
  WITH(options.device_type = 4, MIXTRAL_ERROR_INVALID_ARGUMENT, "device_type: expected 1 (CPU) or 2 (CUDA), got 4");
  WITH(options.device_index = 1, MIXTRAL_ERROR_INVALID_ARGUMENT, "device_index: expected 0 for the CPU, got 1");
  WITH(options.device_index = -1, MIXTRAL_ERROR_INVALID_ARGUMENT, "device_index: expected 0 for the CPU, got -1");
  WITH(options.arch = -1, MIXTRAL_ERROR_INVALID_ARGUMENT, "arch: expected a CPU architecture, got -1");
  WITH(options.arch = 6, MIXTRAL_ERROR_INVALID_ARGUMENT, "arch: expected a CPU architecture, got 6");
  WITH(options.arch = MIXTRAL_ARCH_CUDA_SM80, MIXTRAL_ERROR_INVALID_ARGUMENT, "arch: expected a CPU architecture, got 80");
  WITH(options.reserved = 1, MIXTRAL_ERROR_INVALID_ARGUMENT, "reserved: expected 0, got 1");

  for (arch = MIXTRAL_ARCH_CPU_PORTABLE; arch <= MIXTRAL_ARCH_CPU_AMX; ++arch) {
    mixtral_status status;
    options = good;
    options.arch = arch;
    status = mixtral_context_create(&options, &context);
    if (status == MIXTRAL_OK)
      EXPECT((int)mixtral_context_arch(context) == arch, "asked for arch %d, got %d", arch, (int)mixtral_context_arch(context));
    else
      EXPECT(status == MIXTRAL_ERROR_NOT_SUPPORTED && arch > 1 && strstr(mixtral_last_error(), "arch"), "arch %d: %s", arch, mixtral_last_error());
    mixtral_context_destroy(context);
  }

  /* A CUDA context: this program has no device array, so it only asks for a clean answer. */
  options = good;
  options.device_type = MIXTRAL_DEVICE_CUDA;
  switch (mixtral_context_create(&options, &context)) {
    case MIXTRAL_OK:
      EXPECT(mixtral_context_arch(context) >= MIXTRAL_ARCH_CUDA_SM80, "CUDA context of arch %d", (int)mixtral_context_arch(context));
      mixtral_context_destroy(context);
      options.parallel_for = do_nothing;
      expect_no_context("parallel_for on CUDA", &options, MIXTRAL_ERROR_INVALID_ARGUMENT, "parallel_for: expected NULL for CUDA");
      break;
    case MIXTRAL_ERROR_NOT_SUPPORTED: /* built without CUDA */
    case MIXTRAL_ERROR_CUDA:          /* no driver or no device */
      EXPECT(context == NULL && strstr(mixtral_last_error(), "mixtral_context_create: ") == mixtral_last_error(), "%s", mixtral_last_error());
      break;
    default: EXPECT(0, "CUDA context: %s", mixtral_last_error());
  }

  EXPECT(mixtral_context_arch(NULL) == MIXTRAL_ARCH_AUTO, "arch of NULL");
  mixtral_context_destroy(NULL);

  context = cpu_context(NULL, NULL);
  EXPECT(mixtral_context_arch(context) != MIXTRAL_ARCH_AUTO, "a live context has arch AUTO");
  for (i = MIXTRAL_OP_MOE_GATE; i <= MIXTRAL_OP_APPLY_ROPE; ++i)
    EXPECT(mixtral_supports(context, (mixtral_op)i, NULL) == MIXTRAL_OK, "op %d: %s", i, mixtral_last_error());
  for (i = 0; i < OP_CASES; ++i) {
    mixtral_rolling_attention_params largest;
    op_cases[i].make(&largest);
    EXPECT(mixtral_supports(context, op_cases[i].op, &largest) == MIXTRAL_OK, "%s: %s", op_cases[i].label, mixtral_last_error());
  }
  first_error = mixtral_last_error();
  EXPECT(mixtral_supports(context, (mixtral_op)0, NULL) == MIXTRAL_ERROR_INVALID_ARGUMENT && strstr(first_error, "op: expected 1 to 10, got 0"), "op 0: %s", first_error);
  EXPECT(mixtral_supports(context, (mixtral_op)11, NULL) == MIXTRAL_ERROR_INVALID_ARGUMENT && strstr(first_error, "got 11"), "op 11: %s", first_error);
  EXPECT(mixtral_supports(NULL, MIXTRAL_OP_MOE_GATE, NULL) == MIXTRAL_ERROR_INVALID_ARGUMENT && strstr(first_error, "context: expected a context, got NULL"), "NULL: %s", first_error);
  mixtral_context_destroy(context);
}

/* ----------------------------------------------------------------------------------------------------------- threads */

typedef struct {
  const mixtral_context *context;
  mixtral_moe_experts_params experts; /* its own output; the inputs are shared */
  mixtral_sliding_window_attention_params attention;
  float out[T * H], attended[TQ * HQ * D], lse[HQ * TQ];
  char error[512];
} caller;

static void *call_many_times(void *data) {
  caller *me = data;
  mixtral_moe_gate_params bad = {0};
  int i;
  snprintf(me->error, sizeof me->error, "%s", mixtral_last_error());
  if (me->error[0]) return NULL; /* another thread's message: the caller reports it */
  me->experts.out.data = me->out;
  me->attention.out.data = me->attended;
  me->attention.lse.data = me->lse;
  for (i = 0; i < 50; ++i) {
    memset(me->out, 0x7f, sizeof me->out);
    memset(me->attended, 0x7f, sizeof me->attended);
    if (run_case(find_case("moe_experts"), me->context, &me->experts) != MIXTRAL_OK ||
        run_case(find_case("attention_packed"), me->context, &me->attention) != MIXTRAL_OK)
      return NULL;
  }
  bad.struct_size = (size_t)(me->context == NULL ? 0 : 7);
  mixtral_moe_gate(me->context, &bad, NULL, 0, NULL);
  return me;
}

static void test_threads(void) {
  static caller callers[3];
  static unsigned char inputs[sizeof arena]; /* the second make() overwrites what the first made */
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  mixtral_context *shared = cpu_context(two_threads, &lock), *serial = cpu_context(NULL, NULL);
  mixtral_moe_experts_params experts;
  pthread_t threads[2];
  void *result;
  int i;
  find_case("moe_experts")->make(&experts);
  memcpy(inputs, arena, sizeof arena);
#define MOVE(field) (experts.field.data = inputs + ((unsigned char *)experts.field.data - arena))
  MOVE(hidden), MOVE(w_gate_up), MOVE(w_down), MOVE(topk_weights), MOVE(topk_ids), MOVE(expert_offsets), MOVE(sorted_slots), MOVE(slot_rows);
  for (i = 0; i < 3; ++i) {
    callers[i].context = i < 2 ? shared : serial;
    callers[i].experts = experts;
    find_case("attention_packed")->make(&callers[i].attention);
  }
  EXPECT(mixtral_context_create(NULL, NULL) == MIXTRAL_ERROR_INVALID_ARGUMENT, "no error to keep apart");
  for (i = 0; i < 2; ++i)
    if (pthread_create(&threads[i], NULL, call_many_times, &callers[i])) abort();
  for (i = 0; i < 2; ++i) {
    pthread_join(threads[i], &result);
    EXPECT(result != NULL, "a call in thread %d failed, or it saw another thread's error: \"%s\"", i, callers[i].error);
  }
  EXPECT(strstr(mixtral_last_error(), "mixtral_context_create") != NULL, "another thread's error came here: %s", mixtral_last_error());
  callers[2].experts.out.data = callers[2].out;
  callers[2].attention.out.data = callers[2].attended;
  callers[2].attention.lse.data = callers[2].lse;
  memset(callers[2].attended, 0x7f, sizeof callers[2].attended);
  EXPECT(run_case(find_case("moe_experts"), serial, &callers[2].experts) == MIXTRAL_OK, "%s", mixtral_last_error());
  EXPECT(run_case(find_case("attention_packed"), serial, &callers[2].attention) == MIXTRAL_OK, "%s", mixtral_last_error());
  for (i = 0; i < 2; ++i) {
    EXPECT(!memcmp(callers[i].out, callers[2].out, sizeof callers[2].out), "moe_experts: thread %d differs from the serial result", i);
    EXPECT(!memcmp(callers[i].attended, callers[2].attended, sizeof callers[2].attended), "attention: thread %d differs from the serial result", i);
    EXPECT(!memcmp(callers[i].lse, callers[2].lse, sizeof callers[2].lse), "lse: thread %d differs from the serial result", i);
  }
  mixtral_context_destroy(shared);
  mixtral_context_destroy(serial);
}

int main(int argc, char **argv) {
  const char *part = argc > 1 ? argv[1] : "";
  if (!strcmp(part, "context")) {
    test_context();
  } else if (!strcmp(part, "threads")) {
    test_threads();
  } else if (!strcmp(part, "values") || !strcmp(part, "errors")) {
    int arch;
    for (arch = MIXTRAL_ARCH_CPU_PORTABLE; arch <= MIXTRAL_ARCH_CPU_AMX; ++arch) { /* those this machine has */
      mixtral_context_options options = {sizeof options, MIXTRAL_DEVICE_CPU, 0, arch, 0, NULL, NULL};
      mixtral_context *context;
      if (mixtral_context_create(&options, &context) != MIXTRAL_OK) continue;
      if (part[0] == 'v') {
        test_routing_and_gemm_values(context);
        test_attention_values(context);
      } else {
        test_bad_arguments(context);
      }
      mixtral_context_destroy(context);
    }
  } else {
    fprintf(stderr, "usage: %s values|errors|context|threads\n", argv[0]);
    return 2;
  }
  return failures > 100 ? 100 : failures;
}
