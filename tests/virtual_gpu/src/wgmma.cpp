// wgmma (PTX ISA 9.7.15: fragments 9.7.15.5.1.1, shared memory layouts and descriptors 9.7.15.5.1.2, mma_async 9.7.15.5.2, fence,
// commit_group and wait_group 9.7.15.7). A product runs when the first of its four warps waits for it, all having
// issued it (or before, if completion is random); until its own wait, no warp may touch its accumulators.
#include <algorithm>
#include <cstring>

#include "decode.h"
#include "machine.h"
#include "numbers.h"

namespace vgpu {
namespace {

constexpr int kK = 16;

struct Descriptor {
  uint32_t start, leading, stride;
  int base_offset, swizzle;  // swizzle: 0 none, 1, 2, 3 for 32, 64, 128 bytes

  explicit Descriptor(uint64_t d)
      : start((uint32_t)(d & 0x3fff) << 4), leading((uint32_t)(d >> 16 & 0x3fff) << 4), stride((uint32_t)(d >> 32 & 0x3fff) << 4),
        base_offset((int)(d >> 49 & 7)), swizzle((int)(d >> 62) == 0 ? 0 : 4 - (int)(d >> 62)) {}

  // Shared address of the 16-byte unit that holds element (major, k), which is the first of its unit.
  uint32_t unit(int major, int k, bool k_major) const {
    const uint32_t width = 16u << swizzle;  // bytes of a row of the swizzle's atom
    uint32_t at;
    if (k_major)
      at = swizzle ? (uint32_t)(major / 8) * stride + (uint32_t)(major % 8) * width + (uint32_t)k * 2
                   : (uint32_t)(major / 8) * stride + (uint32_t)(k / 8) * leading + (uint32_t)(major % 8) * 16;
    else
      at = swizzle ? (uint32_t)major * 2 / width * leading + (uint32_t)(k / 8) * stride + (uint32_t)(k % 8) * width + (uint32_t)major * 2 % width
                   : (uint32_t)(major / 8) * stride + (uint32_t)(k / 8) * leading + (uint32_t)(k % 8) * 16;
    at += start;
    return at ^ (at >> 7 & ((1u << swizzle) - 1)) << 4;
  }
};

// in.a: N; in.b: bit 0 A in registers, 1 trans A, 2 trans B, 3 negate A, 4 negate B; in.type, in.type2 as in mma.
// in.c: slots of d. r: d, a (descriptor or four), b, [scale-d]; in.vector: 1 if scale-d is a predicate, else in.offset its value.
struct Shape {
  int n, outputs;
  bool a_registers, trans_a, trans_b, negative;
  explicit Shape(const Inst &in)
      : n(in.a), outputs(in.c), a_registers(in.b & 1), trans_a(in.b & 2), trans_b(in.b & 4), negative((in.b >> 3 & 1) != (in.b >> 4 & 1)) {}
};

float to_float(Type type, uint16_t x) { return half_to_float(type == Type::kBF16, x); }

// Reads rows [begin, end) of an operand as floats: [row - begin][k]; bit r of poison: row r has an undefined value.
void read_tile(Cta &cta, const Descriptor &d, Type type, bool k_major, int begin, int end, std::vector<float> &out, std::vector<bool> &poison) {
  out.assign((size_t)(end - begin) * kK, 0.0f);
  poison.assign((size_t)(end - begin), false);
  const auto take = [&](int row, int k, bool along_k) {
    const uint32_t offset = d.unit(row, k, k_major) - kSharedBase;
    if ((uint64_t)offset + 16 > cta.shared.data.size()) return;
    for (int e = 0; e < 8; ++e) {
      uint16_t x;
      memcpy(&x, &cta.shared.data[offset + (uint32_t)e * 2], 2);
      const int r = along_k ? row : row + e, c = along_k ? k + e : k;
      out[(size_t)(r - begin) * kK + (size_t)c] = to_float(type, x);
      if (!cta.shared.shadow.valid(&cta.shared.cells[(offset + (uint32_t)e * 2) / 4], offset + (uint32_t)e * 2, 2))
        poison[(size_t)(r - begin)] = true;
    }
  };
  if (k_major)
    for (int row = begin; row < end; ++row)
      for (int k = 0; k < kK; k += 8) take(row, k, true);
  else
    for (int row = begin; row < end; row += 8)
      for (int k = 0; k < kK; ++k) take(row, k, false);
}

// One warp's 16 rows of a product, into its registers.
void multiply(Warp &w, const WgmmaOp &op, const std::vector<float> &b, const std::vector<bool> &b_poison) {
  const Inst &in = *op.inst;
  const Shape shape(in);
  std::vector<float> a;
  std::vector<bool> a_poison;
  const int first = w.index % 4 * 16;
  if (shape.a_registers) {
    a.resize(16 * kK);
    a_poison.assign(16, false);
    for (int word = 0; word < 4; ++word) {
      const Slot slot = in.r[shape.outputs + word];
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t x = w.at<uint32_t>(slot)[lane];
        const size_t row = (size_t)(lane / 4 + (word & 1) * 8), k = (size_t)(lane % 4 * 2 + (word >> 1) * 8);
        a[row * kK + k] = to_float(in.type, (uint16_t)x);
        a[row * kK + k + 1] = to_float(in.type, (uint16_t)(x >> 16));
        if (w.unit_poison[slot] >> lane & 1) a_poison[row] = true;
      }
    }
  } else {
    read_tile(*w.cta, Descriptor(op.a_descriptor), in.type, !shape.trans_a, first, first + 16, a, a_poison);
  }
  std::vector<float> sum((size_t)(16 * shape.n), 0.0f), column((size_t)shape.n * kK);
  for (int n = 0; n < shape.n; ++n)
    for (int k = 0; k < kK; ++k) column[(size_t)(k * shape.n + n)] = b[(size_t)(n * kK + k)];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kK; ++k) {
      const float x = shape.negative ? -a[(size_t)(row * kK + k)] : a[(size_t)(row * kK + k)];
      const float *y = &column[(size_t)(k * shape.n)];
      float *to = &sum[(size_t)(row * shape.n)];
      for (int n = 0; n < shape.n; ++n) to[n] += x * y[n];
    }
  const bool wide = in.type2 == Type::kF32;
  for (int block = 0; block < shape.n / 8; ++block)
    for (int half = 0; half < 2; ++half)
      for (int part = 0; part < (wide ? 2 : 1); ++part) {
        const Slot slot = in.r[wide ? block * 4 + half * 2 + part : block * 2 + half];
        uint32_t *value = w.at<uint32_t>(slot);
        Mask poison = op.scale_d ? w.unit_poison[slot] : 0;
        for (int lane = 0; lane < 32; ++lane) {
          const int row = lane / 4 + half * 8, n = block * 8 + lane % 4 * 2 + part;
          const float *s = &sum[(size_t)(row * shape.n + n)];
          bool undefined = a_poison[(size_t)row] || b_poison[(size_t)n];
          if (wide) {
            float x = 0;
            if (op.scale_d) memcpy(&x, &value[lane], 4);
            x += s[0];
            memcpy(&value[lane], &x, 4);
          } else {
            undefined |= b_poison[(size_t)n + 1];
            const uint32_t old = op.scale_d ? value[lane] : 0;
            value[lane] = f16_bits((double)half_to_float(false, (uint16_t)old) + s[0]) |
                          (uint32_t)f16_bits((double)half_to_float(false, (uint16_t)(old >> 16)) + s[1]) << 16;
          }
          poison |= (Mask)undefined << lane;
        }
        w.set_poison(slot, kAllLanes, poison);
      }
  w.launch().counters.matrix_flops += 2ull * 16 * (uint64_t)shape.n * kK;
}

