/* Every bad argument of every op: the right status, a message that names the argument, what was expected and what came,
 * and not one byte of the arrays changed. */
#include "cases.h"
#include <math.h>

static const mixtral_context *context;
static unsigned char before[sizeof arena];
static const char *current; /* what is tried, for the report */

/* Runs a bad call. `blame` begins the message after the op's name; `got` (may be "") ends up in it. */
static void refused(const op_case *c, const mixtral_context *on, const void *params, mixtral_status status, const char *blame,
                    const char *got, size_t short_by, void *stream) {
  const size_t bytes = on && params ? c->workspace_size(on, params) : 0;
  unsigned char *workspace = malloc(bytes + 1);
  char prefix[128];
  const char *message;
  mixtral_status result;
  memcpy(before, arena, sizeof arena);
  result = c->run(on, params, short_by > bytes ? NULL : workspace, short_by > bytes ? 0 : bytes - short_by, stream);
  message = mixtral_last_error();
  snprintf(prefix, sizeof prefix, "%s: %s", c->name, blame);
  EXPECT(result == status, "%s, %s: status %d, expected %d (%s)", c->label, current, (int)result, (int)status, message);
  if (result != MIXTRAL_OK)
    EXPECT(!strncmp(message, prefix, strlen(prefix)) && strstr(message, ": expected ") && strstr(message, "got ") &&
               strstr(message, got),
           "%s, %s: message \"%s\", expected \"%s ... expected ... got %s\"", c->label, current, message, prefix, got);
  EXPECT(!memcmp(before, arena, sizeof arena), "%s, %s: arrays changed", c->label, current);
  free(workspace);
}

/* A call the host can refuse from the params alone: mixtral_supports agrees, and there is no workspace size for it. */
static void refused_params(const op_case *c, const void *params, const char *blame, const char *got) {
  refused(c, context, params, MIXTRAL_ERROR_INVALID_ARGUMENT, blame, got, 0, NULL);
  EXPECT(mixtral_supports(context, c->op, params) == MIXTRAL_ERROR_INVALID_ARGUMENT, "%s, %s: supported", c->label, current);
  EXPECT(c->workspace_size(context, params) == 0, "%s, %s: has a workspace size", c->label, current);
}

/* ----------------------------------------------------------------------------------- what is wrong for any tensor */

static int allows(types type, int32_t dtype) {
  const int half = dtype == BF16 || dtype == MIXTRAL_DTYPE_F16;
  return type == FLOATS ? half || dtype == F32 : type == ONLY_F32 ? dtype == F32 : dtype == I32 || (type == IDS && dtype == I64);
}

