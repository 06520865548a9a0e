// The stable counting sort of (token, expert) slots by expert, shared by moe_gate and moe_sort.
#pragma once
#include <cstdint>

#include "../include/mixtral_ext.h"

namespace mixtral::cpu {

// ids [tokens, top_k] with a row stride; ids outside [0, experts) are skip markers.
template <class Id>
void sort_slots(const Id *ids, int64_t row_stride, int64_t tokens, int64_t top_k, int experts,
                const mixtral_tensor &expert_offsets, const mixtral_tensor &sorted_slots, const mixtral_tensor &slot_rows) {
  int32_t *offsets = (int32_t *)expert_offsets.data, *slots = (int32_t *)sorted_slots.data, *rows = (int32_t *)slot_rows.data;
  int32_t next[MIXTRAL_MAX_EXPERTS] = {};
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < top_k; ++j) {
      const Id id = ids[t * row_stride + j];
      if (id >= 0 && id < experts) ++next[id];
    }
  offsets[0] = 0;
  for (int e = 0; e < experts; ++e) {
    offsets[e + 1] = offsets[e] + next[e];
    next[e] = offsets[e];
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 0; j < top_k; ++j) {
      const Id id = ids[t * row_stride + j];
      const int64_t slot = t * top_k + j;
      const bool used = id >= 0 && id < experts;
      rows[slot] = used ? next[id] : -1;
      if (used) slots[next[id]++] = (int32_t)slot;
    }
  for (int64_t r = offsets[experts]; r < tokens * top_k; ++r) slots[r] = -1;
}

}  // namespace mixtral::cpu
