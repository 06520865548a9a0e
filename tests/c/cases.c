/* One valid call of every op, and the table of its arguments. */
#include "cases.h"

int failures;
unsigned char arena[1 << 18];
static size_t used;
static uint32_t seed;

void arena_reset(void) {
  memset(arena, 0x7f, sizeof arena); /* a huge float and a huge integer */
  used = 0;
  seed = 1;
}

mixtral_tensor array(int32_t dtype, int ndim, int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
  mixtral_tensor t = {NULL, dtype, ndim, {0, 0, 0, 0}, {0, 0, 0, 0}};
  int64_t count = 1;
  int i;
  t.shape[0] = d0, t.shape[1] = d1, t.shape[2] = d2, t.shape[3] = d3;
  for (i = ndim - 1; i >= 0; count *= t.shape[i--]) t.stride[i] = count;
  t.data = arena + (64 - (uintptr_t)arena % 64) % 64 + used;
  used += ((size_t)count * (size_t)(dtype >> 8 & 0xff) / 8 + 63) / 64 * 64;
  if (used > sizeof arena - 64) abort();
  return t;
}

mixtral_tensor numbers(int ndim, int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
  mixtral_tensor t = array(F32, ndim, d0, d1, d2, d3);
  int64_t i, count = t.shape[0] * t.stride[0];
  for (i = 0; i < count; ++i) {
    seed = seed * 1664525u + 1013904223u;
    ((float *)t.data)[i] = (float)(seed >> 8) / (1 << 23) - 1;
  }
  return t;
}

mixtral_tensor integers(int64_t count, const int32_t *values) {
  mixtral_tensor t = array(I32, 1, count, 0, 0, 0);
  memcpy(t.data, values, (size_t)count * sizeof *values);
  return t;
}

mixtral_context *cpu_context(mixtral_parallel_for parallel_for, void *pool) {
  mixtral_context_options options = {0};
  mixtral_context *context = NULL;
  options.struct_size = sizeof options;
  options.device_type = MIXTRAL_DEVICE_CPU;
  options.parallel_for = parallel_for;
  options.pool = pool;
  if (mixtral_context_create(&options, &context) != MIXTRAL_OK) {
    fprintf(stderr, "%s\n", mixtral_last_error());
    exit(1);
  }
  return context;
}

/* ------------------------------------------------------------------------------------------------------ valid calls */

static const int32_t kIds[T][K] = {{2, 0}, {0, 3}, {-1, 2}, {2, 0}, {3, 4}}; /* -1 and 4 are skip markers */
static const int32_t kOffsets[E + 1] = {0, 3, 3, 6, 8};
static const int32_t kSlots[S] = {1, 2, 7, 0, 5, 6, 3, 8, -1, -1};
static const int32_t kRows[T][K] = {{3, 0}, {1, 6}, {-1, 4}, {5, 2}, {7, -1}};

static mixtral_tensor matrix_of(const int32_t values[T][K]) {
  mixtral_tensor t = integers(S, &values[0][0]);
  t.ndim = 2, t.shape[0] = T, t.shape[1] = K, t.stride[0] = K, t.stride[1] = 1;
  return t;
}

#define MAKE(name, op)                                  \
  static void make_##name(void *params) {               \
    mixtral_##op##_params *p = params;                  \
    memset(p, 0, sizeof *p);                            \
    p->struct_size = sizeof *p;                         \
    arena_reset();                                      \
    fill_##name(p);                                     \
  }

static void fill_moe_gate(mixtral_moe_gate_params *p) {
  p->router_logits = numbers(2, T, E, 0, 0);
  p->top_k = K;
  p->renormalize = 1;
  p->topk_weights = array(F32, 2, T, K, 0, 0);
  p->topk_ids = array(I32, 2, T, K, 0, 0);
  p->expert_offsets = array(I32, 1, E + 1, 0, 0, 0);
  p->sorted_slots = array(I32, 1, S, 0, 0, 0);
  p->slot_rows = array(I32, 2, T, K, 0, 0);
}
MAKE(moe_gate, moe_gate)

