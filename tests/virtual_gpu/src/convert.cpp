// Conversions and moves (PTX ISA 9.0, section 9.7.9 "Data Movement and Conversion Instructions": cvt, mov).
#include "lanes.h"

namespace vgpu {
namespace {

// ------------------------------------------------------------------------------------------------------------------ cvt
// In two steps, so that there is one loop a source and one a destination type: lanes to int64_t (u64 as its bits) or double,
// and from there on. in.type, in.type2: to, from. in.a: modifiers. in.b: rounding mode. in.c: flags below.

constexpr int kIntegral = 16;                        // with the modifiers: .rni .rzi .rmi .rpi, rounding to an integral value
enum Width : int { kWideFrom = 1, kWideTo = 2, kNarrowTo = 4 };  // registers; without: 32 bits

using Whole = Types<uint8_t, int8_t, uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t>;
using Real = Types<F16, BF16, float, double>;

bool is_integer(Type t) { return t >= Type::kU8 && t <= Type::kS64; }
bool is_signed(Type t) { return t >= Type::kS8 && t <= Type::kS64; }
bool is_real(Type t) { return t == Type::kF16 || t == Type::kBF16 || t == Type::kF32 || t == Type::kF64; }

// Chops a register that is wider than its type. (9.4.1 "Operand Size Exceeding Instruction-Type Size")
template <class T>
void load_integers(Warp &w, const Inst &in, int64_t *x) {
  const auto load = [&](const auto *from) {
    for (int l = 0; l < 32; ++l) x[l] = (int64_t)(T)from[l];
  };
  in.c & kWideFrom ? load(w.at<uint64_t>(in.r[1])) : load(w.at<uint32_t>(in.r[1]));
}

// And extends to one by the sign of the type.
template <class Poison>
void store_integers(Warp &w, const Inst &in, const int64_t *x, Mask m, const Poison &poison) {
  uint64_t wide[32];
  uint32_t word[32];
  Whole::with(in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int l = 0; l < 32; ++l) wide[l] = (uint64_t)(T)x[l];
  });
  if (in.c & kWideTo) return store_lanes(w, in.r[0], wide, m, poison);
  const uint32_t kept = in.c & kNarrowTo ? 0xffff : ~0u;
  for (int l = 0; l < 32; ++l) word[l] = (uint32_t)wide[l] & kept;
  store_lanes(w, in.r[0], word, m, poison);
}

void cvt_integers(Warp &w, const Inst &in, Mask m) {
  int64_t x[32];
  Whole::with(in.type2, [&](auto tag) { load_integers<typename decltype(tag)::type>(w, in, x); });
  if (in.a & kSat)  // to the range of the destination
    Whole::with(in.type, [&](auto tag) {
      using Limits = std::numeric_limits<typename decltype(tag)::type>;
      constexpr int64_t kMost = Limits::digits > 63 ? std::numeric_limits<int64_t>::max() : (int64_t)Limits::max();
      for (int l = 0; l < 32; ++l)
        x[l] = in.type2 == Type::kU64 ? (int64_t)std::min<uint64_t>((uint64_t)x[l], (uint64_t)Limits::max())
                                      : std::clamp<int64_t>(x[l], (int64_t)Limits::min(), kMost);
    });
  if (in.a & kSat) return store_integers(w, in, x, m, w.unit_poison[in.r[1]]);
  // What is cut off may be undefined; what extends is, if the sign may be.
  const size_t kept = (size_t)std::max(std::min(type_bytes(in.type), type_bytes(in.type2)) / 2, 1);
  const bool sign = is_signed(in.type) || is_signed(in.type2);
  Parts poison = w.parts_poison(in.r[1]);
  for (size_t i = kept; i < 4; ++i) poison[i] = sign ? poison[kept - 1] : 0;
  store_integers(w, in, x, m, poison);
}

