// mma.sync, ldmatrix, stmatrix, movmatrix (PTX ISA 9.7.14.5: fragments of m16n8k8 and m16n8k16 for 16-bit types; 9.7.14.5.15
// ldmatrix; 9.7.14.5.16 stmatrix; 9.7.14.5.17 movmatrix). Products are exact in f32 or nearly so; they are summed in f32 in the
// order of k, which is not the order of the hardware: compare with a tolerance.
#include <cstring>

#include "decode.h"
#include "machine.h"
#include "numbers.h"

namespace vgpu {

namespace {

// The whole warp, at this very instruction. False: the fragment waits (or the launch stops).
bool whole_warp(Warp &w, Fragment &f, const Inst &in, std::vector<Fragment *> &all, Flow *flow) {
  if (w.exited) {
    w.launch().report("divergent-collective", &w, __builtin_ctz(f.mask), &in, "needs all 32 lanes of the warp, some have exited");
    w.launch().stop = true;
    *flow = Flow::kJumped;
    return false;
  }
  *flow = Flow::kWait;
  return gather(w, f, kAllLanes, 0x40000000u + f.pc, all);
}

// Runs `body` for the whole warp and moves its fragments on.
template <class Body>
Flow aligned(Warp &w, Fragment &f, const Inst &in, const Body &body) {
  std::vector<Fragment *> all;
  Flow flow;
  if (!whole_warp(w, f, in, all, &flow)) return flow;
  body();
  for (Fragment *part : all)
    if (part != &f) jump(w, *part, part->pc + 1);
  return Flow::kNext;
}

// in.type: kF16 or kBF16 of a and b; in.type2: kF32 or kF16 of c and d; in.a: k (8 or 16). r: d, a, b, c.
Flow mma(Warp &w, Fragment &f, const Inst &in) {
  return aligned(w, f, in, [&] {
    const int k_size = in.a, words = k_size / 8, outputs = in.type2 == Type::kF32 ? 4 : 2;
    const Slot *d = in.r, *a = d + outputs, *b = a + 2 * words, *c = b + words;
    const auto to_float = [&](uint16_t x) { return half_to_float(in.type == Type::kBF16, x); };
    float av[16][16], bv[16][8], sum[16][8];
    uint32_t row_poison = 0, column_poison = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, in_group = lane % 4;
      for (int word = 0; word < 2 * words; ++word) {
        const uint32_t x = w.at<uint32_t>(a[word])[lane];
        const int row = group + (word & 1) * 8, k = in_group * 2 + (word >> 1) * 8;
        av[row][k] = to_float((uint16_t)x);
        av[row][k + 1] = to_float((uint16_t)(x >> 16));
        row_poison |= (w.unit_poison[a[word]] >> lane & 1) << row;
      }
      for (int word = 0; word < words; ++word) {
        const uint32_t x = w.at<uint32_t>(b[word])[lane];
        const int k = in_group * 2 + word * 8;
        bv[k][group] = to_float((uint16_t)x);
        bv[k + 1][group] = to_float((uint16_t)(x >> 16));
        column_poison |= (w.unit_poison[b[word]] >> lane & 1) << group;
      }
    }
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) sum[i][j] = 0;
      for (int k = 0; k < k_size; ++k)
        for (int j = 0; j < 8; ++j) sum[i][j] += av[i][k] * bv[k][j];
    }
    for (int half = 0; half < 2; ++half)
      for (int part = 0; part < 2; ++part) {  // f32: one slot each; f16: both parts in one
        const int index = outputs == 4 ? half * 2 + part : half;
        if (outputs == 2 && part) continue;
        uint32_t value[32];
        Mask poison = w.unit_poison[c[index]];
        for (int lane = 0; lane < 32; ++lane) {
          const int row = lane / 4 + half * 8, column = lane % 4 * 2 + part;
          const uint32_t old = w.at<uint32_t>(c[index])[lane];
          if (outputs == 4) {
            float x;
            memcpy(&x, &old, 4);
            x += sum[row][column];
            memcpy(&value[lane], &x, 4);
            poison |= ((row_poison >> row | column_poison >> column) & 1) << lane;
          } else {
            value[lane] = f16_bits((double)half_to_float(false, (uint16_t)old) + sum[row][column]) |
                          (uint32_t)f16_bits((double)half_to_float(false, (uint16_t)(old >> 16)) + sum[row][column + 1]) << 16;
            poison |= ((row_poison >> row | column_poison >> column | column_poison >> (column + 1)) & 1) << lane;
          }
        }
        store_lanes(w, d[index], value, kAllLanes, poison);
      }
    w.launch().counters.matrix_flops += 2ull * 16 * 8 * (uint64_t)k_size;
  });
}

