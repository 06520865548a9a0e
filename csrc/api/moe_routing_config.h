// How the routing kernels divide their tokens: a pure function of shapes, for moe_gate, moe_sort and moe_experts.
#pragma once
#include "../cuda/ops.h"

namespace mixtral::api {

cuda::RoutingConfig routing_config(int64_t tokens, int64_t top_k, int64_t experts);

}  // namespace mixtral::api
