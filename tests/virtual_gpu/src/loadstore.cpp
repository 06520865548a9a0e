// ld, st, atom, red, cvta, isspacep, prefetch and clocks (PTX ISA 9.7.9.8 ld, 9.7.9.11 st, 9.7.13.5 atom, 9.7.13.6 red, 9.7.9.20 cvta).
#include <algorithm>
#include <cstring>

#include "decode.h"
#include "machine.h"
#include "numbers.h"

namespace vgpu {

// 32 banks of 4 bytes. An access of 4 bytes a lane or less is one pass, of 8 two (half warps), of 16 four: a pass takes as many
// wavefronts as the bank with the most different words.
void count_shared(Warp &warp, const Inst &in, const uint64_t *addresses, Mask lanes, unsigned bytes) {
  const int lanes_a_pass = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
  uint64_t wavefronts = 0, least = 0;
  for (int begin = 0; begin < 32; begin += lanes_a_pass) {
    const Mask pass = lanes >> begin & (lanes_a_pass == 32 ? kAllLanes : (1u << lanes_a_pass) - 1);
    if (!pass) continue;
    uint64_t words[32][32];  // a lane has one word of a bank at most
    uint8_t count[32] = {}, most = 0;
    for (Mask m = pass; m; m &= m - 1) {
      const uint64_t a = addresses[begin + __builtin_ctz(m)];
      for (uint64_t word = a / 4; word * 4 < a + bytes; ++word) {
        const size_t bank = word % 32;
        bool there = false;
        for (uint8_t i = 0; i < count[bank]; ++i) there |= words[bank][i] == word;
        if (there) continue;
        words[bank][count[bank]] = word;
        most = std::max<uint8_t>(most, ++count[bank]);
      }
    }
    wavefronts += most;
    ++least;
  }
  Counters &c = warp.launch().counters;
  c.shared_wavefronts += wavefronts;
  if (wavefronts <= least) return;
  c.shared_conflicts += wavefronts - least;
  c.conflicts_by_line[warp.launch().program->where(in)] += wavefronts - least;
}

namespace {

uint64_t sectors(const uint64_t *addresses, Mask lanes, unsigned bytes) {
  uint64_t all[64];
  size_t n = 0;
  for (Mask m = lanes; m; m &= m - 1) {
    const uint64_t a = addresses[__builtin_ctz(m)];
    for (uint64_t s = a / 32; s * 32 < a + bytes; ++s)
      if (!n || all[n - 1] != s) all[n++] = s;
  }
  std::sort(all, all + n);
  return (uint64_t)(std::unique(all, all + n) - all);
}

void count_global(Warp &warp, const uint64_t *addresses, Mask lanes, unsigned bytes, bool write) {
  Counters &c = warp.launch().counters;
  (write ? c.global_store_bytes : c.global_load_bytes) += (uint64_t)__builtin_popcount(lanes) * bytes;
  (write ? c.global_store_sectors : c.global_load_sectors) += sectors(addresses, lanes, bytes);
}

bool is_shared(Space s) { return s == Space::kShared || s == Space::kSharedCluster; }

constexpr int kGuess = 4;  // in Inst::b of a weak load: a CAS checks what it reads

uint8_t strength(const Inst &in) { return in.a == kWeak ? in.b & kGuess ? kStrong : 0 : (in.b & 1) == kCtaScope ? kStrong | kBlockScope : kStrong; }

void addresses_of(Warp &w, const Inst &in, Slot base, Mask m, uint64_t *out) {
  if (check_poison(w, in, w.unit_poison[base] & m, "an address")) w.unit_poison[base] &= ~m;
  for (int l = 0; l < 32; ++l) out[l] = w.address(base, l, in.d) + (uint64_t)in.offset;
}

// r: d of each element, base. in.type; in.type2: kU16 if the destination is a 16-bit register; in.vector; in.a: Order;
// in.b: Scope; in.c: non-coherent.
void load(Warp &w, const Inst &in, Mask m) {
  const unsigned element = (unsigned)type_bytes(in.type), bytes = element * in.vector;
  uint64_t address[32];
  addresses_of(w, in, in.r[in.vector], m, address);
  uint8_t data[32][16];
  Parts poison[4] = {};  // by element
  const auto undefined = [&](unsigned byte, int lane) {
    if (element < 4)
      poison[byte / element].fill(poison[byte / element][0] | 1u << lane);
    else
      poison[byte / element][byte % element / 2] |= 1u << lane;
  };
  const bool strong = in.a != kWeak;
  Mask global = 0, shared = 0;
  if (in.space == Space::kParam) {  // uniform, never written
    for (Mask rest = m; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      const Span span = resolve(w, l, in, Space::kParam, address[l], bytes, bytes, false);
      if (!span.data) return;
      memcpy(data[l], span.data, bytes);
    }
  } else {
    for (Mask rest = m; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      const Span span = resolve(w, l, in, in.space, address[l], bytes, bytes, false);
      if (!span.data) {
        for (unsigned i = 0; i < bytes; ++i) undefined(i, l);
        continue;
      }
      memcpy(data[l], span.data, bytes);
      if (span.space == Space::kLocal) {
        const size_t at = (size_t)(span.data - w.local.data());
        for (unsigned i = 0; i < bytes; ++i)
          if (!w.local_valid[at + i]) undefined(i, l);
        continue;
      }
      if (!span.cells) continue;
      const bool in_shared = is_shared(span.space);
      (in_shared ? shared : global) |= 1u << l;
      const uint64_t at = span.at;
      span.shadow->touch(span.cells, at, bytes, false, actor(w, l, in, strength(in)));
      Replaced *const old = strong ? old_value(w, l, in, span, bytes, false) : nullptr;
      if (old) memcpy(data[l], old->data, bytes);
      if (old || !span.shadow->valid(span.cells, at, bytes))
        for (unsigned i = 0; i < bytes; ++i)
          if (!(old ? old->valid >> i & 1 : span.shadow->valid(span.cells + ((at & 3) + i) / 4, at + i, 1))) undefined(i, l);
      if (strong) {
        w.looked = true;
        observe(w, l, span, old, in.a, in.b & 1);
      }
      if (in.c) span.shadow->set_constant(span.cells, at, bytes);
      if (const Access *writer = in.c ? span.shadow->writer(span.cells, at, bytes) : nullptr)
        w.launch().report("race", &w, l, &in, "a non-coherent load (ld.global.nc) reads what this kernel wrote: " + w.launch().who(*writer));
    }
  }
  if (global) count_global(w, address, global, bytes, false);
  if (shared) count_shared(w, in, address, shared, bytes);
  for (unsigned e = 0; e < in.vector; ++e) {
    if (element == 8) {
      uint64_t v[32];
      for (int l = 0; l < 32; ++l) memcpy(&v[l], data[l] + e * 8, 8);
      store_lanes(w, in.r[e], v, m, poison[e]);
      continue;
    }
    uint32_t v[32];
    for (int l = 0; l < 32; ++l) {
      const uint8_t *p = data[l] + e * element;
      switch (in.type) {
        case Type::kS8: v[l] = (uint32_t)(int32_t)(int8_t)*p; break;
        case Type::kS16: { int16_t x; memcpy(&x, p, 2); v[l] = (uint32_t)(int32_t)x; break; }
        case Type::kU8: case Type::kB8: v[l] = *p; break;
        case Type::kU16: case Type::kB16: case Type::kF16: case Type::kBF16: { uint16_t x; memcpy(&x, p, 2); v[l] = x; break; }
        default: memcpy(&v[l], p, 4);
      }
      if (in.type2 == Type::kU16) v[l] &= 0xffff;
    }
    if (in.b & 2) {  // a 64-bit register takes a narrower value, extended
      uint64_t wide[32];
      const bool sign = in.type == Type::kS8 || in.type == Type::kS16 || in.type == Type::kS32;
      for (int l = 0; l < 32; ++l) wide[l] = sign ? (uint64_t)(int64_t)(int32_t)v[l] : v[l];
      store_lanes(w, in.r[e], wide, m, poison[e][0] | poison[e][1]);
    } else {
      store_lanes(w, in.r[e], v, m, poison[e]);
    }
  }
}

// r: base, value of each element. in.c: elements (bits) in 64-bit registers, wider than the type or not. The rest as in load.
void store(Warp &w, const Inst &in, Mask m) {
  const unsigned element = (unsigned)type_bytes(in.type), bytes = element * in.vector;
  uint64_t address[32];
  addresses_of(w, in, in.r[0], m, address);
  const bool strong = in.a != kWeak;
  Mask global = 0, shared = 0;
  for (Mask rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const Span span = resolve(w, l, in, in.space, address[l], bytes, bytes, true);
    if (!span.data) continue;
    uint8_t data[16];
    Mask undefined = 0;  // by byte
    for (unsigned e = 0; e < in.vector; ++e) {
      const Slot v = in.r[1 + e];
      memcpy(data + e * element, in.c >> e & 1 ? (const void *)&w.at<uint64_t>(v)[l] : (const void *)&w.at<uint32_t>(v)[l], element);
      for (unsigned i = 0; w.unit_poison[v] >> l & 1 && i < element; ++i)
        undefined |= (w.part_poison(v, (int)i / 2) >> l & 1) << (e * element + i);
    }
    if (span.space == Space::kLocal) {
      const size_t at = (size_t)(span.data - w.local.data());
      for (unsigned i = 0; i < bytes; ++i) w.local_valid[at + i] = !(undefined >> i & 1);
    } else if (span.cells) {
      const bool in_shared = is_shared(span.space);
      (in_shared ? shared : global) |= 1u << l;
      const uint64_t at = span.at;
      if (undefined && !in_shared) check_poison(w, in, 1u << l, "global memory");
      if (strong) replace(w, l, span, bytes);
      span.shadow->touch(span.cells, at, bytes, true, actor(w, l, in, strength(in)));
      for (unsigned i = 0; undefined >> i; ++i)
        if (undefined >> i & 1) span.shadow->set_valid(span.cells + ((at & 3) + i) / 4, at + i, 1, false);
      if (strong) publish(w, l, span, in.a, in.b & 1, false);
    }
    memcpy(span.data, data, bytes);
  }
  if (global) count_global(w, address, global, bytes, true);
  if (shared) count_shared(w, in, address, shared, bytes);
}

// -------------------------------------------------------------------------------------------------------------- atomics

enum AtomOp : int { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <class T>
T integer_atom(int op, T old, T a, T b) {
  switch (op) {
    case kAdd: return (T)((uint64_t)old + (uint64_t)a);
    case kMin: return std::min(old, a);
    case kMax: return std::max(old, a);
    case kAnd: return old & a;
    case kOr: return old | a;
    case kXor: return old ^ a;
    case kExch: return a;
    case kCas: return old == a ? b : old;
    case kInc: return old >= a ? 0 : (T)(old + 1);
    default: return old == 0 || old > a ? a : (T)(old - 1);
  }
}

// atom.add.f32 on global memory flushes subnormal inputs and results (PTX ISA, atom).
uint64_t flushed(uint64_t bits) { return bits & 0x7f800000 ? bits : bits & 0x80000000; }

uint64_t atom_value(const Inst &in, uint64_t old, uint64_t a, uint64_t b) {
  float x, y;
  double dx, dy;
  const auto pair = [&](auto add) {
    return (uint64_t)add((uint16_t)old, (uint16_t)a) | (uint64_t)add((uint16_t)(old >> 16), (uint16_t)(a >> 16)) << 16;
  };
  const auto add_f16 = [](uint16_t p, uint16_t q) { return f16_bits(half_to_float(false, p) + half_to_float(false, q)); };
  const auto add_bf16 = [](uint16_t p, uint16_t q) { return bf16_bits((double)half_to_float(true, p) + half_to_float(true, q)); };
  switch (in.type) {
    case Type::kS32: return (uint32_t)integer_atom<int32_t>(in.c, (int32_t)old, (int32_t)a, (int32_t)b);
    case Type::kS64: return (uint64_t)integer_atom<int64_t>(in.c, (int64_t)old, (int64_t)a, (int64_t)b);
    case Type::kU64: case Type::kB64: return integer_atom<uint64_t>(in.c, old, a, b);
    case Type::kB16: return integer_atom<uint16_t>(in.c, (uint16_t)old, (uint16_t)a, (uint16_t)b);
    case Type::kF32:
      memcpy(&x, &old, 4), memcpy(&y, &a, 4);
      x += y;
      old = 0;
      memcpy(&old, &x, 4);
      return old;
    case Type::kF64:
      memcpy(&dx, &old, 8), memcpy(&dy, &a, 8);
      dx += dy;
      memcpy(&old, &dx, 8);
      return old;
    case Type::kF16: return add_f16((uint16_t)old, (uint16_t)a);
    case Type::kBF16: return add_bf16((uint16_t)old, (uint16_t)a);
    case Type::kF16x2: return pair(add_f16);
    case Type::kBF16x2: return pair(add_bf16);
    default: return integer_atom<uint32_t>(in.c, (uint32_t)old, (uint32_t)a, (uint32_t)b);
  }
}

// r: d of each element (kNoSlot for red), base, a of each, [b of cas]. in.a: Order; in.b: Scope; in.c: AtomOp. The elements of a
// vector are atomics of their own (9.7.13.5).
void atom(Warp &w, const Inst &in, Mask m) {
  const unsigned element = (unsigned)type_bytes(in.type), bytes = element * in.vector;
  const bool wide = element == 8, observes = in.r[0] != kNoSlot;
  uint64_t address[32], old[8][32] = {};
  addresses_of(w, in, in.r[in.vector], m, address);
  Mask poison[8] = {}, undefined = 0, global = 0, shared = 0;
  for (unsigned i = in.vector + 1; i < in.count; ++i) undefined |= w.unit_poison[in.r[i]];
  for (Mask rest = m; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    check_poison(w, in, undefined & 1u << l, "an atomic");
    const Span whole = resolve(w, l, in, in.space, address[l], bytes, bytes, true);
    if (!whole.data) continue;
    if (!whole.cells) {
      w.launch().report("uncovered", &w, l, &in, "an atomic of local or constant memory");
      continue;
    }
    const bool in_shared = is_shared(whole.space);
    (in_shared ? shared : global) |= 1u << l;
    for (unsigned e = 0; e < in.vector; ++e) {
      Span span = whole;
      span.cells += ((span.at & 3) + e * element) / 4, span.at += e * element, span.data += e * element;
      const bool valid = span.shadow->valid(span.cells, span.at, element);
      if (!valid && in.c == kExch)
        poison[e] |= 1u << l;
      else if (!valid)
        check_poison(w, in, 1u << l, "an atomic: the memory it changes was never written");
      memcpy(&old[e][l], span.data, element);
      const uint64_t a = w.address(in.r[in.vector + 1 + e], l, wide), b = in.c == kCas ? w.address(in.r[3], l, wide) : 0;
      const bool flush = in.type == Type::kF32 && !in_shared;
      uint64_t now = flush ? atom_value(in, flushed(old[e][l]), flushed(a), b) : atom_value(in, old[e][l], a, b);
      if (flush) now = flushed(now);
      const uint64_t changes = w.launch().changes;
      const bool writes = !(in.c == kCas && old[e][l] != a);
      old_value(w, l, in, span, element, true);
      if (writes) replace(w, l, span, element);
      span.shadow->touch(span.cells, span.at, element, true, actor(w, l, in, strength(in)), observes);
      if (now == old[e][l]) w.launch().changes = changes;  // nobody can tell: a failed attempt is no progress
      memcpy(span.data, &now, element);
      w.looked = true;
      if (observes) observe(w, l, span, nullptr, in.a, in.b & 1);  // red is no acquire pattern (8.8)
      if (writes) publish(w, l, span, in.a, in.b & 1, true);
    }
  }
  w.launch().counters.global_load_bytes += (uint64_t)__builtin_popcount(global) * bytes;
  if (global) count_global(w, address, global, bytes, true);
  if (shared) count_shared(w, in, address, shared, bytes);
  for (unsigned e = 0; e < in.vector; ++e) {
    uint32_t narrow[32];
    for (int l = 0; l < 32; ++l) narrow[l] = (uint32_t)old[e][l];
    wide ? store_lanes(w, in.r[e], old[e], m, poison[e]) : store_lanes(w, in.r[e], narrow, m, poison[e]);
  }
}

// ------------------------------------------------------------------------------------------------------------ addresses

// r: d, a. in.a: to the space (else from it)
void cvta(Warp &w, const Inst &in, Mask m) {
  uint64_t v[32];
  for (int l = 0; l < 32; ++l) v[l] = w.address(in.r[1], l, true) + (in.a ? -window_of(in.space) : window_of(in.space));
  store_lanes(w, in.r[0], v, m, w.unit_poison[in.r[1]]);
}

// r: p, a. in.space. The window of a kernel's parameters is part of the global one. (9.7.9.19 isspacep)
void isspacep(Warp &w, const Inst &in, Mask m) {
  Mask p = 0;
  for (int l = 0; l < 32; ++l) {
    const uint64_t a = w.address(in.r[1], l, in.d);
    const Space space = space_of_window(a);
    bool is = space == (in.space == Space::kSharedCluster ? Space::kShared : in.space) || (space == Space::kParam && in.space == Space::kGlobal);
    if (is && in.space == Space::kShared) is = (a >> kClusterShift & 0xff) == 0 || (a >> kClusterShift & 0xff) == w.cta->rank + 1;
    p |= (Mask)is << l;
  }
  w.predicates[in.r[0]] = (w.predicates[in.r[0]] & ~m) | (p & m);
  w.predicate_poison[in.r[0]] = (w.predicate_poison[in.r[0]] & ~m) | (w.unit_poison[in.r[1]] & m);
}

// mapa (9.7.9.23): r: d, a, rank. in.a: 0 shared::cluster address, 1 generic; in.b: 64-bit
void mapa(Warp &w, const Inst &in, Mask m) {
  uint64_t v[32];
  uint32_t narrow[32];
  for (int l = 0; l < 32; ++l) {
    const uint64_t a = w.address(in.r[1], l, in.b), offset = a & ((1u << kClusterShift) - 1);
    const uint32_t rank = w.at<uint32_t>(in.r[2])[l];
    if (m >> l & 1 && rank >= w.cta->cluster->ctas.size())
      w.launch().report("out-of-range", &w, l, &in,
                        "block " + std::to_string(rank) + " of a cluster of " + std::to_string(w.cta->cluster->ctas.size()));
    v[l] = (in.a ? kSharedWindow : 0) | (uint64_t)(rank + 1) << kClusterShift | offset;
    narrow[l] = (uint32_t)v[l];
  }
  const Mask poison = w.unit_poison[in.r[1]] | w.unit_poison[in.r[2]];
  if (in.b)
    store_lanes(w, in.r[0], v, m, poison);
  else
    store_lanes(w, in.r[0], narrow, m, poison);
}

// Time is the number of instructions that the launch has executed. in.b: 64-bit
void clock_register(Warp &w, const Inst &in, Mask m) {
  uint64_t v[32];
  uint32_t narrow[32];
  for (int l = 0; l < 32; ++l) narrow[l] = (uint32_t)(v[l] = w.launch().executed);
  if (in.b)
    store_lanes(w, in.r[0], v, m, 0);
  else
    store_lanes(w, in.r[0], narrow, m, 0);
}

void no_effect(Warp &, const Inst &, Mask) {}

Space parse_space(const Statement &s) {
  for (const std::string &p : s.parts) {
    if (p == "global") return Space::kGlobal;
    if (p == "shared" || p == "shared::cta") return Space::kShared;
    if (p == "shared::cluster") return Space::kSharedCluster;
    if (p == "local") return Space::kLocal;
    if (p == "param" || p == "param::entry") return Space::kParam;
    if (p == "const") return Space::kConst;
  }
  return Space::kGeneric;
}

int parse_order(const Statement &s) {
  if (s.has("acq_rel")) return kAcquireRelease;
  if (s.has("acquire")) return kAcquire;
  if (s.has("release")) return kRelease;
  return s.has("relaxed") || s.has("volatile") || s.has("mmio") ? kRelaxed : kWeak;
}

}  // namespace

bool decode_memory(Decoder &d, const Statement &s, Inst &in) {
  const std::string &op = s.parts[0];
  if (op == "mov") {
    const auto reads = [&](const char *name) { return s.operands.size() == 2 && s.parts.size() == 2 && d.special(s.operands[1], name); };
    in.b = s.has("u64") && (reads("%clock64") || reads("%globaltimer"));
    if (!in.b && !(s.has("u32") && (reads("%clock") || reads("%globaltimer_lo")))) return false;
    d.destination(s.operands[0], last_type(s));
    in.exec = clock_register;
    in.klass = Class::kMove;
    return true;
  }
  if (op == "ld" || op == "st" || op == "atom" || op == "red") {
    in.space = parse_space(s);
    in.type = last_type(s);
    in.a = parse_order(s);
    in.b = s.has("cta") ? kCtaScope : kGpuScope;
    in.vector = s.has("v8") ? 8 : s.has("v4") ? 4 : s.has("v2") ? 2 : 1;
    if (in.vector * type_bytes(in.type) > 16) return false;
    const bool shared = in.space == Space::kShared || in.space == Space::kSharedCluster;
    if (op == "ld") {
      in.klass = shared ? Class::kLoadShared : in.space == Space::kLocal ? Class::kLocal
                 : in.space == Space::kParam ? Class::kMove : Class::kLoadGlobal;
      in.c = s.has("nc");
      const Operand &first = in.vector > 1 ? s.operands[0].elements[0] : s.operands[0];
      for (unsigned e = 1; e < in.vector; ++e)
        if (d.wide(s.operands[0].elements[e]) != d.wide(first) || d.narrow(s.operands[0].elements[e]) != d.narrow(first)) return false;
      d.destination(s.operands[0], d.wide(first) ? Type::kB64 : in.type);
      if (d.narrow(first)) in.type2 = Type::kU16;
      if (type_bytes(in.type) < 8 && d.wide(first)) in.b |= 2;
      if (in.a == kWeak && in.vector == 1 && !in.c && in.space != Space::kParam && d.guess_of_cas(s)) in.b |= kGuess;
      d.address(s.operands[1], in);
      in.exec = load;
      return true;
    }
    if (op == "st") {
      in.klass = shared ? Class::kStoreShared : in.space == Space::kLocal ? Class::kLocal : Class::kStoreGlobal;
      d.address(s.operands[0], in);
      for (unsigned e = 0; e < in.vector; ++e) {
        const Operand &value = in.vector > 1 ? s.operands[1].elements[e] : s.operands[1];
        d.source(value, d.wide(value) ? Type::kB64 : in.type);
        in.c |= (type_bytes(in.type) == 8 || d.wide(value)) << e;
      }
      in.exec = store;
      return true;
    }
    static const char *const names[] = {"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"};
    in.c = -1;
    for (int i = 0; i < 10; ++i)
      if (s.has(names[i])) in.c = i;
    if (in.a == kWeak) in.a = kRelaxed;
    in.klass = Class::kAtomic;
    size_t i = 0;
    if (op == "atom")
      d.destination(s.operands[i++], in.type);
    else
      for (unsigned e = 0; e < in.vector; ++e) d.destination(Operand());
    d.address(s.operands[i], in);
    d.source(s.operands[i + 1], in.type);
    if (in.c == kCas) d.source(s.operands[i + 2], in.type);
    in.exec = atom;
    return true;
  }
  if (op == "cvta" || op == "isspacep") {
    in.klass = Class::kMove;
    in.space = parse_space(s);
    in.a = s.has("to");
    in.d = op == "cvta" || d.wide(s.operands[1]) || s.operands[1].kind != Operand::kRegister;
    d.destination(s.operands[0], op == "cvta" ? Type::kU64 : Type::kPred);
    d.source(s.operands[1], in.d ? Type::kU64 : Type::kU32);
    in.exec = op == "cvta" ? cvta : isspacep;
    return true;
  }
  if (op == "mapa") {
    in.klass = Class::kMove;
    in.b = s.has("u64");
    in.a = parse_space(s) == Space::kGeneric;
    d.destination(s.operands[0], last_type(s));
    d.source(s.operands[1], last_type(s));
    d.source(s.operands[2], Type::kU32);
    in.exec = mapa;
    return true;
  }
  if (op == "prefetch" || op == "prefetchu" || op == "createpolicy" || op == "applypriority") {
    in.klass = Class::kMove;
    if (op == "createpolicy") {
      d.destination(s.operands[0], Type::kB64);
      in.b = 1;
      in.exec = clock_register;  // any defined value: cache policies change no result
      return true;
    }
    in.exec = no_effect;
    return true;
  }
  return false;
}

}  // namespace vgpu
