// The CUDA backend as api/ calls it: validated params in, kernels enqueued on `stream` (a cudaStream_t).
#pragma once
#include "../core/context.h"

namespace mixtral::cuda {

// Fills device properties and sets function attributes; the context's device_index and requested arch are set.
mixtral_status context_init(mixtral_context &context);

mixtral_status moe_permute(const mixtral_context &context, const mixtral_moe_permute_params &p, void *stream);
mixtral_status moe_combine(const mixtral_context &context, const mixtral_moe_combine_params &p, void *stream);
mixtral_status apply_rope(const mixtral_context &context, const mixtral_apply_rope_params &p, void *stream);

}  // namespace mixtral::cuda
