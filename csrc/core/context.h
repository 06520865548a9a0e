// What a mixtral_context holds, and how kernels use the caller's thread pool.
#pragma once
#include "../include/mixtral_ext.h"

struct mixtral_context {
  int32_t device_type;
  int32_t device_index;
  mixtral_arch arch;  // never AUTO
  mixtral_parallel_for pool_run;
  void *pool;
  int32_t sm_count;            // CUDA: multiprocessors
  int32_t compute_capability;  // CUDA: major * 10 + minor
  bool overlaps_kernels;       // CUDA: a kernel may be launched to begin before the one ahead of it ends (common/overlap.cuh)
};

namespace mixtral {

// body(i) for every i in [0, count), on the caller's pool. The closure is this file's caller's own type, so each
// instantiation stays local to its translation unit.
template <class Body>
static void parallel_for(const mixtral_context &context, int64_t count, const Body &body) {
  if (!context.pool_run || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  context.pool_run(context.pool, count, [](void *data, int64_t i) { (*static_cast<const Body *>(data))(i); },
                   const_cast<Body *>(&body));
}

}  // namespace mixtral
