#include "decode.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "machine.h"

namespace vgpu {

Type parse_type(const std::string &p) {
  static const std::map<std::string, Type> types = {
      {"pred", Type::kPred}, {"u8", Type::kU8}, {"u16", Type::kU16}, {"u32", Type::kU32}, {"u64", Type::kU64}, {"s8", Type::kS8},
      {"s16", Type::kS16}, {"s32", Type::kS32}, {"s64", Type::kS64}, {"b8", Type::kB8}, {"b16", Type::kB16}, {"b32", Type::kB32},
      {"b64", Type::kB64}, {"f16", Type::kF16}, {"f16x2", Type::kF16x2}, {"bf16", Type::kBF16}, {"bf16x2", Type::kBF16x2},
      {"f32", Type::kF32}, {"f64", Type::kF64}};
  const auto found = types.find(p);
  return found == types.end() ? Type::kNone : found->second;
}

Type last_type(const Statement &s) {
  for (size_t i = s.parts.size(); i-- > 1;)
    if (parse_type(s.parts[i]) != Type::kNone) return parse_type(s.parts[i]);
  return Type::kNone;
}

// ------------------------------------------------------------------------------------------- destinations and sources

namespace {

// Whether the first operand of a statement is written. (PTX ISA 6.1: the destination comes first, if there is one.)
bool has_destination(const Statement &s) {
  static const char *const none[] = {"st", "bra", "bar", "barrier", "ret", "exit", "red", "membar", "fence", "prefetch", "prefetchu", "cp",
                                     "trap", "brkpt", "nanosleep", "setmaxnreg", "griddepcontrol", "stmatrix", "call", "applypriority",
                                     "discard", "pmevent", "tensormap", "multimem", "brx"};
  const std::string &op = s.parts[0];
  if (s.operands.empty()) return false;
  if (op == "mbarrier") return s.has("arrive") || s.has("arrive_drop") || s.has("test_wait") || s.has("try_wait") || s.has("pending_count");
  if (op == "wgmma") return s.has("mma_async");
  if (op == "bar" || op == "barrier") return s.has("red");
  return std::none_of(std::begin(none), std::end(none), [&](const char *n) { return op == n; });
}

void collect(const Operand &o, std::vector<int> &into) {
  if ((o.kind == Operand::kRegister || o.kind == Operand::kAddress) && o.reg >= 0) into.push_back(o.reg);
  for (const Operand &e : o.elements) collect(e, into);
}

struct Effects {
  std::vector<int> defined, used;
};

Effects effects(const Statement &s) {
  Effects e;
  const bool writes = has_destination(s);
  const bool arrive = s.parts[0] == "mbarrier" && writes && !s.operands.empty() && s.operands[0].kind == Operand::kAddress;
  for (size_t i = 0; i < s.operands.size(); ++i) {
    if (i == 0 && writes && !arrive)
      collect(s.operands[0], e.defined);
    else
      collect(s.operands[i], e.used);
  }
  if (s.parts[0] == "wgmma") collect(s.operands.empty() ? Operand() : s.operands[0], e.used);  // accumulators are read too
  if (s.guard >= 0) {
    e.used.push_back(s.guard);
    e.used.insert(e.used.end(), e.defined.begin(), e.defined.end());  // lanes that the guard leaves out keep theirs
  }
  return e;
}

bool ends(const Statement &s) { return (s.parts[0] == "ret" || s.parts[0] == "exit") && s.guard < 0; }
bool jumps_always(const Statement &s) { return s.parts[0] == "bra" && s.guard < 0; }

using Bits = std::vector<uint64_t>;

}  // namespace

// Live ranges as intervals of statements, from the live sets at block ends; then a linear scan hands out slots. Divergence
// changes nothing: each lane is a thread of its own with its own storage, and writes touch active lanes only.
void Decoder::allocate_registers() {
  const std::vector<Statement> &code = program_.kernel->statements;
  const size_t n = code.size(), registers = program_.kernel->registers.size(), words = (registers + 63) / 64;
  std::vector<Effects> all(n);
  std::vector<bool> leader(n + 1, false);
  leader[0] = true;
  for (size_t i = 0; i < n; ++i) {
    all[i] = effects(code[i]);
    if (code[i].target >= 0) leader[(size_t)code[i].target] = leader[i + 1] = true;
    if (ends(code[i])) leader[i + 1] = true;
  }
  std::vector<size_t> begin;
  std::vector<size_t> block_of(n + 1, 0);
  for (size_t i = 0; i < n; ++i) {
    if (leader[i]) begin.push_back(i);
    block_of[i] = begin.size() - 1;
  }
  const size_t blocks = begin.size();
  begin.push_back(n);
  std::vector<Bits> in(blocks, Bits(words)), kill(blocks, Bits(words)), out(blocks, Bits(words));
  for (size_t b = 0; b < blocks; ++b)
    for (size_t i = begin[b + 1]; i-- > begin[b];) {
      for (const int r : all[i].defined) in[b][(size_t)r / 64] &= ~(1ull << r % 64), kill[b][(size_t)r / 64] |= 1ull << r % 64;
      for (const int r : all[i].used) in[b][(size_t)r / 64] |= 1ull << r % 64;
    }
  const auto successors = [&](size_t b, auto &&visit) {
    const Statement &last = code[begin[b + 1] - 1];
    if (last.target >= 0 && (size_t)last.target < n) visit(block_of[(size_t)last.target]);
    if (!ends(last) && !jumps_always(last) && b + 1 < blocks) visit(b + 1);
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t b = blocks; b-- > 0;)
      successors(b, [&](size_t next) {
        for (size_t w = 0; w < words; ++w) {
          const uint64_t more = in[next][w] & ~out[b][w];
          if (!more) continue;
          out[b][w] |= more;
          if (more & ~kill[b][w] & ~in[b][w]) in[b][w] |= more & ~kill[b][w], changed = true;
        }
      });
  }
  std::vector<int> first(registers, -1), last(registers, -1);
  const auto live = [&](int r, size_t at) {
    if (first[(size_t)r] < 0 || (int)at < first[(size_t)r]) first[(size_t)r] = (int)at;
    if ((int)at > last[(size_t)r]) last[(size_t)r] = (int)at;
  };
  std::vector<bool> pinned(registers, false);  // wgmma writes its accumulators late, whatever is live by then
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t r = 0; r < registers; ++r) {
      if (in[b][r / 64] >> r % 64 & 1) live((int)r, begin[b]);
      if (out[b][r / 64] >> r % 64 & 1) live((int)r, begin[b + 1]);
    }
    for (size_t i = begin[b]; i < begin[b + 1]; ++i) {
      for (const int r : all[i].defined) live(r, i), live(r, i + 1);
      for (const int r : all[i].used) live(r, i);
      if (code[i].parts[0] == "wgmma" && code[i].has("mma_async"))
        for (size_t k = 0; k < 2 && k < code[i].operands.size(); ++k) {
          std::vector<int> held;
          collect(code[i].operands[k], held);
          for (const int r : held) pinned[(size_t)r] = true;
        }
    }
  }
  std::vector<int> order;
  for (size_t r = 0; r < registers; ++r)
    if (first[r] >= 0 && program_.kernel->registers[r].kind != Register::kSpecial) order.push_back((int)r);
  std::sort(order.begin(), order.end(), [&](int a, int b) { return first[(size_t)a] < first[(size_t)b]; });
  slots_.assign(registers, kNoSlot);
  std::vector<Slot> free_slots[3];
  std::vector<int> active[3];
  for (const int r : order) {
    const Register::Class kind = program_.kernel->registers[(size_t)r].kind;
    const size_t c = kind;
    auto &mine = active[c];
    for (size_t i = 0; i < mine.size();)
      if (last[(size_t)mine[i]] < first[(size_t)r] && !pinned[(size_t)mine[i]]) {
        free_slots[c].push_back(slots_[(size_t)mine[i]]);
        mine[i] = mine.back();
        mine.pop_back();
      } else {
        ++i;
      }
    mine.push_back(r);
    if (!free_slots[c].empty() && !pinned[(size_t)r]) {
      slots_[(size_t)r] = free_slots[c].back();
      free_slots[c].pop_back();
    } else if (kind == Register::kPredicate) {
      slots_[(size_t)r] = (Slot)program_.predicates++;
    } else {
      slots_[(size_t)r] = (Slot)program_.units;
      program_.units += kind == Register::k64 ? 2 : 1;
    }
  }
}

