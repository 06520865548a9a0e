// What sliding_window_attention and rolling_attention share: the description of the work, and the kernels that do it.
//
// A row is one (query token, query head); the Hq/Hk heads of a key head's group are packed into rows, row = token * group
// + head, so a key is read once for the whole group. A task is either (sequence, key head, block of kBlockRows rows) or,
// for a sequence of a single query with a small group, (sequence, some key heads). Sequences with at most one block of rows
// split their keys into spans, by a rule that looks at their own lengths alone; spans leave partial results in the
// workspace, and a second pass combines them.
#pragma once
#include "../core/context.h"

namespace mixtral::cpu::attention {

constexpr int64_t kBlockRows = 192;    // a multiple of every kernel's row panel
constexpr int64_t kFewGroup = 8;       // largest group of a few-rows task
constexpr int64_t kFewRows = 48;       // rows of all its key heads
constexpr int64_t kScratchSlots = 64;  // blocks of rows that can have scratch at a time
constexpr int64_t kScratchBytes = 352 * 1024;

// Consecutive key positions that are evenly spaced in memory: position p lies p - begin tokens after k and v.
struct Piece {
  int64_t begin, end;
  const char *k, *v;          // key head 0
  int64_t k_token, v_token;   // bytes between tokens
  int64_t k_head, v_head;     // bytes between key heads
};

struct Sequence {
  int64_t queries;    // tokens
  int64_t position;   // key position of query 0; negative for queries before the first key
  const char *q;      // query 0, head 0
  char *out;
  float *lse;         // may be nullptr
  Piece pieces[3];    // ascending positions; unused ones are empty
  // Filled by run().
  int64_t first_task, spans, span_keys;
  float *partial;     // [spans][Hk][rows][partial_row]
};

struct Problem {
  int32_t dtype;
  int64_t head_dim, query_heads, key_heads, group;  // group = query_heads / key_heads
  int64_t window;     // 0: all keys up to the query's own
  float scale;        // softmax_scale * log2(e): scores are powers of two
  int64_t q_token, q_head, out_token, out_head;  // bytes
  int64_t lse_head;   // floats
  int64_t sequence_count;
  Sequence *sequences;
};

struct Task {
  const Problem &problem;
  const Sequence &sequence;
  int64_t key_head, key_head_end;  // one, except for a few-rows task
  int64_t row_begin, row_end;      // of one key head
  int64_t key_begin, key_end;      // the union of what the rows see, or a span of it
  float *partial;  // nullptr: write out and lse; else [Hk][rows of the sequence] of D sums, maximum score, total weight
  char *scratch;   // kScratchBytes, 64-byte aligned; not for a few-rows task, may be nullptr there
};

// What scores are multiplied by, so that weights are powers of two; 0 selects 1/sqrt(D).
float log2_scale(double softmax_scale, int64_t head_dim);
// Checks a cu_seqlens array: first 0, not decreasing, last <= tokens, no sequence longer than `longest` (0: any).
mixtral_status check_bounds(const char *op, const char *name, const mixtral_tensor &bounds, int64_t tokens, int64_t longest);

static inline bool is_few(const Problem &problem, const Sequence &s) { return s.queries == 1 && problem.group <= kFewGroup; }
static inline bool is_bf16_block(const Task &t) { return t.problem.dtype == MIXTRAL_DTYPE_BF16 && !is_few(t.problem, t.sequence); }
// Floats of a partial row.
static inline int64_t partial_row(int64_t head_dim) { return head_dim + 2; }

// Bounds that hold for every sequence, for the workspace.
struct Bounds {
  int64_t sequences, queries;             // queries of all sequences
  int64_t longest_queries, longest_keys;  // of one sequence
};
size_t workspace_size(const Problem &problem, const Bounds &bounds);
// The place of the `bounds.sequences` descriptors, which the op fills before run().
Sequence *sequences(void *workspace);
void run(const mixtral_context &context, Problem &problem, const Bounds &bounds, void *workspace);

// One task, any dtype and head dim of the header. Copies of attention_kernel.inc; the last two of attention_bf16.inc for
// blocks of bf16 rows.
void task_portable(const Task &task);
void task_avx2(const Task &task);
void task_avx512(const Task &task);
void task_avx512bf16(const Task &task);
void task_amx(const Task &task);

}  // namespace mixtral::cpu::attention