static void fill_moe_sort(mixtral_moe_sort_params *p) {
  p->topk_ids = matrix_of(kIds);
  p->num_experts = E;
  p->expert_offsets = array(I32, 1, E + 1, 0, 0, 0);
  p->sorted_slots = array(I32, 1, S, 0, 0, 0);
  p->slot_rows = array(I32, 2, T, K, 0, 0);
}
MAKE(moe_sort, moe_sort)

static void fill_moe_permute(mixtral_moe_permute_params *p) {
  p->hidden = numbers(2, T, H, 0, 0);
  p->sorted_slots = integers(S, kSlots);
  p->top_k = K;
  p->rows = array(F32, 2, S, H, 0, 0);
}
MAKE(moe_permute, moe_permute)

static void fill_moe_combine(mixtral_moe_combine_params *p) {
  p->rows = numbers(2, S, H, 0, 0);
  p->slot_rows = matrix_of(kRows);
  p->topk_weights = numbers(2, T, K, 0, 0);
  p->out = array(F32, 2, T, H, 0, 0);
}
MAKE(moe_combine, moe_combine)

static void fill_grouped_gemm(mixtral_grouped_gemm_params *p) { /* tokens gathered inside the product */
  p->a = numbers(2, T, H, 0, 0);
  p->b = numbers(3, E, I, H, 0);
  p->expert_offsets = integers(E + 1, kOffsets);
  p->a_rows = integers(S, kSlots);
  p->a_rows_divisor = K;
  p->out = array(F32, 2, S, I, 0, 0);
}
MAKE(grouped_gemm, grouped_gemm)

static void fill_grouped_gemm_swiglu(mixtral_grouped_gemm_swiglu_params *p) {
  p->a = numbers(2, T, H, 0, 0);
  p->w_gate_up = numbers(3, E, 2 * I, H, 0);
  p->expert_offsets = integers(E + 1, kOffsets);
  p->a_rows = integers(S, kSlots);
  p->a_rows_divisor = K;
  p->out = array(F32, 2, S, I, 0, 0);
}
MAKE(grouped_gemm_swiglu, grouped_gemm_swiglu)

static void fill_moe_experts(mixtral_moe_experts_params *p) { /* with the maps: topk_ids is not read */
  p->hidden = numbers(2, T, H, 0, 0);
  p->w_gate_up = numbers(3, E, 2 * I, H, 0);
  p->w_down = numbers(3, E, H, I, 0);
  p->topk_weights = numbers(2, T, K, 0, 0);
  p->topk_ids = array(I32, 2, T, K, 0, 0);
  p->expert_offsets = integers(E + 1, kOffsets);
  p->sorted_slots = integers(S, kSlots);
  p->slot_rows = matrix_of(kRows);
  p->out = array(F32, 2, T, H, 0, 0);
}
MAKE(moe_experts, moe_experts)

static void fill_moe_experts_sorting(mixtral_moe_experts_params *p) { /* without: the call sorts */
  fill_moe_experts(p);
  p->topk_ids = matrix_of(kIds);
  memset(&p->expert_offsets, 0, sizeof p->expert_offsets);
  memset(&p->sorted_slots, 0, sizeof p->sorted_slots);
  memset(&p->slot_rows, 0, sizeof p->slot_rows);
}
MAKE(moe_experts_sorting, moe_experts)

static void fill_attention_packed(mixtral_sliding_window_attention_params *p) {
  static const int32_t queries[PACKED_B + 1] = {0, 3, 3, 7}, keys[PACKED_B + 1] = {0, 5, 7, 10}; /* query 7, key 10: nobody's */
  p->q = numbers(3, TQ, HQ, D, 0);
  p->k = numbers(3, TK, HK, D, 0);
  p->v = numbers(3, TK, HK, D, 0);
  p->cu_seqlens_q = integers(PACKED_B + 1, queries);
  p->cu_seqlens_k = integers(PACKED_B + 1, keys);
  p->max_seqlen_q = 4;
  p->max_seqlen_k = 5;
  p->window = W;
  p->out = array(F32, 3, TQ, HQ, D, 0);
  p->lse = array(F32, 2, HQ, TQ, 0, 0);
}
MAKE(attention_packed, sliding_window_attention)