static void bad_tensors(const op_case *c) {
  static const int32_t dtypes[] = {I32, I64, F32, BF16, MIXTRAL_DTYPE_F16, 0x00014002 /* float64 */, 0x00021004 /* 2 lanes */, 0, -1};
  static const int ranks[] = {-1, 0, 1, 2, 3, 4, 5};
  union {
    mixtral_rolling_attention_params largest;
    unsigned char bytes[sizeof(mixtral_rolling_attention_params)];
  } params;
  char text[100];
  int a, i, floats = 0;
  size_t k;
#define TRY(change, argument_, got)                              \
  do {                                                           \
    mixtral_tensor *t;                                           \
    c->make(&params);                                            \
    t = (mixtral_tensor *)(params.bytes + arg->offset);          \
    change;                                                      \
    refused_params(c, &params, argument_, got);                  \
  } while (0)
#define SAY(...) (snprintf(text, sizeof text, __VA_ARGS__), current = text)

  for (a = 0; a < MAX_ARGUMENTS && c->arguments[a].name; ++a) {
    const argument *arg = &c->arguments[a];
    const mixtral_tensor *good;
    mixtral_tensor shape_of;
    int last;
    c->make(&params);
    good = (const mixtral_tensor *)(params.bytes + arg->offset);
    shape_of = *good;
    last = shape_of.ndim - 1;

    if (!arg->optional) {
      SAY("%s absent", arg->name);
      /* k and v of rolling_attention may be absent, but only together */
      TRY(memset(t, 0, sizeof *t), c->op == MIXTRAL_OP_ROLLING_ATTENTION && arg->name[1] == 0 && arg->name[0] != 'q' ? "k, v" : arg->name, "");
    }
    for (k = 0; k < sizeof ranks / sizeof *ranks; ++k) {
      const int other_layout = c->op == MIXTRAL_OP_SLIDING_WINDOW_ATTENTION && a == 0 && (ranks[k] == 3 || ranks[k] == 4);
      if (ranks[k] == shape_of.ndim) continue;
      SAY("%s with %d dimensions", arg->name, ranks[k]);
      TRY(t->ndim = ranks[k], other_layout ? "" : arg->name, "");
    }
    for (k = 0; k < sizeof dtypes / sizeof *dtypes; ++k) {
      if (dtypes[k] == shape_of.dtype) continue;
      if (allows(arg->type, dtypes[k]) && (arg->type == IDS || floats == 0)) continue; /* fine, or sets the dtype of the rest */
      SAY("%s of dtype %#x", arg->name, (unsigned)dtypes[k]);
      TRY(t->dtype = dtypes[k], arg->name, "");
    }
    for (i = 0; i <= last; ++i) {
      SAY("%s, dimension %d negative", arg->name, i);
      TRY(t->shape[i] = -1, arg->name, "");
      SAY("%s, dimension %d of 2^62", arg->name, i);
      TRY((t->shape[i] = (int64_t)1 << 62, t->stride[i] = i == last ? 1 : t->stride[i]), arg->name, "");
      if (arg->blame[i]) {
        SAY("%s, dimension %d one larger", arg->name, i);
        TRY(++t->shape[i], arg->blame[i][0] ? arg->blame[i] : arg->name, "");
      }
      if (shape_of.shape[i] < 2) continue;
      SAY("%s, stride %d negative", arg->name, i);
      TRY(t->stride[i] = -1, arg->name, "got -1");
      SAY("%s, stride %d of 2^61", arg->name, i);
      TRY(t->stride[i] = (int64_t)1 << 61, arg->name, "");
      if (i < last && arg->layout != STRIDED) {
        SAY("%s, stride %d zero", arg->name, i);
        TRY(t->stride[i] = 0, arg->name, "");
        SAY("%s, stride %d one smaller", arg->name, i);
        TRY(--t->stride[i], arg->name, "");
      }
      if (i < last && arg->layout == CONTIGUOUS) {
        SAY("%s, stride %d one larger", arg->name, i);
        TRY(++t->stride[i], arg->name, "");
      }
    }
    SAY("%s, innermost stride 2", arg->name);
    TRY(t->stride[last] = 2, arg->name, "got");
    SAY("%s, innermost stride 0", arg->name);
    TRY(t->stride[last] = 0, arg->name, "got 0");
    SAY("%s, data NULL", arg->name);
    TRY(t->data = NULL, arg->name, "got NULL");
    SAY("%s, data misaligned", arg->name);
    TRY(t->data = (char *)t->data + 1, arg->name, "got 0x");
    floats |= arg->type == FLOATS;
  }
#undef TRY
}

/* -------------------------------------------------------------------------------------- what is wrong for any call */

static void bad_calls(const op_case *c) {
  union {
    size_t struct_size;
    mixtral_rolling_attention_params largest;
  } params;
  int stream;
  size_t bytes;
  c->make(&params);
  current = "context NULL";
  refused(c, NULL, &params, MIXTRAL_ERROR_INVALID_ARGUMENT, "context", "got NULL", 0, NULL);
  EXPECT(c->workspace_size(NULL, &params) == 0, "%s: a workspace size without a context", c->label);
  current = "params NULL";
  refused(c, context, NULL, MIXTRAL_ERROR_INVALID_ARGUMENT, "params", "got NULL", 0, NULL);
  EXPECT(c->workspace_size(context, NULL) == 0, "%s: a workspace size without params", c->label);
  current = "struct_size";
  params.struct_size = 0;
  refused_params(c, &params, "struct_size", "got 0");
  params.struct_size = c->params_bytes - 8;
  refused_params(c, &params, "struct_size", "");
  params.struct_size = c->params_bytes + 8;
  refused_params(c, &params, "struct_size", "");
  params.struct_size = c->params_bytes;
  current = "stream on the CPU";
  refused(c, context, &params, MIXTRAL_ERROR_INVALID_ARGUMENT, "stream", "got 0x", 0, &stream);
  bytes = c->workspace_size(context, &params);
  if (bytes) {
    current = "workspace one byte short";
    refused(c, context, &params, MIXTRAL_ERROR_WORKSPACE, "workspace", "got ", 1, NULL);
    current = "workspace of no bytes";
    refused(c, context, &params, MIXTRAL_ERROR_WORKSPACE, "workspace", "got 0", bytes, NULL);
    current = "workspace NULL";
    refused(c, context, &params, MIXTRAL_ERROR_WORKSPACE, "workspace", "got NULL", bytes + 1, NULL);
  }
  EXPECT(run_case(c, context, &params) == MIXTRAL_OK, "%s: the call without a fault: %s", c->label, mixtral_last_error());
}

