// Splits attention into tasks, runs the kernel of the context's architecture on them, combines split keys.
//
// Workspace: [sequence descriptors | partial results of split sequences | kScratchSlots scratch areas]. A scratch area
// belongs to every kScratchSlots-th task, never to a thread.
#include "attention.h"

#include <cmath>

#include "../core/error.h"
#include "element.h"

namespace mixtral::cpu::attention {
namespace {

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align(int64_t bytes) { return divide_up(bytes, 64) * 64; }

// Spans of equal length (but the last) that `keys` are split into: a function of the length alone.
int64_t span_keys(int64_t keys) { return max(kSpanKeys, align(divide_up(keys, kMaxSpans))); }
int64_t span_count(int64_t keys) { return max(1, divide_up(keys, span_keys(keys))); }

int64_t max_partial_floats(const Problem &problem, const Bounds &bounds) {
  if (problem.key_heads == 0) return 0;
  const int64_t rows = min(bounds.queries * problem.group, bounds.sequences * kBlockRows) * problem.key_heads;
  int64_t keys = bounds.keys;
  if (problem.window) keys = min(keys, problem.window + min(bounds.rows_queries, kBlockRows) - 1);
  const int64_t spans = min(kMaxSpans, divide_up(keys, kSpanKeys));
  return spans > 1 ? rows * spans * partial_row(problem.head_dim) : 0;
}

int64_t max_tasks(const Problem &problem, const Bounds &bounds) {
  if (problem.key_heads == 0) return 0;
  const int64_t blocks = bounds.queries * problem.group / kBlockRows + bounds.sequences;
  const int64_t spans = min(kMaxSpans, max(1, divide_up(bounds.keys, kSpanKeys)));
  return problem.key_heads * blocks * spans;
}

// Keys that some query of [first, last] sees.
void visible(const Problem &problem, const Sequence &s, int64_t first, int64_t last, int64_t *begin, int64_t *end) {
  *begin = problem.window ? max(0, s.position + first - problem.window + 1) : 0;
  *end = max(*begin, s.position + last + 1);
}

void (*task_of(mixtral_arch arch))(const Task &) {
  switch (arch) {
#if defined(__x86_64__)
    case MIXTRAL_ARCH_CPU_AVX2: return task_avx2;
    case MIXTRAL_ARCH_CPU_AVX512:
    case MIXTRAL_ARCH_CPU_AVX512_BF16: return task_avx512;
    case MIXTRAL_ARCH_CPU_AMX: return task_avx512;
#endif
    default: return task_portable;
  }
}

void combine_rows(const Problem &problem, const Sequence &s, int64_t key_head) {
  const int64_t group = problem.group, rows = s.queries * group, stride = partial_row(problem.head_dim);
  const float *partial = s.partial + key_head * s.spans * rows * stride;
  for (int64_t row = 0; row < rows; ++row) {
    float maximum = -INFINITY, weight = 0, sum[128] = {};
    for (int64_t i = 0; i < s.spans; ++i) {
      const float *part = partial + (i * rows + row) * stride;
      maximum = part[problem.head_dim] > maximum ? part[problem.head_dim] : maximum;
    }
    for (int64_t i = 0; i < s.spans; ++i) {
      const float *part = partial + (i * rows + row) * stride;
      if (part[problem.head_dim + 1] == 0) continue;  // saw no key
      const float factor = std::exp2(part[problem.head_dim] - maximum);
      weight += factor * part[problem.head_dim + 1];
      for (int64_t d = 0; d < problem.head_dim; ++d) sum[d] += factor * part[d];
    }
    const int64_t token = row / group, head = key_head * group + row % group;
    const float scale = weight == 0 ? 0 : 1 / weight;
    with_float_type(problem.dtype, [&](auto type) {
      auto *out = (decltype(type) *)(s.out + token * problem.out_token + head * problem.out_head);
      for (int64_t d = 0; d < problem.head_dim; ++d) from_float(sum[d] * scale, out[d]);
    });
    if (s.lse) s.lse[head * problem.lse_head + token] = (float)((maximum + std::log2((double)weight)) * M_LN2);
  }
}

}  // namespace

float log2_scale(double softmax_scale, int64_t head_dim) {
  return (float)((softmax_scale != 0 ? softmax_scale : 1 / std::sqrt((double)head_dim)) * M_LOG2E);
}

mixtral_status check_bounds(const char *op, const char *name, const mixtral_tensor &bounds, int64_t tokens, int64_t longest) {
  const int32_t *b = (const int32_t *)bounds.data;
  const int64_t last = bounds.shape[0] - 1;
  if (b[0] != 0)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: %s: expected 0 at [0], got %d", op, name, b[0]);
  for (int64_t i = 1; i <= last; ++i) {
    if (b[i] < b[i - 1])
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: %s: expected values that do not decrease, got %d after %d at [%lld]", op, name,
                  b[i], b[i - 1], (long long)i);
    if (longest && b[i] - b[i - 1] > longest)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: %s: expected sequences of at most %lld tokens, got %d at [%lld]", op, name,
                  (long long)longest, b[i] - b[i - 1], (long long)(i - 1));
  }
  if (b[last] > tokens)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "%s: %s: expected at most %lld (tokens) at the end, got %d", op, name,
                (long long)tokens, b[last]);
  return MIXTRAL_OK;
}