WarpGroup &group_of(Warp &w) { return *w.cta->groups[(size_t)w.index / 4]; }

// The whole warp, here and now; false if some lanes are not here yet.
bool whole(Warp &w, Fragment &f, const Inst &in, std::vector<Fragment *> &all, Flow *flow) {
  *flow = Flow::kWait;
  if (w.exited || (size_t)w.index / 4 >= w.cta->groups.size()) {
    w.launch().report("divergent-collective", &w, __builtin_ctz(f.mask), &in, "needs all 128 threads of a warpgroup");
    w.launch().stop = true;
    *flow = Flow::kJumped;
    return false;
  }
  return gather(w, f, kAllLanes, 0x50000000u + f.pc, all);
}

void go_on(Warp &w, Fragment &f, const std::vector<Fragment *> &all) {
  for (Fragment *part : all)
    if (part != &f) jump(w, *part, part->pc + 1);
}

Flow mma_async(Warp &w, Fragment &f, const Inst &in) {
  std::vector<Fragment *> all;
  Flow flow;
  if (!whole(w, f, in, all, &flow)) return flow;
  Launch &launch = w.launch();
  WarpMatrix &m = w.matrix;
  const Shape shape(in);
  const Slot *a = in.r + shape.outputs, *b = a + (shape.a_registers ? 4 : 1);
  const int lane = (int)(m.issued * 7 % 32);  // whose clock is checked: all lanes must have waited for the operands
  const auto say = [&](const char *kind, const std::string &text) { launch.report(kind, &w, lane, &in, text); };
  const auto same = [&](Slot slot, uint64_t wide) { return std::count(w.at<uint64_t>(slot), w.at<uint64_t>(slot) + 32, wide) == 32; };
  WgmmaOp op;
  op.inst = &in;
  op.number = m.issued++;
  op.group = m.committed;
  op.b_descriptor = w.at<uint64_t>(b[0])[lane];
  if (!shape.a_registers) op.a_descriptor = w.at<uint64_t>(a[0])[lane];
  Mask undefined = w.unit_poison[b[0]] | (shape.a_registers ? 0 : w.unit_poison[a[0]]);
  op.scale_d = in.offset != 0;
  if (in.vector) {
    const Slot p = b[1] & ~kNegated;
    undefined |= w.predicate_poison[p];
    const Mask v = b[1] & kNegated ? ~w.predicates[p] : w.predicates[p];
    op.scale_d = v & 1;
    if (v != 0 && v != kAllLanes) say("descriptor", "scale-d differs between the lanes of a warp");
  }
  if (check_poison(w, in, undefined, "a descriptor or scale of wgmma")) return launch.stop = true, Flow::kJumped;
  if (!same(b[0], op.b_descriptor) || (!shape.a_registers && !same(a[0], op.a_descriptor)))
    say("descriptor", "the descriptor differs between the lanes of a warp");
  WarpGroup &group = group_of(w);
  for (const Warp *other : group.warps)
    for (const WgmmaOp &theirs : other->matrix.pending)
      if (theirs.number == op.number && (theirs.inst->statement != in.statement || theirs.a_descriptor != op.a_descriptor ||
                                         theirs.b_descriptor != op.b_descriptor || theirs.scale_d != op.scale_d))
        say("divergent-collective", "the warps of a warpgroup issue different products");

  // Registers: wgmma.fence stands before the first product and between other accesses to its registers and a product; only
  // accumulators in flight may go on as the same accumulators (9.7.15.7.1).
  if (m.fences == 0) say("wgmma", "no wgmma.fence before the first product of the warp");
  for (int i = 0; i < shape.outputs; ++i) {
    const Slot slot = in.r[i];
    if (m.accumulates[slot]) {
      bool chain = false;
      for (const WgmmaOp &before : m.pending) chain |= before.inst->a == in.a && before.inst->c == in.c && before.inst->r[i] == slot;
      if (!chain) say("wgmma", "an accumulator is still in flight with another shape");
    } else if (m.accessed[slot] == m.fences + 1) {
      say("wgmma", "an accumulator was accessed by another instruction after the last wgmma.fence");
    }
    ++m.accumulates[slot];
  }
  for (int i = 0; shape.a_registers && i < 4; ++i) {
    if (m.accumulates[a[i]]) say("wgmma", "an A register is an accumulator in flight");
    else if (m.accessed[a[i]] == m.fences + 1) say("wgmma", "an A register was accessed after the last wgmma.fence");
    ++m.reads[a[i]];
  }

  // Shared memory: this warp's rows of A, and its share of B.
  Actor who = actor(w, lane, in);
  who.flags = kAsyncProxy;
  SharedMemory &shared = w.cta->shared;
  const auto read = [&](const Descriptor &d, bool k_major, int begin, int end, const char *name) {
    if (d.base_offset) {
      launch.report("uncovered", &w, lane, &in, "a descriptor with a base offset");
      launch.stop = true;
      return;
    }
    if (d.start >> 7 & ((1u << d.swizzle) - 1)) {  // 9.7.15.5.1.2.2: such a pattern needs a base offset
      say("descriptor", std::string("the descriptor of ") + name + " starts at shared byte " + launch.shared_byte(d.start) +
                            ", inside of the " + std::to_string(128 << d.swizzle) + " bytes after which its swizzle repeats");
      return;
    }
    for (int row = begin; row < end; row += k_major ? 1 : 8)
      for (int k = 0; k < kK; k += k_major ? 8 : 1) {
        const uint32_t offset = d.unit(row, k, k_major) - kSharedBase;
        if (!launch.in_shared(offset + kSharedBase, 16)) {
          say("out-of-range", std::string("the descriptor of ") + name + " reaches 16 bytes of shared memory" +
                                  launch.beside_shared(offset + kSharedBase, 16));
          return;
        }
        const Cell *cells = &shared.cells[offset / 4];
        const uint8_t tag = shared.swizzle[offset / 16];
        if (tag && cells->write.flags & kAsyncProxy && !cells->writes_in_flight && tag - 1 != d.swizzle) {
          say("descriptor", std::string("the descriptor of ") + name + " says a swizzle of " + std::to_string(d.swizzle ? 16 << d.swizzle : 0) +
                                " bytes, the tensor copy that wrote it one of " + std::to_string(tag > 1 ? 16 << (tag - 1) : 0));
          return;
        }
        Piece p;
        p.shared = offset;
        p.bytes = 16;
        shared.shadow.probe(&shared.cells[offset / 4], offset, 16, false, who);
        shared.shadow.in_flight(&shared.cells[offset / 4], offset, 16, false, 1);
        op.reads.push_back(p);
      }
  };
  const int quarter = w.index % 4;
  if (!shape.a_registers) read(Descriptor(op.a_descriptor), !shape.trans_a, quarter * 16, quarter * 16 + 16, "A");
  const int rows = shape.n / 8, first = rows * quarter / 4 * 8, last = rows * (quarter + 1) / 4 * 8;
  read(Descriptor(op.b_descriptor), !shape.trans_b, first, last, "B");
  m.pending.push_back(op);
  ++launch.changes;
  go_on(w, f, all);
  return Flow::kNext;
}