// Integers of 64 bits that no double has are rounded to odd, unless a double is what is wanted.
void load_reals(Warp &w, const Inst &in, double *x) {
  if (is_integer(in.type2)) {
    int64_t n[32];
    Whole::with(in.type2, [&](auto tag) { load_integers<typename decltype(tag)::type>(w, in, n); });
    for (int l = 0; l < 32; ++l) {
      const double high = in.type2 == Type::kU64 ? (double)(uint32_t)(n[l] >> 32) : (double)(int32_t)(n[l] >> 32);
      const double low = (double)(uint32_t)n[l];
      x[l] = in.type == Type::kF64 ? high * 0x1p32 + low : odd_sum(high * 0x1p32, low);
    }
    return;
  }
  Real::with(in.type2, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto *from = w.at<Lane32or64<T>>(in.r[1]);
    const bool ftz = std::is_same_v<T, float> && (in.a & kFtz);  // .ftz is about single precision only
    for (int l = 0; l < 32; ++l) x[l] = flush<T>(widen(from_lane<T>(from[l])), ftz);
  });
}

double integral(double x, int mode) {
  return mode == kNearest ? std::rint(x) : mode == kZero ? std::trunc(x) : mode == kDown ? std::floor(x) : std::ceil(x);
}

// NaN becomes 0 if neither side has 64 bits, else the integer of which only the top bit is set; what is beyond the range of the
// destination becomes its nearest end. (9.7.9 cvt)
void cvt_to_integer(Warp &w, const Inst &in, Mask m) {
  double x[32];
  int64_t to[32];
  load_reals(w, in, x);
  Whole::with(in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Limits = std::numeric_limits<T>;
    constexpr double kBeyond = power(Limits::digits), kLeast = (double)Limits::min();
    const T nan = in.type2 == Type::kF64 || sizeof(T) == 8 ? (T)(1ull << (8 * sizeof(T) - 1)) : T(0);
    for (int l = 0; l < 32; ++l) {
      const double r = integral(x[l], in.b);
      to[l] = (int64_t)(r >= kBeyond ? Limits::max() : r <= kLeast ? Limits::min() : r == r ? (T)r : nan);
    }
  });
  store_integers(w, in, to, m, w.unit_poison[in.r[1]]);
}

void cvt_to_real(Warp &w, const Inst &in, Mask m) {
  double x[32];
  load_reals(w, in, x);
  const int modifiers = in.type == Type::kF32 ? in.a : in.a & ~kFtz;
  int mode = in.b;
  if (in.a & kIntegral) {
    for (double &v : x) v = integral(v, mode);
    mode = kNearest;
  }
  Real::with(in.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Lane32or64<T> to[32];
    const auto round = [&](int modifiers, int mode) {
      for (int l = 0; l < 32; ++l) to[l] = to_lane(result<T>(x[l], modifiers, mode));
    };
    modifiers || mode != kNearest ? round(modifiers, mode) : round(0, kNearest);  // the compiler knows the second one's
    store_lanes(w, in.r[0], to, m, w.unit_poison[in.r[1]]);
  });
}

// .f16x2 and .bf16x2 of two f32: the first becomes the upper half. And one value alone.
template <class T, int kCount, bool kPlain>
void cvt_single(Warp &w, const Inst &in, Mask m) {
  const int modifiers = kPlain ? 0 : in.a, mode = kPlain ? kNearest : in.b;
  uint32_t to[32];
  Parts poison{};
  for (int i = 0; i < kCount; ++i) {
    const uint32_t *from = w.at<uint32_t>(in.r[1 + i]);
    for (int l = 0; l < 32; ++l) {
      const double x = flush<float>(from_lane<float>(from[l]), modifiers & kFtz);
      const uint32_t r = result<T>(x, modifiers & ~kFtz, mode).bits;
      to[l] = i ? to[l] << 16 | r : r;
    }
    poison[(size_t)(kCount - 1 - i)] = w.unit_poison[in.r[1 + i]];
  }
  store_lanes(w, in.r[0], to, m, poison);
}

