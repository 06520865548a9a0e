// Router on the CPU: top-k by insertion, softmax, then the counting sort of moe_sort.
//
//   per token   read E logits, write K weights and ids      E*K compares at worst, K or E expf
//   per call    two serial passes over T*K ids (count, place): about 1 ns an id, 0.3 ms at T = 128k, K = 2
#include <cmath>

#include "element.h"
#include "moe_routing.h"
#include "ops.h"

namespace mixtral::cpu {
namespace {

constexpr int64_t kBlock = 64;  // tokens a task

// NaN above everything; equal values (also -0 and +0) are not better, so the lower expert id, seen first, stays ahead.
bool better(float a, float b) { return a > b || (a != a && b == b); }

// logits [E] -> the K best in order.
void gate_token(const float *logits, int experts, int top_k, bool renormalize, float *weights, int32_t *ids) {
  float best[MIXTRAL_MAX_TOP_K];
  int found = 0;
  for (int e = 0; e < experts; ++e) {
    if (found == top_k && !better(logits[e], best[found - 1])) continue;
    int j = found < top_k ? found++ : found - 1;
    for (; j > 0 && better(logits[e], best[j - 1]); --j) {
      best[j] = best[j - 1];
      ids[j] = ids[j - 1];
    }
    best[j] = logits[e];
    ids[j] = e;
  }
  // softmax, exp(x - max) / sum: best[0] is the maximum of all logits, or NaN, which then reaches every weight.
  float sum = 0;
  if (renormalize)
    for (int j = 0; j < top_k; ++j) sum += expf(best[j] - best[0]);
  else
    for (int e = 0; e < experts; ++e) sum += expf(logits[e] - best[0]);
  for (int j = 0; j < top_k; ++j) weights[j] = expf(best[j] - best[0]) / sum;
}

}  // namespace

mixtral_status moe_gate(const mixtral_context &context, const mixtral_moe_gate_params &p) {
  const int64_t tokens = p.router_logits.shape[0], stride = p.router_logits.stride[0];
  const int experts = (int)p.router_logits.shape[1], top_k = p.top_k;
  float *weights = (float *)p.topk_weights.data;
  int32_t *ids = (int32_t *)p.topk_ids.data;

  with_float_type(p.router_logits.dtype, [&](auto type) {
    using T = decltype(type);
    const T *logits = (const T *)p.router_logits.data;
    parallel_for(context, (tokens + kBlock - 1) / kBlock, [&](int64_t block) {
      const int64_t end = block * kBlock + kBlock < tokens ? block * kBlock + kBlock : tokens;
      for (int64_t t = block * kBlock; t < end; ++t) {
        float row[MIXTRAL_MAX_EXPERTS];
        for (int e = 0; e < experts; ++e) row[e] = to_float(logits[t * stride + e]);
        gate_token(row, experts, top_k, p.renormalize, weights + t * top_k, ids + t * top_k);
      }
    });
  });
  sort_slots(ids, top_k, tokens, top_k, experts, p.expert_offsets, p.sorted_slots, p.slot_rows);
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