// in.a: 0 fence, 1 commit_group, 2 wait_group; in.c: groups that may stay open
Flow group_control(Warp &w, Fragment &f, const Inst &in) {
  std::vector<Fragment *> all;
  Flow flow;
  if (!whole(w, f, in, all, &flow)) return flow;
  WarpMatrix &m = w.matrix;
  if (in.a == 0) ++m.fences;
  if (in.a == 1) ++m.committed;
  if (in.a == 2) {
    WarpGroup &group = group_of(w);
    uint64_t end = 0;  // products before this number must be complete
    for (const WgmmaOp &op : m.pending)
      if (op.group + (uint64_t)in.c < m.committed) end = op.number + 1;
    for (const Warp *other : group.warps)
      if (other->matrix.issued < end) {  // the product is not whole yet: look again when something has changed
        for (Fragment *part : all) {
          part->state = Fragment::kPolling;
          part->seen = w.launch().changes;
        }
        return Flow::kJumped;
      }
    while (group.completed < end) run_product(group);
    if (end) {
      KnowledgeBuilder done;
      done.clock().set(w.cta->index, w.cta->components(), (uint32_t)(w.cta->warps.size() * 32 + kAgents + (size_t)w.index / 4), (uint32_t)end);
      acquire(w, kAllLanes, done.freeze());
    }
    while (!m.pending.empty() && m.pending.front().number < end) {
      const WgmmaOp &op = m.pending.front();
      const Shape shape(*op.inst);
      for (int i = 0; i < shape.outputs; ++i) --m.accumulates[op.inst->r[i]];
      for (int i = 0; shape.a_registers && i < 4; ++i) --m.reads[op.inst->r[shape.outputs + i]];
      m.pending.pop_front();
    }
  }
  ++w.launch().changes;
  go_on(w, f, all);
  return Flow::kNext;
}

}  // namespace

