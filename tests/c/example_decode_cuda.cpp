// Decoding with a rolling KV cache on an NVIDIA GPU: a prompt in ragged chunks, then one step captured in a CUDA graph and replayed until
// new tokens lie over old ones in every ring. Host code alone, so any C++17 compiler will do; it links libmixtral_ext and the CUDA runtime.
#include "example_cuda.h"

#include <algorithm>

constexpr int B = 2, HQ = 4, HK = 2, D = 64;     // sequences, query and key heads, head dim
constexpr int W = 20, C = 24;                    // keys that a query sees, slots of a sequence's ring: position p lies in slot p % C
constexpr int PROMPT[][B] = {{7, 30}, {12, 3}};  // new tokens of each sequence, chunk by chunk: also more of them than the ring holds
constexpr int LONGEST = 30, T = 37, STEPS = 8;   // most tokens of a sequence and of all in a chunk; then steps of one token a sequence

int main() {
  mixtral_context *context = cuda_context();
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  mixtral_rolling_attention_params prompt = {};  // of any chunk
  prompt.struct_size = sizeof prompt;
  prompt.q = array(MIXTRAL_DTYPE_BF16, T, HQ, D);
  prompt.k = array(MIXTRAL_DTYPE_BF16, T, HK, D);
  prompt.v = array(MIXTRAL_DTYPE_BF16, T, HK, D);
  prompt.k_cache = array(MIXTRAL_DTYPE_BF16, B, C, HK, D);  // nothing is read of it that no call has stored
  prompt.v_cache = array(MIXTRAL_DTYPE_BF16, B, C, HK, D);
  prompt.cu_seqlens_q = array(MIXTRAL_DTYPE_I32, B + 1);
  prompt.cache_lengths = array(MIXTRAL_DTYPE_I32, B);
  prompt.max_seqlen_q = LONGEST;
  prompt.max_cache_length = -1;  // unknown: sequences grow beyond the ring
  prompt.window = W;
  prompt.rope_theta = 10000;  // the call rotates q and k by their positions
  prompt.out = array(MIXTRAL_DTYPE_BF16, T, HQ, D);

  mixtral_rolling_attention_params step = prompt;  // the same arrays, of whose tokens it takes the first B
  step.q.shape[0] = step.k.shape[0] = step.v.shape[0] = step.out.shape[0] = B;
  step.max_seqlen_q = 1;

  const size_t bytes =
      std::max(mixtral_rolling_attention_workspace_size(context, &prompt), mixtral_rolling_attention_workspace_size(context, &step));
  void *workspace;  // one for all calls: they run one after the other
  check(cudaMalloc(&workspace, bytes));

  // A call's tokens bounds[b] .. bounds[b + 1] - 1 are of sequence b, which had lengths[b] tokens before.
  int32_t bounds[B + 1] = {}, lengths[B] = {};
  int64_t tokens = 0;  // of both before
  const auto set_inputs = [&] {
    fill(prompt.q, tokens * HQ * D, stream);
    fill(prompt.k, tokens * HK * D, stream);
    fill(prompt.v, tokens * HK * D + 1, stream);
    check(cudaMemcpyAsync(prompt.cache_lengths.data, lengths, sizeof lengths, cudaMemcpyHostToDevice, stream));
  };
  const auto show_and_advance = [&](const char *call) {
    __nv_bfloat16 out[T][HQ][D];
    check(cudaMemcpyAsync(out, prompt.out.data, sizeof out, cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
    for (int b = 0; b < B; ++b) {
      lengths[b] += bounds[b + 1] - bounds[b];
      printf("%s, sequence %d, position %d: each head's out begins with", call, b, lengths[b] - 1);
      for (int h = 0; h < HQ; ++h) printf(" %.5f", (float)out[bounds[b + 1] - 1][h][0]);
      printf("\n");
    }
    tokens += bounds[B];
  };

  for (const auto &chunk : PROMPT) {
    for (int b = 0; b < B; ++b) bounds[b + 1] = bounds[b] + chunk[b];
    check(cudaMemcpyAsync(prompt.cu_seqlens_q.data, bounds, sizeof bounds, cudaMemcpyHostToDevice, stream));
    set_inputs();
    check(mixtral_rolling_attention(context, &prompt, workspace, bytes, stream));
    show_and_advance("prompt");
  }

  for (int b = 0; b < B; ++b) bounds[b + 1] = b + 1;
  check(cudaMemcpyAsync(step.cu_seqlens_q.data, bounds, sizeof bounds, cudaMemcpyHostToDevice, stream));
  cudaGraph_t graph;
  cudaGraphExec_t decode;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  check(mixtral_rolling_attention(context, &step, workspace, bytes, stream));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&decode, graph, 0));
  for (int i = 0; i < STEPS; ++i) {
    set_inputs();
    check(cudaGraphLaunch(decode, stream));
    show_and_advance("step");
  }
  mixtral_context_destroy(context);
}
