// cp.async (PTX ISA 9.7.9.25.3), and completion of whatever is in flight.
#include "async.h"

#include <algorithm>
#include <cstring>

#include "decode.h"
#include "machine.h"

namespace vgpu {

namespace {

struct GlobalSpan {
  Cell *cells;
  Shadow *shadow;
};

GlobalSpan global_cells(Launch &launch, uint64_t address) { return {launch.cells(address), &launch.global->shadow()}; }

Cell *shared_cells(Cta &cta, uint32_t offset) { return &cta.shared.cells[offset / 4]; }

void mark(Warp &w, Cta &cta, const Piece &p, uint32_t read, int change) {
  Launch &launch = w.launch();
  cta.shared.shadow.in_flight(shared_cells(cta, p.shared), p.shared, p.bytes, true, change);
  by_page(p.global, read, [&](uint64_t at, uint32_t n) {
    const GlobalSpan g = global_cells(launch, at);
    g.shadow->in_flight(g.cells, at, n, false, change);
  });
}

// Writes of asynchronous copies that an mbarrier announces belong to the mbarrier's component of the block's clocks.
Actor agent(Launch &launch, const Inst *inst, Cta &cta, const MBarrier &b, bool proxy) {
  return {&launch, cta.warps[0].get(), inst, nullptr, nullptr, cta.index, (uint32_t)b.phase + 1, 1u << (b.agent % 32),
          (uint8_t)(cta.warps.size() + (size_t)b.agent / 32), (uint8_t)(proxy ? kAsyncProxy : 0)};
}

// `clock` knows of them, and of those before.
void announce(const Cta &cta, const MBarrier &b, ClockBuilder &clock) {
  clock.set(cta.index, cta.components(), (uint32_t)(cta.warps.size() * 32 + (size_t)b.agent), (uint32_t)b.phase + 1);
}

void copy_in(Launch &launch, Cta &cta, const Piece &p, uint32_t read, const Actor &writer) {
  uint8_t *to = &cta.shared.data[p.shared];
  memset(to, 0, p.bytes);
  cta.shared.shadow.record(shared_cells(cta, p.shared), p.shared, p.bytes, true, writer);
  if (!read) return;
  memcpy(to, (const void *)p.global, read);
  by_page(p.global, read, [&](uint64_t at, uint32_t n) {
    const GlobalSpan g = global_cells(launch, at);
    if (g.shadow->valid(g.cells, at, n)) return;
    for (uint32_t i = 0; i < n; ++i) {
      const GlobalSpan byte = global_cells(launch, at + i);
      if (byte.shadow->valid(byte.cells, at + i, 1)) continue;
      const uint32_t offset = p.shared + (uint32_t)(at - p.global) + i;
      cta.shared.shadow.set_valid(shared_cells(cta, offset), offset, 1, false);
    }
  });
}

void finish_copy(Warp &w, const CpAsync &c, const Actor &writer) {
  mark(w, *w.cta, c.piece, c.read, -1);
  copy_in(w.launch(), *w.cta, c.piece, c.read, writer);
}

void abandon(Warp &w, const CpAsync &c, const char *why) {
  w.launch().report("in-flight", &w, c.lane, c.inst, why);
  if (!c.done) finish_copy(w, c, actor(w, c.lane, *c.inst));
}

// What was the lane's write becomes one that the mbarrier announces.
void hand_over(Warp &w, const CpAsync &c, const Actor &writer) {
  Cell *cells = shared_cells(*w.cta, c.piece.shared);
  uint8_t valid[4];
  for (uint32_t i = 0; i < c.piece.bytes / 4; ++i) valid[i] = cells[i].valid;
  w.cta->shared.shadow.record(cells, c.piece.shared, c.piece.bytes, true, writer);
  for (uint32_t i = 0; i < c.piece.bytes / 4; ++i) cells[i].valid = valid[i];
}

// Completes the copies of a lane that `which` takes, in order, as the lane's own writes.
template <class Which>
void finish_copies(Warp &w, const Which &which) {
  std::deque<CpAsync> &all = w.async.copies;
  for (size_t i = 0; i < all.size();) {
    if (all[i].arrive || !which(all[i])) {
      ++i;
      continue;
    }
    const CpAsync c = all[i];
    all.erase(all.begin() + (long)i);
    if (!c.done) finish_copy(w, c, actor(w, c.lane, *c.inst));
  }
}

// The arrival at index i of the queue: its lane's copies before it are complete then, and the mbarrier announces them.
void finish_arrival(Warp &w, size_t i) {
  std::deque<CpAsync> &all = w.async.copies;
  const CpAsync arrival = all[i];
  all.erase(all.begin() + (long)i);
  Cta *cta;
  MBarrier *b = find_mbarrier(w, arrival.lane, *arrival.inst, arrival.mbarrier, &cta);
  if (!b) return;
  for (size_t k = 0; k < i && k < all.size();) {
    if (all[k].lane != arrival.lane || all[k].arrive) {
      ++k;
      continue;
    }
    const CpAsync c = all[k];
    all.erase(all.begin() + (long)k);
    --i;
    const Actor writer = agent(w.launch(), c.inst, *cta, *b, false);
    c.done ? hand_over(w, c, writer) : finish_copy(w, c, writer);
  }
  // All of the lane's copies before it are complete: also those that earlier arrivals announced.
  ClockBuilder landed;
  landed.join(w.async.landed[(size_t)arrival.lane]);
  announce(*cta, *b, landed);
  w.async.landed[(size_t)arrival.lane] = landed.freeze();
  b->told.clock().join(w.async.landed[(size_t)arrival.lane]);
  mbarrier_arrive(*cta, *b, 1, actor(w, arrival.lane, *arrival.inst));
}

// The arrival at index i, and before it the lane's earlier ones in their order.
void finish_arrivals(Warp &w, size_t i) {
  std::deque<CpAsync> &all = w.async.copies;
  const auto mine = [lane = all[i].lane](const CpAsync &c) { return c.arrive && c.lane == lane; };
  for (auto count = std::count_if(all.begin(), all.begin() + (long)i + 1, mine); count > 0; --count)
    finish_arrival(w, (size_t)(std::find_if(all.begin(), all.end(), mine) - all.begin()));
}

// r: destination, source, [bytes read]. in.c: bytes; in.d, in.offset: destination; in.b: source is 64-bit; in.type2 kU32 if a
// third operand; in.a: offset of the source.
void cp_async(Warp &w, const Inst &in, Mask m) {
  Launch &launch = w.launch();
  Mask poison = w.unit_poison[in.r[0]] | w.unit_poison[in.r[1]];
  if (in.type2 == Type::kU32) poison |= w.unit_poison[in.r[2]];
  Mask ignored = 0;
  if (in.type2 == Type::kPred) {
    const Slot p = in.r[2] & ~kNegated;
    poison |= w.predicate_poison[p];
    ignored = in.r[2] & kNegated ? ~w.predicates[p] : w.predicates[p];
  }
  if (check_poison(w, in, poison & m, "the operands of a cp.async")) return;
  uint64_t to[32] = {};
  Mask done = 0;
  for (Mask rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    CpAsync c{};
    c.inst = &in;
    c.lane = l;
    c.group = w.async.committed[(size_t)l];
    c.read = in.type2 == Type::kU32 ? w.at<uint32_t>(in.r[2])[l] : ignored >> l & 1 ? 0 : (uint32_t)in.c;
    to[l] = w.address(in.r[0], l, in.d) + (uint64_t)in.offset;
    c.piece.global = w.address(in.r[1], l, in.b) + (uint64_t)(int64_t)in.a;
    c.piece.bytes = (uint32_t)in.c;
    if (c.read > (uint32_t)in.c) {
      launch.report("out-of-range", &w, l, &in, "reads " + std::to_string(c.read) + " bytes of a copy of " + std::to_string(in.c));
      continue;
    }
    const Span shared = resolve(w, l, in, Space::kShared, to[l], (unsigned)in.c, (unsigned)in.c, true);
    if (!shared.data) continue;
    if (c.piece.global % (uint64_t)in.c) {
      launch.report("misaligned", &w, l, &in, "copies " + std::to_string(in.c) + " bytes from a global address that is not a multiple of it");
      continue;
    }
    const Actor who = actor(w, l, in);
    if (c.read) {
      const Span global = resolve(w, l, in, Space::kGlobal, c.piece.global, c.read, 1, false);
      if (!global.data) continue;
      global.shadow->touch(global.cells, c.piece.global, c.read, false, who);
    }
    c.piece.shared = (uint32_t)(to[l] - kSharedBase);
    shared.shadow->probe(shared.cells, c.piece.shared, (unsigned)in.c, true, who);
    mark(w, *w.cta, c.piece, c.read, 1);
    w.async.copies.push_back(c);
    done |= 1u << l;
    launch.counters.async_load_bytes += c.read;
  }
  if (done) count_shared(w, in, to, done, (unsigned)in.c);
}

void commit(Warp &w, const Inst &, Mask m) {
  for (; m; m &= m - 1) ++w.async.committed[(size_t)__builtin_ctz(m)];
}

// in.c: groups that may stay open, or -1: all copies complete
void wait_group(Warp &w, const Inst &in, Mask m) {
  finish_copies(w, [&](const CpAsync &c) {
    if (!(m >> c.lane & 1)) return false;
    return in.c < 0 || c.group + (uint64_t)in.c < w.async.committed[(size_t)c.lane];
  });
  ++w.launch().changes;
}

// cp.async.mbarrier.arrive (9.7.13.15.15): r: address. in.a: noinc
void mbarrier_arrive_copies(Warp &w, const Inst &in, Mask m) {
  for (Mask rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    CpAsync c{};
    c.inst = &in;
    c.lane = l;
    c.arrive = true;
    check_poison(w, in, w.unit_poison[in.r[0]] & 1u << l, "the address of an mbarrier");
    c.mbarrier = w.address(in.r[0], l, in.d) + (uint64_t)in.offset;
    if (c.mbarrier >> 56) c.mbarrier &= ~kSharedWindow;
    Cta *cta;
    MBarrier *b = find_mbarrier(w, l, in, c.mbarrier, &cta);
    if (!b) continue;
    if (!in.a) ++b->pending;
    w.async.copies.push_back(c);
  }
}

}  // namespace

void complete_load(Launch &launch, BulkCopy &copy) {
  for (const Piece &p : copy.pieces)
    if (!p.fill)
      by_page(p.global, p.bytes, [&](uint64_t at, uint32_t n) {
        const GlobalSpan g = global_cells(launch, at);
        g.shadow->in_flight(g.cells, at, n, false, -1);
        const Allocation *a = launch.global->find(at);
        if (a && a->writable)  // nobody can write over the others
          for (Cta *cta : copy.targets)
            if (const auto b = cta->barriers.mbarriers.find(copy.mbarrier); b != cta->barriers.mbarriers.end())
              g.shadow->record(g.cells, at, n, false, agent(launch, copy.inst, *cta, b->second, true));
      });
  for (Cta *cta : copy.targets) {
    const auto found = cta->barriers.mbarriers.find(copy.mbarrier);
    if (found == cta->barriers.mbarriers.end()) {
      launch.report("mbarrier", copy.warp, copy.lane, copy.inst, "the mbarrier of a copy is gone when the copy completes");
      continue;
    }
    MBarrier &b = found->second;
    for (const Piece &p : copy.pieces) {
      cta->shared.shadow.in_flight(shared_cells(*cta, p.shared), p.shared, p.bytes, true, -1);
      copy_in(launch, *cta, p, p.fill ? 0 : p.bytes, agent(launch, copy.inst, *cta, b, true));
    }
    announce(*cta, b, b.told.clock());
    mbarrier_transactions(*cta, b, -copy.bytes, agent(launch, copy.inst, *cta, b, true));
  }
}

void free_source(Launch &launch, BulkCopy &copy) {
  if (copy.source_free) return;
  copy.source_free = true;
  Cta &cta = *copy.targets[0];
  const Actor reader = actor(*copy.warp, copy.lane, *copy.inst);
  for (const Piece &p : copy.pieces) {
    Shadow &shadow = cta.shared.shadow;
    shadow.in_flight(shared_cells(cta, p.shared), p.shared, p.bytes, false, -1);
    shadow.record(shared_cells(cta, p.shared), p.shared, p.bytes, false, reader);
    for (uint32_t i = 0; i < p.bytes; ++i) {
      copy.captured.push_back(cta.shared.data[p.shared + i]);
      copy.captured_valid.push_back(shadow.valid(shared_cells(cta, p.shared + i), p.shared + i, 1));
    }
  }
  ++launch.changes;
}

void complete_store(Launch &launch, BulkCopy &copy) {
  free_source(launch, copy);
  Actor writer = actor(*copy.warp, copy.lane, *copy.inst);
  writer.flags = kAsyncProxy;
  size_t from = 0;
  bool all_valid = true;
  for (const Piece &p : copy.pieces) {
    memcpy((void *)p.global, &copy.captured[from], p.bytes);
    by_page(p.global, p.bytes, [&](uint64_t at, uint32_t n) {
      const GlobalSpan g = global_cells(launch, at);
      g.shadow->in_flight(g.cells, at, n, true, -1);
      g.shadow->record(g.cells, at, n, true, writer);
    });
    for (uint32_t i = 0; i < p.bytes; ++i) all_valid &= copy.captured_valid[from + i];
    from += p.bytes;
  }
  if (!all_valid)
    launch.report("uninitialised", copy.warp, copy.lane, copy.inst,
                  "an undefined value reaches global memory: the copy read shared memory that was never written");
  ++launch.changes;
}

bool complete_some(Launch &launch) {
  struct Choice {
    size_t bulk;
    Warp *warp;
    size_t index;
    WarpGroup *group;
  };
  std::vector<Choice> choices;
  const bool any = launch.options.random_completion;
  for (size_t i = 0; i < launch.queue.bulk.size(); ++i)
    if (any || !launch.queue.bulk[i]->store) choices.push_back({i, nullptr, 0, nullptr});
  for (auto &c : launch.clusters)
    for (auto &cta : c->ctas) {
      for (auto &warp : cta->warps)
        for (size_t i = 0; i < warp->async.copies.size(); ++i)
          if ((any && !warp->async.copies[i].done) || warp->async.copies[i].arrive) choices.push_back({0, warp.get(), i, nullptr});
      for (auto &group : cta->groups) {
        const auto issued = [&](const Warp *w) { return w->matrix.issued > group->completed; };
        if (any && std::all_of(group->warps.begin(), group->warps.end(), issued)) choices.push_back({0, nullptr, 0, group.get()});
      }
    }
  if (choices.empty()) return false;
  const Choice c = choices[launch.random() % choices.size()];
  ++launch.changes;
  if (c.group) {
    run_product(*c.group);
    return true;
  }
  if (!c.warp) {
    const std::unique_ptr<BulkCopy> copy = std::move(launch.queue.bulk[c.bulk]);
    launch.queue.bulk.erase(launch.queue.bulk.begin() + (long)c.bulk);
    if (!copy->store) {
      complete_load(launch, *copy);
    } else if (!copy->source_free && launch.chance(2)) {  // the two halves of a store complete apart
      free_source(launch, *copy);
      launch.queue.bulk.push_back(std::unique_ptr<BulkCopy>(new BulkCopy(*copy)));
    } else {
      complete_store(launch, *copy);
    }
    return true;
  }
  std::deque<CpAsync> &all = c.warp->async.copies;
  if (all[c.index].arrive) {
    finish_arrivals(*c.warp, c.index);
  } else {
    CpAsync &copy = all[c.index];
    finish_copy(*c.warp, copy, actor(*c.warp, copy.lane, *copy.inst));
    copy.done = true;
  }
  return true;
}

void report_in_flight(Launch &launch, const Actor &who, uint64_t address, uint8_t bytes, const Shadow &shadow, bool global, bool write) {
  const auto say = [&](const Inst *inst, const char *what) {
    launch.report("in-flight", who.warp, __builtin_ctz(who.lanes), who.inst,
                  std::string(write ? "writes " : "reads ") + launch.place(address, global) + ", which " + what + " at " +
                      launch.program->where(*inst) + " has not finished with");
  };
  // Whether the access meets `n` bytes at `begin` that are written, or read, in flight.
  const auto meets = [&](uint64_t begin, uint32_t n, bool written) {
    bool any = false;
    for (uint64_t i = 0; i < 4; ++i) any |= (bytes >> i & 1) && address + i >= begin && address + i < begin + n;
    return any && (write || written);
  };
  for (auto &c : launch.clusters)
    for (auto &cta : c->ctas) {
      const bool here = &cta->shared.shadow == &shadow;
      for (auto &warp : cta->warps) {
        for (const CpAsync &copy : warp->async.copies)
          if (!copy.arrive && !copy.done &&
              (global ? meets(copy.piece.global, copy.read, false) : here && meets(copy.piece.shared, copy.piece.bytes, true)))
            return say(copy.inst, "the copy");
        for (const WgmmaOp &op : warp->matrix.pending)
          for (const Piece &p : op.reads)
            if (here && meets(p.shared, p.bytes, false)) return say(op.inst, "the matrix product");
      }
    }
  for (const auto &copy : launch.queue.bulk) {
    bool here = false;
    for (const Cta *cta : copy->targets) here |= &cta->shared.shadow == &shadow;
    for (const Piece &p : copy->pieces)
      if (global ? !p.fill && meets(p.global, p.bytes, copy->store) : here && !copy->source_free && meets(p.shared, p.bytes, !copy->store))
        return say(copy->inst, "the copy");
  }
}

void async_at_exit(Warp &w) {
  // What an mbarrier will announce goes on after the end of the warp; nobody can wait for the rest any more.
  std::deque<CpAsync> all;
  all.swap(w.async.copies);
  std::array<size_t, 32> announced{};  // by lane: copies before this one
  for (size_t i = 0; i < all.size(); ++i)
    if (all[i].arrive) announced[(size_t)all[i].lane] = i + 1;
  for (size_t i = 0; i < all.size(); ++i)
    if (i < announced[(size_t)all[i].lane])
      w.async.copies.push_back(all[i]);
    else
      abandon(w, all[i], "the warp ends, and nobody waited for this copy");
  if (!w.matrix.pending.empty())
    w.launch().report("in-flight", &w, 0, w.matrix.pending.front().inst, "the warp ends, and it did not wait for this matrix product");
}

void async_at_cta_exit(Cta &cta) {
  Launch &launch = *cta.launch;
  for (auto &warp : cta.warps) {
    for (const CpAsync &c : warp->async.copies)
      if (!c.arrive) abandon(*warp, c, "the block ends, and nobody waited for this copy");
    warp->async.copies.clear();
  }
  auto &all = launch.queue.bulk;
  for (size_t i = 0; i < all.size();) {
    BulkCopy &copy = *all[i];
    bool mine = false;
    for (const Cta *target : copy.targets) mine |= target == &cta;
    if (!mine && copy.warp->cta != &cta) {
      ++i;
      continue;
    }
    if (mine && (!copy.store || !copy.source_free))
      launch.report("in-flight", copy.warp, copy.lane, copy.inst, copy.store ? "the block ends while this copy still reads its shared memory"
                                                                           : "the block ends while this copy still writes its shared memory");
    copy.store ? complete_store(launch, copy) : complete_load(launch, copy);
    all.erase(all.begin() + (long)i);
  }
}

bool decode_async(Decoder &d, const Statement &s, Inst &in) {
  if (s.parts[0] != "cp" || s.has("bulk")) return false;
  in.klass = Class::kAsync;
  if (s.has("commit_group")) {
    in.exec = commit;
    return true;
  }
  if (s.has("wait_group") || s.has("wait_all")) {
    in.c = s.has("wait_all") ? -1 : (int)s.operands[0].immediate;
    in.exec = wait_group;
    return true;
  }
  if (s.has("mbarrier")) {
    in.a = s.has("noinc");
    d.address(s.operands[0], in);
    in.exec = mbarrier_arrive_copies;
    return true;
  }
  Inst source;
  d.address(s.operands[0], in);
  d.address(s.operands[1], source);
  in.b = source.d;
  in.a = (int)source.offset;
  in.c = (int)s.operands[2].immediate;
  if (in.c != 16 && (s.has("cg") || (in.c != 4 && in.c != 8))) return false;
  if (s.operands.size() > 3 + (size_t)s.has("L2::cache_hint")) {  // a cache policy may follow
    const Operand &size = s.operands[3];  // or the predicate that nothing is read
    in.type2 = d.is_predicate(size) ? Type::kPred : Type::kU32;
    if (in.type2 == Type::kPred)
      d.predicate(size);
    else
      d.source(size, Type::kU32);
  }
  in.exec = cp_async;
  return true;
}

}  // namespace vgpu
