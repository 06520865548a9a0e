// The torch op schemas, one string per op, as torch parses them. Shapes, dtypes, limits and the errors of each argument
// are those of the C API (include/mixtral_ext.h), where every op has a params struct with the same field names.
//
// Each op has two forms. The functional form allocates its results on the device of its inputs. The `.out` overload
// writes the tensors given, in the dtypes and shapes the header says, and returns nothing, so nothing returned aliases an
// input. rolling_attention also changes k_cache and v_cache in either form; apply_rope changes q and k in its only form.
//
// int? window: None is plain causal. float? softmax_scale: None is 1/sqrt(D). float? rope_theta: None means rotated.
// All tensors of a call are on one device; a mixture is an error. No form supports autograd: a functional op whose input
// requires grad raises in backward, a mutating one at once.
#pragma once

namespace mixtral::schemas {

constexpr const char *kAll[] = {
    "moe_gate(Tensor router_logits, int top_k=2, bool renormalize=True) -> "
    "(Tensor topk_weights, Tensor topk_ids, Tensor expert_offsets, Tensor sorted_slots, Tensor slot_rows)",
    "moe_gate.out(Tensor router_logits, int top_k=2, bool renormalize=True, *, Tensor(a!) topk_weights, "
    "Tensor(b!) topk_ids, Tensor(c!) expert_offsets, Tensor(d!) sorted_slots, Tensor(e!) slot_rows) -> ()",

    "moe_sort(Tensor topk_ids, int num_experts) -> (Tensor expert_offsets, Tensor sorted_slots, Tensor slot_rows)",
    "moe_sort.out(Tensor topk_ids, int num_experts, *, Tensor(a!) expert_offsets, Tensor(b!) sorted_slots, "
    "Tensor(c!) slot_rows) -> ()",

    // Rows whose slot is -1 are undefined in the functional form.
    "moe_permute(Tensor hidden, Tensor sorted_slots, int top_k) -> Tensor",
    "moe_permute.out(Tensor hidden, Tensor sorted_slots, int top_k, *, Tensor(a!) rows) -> ()",

    "moe_combine(Tensor rows, Tensor slot_rows, Tensor topk_weights) -> Tensor",
    "moe_combine.out(Tensor rows, Tensor slot_rows, Tensor topk_weights, *, Tensor(a!) out) -> ()",

    // Rows past the last offset are undefined in the functional form, untouched in `out`.
    "grouped_gemm(Tensor a, Tensor b, Tensor expert_offsets, Tensor? a_rows=None, int a_rows_divisor=1) -> Tensor",
    "grouped_gemm.out(Tensor a, Tensor b, Tensor expert_offsets, Tensor? a_rows=None, int a_rows_divisor=1, *, "
    "Tensor(a!) out) -> ()",

    "grouped_gemm_swiglu(Tensor a, Tensor w_gate_up, Tensor expert_offsets, Tensor? a_rows=None, "
    "int a_rows_divisor=1) -> Tensor",
    "grouped_gemm_swiglu.out(Tensor a, Tensor w_gate_up, Tensor expert_offsets, Tensor? a_rows=None, "
    "int a_rows_divisor=1, *, Tensor(a!) out) -> ()",

    "moe_experts(Tensor hidden, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_offsets=None, Tensor? sorted_slots=None, Tensor? slot_rows=None) -> Tensor",
    "moe_experts.out(Tensor hidden, Tensor w_gate_up, Tensor w_down, Tensor topk_weights, Tensor topk_ids, "
    "Tensor? expert_offsets=None, Tensor? sorted_slots=None, Tensor? slot_rows=None, *, Tensor(a!) out) -> ()",

    // -> (out, lse)
    "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, int? window=None, float? softmax_scale=None, "
    "Tensor? k_start=None, Tensor? k_length=None) -> (Tensor, Tensor)",
    "sliding_window_attention.out(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, int? window=None, float? softmax_scale=None, "
    "Tensor? k_start=None, Tensor? k_length=None, *, Tensor(a!) out, Tensor(b!)? lse=None) -> ()",

    // -> (out, lse)
    "rolling_attention(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cu_seqlens_q, "
    "Tensor cache_lengths, int? window=None, float? softmax_scale=None, Tensor? cache_slots=None, "
    "int? max_seqlen_q=None, int? max_cache_length=None, float? rope_theta=None, bool rope_interleaved=False) -> "
    "(Tensor, Tensor)",
    "rolling_attention.out(Tensor q, Tensor? k, Tensor? v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cu_seqlens_q, "
    "Tensor cache_lengths, int? window=None, float? softmax_scale=None, Tensor? cache_slots=None, "
    "int? max_seqlen_q=None, int? max_cache_length=None, float? rope_theta=None, bool rope_interleaved=False, *, "
    "Tensor(c!) out, Tensor(d!)? lse=None) -> ()",

    "apply_rope(Tensor(a!) q, Tensor(b!)? k, Tensor positions, float theta, bool interleaved=False) -> ()",
};

}  // namespace mixtral::schemas