/* ---------------------------------------------------------------------------------- limits and values, one by one */

#define ints(t) ((int32_t *)p.t.data)
#define longs(t) ((int64_t *)p.t.data)
/* BAD: refused from the params; VALUE: only the arrays show it. */
#define CHANGED(op, label_, change, call)       \
  do {                                          \
    const op_case *c = find_case(label_);       \
    mixtral_##op##_params p;                    \
    c->make(&p);                                \
    change;                                     \
    current = #change;                          \
    call;                                       \
  } while (0)
#define BAD(op, label_, change, blame, got) CHANGED(op, label_, change, refused_params(c, &p, blame, got))
#define VALUE(op, label_, change, blame, got) \
  CHANGED(op, label_, change, refused(c, context, &p, MIXTRAL_ERROR_INVALID_ARGUMENT, blame, got, 0, NULL))
#define NONE(t) memset(&p.t, 0, sizeof p.t)

static void bad_routing(void) {
  BAD(moe_gate, "moe_gate", p.top_k = 0, "top_k", "got 0");
  BAD(moe_gate, "moe_gate", p.top_k = -1, "top_k", "got -1");
  BAD(moe_gate, "moe_gate", p.top_k = E + 1, "top_k: expected 1 to 4", "got 5");
  BAD(moe_gate, "moe_gate", (p.router_logits.shape[1] = 16, p.top_k = 9), "top_k: expected 1 to 8", "got 9");
  BAD(moe_gate, "moe_gate", p.router_logits.shape[1] = 0, "router_logits", "got 0");
  BAD(moe_gate, "moe_gate", p.router_logits.shape[1] = 257, "router_logits", "got 257");
  BAD(moe_gate, "moe_gate", (p.router_logits.shape[0] = (int64_t)1 << 30, p.router_logits.stride[0] = 0), "router_logits", "got 1073741824");

  BAD(moe_sort, "moe_sort", p.num_experts = 0, "num_experts", "got 0");
  BAD(moe_sort, "moe_sort", p.num_experts = -5, "num_experts", "got -5");
  BAD(moe_sort, "moe_sort", p.num_experts = 257, "num_experts: expected 1 to 256", "got 257");
  BAD(moe_sort, "moe_sort", p.num_experts = E + 1, "expert_offsets: expected shape [6]", "got [5]");
  BAD(moe_sort, "moe_sort", p.topk_ids.shape[1] = 0, "topk_ids", "got 0");
  BAD(moe_sort, "moe_sort", p.topk_ids.shape[1] = 9, "topk_ids", "got 9");
  BAD(moe_sort, "moe_sort", (p.topk_ids.shape[0] = (int64_t)1 << 30, p.topk_ids.stride[0] = 0), "topk_ids", "got 1073741824");
  BAD(moe_sort, "moe_sort", p.reserved = 1, "reserved", "got 1");

  /* An empty array has the same limits wherever its 0 stands, 2^59 elements from first to last. */
  BAD(moe_permute, "moe_permute", (p.hidden.shape[0] = 0, p.hidden.shape[1] = (int64_t)1 << 60), "hidden: expected less than 2^59", "got");
  BAD(moe_permute, "moe_permute", (p.hidden.shape[0] = (int64_t)1 << 60, p.hidden.shape[1] = 0), "hidden: expected less than 2^59", "got");
  BAD(moe_permute, "moe_permute", p.top_k = 0, "top_k", "got 0");
  BAD(moe_permute, "moe_permute", p.top_k = 9, "top_k: expected 1 to 8", "got 9");
  BAD(moe_permute, "moe_permute", p.reserved = 1, "reserved", "got 1");
  BAD(moe_permute, "moe_permute", p.rows.dtype = BF16, "rows: expected dtype float32", "got bfloat16");
  VALUE(moe_permute, "moe_permute", ints(sorted_slots)[3] = S, "sorted_slots: expected -1 to 9", "got 10");
  VALUE(moe_permute, "moe_permute", ints(sorted_slots)[S - 1] = -2, "sorted_slots", "got -2");
  VALUE(moe_permute, "moe_permute", ints(sorted_slots)[S - 1] = INT32_MAX, "sorted_slots", "got 2147483647");

  BAD(moe_combine, "moe_combine", p.slot_rows.shape[1] = 0, "slot_rows", "got 0");
  BAD(moe_combine, "moe_combine", p.slot_rows.shape[1] = 9, "slot_rows", "got 9");
  VALUE(moe_combine, "moe_combine", ints(slot_rows)[0] = S, "slot_rows: expected -1 to 9", "got 10");
  VALUE(moe_combine, "moe_combine", ints(slot_rows)[S - 1] = -2, "slot_rows", "got -2");
}

