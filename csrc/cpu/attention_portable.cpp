// Plain loops.
#include <cmath>

#include "attention.h"
#include "element.h"

namespace mixtral::cpu::attention {

void task_portable(const Task &t) {
  const Problem &p = t.problem;
  const Sequence &s = t.sequence;
  const int64_t group = p.group(), D = p.head_dim;
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = t.row_begin; row < t.row_end; ++row) {
      const int64_t token = row / group, head = t.key_head * group + row % group, position = s.position + token;
      const T *q = (const T *)(s.q + token * p.q_token + head * p.q_head);
      float maximum = -INFINITY, weight = 0, sum[128] = {};
      for (int64_t j = t.key_begin; j < t.key_end && j <= position; ++j) {
        if (p.window && j <= position - p.window) continue;
        const Piece *piece = s.pieces;
        while (j >= piece->end) ++piece;
        const T *k = (const T *)(piece->k + (j - piece->begin) * piece->k_token + t.key_head * piece->k_head);
        const T *v = (const T *)(piece->v + (j - piece->begin) * piece->v_token + t.key_head * piece->v_head);
        float score = 0;
        for (int64_t d = 0; d < D; ++d) score += to_float(q[d]) * to_float(k[d]);
        score *= p.scale;
        if (score > maximum) {
          const float factor = std::exp2(maximum - score);
          for (int64_t d = 0; d < D; ++d) sum[d] *= factor;
          weight *= factor;
          maximum = score;
        }
        const float e = std::exp2(score - maximum);
        weight += e;
        for (int64_t d = 0; d < D; ++d) sum[d] += e * to_float(v[d]);
      }
      if (t.partial) {
        float *part = t.partial + row * partial_row(D);
        for (int64_t d = 0; d < D; ++d) part[d] = sum[d];
        part[D] = maximum;
        part[D + 1] = weight;
        continue;
      }
      T *out = (T *)(s.out + token * p.out_token + head * p.out_head);
      for (int64_t d = 0; d < D; ++d) from_float(weight == 0 ? 0 : sum[d] / weight, out[d]);
      if (s.lse) s.lse[head * p.lse_head + token] = (maximum + std::log2(weight)) * (float)M_LN2;
    }
  });
}

}  // namespace mixtral::cpu::attention
