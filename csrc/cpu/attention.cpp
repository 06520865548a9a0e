// Splits attention into tasks, runs the kernel of the context's architecture on them, combines split keys.
//
// Workspace: [sequence descriptors | partial results of split sequences | kScratchSlots scratch areas]. A scratch area
// belongs to every kScratchSlots-th task, never to a thread. Few-rows tasks have theirs on the stack: it stays in the cache.
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

// A sequence's keys are split into spans of equal length (but the last). Few-rows tasks are bound by memory, and short
// spans let one sequence use all cores; for a block of rows the partial results (1 KB a row) limit the number.
struct Split {
  int64_t least_keys, most_spans;
};
constexpr Split kFewSplit = {256, 32}, kBlockSplit = {1024, 8};

int64_t span_keys(Split split, int64_t keys) { return max(split.least_keys, align(divide_up(keys, split.most_spans))); }
int64_t span_count(Split split, int64_t keys) { return max(1, divide_up(keys, span_keys(split, keys))); }

// Upper bounds over all values that the index arrays may have.
struct Sizes {
  int64_t slots, partial_floats;  // slots: scratch areas
};

Sizes sizes(const Problem &problem, const Bounds &bounds) {
  if (problem.key_heads == 0 || problem.group == 0) return {0, 0};
  const int64_t group = problem.group, longest = bounds.longest_queries;
  const auto keys = [&](int64_t queries) {
    return problem.window ? min(bounds.longest_keys, problem.window + queries - 1) : bounds.longest_keys;
  };
  const int64_t few_spans = min(kFewSplit.most_spans, max(1, divide_up(keys(1), kFewSplit.least_keys)));
  const int64_t block_spans = min(kBlockSplit.most_spans, max(1, divide_up(keys(min(longest, kBlockRows)), kBlockSplit.least_keys)));
  const bool few = group <= kFewGroup, blocks = !few || longest > 1;
  const int64_t sequences = min(bounds.sequences, bounds.queries);  // that have a query
  int64_t tasks = few ? sequences * few_spans : 0;
  Sizes s = {0, 0};
  if (few && few_spans > 1) s.partial_floats += sequences * group * few_spans;
  if (blocks) {
    tasks += bounds.queries * group / kBlockRows + sequences * block_spans;
    if (block_spans > 1) s.partial_floats += min(bounds.queries * group, sequences * kBlockRows) * block_spans;
  }
  if (blocks) s.slots = min(tasks * problem.key_heads, kScratchSlots);
  s.partial_floats *= problem.key_heads * partial_row(problem.head_dim);
  return s;
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
    case MIXTRAL_ARCH_CPU_AVX512: return task_avx512;
    case MIXTRAL_ARCH_CPU_AVX512_BF16: return task_avx512bf16;
    case MIXTRAL_ARCH_CPU_AMX: return task_amx;
#endif
    default: return task_portable;
  }
}

