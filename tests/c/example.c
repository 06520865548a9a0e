/* One Mixtral expert layer on the CPU: route 4 tokens to 2 of 8 experts each, then run the experts. */
#include <mixtral_ext.h>
#include <stdio.h>
#include <stdlib.h>

/* A contiguous array of up to three dimensions (the unused ones are 0), filled with numbers in [-0.5, 0.5). */
static mixtral_tensor array(int32_t dtype, int64_t d0, int64_t d1, int64_t d2) {
  mixtral_tensor t = {NULL, dtype, d2 ? 3 : d1 ? 2 : 1, {d0, d1, d2, 0}, {0, 0, 0, 0}};
  int64_t i, count = 1;
  for (i = t.ndim - 1; i >= 0; count *= t.shape[i--]) t.stride[i] = count;
  t.data = malloc((size_t)count * 4);
  if (dtype == MIXTRAL_DTYPE_F32)
    for (i = 0; i < count; ++i) ((float *)t.data)[i] = (float)(i * 7919 % 1000) / 1000 - 0.5f;
  return t;
}

int main(void) {
  enum { T = 4, E = 8, K = 2, H = 64, I = 128, F32 = MIXTRAL_DTYPE_F32, I32 = MIXTRAL_DTYPE_I32 };
  mixtral_context_options options = {.struct_size = sizeof options, .device_type = MIXTRAL_DEVICE_CPU};
  mixtral_moe_gate_params gate = {.struct_size = sizeof gate, .router_logits = array(F32, T, E, 0), .top_k = K,
      .renormalize = 1, .topk_weights = array(F32, T, K, 0), .topk_ids = array(I32, T, K, 0),
      .expert_offsets = array(I32, E + 1, 0, 0), .sorted_slots = array(I32, T * K, 0, 0), .slot_rows = array(I32, T, K, 0)};
  mixtral_moe_experts_params experts = {.struct_size = sizeof experts, .hidden = array(F32, T, H, 0),
      .w_gate_up = array(F32, E, 2 * I, H), .w_down = array(F32, E, H, I), .topk_weights = gate.topk_weights,
      .topk_ids = gate.topk_ids, .expert_offsets = gate.expert_offsets, .sorted_slots = gate.sorted_slots,
      .slot_rows = gate.slot_rows, .out = array(F32, T, H, 0)};
  mixtral_context *context;
  size_t bytes;
  int t;

  if (mixtral_context_create(&options, &context) != MIXTRAL_OK ||
      mixtral_moe_gate(context, &gate, NULL, 0, NULL) != MIXTRAL_OK ||
      (bytes = mixtral_moe_experts_workspace_size(context, &experts)) == 0 ||
      mixtral_moe_experts(context, &experts, malloc(bytes), bytes, NULL) != MIXTRAL_OK) {
    fprintf(stderr, "%s\n", mixtral_last_error());
    return 1;
  }
  for (t = 0; t < T; ++t) {
    const int *ids = (const int *)gate.topk_ids.data + t * K;
    const float *weights = (const float *)gate.topk_weights.data + t * K, *out = (const float *)experts.out.data + t * H;
    printf("token %d: experts %d (%.3f) and %d (%.3f), out %.5f %.5f ...\n", t, ids[0], weights[0], ids[1], weights[1],
           out[0], out[1]);
  }
  mixtral_context_destroy(context);
  return 0;
}
