// The state of a running launch: blocks, warps, the fragments of a warp that diverged, and what they wait for.
#pragma once
#include <array>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "async.h"
#include "barriers.h"
#include "clock.h"
#include "isa.h"
#include "memory.h"
#include "report.h"
#include "strong.h"

namespace vgpu {

constexpr Mask kAllLanes = ~0u;

struct Options {
  int architecture = 90;       // 80 or 90 (sm_90a)
  int sm_count = 4;
  uint64_t seed = 0;
  bool random_completion = false;  // asynchronous work: at random legal moments instead of the latest
  int max_reports = 20;
  uint64_t instruction_limit = 20'000'000'000;  // lane instructions a launch
};

// Lanes of a warp that are at one statement. They come together again where their branch's paths do (Split).
struct Fragment {
  enum State : uint8_t { kReady, kPolling, kWaiting };
  uint32_t pc = 0;
  Mask mask = 0;
  int split = -1;
  State state = kReady;
  uint64_t seen = 0;          // kPolling: Launch::changes when it looked
  WaitFor wait;               // kWaiting
};

struct Split {  // in use while lanes are expected
  uint32_t reconverge = 0;
  Mask expected = 0, arrived = 0;
  int parent = -1;
};

struct Lane : Knowledge {
  Ref<Clock> released_cta, pending_cta;  // as released and pending, for fences of block scope
};

struct Cta;

using Parts = std::array<Mask, 4>;  // by the 16-bit parts of a register, the lowest first

struct Warp {
  Cta *cta = nullptr;
  int index = 0;              // in the block
  uint32_t epoch = 1;
  std::vector<uint32_t> units;          // register file
  std::vector<Mask> unit_poison;        // by slot: lanes whose value is undefined, at least in part
  std::vector<Parts> part_defined;      // and of those: whose parts are defined all the same
  std::vector<Mask> predicates, predicate_poison;
  std::vector<uint8_t> local;           // local_bytes a lane
  std::vector<bool> local_valid;
  std::vector<Fragment> fragments;
  std::vector<Split> splits;
  std::array<Lane, 32> lanes;
  Mask exited = 0;            // and lanes that never were
  Mask absent = 0;            // only those
  bool looked = false;        // executed a strong load since its last backward branch
  uint64_t priority = 0;
  std::array<uint64_t, 32> cluster_phase{}, cluster_seen{};  // of barrier.cluster, from arrival to wait; the last waited for
  WarpAsync async;            // its cp.async and bulk groups
  WarpMatrix matrix;          // its wgmma groups

  template <class T>
  T *at(Slot s) { return reinterpret_cast<T *>(&units[(size_t)s * 32]); }
  uint64_t address(Slot s, int lane, bool wide) { return wide ? at<uint64_t>(s)[lane] : at<uint32_t>(s)[lane]; }
  Mask part_poison(Slot s, int part) const { return unit_poison[s] & ~part_defined[s][(size_t)part]; }
  Parts parts_poison(Slot s) const { return {part_poison(s, 0), part_poison(s, 1), part_poison(s, 2), part_poison(s, 3)}; }
  void set_poison(Slot d, Mask m, Mask poison) {  // whole registers of the lanes m
    unit_poison[d] = (unit_poison[d] & ~m) | (poison & m);
    if (poison & m)
      for (Mask &part : part_defined[d]) part &= ~m;
  }
  Launch &launch() const;
};

struct Cluster;

struct Cta {
  Launch *launch = nullptr;
  Cluster *cluster = nullptr;
  uint32_t index = 0, rank = 0;   // linear in the grid; in its cluster
  uint32_t x = 0, y = 0, z = 0;
  int live = 0;                   // warps not exited
  bool visited = false;           // other blocks touched its shared memory
  SharedMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;
  CtaBarriers barriers;
  std::vector<std::unique_ptr<WarpGroup>> groups;
  Ref<Clock> ordered;             // what happened before the last fence.sc of its threads in the order of all of them

  explicit Cta(uint32_t shared_bytes) : shared(shared_bytes) {}
  uint32_t components() const { return (uint32_t)warps.size() * 32 + kAgents + kProducts; }
};

struct Cluster {
  std::vector<std::unique_ptr<Cta>> ctas;
  ClusterBarrier barrier;
  int live = 0;
};

struct Launch {
  const Program *program = nullptr;
  Options options;
  LaunchOrder order;
  bool waited = false;         // some thread executed griddepcontrol.wait
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
  uint32_t dynamic_shared = 0, shared_bytes = 0;  // shared_bytes: as on the hardware
  std::vector<Range> shared;   // Program::shared, and how much of it is dynamic
  uint64_t workspace = 0;      // of a cooperative launch: %envreg1 and %envreg2 are the halves of its address
  std::vector<uint8_t> params;
  GlobalMemory *global = nullptr;
  Reports *reports = nullptr;
  Counters counters;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Cluster>> clusters;  // resident
  uint64_t changes = 0;        // of memory, barriers and fragments: nothing that others could see goes uncounted
  uint64_t executed = 0;       // lane instructions
  bool stop = false;           // a report after which going on makes no sense
  AsyncQueue queue;
  StrongMemory strong;
  std::vector<uint64_t> executions, lane_executions;  // by statement

