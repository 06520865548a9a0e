// Vector clocks for happens-before, one component a thread. A clock is immutable and shared: the lanes of a warp, and the
// whole block after a barrier, hold the same one. It is stored in chunks, one a block, so that knowledge of other blocks
// costs nothing until there is some.
//
// This stands for the causality order of PTX ISA 8 "Memory Consistency Model".
// Thread t's access at epoch e happened before whoever holds a clock with clock[t] >= e. A thread's own accesses always
// did. Besides its threads, a block has kAgents components for asynchronous copies, one per mbarrier they complete on, and
// kProducts for what its warpgroups' matrix products read.
#pragma once
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace vgpu {

template <class T>
class Ref {  // a counted reference; T has `int refs`. One thread only.
 public:
  Ref() = default;
  explicit Ref(T *p) : p_(p) { if (p_) ++p_->refs; }
  Ref(const Ref &o) : Ref(o.p_) {}
  Ref(Ref &&o) noexcept : p_(std::exchange(o.p_, nullptr)) {}
  Ref &operator=(Ref o) noexcept { std::swap(p_, o.p_); return *this; }
  ~Ref() { if (p_ && --p_->refs == 0) delete p_; }
  T *get() const { return p_; }
  T *operator->() const { return p_; }
  T &operator*() const { return *p_; }
  explicit operator bool() const { return p_; }
  bool operator==(const Ref &o) const { return p_ == o.p_; }

 private:
  T *p_ = nullptr;
};

constexpr int kAgents = 64, kProducts = 32;

struct Chunk {
  int refs = 0;
  uint32_t cta;
  std::vector<uint32_t> epoch;  // warp * 32 + lane, then the agents
};

struct Clock {
  int refs = 0;
  std::vector<Ref<Chunk>> chunks;  // in order of cta

  const Chunk *find(uint32_t cta) const {
    if (chunks.size() == 1) return chunks[0]->cta == cta ? chunks[0].get() : nullptr;
    size_t low = 0, high = chunks.size();
    while (low < high) {
      const size_t mid = (low + high) / 2;
      (chunks[mid]->cta < cta ? low : high) = chunks[mid]->cta < cta ? mid + 1 : mid;
    }
    return low < chunks.size() && chunks[low]->cta == cta ? chunks[low].get() : nullptr;
  }
};

// Joins clocks and single components into a new clock.
class ClockBuilder {
 public:
  void join(const Ref<Clock> &clock);
  void set(uint32_t cta, uint32_t components, uint32_t index, uint32_t epoch);  // raises a component
  Ref<Clock> freeze();  // what was joined so far; the builder goes on from it
  bool empty() const { return !frozen_ && chunks_.empty(); }
  Ref<Clock> freeze_if_any() { return empty() ? Ref<Clock>() : freeze(); }

 private:
  Ref<Chunk> &mine(uint32_t cta, uint32_t components);

  std::vector<Ref<Chunk>> chunks_;
  Ref<Clock> frozen_, last_;
};

// What a thread knows, and hands on at barriers and mbarriers.
struct Knowledge {
  Ref<Clock> clock;                         // what happened before
  Ref<Clock> fenced_shared, fenced_global;  // what of it a proxy fence made visible to the async proxy, by the memory it is in
  // What its last fence of gpu scope published, and what relaxed reads saw and its next such fence acquires. A block shares them:
  // all threads write and fence, they meet, one sets the flag; one sees it, they meet, all fence and read.
  Ref<Clock> released, pending;
};
constexpr Ref<Clock> Knowledge::*kKnowledge[] = {&Knowledge::clock, &Knowledge::fenced_shared, &Knowledge::fenced_global, &Knowledge::released,
                                                 &Knowledge::pending};

struct KnowledgeBuilder {
  ClockBuilder parts[5];  // in the order of kKnowledge

  ClockBuilder &clock() { return parts[0]; }
  void join(const Knowledge &k) { for (int i = 0; i < 5; ++i) parts[i].join(k.*kKnowledge[i]); }
  Knowledge freeze() {
    Knowledge k;
    for (int i = 0; i < 5; ++i) k.*kKnowledge[i] = parts[i].freeze_if_any();
    return k;
  }
};

}  // namespace vgpu
