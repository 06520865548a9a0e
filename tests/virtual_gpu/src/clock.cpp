#include "clock.h"

#include <algorithm>

namespace vgpu {

void ClockBuilder::join(const Ref<Clock> &clock) {
  if (!clock || clock == last_ || clock == frozen_) return;
  last_ = clock;
  if (chunks_.empty()) {
    chunks_ = clock->chunks;
    frozen_ = clock;
    return;
  }
  for (const Ref<Chunk> &theirs : clock->chunks) {
    auto at = std::lower_bound(chunks_.begin(), chunks_.end(), theirs->cta, [](const Ref<Chunk> &c, uint32_t cta) { return c->cta < cta; });
    if (at == chunks_.end() || (*at)->cta != theirs->cta) {
      chunks_.insert(at, theirs);
    } else if (!(*at == theirs)) {
      Chunk &into = *mine(theirs->cta, (uint32_t)theirs->epoch.size());
      for (size_t i = 0; i < into.epoch.size(); ++i) into.epoch[i] = std::max(into.epoch[i], theirs->epoch[i]);
    } else {
      continue;
    }
    frozen_ = Ref<Clock>();
  }
}

void ClockBuilder::set(uint32_t cta, uint32_t components, uint32_t index, uint32_t epoch) {
  Chunk &chunk = *mine(cta, components);
  if (chunk.epoch[index] >= epoch) return;
  chunk.epoch[index] = epoch;
  frozen_ = Ref<Clock>();
}

// The chunk of a block, not shared with any clock.
Ref<Chunk> &ClockBuilder::mine(uint32_t cta, uint32_t components) {
  auto at = std::lower_bound(chunks_.begin(), chunks_.end(), cta, [](const Ref<Chunk> &c, uint32_t id) { return c->cta < id; });
  if (at == chunks_.end() || (*at)->cta != cta) {
    Chunk *chunk = new Chunk;
    chunk->cta = cta;
    chunk->epoch.resize(components);
    at = chunks_.insert(at, Ref<Chunk>(chunk));
    frozen_ = Ref<Clock>();
  } else if ((*at)->refs > 1) {
    Chunk *chunk = new Chunk(**at);
    chunk->refs = 0;
    *at = Ref<Chunk>(chunk);
  }
  return *at;
}

Ref<Clock> ClockBuilder::freeze() {
  if (!frozen_) {
    Clock *clock = new Clock;
    clock->chunks = chunks_;
    frozen_ = Ref<Clock>(clock);
  }
  return frozen_;
}

}  // namespace vgpu