void run_product(WarpGroup &group) {
  const uint64_t number = group.completed++;
  std::vector<float> b;
  std::vector<bool> b_poison;
  bool read = false;
  for (Warp *w : group.warps)
    for (WgmmaOp &op : w->matrix.pending) {
      if (op.number != number) continue;
      const Shape shape(*op.inst);
      if (!read) read_tile(*w->cta, Descriptor(op.b_descriptor), op.inst->type, !shape.trans_b, 0, shape.n, b, b_poison);
      read = true;
      multiply(*w, op, b, b_poison);
      // Its reads are the warpgroup's: whoever has waited for it knows of all of them.
      const Actor reader = {&w->launch(), w, op.inst, nullptr, nullptr, w->cta->index, (uint32_t)number + 1, 1u << w->index / 4,
                            (uint8_t)(w->cta->warps.size() + kAgents / 32)};
      Shadow &shadow = w->cta->shared.shadow;
      for (const Piece &p : op.reads) {
        shadow.in_flight(&w->cta->shared.cells[p.shared / 4], p.shared, p.bytes, false, -1);
        shadow.record(&w->cta->shared.cells[p.shared / 4], p.shared, p.bytes, false, reader);
      }
      op.reads.clear();
    }
  ++group.warps[0]->launch().changes;
}