// Where the paths of each branch come together: its immediate post-dominator, by the iterative algorithm on the reversed graph.
void Decoder::flow_graph() {
  const std::vector<Statement> &code = program_.kernel->statements;
  const int n = (int)code.size(), exit = n;
  std::vector<int> ipdom((size_t)n + 1, -1);
  ipdom[(size_t)exit] = exit;
  const auto successors = [&](int i, int *two) {
    int count = 0;
    if (ends(code[(size_t)i])) {
      two[count++] = exit;
    } else {
      if (code[(size_t)i].target >= 0) two[count++] = code[(size_t)i].target;
      if (!jumps_always(code[(size_t)i])) two[count++] = i + 1;
    }
    return count;
  };
  // Post-order of the reversed graph from the exit gives the order in which nodes are better known.
  std::vector<std::vector<int>> predecessors((size_t)n + 1);
  for (int i = 0; i < n; ++i) {
    int two[2];
    for (int k = successors(i, two); k--;) predecessors[(size_t)two[k]].push_back(i);
  }
  std::vector<int> order, number((size_t)n + 1, -1);
  std::vector<std::pair<int, size_t>> stack{{exit, 0}};
  std::vector<bool> seen((size_t)n + 1, false);
  seen[(size_t)exit] = true;
  while (!stack.empty()) {
    auto &[node, next] = stack.back();
    if (next < predecessors[(size_t)node].size()) {
      const int p = predecessors[(size_t)node][next++];
      if (!seen[(size_t)p]) {
        seen[(size_t)p] = true;
        stack.push_back({p, 0});
      }
    } else {
      number[(size_t)node] = (int)order.size();
      order.push_back(node);
      stack.pop_back();
    }
  }
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t k = order.size(); k-- > 0;) {
      const int i = order[k];
      if (i == exit) continue;
      int two[2], best = -1;
      for (int s = successors(i, two); s--;) {
        int other = two[s];
        if (ipdom[(size_t)other] < 0) continue;
        if (best < 0) {
          best = other;
          continue;
        }
        while (best != other) {
          while (number[(size_t)best] < number[(size_t)other]) best = ipdom[(size_t)best];
          while (number[(size_t)other] < number[(size_t)best]) other = ipdom[(size_t)other];
        }
      }
      if (best >= 0 && ipdom[(size_t)i] != best) ipdom[(size_t)i] = best, changed = true;
    }
  }
  reconverge_.assign((size_t)n, exit);
  for (int i = 0; i < n; ++i)
    if (ipdom[(size_t)i] >= 0) reconverge_[(size_t)i] = ipdom[(size_t)i];
}

