#include "memory.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace vgpu {

// ------------------------------------------------------------------------------------------------------- the shadow

namespace {

// Bytes of the cell at `address` that [begin, begin + bytes) covers.
uint8_t covered(uint64_t cell_address, uint64_t begin, unsigned bytes) {
  const uint64_t low = std::max(begin, cell_address) - cell_address, high = std::min(begin + bytes, cell_address + 4) - cell_address;
  return (uint8_t)((15u >> (4 - (high - low))) << low);
}

template <class Body>
void for_cells(Cell *cell, uint64_t address, unsigned bytes, const Body &body) {
  for (uint64_t at = address & ~3ull; at < address + bytes; at += 4, ++cell) body(*cell, covered(at, address, bytes), at);
}

bool known(const Clock *clock, const Access &access, Mask lanes) {
  const Chunk *chunk = clock ? clock->find(access.cta) : nullptr;
  if (!chunk) return false;
  const uint32_t *row = &chunk->epoch[access.warp * 32u];
  for (; lanes; lanes &= lanes - 1)
    if (row[__builtin_ctz(lanes)] < access.epoch) return false;
  return true;
}

}  // namespace

bool happened_before(const Access &access, const Clock *clock, const Actor &actor) {
  const bool own = access.cta == actor.cta && access.warp == actor.row;
  const Mask others = own ? access.lanes & ~actor.lanes : access.lanes;
  return !others || known(clock, access, others);
}

std::vector<Access> &Shadow::overflow(Cell &cell) {
  if (!cell.more) {
    if (free_.empty()) {
      overflow_.emplace_back();
      cell.more = (uint32_t)overflow_.size();
    } else {
      cell.more = free_.back();
      free_.pop_back();
    }
  }
  return overflow_[cell.more - 1];
}

void Shadow::forget(Cell &cell) {
  cell.write = cell.read = Access();
  cell.reads_in_flight = cell.writes_in_flight = 0;  // of a launch that was stopped
  cell.constant = 0;
  if (!cell.more) return;
  overflow_[cell.more - 1].clear();
  free_.push_back(cell.more);
  cell.more = 0;
}

void Shadow::keep_as(Cell &cell, uint32_t own, uint32_t earlier) {
  Access write = cell.write, read = cell.read;
  if (cell.more)
    for (const Access &a : overflow_[cell.more - 1]) (a.flags & kWrite ? write : read) = a;
  forget(cell);
  const auto kept = [&](const Access &a) {
    Access p;
    if (!a.lanes) return p;
    p.cta = a.cta == kOlder ? kOlder : a.cta == kPrimary ? earlier : own;
    p.lanes = 1;
    p.epoch = 1;
    p.flags = (uint8_t)(kBytes | (a.flags & (kWrite | kAsyncProxy)));
    return p;
  };
  cell.write = kept(write);
  cell.read = kept(read);
}

bool Shadow::valid(const Cell *cell, uint64_t address, unsigned bytes) const {
  bool all = true;
  for_cells(const_cast<Cell *>(cell), address, bytes, [&](Cell &c, uint8_t part, uint64_t) { all &= (c.valid & part) == part; });
  return all;
}

void Shadow::set_valid(Cell *cell, uint64_t address, unsigned bytes, bool value) {
  for_cells(cell, address, bytes, [&](Cell &c, uint8_t part, uint64_t) { c.valid = (uint8_t)(value ? c.valid | part : c.valid & ~part); });
}

void Shadow::set_constant(Cell *cell, uint64_t address, unsigned bytes) {
  for_cells(cell, address, bytes, [&](Cell &c, uint8_t part, uint64_t) { c.constant |= part; });
}

const Access *Shadow::writer(const Cell *cell, uint64_t address, unsigned bytes) const {
  const Access *found = nullptr;
  for_cells(const_cast<Cell *>(cell), address, bytes, [&](Cell &c, uint8_t part, uint64_t) {
    if (c.write.lanes && c.write.flags & part && c.write.cta < kOlder) found = &c.write;
    if (c.more)
      for (const Access &access : overflow_[c.more - 1])
        if (access.flags & kWrite && access.flags & part && access.cta < kOlder) found = &access;
  });
  return found;
}

void Shadow::touch(Cell *cell, uint64_t address, unsigned bytes, bool write, const Actor &actor, bool observes) {
  for_cells(cell, address, bytes, [&](Cell &c, uint8_t part, uint64_t at) {
    probe_cell(c, part, write, actor, at);
    write ? record_write(c, part, actor, observes) : record_read(c, part, actor);
  });
}