void wgmma_check(Warp &w, const Inst &in) {
  WarpMatrix &m = w.matrix;
  const size_t i = (size_t)(&in - w.launch().program->code.data());
  const auto say = [&](const char *what) {
    for (const WgmmaOp &op : m.pending) {
      w.launch().report("wgmma", &w, 0, &in,
                        std::string(what) + " the wgmma at " + w.launch().program->where(*op.inst) + ", which was not waited for");
      return;
    }
  };
  for (const Slot slot : w.launch().program->used[i]) {
    if (m.accumulates[slot]) say("reads an accumulator of");
    m.accessed[slot] = m.fences + 1;
  }
  for (const Slot slot : w.launch().program->defined[i]) {
    if (m.accumulates[slot]) say("writes an accumulator of");
    if (m.reads[slot]) say("writes an A register of");
    m.accessed[slot] = m.fences + 1;
  }
}

bool decode_wgmma(Decoder &d, const Statement &s, Inst &in) {
  if (s.parts[0] != "wgmma") return false;
  in.klass = Class::kMatrix;
  if (s.has("fence") || s.has("commit_group") || s.has("wait_group")) {
    in.a = s.has("fence") ? 0 : s.has("commit_group") ? 1 : 2;
    in.klass = Class::kControl;
    if (in.a == 2) in.c = (int)s.operands[0].immediate;
    in.control = group_control;
    return true;
  }
  // wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 d, a, b, scale-d, scale-a, scale-b, [trans-a,] trans-b
  const int n = atoi(s.parts[4].c_str() + strlen("m64n"));
  if (n % 8 || n < 8 || n > 256) return false;
  in.type2 = parse_type(s.parts[5]);
  in.type = parse_type(s.parts[6]);
  if (in.type2 == Type::kF16 && in.type != Type::kF16) return false;
  in.a = n;
  in.c = in.type2 == Type::kF32 ? n / 2 : n / 4;
  const bool registers = s.operands[1].kind == Operand::kVector;
  if (s.operands[0].elements.size() != (size_t)in.c) return false;
  in.b = registers | (registers ? 0 : s.operands[6].immediate != 0 ? 2 : 0) | (s.operands.back().immediate != 0 ? 4 : 0) |
         (s.operands[4].immediate < 0 ? 8 : 0) | (s.operands[5].immediate < 0 ? 16 : 0);
  d.destination(s.operands[0]);
  d.source(s.operands[1], registers ? Type::kB32 : Type::kB64);
  d.source(s.operands[2], Type::kB64);
  in.vector = s.operands[3].kind == Operand::kRegister;
  in.offset = s.operands[3].immediate;
  if (in.vector) d.predicate(s.operands[3]);
  in.control = mma_async;
  return true;
}

}  // namespace vgpu