// ---------------------------------------------------------------------------------------------------------- CAS loops

// The loop of CUDA's atomicAdd of bf16 on sm_80, and of its programming guide: a plain load gives the first value that the CAS
// expects, what the CAS returns the next one. A wrong guess costs a turn and no more, so it may race with atomics. The loop has
// nothing but computation, and ends when the CAS returns what it expected; outside of it nothing uses the guess.
bool Decoder::guess_of_cas(const Statement &load) {
  const std::vector<Statement> &code = program_.kernel->statements;
  if (compare_and_swaps_.empty() || load.operands[0].reg < 0) return false;
  const Statement *const end = code.data() + code.size();
  const Operand &from = load.operands[1];
  const auto moves = [](const Statement &s) { return s.parts[0] == "mov" && s.operands.size() == 2 && s.operands[0].reg >= 0 && s.operands[1].reg >= 0; };
  const auto copies = [&](int reg) {  // and where it is moved to
    std::vector<bool> all(program_.kernel->registers.size(), false);
    all[(size_t)reg] = true;
    for (bool more = true; more;) {
      more = false;
      for (const Statement &s : code)
        if (moves(s) && all[(size_t)s.operands[1].reg] && !all[(size_t)s.operands[0].reg]) all[(size_t)s.operands[0].reg] = more = true;
    }
    return all;
  };
  const auto place = [&](const Operand &o) {  // nvcc writes [%rd4+4] in one place, and [%rd16] after %rd16 = %rd4 + 4 in another
    const auto sum = std::find_if(code.begin(), code.end(), [&](const Statement &s) {
      return s.parts[0] == "add" && s.operands.size() == 3 && s.operands[0].reg == o.reg && o.reg >= 0 && s.operands[2].kind == Operand::kImmediate;
    });
    return sum == code.end() ? std::tuple(o.reg, o.symbol, o.immediate) : std::tuple(sum->operands[1].reg, std::string(), o.immediate + sum->operands[2].immediate);
  };
  const auto computes = [&](const Statement &s) {
    return has_destination(s) && !s.has("sync") && s.guard < 0 && (from.reg < 0 || s.operands[0].reg != from.reg) &&
           std::none_of(s.operands.begin(), s.operands.end(), [](const Operand &o) { return o.kind == Operand::kAddress; });
  };
  const std::vector<bool> guess = copies(load.operands[0].reg);
  for (const Statement *cas : compare_and_swaps_) {
    const auto in = [](const std::vector<bool> &set, const Operand &o) { return o.reg >= 0 && set[(size_t)o.reg]; };
    if (type_bytes(last_type(*cas)) != type_bytes(last_type(load)) || place(cas->operands[1]) != place(from) || cas->operands[0].reg < 0) continue;
    const std::vector<bool> checked = copies(cas->operands[0].reg);
    const Statement *const back = std::find_if_not(cas + 1, end, computes), *const loop = back == end || back->target < 0 ? end : code.data() + back->target;
    const auto decides = [&](const Statement &s) {
      return s.parts[0] == "setp" && s.has("ne") && s.operands[0].reg == back->guard && in(checked, s.operands[1]) && in(checked, s.operands[2]);
    };
    if (!in(guess, cas->operands[2]) || !in(checked, cas->operands[2]) || loop <= &load || loop > cas || back->guard_negated ||
        !std::all_of(loop, cas, computes) || std::none_of(cas, back, decides))
      continue;
    return std::none_of(code.begin(), code.end(), [&](const Statement &s) {
      const std::vector<int> used = effects(s).used;
      const bool before = &s > &load && &s < loop;
      return !moves(s) && std::any_of(used.begin(), used.end(), [&](int r) { return guess[(size_t)r] && (before || !checked[(size_t)r]); });
    });
  }
  return false;
}

