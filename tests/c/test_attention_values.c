/* The attention ops and the rotary embedding once each, against the header's formulas in double. */
#include "cases.h"
#include <math.h>

#define f32(t) ((float *)(t).data)
#define i32(t) ((int32_t *)(t).data)

static void near(const char *what, int64_t i, float got, double expected) {
  EXPECT(fabs(got - expected) <= 1e-5 * (1 + fabs(expected)), "%s[%d]: %.8g, expected %.8g", what, (int)i, got, expected);
}

static void untouched(const char *what, const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) EXPECT(((const unsigned char *)data)[i] == 0x7f, "%s: byte %d was written", what, (int)i);
}

/* One query of one head over the keys first .. last (one pointer a position) against `out` and `lse`. */
static void expect_query(const char *what, const float *q, const float **keys, const float **values, int first, int last,
                         double scale, const float *out, const float *lse) {
  double sum = 0, score[64], expected[D] = {0};
  if (first < 0) first = 0;
  for (int j = first; j <= last; ++j) {
    score[j] = 0;
    for (int d = 0; d < D; ++d) score[j] += (double)q[d] * keys[j][d];
    score[j] = exp(scale * score[j]);
    sum += score[j];
    for (int d = 0; d < D; ++d) expected[d] += score[j] * values[j][d];
  }
  for (int d = 0; d < D; ++d) near(what, d, out[d], last < first ? 0 : expected[d] / sum);
  if (last < first)
    EXPECT(*lse == -HUGE_VALF, "%s: lse of a query without keys is %g", what, *lse);
  else
    near(what, -1, *lse, log(sum));
}

static void run(const char *label, const mixtral_context *context, void *params) {
  EXPECT(run_case(find_case(label), context, params) == MIXTRAL_OK, "%s: %s", label, mixtral_last_error());
}

static void packed(const mixtral_context *context) {
  mixtral_sliding_window_attention_params p;
  find_case("attention_packed")->make(&p);
  run("attention_packed", context, &p);
  for (int b = 0; b < PACKED_B; ++b) {
    const int q0 = i32(p.cu_seqlens_q)[b], k0 = i32(p.cu_seqlens_k)[b];
    const int n = i32(p.cu_seqlens_q)[b + 1] - q0, m = i32(p.cu_seqlens_k)[b + 1] - k0;
    for (int i = 0; i < n; ++i)
      for (int h = 0; h < HQ; ++h) {
        const int last = m - n + i; /* below 0: sees nothing */
        const float *keys[TK], *values[TK];
        for (int j = 0; j < m; ++j) {
          keys[j] = f32(p.k) + ((k0 + j) * HK + h / (HQ / HK)) * D;
          values[j] = f32(p.v) + ((k0 + j) * HK + h / (HQ / HK)) * D;
        }
        expect_query("packed", f32(p.q) + ((q0 + i) * HQ + h) * D, keys, values, last - W + 1, last, 0.125,
                     f32(p.out) + ((q0 + i) * HQ + h) * D, f32(p.lse) + h * TQ + q0 + i);
      }
  }
  untouched("query of no sequence", f32(p.out) + 7 * HQ * D, HQ * D * sizeof(float));
}

static void batched(const mixtral_context *context) {
  mixtral_sliding_window_attention_params p;
  find_case("attention_batched")->make(&p);
  for (int i = 0; i < HK * D; ++i) { /* keys outside k_start and k_length: not read */
    f32(p.k)[5 * HK * D + i] = f32(p.v)[5 * HK * D + i] = NAN;
    for (int j = 0; j < 2; ++j) f32(p.k)[((SK + j) * HK) * D + i] = f32(p.v)[((SK + j) * HK) * D + i] = NAN;
  }
  run("attention_batched", context, &p);
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < SQ; ++i)
      for (int h = 0; h < HQ; ++h) {
        const int start = i32(p.k_start)[b], last = i32(p.k_length)[b] - SQ + i;
        const float *keys[SK], *values[SK];
        for (int j = 0; start + j < SK; ++j) {
          keys[j] = f32(p.k) + ((b * SK + start + j) * HK + h / (HQ / HK)) * D;
          values[j] = f32(p.v) + ((b * SK + start + j) * HK + h / (HQ / HK)) * D;
        }
        expect_query("batched", f32(p.q) + ((b * SQ + i) * HQ + h) * D, keys, values, last - W + 1, last, 0.25,
                     f32(p.out) + ((b * SQ + i) * HQ + h) * D, f32(p.lse) + (b * HQ + h) * SQ + i);
      }
}