static void bad_experts(void) {
  BAD(grouped_gemm, "grouped_gemm", p.a_rows_divisor = 0, "a_rows_divisor", "got 0");
  BAD(grouped_gemm, "grouped_gemm", p.a_rows_divisor = -2, "a_rows_divisor", "got -2");
  BAD(grouped_gemm, "grouped_gemm", NONE(a_rows), "a_rows_divisor: expected 1 without a_rows", "got 2");
  BAD(grouped_gemm, "grouped_gemm", (NONE(a_rows), p.a_rows_divisor = 1), "out: expected shape [5, 40]", "got [10, 40]");
  BAD(grouped_gemm, "grouped_gemm", p.b.shape[0] = 0, "b.shape[0] (experts): expected 1 to 256", "got 0");
  BAD(grouped_gemm, "grouped_gemm", (p.b.shape[0] = 257, p.b.stride[0] = 0), "b.shape[0] (experts)", "got 257");
  BAD(grouped_gemm, "grouped_gemm", (p.a.shape[0] = (int64_t)1 << 31, p.a.stride[0] = 0), "a.shape[0]", "got 2147483648");
  BAD(grouped_gemm, "grouped_gemm", p.reserved = 1, "reserved", "got 1");
  VALUE(grouped_gemm, "grouped_gemm", ints(expert_offsets)[0] = 1, "expert_offsets: expected 0", "got 1");
  VALUE(grouped_gemm, "grouped_gemm", ints(expert_offsets)[0] = -1, "expert_offsets: expected 0", "got -1");
  VALUE(grouped_gemm, "grouped_gemm", ints(expert_offsets)[2] = 2, "expert_offsets", "got 2");
  VALUE(grouped_gemm, "grouped_gemm", ints(expert_offsets)[E] = S + 1, "expert_offsets", "got 11");
  VALUE(grouped_gemm, "grouped_gemm", ints(expert_offsets)[2] = INT32_MAX, "expert_offsets", "got 2147483647");
  VALUE(grouped_gemm, "grouped_gemm", ints(a_rows)[7] = T * K, "a_rows: expected 0 to 9", "got 10");
  VALUE(grouped_gemm, "grouped_gemm", ints(a_rows)[0] = -1, "a_rows", "got -1");

  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", p.a_rows_divisor = 0, "a_rows_divisor", "got 0");
  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", NONE(a_rows), "a_rows_divisor: expected 1 without a_rows", "got 2");
  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", p.w_gate_up.shape[0] = 0, "w_gate_up.shape[0] (experts)", "got 0");
  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", p.w_gate_up.shape[0] = 300, "w_gate_up.shape[0] (experts)", "got 300");
  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", p.w_gate_up.shape[1] = 2 * I - 1, "w_gate_up.shape[1]: expected an even", "got 79");
  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", (p.a.shape[0] = (int64_t)1 << 31, p.a.stride[0] = 0), "a.shape[0]", "got 2147483648");
  BAD(grouped_gemm_swiglu, "grouped_gemm_swiglu", p.reserved = 1, "reserved", "got 1");
  VALUE(grouped_gemm_swiglu, "grouped_gemm_swiglu", ints(expert_offsets)[0] = 1, "expert_offsets: expected 0", "got 1");
  VALUE(grouped_gemm_swiglu, "grouped_gemm_swiglu", ints(expert_offsets)[2] = 2, "expert_offsets", "got 2");
  VALUE(grouped_gemm_swiglu, "grouped_gemm_swiglu", ints(expert_offsets)[E] = S + 1, "expert_offsets", "got 11");
  VALUE(grouped_gemm_swiglu, "grouped_gemm_swiglu", ints(a_rows)[7] = T * K, "a_rows: expected 0 to 9", "got 10");
  VALUE(grouped_gemm_swiglu, "grouped_gemm_swiglu", ints(a_rows)[0] = -1, "a_rows", "got -1");

  BAD(moe_experts, "moe_experts", p.w_gate_up.shape[0] = 0, "w_gate_up.shape[0] (experts)", "got 0");
  BAD(moe_experts, "moe_experts", (p.w_gate_up.shape[0] = 257, p.w_gate_up.stride[0] = 0), "w_gate_up.shape[0] (experts)", "got 257");
  BAD(moe_experts, "moe_experts", p.w_gate_up.shape[1] = 2 * I - 1, "w_gate_up.shape[1]: expected an even", "got 79");
  BAD(moe_experts, "moe_experts", p.topk_ids.shape[1] = 0, "topk_ids", "got 0");
  BAD(moe_experts, "moe_experts", p.topk_ids.shape[1] = 9, "topk_ids", "got 9");
  BAD(moe_experts, "moe_experts", NONE(expert_offsets), "expert_offsets, sorted_slots, slot_rows: expected all or none", "got 2");
  BAD(moe_experts, "moe_experts", NONE(sorted_slots), "expert_offsets, sorted_slots, slot_rows: expected all or none", "got 2");
  BAD(moe_experts, "moe_experts", (NONE(slot_rows), NONE(sorted_slots)), "expert_offsets, sorted_slots, slot_rows: expected all or none", "got 1");
  VALUE(moe_experts, "moe_experts", ints(expert_offsets)[0] = 1, "expert_offsets: expected 0", "got 1");
  VALUE(moe_experts, "moe_experts", ints(expert_offsets)[2] = 2, "expert_offsets", "got 2");
  VALUE(moe_experts, "moe_experts", ints(expert_offsets)[E] = S + 1, "expert_offsets", "got 11");
  VALUE(moe_experts, "moe_experts", ints(sorted_slots)[7] = S, "sorted_slots", "got 10");
  VALUE(moe_experts, "moe_experts", ints(sorted_slots)[0] = -1, "sorted_slots", "got -1");
  VALUE(moe_experts, "moe_experts", ints(slot_rows)[0] = -2, "slot_rows", "got -2");
  VALUE(moe_experts, "moe_experts", ints(slot_rows)[S - 1] = S, "slot_rows", "got 10");
}