  Cell *cells(uint64_t address) { return global->cells(address, order); }
  size_t capacity() const;     // blocks that are resident at once
  void run();
  bool chance(uint32_t one_in) { return random() % one_in == 0; }
  void report(const char *kind, const Warp *warp, int lane, const Inst *inst, const std::string &text);
  std::string who(const Warp &warp, Mask lanes) const;      // "block (0,0,0) thread 5"
  std::string who(const Access &access) const;
  std::string place(uint64_t address, bool global) const;   // "byte 12 of argument 0", "shared byte 12"
  std::string shared_byte(uint32_t address) const;          // "12", or "12 of x" if x is not the only shared variable
  bool in_shared(uint64_t address, uint64_t bytes) const;   // whether one variable has all of these
  std::string beside_shared(uint64_t address, uint64_t bytes) const;

 private:
  void start();
  void step(Warp &warp, Fragment &fragment);
  bool unstick();
  uint64_t registers() const;
  void deadlock();
  void finish();

  std::deque<uint64_t> pending_;    // clusters not started, in order
  size_t resident_ = 0;
  uint64_t stuck_at_ = ~0ull;       // changes when nothing could go on
  int stuck_rounds_ = 0;
  uint64_t registers_ = 0;          // their hash in an earlier round
  bool counting_ = false;           // they change from round to round
};

// What reports and clocks need to know of an access.
struct Actor {
  Launch *launch;
  const Warp *warp;
  const Inst *inst;
  const Clock *clock;        // what happened before
  const Knowledge *knows;    // the thread's, for what its async-proxy reads may see
  uint32_t cta, epoch;
  Mask lanes;                // one lane, or those that act as one
  uint8_t row;               // warp, or an agent's row
  uint8_t flags = 0;         // kStrong, kBlockScope (of a strong one), kAsyncProxy
};
Actor actor(Warp &warp, int lane, const Inst &in, uint8_t flags = 0);
bool happened_before(const Access &access, const Clock *clock, const Actor &actor);

// Resolves [address, address + bytes) of a lane; reports what is out of range, misaligned or read-only.
Span resolve(Warp &warp, int lane, const Inst &in, Space space, uint64_t address, unsigned bytes, unsigned align, bool write);

// Wavefronts and bank conflicts of a warp's access to shared memory, `bytes` a lane.
void count_shared(Warp &warp, const Inst &in, const uint64_t *addresses, Mask lanes, unsigned bytes);

// A release by lanes of a warp: what they know and all they did. The warp enters a new epoch.
void release(Warp &warp, Mask lanes, KnowledgeBuilder &into);
void acquire(Warp &warp, Mask lanes, const Knowledge &told);

// Poison that must not matter: reports it for the lanes of `poison & mask` and returns whether there was any.
bool check_poison(Warp &warp, const Inst &in, Mask poison, const char *what);

// Fragments. A fragment whose mask is 0 is gone.
void jump(Warp &warp, Fragment &fragment, uint32_t pc);                // arrives at its split's reconvergence if that is there
void make_ready(Warp &warp, Mask lanes, WaitFor::Kind kind);           // those waiting go on after their statement
void exit_lanes(Warp &warp, Fragment &fragment);
void split_off(Warp &warp, Fragment &fragment, Mask lanes);            // these lanes become a fragment of their own, at the same statement

template <class T>
inline void store_lanes(Warp &w, Slot d, const T *value, Mask m, Mask poison) {
  if (d == kNoSlot) return;
  T *to = w.at<T>(d);
  for (int l = 0; l < 32; ++l) to[l] = m >> l & 1 ? value[l] : to[l];
  w.set_poison(d, m, poison);
}

// The same with what is undefined by parts.
template <class T>
inline void store_lanes(Warp &w, Slot d, const T *value, Mask m, const Parts &poison) {
  Mask any = 0;
  for (size_t i = 0; i < sizeof(T) / 2; ++i) any |= poison[i];
  store_lanes(w, d, value, m, any);
  if (d == kNoSlot || !(any & m)) return;
  for (size_t i = 0; i < sizeof(T) / 2; ++i) w.part_defined[d][i] |= m & ~poison[i];
}

}  // namespace vgpu