/* One head at `position`, half-split or interleaved. */
static void rotate(const float *x, int64_t position, int interleaved, float *out) {
  for (int i = 0; i < D / 2; ++i) {
    const int first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + D / 2;
    const double angle = (double)position * pow(10000, -2.0 * i / D);
    out[first] = (float)(x[first] * cos(angle) - x[second] * sin(angle));
    out[second] = (float)(x[first] * sin(angle) + x[second] * cos(angle));
  }
}

static void rope(const mixtral_context *context, int interleaved) {
  mixtral_apply_rope_params p;
  float q[T * HQ * D], k[T * HK * D], expected[D];
  find_case("apply_rope")->make(&p);
  p.interleaved = interleaved;
  memcpy(q, p.q.data, sizeof q);
  memcpy(k, p.k.data, sizeof k);
  run("apply_rope", context, &p);
  for (int head = 0; head < T * HQ; ++head) {
    rotate(q + head * D, i32(p.positions)[head / HQ], interleaved, expected);
    for (int d = 0; d < D; ++d) EXPECT(fabs(f32(p.q)[head * D + d] - expected[d]) < 1e-4, "q[%d][%d]: %g, expected %g", head, d, f32(p.q)[head * D + d], expected[d]);
  }
  for (int head = 0; head < T * HK; ++head) {
    rotate(k + head * D, i32(p.positions)[head / HK], interleaved, expected);
    for (int d = 0; d < D; ++d) EXPECT(fabs(f32(p.k)[head * D + d] - expected[d]) < 1e-4, "k[%d][%d]: %g, expected %g", head, d, f32(p.k)[head * D + d], expected[d]);
  }
}

static void rolling(const mixtral_context *context) {
  enum { ROW = HK * D, RING = SLOTS * C * ROW };
  static float k_ring[RING], v_ring[RING];
  mixtral_rolling_attention_params p;
  find_case("rolling_attention")->make(&p);
  /* Ring slots nothing was stored in: sequence 1 (ring 0) has seen 2 tokens; ring 1 is nobody's. */
  for (int i = 2 * ROW; i < 2 * C * ROW; ++i) f32(p.k_cache)[i] = f32(p.v_cache)[i] = NAN;
  memcpy(k_ring, p.k_cache.data, sizeof k_ring);
  memcpy(v_ring, p.v_cache.data, sizeof v_ring);
  run("rolling_attention", context, &p);

  for (int b = 0; b < B; ++b) {
    const int t0 = i32(p.cu_seqlens_q)[b], n = i32(p.cu_seqlens_q)[b + 1] - t0, length = i32(p.cache_lengths)[b];
    const int ring = i32(p.cache_slots)[b] * C * ROW;
    float k_new[3][ROW];
    for (int i = 0; i < n; ++i)
      for (int h = 0; h < HK; ++h) rotate(f32(p.k) + ((t0 + i) * HK + h) * D, length + i, 0, k_new[i] + h * D);
    for (int i = 0; i < n; ++i)
      for (int h = 0; h < HQ; ++h) {
        const int head = h / (HQ / HK) * D, position = length + i;
        const float *keys[16], *values[16];
        float q[D];
        for (int j = 0; j <= position; ++j) { /* positions below length - C are overwritten, and out of the window */
          keys[j] = j < length ? k_ring + ring + j % C * ROW + head : k_new[j - length] + head;
          values[j] = j < length ? v_ring + ring + j % C * ROW + head : f32(p.v) + (t0 + j - length) * ROW + head;
        }
        rotate(f32(p.q) + ((t0 + i) * HQ + h) * D, position, 0, q);
        expect_query("rolling", q, keys, values, position - W + 1, position, 0.125, f32(p.out) + ((t0 + i) * HQ + h) * D,
                     f32(p.lse) + h * NEW + t0 + i);
      }
    for (int i = 0; i < n; ++i) { /* then the chunk is in the ring; what it should hold goes into our copy */
      const int at = ring + (length + i) % C * ROW;
      for (int d = 0; d < ROW; ++d) near("stored key", d, f32(p.k_cache)[at + d], k_new[i][d]);
      memcpy(k_ring + at, f32(p.k_cache) + at, ROW * sizeof(float));
      memcpy(v_ring + at, f32(p.v) + (t0 + i) * ROW, ROW * sizeof(float));
    }
  }
  EXPECT(!memcmp(k_ring, p.k_cache.data, sizeof k_ring), "keys were stored elsewhere");
  EXPECT(!memcmp(v_ring, p.v_cache.data, sizeof v_ring), "values are wrong or were stored elsewhere");
  untouched("query of no sequence", f32(p.out) + 5 * HQ * D, HQ * D * sizeof(float));
}

void test_attention_values(const mixtral_context *context) {
  packed(context);
  batched(context);
  rope(context, 0);
  rope(context, 1);
  rolling(context);
}