void Shadow::probe(Cell *cell, uint64_t address, unsigned bytes, bool write, const Actor &actor) {
  for_cells(cell, address, bytes, [&](Cell &c, uint8_t part, uint64_t at) { probe_cell(c, part, write, actor, at); });
}

void Shadow::record(Cell *cell, uint64_t address, unsigned bytes, bool write, const Actor &actor) {
  for_cells(cell, address, bytes, [&](Cell &c, uint8_t part, uint64_t) { write ? record_write(c, part, actor) : record_read(c, part, actor); });
}

void Shadow::in_flight(Cell *cell, uint64_t address, unsigned bytes, bool write, int change) {
  for_cells(cell, address, bytes, [&](Cell &c, uint8_t, uint64_t) {
    uint16_t &count = write ? c.writes_in_flight : c.reads_in_flight;
    count = (uint16_t)(count + change);
  });
}

namespace {

// What could order two accesses that race.
std::string missing(const Access &access, const Actor &actor, bool global) {
  if (access.cta == kPrimary) return "no griddepcontrol.wait between them";
  if (access.cta == kOlder) return "the kernel between them has no griddepcontrol.wait";
  const bool threads = actor.row < actor.warp->cta->warps.size();
  if (access.cta == actor.cta) return access.warp == actor.row && threads ? "no __syncwarp between them" : "no barrier between them";
  const uint32_t *cluster = actor.launch->cluster;
  const std::string of_cluster = cluster[0] * cluster[1] * cluster[2] > 1 ? ", a barrier of the cluster" : "";
  return "nothing orders them (a fence and an atomic" + of_cluster + (global ? ", or the end of the kernel)" : ")");
}

}  // namespace

inline void Shadow::check(const Access &access, uint8_t bytes, bool write, const Actor &actor, uint64_t address) {
  if (!(access.flags & bytes) || !access.lanes) return;
  if (access.flags & actor.flags & kStrong && (access.cta == actor.cta || !((access.flags | actor.flags) & kBlockScope))) return;
  if (!happened_before(access, actor.clock, actor)) {
    Access other = access;
    if (access.cta == actor.cta && access.warp == actor.row) other.lanes &= ~actor.lanes;
    actor.launch->report("race", actor.warp, __builtin_ctz(actor.lanes), actor.inst,
                         std::string(write ? "writes " : "reads ") + actor.launch->place(address, global_) + ", which " +
                             actor.launch->who(other) + (access.flags & kWrite ? " wrote" : " read") + ": " + missing(access, actor, global_));
    return;
  }
  // An ordinary write is visible to the async proxy only behind a proxy fence (PTX ISA 8 "Memory Consistency Model": proxies).
  if ((actor.flags & kAsyncProxy) && !(access.flags & kAsyncProxy) && (access.flags & kWrite) && !write &&
      !known((global_ ? actor.knows->fenced_global : actor.knows->fenced_shared).get(), access, access.lanes))
    actor.launch->report("proxy", actor.warp, __builtin_ctz(actor.lanes), actor.inst,
                         "the async proxy reads " + actor.launch->place(address, global_) + ", which " + actor.launch->who(access) +
                             " wrote with an ordinary store, without fence.proxy.async after the store");
}

void Shadow::probe_cell(Cell &cell, uint8_t bytes, bool write, const Actor &actor, uint64_t address) {
  if (cell.writes_in_flight || (write && cell.reads_in_flight)) report_in_flight(*actor.launch, actor, address, bytes, *this, global_, write);
  if (write && cell.constant & bytes)
    actor.launch->report("race", actor.warp, __builtin_ctz(actor.lanes), actor.inst, "writes " + actor.launch->place(address, global_) +
                         ", which this kernel read with ld.global.nc: it must stay as it is while the kernel runs");
  check(cell.write, bytes, write, actor, address);
  if (write) check(cell.read, bytes, write, actor, address);
  if (cell.more)
    for (const Access &access : overflow_[cell.more - 1])
      if (write || access.flags & kWrite) check(access, bytes, write, actor, address);
}