size_t workspace_size(const Problem &problem, const Bounds &bounds) {
  return (size_t)(align(bounds.sequences * (int64_t)sizeof(Sequence)) + align(max_partial_floats(problem, bounds) * 4) +
                  min(max_tasks(problem, bounds), kScratchSlots) * kScratchBytes);
}

Sequence *sequences(void *workspace) { return (Sequence *)workspace; }

void run(const mixtral_context &context, Problem &problem, const Bounds &bounds, void *workspace) {
  if (problem.key_heads == 0 || problem.query_heads == 0) return;
  const int64_t group = problem.group;
  float *partial = (float *)((char *)workspace + align(bounds.sequences * (int64_t)sizeof(Sequence)));
  char *scratch = (char *)partial + align(max_partial_floats(problem, bounds) * 4);

  int64_t tasks = 0;
  bool split = false;
  for (int64_t b = 0; b < problem.sequence_count; ++b) {
    Sequence &s = problem.sequences[b];
    const int64_t rows = s.queries * group, blocks = divide_up(rows, kBlockRows);
    s.first_task = tasks;
    s.spans = 1;
    s.partial = partial;
    if (blocks == 1) {
      int64_t begin, end;
      visible(problem, s, 0, s.queries - 1, &begin, &end);
      s.spans = span_count(end - begin);
    }
    if (s.spans > 1) {
      partial += problem.key_heads * s.spans * rows * partial_row(problem.head_dim);
      split = true;
    }
    tasks += problem.key_heads * blocks * s.spans;
  }

  void (*const kernel)(const Task &) = task_of(context.arch);
  const auto run_task = [&](int64_t index, char *area) {
    int64_t low = 0, high = problem.sequence_count;  // the last sequence that starts at or before the task
    while (high - low > 1) (problem.sequences[(low + high) / 2].first_task <= index ? low : high) = (low + high) / 2;
    const Sequence &s = problem.sequences[low];
    const int64_t rows = s.queries * group, blocks = divide_up(rows, kBlockRows), i = index - s.first_task;
    const int64_t key_head = i / (blocks * s.spans), block = i / s.spans % blocks, span = i % s.spans;
    Task task{problem, s, key_head, block * kBlockRows, min(rows, (block + 1) * kBlockRows), 0, 0, nullptr, area};
    visible(problem, s, task.row_begin / group, (task.row_end - 1) / group, &task.key_begin, &task.key_end);
    if (s.spans > 1) {
      const int64_t length = span_keys(task.key_end - task.key_begin);
      task.key_begin += span * length;
      task.key_end = min(task.key_end, task.key_begin + length);
      task.partial = s.partial + (key_head * s.spans + span) * rows * partial_row(problem.head_dim);
    }
    kernel(task);
  };
  const int64_t slots = min(tasks, kScratchSlots);
  parallel_for(context, slots, [&](int64_t slot) {
    for (int64_t i = slot; i < tasks; i += slots) run_task(i, scratch + slot * kScratchBytes);
  });
  if (split)
    parallel_for(context, problem.sequence_count * problem.key_heads, [&](int64_t i) {
      const Sequence &s = problem.sequences[i / problem.key_heads];
      if (s.spans > 1) combine_rows(problem, s, i % problem.key_heads);
    });
}

}  // namespace mixtral::cpu::attention