// ldmatrix, stmatrix: in.a: matrices (1, 2, 4); in.b: trans; in.c: store. r: load: d of each, base; store: base, value of each.
// Lane 8 i + j gives the address of row j of matrix i. Lane t holds elements 2 (t % 4) and the next of row t / 4.
Flow matrix_access(Warp &w, Fragment &f, const Inst &in) {
  return aligned(w, f, in, [&] {
    const Slot base = in.r[in.c ? 0 : in.a];
    const Mask rows = in.a == 4 ? kAllLanes : (1u << in.a * 8) - 1;
    if (check_poison(w, in, w.unit_poison[base] & rows, "an address")) return;
    uint64_t address[32];
    for (int l = 0; l < 32; ++l) {
      address[l] = w.address(base, l, in.d) + (uint64_t)in.offset;
      if (address[l] >> 56) address[l] &= ~kSharedWindow;
    }
    for (int i = 0; i < in.a; ++i) {
      uint32_t value[32] = {};
      Parts poison{};
      const Slot slot = in.c ? in.r[1 + i] : in.r[i];
      for (int row = 0; row < 8; ++row) {
        const int provider = i * 8 + row;
        const Span span = resolve(w, provider, in, Space::kShared, address[provider], 16, 16, in.c);
        if (!span.data) {
          poison = {kAllLanes, kAllLanes};
          continue;
        }
        for (int e = 0; e < 8; ++e) {
          const int lane = in.b ? e * 4 + row / 2 : row * 4 + e / 2, part = in.b ? row % 2 : e % 2;
          const uint64_t at = span.at + (uint64_t)e * 2;
          Cell *cell = span.cells + e / 2;
          if (in.c) {
            span.shadow->touch(cell, at, 2, true, actor(w, lane, in));
            const uint16_t x = (uint16_t)(w.at<uint32_t>(slot)[lane] >> (16 * part));
            memcpy(span.data + e * 2, &x, 2);
            if (w.part_poison(slot, part) >> lane & 1) span.shadow->set_valid(cell, at, 2, false);
          } else {
            if (in.b || !(e & 1)) span.shadow->touch(cell, at, in.b ? 2 : 4, false, actor(w, lane, in));
            uint16_t x;
            memcpy(&x, span.data + e * 2, 2);
            value[lane] |= (uint32_t)x << (16 * part);
            if (!span.shadow->valid(cell, at, 2)) poison[(size_t)part] |= 1u << lane;
          }
        }
      }
      if (!in.c) store_lanes(w, slot, value, kAllLanes, poison);
    }
    count_shared(w, in, address, rows, 16);
  });
}

// movmatrix.trans: r: d, a
Flow movmatrix(Warp &w, Fragment &f, const Inst &in) {
  return aligned(w, f, in, [&] {
    uint16_t m[8][8];
    uint32_t value[32];
    Mask from = w.unit_poison[in.r[1]], poison = 0;
    for (int l = 0; l < 32; ++l)
      for (int part = 0; part < 2; ++part) m[l / 4][l % 4 * 2 + part] = (uint16_t)(w.at<uint32_t>(in.r[1])[l] >> (16 * part));
    for (int l = 0; l < 32; ++l) {
      const int column = l / 4, row = l % 4 * 2;
      value[l] = m[row][column] | (uint32_t)m[row + 1][column] << 16;
      poison |= ((from >> (row * 4 + column / 2) | from >> ((row + 1) * 4 + column / 2)) & 1) << l;
    }
    store_lanes(w, in.r[0], value, kAllLanes, poison);
  });
}

}  // namespace

bool decode_matrix(Decoder &d, const Statement &s, Inst &in) {
  const std::string &op = s.parts[0];
  in.klass = Class::kMatrix;
  if (op == "mma") {
    in.a = s.has("m16n8k16") ? 16 : 8;
    in.type = parse_type(s.parts[7]);
    in.type2 = parse_type(s.parts[6]);
    d.destination(s.operands[0]);
    for (size_t i = 1; i < 4; ++i) d.source(s.operands[i], Type::kB32);
    in.control = mma;
    return true;
  }
  if (op == "ldmatrix" || op == "stmatrix") {
    in.c = op == "stmatrix";
    in.a = s.has("x4") ? 4 : s.has("x2") ? 2 : 1;
    in.b = s.has("trans");
    in.klass = in.c ? Class::kStoreShared : Class::kLoadShared;
    if (in.c) {
      d.address(s.operands[0], in);
      d.source(s.operands[1], Type::kB32);
    } else {
      d.destination(s.operands[0]);
      d.address(s.operands[1], in);
    }
    in.control = matrix_access;
    return true;
  }
  if (op == "movmatrix") {
    d.destination(s.operands[0]);
    d.source(s.operands[1], Type::kB32);
    in.control = movmatrix;
    return true;
  }
  return false;
}

}  // namespace vgpu