namespace {

Access made_by(const Actor &actor, uint8_t bytes, bool write) {
  Access a;
  a.cta = actor.cta;
  a.lanes = actor.lanes;
  a.epoch = actor.epoch;
  a.statement = (uint16_t)(actor.inst - actor.launch->program->code.data());
  a.warp = actor.row;
  a.flags = (uint8_t)(bytes | actor.flags | (write ? kWrite : 0));
  return a;
}

bool same_warp(const Access &a, const Actor &b) { return a.cta == b.cta && a.warp == b.row; }

int strength(uint8_t flags) { return !(flags & kStrong) ? 0 : flags & kBlockScope ? 1 : 2; }

// Whether an earlier access still matters behind a later one: it races with some that the later one does not race with.
bool outlives(const Access &earlier, const Actor &later) { return strength(earlier.flags) < strength(later.flags); }

constexpr size_t kMost = 16;  // accesses of a cell; beyond these the oldest is forgotten

void push(std::vector<Access> &more, const Access &access) {
  if (more.size() >= kMost) more.erase(more.begin());
  more.push_back(access);
}

}  // namespace

void Shadow::record_read(Cell &cell, uint8_t bytes, const Actor &actor) {
  bool recorded = false;
  const auto add = [&](Access &access) {  // joins an entry of the same warp, epoch and bytes; takes these lanes out of older ones
    if (!access.lanes || !same_warp(access, actor) || access.flags & kWrite) return;
    if (access.epoch == actor.epoch && (access.flags & kBytes) == bytes && strength(access.flags) == strength(actor.flags)) {
      access.lanes |= actor.lanes;
      recorded = true;
    } else if (!((access.flags & kBytes) & ~bytes) && !outlives(access, actor)) {
      access.lanes &= ~actor.lanes;
    }
  };
  add(cell.read);
  if (cell.more) {
    std::vector<Access> &more = overflow_[cell.more - 1];
    for (Access &access : more) add(access);
    more.erase(std::remove_if(more.begin(), more.end(), [](const Access &a) { return !a.lanes; }), more.end());
  }
  if (recorded) return;
  if (!cell.read.lanes) {
    cell.read = made_by(actor, bytes, false);
    return;
  }
  push(overflow(cell), made_by(actor, bytes, false));
}

void Shadow::record_write(Cell &cell, uint8_t bytes, const Actor &actor, bool observes) {
  Access now = made_by(actor, bytes, true);
  const auto trim = [&](Access &access) {  // what is overwritten mostly no longer matters
    if (outlives(access, actor)) return;
    // Strong accesses need no order among them, so an ordinary access may be ordered behind the later one alone. That is enough if the
    // later one is an atomic that tells what it observed (8.9.5): the last to take a ticket may clear the counter.
    const bool observed = observes && access.flags & kWrite;
    if (access.lanes && !observed && access.flags & actor.flags & kStrong && access.flags & bytes && !happened_before(access, actor.clock, actor)) {
      if (!same_warp(access, actor) || access.epoch != now.epoch || access.flags != now.flags) return;
      now.lanes |= access.lanes;
    }
    access.flags = (uint8_t)(access.flags & ~bytes);
    if (!(access.flags & kBytes)) access.lanes = 0;
  };
  trim(cell.read);
  if (cell.more) {
    std::vector<Access> &more = overflow_[cell.more - 1];
    for (Access &access : more) trim(access);
    more.erase(std::remove_if(more.begin(), more.end(), [](const Access &a) { return !a.lanes; }), more.end());
  }
  trim(cell.write);
  if (cell.write.lanes) push(overflow(cell), cell.write);  // other bytes of the cell keep their writer
  cell.write = now;
  cell.valid |= bytes;
  ++actor.launch->changes;
}

// -------------------------------------------------------------------------------------------------- global memory

void GlobalMemory::map(uint64_t address, uint64_t bytes, const std::string &name, bool writable, bool initialised) {
  last_ = nullptr;
  allocations_[address] = {{address, bytes, name}, writable, initialised};
  reset(address, bytes, initialised);
}

bool GlobalMemory::unmap(uint64_t address) {
  last_ = nullptr;
  const auto found = allocations_.find(address);
  if (found == allocations_.end()) return false;
  const uint64_t bytes = found->second.bytes;
  allocations_.erase(found);
  reset(address, bytes, false);
  return true;
}

const Allocation *GlobalMemory::find(uint64_t address) const {
  if (last_ && address - last_->address < last_->bytes) return last_;
  const Allocation *a = below(address);
  if (!a || address - a->address >= a->bytes) return nullptr;
  return last_ = a;
}

