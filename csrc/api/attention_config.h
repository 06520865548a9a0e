// What the two attention ops share before the kernels: their softmax, and how the work is divided among kernels.
#pragma once
#include "../cuda/attention.h"

namespace mixtral::api {

// head_dim, window, scale and negative of an attention, from an op's params.
void set_softmax(cuda::Attention &a, double softmax_scale, int64_t window, int64_t head_dim);

// A pure function of shapes and declared maxima.
cuda::AttentionConfig attention_config(const cuda::Attention &a, int sm_count);

}  // namespace mixtral::api
