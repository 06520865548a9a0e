// Programmatic dependent launch: a kernel begins while the one before it in the stream ends. Both have to be sm_90 code; in code
// for sm_80 these are empty, and kernels are launched one after the other (mixtral_context::overlaps_kernels).
#pragma once
#include "ptx_sm90.cuh"

namespace mixtral::cuda {

// What kernels before this one wrote is there from here on. Every kernel that may be launched early calls it, so the end of a kernel
// is the end of all before it, too.
__device__ inline void wait_for_kernels_before() {
#if __CUDA_ARCH__ >= 900
  sm90::wait_for_dependencies();
#endif
}

// The next kernel may begin, once all blocks have come here.
__device__ inline void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  sm90::launch_dependents();
#endif
}

}  // namespace mixtral::cuda