const Allocation *GlobalMemory::below(uint64_t address) const {
  auto at = allocations_.upper_bound(address);
  return at == allocations_.begin() ? nullptr : &std::prev(at)->second;
}

const Allocation *GlobalMemory::above(uint64_t address) const {
  const auto at = allocations_.upper_bound(address);
  return at == allocations_.end() ? nullptr : &at->second;
}

std::string beside(uint64_t address, uint64_t bytes, const Range *below, const Range *above) {
  constexpr uint64_t kFar = 1 << 20;
  const uint64_t behind = below ? address + bytes - below->address - below->bytes : ~0ull, before = above ? above->address - address : ~0ull;
  if (std::min(behind, before) > kFar) return "";
  if (before < behind) return ", beginning " + std::to_string(before) + " bytes before " + above->name;
  return ", ending " + std::to_string(behind) + " bytes behind the " + std::to_string(below->bytes) + " bytes of " + below->name;
}

// What lies beside the range on its pages stays as it is. Pages are few even where an allocation spans gigabytes: walk what is smaller.
void GlobalMemory::reset(uint64_t address, uint64_t bytes, bool initialised) {
  const uint64_t first = address >> 12, last = (address + bytes + 4095) >> 12;
  last_page_ = ~0ull;
  const auto drop = [&](auto at) {
    const uint64_t base = at->first << 12, begin = std::max(base, address), end = std::min(base + 4096, address + bytes);
    for (uint64_t cell = begin & ~3ull; cell < end; cell += 4) shadow_.forget(at->second->cells[(cell - base) / 4]);
    if (begin < end) shadow_.set_valid(&at->second->cells[(begin - base) / 4], begin, (unsigned)(end - begin), initialised);
    const Allocation *some = below(base + 4095);
    return some && some->address + some->bytes > base ? std::next(at) : pages_.erase(at);
  };
  if (last - first < pages_.size()) {
    for (uint64_t page = first; page < last; ++page)
      if (const auto at = pages_.find(page); at != pages_.end()) drop(at);
  } else {
    for (auto at = pages_.begin(); at != pages_.end();) at = at->first >= first && at->first < last ? drop(at) : std::next(at);
  }
}

void GlobalMemory::initialise(Page &page, uint64_t base, const Allocation &a) {
  const uint64_t begin = std::max(base, a.address), end = std::min(base + 4096, a.address + a.bytes);
  if (a.initialised && begin < end) shadow_.set_valid(&page.cells[(begin - base) / 4], begin, (unsigned)(end - begin), true);
}

void GlobalMemory::set_initialised(uint64_t address, uint64_t bytes) {
  by_page(address, bytes, [&](uint64_t at, uint32_t n) { shadow_.set_valid(cells(at), at, n, true); });
}

Cell *GlobalMemory::cells(uint64_t address, const LaunchOrder &order) {
  const uint64_t number = address >> 12;
  if (number != last_page_) {
    std::unique_ptr<Page> &page = pages_[number];
    if (!page) {
      page.reset(new Page);
      const uint64_t base = number << 12;
      auto at = allocations_.upper_bound(base);
      if (at != allocations_.begin()) initialise(*page, base, std::prev(at)->second);
      for (; at != allocations_.end() && at->first < base + 4096; ++at) initialise(*page, base, at->second);
    }
    last_page_ = number;
    last_page_data_ = page.get();
  }
  uint64_t &last = last_page_data_->launch;
  if (order.id && last != order.id) {  // launches follow each other: what an earlier one did is ordered, but for those that may still run
    const uint32_t own = last >= order.waited_for ? kPrimary : kOlder, earlier = last > order.waited_for ? kPrimary : kOlder;
    for (Cell &cell : last_page_data_->cells) last >= order.running ? shadow_.keep_as(cell, own, earlier) : shadow_.forget(cell);
    last = order.id;
  }
  return &last_page_data_->cells[(address & 4095) / 4];
}

// ------------------------------------------------------------------------------------------------------- resolving

// PTX ISA 5.1.1 ff.
Space space_of_window(uint64_t address) {
  switch (address >> 56 << 56) {
    case kSharedWindow: return Space::kShared;
    case kLocalWindow: return Space::kLocal;
    case kParamWindow: return Space::kParam;
    case kConstWindow: return Space::kConst;
    default: return Space::kGlobal;
  }
}

