// One Mixtral expert layer on an NVIDIA GPU: captured in a CUDA graph once, then replayed for other tokens, which the router sends to
// other experts. Host code alone, so any C++17 compiler will do; it links libmixtral_ext and the CUDA runtime.
#include "example_cuda.h"

#include <algorithm>

constexpr int T = 4, E = 8, K = 2, H = 64, I = 128;  // tokens, experts, experts per token, hidden and intermediate size

int main() {
  mixtral_context *context = cuda_context();
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  mixtral_moe_gate_params gate = {};
  gate.struct_size = sizeof gate;
  gate.router_logits = array(MIXTRAL_DTYPE_BF16, T, E);
  gate.top_k = K;
  gate.renormalize = 1;
  gate.topk_weights = array(MIXTRAL_DTYPE_F32, T, K);
  gate.topk_ids = array(MIXTRAL_DTYPE_I32, T, K);
  gate.expert_offsets = array(MIXTRAL_DTYPE_I32, E + 1);
  gate.sorted_slots = array(MIXTRAL_DTYPE_I32, T * K);
  gate.slot_rows = array(MIXTRAL_DTYPE_I32, T, K);

  mixtral_moe_experts_params experts = {};
  experts.struct_size = sizeof experts;
  experts.hidden = array(MIXTRAL_DTYPE_BF16, T, H);
  experts.w_gate_up = array(MIXTRAL_DTYPE_BF16, E, 2 * I, H);
  experts.w_down = array(MIXTRAL_DTYPE_BF16, E, H, I);
  experts.topk_weights = gate.topk_weights;
  experts.topk_ids = gate.topk_ids;
  experts.expert_offsets = gate.expert_offsets;
  experts.sorted_slots = gate.sorted_slots;
  experts.slot_rows = gate.slot_rows;
  experts.out = array(MIXTRAL_DTYPE_BF16, T, H);
  fill(experts.w_gate_up, 0, stream);
  fill(experts.w_down, 0, stream);

  const size_t bytes = std::max(mixtral_moe_gate_workspace_size(context, &gate), mixtral_moe_experts_workspace_size(context, &experts));
  void *workspace;  // one for both: they run one after the other
  cudaGraph_t graph;
  cudaGraphExec_t layer;
  check(cudaMalloc(&workspace, bytes));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  check(mixtral_moe_gate(context, &gate, workspace, bytes, stream));
  check(mixtral_moe_experts(context, &experts, workspace, bytes, stream));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&layer, graph, 0));

  for (int launch = 0; launch < 2; ++launch) {
    int32_t ids[T][K];
    float weights[T][K];
    __nv_bfloat16 out[T][H];
    fill(gate.router_logits, 12 * launch, stream);  // other tokens in the same arrays
    fill(experts.hidden, 12 * launch, stream);
    check(cudaGraphLaunch(layer, stream));
    check(cudaMemcpyAsync(ids, gate.topk_ids.data, sizeof ids, cudaMemcpyDeviceToHost, stream));
    check(cudaMemcpyAsync(weights, gate.topk_weights.data, sizeof weights, cudaMemcpyDeviceToHost, stream));
    check(cudaMemcpyAsync(out, experts.out.data, sizeof out, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    for (int t = 0; t < T; ++t)
      printf("launch %d, token %d: experts %d (%.3f) and %d (%.3f), out %.5f %.5f ...\n", launch, t, ids[t][0], weights[t][0], ids[t][1],
             weights[t][1], (float)out[t][0], (float)out[t][1]);
  }
  mixtral_context_destroy(context);
}
