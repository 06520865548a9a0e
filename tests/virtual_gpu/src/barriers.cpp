// bar, barrier, barrier.cluster, fences and mbarrier (PTX ISA 9.7.13).
#include "barriers.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "decode.h"
#include "machine.h"

namespace vgpu {
namespace {

void complete(Cta &cta, int id) {
  NamedBarrier &b = cta.barriers.named[id];
  const Knowledge told = b.told.freeze();
  const std::vector<Waiting> waiting = std::move(b.waiting);
  const int true_lanes = b.true_lanes, all_lanes = b.all_lanes;
  b = NamedBarrier();
  for (const Waiting &w : waiting) {
    acquire(*w.warp, w.lanes, told);
    if (w.inst->b >= 0) {  // bar.red
      const Slot d = w.inst->r[0];
      if (w.inst->b == 2) {
        uint32_t v[32];
        for (uint32_t &x : v) x = (uint32_t)true_lanes;
        store_lanes(*w.warp, d, v, w.lanes, 0);
      } else {
        const bool all = w.inst->b == 0 ? true_lanes == all_lanes : true_lanes > 0;
        w.warp->predicates[d] = (w.warp->predicates[d] & ~w.lanes) | (all ? w.lanes : 0);
        w.warp->predicate_poison[d] &= ~w.lanes;
      }
    }
    make_ready(*w.warp, w.lanes, WaitFor::kBarrier);
  }
}

void check_complete(Cta &cta, int id) {
  NamedBarrier &b = cta.barriers.named[id];
  if (b.expected < 0) return;
  const int expected = b.expected ? b.expected : cta.live * 32;
  if (b.arrived > expected)
    cta.launch->report("barrier", b.first_warp, 0, b.first, "barrier " + std::to_string(id) + " expects " + std::to_string(expected) +
                       " threads, and " + std::to_string(b.arrived) + " arrived");
  if (b.arrived >= expected) complete(cta, id);
}

// in.a: 0 sync, 1 arrive; in.b: -1, or the reduction 0 and, 1 or, 2 popc; in.c: aligned; in.d: 1 if a thread count is given.
// r: [d of a reduction], barrier, [threads], [p of a reduction].
Flow named_barrier(Warp &w, Fragment &f, const Inst &in) {
  Cta &cta = *w.cta;
  const int first = __builtin_ctz(f.mask);
  const Slot *r = in.r + (in.b >= 0);
  check_poison(w, in, (w.unit_poison[r[0]] | (in.d ? w.unit_poison[r[1]] : 0)) & f.mask, "a barrier's number or thread count");
  const uint32_t id = w.at<uint32_t>(r[0])[first], threads = in.d ? w.at<uint32_t>(r[1])[first] : 0;
  for (Mask m = f.mask; m; m &= m - 1)
    if (w.at<uint32_t>(r[0])[__builtin_ctz(m)] != id)
      w.launch().report("barrier", &w, __builtin_ctz(m), &in, "lanes of a warp name different barriers");
  const Mask required = ~w.exited;
  std::vector<Fragment *> all;
  // .aligned: all threads of the warp are at this very instruction.
  const uint32_t key = in.c ? 0x10000000u + f.pc : 0x20000000u + id;
  if (in.c && w.exited != w.absent) {
    w.launch().report("divergent-collective", &w, first, &in,
                      "an aligned barrier of a warp of which some lanes have exited: all of them must execute it");
    w.launch().stop = true;
    return Flow::kJumped;
  }
  if (!gather(w, f, required, key, all)) return Flow::kWait;
  if (id > 15 || (in.d && (threads == 0 || threads % 32 || threads > 1024))) {
    w.launch().report("barrier", &w, first, &in,
                      "expected a barrier from 0 to 15 and a thread count that is a multiple of 32 up to 1024, got barrier " +
                      std::to_string(id) + " for " + std::to_string(threads) + " threads");
    w.launch().stop = true;
    return Flow::kJumped;
  }
  NamedBarrier &b = cta.barriers.named[id];
  if (b.expected >= 0 && b.expected != (int)threads)
    w.launch().report("barrier", &w, first, &in, "barrier " + std::to_string(id) + " expects " + std::to_string(b.expected) + " threads since " +
                      w.launch().program->where(*b.first) + ", this arrival says " + std::to_string(threads));
  if (b.expected < 0) {
    b.first = &in;
    b.first_warp = &w;
  }
  b.expected = (int)threads;
  b.arrived += 32;
  const auto at = [&](const Fragment *part) -> const Inst & { return w.launch().program->code[part->pc]; };
  for (const Fragment *part : all) {
    const Inst &own = at(part);
    if (own.b < 0) continue;
    const Slot p = own.r[2 + own.d];
    check_poison(w, own, w.predicate_poison[p & ~kNegated] & part->mask, "a reduction at a barrier");
    const Mask v = (p & kNegated ? ~w.predicates[p & ~kNegated] : w.predicates[p]) & part->mask;
    b.true_lanes += __builtin_popcount(v);
    b.all_lanes += __builtin_popcount(part->mask);
  }
  release(w, required, b.told);
  ++w.launch().changes;
  if (in.a == 1) {
    for (Fragment *part : all)
      if (part != &f) jump(w, *part, part->pc + 1);
    check_complete(cta, (int)id);
    return Flow::kNext;
  }
  for (Fragment *part : all) {
    part->state = Fragment::kWaiting;
    part->wait = WaitFor();
    part->wait.kind = WaitFor::kBarrier;
    b.waiting.push_back({&w, part->mask, &at(part)});
  }
  check_complete(cta, (int)id);
  return Flow::kJumped;
}

// in.a: 0 cta, 1 gpu or wider (cluster counts as such); 2 proxy.async; 3 mbarrier_init. in.b: fence.sc (membar is one); of a proxy
// fence the memory, 1 shared, 2 global, 3 both.
// A fence publishes what its thread did and saw, and makes what its relaxed reads saw happen before what follows (9.7.13.4).
void fence(Warp &w, const Inst &in, Mask m) {
  for (Mask rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (in.a == 3) {  // of the mbarriers that this thread initialised (9.7.13.4)
      for (auto &[address, b] : w.cta->barriers.mbarriers)
        if (b.initialised.warp == w.index && b.initialised.lanes >> l & 1 && !b.fenced_at) b.fenced_at = w.epoch;
      continue;
    }
    Lane &lane = w.lanes[(size_t)l];
    ClockBuilder clock;
    clock.join(lane.clock);
    if (in.a != 2) {
      clock.join(in.a ? lane.pending : lane.pending_cta);
      if (in.a) lane.pending = Ref<Clock>();
      lane.pending_cta = Ref<Clock>();
      lane.clock = clock.empty() ? lane.clock : clock.freeze();
    }
    clock.set(w.cta->index, w.cta->components(), (uint32_t)(w.index * 32 + l), w.epoch);
    const Ref<Clock> now = clock.freeze();
    if (in.a == 2 && in.b & 1) lane.fenced_shared = now;
    if (in.a == 2 && in.b & 2) lane.fenced_global = now;
    if (in.a == 1) lane.released = now;
    if (in.a <= 1) lane.released_cta = now;
    if (in.a == 1 && in.b) w.launch().strong.ordered.join(now);
  }
  if (in.a == 1 && in.b) w.cta->ordered = w.launch().strong.ordered.freeze();
  ++w.epoch;
}

// --------------------------------------------------------------------------------------------------------- mbarrier

void settle(Cta &cta, MBarrier &b) {
  if (b.pending != 0 || b.transactions != 0) return;
  ++b.phase;
  b.pending = b.count;
  if (b.had_transactions) b.waited = false;
  b.had_transactions = b.polled = false;
  b.completed = b.told.freeze();
  ++cta.launch->changes;
}

}  // namespace

MBarrier *find_mbarrier(Warp &w, int lane, const Inst &in, uint64_t address, Cta **cta, bool async) {
  Launch &launch = w.launch();
  const Span span = resolve(w, lane, in, Space::kSharedCluster, address, 8, 8, false);
  if (!span.data) return nullptr;
  const uint32_t rank = (uint32_t)(address >> kClusterShift) & 0xff;
  *cta = rank ? w.cta->cluster->ctas[rank - 1].get() : w.cta;
  const uint32_t own = (uint32_t)address & ((1u << kClusterShift) - 1);
  const auto found = (*cta)->barriers.mbarriers.find(own);
  if (found == (*cta)->barriers.mbarriers.end()) {
    launch.report("mbarrier", &w, lane, &in, "there is no initialised mbarrier at shared address " + launch.shared_byte(own));
    return nullptr;
  }
  MBarrier &b = found->second;
  const Actor who = actor(w, lane, in);
  const bool told = b.told_in && w.cluster_seen[(size_t)lane] >= b.told_in;
  if (!told && !happened_before(b.initialised, who.clock, who))
    launch.report("race", &w, lane, &in, "uses the mbarrier at shared address " + launch.shared_byte(own) + " that " +
                  launch.who(b.initialised) + " initialised, without a barrier between them");
  for (const Access &written : {span.cells[0].write, span.cells[1].write})
    if (written.statement != b.initialised.statement || written.epoch != b.initialised.epoch || written.cta != b.initialised.cta)
      launch.report("mbarrier", &w, lane, &in, "the mbarrier at shared address " + launch.shared_byte(own) + " was overwritten by " +
                    launch.who(written));
  const Lane &l = w.lanes[(size_t)lane];
  const Chunk *chunk = l.fenced_shared ? l.fenced_shared->find(b.initialised.cta) : nullptr;
  bool fenced = chunk && chunk->epoch[b.initialised.warp * 32u + (uint32_t)__builtin_ctz(b.initialised.lanes)] >= b.initialised.epoch;
  Access fence = b.initialised;
  fence.epoch = b.fenced_at;
  fenced |= b.fenced_at && (told || happened_before(fence, who.clock, who));
  if (async && !fenced)
    launch.report("proxy", &w, lane, &in, "an asynchronous copy signals an mbarrier that " + launch.who(b.initialised) +
                  " initialised without fence.mbarrier_init or fence.proxy.async after it");
  return &b;
}

void mbarrier_arrive(Cta &cta, MBarrier &b, uint32_t count, const Actor &who) {
  if (count > (uint64_t)b.pending) {
    cta.launch->report("mbarrier", who.warp, __builtin_ctz(who.lanes), who.inst, "this arrival of " + std::to_string(count) + " is more than the " +
                       std::to_string(b.pending) + " of " + std::to_string(b.count) + " that the mbarrier's phase " + std::to_string(b.phase) +
                       " still expects");
    cta.launch->stop = true;
    return;
  }
  b.pending -= count;
  ++cta.launch->changes;
  settle(cta, b);
}

void mbarrier_transactions(Cta &cta, MBarrier &b, int64_t bytes, const Actor &who) {
  b.transactions += bytes;
  b.had_transactions = true;
  if (b.transactions >= 1 << 20 || b.transactions <= -(1 << 20))
    cta.launch->report("mbarrier", who.warp, __builtin_ctz(who.lanes), who.inst,
                       "the mbarrier's transaction count leaves its range: " + std::to_string(b.transactions));
  ++cta.launch->changes;
  if (bytes < 0) settle(cta, b);
}

namespace {

// in.a: 0 init, 1 inval; r: address, count
Flow mbarrier_object(Warp &w, Fragment &f, const Inst &in) {
  Launch &launch = w.launch();
  for (Mask m = f.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    check_poison(w, in, w.unit_poison[in.r[0]] & 1u << l, "the address of an mbarrier");
    uint64_t address = w.address(in.r[0], l, in.d) + (uint64_t)in.offset;
    if (address >> 56) address &= ~kSharedWindow;
    const Span span = resolve(w, l, in, Space::kShared, address, 8, 8, true);
    if (!span.data) return Flow::kNext;
    span.shadow->touch(span.cells, span.at, 8, true, actor(w, l, in));
    auto &all = w.cta->barriers.mbarriers;
    if (in.a == 1) {
      if (!all.erase((uint32_t)address)) launch.report("mbarrier", &w, l, &in, "there is no mbarrier to invalidate here");
      continue;
    }
    check_poison(w, in, w.unit_poison[in.r[1]] & 1u << l, "the count of an mbarrier");
    const uint32_t count = w.at<uint32_t>(in.r[1])[l];
    if (count < 1 || count >= 1 << 20) launch.report("mbarrier", &w, l, &in, "expected a count from 1 to 2^20 - 1, got " + std::to_string(count));
    if (all.count((uint32_t)address))
      launch.report("mbarrier", &w, l, &in, "an mbarrier lives here already: mbarrier.inval comes before another init");
    MBarrier &b = all[(uint32_t)address];
    b = MBarrier();
    b.count = count;
    b.pending = count;
    b.agent = w.cta->barriers.agents++;
    b.initialised = span.cells->write;
    if (b.agent >= kAgents) {
      launch.report("uncovered", &w, l, &in, "more than " + std::to_string(kAgents) + " mbarriers in a block");
      launch.stop = true;
      return Flow::kJumped;
    }
  }
  return Flow::kNext;
}

// in.a: 0 arrive, 1 arrive.expect_tx, 2 expect_tx, 3 complete_tx; in.b: relaxed; in.c: operand of count or bytes, or -1;
// r: state (kNoSlot if none), address, [count or bytes]
Flow mbarrier_signal(Warp &w, Fragment &f, const Inst &in) {
  uint64_t states[32] = {};
  const Mask lanes = f.mask;
  for (Mask m = lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    check_poison(w, in, w.unit_poison[in.r[1]] & 1u << l, "the address of an mbarrier");
    uint64_t address = w.address(in.r[1], l, in.d) + (uint64_t)in.offset;
    if (address >> 56) address &= ~kSharedWindow;
    const uint32_t value = in.c >= 0 ? w.at<uint32_t>(in.r[in.c])[l] : 1;
    if (in.c >= 0) check_poison(w, in, w.unit_poison[in.r[in.c]] & 1u << l, "the count of an mbarrier");
    if (in.a == 0 && (value < 1 || value >= 1 << 20))
      w.launch().report("mbarrier", &w, l, &in, "expected a count from 1 to 2^20 - 1, got " + std::to_string(value));
    Cta *cta;
    MBarrier *b = find_mbarrier(w, l, in, address, &cta);
    if (!b) {
      w.launch().stop = true;
      return Flow::kJumped;
    }
    states[l] = b->phase;
    const Actor who = actor(w, l, in);
    b->last = &in;
    if (cta != w.cta) b->remote = &in;
    if (cta != w.cta && (in.statement->has("shared::cta") || in.statement->has("shared")))
      w.launch().report("out-of-range", &w, l, &in, "an mbarrier of another block by its address in shared::cta");
    if (in.a == 1 || in.a == 2) mbarrier_transactions(*cta, *b, value, who);
    if (in.a == 3) mbarrier_transactions(*cta, *b, -(int64_t)value, who);
    if (in.a <= 1) {
      if (!in.b) release(w, 1u << l, b->told);
      mbarrier_arrive(*cta, *b, in.a == 1 ? 1 : value, who);
    }
  }
  store_lanes(w, in.r[0], states, lanes, 0);
  return Flow::kNext;
}

// r: p, address, state or parity; in.a: parity; in.b: relaxed
Flow mbarrier_wait(Warp &w, Fragment &f, const Inst &in) {
  Mask passed = 0;
  for (Mask m = f.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    check_poison(w, in, (w.unit_poison[in.r[1]] | w.unit_poison[in.r[2]]) & 1u << l, "an mbarrier wait");
    uint64_t address = w.address(in.r[1], l, in.d) + (uint64_t)in.offset;
    if (address >> 56) address &= ~kSharedWindow;
    Cta *cta;
    MBarrier *b = find_mbarrier(w, l, in, address, &cta);
    if (!b) {
      w.launch().stop = true;
      return Flow::kJumped;
    }
    if (cta != w.cta) w.launch().report("mbarrier", &w, l, &in, "waits at an mbarrier of another block: only arrivals reach there");
    const bool done = in.a ? (b->phase & 1) != (w.at<uint32_t>(in.r[2])[l] & 1) : b->phase > w.at<uint64_t>(in.r[2])[l];
    b->polled |= !done;
    if (!done) continue;
    passed |= 1u << l;
    b->waited = true;
    if (!in.b) acquire(w, 1u << l, b->completed);
  }
  w.predicates[in.r[0]] = (w.predicates[in.r[0]] & ~f.mask) | passed;
  w.predicate_poison[in.r[0]] &= ~f.mask;
  return passed == f.mask ? Flow::kNext : Flow::kPoll;
}

// ---------------------------------------------------------------------------------------------------------- cluster

// Whether all threads of the cluster that have not exited arrived in this phase. Those that arrived and exited count no more.
bool all_arrived(const Cluster &cluster) {
  for (const auto &cta : cluster.ctas)
    for (const auto &warp : cta->warps)
      for (Mask m = ~warp->exited; m; m &= m - 1)
        if (warp->cluster_phase[(size_t)__builtin_ctz(m)] != cluster.barrier.phase + 1) return false;
  return true;
}

// A relaxed arrival tells what the thread's last fence published: fence.mbarrier_init its mbarriers, the example of 9.7.13.4.
void tell(Warp &w, Mask lanes, ClusterBarrier &b) {
  for (Mask m = lanes; m; m &= m - 1) b.told.clock().join(w.lanes[(size_t)__builtin_ctz(m)].released);
  b.told.clock().set(w.cta->index, w.cta->components(), 0, 0);  // orders nothing, and says that this block has begun
  for (auto &[address, mbarrier] : w.cta->barriers.mbarriers) {
    const bool mine = mbarrier.initialised.warp == w.index && mbarrier.initialised.lanes & lanes;
    if (mine && mbarrier.fenced_at && !mbarrier.told_in) mbarrier.told_in = b.phase + 1;
  }
}

void waited(Warp &w, Mask lanes, const ClusterBarrier &b) {
  acquire(w, lanes, b.completed);
  for (Mask m = lanes; m; m &= m - 1) w.cluster_seen[(size_t)__builtin_ctz(m)] = std::exchange(w.cluster_phase[(size_t)__builtin_ctz(m)], 0);
}

void check_complete(Cluster &cluster) {
  ClusterBarrier &b = cluster.barrier;
  if (b.arrived == 0 || !all_arrived(cluster)) return;
  b.arrived = 0;
  ++b.phase;
  b.completed = b.told.freeze();
  const std::vector<Waiting> waiting = std::move(b.waiting);
  b.waiting.clear();
  for (const Waiting &w : waiting) {
    waited(*w.warp, w.lanes, b);
    make_ready(*w.warp, w.lanes, WaitFor::kClusterBarrier);
  }
}

// in.a: 0 arrive, 1 wait; in.b: relaxed; in.c: aligned
Flow cluster_barrier(Warp &w, Fragment &f, const Inst &in) {
  Cluster &cluster = *w.cta->cluster;
  ClusterBarrier &b = cluster.barrier;
  std::vector<Fragment *> all{&f};
  if (in.c && !gather(w, f, ~w.exited, 0x30000000u + f.pc, all)) return Flow::kWait;
  Mask lanes = 0;
  for (const Fragment *part : all) lanes |= part->mask;
  if (in.a == 0) {
    for (Mask m = lanes; m; m &= m - 1) {
      uint64_t &mine = w.cluster_phase[(size_t)__builtin_ctz(m)];
      if (mine) w.launch().report("barrier", &w, __builtin_ctz(m), &in, "arrives twice at the cluster barrier without a wait between");
      mine = b.phase + 1;  // waits for the end of this phase
    }
    b.arrived += __builtin_popcount(lanes);
    in.b ? tell(w, lanes, b) : release(w, lanes, b.told);
    ++w.launch().changes;
    for (Fragment *part : all)
      if (part != &f) jump(w, *part, part->pc + 1);
    check_complete(cluster);
    return Flow::kNext;
  }
  const uint64_t phase = w.cluster_phase[(size_t)__builtin_ctz(lanes)];
  for (Mask m = lanes; m; m &= m - 1)
    if (!w.cluster_phase[(size_t)__builtin_ctz(m)])
      w.launch().report("barrier", &w, __builtin_ctz(m), &in, "waits at the cluster barrier without an arrival");
  if (b.phase >= phase) {
    waited(w, lanes, b);
    for (Fragment *part : all)
      if (part != &f) jump(w, *part, part->pc + 1);
    return Flow::kNext;
  }
  for (Fragment *part : all) {
    part->state = Fragment::kWaiting;
    part->wait = WaitFor();
    part->wait.kind = WaitFor::kClusterBarrier;
  }
  b.waiting.push_back({&w, lanes, &in});
  return Flow::kJumped;
}

// griddepcontrol.wait (9.7.13.13): what the launch before did happens before what follows. In truth it has ended already.
Flow wait_for_primary(Warp &w, Fragment &f, const Inst &) {
  w.launch().waited = true;
  if (w.launch().order.running < w.launch().order.id) {
    KnowledgeBuilder all;
    all.clock().set(kPrimary, 32, 0, 1);
    Knowledge told = all.freeze();
    told.fenced_global = told.clock;
    acquire(w, f.mask, told);
  }
  return Flow::kNext;
}

Flow nothing(Warp &, Fragment &, const Inst &) { return Flow::kNext; }
Flow pause(Warp &, Fragment &, const Inst &) { return Flow::kPoll; }

}  // namespace

void barriers_after_exit(Warp &warp) {
  Cta &cta = *warp.cta;
  for (Fragment &f : warp.fragments)  // collectives look again: exited lanes are no longer required
    if (f.mask && f.state == Fragment::kWaiting && f.wait.kind == WaitFor::kCollective) f.state = Fragment::kReady;
  check_complete(*cta.cluster);
  if (warp.exited != kAllLanes) return;
  for (int id = 0; id < 16; ++id)
    if (cta.barriers.named[id].expected == 0) check_complete(cta, id);
}

// Shared memory is gone when its block has ended: what other blocks of the cluster did there happened before that.
void check_visitors(Cta &cta) {
  ClockBuilder all;
  for (const auto &warp : cta.warps)
    for (const Lane &lane : warp->lanes) all.join(lane.clock);
  const Ref<Clock> known = all.freeze();
  Launch &launch = *cta.launch;
  const std::string end = "block " + std::to_string(cta.rank) + " of the cluster ends, and no barrier makes sure that ";
  const Actor last = actor(*cta.warps[0], 0, launch.program->code[0]);
  for (size_t i = 0; i < cta.shared.cells.size(); ++i)
    cta.shared.shadow.each_access(cta.shared.cells[i], [&](const Access &a) {
      if (a.cta != cta.index && !happened_before(a, known.get(), last))
        launch.report("exited-block", nullptr, 0, &launch.program->code[a.statement],
                      end + launch.who(a) + (a.flags & kWrite ? " wrote" : " read") + " its shared byte " + std::to_string(i * 4) + " before");
    });
  for (auto &[address, b] : cta.barriers.mbarriers) {
    if (!b.remote || b.told.clock().empty()) continue;
    const Ref<Clock> arrivals = b.told.clock().freeze();
    for (const Ref<Chunk> &theirs : arrivals->chunks) {
      const Chunk *ours = known->find(theirs->cta);
      const bool ordered = ours && std::equal(ours->epoch.begin(), ours->epoch.end(), theirs->epoch.begin(), std::greater_equal<>());
      if (theirs->cta == cta.index || ordered) continue;
      launch.report("exited-block", nullptr, 0, b.remote,
                    end + "this arrival at its mbarrier at shared address " + launch.shared_byte((uint32_t)address) + " came before");
      break;
    }
  }
}

void check_barriers_at_exit(Cta &cta) {
  Launch &launch = *cta.launch;
  if (cta.visited) check_visitors(cta);
  for (int id = 0; id < 16; ++id) {
    const NamedBarrier &b = cta.barriers.named[id];
    if (b.expected >= 0 && b.arrived > 0)
      launch.report("barrier", b.first_warp, 0, b.first, "the block ends while barrier " + std::to_string(id) + " has " + std::to_string(b.arrived) +
                    " of " + std::to_string(b.expected) + " threads");
  }
  for (const auto &[address, b] : cta.barriers.mbarriers)
    if (b.transactions || !b.waited)
      launch.report("mbarrier", cta.warps[0].get(), 0, b.last,
                    "the block ends, and nobody waited for the transactions of the mbarrier at shared address " +
                    launch.shared_byte((uint32_t)address));
}

// --------------------------------------------------------------------------------------------------------- decoding

bool decode_barrier(Decoder &d, const Statement &s, Inst &in) {
  const std::string &op = s.parts[0];
  in.klass = Class::kBarrier;
  if (op == "membar" || op == "fence") {
    in.klass = Class::kAtomic;
    const bool proxy = s.has("proxy");
    in.a = proxy ? 2 : s.has("mbarrier_init") ? 3 : s.has("cta") ? 0 : 1;
    in.b = !proxy ? op == "membar" || s.has("sc") : s.parts.back() == "async" ? 3 : s.parts.back() == "global" ? 2 : 1;
    in.exec = fence;
    return true;
  }
  if (op == "nanosleep" || op == "griddepcontrol" || op == "setmaxnreg") {
    in.klass = Class::kControl;
    if (op == "griddepcontrol" && s.has("wait")) {
      in.control = wait_for_primary;
      return true;
    }
    if (op == "setmaxnreg") {
      const int64_t n = s.operands[0].immediate;
      if (n < 24 || n > 256 || n % 8) return false;
    }
    in.control = op == "nanosleep" ? pause : nothing;
    return true;
  }
  if ((op == "bar" || op == "barrier") && s.has("cluster")) {
    in.a = s.has("wait");
    in.b = s.has("relaxed");
    in.c = s.has("aligned");
    in.control = cluster_barrier;
    return true;
  }
  if ((op == "bar" || op == "barrier") && !s.has("warp")) {
    in.a = s.has("arrive");
    in.b = s.has("red") ? (s.has("and") ? 0 : s.has("or") ? 1 : 2) : -1;
    in.c = op == "bar" || s.has("aligned");
    size_t i = 0;
    if (in.b >= 0) d.destination(s.operands[i++], in.b == 2 ? Type::kB32 : Type::kPred);
    d.source(s.operands[i++], Type::kB32);
    in.d = s.operands.size() - i - (in.b >= 0) > 0;
    if (in.d) d.source(s.operands[i++], Type::kB32);
    if (in.b >= 0) d.predicate(s.operands[i]);
    in.control = named_barrier;
    return true;
  }
  if (op != "mbarrier") return false;
  in.b = s.has("relaxed");
  if (s.has("init") || s.has("inval")) {
    in.a = s.has("inval");
    d.address(s.operands[0], in);
    if (!in.a) d.source(s.operands[1], Type::kB32);
    in.control = mbarrier_object;
  } else if (s.has("test_wait") || s.has("try_wait")) {
    in.a = s.has("parity");
    d.destination(s.operands[0], Type::kPred);
    d.address(s.operands[1], in);
    d.source(s.operands[2], in.a ? Type::kB32 : Type::kB64);
    in.control = mbarrier_wait;
  } else {
    in.a = s.has("arrive") ? s.has("expect_tx") : s.has("expect_tx") ? 2 : 3;
    size_t i = 0;
    d.destination(s.has("arrive") ? s.operands[i++] : Operand(), Type::kB64);
    d.address(s.operands[i++], in);
    in.c = i < s.operands.size() ? 2 : -1;
    if (in.c >= 0) d.source(s.operands[i], Type::kB32);
    in.control = mbarrier_signal;
  }
  return true;
}

}  // namespace vgpu
