// Blocks, warps and their fragments in a seeded order (PTX ISA 3 "PTX Machine Model": threads of a warp are scheduled independently,
// 3.2; 9.7.12 "Control Flow Instructions"; 10 "Special Registers").
#include "machine.h"

#include <algorithm>
#include <cstring>

namespace vgpu {

Launch &Warp::launch() const { return *cta->launch; }

// -------------------------------------------------------------------------------------------------------- reports

void Launch::report(const char *kind, const Warp *warp, int lane, const Inst *inst, const std::string &text) {
  Report r;
  r.kind = kind;
  r.kernel = program->kernel->name;
  if (warp) r.thread = who(*warp, 1u << lane);
  if (inst) {
    r.where = program->where(*inst);
    if (inst->statement) r.statement = inst->statement->text.size() > 160 ? inst->statement->text.substr(0, 157) + "..." : inst->statement->text;
  }
  r.text = text;
  if (!reports->add(r, options.max_reports)) stop = true;
}

std::string Launch::who(const Warp &warp, Mask lanes) const {
  const Cta &cta = *warp.cta;
  std::string s = "block (" + std::to_string(cta.x) + "," + std::to_string(cta.y) + "," + std::to_string(cta.z) + ") ";
  const int count = __builtin_popcount(lanes), first = lanes ? __builtin_ctz(lanes) : 0;
  if (count == 32) return s + "warp " + std::to_string(warp.index);
  s += count > 1 ? "threads " : "thread ";
  s += std::to_string(warp.index * 32 + first);
  for (Mask m = lanes & (lanes - 1), shown = 1; m && shown < 4; m &= m - 1, ++shown) s += "," + std::to_string(warp.index * 32 + __builtin_ctz(m));
  return count > 4 ? s + ",.." : s;
}

std::string Launch::who(const Access &access) const {
  if (access.cta == kPrimary) return "the kernel launched before";
  if (access.cta == kOlder) return "a kernel launched before that one";
  const uint32_t x = access.cta % grid[0], y = access.cta / grid[0] % grid[1], z = access.cta / grid[0] / grid[1];
  const uint32_t warps = (block[0] * block[1] * block[2] + 31) / 32;
  std::string s = "block (" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ") ";
  if (access.warp < warps)
    s += "thread " + std::to_string(access.warp * 32 + __builtin_ctz(access.lanes ? access.lanes : 1));
  else
    s += access.warp < warps + kAgents / 32 ? "an asynchronous copy" : "a matrix product";
  return s + " (" + program->where(program->code[access.statement]) + ")";
}

std::string Launch::place(uint64_t address, bool in_global) const {
  if (!in_global) return "shared byte " + shared_byte((uint32_t)address + kSharedBase);
  const Allocation *a = global->below(address);
  return a ? "byte " + std::to_string(address - a->address) + " of " + a->name : "address " + std::to_string(address);
}

namespace {

const Range *last_at_or_below(const std::vector<Range> &all, uint64_t address) {
  const auto above = std::upper_bound(all.begin(), all.end(), address, [](uint64_t a, const Range &r) { return a < r.address; });
  return above == all.begin() ? nullptr : &above[-1];
}

}  // namespace

std::string Launch::shared_byte(uint32_t address) const {
  const auto used = std::count_if(shared.begin(), shared.end(), [](const Range &v) { return v.bytes > 0; });
  const Range *v = used > 1 ? last_at_or_below(shared, address) : nullptr;
  return v ? std::to_string(address - v->address) + " of " + v->name : std::to_string((int64_t)address - kSharedBase);
}

bool Launch::in_shared(uint64_t address, uint64_t bytes) const {
  const Range *v = last_at_or_below(shared, address);
  return v && address + bytes <= v->address + v->bytes;
}

std::string Launch::beside_shared(uint64_t address, uint64_t bytes) const {
  const Range *below = last_at_or_below(shared, address), *above = below ? below + 1 : shared.data();
  return beside(address, bytes, below, above == shared.data() + shared.size() ? nullptr : above);
}

bool check_poison(Warp &warp, const Inst &in, Mask poison, const char *what) {
  if (!poison) return false;
  warp.launch().report("uninitialised", &warp, __builtin_ctz(poison), &in, std::string("an undefined value reaches ") + what);
  return true;
}

// --------------------------------------------------------------------------------------------------------- clocks

void release(Warp &warp, Mask lanes, KnowledgeBuilder &into) {
  for (Mask m = lanes; m; m &= m - 1) into.join(warp.lanes[(size_t)__builtin_ctz(m)]);
  for (Mask m = lanes; m; m &= m - 1)
    into.clock().set(warp.cta->index, warp.cta->components(), (uint32_t)(warp.index * 32 + __builtin_ctz(m)), warp.epoch);
  ++warp.epoch;
}

void acquire(Warp &warp, Mask lanes, const Knowledge &told) {
  for (const auto part : kKnowledge) {
    const Ref<Clock> &other = told.*part;
    Ref<Clock> before, after;  // lanes mostly hold the same clock: join it once
    for (Mask m = other ? lanes : 0; m; m &= m - 1) {
      Ref<Clock> &mine = warp.lanes[(size_t)__builtin_ctz(m)].*part;
      if (mine == other) continue;
      if (!after || !(mine == before)) {
        ClockBuilder builder;
        builder.join(other);
        builder.join(mine);
        before = mine;
        after = builder.freeze();
      }
      mine = after;
    }
  }
}

// ------------------------------------------------------------------------------------------------------ fragments

namespace {

int new_split(Warp &warp, uint32_t reconverge, Mask expected, int parent) {
  Split split;
  split.reconverge = reconverge;
  split.expected = expected;
  split.parent = parent;
  for (size_t i = 0; i < warp.splits.size(); ++i)
    if (!warp.splits[i].expected) {
      warp.splits[i] = split;
      return (int)i;
    }
  warp.splits.push_back(split);
  return (int)warp.splits.size() - 1;
}

Fragment &new_fragment(Warp &warp, uint32_t pc, Mask mask, int split) {
  Fragment f;
  f.pc = pc;
  f.mask = mask;
  f.split = split;
  for (Fragment &old : warp.fragments)
    if (!old.mask) return old = f;
  warp.fragments.push_back(f);  // never moves: reserved for one a lane
  return warp.fragments.back();
}

// If all lanes that a split still expects have arrived, they go on as one.
void settle(Warp &warp, int index) {
  Split &split = warp.splits[(size_t)index];
  if (!split.expected || split.arrived != split.expected) return;
  const Mask mask = split.arrived;
  const int parent = split.parent;
  const uint32_t pc = split.reconverge;
  split = Split();
  Fragment &f = new_fragment(warp, pc, mask, parent);
  jump(warp, f, pc);
}

// Lanes that wait to come together go on alone: reconvergence is a courtesy, not a promise (3.2). Returns whether there were any.
bool dissolve(Warp &warp) {
  bool any = false;
  for (size_t i = 0; i < warp.splits.size(); ++i) {
    const Split split = warp.splits[i];
    if (!split.arrived) continue;
    warp.splits[i].expected &= ~split.arrived;
    warp.splits[i].arrived = 0;
    if (!warp.splits[i].expected) warp.splits[i] = Split();
    Fragment &f = new_fragment(warp, split.reconverge, split.arrived, split.parent);
    jump(warp, f, split.reconverge);
    any = true;
  }
  return any;
}

void branch(Warp &warp, Fragment &f, const Inst &in, Mask taken) {
  const Mask rest = f.mask & ~taken;
  if (!rest || !taken) return jump(warp, f, taken ? in.target : f.pc + 1);
  int split = f.split;
  // Seldom the lanes stay apart, until a collective or an outer reconvergence: nothing may depend on coming together. Not under
  // seed 0, whose counters are those of warps that do.
  const bool apart = warp.launch().options.seed && warp.launch().chance(64);
  if ((split < 0 || warp.splits[(size_t)split].reconverge != in.reconverge) && !apart)
    split = new_split(warp, in.reconverge, f.mask, f.split);
  f.mask = taken;
  f.split = split;
  Fragment &other = new_fragment(warp, f.pc + 1, rest, split);
  jump(warp, f, in.target);
  jump(warp, other, other.pc);
}

}  // namespace

void jump(Warp &warp, Fragment &f, uint32_t pc) {
  f.pc = pc;
  f.state = Fragment::kReady;
  if (f.split < 0) return;
  Split &split = warp.splits[(size_t)f.split];
  if (split.reconverge != pc) return;
  split.arrived |= f.mask;
  f.mask = 0;
  settle(warp, f.split);
}

void make_ready(Warp &warp, Mask lanes, WaitFor::Kind kind) {
  ++warp.launch().changes;
  for (size_t i = 0, n = warp.fragments.size(); i < n; ++i) {
    Fragment &f = warp.fragments[i];
    if (f.mask && !(f.mask & ~lanes) && f.state == Fragment::kWaiting && f.wait.kind == kind) jump(warp, f, f.pc + 1);
  }
}

void split_off(Warp &warp, Fragment &f, Mask lanes) {
  f.mask &= ~lanes;
  new_fragment(warp, f.pc, lanes, f.split);
}

void exit_lanes(Warp &warp, Fragment &f) {
  const Mask gone = f.mask;
  warp.exited |= gone;
  f.mask = 0;
  ++warp.launch().changes;
  for (Split &split : warp.splits) split.expected &= ~gone;
  for (size_t i = 0; i < warp.splits.size(); ++i) {
    if (!warp.splits[i].expected)
      warp.splits[i] = Split();
    else
      settle(warp, (int)i);
  }
  Cta &cta = *warp.cta;
  if (warp.exited == kAllLanes) {
    async_at_exit(warp);
    if (--cta.live == 0) {
      check_barriers_at_exit(cta);
      async_at_cta_exit(cta);
    }
  }
  barriers_after_exit(warp);
}

// ------------------------------------------------------------------------------------------------------ scheduling

namespace {

// PTX ISA 10 "Special Registers"
uint32_t special_value(const std::string &name, const Launch &launch, const Warp &warp, int lane) {
  const Cta &cta = *warp.cta;
  const uint32_t thread = (uint32_t)(warp.index * 32 + lane), *b = launch.block, *g = launch.grid, *c = launch.cluster;
  const uint32_t bit = 1u << lane;
  if (name == "%tid.x") return thread % b[0];
  if (name == "%tid.y") return thread / b[0] % b[1];
  if (name == "%tid.z") return thread / b[0] / b[1];
  if (name == "%ntid.x") return b[0];
  if (name == "%ntid.y") return b[1];
  if (name == "%ntid.z") return b[2];
  if (name == "%ctaid.x") return cta.x;
  if (name == "%ctaid.y") return cta.y;
  if (name == "%ctaid.z") return cta.z;
  if (name == "%nctaid.x") return g[0];
  if (name == "%nctaid.y") return g[1];
  if (name == "%nctaid.z") return g[2];
  if (name == "%laneid") return (uint32_t)lane;
  if (name == "%warpid") return (uint32_t)warp.index;
  if (name == "%nwarpid") return (uint32_t)cta.warps.size();
  if (name == "%smid") return cta.index % (uint32_t)launch.options.sm_count;
  if (name == "%nsmid") return (uint32_t)launch.options.sm_count;
  if (name == "%lanemask_eq") return bit;
  if (name == "%lanemask_lt") return bit - 1;
  if (name == "%lanemask_le") return bit | (bit - 1);
  if (name == "%lanemask_gt") return ~(bit | (bit - 1));
  if (name == "%lanemask_ge") return ~(bit - 1);
  if (name == "%dynamic_smem_size") return launch.dynamic_shared;
  if (name == "%total_smem_size") return launch.shared_bytes;
  if (name == "%cluster_ctarank") return cta.rank;
  if (name == "%cluster_nctarank") return c[0] * c[1] * c[2];
  if (name == "%cluster_ctaid.x") return cta.x % c[0];
  if (name == "%cluster_ctaid.y") return cta.y % c[1];
  if (name == "%cluster_ctaid.z") return cta.z % c[2];
  if (name == "%cluster_nctaid.x") return c[0];
  if (name == "%cluster_nctaid.y") return c[1];
  if (name == "%cluster_nctaid.z") return c[2];
  if (name == "%clusterid.x") return cta.x / c[0];
  if (name == "%clusterid.y") return cta.y / c[1];
  if (name == "%clusterid.z") return cta.z / c[2];
  if (name == "%nclusterid.x") return g[0] / c[0];
  if (name == "%nclusterid.y") return g[1] / c[1];
  if (name == "%nclusterid.z") return g[2] / c[2];
  if (name == "%envreg1") return (uint32_t)(launch.workspace >> 32);
  if (name == "%envreg2") return (uint32_t)launch.workspace;
  return 0;  // the decoder lets only these pass
}

void start_warp(Warp &warp, const Launch &launch) {
  const Program &program = *launch.program;
  const uint32_t threads = launch.block[0] * launch.block[1] * launch.block[2];
  const Mask mask = threads >= (uint32_t)(warp.index + 1) * 32 ? kAllLanes : (1u << (threads - (uint32_t)warp.index * 32)) - 1;
  warp.units.assign((size_t)program.units * 32, 0xbadbad00u);
  warp.unit_poison.assign((size_t)program.units, kAllLanes);
  warp.part_defined.assign((size_t)program.units, Parts());
  warp.predicates.assign((size_t)program.predicates, 0);
  warp.predicate_poison.assign((size_t)program.predicates, kAllLanes);
  warp.local.assign((size_t)program.local_bytes * 32, 0xbd);
  warp.local_valid.assign((size_t)program.local_bytes * 32, false);
  warp.exited = warp.absent = ~mask;
  warp.fragments.reserve(80);
  Fragment whole;
  whole.mask = mask;
  warp.fragments.push_back(whole);
  for (const Program::Constant &c : program.constants) {
    warp.unit_poison[c.slot] = 0;
    for (int l = 0; l < 32; ++l)
      if (c.wide)
        warp.at<uint64_t>(c.slot)[l] = c.value;
      else
        warp.at<uint32_t>(c.slot)[l] = (uint32_t)c.value;
  }
  for (const Program::Special &s : program.specials) {
    warp.unit_poison[s.slot] = 0;
    for (int l = 0; l < 32; ++l) warp.at<uint32_t>(s.slot)[l] = special_value(s.name, launch, warp, l);
  }
  if (program.has_wgmma) {
    warp.matrix.accessed.assign((size_t)program.units, 0);
    warp.matrix.accumulates.assign((size_t)program.units, 0);
    warp.matrix.reads.assign((size_t)program.units, 0);
  }
}

}  // namespace

// The next cluster begins, mostly in order: nothing may depend on it.
void Launch::start() {
  const size_t which = random() % std::min<size_t>(pending_.size(), 3);
  const uint64_t number = pending_[which];
  pending_.erase(pending_.begin() + (long)which);
  const uint32_t across[3] = {grid[0] / cluster[0], grid[1] / cluster[1], grid[2] / cluster[2]};
  const uint32_t cx = (uint32_t)(number % across[0]), cy = (uint32_t)(number / across[0] % across[1]), cz = (uint32_t)(number / across[0] / across[1]);
  const uint32_t size = cluster[0] * cluster[1] * cluster[2], warps = (block[0] * block[1] * block[2] + 31) / 32;
  clusters.emplace_back(new Cluster);
  Cluster &made = *clusters.back();
  made.live = (int)size;
  resident_ += size;
  for (uint32_t rank = 0; rank < size; ++rank) {
    made.ctas.emplace_back(new Cta(shared.empty() ? 0 : (uint32_t)(shared.back().address + shared.back().bytes) - kSharedBase));
    Cta &cta = *made.ctas.back();
    cta.launch = this;
    cta.cluster = &made;
    cta.rank = rank;
    cta.x = cx * cluster[0] + rank % cluster[0];
    cta.y = cy * cluster[1] + rank / cluster[0] % cluster[1];
    cta.z = cz * cluster[2] + rank / cluster[0] / cluster[1];
    cta.index = cta.x + grid[0] * (cta.y + grid[1] * cta.z);
    for (size_t i = 0; i < cta.shared.data.size(); i += 8) {
      const uint64_t garbage = random();
      memcpy(&cta.shared.data[i], &garbage, std::min<size_t>(8, cta.shared.data.size() - i));
    }
    for (uint32_t w = 0; w < warps; ++w) {
      cta.warps.emplace_back(new Warp);
      cta.warps.back()->cta = &cta;
      cta.warps.back()->index = (int)w;
      cta.warps.back()->priority = random();
    }
    for (auto &warp : cta.warps) start_warp(*warp, *this);
    cta.live = (int)warps;
    for (uint32_t w = 0; w + 3 < warps; w += 4) {
      cta.groups.emplace_back(new WarpGroup);
      for (uint32_t i = 0; i < 4; ++i) cta.groups.back()->warps[i] = cta.warps[w + i].get();
    }
  }
}

size_t Launch::capacity() const {
  const uint32_t threads = block[0] * block[1] * block[2], size = cluster[0] * cluster[1] * cluster[2];
  const uint32_t shared_of_sm = options.architecture >= 90 ? 228 * 1024 : 164 * 1024;
  const uint32_t per_sm = std::max(1u, std::min({4u, 2048 / threads, shared_of_sm / (shared_bytes + 1024)}));
  return std::max((size_t)per_sm * (size_t)options.sm_count, (size_t)size);
}

void Launch::run() {
  const size_t size = cluster[0] * cluster[1] * cluster[2], most = capacity();
  counters.kernel = program->kernel->name;
  counters.blocks = (uint64_t)grid[0] * grid[1] * grid[2];
  counters.dynamic_shared_bytes = dynamic_shared;
  executions.assign(program->code.size(), 0);
  lane_executions.assign(program->code.size(), 0);
  const uint64_t all = counters.blocks / size;
  for (uint64_t i = 0; i < all; ++i) pending_.push_back(i);

  while (!stop) {
    while (!pending_.empty() && resident_ + size <= most) start();
    if (clusters.empty()) break;
    if (options.random_completion && chance(4)) complete_some(*this);
    // The warp of the highest priority runs; priorities are random and change at random moments.
    Warp *best = nullptr;
    size_t count = 0;
    const bool any = chance(4);
    for (auto &c : clusters)
      for (auto &cta : c->ctas)
        for (auto &warp : cta->warps) {
          bool can = false;
          for (const Fragment &f : warp->fragments)
            can |= f.mask && (f.state == Fragment::kReady || (f.state == Fragment::kPolling && f.seen != changes));
          if (!can) continue;
          ++count;
          if (!best || (any ? random() % count == 0 : warp->priority > best->priority)) best = warp.get();
        }
    if (!best) {
      if (!unstick()) break;
      continue;
    }
    if (changes != stuck_at_) stuck_rounds_ = 0;
    Fragment *chosen = nullptr;
    size_t seen = 0;
    for (Fragment &f : best->fragments)
      if (f.mask && (f.state == Fragment::kReady || (f.state == Fragment::kPolling && f.seen != changes)) && random() % ++seen == 0) chosen = &f;
    chosen->state = Fragment::kReady;
    step(*best, *chosen);
    if (chance(8)) best->priority = random();

    if (best->cta->live == 0 && best->exited == kAllLanes) {
      Cluster &c = *best->cta->cluster;
      if (--c.live == 0) {
        for (size_t i = 0; i < clusters.size(); ++i)
          if (clusters[i].get() == &c) {
            resident_ -= c.ctas.size();
            clusters.erase(clusters.begin() + (long)i);
            break;
          }
      }
    }
    if (executed > options.instruction_limit) {
      const size_t most = (size_t)(std::max_element(executions.begin(), executions.end()) - executions.begin());
      report("instruction-limit", nullptr, 0, &program->code[most], "the launch executed " + std::to_string(executed) + " instructions and goes on, most often here");
      break;
    }
  }
  finish();
}

// Runs a fragment for a while: until it blocks, diverges, comes together with others, or its random quantum ends.
void Launch::step(Warp &warp, Fragment &f) {
  const Inst *const code = program->code.data();
  uint64_t before = changes;
  warp.looked = false;
  for (int budget = 1 + (int)(random() % 200); budget > 0 && !stop; --budget) {
    const Inst &in = code[f.pc];
    Mask m = f.mask;
    if (in.guard >= 0) {
      const size_t g = (size_t)in.guard;
      if (check_poison(warp, in, warp.predicate_poison[g] & m, "a branch or predicate")) warp.predicate_poison[g] &= ~m;
      m &= in.guard_negated ? ~warp.predicates[g] : warp.predicates[g];
    }
    const int lanes = __builtin_popcount(m);
    ++executions[f.pc];
    lane_executions[f.pc] += (uint64_t)lanes;
    executed += (uint64_t)lanes + 1;
    if (program->has_wgmma && m) wgmma_check(warp, in);
    if (in.exec) {
      if (m) in.exec(warp, in, m);
      jump(warp, f, f.pc + 1);
    } else if (!in.control) {
      const bool back = in.backward && m;
      branch(warp, f, in, m);
      if (back) {
        if (warp.looked && changes == before && f.mask) {  // it only looked: others first
          f.state = Fragment::kPolling;
          f.seen = changes;
          return;
        }
        before = changes;
        warp.looked = false;
      }
    } else if (!m) {
      jump(warp, f, f.pc + 1);
    } else {
      if (m != f.mask) {  // lanes that the guard leaves out step over it
        const Mask rest = f.mask & ~m;
        const int split = new_split(warp, f.pc + 1, f.mask, f.split);
        f.mask = m;
        f.split = split;
        Fragment &other = new_fragment(warp, f.pc + 1, rest, split);
        jump(warp, other, other.pc);
      }
      switch (in.control(warp, f, in)) {
        case Flow::kNext: jump(warp, f, f.pc + 1); break;
        case Flow::kWait: f.state = f.mask ? Fragment::kWaiting : f.state; return;
        case Flow::kPoll:
          jump(warp, f, f.pc + 1);
          if (f.mask) {
            f.state = Fragment::kPolling;
            f.seen = changes;
          }
          return;
        case Flow::kJumped: return;
      }
    }
    if (!f.mask) return;
  }
}

uint64_t Launch::registers() const {
  uint64_t hash = 0;
  for (const auto &c : clusters)
    for (const auto &cta : c->ctas)
      for (const auto &warp : cta->warps)
        for (const uint32_t unit : warp->units) hash = (hash ^ unit) * 0x100000001b3;
  return hash;
}

// Nothing can go on by itself: late work completes, diverged lanes stop waiting for each other, those who poll look again.
bool Launch::unstick() {
  if (complete_some(*this)) return true;
  bool any = false;
  for (auto &c : clusters)
    for (auto &cta : c->ctas)
      for (auto &warp : cta->warps) any |= dissolve(*warp);
  if (any) return true;
  if (changes != stuck_at_) {
    stuck_at_ = changes;
    stuck_rounds_ = 0;
  }
  // Polls that count their tries or watch a clock end by themselves: more rounds if registers still change.
  ++stuck_rounds_;
  if (stuck_rounds_ == 63) registers_ = registers();
  if (stuck_rounds_ == 64) counting_ = registers_ != registers();
  if (stuck_rounds_ < 64 || (counting_ && stuck_rounds_ < 20000))
    for (auto &c : clusters)
      for (auto &cta : c->ctas)
        for (auto &warp : cta->warps)
          for (Fragment &f : warp->fragments)
            if (f.mask && f.state == Fragment::kPolling) {
              f.state = Fragment::kReady;
              any = true;
            }
  if (!any) deadlock();
  return any;
}

void Launch::deadlock() {
  std::string text = "nothing can go on:";
  const Inst *first = nullptr;
  const Warp *first_warp = nullptr;
  int shown = 0, most = 0, first_lane = 0;
  for (auto &c : clusters)
    for (auto &cta : c->ctas)
      for (auto &warp : cta->warps)
        for (const Fragment &f : warp->fragments) {
          if (!f.mask) continue;
          const Inst &in = program->code[f.pc];
          const bool polled_for = std::any_of(warp->fragments.begin(), warp->fragments.end(),  // the others would come, but for what they poll
                                              [](const Fragment &other) { return other.mask && other.state == Fragment::kPolling; });
          const bool collective = f.state == Fragment::kWaiting && f.wait.kind == WaitFor::kCollective && !polled_for;
          const int tells = collective ? 3 : f.state == Fragment::kPolling ? 2 : 1;  // how much its place says of the cause
          if (tells > most) most = tells, first = &in, first_warp = warp.get(), first_lane = __builtin_ctz(f.mask);
          if (++shown > 24) continue;
          text += "\n  " + who(*warp, f.mask) + (f.state == Fragment::kPolling ? " polls near " : " waits at ") + program->where(in) + ": " +
                  (in.statement ? in.statement->text.substr(0, 80) : "");
        }
  for (auto &c : clusters)
    for (auto &cta : c->ctas)
      for (const auto &[address, b] : cta->barriers.mbarriers)
        if ((b.polled || b.pending != (int64_t)b.count || b.transactions) && ++shown < 40)
          text += "\n  mbarrier at shared address " + shared_byte(address) + " of block " + std::to_string(cta->index) + ": phase " +
                  std::to_string(b.phase) + " lacks " + std::to_string(b.pending) + " of " + std::to_string(b.count) + " arrivals and " +
                  std::to_string(b.transactions) + " bytes";
  if (shown > 24) text += "\n  ..";
  report(most == 3 ? "divergent-collective" : "deadlock", first_warp, first_lane, first, text);
}

void Launch::finish() {
  for (size_t i = 0; i < program->code.size(); ++i) {
    if (!executions[i]) continue;
    const Inst &in = program->code[i];
    counters.warp_instructions[(size_t)in.klass] += executions[i];
    counters.thread_instructions[(size_t)in.klass] += lane_executions[i];
    if (in.klass == Class::kMatrix || in.klass == Class::kAsync) counters.executed_by_line[program->where(in)] += executions[i];
    if (in.statement && in.statement->parts[0] == "selp") counters.selections_by_line[program->where(in)] += executions[i];
    if (in.klass == Class::kBarrier) counters.barriers += executions[i];
  }
  clusters.clear();
}

}  // namespace vgpu
