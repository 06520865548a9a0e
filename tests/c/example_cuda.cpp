// One Mixtral expert layer on an NVIDIA GPU: captured in a CUDA graph once, then replayed for other tokens, which the router sends to
// other experts. Host code alone, so any C++17 compiler will do; it links libmixtral_ext and the CUDA runtime.
#include <cuda_bf16.h>
#include <cuda_runtime_api.h>
#include <mixtral_ext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

constexpr int T = 4, E = 8, K = 2, H = 64, I = 128;  // tokens, experts, experts per token, hidden and intermediate size

static void check(bool ok, const char *message) {
  if (!ok) fprintf(stderr, "%s\n", message), exit(1);
}
static void check(cudaError_t error) { check(error == cudaSuccess, cudaGetErrorString(error)); }
static void check(mixtral_status status) { check(status == MIXTRAL_OK, mixtral_last_error()); }

// A contiguous array in device memory, of up to three dimensions (the unused ones are 0).
static mixtral_tensor array(int32_t dtype, int64_t d0, int64_t d1 = 0, int64_t d2 = 0) {
  mixtral_tensor t = {nullptr, dtype, d2 ? 3 : d1 ? 2 : 1, {d0, d1, d2, 0}, {0, 0, 0, 0}};
  int64_t count = 1;
  for (int i = t.ndim - 1; i >= 0; count *= t.shape[i--]) t.stride[i] = count;
  check(cudaMalloc(&t.data, (size_t)count * (dtype == MIXTRAL_DTYPE_BF16 ? 2 : 4)));
  return t;
}

// Numbers in (-0.5, 0.5) that are exact in bf16, from the `first` of a sequence on. The copy has read them when it returns.
static void fill(const mixtral_tensor &t, int64_t first, cudaStream_t stream) {
  std::vector<__nv_bfloat16> numbers((size_t)(t.shape[0] * t.stride[0]));
  for (__nv_bfloat16 &number : numbers) number = __float2bfloat16((float)(first++ * 7919 % 251 - 125) / 256);
  check(cudaMemcpyAsync(t.data, numbers.data(), numbers.size() * 2, cudaMemcpyHostToDevice, stream));
}

int main() {
  mixtral_context_options options = {};  // device_index 0: it has to be the thread's current device, as it is from the beginning
  options.struct_size = sizeof options;
  options.device_type = MIXTRAL_DEVICE_CUDA;
  mixtral_context *context;
  cudaStream_t stream;
  check(mixtral_context_create(&options, &context));
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