template <class T>
bool loses(Type from) {  // whether T may not have a value of type `from`
  if (from == Type::kF64 || from == Type::kF32) return (int)sizeof(T) < type_bytes(from);
  return sizeof(T) == 2 && (from == Type::kF16) != std::is_same_v<T, F16>;
}

bool decode_cvt(Decoder &d, const Statement &s, Inst &in) {
  Form f(s);
  in.klass = Class::kConvert;
  in.a = take_modifiers(f);
  static const char *const modes[] = {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"};
  const auto *const mode = std::find_if(modes, modes + 8, [&](const char *name) { return f.take(name); });
  const bool rounds = mode != modes + 8;
  in.b = rounds ? (int)(mode - modes) % 4 : kNearest;
  in.a |= rounds && mode - modes >= 4 ? kIntegral : 0;
  if (f.types.size() != 2 || !f.rest.empty()) return false;
  const Operand &to = s.operands[0], &from = s.operands[1];
  in.type = f.types[0];
  in.type2 = f.types[1];
  const bool packed = in.type == Type::kF16x2 || in.type == Type::kBF16x2;
  if (packed || (type_bytes(in.type) == 2 && is_real(in.type) && in.type2 == Type::kF32)) {
    if (s.operands.size() != (packed ? 3 : 2) || in.type2 != Type::kF32 || !rounds || in.a & kIntegral || !fits(d, to, in.type))
      return false;
    const bool plain = !in.a && in.b == kNearest;
    const auto choose = [&](auto tag) -> Exec {
      using T = typename decltype(tag)::type;
      if (packed) return plain ? cvt_single<T, 2, true> : cvt_single<T, 2, false>;
      return plain ? cvt_single<T, 1, true> : cvt_single<T, 1, false>;
    };
    in.exec = in.type == Type::kF16x2 || in.type == Type::kF16 ? choose(Tag<F16>()) : choose(Tag<BF16>());
    d.destination(to, in.type);
    for (size_t i = 1; i < s.operands.size(); ++i) {
      if (!fits(d, s.operands[i], Type::kF32)) return false;
      d.source(s.operands[i], Type::kF32);
    }
    return true;
  }

  if (s.operands.size() != 2 || in.a & kRelu) return false;
  const auto holds = [&](const Operand &o, Type t) {  // a register may be wider than an integer
    const int bytes = o.kind != Operand::kRegister ? 8 : d.wide(o) ? 8 : d.narrow(o) ? 2 : 4;
    return is_integer(t) ? bytes >= type_bytes(t) : is_real(t) && fits(d, o, t);
  };
  if (!holds(to, in.type) || !holds(from, in.type2)) return false;
  in.c = (from.kind == Operand::kRegister ? d.wide(from) : type_bytes(in.type2) == 8) ? kWideFrom : 0;
  in.c |= d.wide(to) ? kWideTo : d.narrow(to) ? kNarrowTo : 0;
  if (is_integer(in.type) && is_integer(in.type2)) {
    if (rounds || in.a & ~kSat) return false;
    in.exec = cvt_integers;
  } else if (is_integer(in.type)) {
    if (!(in.a & kIntegral)) return false;
    in.exec = cvt_to_integer;
  } else {
    bool inexact = is_integer(in.type2);
    if (!inexact) Real::with(in.type, [&](auto tag) { inexact = loses<typename decltype(tag)::type>(in.type2); });
    const bool plain = rounds && !(in.a & kIntegral);
    if (inexact != plain || (in.a & kIntegral && in.type != in.type2)) return false;
    if (in.type == Type::kF64 && type_bytes(in.type2) == 8 && is_integer(in.type2) && in.b) return false;  // not exact before
    in.exec = cvt_to_real;
  }
  d.destination(to, d.wide(to) ? Type::kB64 : d.narrow(to) ? Type::kB16 : Type::kB32);
  d.source(from, d.wide(from) ? Type::kB64 : in.type2);
  return true;
}

// ------------------------------------------------------------------------------------------------------------------ mov

template <class T>
void move(Warp &w, const Inst &in, Mask m) { store_lanes(w, in.r[0], w.at<T>(in.r[1]), m, w.parts_poison(in.r[1])); }

void move_predicate(Warp &w, const Inst &in, Mask m) { write_predicate(w, in.r[0], read_predicate(w, in, 1), m); }

// d = {a, b} and {a, b, c, d}: the first element is the lowest. in.b: elements, in.a: bits of one.
template <class T>
void pack(Warp &w, const Inst &in, Mask m) {
  T to[32] = {};
  Parts poison{};
  for (int i = 0; i < in.b; ++i) {
    const uint32_t *from = w.at<uint32_t>(in.r[1 + i]), kept = ~0u >> (32 - in.a);
    for (int l = 0; l < 32; ++l) to[l] |= (T)(from[l] & kept) << i * in.a;
    for (int part = 0; part < in.a / 16; ++part) poison[(size_t)(i * in.a / 16 + part)] = w.part_poison(in.r[1 + i], part);
  }
  store_lanes(w, in.r[0], to, m, poison);
}

template <class T>
void unpack(Warp &w, const Inst &in, Mask m) {
  T from[32];
  memcpy(from, w.at<T>(in.r[in.b]), sizeof(from));
  const Parts poison = w.parts_poison(in.r[in.b]);
  for (int i = 0; i < in.b; ++i) {
    uint32_t to[32];
    for (int l = 0; l < 32; ++l) to[l] = (uint32_t)(from[l] >> i * in.a) & ~0u >> (32 - in.a);
    const size_t first = (size_t)(i * in.a / 16), last = first + (size_t)in.a / 16 - 1;
    store_lanes(w, in.r[i], to, m, {poison[first], poison[last]});
  }
}

bool decode_mov(Decoder &d, const Statement &s, Inst &in) {
  const Form f(s);
  const Type t = f.type();
  in.klass = Class::kMove;
  if (t == Type::kNone || !f.rest.empty() || s.operands.size() != 2) return false;
  const Operand &to = s.operands[0], &from = s.operands[1];
  const bool unpacks = to.kind == Operand::kVector, packs = from.kind == Operand::kVector;
  if (t == Type::kPred) {
    if (unpacks || packs) return false;
    in.exec = move_predicate;
    d.destination(to, Type::kPred);
    predicate_source(d, from, in, 1);
    return true;
  }
  const bool wide = type_bytes(t) == 8;
  Type to_type = t, from_type = t;
  if (unpacks || packs) {
    in.b = (int)(unpacks ? to : from).elements.size();
    if ((unpacks && packs) || in.b < 2 || to.pair) return false;
    in.a = 8 * type_bytes(t) / in.b;
    if (in.a * in.b != 8 * type_bytes(t) || (in.a != 16 && in.a != 32 && !(in.a == 8 && in.b == 2 && packs))) return false;
    const Type element = in.a == 8 ? Type::kB8 : in.a == 16 ? Type::kB16 : Type::kB32;
    (unpacks ? to_type : from_type) = element;
    for (const Operand &e : (unpacks ? to : from).elements)
      if (!fits(d, e, element)) return false;
    in.exec = unpacks ? (wide ? unpack<uint64_t> : unpack<uint32_t>) : (wide ? pack<uint64_t> : pack<uint32_t>);
  } else {
    in.exec = wide ? move<uint64_t> : type_bytes(t) >= 2 ? move<uint32_t> : nullptr;
  }
  if (!in.exec || (!unpacks && !fits(d, to, t)) || (!packs && !fits(d, from, t))) return false;
  d.destination(to, to_type);
  d.source(from, from_type);
  return true;
}

}  // namespace

bool decode_convert(Decoder &d, const Statement &s, Inst &in) {
  if (s.operands.size() < 2) return false;
  return s.parts[0] == "cvt" ? decode_cvt(d, s, in) : s.parts[0] == "mov" && decode_mov(d, s, in);
}

}  // namespace vgpu