static void fill_attention_batched(mixtral_sliding_window_attention_params *p) {
  static const int32_t start[B] = {0, 2}, length[B] = {5, 4};
  p->q = numbers(4, B, SQ, HQ, D);
  p->k = numbers(4, B, SK, HK, D);
  p->v = numbers(4, B, SK, HK, D);
  p->k_start = integers(B, start);
  p->k_length = integers(B, length);
  p->window = W;
  p->softmax_scale = 0.25;
  p->out = array(F32, 4, B, SQ, HQ, D);
  p->lse = array(F32, 3, B, HQ, SQ, 0);
}
MAKE(attention_batched, sliding_window_attention)

static void fill_rolling_attention(mixtral_rolling_attention_params *p) {
  static const int32_t bounds[B + 1] = {0, 3, 5}, lengths[B] = {10, 2}, slots[B] = {2, 0}; /* query 5: nobody's */
  p->q = numbers(3, NEW, HQ, D, 0);
  p->k = numbers(3, NEW, HK, D, 0);
  p->v = numbers(3, NEW, HK, D, 0);
  p->k_cache = numbers(4, SLOTS, C, HK, D);
  p->v_cache = numbers(4, SLOTS, C, HK, D);
  p->cu_seqlens_q = integers(B + 1, bounds);
  p->cache_lengths = integers(B, lengths);
  p->cache_slots = integers(B, slots);
  p->max_seqlen_q = 3;
  p->max_cache_length = 10;
  p->window = W;
  p->rope_theta = 10000;
  p->out = array(F32, 3, NEW, HQ, D, 0);
  p->lse = array(F32, 2, HQ, NEW, 0, 0);
}
MAKE(rolling_attention, rolling_attention)

static void fill_apply_rope(mixtral_apply_rope_params *p) {
  static const int32_t positions[T] = {0, 1, 17, 400, 3};
  p->q = numbers(3, T, HQ, D, 0);
  p->k = numbers(3, T, HK, D, 0);
  p->positions = integers(T, positions);
  p->theta = 10000;
}
MAKE(apply_rope, apply_rope)

/* ------------------------------------------------------------------------------------------------------- the table */

#define CALLS(op)                                                                                                       \
  static size_t size_##op(const mixtral_context *c, const void *p) { return mixtral_##op##_workspace_size(c, p); }      \
  static mixtral_status run_##op(const mixtral_context *c, const void *p, void *w, size_t n, void *s) {                 \
    return mixtral_##op(c, p, w, n, s);                                                                                 \
  }
CALLS(moe_gate)
CALLS(moe_sort)
CALLS(moe_permute)
CALLS(moe_combine)
CALLS(grouped_gemm)
CALLS(grouped_gemm_swiglu)
CALLS(moe_experts)
CALLS(sliding_window_attention)
CALLS(rolling_attention)
CALLS(apply_rope)

#define CASE(make, op, code) #make, "mixtral_" #op, code, sizeof(mixtral_##op##_params), make_##make
#define ARG(op, field, type, layout, ...) {#field, offsetof(mixtral_##op##_params, field), type, layout, 0, {__VA_ARGS__}}
#define MAYBE(op, field, type, layout, ...) {#field, offsetof(mixtral_##op##_params, field), type, layout, 1, {__VA_ARGS__}}