// ----------------------------------------------------------------------------------------------------------- operands

Slot Decoder::constant(uint64_t value, bool wide) {
  if (!wide) value &= 0xffffffffu;
  const auto found = constants_.find({value, wide});
  if (found != constants_.end()) return found->second;
  const Slot slot = (Slot)program_.units;
  program_.units += wide ? 2 : 1;
  program_.constants.push_back({slot, value, wide});
  return constants_[{value, wide}] = slot;
}

Slot Decoder::special(const std::string &name) {
  static const char *const known[] = {
      "%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y",
      "%nctaid.z", "%laneid", "%warpid", "%nwarpid", "%smid", "%nsmid", "%lanemask_eq", "%lanemask_lt", "%lanemask_le", "%lanemask_gt",
      "%lanemask_ge", "%dynamic_smem_size", "%total_smem_size", "%cluster_ctarank", "%cluster_nctarank", "%cluster_ctaid.x",
      "%cluster_ctaid.y", "%cluster_ctaid.z", "%cluster_nctaid.x", "%cluster_nctaid.y", "%cluster_nctaid.z", "%clusterid.x",
      "%clusterid.y", "%clusterid.z", "%nclusterid.x", "%nclusterid.y", "%nclusterid.z", "%envreg1", "%envreg2"};
  if (std::none_of(std::begin(known), std::end(known), [&](const char *k) { return name == k; })) throw Uncovered();
  const auto found = specials_.find(name);
  if (found != specials_.end()) return found->second;
  const Slot slot = (Slot)program_.units++;
  program_.specials.push_back({slot, name});
  return specials_[name] = slot;
}

