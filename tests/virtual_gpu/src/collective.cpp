// Operations of the lanes of a warp together (PTX ISA 9.7.9.6 shfl.sync, 9.7.13.2 bar.warp.sync, 9.7.13.9 vote.sync to
// 9.7.13.12 redux.sync, 9.7.13.14 elect.sync): they complete when all lanes of the member mask that have not exited are at the same
// operation, also at different statements: nvcc keeps copies in both arms of a branch.
#include "decode.h"
#include "machine.h"

namespace vgpu {

bool gather(Warp &warp, Fragment &f, Mask required, uint32_t key, std::vector<Fragment *> &all) {
  Mask there = f.mask;
  all.assign(1, &f);
  for (Fragment &other : warp.fragments) {
    if (&other == &f || !other.mask || other.state != Fragment::kWaiting || other.wait.kind != WaitFor::kCollective ||
        other.wait.key != key) continue;
    all.push_back(&other);
    there |= other.mask;
  }
  if (there == required) return true;
  f.wait.kind = WaitFor::kCollective;
  f.wait.key = key;
  return false;
}

namespace {

// What a collective computes. insts: by lane, the statement that it is at (its registers may differ); lanes: who takes part.
using Compute = void (*)(Warp &, const Inst *const *insts, Mask lanes);

enum Kind : int { kShfl, kVote, kMatch, kRedux, kElect, kSyncWarp };

uint32_t value(Warp &w, const Inst *const *insts, int operand, int lane) { return w.at<uint32_t>(insts[lane]->r[operand])[lane]; }

Mask poison_of(Warp &w, const Inst *const *insts, Mask lanes, int operand) {
  Mask p = 0;
  for (Mask m = lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    p |= w.unit_poison[insts[l]->r[operand]] & 1u << l;
  }
  return p;
}

void put(Warp &w, Slot d, int lane, uint32_t v, bool poison) {
  if (d == kNoSlot) return;
  w.at<uint32_t>(d)[lane] = v;
  w.set_poison(d, 1u << lane, (Mask)poison << lane);
}

void put_predicate(Warp &w, Slot d, int lane, bool v, bool poison = false) {
  if (d == kNoSlot) return;
  w.predicates[d] = (w.predicates[d] & ~(1u << lane)) | (Mask)v << lane;
  w.predicate_poison[d] = (w.predicate_poison[d] & ~(1u << lane)) | (Mask)poison << lane;
}

// r: d, p, a, b, c, members. in.a: 0 up, 1 down, 2 bfly, 3 idx.
void shfl(Warp &w, const Inst *const *insts, Mask lanes) {
  uint32_t source[32];
  Mask poison = poison_of(w, insts, lanes, 2);
  for (Mask m = lanes; m; m &= m - 1) source[__builtin_ctz(m)] = value(w, insts, 2, __builtin_ctz(m));
  for (Mask m = lanes; m; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const Inst &in = *insts[lane];
    check_poison(w, in, (w.unit_poison[in.r[3]] | w.unit_poison[in.r[4]]) & 1u << lane, "the lane or clamp of a shuffle");
    const int b = (int)(value(w, insts, 3, lane) & 31), c = (int)value(w, insts, 4, lane);
    const int clamp = c & 31, segment = c >> 8 & 31;
    const int max_lane = (lane & segment) | (clamp & ~segment), min_lane = lane & segment;
    int j = in.a == 0 ? lane - b : in.a == 1 ? lane + b : in.a == 2 ? lane ^ b : min_lane | (b & ~segment);
    const bool in_range = in.a == 0 ? j >= max_lane : j <= max_lane;
    if (!in_range) j = lane;
    const bool there = lanes >> j & 1;  // the value of a lane that takes no part is undefined
    put(w, in.r[0], lane, there ? source[j] : 0xbadbad00u, !there || poison >> j & 1);
    put_predicate(w, in.r[1], lane, in_range);
  }
}

// r: d, p (negatable source), members. in.a: 0 all, 1 any, 2 uni, 3 ballot; d is a predicate but for ballot.
void vote(Warp &w, const Inst *const *insts, Mask lanes) {
  Mask ballot = 0;
  for (Mask m = lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const Slot p = insts[l]->r[1] & ~kNegated;
    check_poison(w, *insts[l], w.predicate_poison[p] & 1u << l, "a vote");
    ballot |= ((insts[l]->r[1] & kNegated ? ~w.predicates[p] : w.predicates[p]) & 1u << l);
  }
  for (Mask m = lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    const Inst &in = *insts[l];
    if (in.a == 3)
      put(w, in.r[0], l, ballot, false);
    else
      put_predicate(w, in.r[0], l, in.a == 0 ? ballot == lanes : in.a == 1 ? ballot != 0 : ballot == 0 || ballot == lanes);
  }
}

// r: d, p, a, members. in.a: 0 any, 1 all; in.b: 1 if a is 64-bit.
void match(Warp &w, const Inst *const *insts, Mask lanes) {
  uint64_t v[32];
  for (Mask m = lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    check_poison(w, *insts[l], w.unit_poison[insts[l]->r[2]] & 1u << l, "a match");
    v[l] = w.address(insts[l]->r[2], l, insts[l]->b);
  }
  for (Mask m = lanes; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    Mask equal = 0;
    for (Mask n = lanes; n; n &= n - 1) equal |= (Mask)(v[__builtin_ctz(n)] == v[l]) << __builtin_ctz(n);
    if (insts[l]->a == 1) put_predicate(w, insts[l]->r[1], l, equal == lanes);
    put(w, insts[l]->r[0], l, insts[l]->a == 0 || equal == lanes ? equal : 0, false);
  }
}

// r: d, a, members. in.a: 0 add, 1 min, 2 max, 3 and, 4 or, 5 xor; in.type.
void redux(Warp &w, const Inst *const *insts, Mask lanes) {
  const Inst &first = *insts[__builtin_ctz(lanes)];
  bool begun = false;
  uint32_t sum = 0;
  for (Mask m = lanes; m; m &= m - 1) {
    const uint32_t x = value(w, insts, 1, __builtin_ctz(m));
    const bool is_signed = first.type == Type::kS32;
    const bool less = is_signed ? (int32_t)x < (int32_t)sum : x < sum;
    if (!begun)
      sum = x;
    else
      switch (first.a) {
        case 0: sum += x; break;
        case 1: sum = less ? x : sum; break;
        case 2: sum = less ? sum : x; break;
        case 3: sum &= x; break;
        case 4: sum |= x; break;
        case 5: sum ^= x; break;
      }
    begun = true;
  }
  const bool poison = poison_of(w, insts, lanes, 1);
  for (Mask m = lanes; m; m &= m - 1) put(w, insts[__builtin_ctz(m)]->r[0], __builtin_ctz(m), sum, poison);
}

// r: d, p, members. Which lane leads differs from run to run, not from call to call: it is one of the members all the same.
void elect(Warp &w, const Inst *const *insts, Mask lanes) {
  const int count = __builtin_popcount(lanes);
  int skip = (int)((w.launch().options.seed + (uint64_t)w.index) % (uint64_t)count);
  Mask m = lanes;
  while (skip--) m &= m - 1;
  const int leader = __builtin_ctz(m);
  for (Mask rest = lanes; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    put(w, insts[l]->r[0], l, (uint32_t)leader, false);
    put_predicate(w, insts[l]->r[1], l, l == leader);
  }
}

// Orders memory among the lanes that take part (PTX ISA 9.7.13.2).
void sync_warp(Warp &w, const Inst *const *, Mask lanes) {
  KnowledgeBuilder told;
  release(w, lanes, told);
  acquire(w, lanes, told.freeze());
}

const Compute kCompute[] = {shfl, vote, match, redux, elect, sync_warp};

// in.c: Kind; in.d: operand that holds the member mask; in.offset: the operation's key.
Flow collective(Warp &w, Fragment &f, const Inst &in) {
  const uint32_t *masks = w.at<uint32_t>(in.r[in.d]);
  const int first = __builtin_ctz(f.mask);
  if (check_poison(w, in, w.unit_poison[in.r[in.d]] & f.mask, "a member mask")) w.launch().stop = true;
  const Mask members = masks[first];
  for (Mask m = f.mask; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    if (!(masks[l] >> l & 1)) {
      w.launch().report("divergent-collective", &w, l, &in, "this lane is not in the member mask that it gives");
      w.launch().stop = true;
      return Flow::kJumped;
    }
    if (masks[l] == members) continue;
    Mask other = 0;  // lanes with another member mask are another group: they go their own way
    for (Mask n = f.mask; n; n &= n - 1) other |= (Mask)(masks[__builtin_ctz(n)] != members) << __builtin_ctz(n);
    split_off(w, f, other);
    break;
  }
  const Mask required = members & ~w.exited;
  std::vector<Fragment *> all;
  if (!gather(w, f, required, (uint32_t)in.offset ^ members * 2654435761u, all)) return Flow::kWait;
  const Inst *insts[32];
  for (const Fragment *part : all)
    for (Mask m = part->mask; m; m &= m - 1) insts[__builtin_ctz(m)] = part == &f ? &in : &w.launch().program->code[part->pc];
  kCompute[in.c](w, insts, required);
  ++w.launch().changes;
  for (Fragment *part : all)
    if (part != &f) jump(w, *part, part->pc + 1);
  return Flow::kNext;
}

// r: d
void activemask(Warp &w, const Inst &in, Mask m) {
  uint32_t v[32];
  for (uint32_t &x : v) x = m;
  store_lanes(w, in.r[0], v, m, 0);
}

}  // namespace

bool decode_collective(Decoder &d, const Statement &s, Inst &in) {
  const std::string &op = s.parts[0];
  in.klass = Class::kCollective;
  const auto choose = [&](std::initializer_list<const char *> names) {
    int i = 0;
    for (const char *name : names) {
      if (s.has(name)) return i;
      ++i;
    }
    throw Decoder::Uncovered();
  };
  const auto pair = [&](const Operand &o) {  // d|p, or d alone
    d.destination(o.pair ? o.elements[0] : o);
    d.destination(o.pair ? o.elements[1] : Operand(), Type::kPred);
  };
  if (op == "activemask") {
    d.destination(s.operands[0]);
    in.exec = activemask;
    return true;
  }
  if (op == "shfl") {
    in.a = choose({"up", "down", "bfly", "idx"});
    in.c = kShfl;
    pair(s.operands[0]);
    for (size_t i = 1; i < 5; ++i) d.source(s.operands[i], Type::kB32);
    in.d = 5;
  } else if (op == "vote") {
    in.a = choose({"all", "any", "uni", "ballot"});
    in.c = kVote;
    d.destination(s.operands[0], in.a == 3 ? Type::kB32 : Type::kPred);
    d.predicate(s.operands[1]);
    d.source(s.operands[2], Type::kB32);
    in.d = 2;
  } else if (op == "match") {
    in.a = choose({"any", "all"});
    in.b = s.has("b64");
    in.c = kMatch;
    pair(s.operands[0]);
    d.source(s.operands[1], last_type(s));
    d.source(s.operands[2], Type::kB32);
    in.d = 3;
  } else if (op == "redux") {
    in.a = choose({"add", "min", "max", "and", "or", "xor"});
    in.type = last_type(s);
    in.c = kRedux;
    d.destination(s.operands[0]);
    d.source(s.operands[1], Type::kB32);
    d.source(s.operands[2], Type::kB32);
    in.d = 2;
  } else if (op == "elect") {
    in.c = kElect;
    pair(s.operands[0]);
    d.source(s.operands[1], Type::kB32);
    in.d = 2;
  } else if (op == "bar" && s.has("warp")) {
    in.c = kSyncWarp;
    d.source(s.operands[0], Type::kB32);
    in.d = 0;
    in.klass = Class::kBarrier;
  } else {
    return false;
  }
  in.offset = (int64_t)in.type * 512 + in.c * 64 + in.a * 4 + in.b;
  in.control = collective;
  return true;
}

}  // namespace vgpu