static void bad_attention(void) {
  const double infinity = HUGE_VAL;
  BAD(sliding_window_attention, "attention_packed", p.window = -1, "window", "got -1");
  BAD(sliding_window_attention, "attention_packed", p.window = (int64_t)1 << 31, "window", "got 2147483648");
  BAD(sliding_window_attention, "attention_packed", p.softmax_scale = infinity, "softmax_scale", "got inf");
  BAD(sliding_window_attention, "attention_packed", p.softmax_scale = NAN, "softmax_scale", "nan");
  BAD(sliding_window_attention, "attention_packed", p.max_seqlen_q = -1, "max_seqlen_q", "got -1");
  BAD(sliding_window_attention, "attention_packed", p.max_seqlen_k = -1, "max_seqlen_k", "got -1");
  BAD(sliding_window_attention, "attention_packed", (NONE(cu_seqlens_q), NONE(cu_seqlens_k), p.max_seqlen_q = TQ - 1, p.max_seqlen_k = 0), "max_seqlen_q: expected 0 or at least 8", "got 7");
  BAD(sliding_window_attention, "attention_packed", (NONE(cu_seqlens_q), NONE(cu_seqlens_k), p.max_seqlen_q = TQ, p.max_seqlen_k = TK - 1), "max_seqlen_k: expected 0 or at least 11", "got 10");
  BAD(sliding_window_attention, "attention_packed", p.q.shape[2] = p.k.shape[2] = p.v.shape[2] = p.out.shape[2] = 32, "q: expected head dim 64 or 128", "got 32");
  BAD(sliding_window_attention, "attention_packed", p.k.shape[1] = p.v.shape[1] = 0, "q: expected a number of heads", "got 4");
  BAD(sliding_window_attention, "attention_packed", p.q.shape[1] = p.out.shape[1] = 3, "q: expected a number of heads", "got 3");
  BAD(sliding_window_attention, "attention_packed", NONE(cu_seqlens_k), "cu_seqlens_k", "got none");
  BAD(sliding_window_attention, "attention_packed", NONE(cu_seqlens_q), "cu_seqlens_q", "got none");
  BAD(sliding_window_attention, "attention_packed", p.cu_seqlens_q.shape[0] = p.cu_seqlens_k.shape[0] = 0, "cu_seqlens_q", "got 0");
  BAD(sliding_window_attention, "attention_packed", p.k_start = p.cu_seqlens_q, "k_start, k_length", "got some");
  VALUE(sliding_window_attention, "attention_packed", ints(cu_seqlens_q)[0] = 1, "cu_seqlens_q: expected 0", "got 1");
  VALUE(sliding_window_attention, "attention_packed", ints(cu_seqlens_q)[2] = 2, "cu_seqlens_q", "got 2");
  VALUE(sliding_window_attention, "attention_packed", (ints(cu_seqlens_q)[3] = TQ + 1, p.max_seqlen_q = 0), "cu_seqlens_q", "got 9");
  VALUE(sliding_window_attention, "attention_packed", p.max_seqlen_q = 3, "cu_seqlens_q: expected sequences of at most 3", "got 4");
  VALUE(sliding_window_attention, "attention_packed", ints(cu_seqlens_k)[0] = -1, "cu_seqlens_k: expected 0", "got -1");
  VALUE(sliding_window_attention, "attention_packed", ints(cu_seqlens_k)[2] = 4, "cu_seqlens_k", "got 4");
  VALUE(sliding_window_attention, "attention_packed", (ints(cu_seqlens_k)[3] = TK + 1, p.max_seqlen_k = 0), "cu_seqlens_k", "got 12");
  VALUE(sliding_window_attention, "attention_packed", p.max_seqlen_k = 4, "cu_seqlens_k: expected sequences of at most 4", "got 5");
  BAD(sliding_window_attention, "attention_batched", (p.cu_seqlens_q = p.cu_seqlens_k = p.k_start), "cu_seqlens_q, cu_seqlens_k", "got some");
  BAD(sliding_window_attention, "attention_batched",
      (p.q.shape[0] = p.k.shape[0] = p.v.shape[0] = p.out.shape[0] = (int64_t)1 << 40, p.q.shape[1] = p.k.shape[1] = p.v.shape[1] = p.out.shape[1] = 0,
       NONE(k_start), NONE(k_length), NONE(lse)), "q: sequences: expected 0 to 2147483647", "got 1099511627776");
  BAD(sliding_window_attention, "attention_batched", (NONE(k_start), NONE(k_length), p.max_seqlen_k = SK - 1), "max_seqlen_k: expected 0 or at least 6", "got 5");
  VALUE(sliding_window_attention, "attention_batched", (ints(k_length)[1] = 0, p.max_seqlen_k = ints(k_length)[0] - 1), "max_seqlen_k: expected at least", "got");
  VALUE(sliding_window_attention, "attention_batched", ints(k_start)[1] = -1, "k_start", "got -1");
  VALUE(sliding_window_attention, "attention_batched", ints(k_start)[1] = SK + 1, "k_start", "got 7");
  VALUE(sliding_window_attention, "attention_batched", ints(k_length)[1] = -1, "k_length", "got -1");
  VALUE(sliding_window_attention, "attention_batched", ints(k_length)[1] = SK - 1, "k_length", "got 5");
  VALUE(sliding_window_attention, "attention_batched", (NONE(k_start), ints(k_length)[1] = SK + 1), "k_length", "got 7");
  BAD(rolling_attention, "rolling_attention", p.window = -1, "window", "got -1");
  BAD(rolling_attention, "rolling_attention", p.window = C + 1, "window: expected 0 to 8", "got 9");
  BAD(rolling_attention, "rolling_attention", p.softmax_scale = infinity, "softmax_scale", "got inf");
  BAD(rolling_attention, "rolling_attention", p.rope_theta = -1, "rope_theta", "got -1");
  BAD(rolling_attention, "rolling_attention", p.rope_theta = infinity, "rope_theta", "got inf");
  BAD(rolling_attention, "rolling_attention", p.rope_theta = NAN, "rope_theta", "nan");
  BAD(rolling_attention, "rolling_attention", p.max_seqlen_q = -1, "max_seqlen_q", "got -1");
  BAD(rolling_attention, "rolling_attention", p.max_cache_length = -2, "max_cache_length", "got -2");
  BAD(rolling_attention, "rolling_attention", p.reserved = 1, "reserved", "got 1");
  BAD(rolling_attention, "rolling_attention", NONE(cu_seqlens_q), "cu_seqlens_q", "got none");
  BAD(rolling_attention, "rolling_attention", p.cu_seqlens_q.shape[0] = 0, "cu_seqlens_q", "got 0");
  BAD(rolling_attention, "rolling_attention", p.k_cache.shape[1] = p.v_cache.shape[1] = 0, "k_cache.shape[1] (capacity)", "got 0");
  BAD(rolling_attention, "rolling_attention", p.window = 0, "max_cache_length", "got 10 + 3");
  BAD(rolling_attention, "rolling_attention", (NONE(k), NONE(v), p.window = C - 1), "window", "got 7 + 3 - 1");
  BAD(rolling_attention, "rolling_attention", (p.k_cache.shape[0] = p.v_cache.shape[0] = 1, NONE(cache_slots)), "k_cache.shape[0] (slots)", "got 1");
  BAD(rolling_attention, "rolling_attention", (p.k_cache.shape[2] = p.v_cache.shape[2] = 0), "q: expected a number of heads", "got 4");
  VALUE(rolling_attention, "rolling_attention", ints(cu_seqlens_q)[0] = 1, "cu_seqlens_q: expected 0", "got 1");
  VALUE(rolling_attention, "rolling_attention", (ints(cu_seqlens_q)[1] = 6, p.max_seqlen_q = 0), "cu_seqlens_q", "got 5");
  VALUE(rolling_attention, "rolling_attention", (ints(cu_seqlens_q)[2] = NEW + 1, p.max_seqlen_q = 0), "cu_seqlens_q", "got 7");
  VALUE(rolling_attention, "rolling_attention", p.max_seqlen_q = 2, "cu_seqlens_q: expected sequences of at most 2", "got 3");
  VALUE(rolling_attention, "rolling_attention", ints(cache_lengths)[0] = -1, "cache_lengths", "got -1");
  VALUE(rolling_attention, "rolling_attention", (ints(cache_lengths)[0] = INT32_MAX, p.max_cache_length = -1), "cache_lengths", "got 2147483647");
  VALUE(rolling_attention, "rolling_attention", p.max_cache_length = 9, "cache_lengths: expected at most 9", "got 10");
  VALUE(rolling_attention, "rolling_attention", (p.window = 0, p.max_cache_length = -1), "cache_lengths", "got 10 + 3");
  VALUE(rolling_attention, "rolling_attention", (NONE(k), NONE(v), p.window = C - 1, p.max_seqlen_q = 0), "window", "got 7 + 3 - 1");
  VALUE(rolling_attention, "rolling_attention", ints(cache_slots)[1] = SLOTS, "cache_slots: expected 0 to 2", "got 3");
  VALUE(rolling_attention, "rolling_attention", ints(cache_slots)[1] = -1, "cache_slots", "got -1");
  VALUE(rolling_attention, "rolling_attention", ints(cache_slots)[1] = 2, "cache_slots: expected distinct", "got 2");

  BAD(apply_rope, "apply_rope", p.theta = 0, "theta", "got 0");
  BAD(apply_rope, "apply_rope", p.theta = -10000, "theta", "got -10000");
  BAD(apply_rope, "apply_rope", p.theta = infinity, "theta", "got inf");
  BAD(apply_rope, "apply_rope", p.theta = NAN, "theta", "nan");
  BAD(apply_rope, "apply_rope", p.reserved = 1, "reserved", "got 1");
  BAD(apply_rope, "apply_rope", p.q.shape[2] = p.k.shape[2] = 62, "q: expected head dim 64 or 128", "got 62");
  VALUE(apply_rope, "apply_rope", ints(positions)[T - 1] = -1, "positions: expected 0 to 2147483647", "got -1");
  VALUE(apply_rope, "apply_rope", (p.positions = array(I64, 1, T, 0, 0, 0), memset(p.positions.data, 0, T * 8), longs(positions)[2] = (int64_t)1 << 31),
        "positions", "got 2147483648");
}

void test_bad_arguments(const mixtral_context *on) {
  int i;
  context = on;
  for (i = 0; i < OP_CASES; ++i) {
    bad_tensors(&op_cases[i]);
    bad_calls(&op_cases[i]);
  }
  bad_routing();
  bad_experts();
  bad_attention();
}
