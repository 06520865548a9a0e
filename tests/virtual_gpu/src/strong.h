// Strong accesses: volatile, relaxed, acquire, release and atomics (PTX ISA 8 "Memory Consistency Model"). What they publish to
// other threads, and which values they may return: a strong load sees the newest write only if that happened before, so under
// seeds other than 0 it sometimes returns what the write replaced.
#pragma once
#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clock.h"
#include "memory.h"

namespace vgpu {

enum Order : int { kWeak, kRelaxed, kAcquire, kRelease, kAcquireRelease };
enum Scope : int { kCtaScope, kGpuScope };  // sys counts as gpu

// What releases and fences before strong writes tell at an address.
struct Published {
  ClockBuilder clock, fenced_shared, fenced_global;
  std::map<uint32_t, ClockBuilder> of_cta;  // what a block released here, with block scope too
};

// A value that the last strong write of these bytes replaced.
struct Replaced {
  uint64_t key;
  unsigned bytes;
  uint8_t data[16];
  uint16_t valid;            // by byte
  Access writer;             // of the newer value
  std::vector<Access> seen;  // reads of the newer value: nobody who is ordered behind one goes back
  Published published;       // with the old value
};

// A thread's last release at a location: its later strong writes there go on with it (8.8).
struct Release {
  Ref<Clock> wide, of_cta;
};

struct StrongMemory {
  std::map<std::pair<uint64_t, uint64_t>, Release> releases;    // by location and thread
  std::unordered_map<uint64_t, Published> published;            // by location
  std::unordered_map<uint64_t, std::vector<Replaced>> replaced;  // by 16 bytes
  ClockBuilder ordered;                                          // what happened before any fence.sc so far: they have one order
};

// A load or atomic by a lane: the value that it may return instead of the newest, or null. An atomic always gets the newest.
Replaced *old_value(Warp &warp, int lane, const Inst &in, const Span &span, unsigned bytes, bool atomic);
// It takes over what was published with the value it got (8.8): at once if it acquires, else at its thread's next fence.
void observe(Warp &warp, int lane, const Span &span, Replaced *old, int order, int scope);
// A store or atomic: keeps the old value, before the new one is there.
void replace(Warp &warp, int lane, const Span &span, unsigned bytes);
// It publishes its thread's past if it releases (8.8), else what the thread's last fence published. A plain strong store ends the release
// sequence of the value it replaces; an atomic continues it.
void publish(Warp &warp, int lane, const Span &span, int order, int scope, bool atomic);

}  // namespace vgpu
