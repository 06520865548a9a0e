/* Routing and experts once each, against the header's formulas in double. */
#include "cases.h"
#include <math.h>

#define f32(t) ((float *)(t).data)
#define i32(t) ((int32_t *)(t).data)

static void near(const char *what, int64_t i, float got, double expected) {
  EXPECT(fabs(got - expected) <= 2e-6 * (1 + fabs(expected)) * H, "%s[%d]: %.8g, expected %.8g", what, (int)i, got, expected);
}

static void untouched(const char *what, const float *row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, row + i, 4);
    EXPECT(bits == 0x7f7f7f7fu, "%s: element %d was written", what, (int)i);
  }
}

static double dot(const float *x, const float *y, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += (double)x[i] * y[i];
  return sum;
}

/* The permutation of the ids in `ids` against the three maps. */
static void expect_maps(const char *what, const int32_t *ids, const mixtral_tensor *offsets, const mixtral_tensor *slots,
                        const mixtral_tensor *rows) {
  int row = 0;
  EXPECT(i32(*offsets)[0] == 0, "%s: expert_offsets[0] is %d", what, i32(*offsets)[0]);
  for (int e = 0; e < E; ++e) {
    for (int s = 0; s < S; ++s) {
      if (ids[s] != e) continue;
      EXPECT(i32(*slots)[row] == s, "%s: sorted_slots[%d] is %d, expected %d", what, row, i32(*slots)[row], s);
      EXPECT(i32(*rows)[s] == row, "%s: slot_rows[%d] is %d, expected %d", what, s, i32(*rows)[s], row);
      ++row;
    }
    EXPECT(i32(*offsets)[e + 1] == row, "%s: expert_offsets[%d] is %d, expected %d", what, e + 1, i32(*offsets)[e + 1], row);
  }
  for (int s = 0; s < S; ++s)
    if (ids[s] < 0 || ids[s] >= E) EXPECT(i32(*rows)[s] == -1, "%s: slot_rows[%d] is %d, expected -1", what, s, i32(*rows)[s]);
  for (; row < S; ++row) EXPECT(i32(*slots)[row] == -1, "%s: sorted_slots[%d] is %d, expected -1", what, row, i32(*slots)[row]);
}

static void run(const char *label, const mixtral_context *context, void *params) {
  const op_case *c = find_case(label);
  EXPECT(run_case(c, context, params) == MIXTRAL_OK, "%s: %s", label, mixtral_last_error());
}

static void gate(const mixtral_context *context, int renormalize) {
  mixtral_moe_gate_params p;
  find_case("moe_gate")->make(&p);
  p.renormalize = renormalize;
  f32(p.router_logits)[0] = f32(p.router_logits)[3] = 2; /* a tie for the first place: the lower id wins */
  run("moe_gate", context, &p);
  for (int t = 0; t < T; ++t) {
    const float *logits = f32(p.router_logits) + t * E;
    int chosen[K] = {-1, -1};
    double sum = 0;
    for (int j = 0; j < K; ++j)
      for (int e = 0; e < E; ++e)
        if (e != chosen[0] && (chosen[j] < 0 || logits[e] > logits[chosen[j]])) chosen[j] = e;
    if (renormalize)
      for (int j = 0; j < K; ++j) sum += exp(logits[chosen[j]]);
    else
      for (int e = 0; e < E; ++e) sum += exp(logits[e]);
    for (int j = 0; j < K; ++j) {
      EXPECT(i32(p.topk_ids)[t * K + j] == chosen[j], "topk_ids[%d][%d] is %d, expected %d", t, j, i32(p.topk_ids)[t * K + j], chosen[j]);
      near("topk_weights", t * K + j, f32(p.topk_weights)[t * K + j], exp(logits[chosen[j]]) / sum);
    }
  }
  expect_maps("moe_gate", i32(p.topk_ids), &p.expert_offsets, &p.sorted_slots, &p.slot_rows);
}

static void sort(const mixtral_context *context) {
  mixtral_moe_sort_params p;
  int32_t ids[S];
  find_case("moe_sort")->make(&p);
  memcpy(ids, p.topk_ids.data, sizeof ids);
  run("moe_sort", context, &p);
  expect_maps("moe_sort", ids, &p.expert_offsets, &p.sorted_slots, &p.slot_rows);
  p.topk_ids.data = memcpy(array(I64, 2, T, K, 0, 0).data, ids, sizeof ids); /* the same as int64, strided */
  p.topk_ids.dtype = I64;
  for (int s = S - 1; s >= 0; --s) ((int64_t *)p.topk_ids.data)[s] = ids[s] < 0 ? INT64_MIN : ids[s];
  run("moe_sort", context, &p);
  expect_maps("moe_sort of int64", ids, &p.expert_offsets, &p.sorted_slots, &p.slot_rows);
}

