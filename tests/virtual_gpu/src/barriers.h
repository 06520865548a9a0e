// Barriers: what threads wait at, and how arriving there orders what they did.
#pragma once
#include <map>
#include <vector>

#include "clock.h"
#include "isa.h"
#include "memory.h"

namespace vgpu {

struct Cta;
struct Actor;

// What a waiting fragment waits for.
struct WaitFor {
  enum Kind : uint8_t { kNothing, kBarrier, kCollective, kClusterBarrier, kWarpGroup };
  Kind kind = kNothing;
  uint32_t key = 0;   // kCollective: the operation
};

struct Waiting {
  Warp *warp;
  Mask lanes;
  const Inst *inst = nullptr;
};

// bar and barrier, number 0 to 15. Warps count as 32 threads (PTX ISA 9.7.13.1).
struct NamedBarrier {
  int expected = -1;              // threads of the current phase; 0: all warps of the block that have not exited; -1: no arrival yet
  int arrived = 0;
  std::vector<Waiting> waiting;
  KnowledgeBuilder told;
  const Inst *first = nullptr;    // the first to arrive
  const Warp *first_warp = nullptr;
  int true_lanes = 0, all_lanes = 0;  // bar.red
};

// An mbarrier object in shared memory.
struct MBarrier {
  uint32_t count = 0;             // arrivals of a phase
  int64_t pending = 0, transactions = 0;
  uint64_t phase = 0;
  bool waited = true;             // the last phase that had transactions was waited for
  bool had_transactions = false;  // in the current phase
  bool polled = false;            // somebody looked in vain in the current phase
  int agent = 0;                  // component of its asynchronous copies in the block's clocks
  Access initialised;             // who called mbarrier.init, and when
  uint32_t fenced_at = 0;         // epoch of its fence.mbarrier_init, or 0
  uint64_t told_in = 0;           // phase of barrier.cluster whose waiters know that fence by a relaxed arrival, or 0
  KnowledgeBuilder told;          // of all arrivals so far
  Knowledge completed;
  const Inst *last = nullptr;     // last arrival, for messages
  const Inst *remote = nullptr;   // and last one from another block
};

struct CtaBarriers {
  NamedBarrier named[16];
  std::map<uint32_t, MBarrier> mbarriers;  // by shared address
  int agents = 0;
};

struct ClusterBarrier {
  int arrived = 0;                // threads
  uint64_t phase = 0;
  std::vector<Waiting> waiting;
  KnowledgeBuilder told;
  Knowledge completed;
};

// Brings the lanes of `required` together at an operation: true once all of them are there, with their fragments in `all`
// (f among them). Otherwise f waits. Lanes at other statements take part if those are the same operation (equal key).
bool gather(Warp &warp, Fragment &f, Mask required, uint32_t key, std::vector<Fragment *> &all);

// Called when lanes exit: implicit thread counts shrink, so a barrier or collective may complete.
void barriers_after_exit(Warp &warp);
void check_barriers_at_exit(Cta &cta);

// The mbarrier at an address, or null (reported).
// `address` is a shared::cta or shared::cluster address as lane `lane` sees it; its block comes back in *cta.
MBarrier *find_mbarrier(Warp &warp, int lane, const Inst &in, uint64_t address, Cta **cta, bool async = false);
void mbarrier_arrive(Cta &cta, MBarrier &barrier, uint32_t count, const Actor &who);  // counts only: the caller has joined the clocks
void mbarrier_transactions(Cta &cta, MBarrier &barrier, int64_t bytes, const Actor &who);  // expect: positive; complete: negative

}  // namespace vgpu