bool Decoder::narrow(const Operand &o) const {
  return o.kind == Operand::kRegister && program_.kernel->registers[(size_t)o.reg].narrow;
}

bool Decoder::wide(const Operand &o) const {
  return o.kind == Operand::kRegister && program_.kernel->registers[(size_t)o.reg].kind == Register::k64;
}

bool Decoder::special(const Operand &o, const char *name) const {
  return o.kind == Operand::kRegister && program_.kernel->registers[(size_t)o.reg].kind == Register::kSpecial &&
         program_.kernel->registers[(size_t)o.reg].name == name;
}

bool Decoder::fits(const Register &r, Type type) const {
  const int bytes = type_bytes(type);
  return (r.kind == Register::kPredicate) == (type == Type::kPred) && (r.kind == Register::k64) == (bytes == 8) && !(r.narrow && bytes > 2);
}

void Decoder::destination(const Operand &o, Type type) {
  if (o.kind == Operand::kSink) {
    operands_.push_back(kNoSlot);
  } else if (o.kind == Operand::kVector) {
    for (const Operand &e : o.elements) destination(e, type);
  } else if (o.kind == Operand::kRegister && !o.negated && program_.kernel->registers[(size_t)o.reg].kind != Register::kSpecial) {
    if (!fits(program_.kernel->registers[(size_t)o.reg], type)) throw Uncovered();
    operands_.push_back(slot_of(o.reg));
    if (type != Type::kPred) defined_.push_back(slot_of(o.reg));
  } else {
    throw Uncovered();
  }
}

void Decoder::source(const Operand &o, Type type) {
  if (o.kind == Operand::kVector) {
    for (const Operand &e : o.elements) source(e, type);
  } else if (o.kind == Operand::kRegister && !o.negated) {
    const Register &r = program_.kernel->registers[(size_t)o.reg];
    if (!fits(r, type)) throw Uncovered();
    operands_.push_back(r.kind == Register::kSpecial ? special(r.name) : slot_of(o.reg));
    if (r.kind == Register::k32 || r.kind == Register::k64) used_.push_back(slot_of(o.reg));
  } else if (o.kind == Operand::kImmediate && o.real) {
    double value;
    memcpy(&value, &o.immediate, 8);
    const float narrow = (float)value;
    uint32_t bits;
    memcpy(&bits, &narrow, 4);
    if (type != Type::kF32 && type != Type::kF64) throw Uncovered();
    operands_.push_back(type == Type::kF32 ? constant(bits, false) : constant((uint64_t)o.immediate, true));
  } else if (o.kind == Operand::kImmediate && type != Type::kPred) {
    operands_.push_back(constant((uint64_t)(type_bytes(type) == 2 ? o.immediate & 0xffff : o.immediate), type_bytes(type) == 8));
  } else if (o.kind == Operand::kSymbol) {
    const auto found = symbols_.find(o.symbol);
    if (found == symbols_.end()) throw Uncovered();
    operands_.push_back(constant(found->second, type_bytes(type) == 8));
  } else {
    throw Uncovered();
  }
}

bool Decoder::is_predicate(const Operand &o) const {
  return o.kind == Operand::kRegister && program_.kernel->registers[(size_t)o.reg].kind == Register::kPredicate;
}

void Decoder::predicate(const Operand &o) {
  if (!is_predicate(o)) throw Uncovered();
  operands_.push_back((Slot)(slot_of(o.reg) | (o.negated ? kNegated : 0)));
}