void combine_rows(const Problem &problem, const Sequence &s, int64_t key_head) {
  const int64_t group = problem.group, rows = s.queries * group, stride = partial_row(problem.head_dim);
  const float *partial = s.partial + key_head * rows * stride;
  const int64_t span = problem.key_heads * rows * stride;
  for (int64_t row = 0; row < rows; ++row) {
    float maximum = -INFINITY, weight = 0, sum[128] = {};
    for (int64_t i = 0; i < s.spans; ++i) {
      const float *part = partial + i * span + row * stride;
      maximum = part[problem.head_dim] > maximum ? part[problem.head_dim] : maximum;
    }
    for (int64_t i = 0; i < s.spans; ++i) {
      const float *part = partial + i * span + row * stride;
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
  const Sizes s = sizes(problem, bounds);
  return (size_t)(align(bounds.sequences * (int64_t)sizeof(Sequence)) + align(s.partial_floats * 4) +
                  s.slots * kScratchBytes);
}

Sequence *sequences(void *workspace) { return (Sequence *)workspace; }

void run(const mixtral_context &context, Problem &problem, const Bounds &bounds, void *workspace) {
  if (problem.key_heads == 0 || problem.group == 0) return;
  const int64_t group = problem.group;
  float *partial = (float *)((char *)workspace + align(bounds.sequences * (int64_t)sizeof(Sequence)));
  char *scratch = (char *)partial + align(sizes(problem, bounds).partial_floats * 4);

  // Spans and partial results. Key heads that lie side by side are one few-rows task, unless that leaves too few tasks.
  int64_t few_tasks = 0, few_heads = min(problem.key_heads, kFewRows / group);
  bool split = false;
  for (int64_t b = 0; b < problem.sequence_count; ++b) {
    Sequence &s = problem.sequences[b];
    const int64_t rows = s.queries * group;
    s.spans = 1;
    s.partial = partial;
    if (rows > 0 && rows <= kBlockRows) {
      int64_t begin, end;
      visible(problem, s, 0, s.queries - 1, &begin, &end);
      const Split rule = is_few(problem, s) ? kFewSplit : kBlockSplit;
      s.spans = span_count(rule, end - begin);
      s.span_keys = span_keys(rule, end - begin);
    }
    if (s.spans > 1) {
      partial += problem.key_heads * s.spans * rows * partial_row(problem.head_dim);
      split = true;
    }
    if (is_few(problem, s)) {
      few_tasks += s.spans;
      if (s.pieces[0].k_head > s.pieces[0].k_token) few_heads = 1;
    }
  }
  while (few_heads > 1 && few_tasks * divide_up(problem.key_heads, few_heads) < 16) few_heads = divide_up(few_heads, 2);

  int64_t tasks = 0;
  bool blocks = false;
  for (int64_t b = 0; b < problem.sequence_count; ++b) {
    Sequence &s = problem.sequences[b];
    s.first_task = tasks;
    blocks = blocks || (s.queries > 0 && !is_few(problem, s));
    const int64_t heads = is_few(problem, s) ? few_heads : 1;
    tasks += divide_up(problem.key_heads, heads) * divide_up(s.queries * group, kBlockRows) * s.spans;
  }

  void (*const kernel)(const Task &) = task_of(context.arch);
  const auto run_task = [&](int64_t index, char *area) {
    int64_t low = 0, high = problem.sequence_count;  // the last sequence that starts at or before the task
    while (high - low > 1) (problem.sequences[(low + high) / 2].first_task <= index ? low : high) = (low + high) / 2;
    const Sequence &s = problem.sequences[low];
    const int64_t rows = s.queries * group, blocks = divide_up(rows, kBlockRows), i = index - s.first_task;
    const int64_t heads = is_few(problem, s) ? few_heads : 1, key_head = i / (blocks * s.spans) * heads;
    const int64_t block = i / s.spans % blocks, span = i % s.spans;
    Task task{problem, s, key_head, min(problem.key_heads, key_head + heads), block * kBlockRows, min(rows, (block + 1) * kBlockRows),
              0, 0, nullptr, area};
    visible(problem, s, task.row_begin / group, (task.row_end - 1) / group, &task.key_begin, &task.key_end);
    if (s.spans > 1) {
      task.key_begin += span * s.span_keys;
      task.key_end = min(task.key_end, task.key_begin + s.span_keys);
      task.partial = s.partial + span * problem.key_heads * rows * partial_row(problem.head_dim);
    }
    kernel(task);
  };
  const int64_t slots = min(tasks, kScratchSlots);
  if (blocks)
    parallel_for(context, slots, [&](int64_t slot) {
      for (int64_t i = slot; i < tasks; i += slots) run_task(i, scratch + slot * kScratchBytes);
    });
  else
    parallel_for(context, tasks, [&](int64_t i) { run_task(i, nullptr); });
  if (split)
    parallel_for(context, problem.sequence_count * problem.key_heads, [&](int64_t i) {
      const Sequence &s = problem.sequences[i / problem.key_heads];
      if (s.spans > 1) combine_rows(problem, s, i % problem.key_heads);
    });
}

}  // namespace mixtral::cpu::attention
