// Threads that talk through strong accesses (volatile, relaxed): nothing here is a data race, so what is missing shows only where
// a load returns an older value, as it may. kRight: with the fence or barrier.
#include <cuda/atomic>

using Shared = cuda::atomic_ref<int, cuda::thread_scope_device>;
constexpr auto kRelaxed = cuda::memory_order_relaxed;

// The sum of x over all blocks before, handed from block to block: out[b] = x[0] + ... + x[b].
template <bool kRight>
__device__ void chained_sum(const int *x, volatile int *sums, volatile int *flags, int *out) {
  if (threadIdx.x) return;
  const int b = blockIdx.x;
  int sum = x[b];
  if (b) {
    while (!flags[b - 1]) {}
    __threadfence();
    sum += sums[b - 1];
  }
  sums[b] = sum;
  if (kRight) __threadfence();
  flags[b] = 1;
  out[b] = sum;
}
extern "C" __global__ void chained_sum_right(const int *x, int *sums, int *flags, int *out) { chained_sum<true>(x, sums, flags, out); }
extern "C" __global__ void chained_sum_wrong(const int *x, int *sums, int *flags, int *out) { chained_sum<false>(x, sums, flags, out); }

// A warp's sum through volatile shared memory, as before Volta.
template <bool kRight>
__device__ void volatile_sum(const int *x, int *out) {
  __shared__ int memory[64];
  volatile int *s = memory;
  const int t = threadIdx.x;
  s[t] = x[t];
  s[t + 32] = 0;
  for (int step = 16; step; step /= 2) {
    if (kRight) __syncwarp();
    const int other = s[t + step];
    if (kRight) __syncwarp();
    s[t] = s[t] + other;
  }
  if (t == 0) *out = s[0];
}
extern "C" __global__ void volatile_sum_right(const int *x, int *out) { volatile_sum<true>(x, out); }
extern "C" __global__ void volatile_sum_wrong(const int *x, int *out) { volatile_sum<false>(x, out); }

// Block 0 sends a message: it is there when the flag is.
template <bool kWriter, bool kReader>
__device__ void message(int *data, int *flag, int *out) {
  if (threadIdx.x) return;
  if (blockIdx.x == 0) {
    Shared(*data).store(7, kRelaxed);
    Shared(*flag).store(1, kWriter ? cuda::memory_order_release : kRelaxed);
  } else {
    while (!Shared(*flag).load(kReader ? cuda::memory_order_acquire : kRelaxed)) {}
    *out = Shared(*data).load(kRelaxed);
  }
}
extern "C" __global__ void message_right(int *data, int *flag, int *out) { message<true, true>(data, flag, out); }
extern "C" __global__ void message_no_release(int *data, int *flag, int *out) { message<false, true>(data, flag, out); }
extern "C" __global__ void message_no_acquire(int *data, int *flag, int *out) { message<true, false>(data, flag, out); }

// Each of two blocks writes its own and reads the other's: one of them sees the other's write, if the fences have one order.
template <cuda::memory_order kOrder>
__device__ void both_write(int *x, int *out) {
  if (threadIdx.x) return;
  const int b = blockIdx.x;
  Shared(x[b]).store(1, kRelaxed);
  cuda::atomic_thread_fence(kOrder, cuda::thread_scope_device);
  out[b] = Shared(x[1 - b]).load(kRelaxed);
}
extern "C" __global__ void both_write_right(int *x, int *out) { both_write<cuda::memory_order_seq_cst>(x, out); }
extern "C" __global__ void both_write_wrong(int *x, int *out) { both_write<cuda::memory_order_acq_rel>(x, out); }

// Once a thread of a block has read the newer value it never reads the older one: out[t] counts steps back.
extern "C" __global__ void one_way(int *x, int *out) {
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0)
      for (int i = 1; i <= 40; ++i) Shared(*x).store(i, kRelaxed);
    return;
  }
  int last = 0, back = 0;
  while (last < 40) {
    const int now = Shared(*x).load(kRelaxed);
    back += now < last;
    last = now;
  }
  out[threadIdx.x] = back;
}
