// Control flow that takes lanes apart, for test_divergence.py, which computes the same in Python.
#include <cstdint>

#define KERNEL extern "C" __global__ void
#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)

KERNEL nested(const int *x, int *out) {
  const int t = THREAD, v = x[t];
  int r = 0;
  if (v & 1) {
    if (v & 2) {
      r = v * 3;
      if (v & 4) r += x[t ^ 1];
      else r -= x[t ^ 2];
    } else {
      r = v ^ 0x55;
    }
    r += 1;
  } else if (v & 8) {
    for (int i = 0; i < (v & 7); ++i) r += i * v;
  } else {
    r = -v;
  }
  out[t] = r + t;
}

KERNEL trip_counts(const int *x, int *out) {
  int r = 0;
  for (int i = 0; i < x[THREAD] % 50; ++i) r = r * 5 + i;
  out[THREAD] = r;
}

KERNEL break_continue(const int *x, int *out) {
  const int v = x[THREAD];
  int r = 0;
  for (int i = 0; i < 40; ++i) {
    if ((i + v) % 7 == 3) continue;
    if (i * 3 > v % 100) break;
    for (int j = 0;; ++j) {
      if (j == i % 5 + v % 3) break;
      if ((j ^ i) & 1) continue;
      r += j * i + 1;
    }
    r ^= i;
  }
  out[THREAD] = r;
}

KERNEL goto_out(const int *x, int *out) {
  const int v = x[THREAD];
  int r = 0, i, j, k;
  for (i = 0; i < 6; ++i)
    for (j = 0; j < 6; ++j)
      for (k = 0; k < 6; ++k) {
        r += i * 36 + j * 6 + k;
        if (r > v % 3000) goto done;
        if (k > v % 5) goto next;
      }
next:
  r = -r;
done:
  out[THREAD] = r * 10 + i;
}

KERNEL early_return(const int *x, int *out) {
  const int v = x[THREAD];
  if (v % 3 == 0) return;
  int r = v;
  while (r > 5) {
    r = r & 1 ? r - 3 : r / 2;
    if (r == 4) {
      out[THREAD] = -1;
      return;
    }
  }
  out[THREAD] = r;
}

KERNEL many_cases(const int *x, int *out) {
  const int v = x[THREAD];
  int r = 0;
  for (int i = 0; i < 5; ++i)
    switch ((v >> i * 3) & 7) {
      case 0: r += 10; break;
      case 1: r *= 3;  // and on
      case 2: r -= 4; break;
      case 3:
        if (r & 1) break;
        r ^= 0xff;
        break;
      case 4: r = r << 1 | 1; break;
      case 6: out[THREAD] = r; return;
      default: r += v & 15;
    }
  out[THREAD] = r + 1000;
}

KERNEL collatz(const int *x, int *out) {
  uint32_t v = x[THREAD] % 1000 + 1;
  int steps = 0;
  while (v != 1) {
    v = v % 2 ? 3 * v + 1 : v / 2;
    ++steps;
  }
  out[THREAD] = steps;
}

KERNEL short_circuit(const int *x, int *out) {
  const int t = THREAD, v = x[t];
  int calls = 0;
  const auto say = [&](int value) { return ++calls, value != 0; };
  const bool r = (say(v & 1) && (say(v & 2) || say(v & 4))) || (say(v & 8) && !say(v & 16));
  out[t] = calls * 2 + r;
}

KERNEL do_while(const int *x, int *out) {
  const int t = THREAD;
  int64_t r = x[t];
  do {
    if (r % 5 == 2) r -= 2;
    else if (r % 5 == 4) continue;
    r = r * 3 / 4 - 1;
  } while (r > 10 && r % 5 != 4);
  out[t] = (int)r;
}

// Shared memory and collectives under divergence.
KERNEL reduce_odd_and_even(const int *x, int *out) {
  __shared__ int sums[2];
  const int t = threadIdx.x, v = x[THREAD];
  if (t < 2) sums[t] = 0;
  __syncthreads();
  if (v & 1) {
    const unsigned mask = __activemask();
    const int sum = __reduce_add_sync(mask, v);
    if (__ffs(mask) - 1 == t % 32) atomicAdd(&sums[1], sum);
  } else {
    atomicAdd(&sums[0], v);
  }
  __syncthreads();
  out[THREAD] = sums[t & 1];
}

KERNEL both_arms_shuffle(const int *x, int *out) {
  const int v = x[THREAD];
  int r;
  if (v % 3 == 0) {
    r = __shfl_xor_sync(~0u, v + 1, 5);
    r *= 2;
  } else {
    r = __shfl_xor_sync(~0u, v - 1, 5);
    for (int i = 0; i < v % 4; ++i) r += i;
  }
  out[THREAD] = r + __popc(__ballot_sync(~0u, v & 1));
}

// Work of all lanes behind a divergent part, for the counters: 64 additions in f32 each.
template <int kPart>
__device__ void together(const float *x, float *out, int n) {
  float v = x[THREAD], r = 0;
  const int lane = threadIdx.x % 32;
  if (kPart == 1) {
    if (lane < 7) r = __fmul_rn(v, 2.0f);
    else r = __fmul_rn(r + v, v);
  } else if (kPart == 2) {
#pragma unroll 1
    for (int i = 0; i < lane; ++i) r = __fmul_rn(r, v);
  } else if (kPart == 3) {
#pragma unroll 1
    for (int i = 0; i < n; ++i) {
#pragma unroll 1
      for (int j = 0; j < 100; ++j)
        if (j * lane > 200 + i) break;
      if (lane == i) continue;
      r = __fmul_rn(r, v);
    }
  }
#pragma unroll 1
  for (int i = 0; i < 64; ++i) r = __fadd_rn(r, v);
  out[THREAD] = r;
}
KERNEL together_0(const float *x, float *out, int n) { together<0>(x, out, n); }
KERNEL together_1(const float *x, float *out, int n) { together<1>(x, out, n); }
KERNEL together_2(const float *x, float *out, int n) { together<2>(x, out, n); }
KERNEL together_3(const float *x, float *out, int n) { together<3>(x, out, n); }

KERNEL places(uint32_t *out) {
  const uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z), size = blockDim.x * blockDim.y * blockDim.z;
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  uint32_t *mine = out + (block * size + thread) * 17, lane, warp, warps, lt, le, eq, ge, gt;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  asm("mov.u32 %0, %%warpid;" : "=r"(warp));
  asm("mov.u32 %0, %%nwarpid;" : "=r"(warps));
  asm("mov.u32 %0, %%lanemask_lt;" : "=r"(lt));
  asm("mov.u32 %0, %%lanemask_eq;" : "=r"(eq));
  asm("mov.u32 %0, %%lanemask_ge;" : "=r"(ge));
  asm("mov.u32 %0, %%lanemask_le;" : "=r"(le));
  asm("mov.u32 %0, %%lanemask_gt;" : "=r"(gt));
  const uint32_t values[17] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z,
                               blockDim.x * 10000 + blockDim.y * 100 + blockDim.z,
                               gridDim.x * 10000 + gridDim.y * 100 + gridDim.z, lane, warp, warps, __activemask(), lt, le, eq, ge, gt};
  for (int i = 0; i < 17; ++i) mine[i] = values[i];
}