uint64_t window_of(Space space) {
  switch (space) {
    case Space::kShared: case Space::kSharedCluster: return kSharedWindow;
    case Space::kLocal: return kLocalWindow;
    case Space::kParam: return kParamWindow;
    case Space::kConst: return kConstWindow;
    default: return 0;
  }
}

Actor actor(Warp &warp, int lane, const Inst &in, uint8_t flags) {
  const Lane &l = warp.lanes[(size_t)lane];
  return {&warp.launch(), &warp, &in, l.clock.get(), &l, warp.cta->index, warp.epoch, 1u << lane, (uint8_t)warp.index,
          flags};
}

namespace {

std::string hex(uint64_t x) {
  char text[32];
  snprintf(text, sizeof text, "0x%llx", (unsigned long long)x);
  return text;
}

}  // namespace

Span resolve(Warp &warp, int lane, const Inst &in, Space space, uint64_t address, unsigned bytes, unsigned align, bool write) {
  Launch &launch = warp.launch();
  const auto fail = [&](const char *kind, const std::string &text) {
    launch.report(kind, &warp, lane, &in, text);
    return Span();
  };
  const char *const verb = write ? "writes " : "reads ";
  if (address % align)
    return fail("misaligned", verb + std::to_string(bytes) + " bytes at address " + hex(address) + ", which is not a multiple of " + std::to_string(align));

  if (space == Space::kGeneric) {
    space = space_of_window(address);
    address -= window_of(space);
    if (space == Space::kShared) space = Space::kSharedCluster;  // of any block of the cluster
  }
  if (space == Space::kGlobal || space == Space::kConst) {
    const Allocation *a = launch.global->find(address);
    if (!a || address + bytes > a->address + a->bytes)
      return fail("out-of-range", verb + std::to_string(bytes) + " bytes at global address " + hex(address) +
                                      beside(address, bytes, launch.global->below(address), launch.global->above(address)));
    if (write && (!a->writable || space == Space::kConst))
      return fail("read-only", verb + std::to_string(bytes) + " bytes, " + std::to_string(address - a->address) + " bytes into " + a->name + ", which is an input");
    return {(uint8_t *)address, space == Space::kConst ? nullptr : launch.cells(address), &launch.global->shadow(), space, address};
  }
  if (space == Space::kShared || space == Space::kSharedCluster) {
    Cta *cta = warp.cta;
    const uint32_t rank = (uint32_t)(address >> kClusterShift) & 0xff;
    if (rank) {
      if (space == Space::kShared || rank > cta->cluster->ctas.size())
        return fail("out-of-range", verb + std::to_string(bytes) + " bytes of the shared memory of block " + std::to_string(rank - 1) + " of the cluster");
      cta = cta->cluster->ctas[rank - 1].get();
      address &= (1u << kClusterShift) - 1;
      const Ref<Clock> &known = warp.lanes[(size_t)lane].clock;
      if (cta != warp.cta && !(known && known->find(cta->index)))
        fail("race", verb + std::string("shared memory of block ") + std::to_string(rank - 1) +
                         " of the cluster, which may not have begun: no barrier told");
      cta->visited |= cta != warp.cta;
      if (cta->live == 0)
        return fail("exited-block", verb + std::string("shared memory of block ") + std::to_string(rank - 1) + " of the cluster, which has exited");
    }
    if (!launch.in_shared(address, bytes))
      return fail("out-of-range", verb + std::to_string(bytes) + " bytes of shared memory" + launch.beside_shared(address, bytes));
    const uint64_t offset = address - kSharedBase;
    return {&cta->shared.data[offset], &cta->shared.cells[offset / 4], &cta->shared.shadow, space, offset};
  }
  if (space == Space::kParam) {
    if (address > launch.params.size() || address + bytes > launch.params.size() || write)
      return fail("out-of-range", verb + std::to_string(bytes) + " bytes at parameter offset " + std::to_string((int64_t)address) + " of " + std::to_string(launch.params.size()));
    return {&launch.params[address], nullptr, nullptr, space, address};
  }
  const uint32_t local = launch.program->local_bytes;
  if (address > local || address + bytes > local)  // a negative one wraps
    return fail("out-of-range", verb + std::to_string(bytes) + " bytes at local address " + std::to_string((int64_t)address) + " of " + std::to_string(local) + " bytes");
  return {&warp.local[(size_t)lane * local + address], nullptr, nullptr, Space::kLocal, address};
}

}  // namespace vgpu
