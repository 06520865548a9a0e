#include <cstdlib>

#include "../core/cpu_features.h"
#ifdef MIXTRAL_EXT_WITH_CUDA
#include "../cuda/ops.h"
#endif
#include "check.h"

namespace {

using mixtral::fail;

mixtral_status init_cpu(mixtral_context &context, int32_t arch) {
  if (context.device_index != 0)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: device_index: expected 0 for the CPU, got %d",
                context.device_index);
  if (arch == MIXTRAL_ARCH_AUTO) {
    arch = MIXTRAL_ARCH_CPU_AMX;
    while (!mixtral::cpu_has((mixtral_arch)arch)) --arch;  // ends at PORTABLE
  } else if (arch < MIXTRAL_ARCH_CPU_PORTABLE || arch > MIXTRAL_ARCH_CPU_AMX) {
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: arch: expected a CPU architecture, got %d", arch);
  } else if (!mixtral::cpu_has((mixtral_arch)arch)) {
    return fail(MIXTRAL_ERROR_NOT_SUPPORTED, "mixtral_context_create: arch: expected one this CPU has, got %d", arch);
  }
  context.arch = (mixtral_arch)arch;
  return MIXTRAL_OK;
}

mixtral_status init_cuda(mixtral_context &context, int32_t arch) {
#ifdef MIXTRAL_EXT_WITH_CUDA
  if (context.pool_run)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: parallel_for: expected NULL for CUDA, got a function");
  if (arch != MIXTRAL_ARCH_AUTO && arch != MIXTRAL_ARCH_CUDA_SM80 && arch != MIXTRAL_ARCH_CUDA_SM90)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: arch: expected a CUDA architecture, got %d", arch);
  context.arch = (mixtral_arch)arch;
  return mixtral::cuda::context_init(context);
#else
  (void)context;
  (void)arch;
  return fail(MIXTRAL_ERROR_NOT_SUPPORTED, "mixtral_context_create: device_type: this library was built without CUDA");
#endif
}

}  // namespace

extern "C" int mixtral_version(void) {
  return MIXTRAL_VERSION_MAJOR * 10000 + MIXTRAL_VERSION_MINOR * 100 + MIXTRAL_VERSION_PATCH;
}

extern "C" mixtral_status mixtral_context_create(const mixtral_context_options *options, mixtral_context **context) {
  if (!context) return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: context: expected a pointer, got NULL");
  *context = nullptr;
  if (!options) return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: options: expected options, got NULL");
  if (options->struct_size != sizeof *options)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: struct_size: expected %zu (library version %d), got %zu",
                sizeof *options, mixtral_version(), options->struct_size);
  if (options->reserved != 0)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: reserved: expected 0, got %d", options->reserved);
  mixtral_context made = {};
  made.device_type = options->device_type;
  made.device_index = options->device_index;
  made.pool_run = options->parallel_for;
  made.pool = options->pool;
  mixtral_status status;
  switch (options->device_type) {
    case MIXTRAL_DEVICE_CPU: status = init_cpu(made, options->arch); break;
    case MIXTRAL_DEVICE_CUDA: status = init_cuda(made, options->arch); break;
    default:
      status = fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_context_create: device_type: expected 1 (CPU) or 2 (CUDA), got %d",
                    options->device_type);
  }
  if (status != MIXTRAL_OK) return status;
  *context = (mixtral_context *)malloc(sizeof made);
  if (!*context) return fail(MIXTRAL_ERROR_OUT_OF_MEMORY, "mixtral_context_create: out of memory");
  **context = made;
  return MIXTRAL_OK;
}

extern "C" void mixtral_context_destroy(mixtral_context *context) { free(context); }

extern "C" mixtral_arch mixtral_context_arch(const mixtral_context *context) {
  return context ? context->arch : MIXTRAL_ARCH_AUTO;
}

extern "C" mixtral_status mixtral_supports(const mixtral_context *context, mixtral_op op, const void *params) {
  if (!context) return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_supports: context: expected a context, got NULL");
  if (op < MIXTRAL_OP_MOE_GATE || op > MIXTRAL_OP_APPLY_ROPE)
    return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_supports: op: expected %d to %d, got %d", MIXTRAL_OP_MOE_GATE,
                MIXTRAL_OP_APPLY_ROPE, (int)op);
  if (!params) return MIXTRAL_OK;
  using mixtral::api::check;
  switch (op) {
    case MIXTRAL_OP_MOE_GATE: return check(context, (const mixtral_moe_gate_params *)params);
    case MIXTRAL_OP_MOE_SORT: return check(context, (const mixtral_moe_sort_params *)params);
    case MIXTRAL_OP_MOE_PERMUTE: return check(context, (const mixtral_moe_permute_params *)params);
    case MIXTRAL_OP_MOE_COMBINE: return check(context, (const mixtral_moe_combine_params *)params);
    case MIXTRAL_OP_GROUPED_GEMM: return check(context, (const mixtral_grouped_gemm_params *)params);
    case MIXTRAL_OP_GROUPED_GEMM_SWIGLU: return check(context, (const mixtral_grouped_gemm_swiglu_params *)params);
    case MIXTRAL_OP_MOE_EXPERTS: return check(context, (const mixtral_moe_experts_params *)params);
    case MIXTRAL_OP_SLIDING_WINDOW_ATTENTION:
      return check(context, (const mixtral_sliding_window_attention_params *)params);
    case MIXTRAL_OP_ROLLING_ATTENTION: return check(context, (const mixtral_rolling_attention_params *)params);
    case MIXTRAL_OP_APPLY_ROPE: return check(context, (const mixtral_apply_rope_params *)params);
  }
  return MIXTRAL_OK;
}