static void permute(const mixtral_context *context) {
  mixtral_moe_permute_params p;
  find_case("moe_permute")->make(&p);
  run("moe_permute", context, &p);
  for (int r = 0; r < S; ++r) {
    const int slot = i32(p.sorted_slots)[r];
    const float *row = f32(p.rows) + r * H;
    if (slot < 0)
      untouched("rows", row, H);
    else
      EXPECT(!memcmp(row, f32(p.hidden) + slot / K * H, H * sizeof *row), "rows[%d] is not hidden[%d]", r, slot / K);
  }
}

static void combine(const mixtral_context *context) {
  mixtral_moe_combine_params p;
  find_case("moe_combine")->make(&p);
  for (int s = 0; s < S; ++s)
    if (i32(p.slot_rows)[s] < 0) f32(p.topk_weights)[s] = NAN; /* not read */
  run("moe_combine", context, &p);
  for (int i = 0; i < T * H; ++i) {
    double sum = 0;
    for (int j = 0; j < K; ++j) {
      const int slot = i / H * K + j, row = i32(p.slot_rows)[slot];
      if (row >= 0) sum += (double)f32(p.topk_weights)[slot] * f32(p.rows)[row * H + i % H];
    }
    near("moe_combine", i, f32(p.out)[i], sum);
  }
}

static int expert_of(const int32_t *offsets, int row) {
  int e = 0;
  while (row >= offsets[e + 1]) ++e;
  return e;
}

static void gemm(const mixtral_context *context) {
  mixtral_grouped_gemm_params p;
  find_case("grouped_gemm")->make(&p);
  i32(p.a_rows)[8] = i32(p.a_rows)[9] = INT32_MAX; /* past the last offset: not read */
  run("grouped_gemm", context, &p);
  for (int r = 0; r < 8; ++r)
    for (int n = 0; n < I; ++n)
      near("grouped_gemm", r * I + n, f32(p.out)[r * I + n],
           dot(f32(p.a) + i32(p.a_rows)[r] / K * H, f32(p.b) + (expert_of(i32(p.expert_offsets), r) * I + n) * H, H));
  untouched("grouped_gemm", f32(p.out) + 8 * I, 2 * I);
}

static double silu(double x) { return x / (1 + exp(-x)); }

static void gemm_swiglu(const mixtral_context *context) {
  mixtral_grouped_gemm_swiglu_params p;
  find_case("grouped_gemm_swiglu")->make(&p);
  i32(p.a_rows)[8] = i32(p.a_rows)[9] = INT32_MAX;
  run("grouped_gemm_swiglu", context, &p);
  for (int r = 0; r < 8; ++r)
    for (int n = 0; n < I; ++n) {
      const float *x = f32(p.a) + i32(p.a_rows)[r] / K * H;
      const float *w = f32(p.w_gate_up) + (expert_of(i32(p.expert_offsets), r) * 2 * I + n) * H;
      near("grouped_gemm_swiglu", r * I + n, f32(p.out)[r * I + n], silu(dot(x, w, H)) * dot(x, w + I * H, H));
    }
  untouched("grouped_gemm_swiglu", f32(p.out) + 8 * I, 2 * I);
}

static void experts(const mixtral_context *context, const char *label) {
  mixtral_moe_experts_params p;
  mixtral_moe_sort_params sort_case;
  int32_t ids[S];
  find_case("moe_sort")->make(&sort_case); /* both forms of the call use these ids */
  memcpy(ids, sort_case.topk_ids.data, sizeof ids);
  find_case(label)->make(&p);
  for (int s = 0; s < S; ++s)
    if (ids[s] < 0 || ids[s] >= E) f32(p.topk_weights)[s] = NAN;
  run(label, context, &p);
  for (int t = 0; t < T; ++t)
    for (int h = 0; h < H; ++h) {
      double sum = 0;
      for (int j = 0; j < K; ++j) {
        const int e = ids[t * K + j];
        const float *x = f32(p.hidden) + t * H;
        if (e < 0 || e >= E) continue;
        for (int i = 0; i < I; ++i) {
          const float *w = f32(p.w_gate_up) + (e * 2 * I + i) * H;
          sum += f32(p.topk_weights)[t * K + j] * silu(dot(x, w, H)) * dot(x, w + I * H, H) * f32(p.w_down)[(e * H + h) * I + i];
        }
      }
      near(label, t * H + h, f32(p.out)[t * H + h], sum);
    }
}

void test_routing_and_gemm_values(const mixtral_context *context) {
  gate(context, 1);
  gate(context, 0);
  sort(context);
  permute(context);
  combine(context);
  gemm(context);
  gemm_swiglu(context);
  experts(context, "moe_experts");
  experts(context, "moe_experts_sorting");
}
