// Times every kernel of the grouped products at the Mixtral layer and checks that all give the same bits: what the table in
// csrc/api/grouped_gemm_config.cpp stands on. From the repository's root, on a machine with a GPU (sm_90: its architecture):
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -I csrc -o grouped_gemm_kernels python/mixtral_bench/grouped_gemm_kernels.cu
//        csrc/cuda/grouped_gemm_sm80.cu csrc/cuda/grouped_gemm_few_rows_sm80.cu csrc/core/error.cpp && ./grouped_gemm_kernels [T ..]
//
// Prints JSON: us of both products (medians), for T tokens of natural routing (two distinct experts of 8, drawn evenly). The weights
// are twice the L2 cache or more.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cuda/common/launch.h"
#include "cuda/grouped_gemm_kernels.h"

namespace {

using namespace mixtral::cuda;

constexpr int64_t kHidden = 4096, kIntermediate = 14336, kTopK = 2;
constexpr int kExperts = 8, kRuns = 21;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  exit(1);
}

// About normal numbers: sums of four uniform ones.
__global__ void fill(__nv_bfloat16 *x, int64_t n, float scale, uint64_t seed) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
    uint64_t bits = (i + seed) * 0x9e3779b97f4a7c15ull;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebull;
    const float sum = (float)(bits & 0xffff) + (float)(bits >> 16 & 0xffff) + (float)(bits >> 32 & 0xffff) + (float)(bits >> 48);
    x[i] = __float2bfloat16((sum / 65536 - 2) * 1.7320508f * scale);
  }
}

__nv_bfloat16 *random_array(int64_t n, float scale) {
  static uint64_t seed = 1;
  __nv_bfloat16 *x;
  check(cudaMalloc(&x, (size_t)n * 2));
  fill<<<1024, 256>>>(x, n, scale, seed += (uint64_t)1 << 40);
  return x;
}

int *device_array(const std::vector<int> &values) {
  int *x;
  check(cudaMalloc(&x, values.size() * 4));
  check(cudaMemcpy(x, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
  return x;
}

struct Choice {
  std::string name;
  int tile_rows, blocks;  // blocks 0: tiles
};

cudaError_t run(const GroupedGemm &g, const Choice &c) {
  return c.blocks ? grouped_gemm_few_rows(g, c.tile_rows, c.blocks, nullptr) : grouped_gemm_tiles(g, c.tile_rows, nullptr);
}

float median_us(const GroupedGemm &g, const Choice &c) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -2; i < kRuns; ++i) {
    check(cudaEventRecord(begin));
    check(run(g, c));
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms * 1000);
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

std::vector<uint16_t> result(const GroupedGemm &g, const Choice &c) {
  std::vector<uint16_t> out((size_t)g.rows * g.n);
  check(cudaMemset(g.out, 0xff, out.size() * 2));
  check(run(g, c));
  check(cudaMemcpy(out.data(), g.out, out.size() * 2, cudaMemcpyDeviceToHost));
  return out;
}

}  // namespace

int main(int argc, char **argv) {
  std::vector<int> tokens;
  for (int i = 1; i < argc; ++i) tokens.push_back(atoi(argv[i]));
  if (tokens.empty()) tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 640, 768, 1024, 2048, 4096};
  const int most = *std::max_element(tokens.begin(), tokens.end());
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  bool overlaps;
  check(grouped_gemm_tiles_init());
  check(grouped_gemm_few_rows_init(&overlaps));
  __nv_bfloat16 *hidden = random_array(most * kHidden, 1), *rows = random_array(most * kTopK * kHidden, 1);
  __nv_bfloat16 *activated = random_array(most * kTopK * kIntermediate, 1);
  __nv_bfloat16 *gate_up = random_array(kExperts * 2 * kIntermediate * kHidden, 1 / 64.0f);
  __nv_bfloat16 *down = random_array(kExperts * kHidden * kIntermediate, 1 / 120.0f);

  printf("{\"device\": \"%s\", \"us\": {", device.name);
  const char *separator = "";
  for (const int T : tokens) {
    std::mt19937 random(1);
    std::vector<int> of_expert[kExperts], slots, offsets = {0};
    for (int t = 0; t < T; ++t) {
      const int first = (int)(random() % kExperts), second = (first + 1 + (int)(random() % (kExperts - 1))) % kExperts;
      of_expert[first].push_back(2 * t);
      of_expert[second].push_back(2 * t + 1);
    }
    for (const auto &list : of_expert) {
      slots.insert(slots.end(), list.begin(), list.end());
      offsets.push_back((int)slots.size());
    }
    int *device_slots = device_array(slots), *device_offsets = device_array(offsets);
    GroupedGemm up = {};
    up.dtype = MIXTRAL_DTYPE_BF16;
    up.swiglu = true;
    up.experts = kExperts;
    up.rows = (int)slots.size();
    up.n = kIntermediate;
    up.k = kHidden;
    up.a = hidden;
    up.a_rows = device_slots;
    up.a_rows_divisor = kTopK;
    up.a_count = T;
    up.w = gate_up;
    up.expert_offsets = device_offsets;
    up.out = activated;
    up.a_stride = up.w_stride = kHidden;
    up.w_expert_stride = 2 * kIntermediate * kHidden;
    up.out_stride = kIntermediate;
    GroupedGemm second = up;
    second.swiglu = false;
    second.n = kHidden;
    second.k = kIntermediate;
    second.a = activated;
    second.a_rows = nullptr;
    second.a_rows_divisor = 1;
    second.a_count = up.rows;
    second.w = down;
    second.out = rows;
    second.a_stride = second.w_stride = kIntermediate;
    second.w_expert_stride = kIntermediate * kHidden;
    second.out_stride = kHidden;

    std::vector<Choice> choices = {{"tiles 64 x 128", 64, 0}, {"tiles 128 x 256", 128, 0}};
    for (const int tile_rows : {8, 16, 32, 64})
      for (const int blocks : {1, 2})
        if (T <= 256)
          choices.push_back({"few " + std::to_string(tile_rows) + ", " + std::to_string(blocks) + " an SM", tile_rows,
                             blocks * device.multiProcessorCount});
    printf("%s\n \"%d\": {", separator, T);
    separator = "";
    for (const GroupedGemm &g : {up, second}) {
      const std::vector<uint16_t> expected = result(g, choices[0]);
      for (const Choice &c : choices)
        if (result(g, c) != expected) fprintf(stderr, "T=%d: %s gives other bits than %s\n", T, c.name.c_str(), choices[0].name.c_str()), exit(1);
    }
    for (const Choice &c : choices) {
      printf("%s\"%s\": [%.1f, %.1f]", separator, c.name.c_str(), median_us(up, c), median_us(second, c));
      separator = ", ";
    }
    printf("}");
    separator = ",";
    fflush(stdout);
    check(cudaFree(device_slots));
    check(cudaFree(device_offsets));
  }
  printf("\n}}\n");
  return 0;
}