void Decoder::address(const Operand &o, Inst &in) {
  if (o.kind != Operand::kAddress) throw Uncovered();
  in.offset = o.immediate;
  in.d = 1;
  if (o.reg >= 0) {
    const Register::Class kind = program_.kernel->registers[(size_t)o.reg].kind;
    if (kind != Register::k32 && kind != Register::k64) throw Uncovered();
    in.d = kind == Register::k64;
    operands_.push_back(slot_of(o.reg));
    used_.push_back(slot_of(o.reg));
  } else if (o.symbol.empty()) {
    throw Uncovered();
  } else {
    const auto found = symbols_.find(o.symbol);
    if (found == symbols_.end()) throw Uncovered();
    operands_.push_back(constant(found->second, true));
  }
}

// ------------------------------------------------------------------------------------------------------------ programs

namespace {

Flow uncovered(Warp &warp, Fragment &f, const Inst &in) {
  warp.launch().report("uncovered", &warp, __builtin_ctz(f.mask), &in, "this instruction is not covered by the virtual GPU");
  warp.launch().stop = true;
  return Flow::kJumped;
}

Flow exit_thread(Warp &warp, Fragment &f, const Inst &) {
  exit_lanes(warp, f);
  return Flow::kJumped;
}

Flow trap(Warp &warp, Fragment &f, const Inst &in) {
  warp.launch().report("trap", &warp, __builtin_ctz(f.mask), &in, "the kernel executed a trap");
  warp.launch().stop = true;
  return Flow::kJumped;
}

// What a failed assert() calls. r: where its parameters are in local memory: the addresses of message and file, the line, the
// address of the function's name.
Flow assertion_failed(Warp &warp, Fragment &f, const Inst &in) {
  const int lane = __builtin_ctz(f.mask);
  const auto parameter = [&](int i, unsigned bytes) {
    uint64_t value = 0;
    memcpy(&value, &warp.local[(size_t)lane * warp.launch().program->local_bytes + warp.at<uint64_t>(in.r[i])[lane]], bytes);
    return value;
  };
  const auto text = [&](int i) {
    const uint64_t address = parameter(i, 8);
    const Allocation *a = warp.launch().global->find(address);
    return a ? std::string((const char *)address, strnlen((const char *)address, a->address + a->bytes - address)) : "?";
  };
  const std::string file = text(1), name = file.substr(file.rfind('/') + 1);
  warp.launch().report("trap", &warp, lane, &in, "assertion " + text(0) + " failed: " + name + ":" + std::to_string(parameter(2, 4)) + ", " + text(3));
  warp.launch().stop = true;
  return Flow::kJumped;
}

bool decode_control(Decoder &d, const Statement &s, Inst &in) {
  in.klass = Class::kControl;
  const std::string &op = s.parts[0];
  if (op == "bra") {
    in.target = (uint32_t)s.target;
    return s.target >= 0;
  }
  if (op == "call" && s.operands[0].symbol == "__assertfail") {
    d.source(s.operands[1], Type::kU64);
    in.control = assertion_failed;
    return true;
  }
  in.control = op == "ret" || op == "exit" ? exit_thread : op == "trap" ? trap : nullptr;
  return in.control;
}

}  // namespace

