// Lane values of every PTX type, predicates, and opcodes taken apart: what arithmetic and conversions share.
#pragma once
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "decode.h"
#include "machine.h"
#include "numbers.h"

namespace vgpu {

// ---------------------------------------------------------------------------------------------------------- lane values

template <class T>
using Lane32or64 = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;  // what a register's lane is stored as
template <class T>
using LaneBits = std::conditional_t<sizeof(T) == 1, uint8_t, std::conditional_t<sizeof(T) == 2, uint16_t, Lane32or64<T>>>;

template <class T>
inline T from_lane(Lane32or64<T> x) { return bit_cast<T>((LaneBits<T>)x); }
template <class T>
inline Lane32or64<T> to_lane(T x) { return bit_cast<LaneBits<T>>(x); }

// ----------------------------------------------------------------------------------------------------------- predicates

struct Predicate {
  Mask value, poison;
};

// Source `i` of an instruction. An immediate has no slot; its value is bit i of Inst::d.
inline Predicate read_predicate(const Warp &w, const Inst &in, int i) {
  const Slot s = in.r[i];
  if (s == kNoSlot) return {in.d >> i & 1 ? kAllLanes : 0, 0};
  const Slot slot = s & (Slot)~kNegated;
  return {s & kNegated ? ~w.predicates[slot] : w.predicates[slot], w.predicate_poison[slot]};
}

inline void write_predicate(Warp &w, Slot slot, Predicate p, Mask m) {
  if (slot == kNoSlot) return;
  w.predicates[slot] = (w.predicates[slot] & ~m) | (p.value & m);
  w.predicate_poison[slot] = (w.predicate_poison[slot] & ~m) | (p.poison & m);
}

inline void predicate_source(Decoder &d, const Operand &o, Inst &in, int i) {
  if (o.kind != Operand::kImmediate) return d.predicate(o);
  in.d |= (int)(o.immediate != 0) << i;
  d.destination(Operand());
}

// -------------------------------------------------------------------------------------------------------------- opcodes

// The parts of an opcode after its name. Decoders take what they know; a form with anything left over is not covered.
struct Form {
  std::vector<Type> types;
  std::vector<std::string> rest;

  explicit Form(const Statement &s) {
    for (size_t i = 1; i < s.parts.size(); ++i) {
      const Type t = parse_type(s.parts[i]);
      t != Type::kNone ? types.push_back(t) : rest.push_back(s.parts[i]);
    }
  }
  bool take(const char *modifier) {
    const auto found = std::find(rest.begin(), rest.end(), modifier);
    if (found == rest.end()) return false;
    rest.erase(found);
    return true;
  }
  Type type() const { return types.size() == 1 ? types[0] : Type::kNone; }
};

inline int take_modifiers(Form &f) {
  return (f.take("ftz") ? kFtz : 0) | (f.take("sat") ? kSat : 0) | (f.take("relu") ? kRelu : 0);
}

// Whether an operand that must have the width of its type does. (PTX ISA 9.2 "Type Information for Instructions and Operands")
inline bool fits(const Decoder &d, const Operand &o, Type t) {
  return o.kind != Operand::kRegister || (d.wide(o) == (type_bytes(t) == 8) && d.narrow(o) == (type_bytes(t) == 2));
}

template <class T>
inline bool represents(Type t) {
  constexpr int kIndex = sizeof(T) == 8 ? 3 : sizeof(T) == 4 ? 2 : sizeof(T) == 2;  // among the four sizes of a kind
  const auto is = [&](Type smallest) { return (int)t == (int)smallest + kIndex; };
  if (std::is_integral_v<T>) return std::is_signed_v<T> ? is(Type::kS8) : is(Type::kU8) || is(Type::kB8);
  if (std::is_same_v<T, float>) return t == Type::kF32;
  if (std::is_same_v<T, double>) return t == Type::kF64;
  if (std::is_same_v<T, F16>) return t == Type::kF16;
  if (std::is_same_v<T, BF16>) return t == Type::kBF16;
  return std::is_same_v<T, F16x2> ? t == Type::kF16x2 : std::is_same_v<T, BF16x2> && t == Type::kBF16x2;
}

template <class T>
struct Tag { using type = T; };

// C++ types: f(Tag<T>()) for the one that a PTX type stands for, or what it returns, null if it is none of them.
template <class... T>
struct Types {
  template <class F>
  static void with(Type t, F f) { ((represents<T>(t) ? f(Tag<T>()) : void()), ...); }
  template <class F>
  static Exec choose(Type t, F f) {
    Exec exec = nullptr;
    with(t, [&](auto tag) { exec = f(tag); });
    return exec;
  }
};

}  // namespace vgpu