const op_case op_cases[OP_CASES] = {
    {CASE(moe_gate, moe_gate, MIXTRAL_OP_MOE_GATE),
     {ARG(moe_gate, router_logits, FLOATS, STRIDED, "topk_weights", "expert_offsets"),
      ARG(moe_gate, topk_weights, ONLY_F32, CONTIGUOUS, "", ""), ARG(moe_gate, topk_ids, ONLY_I32, CONTIGUOUS, "", ""),
      ARG(moe_gate, expert_offsets, ONLY_I32, CONTIGUOUS, ""), ARG(moe_gate, sorted_slots, ONLY_I32, CONTIGUOUS, ""),
      ARG(moe_gate, slot_rows, ONLY_I32, CONTIGUOUS, "", "")},
     size_moe_gate, run_moe_gate},
    {CASE(moe_sort, moe_sort, MIXTRAL_OP_MOE_SORT),
     {ARG(moe_sort, topk_ids, IDS, STRIDED, "sorted_slots", "sorted_slots"),
      ARG(moe_sort, expert_offsets, ONLY_I32, CONTIGUOUS, ""), ARG(moe_sort, sorted_slots, ONLY_I32, CONTIGUOUS, ""),
      ARG(moe_sort, slot_rows, ONLY_I32, CONTIGUOUS, "", "")},
     size_moe_sort, run_moe_sort},
    {CASE(moe_permute, moe_permute, MIXTRAL_OP_MOE_PERMUTE),
     {ARG(moe_permute, hidden, FLOATS, STRIDED, NULL, "rows"), ARG(moe_permute, sorted_slots, ONLY_I32, CONTIGUOUS, "rows"),
      ARG(moe_permute, rows, FLOATS, OUTPUT, "", "")},
     size_moe_permute, run_moe_permute},
    {CASE(moe_combine, moe_combine, MIXTRAL_OP_MOE_COMBINE),
     {ARG(moe_combine, rows, FLOATS, STRIDED, NULL, "out"),
      ARG(moe_combine, slot_rows, ONLY_I32, STRIDED, "topk_weights", "topk_weights"),
      ARG(moe_combine, topk_weights, ONLY_F32, STRIDED, "", ""), ARG(moe_combine, out, FLOATS, OUTPUT, "", "")},
     size_moe_combine, run_moe_combine},
    {CASE(grouped_gemm, grouped_gemm, MIXTRAL_OP_GROUPED_GEMM),
     {ARG(grouped_gemm, a, FLOATS, STRIDED, NULL, "b"), ARG(grouped_gemm, b, FLOATS, STRIDED, "expert_offsets", "out", ""),
      ARG(grouped_gemm, expert_offsets, ONLY_I32, CONTIGUOUS, ""), MAYBE(grouped_gemm, a_rows, ONLY_I32, CONTIGUOUS, "out"),
      ARG(grouped_gemm, out, FLOATS, OUTPUT, "", "")},
     size_grouped_gemm, run_grouped_gemm},
    {CASE(grouped_gemm_swiglu, grouped_gemm_swiglu, MIXTRAL_OP_GROUPED_GEMM_SWIGLU),
     {ARG(grouped_gemm_swiglu, a, FLOATS, STRIDED, NULL, "w_gate_up"),
      ARG(grouped_gemm_swiglu, w_gate_up, FLOATS, STRIDED, "expert_offsets", "", ""),
      ARG(grouped_gemm_swiglu, expert_offsets, ONLY_I32, CONTIGUOUS, ""),
      MAYBE(grouped_gemm_swiglu, a_rows, ONLY_I32, CONTIGUOUS, "out"), ARG(grouped_gemm_swiglu, out, FLOATS, OUTPUT, "", "")},
     size_grouped_gemm_swiglu, run_grouped_gemm_swiglu},
    {CASE(moe_experts, moe_experts, MIXTRAL_OP_MOE_EXPERTS),
     {ARG(moe_experts, hidden, FLOATS, STRIDED, "topk_ids", "w_gate_up"),
      ARG(moe_experts, w_gate_up, FLOATS, STRIDED, "w_down", "", ""), ARG(moe_experts, w_down, FLOATS, STRIDED, "", "", ""),
      ARG(moe_experts, topk_ids, IDS, STRIDED, "", "topk_weights"), ARG(moe_experts, topk_weights, ONLY_F32, STRIDED, "", ""),
      MAYBE(moe_experts, expert_offsets, ONLY_I32, CONTIGUOUS, ""), MAYBE(moe_experts, sorted_slots, ONLY_I32, CONTIGUOUS, ""),
      MAYBE(moe_experts, slot_rows, ONLY_I32, CONTIGUOUS, "", ""), ARG(moe_experts, out, FLOATS, OUTPUT, "", "")},
     size_moe_experts, run_moe_experts},
    {CASE(moe_experts_sorting, moe_experts, MIXTRAL_OP_MOE_EXPERTS),
     {ARG(moe_experts, hidden, FLOATS, STRIDED, "topk_ids", "w_gate_up")}, size_moe_experts, run_moe_experts},
    {CASE(attention_packed, sliding_window_attention, MIXTRAL_OP_SLIDING_WINDOW_ATTENTION),
     {ARG(sliding_window_attention, q, FLOATS, STRIDED, "out", "", "k"),
      ARG(sliding_window_attention, k, FLOATS, STRIDED, "v", "v", ""), ARG(sliding_window_attention, v, FLOATS, STRIDED, "", "", ""),
      ARG(sliding_window_attention, cu_seqlens_q, ONLY_I32, CONTIGUOUS, "cu_seqlens_k"),
      ARG(sliding_window_attention, cu_seqlens_k, ONLY_I32, CONTIGUOUS, ""),
      ARG(sliding_window_attention, out, FLOATS, OUTPUT, "", "", ""),
      MAYBE(sliding_window_attention, lse, ONLY_F32, CONTIGUOUS, "", "")},
     size_sliding_window_attention, run_sliding_window_attention},
    {CASE(attention_batched, sliding_window_attention, MIXTRAL_OP_SLIDING_WINDOW_ATTENTION),
     {ARG(sliding_window_attention, q, FLOATS, STRIDED, "k", "out", "", "k"),
      ARG(sliding_window_attention, k, FLOATS, STRIDED, "", "v", "v", ""),
      ARG(sliding_window_attention, v, FLOATS, STRIDED, "", "", "", ""),
      MAYBE(sliding_window_attention, k_start, ONLY_I32, CONTIGUOUS, ""),
      MAYBE(sliding_window_attention, k_length, ONLY_I32, CONTIGUOUS, ""),
      ARG(sliding_window_attention, out, FLOATS, OUTPUT, "", "", "", ""),
      MAYBE(sliding_window_attention, lse, ONLY_F32, CONTIGUOUS, "", "", "")},
     size_sliding_window_attention, run_sliding_window_attention},
    {CASE(rolling_attention, rolling_attention, MIXTRAL_OP_ROLLING_ATTENTION),
     {ARG(rolling_attention, q, FLOATS, STRIDED, "k", "", ""),
      ARG(rolling_attention, k_cache, FLOATS, OUTPUT, "v_cache", "", "", ""),
      ARG(rolling_attention, v_cache, FLOATS, OUTPUT, "", "", "", ""), ARG(rolling_attention, k, FLOATS, STRIDED, "", "", ""),
      ARG(rolling_attention, v, FLOATS, STRIDED, "", "", ""),
      ARG(rolling_attention, cu_seqlens_q, ONLY_I32, CONTIGUOUS, "cache_lengths"),
      ARG(rolling_attention, cache_lengths, ONLY_I32, CONTIGUOUS, ""),
      MAYBE(rolling_attention, cache_slots, ONLY_I32, CONTIGUOUS, ""), ARG(rolling_attention, out, FLOATS, OUTPUT, "", "", ""),
      MAYBE(rolling_attention, lse, ONLY_F32, CONTIGUOUS, "", "")},
     size_rolling_attention, run_rolling_attention},
    {CASE(apply_rope, apply_rope, MIXTRAL_OP_APPLY_ROPE),
     {ARG(apply_rope, q, FLOATS, OUTPUT, "k", "", ""), MAYBE(apply_rope, k, FLOATS, OUTPUT, "", "", ""),
      ARG(apply_rope, positions, IDS, CONTIGUOUS, "")},
     size_apply_rope, run_apply_rope},
};

const op_case *find_case(const char *label) {
  int i;
  for (i = 0; i < OP_CASES; ++i)
    if (!strcmp(op_cases[i].label, label)) return &op_cases[i];
  abort();
}

mixtral_status run_case(const op_case *c, const mixtral_context *context, const void *params) {
  const size_t bytes = c->workspace_size(context, params);
  unsigned char *workspace = malloc(bytes + 1); /* +1: a pointer even for 0 bytes, and no alignment is promised */
  mixtral_status status;
  memset(workspace, 0xff, bytes + 1);
  status = c->run(context, params, workspace + 1, bytes, NULL);
  free(workspace);
  return status;
}
