// Rotary embedding. A task turns the heads of 4 tokens; a token's D/2 cosines and sines are computed once (512 bytes of
// stack at D = 128) and used by all its heads. 2 * T * (Hq + Hk) * D elements moved.
#include "rope.h"

#include "../core/error.h"
#include "../core/rope.h"
#include "element.h"
#include "ops.h"

namespace mixtral::cpu {
namespace {

// Pair i is (x[i * step], x[i * step + distance]).
template <class T, int kStep>
void rotate(const RopeHeads &heads, int64_t pairs, const float *cosine, const float *sine) {
  const int64_t distance = kStep == 2 ? 1 : pairs;
  for (int64_t h = 0; h < heads.count; ++h) {
    const T *from = (const T *)(heads.from + h * heads.from_head);
    T *to = (T *)(heads.to + h * heads.to_head);
    T turned[2 * kMaxRopePairs];  // lets the loop vectorise: from and to may be the same memory
    for (int64_t i = 0; i < pairs; ++i) {
      const float a = to_float(from[i * kStep]), b = to_float(from[i * kStep + distance]);
      from_float(a * cosine[i] - b * sine[i], turned[i * kStep]);
      from_float(a * sine[i] + b * cosine[i], turned[i * kStep + distance]);
    }
    memcpy(to, turned, (size_t)(2 * pairs) * sizeof(T));
  }
}

}  // namespace

void rope_token(int32_t dtype, int64_t head_dim, bool interleaved, const float *frequencies, int64_t position,
                const RopeHeads &q, const RopeHeads &k) {
  const int64_t pairs = head_dim / 2;
  float cosine[kMaxRopePairs], sine[kMaxRopePairs];
  for (int64_t i = 0; i < pairs; ++i) {
    const float angle = (float)position * frequencies[i];
    cosine[i] = std::cos(angle);
    sine[i] = std::sin(angle);
  }
  with_float_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto turn = interleaved ? rotate<T, 2> : rotate<T, 1>;
    turn(q, pairs, cosine, sine);
    turn(k, pairs, cosine, sine);
  });
}

mixtral_status apply_rope(const mixtral_context &context, const mixtral_apply_rope_params &p) {
  const int64_t tokens = p.q.shape[0], head_dim = p.q.shape[2];
  const auto position = [&](int64_t t) {
    return p.positions.dtype == MIXTRAL_DTYPE_I64 ? ((const int64_t *)p.positions.data)[t]
                                                  : (int64_t)((const int32_t *)p.positions.data)[t];
  };
  for (int64_t t = 0; t < tokens; ++t)
    if (position(t) < 0 || position(t) > INT32_MAX)
      return fail(MIXTRAL_ERROR_INVALID_ARGUMENT, "mixtral_apply_rope: positions: expected 0 to %d, got %lld at [%lld]", INT32_MAX,
                  (long long)position(t), (long long)t);

  float frequencies[kMaxRopePairs];
  for (int64_t i = 0; i < head_dim / 2; ++i) frequencies[i] = rope_frequency(p.theta, i, head_dim);
  constexpr int64_t kBlock = 4;
  parallel_for(context, (tokens + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t end = block * kBlock + kBlock < tokens ? block * kBlock + kBlock : tokens;
    for (int64_t t = block * kBlock; t < end; ++t) {
      const auto heads = [&](const mixtral_tensor &x) {
        char *data = (char *)x.data + t * stride_bytes(x, 0);
        return RopeHeads{data, data, stride_bytes(x, 1), stride_bytes(x, 1), x.ndim ? x.shape[1] : 0};
      };
      rope_token(p.q.dtype, head_dim, p.interleaved, frequencies, position(t), heads(p.q), heads(p.k));
    }
  });
  return MIXTRAL_OK;
}

}  // namespace mixtral::cpu