void Decoder::run() {
  const std::vector<Statement> &code = program_.kernel->statements;
  allocate_registers();
  flow_graph();
  program_.code.resize(code.size() + 1);
  program_.operands.resize(code.size());
  program_.defined.resize(code.size() + 1);
  program_.used.resize(code.size() + 1);
  for (const Statement &s : code)
    if (s.parts[0] == "atom" && s.has("cas") && s.operands.size() > 2) compare_and_swaps_.push_back(&s);
  using Family = bool (*)(Decoder &, const Statement &, Inst &);
  static const Family families[] = {decode_control, decode_arithmetic, decode_convert, decode_memory, decode_collective, decode_barrier,
                                    decode_async, decode_tensor_copy, decode_matrix, decode_wgmma};
  for (size_t i = 0; i < code.size(); ++i) {
    const Statement &s = code[i];
    Inst &in = program_.code[i];
    const bool known = known_form(*program_.kernel, s);
    bool done = false;
    for (size_t f = 0; known && f < std::size(families); ++f) {
      in = Inst();
      operands_.clear(), defined_.clear(), used_.clear();
      try {
        done = families[f](*this, s, in);
      } catch (const Uncovered &) {
        done = false;
      }
      if (done) break;
    }
    if (!done) {
      in = Inst();
      operands_.clear(), defined_.clear(), used_.clear();
      in.control = uncovered;
      in.klass = Class::kControl;
      program_.uncovered.push_back(&s);
    }
    in.statement = &s;
    if (s.guard >= 0) {
      in.guard = slot_of(s.guard);
      in.guard_negated = s.guard_negated;
    }
    in.backward = s.target >= 0 && (size_t)s.target <= i;
    in.reconverge = (uint32_t)reconverge_[i];
    program_.operands[i] = operands_;
    in.r = program_.operands[i].data();
    in.count = (uint8_t)std::min<size_t>(operands_.size(), 255);
    if (s.parts[0] == "wgmma") program_.has_wgmma = true;
    else program_.defined[i] = defined_, program_.used[i] = used_;
  }
  program_.code.back().control = exit_thread;
  program_.code.back().klass = Class::kControl;
  if (program_.units > 60000 || code.size() > 65000) throw std::runtime_error("kernel " + program_.kernel->name + " is too large for the virtual GPU");
}

std::unique_ptr<Program> make_program(const Module &module, const Kernel &kernel) {
  std::unique_ptr<Program> program(new Program);
  program->module = &module;
  program->kernel = &kernel;
  std::map<std::string, uint64_t> symbols;
  const auto place = [](uint64_t &at, const Variable &v) {
    at = (at + v.align - 1) / v.align * v.align;
    const uint64_t address = at;
    at += v.bytes;
    return address;
  };
  uint64_t shared = kSharedBase, gaps = 0, local = 0, dynamic_align = 16;
  // Shared variables lie as on the hardware but for gaps, so that an overrun of one does not meet the next. Their multiple of 1 KiB
  // leaves banks and swizzles as they are. (The descriptors of wgmma reach 256 KiB, 28 gaps behind the largest shared memory.)
  const auto place_shared = [&](const Variable &v) {
    constexpr uint64_t kGap = 1024;
    const uint64_t multiple = std::max<uint64_t>(kGap, v.align);
    if (!program->shared.empty()) gaps = (gaps + kGap + multiple - 1) / multiple * multiple;
    const uint64_t address = place(shared, v) + gaps;
    program->shared.push_back({address, v.bytes, v.name.size() > 40 ? ".." + v.name.substr(v.name.size() - 38) : v.name});
    return address;
  };
  std::vector<std::string> dynamic;
  for (const std::vector<Variable> *list : {&module.variables, &kernel.variables})
    for (const Variable &v : *list) {
      if (v.space == Space::kShared && v.dynamic) {
        dynamic_align = std::max<uint64_t>(dynamic_align, v.align);
        dynamic.push_back(v.name);
      } else if (v.space == Space::kShared) {
        symbols[v.name] = place_shared(v);
      } else if (v.space == Space::kLocal) {
        symbols[v.name] = place(local, v);
      } else {
        symbols[v.name] = v.address;
      }
    }
  for (const Variable &v : kernel.params) {
    symbols[v.name] = v.address;
    program->param_bytes = (uint32_t)(v.address + v.bytes);
  }
  if (!dynamic.empty()) {  // they share it
    Variable last;
    last.name = dynamic[0];
    last.align = (uint32_t)dynamic_align;
    const uint64_t address = place_shared(last);
    for (const std::string &name : dynamic) symbols[name] = address;
    program->dynamic = true;
  }
  program->shared_bytes = (uint32_t)(shared - kSharedBase);
  program->local_bytes = (uint32_t)local;
  if (shared - kSharedBase > 1 << 20 || local > 512 << 10)  // a thread has 512 KiB of local memory
    throw std::runtime_error("kernel " + kernel.name + " declares more shared or local memory than there is");
  Decoder(*program, symbols).run();
  return program;
}

}  // namespace vgpu
