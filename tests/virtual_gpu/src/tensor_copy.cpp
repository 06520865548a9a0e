// cp.async.bulk, cp.async.bulk.tensor and their groups (PTX ISA 9.7.9.25.4 to 9.7.9.25.6; tile mode and swizzles: 5.5 "Tensors").
#include <algorithm>
#include <cstring>

#include "decode.h"
#include "machine.h"
#include "tensor_map.h"

namespace vgpu {

uint32_t checksum(const TensorMap &map) {
  TensorMap copy = map;
  copy.checksum = 0;
  uint32_t sum = 2166136261u;  // FNV-1a
  for (size_t i = 0; i < sizeof copy; ++i) sum = (sum ^ ((const uint8_t *)&copy)[i]) * 16777619u;
  return sum;
}

int encode_tiled(void *out, int type, uint32_t rank, void *address, const uint64_t *dim, const uint64_t *strides, const uint32_t *box,
                 const uint32_t *element_strides, int interleave, int swizzle, int l2, int fill) {
  constexpr int kInvalid = 1;  // CUDA_ERROR_INVALID_VALUE
  static const uint8_t bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // CUtensorMapDataType
  if (!out || (uint64_t)out % 64 || type < 0 || type > 12 || rank < 1 || rank > 5 || !address || (uint64_t)address % 16) return kInvalid;
  if (interleave != 0 || swizzle < 0 || swizzle > 3 || fill != 0) return kInvalid;  // interleaved layouts and NaN fill are not covered
  if (l2 < 0 || l2 > 3) return kInvalid;
  TensorMap map;
  memset(&map, 0, sizeof map);
  map.magic = kTensorMapMagic;
  map.address = (uint64_t)address;
  map.rank = (uint8_t)rank;
  map.element_bytes = bytes_of[type];
  map.swizzle = (uint8_t)swizzle;
  map.stride[0] = map.element_bytes;
  for (uint32_t i = 0; i < rank; ++i) {
    if (dim[i] < 1 || dim[i] > 1ull << 32 || box[i] < 1 || box[i] > 256) return kInvalid;
    // The first element stride is ignored, others than 1 are not covered.
    if (element_strides[i] < 1 || element_strides[i] > 8 || (i > 0 && element_strides[i] != 1)) return kInvalid;
    // Strides in any order: the documentation's formula says how those of a dense tensor come about, maps of permuted ones are in use.
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40)) return kInvalid;
    map.dim[i] = dim[i];
    map.box[i] = (uint16_t)box[i];
    if (i + 1 < rank) map.stride[i + 1] = strides[i];
  }
  const uint32_t inner = box[0] * map.element_bytes;
  if (inner % 16 || (swizzle && inner > 16u << swizzle)) return kInvalid;
  map.checksum = checksum(map);
  memset(out, 0, 128);
  memcpy(out, &map, sizeof map);
  return 0;
}

namespace {

// 5.5 "Swizzling Modes": the 16-byte units of a row change places: address bits 4.. are xored with bits 7.. (one, two or three of them).
uint32_t swizzled(uint32_t address, int swizzle) { return address ^ (address >> 7 & ((1u << swizzle) - 1)) << 4; }

// 9.7.9.25.5.2: the tensor map lies in constant, parameter or global memory.
bool read_map(Warp &w, int lane, const Inst &in, uint64_t address, TensorMap *map) {
  if (address >> 56 << 56 == kLocalWindow) {
    w.launch().report("descriptor", &w, lane, &in, "the tensor map lies in local memory: a kernel parameter must be __grid_constant__");
    return false;
  }
  const Span span = resolve(w, lane, in, Space::kGeneric, address, 128, 64, false);
  if (!span.data) return false;
  memcpy(map, span.data, sizeof *map);
  if (map->magic == kTensorMapMagic && map->checksum == checksum(*map)) return true;
  w.launch().report("descriptor", &w, lane, &in, "these 128 bytes are not a tensor map");
  return false;
}

// Checks what the copy reads and writes, marks it in flight and queues it. False: reported, nothing happens.
bool issue(Warp &w, int lane, const Inst &in, std::unique_ptr<BulkCopy> copy, Mask targets) {
  Launch &launch = w.launch();
  Actor who = actor(w, lane, in);
  who.flags = kAsyncProxy;
  copy->inst = &in;
  copy->warp = &w;
  copy->lane = lane;
  const auto &ctas = w.cta->cluster->ctas;
  for (size_t rank = 0; rank < ctas.size(); ++rank)
    if (targets >> rank & 1) copy->targets.push_back(ctas[rank].get());
  if (copy->targets.empty() || targets >> ctas.size()) {
    launch.report("out-of-range", &w, lane, &in, "a copy to a block that is not in the cluster");
    return false;
  }
  if (!copy->store)
    for (Cta *cta : copy->targets) {
      Cta *owner;
      if (!find_mbarrier(w, lane, in, copy->mbarrier | (uint64_t)(cta->rank + 1) << kClusterShift, &owner, true)) return false;
    }
  for (Piece &p : copy->pieces) {
    for (Cta *cta : copy->targets) {
      if (!launch.in_shared(p.shared + kSharedBase, p.bytes)) {
        launch.report("out-of-range", &w, lane, &in, (copy->store ? "reads " : "writes ") + std::to_string(p.bytes) + " bytes of shared memory" +
                      launch.beside_shared(p.shared + kSharedBase, p.bytes));
        return false;
      }
      cta->shared.shadow.probe(&cta->shared.cells[p.shared / 4], p.shared, p.bytes, !copy->store, who);
    }
    bool inside = true;
    by_page(p.global, p.fill ? 0 : p.bytes, [&](uint64_t at, uint32_t n) {
      const Span g = inside ? resolve(w, lane, in, Space::kGlobal, at, n, 1, copy->store) : Span();
      inside = g.data;
      if (inside) g.shadow->probe(g.cells, at, n, copy->store, who);
    });
    if (!inside) return false;
  }
  for (const Piece &p : copy->pieces) {
    for (Cta *cta : copy->targets) {
      cta->shared.shadow.in_flight(&cta->shared.cells[p.shared / 4], p.shared, p.bytes, !copy->store, 1);
      for (uint32_t unit = p.shared / 16; !copy->store && unit * 16 < p.shared + p.bytes; ++unit) cta->shared.swizzle[unit] = copy->swizzle;
    }
    by_page(p.global, p.fill ? 0 : p.bytes,
            [&](uint64_t at, uint32_t n) { launch.global->shadow().in_flight(launch.cells(at), at, n, copy->store, 1); });
    if (!p.fill) (copy->store ? launch.counters.async_store_bytes : launch.counters.async_load_bytes) += p.bytes;
  }
  launch.queue.bulk.push_back(std::move(copy));
  ++launch.changes;
  return true;
}

struct Where {
  uint32_t offset;
  Mask target;
};

// The block and offset of a shared address.
Where shared_place(const Warp &w, uint64_t address) {
  if (address >> 56) address &= ~kSharedWindow;
  const uint32_t rank = (uint32_t)(address >> kClusterShift) & 0xff;
  return {((uint32_t)address & ((1u << kClusterShift) - 1)) - kSharedBase, 1u << (rank ? rank - 1 : w.cta->rank)};
}

bool defined(Warp &w, const Inst &in, Mask m) {
  Mask poison = 0;
  for (int i = 0; i < in.count; ++i) poison |= w.unit_poison[in.r[i]];
  return !check_poison(w, in, poison & m, "the operands of a copy");
}

// r: shared address, then global address (bulk) or tensor map and coordinates, then size (bulk), mbarrier (loads), mask.
// in.a: dimensions, 0 for bulk; in.b: store; in.c: multicast; in.vector: index of the shared address's slot is 0;
// in.type kU64: bit flags of which addresses are 64-bit are in in.d (1 shared, 2 global or map, 4 mbarrier).
// in.offset: offset of the global address or map; offsets of the others must be 0.
void bulk_copy(Warp &w, const Inst &in, Mask m) {
  if (!defined(w, in, m)) return;
  Launch &launch = w.launch();
  for (; m; m &= m - 1) {
    const int l = __builtin_ctz(m);
    std::unique_ptr<BulkCopy> copy(new BulkCopy);
    copy->store = in.b;
    const Where place = shared_place(w, w.address(in.r[0], l, in.d & 1));
    const uint64_t global = w.address(in.r[1], l, in.d & 2) + (uint64_t)in.offset;
    int next = 2;
    if (in.a == 0) {
      const uint32_t bytes = w.at<uint32_t>(in.r[next++])[l];
      // 9.7.9.25.4.1
      if (bytes % 16 || global % 16 || place.offset % 16 || bytes == 0) {
        launch.report("misaligned", &w, l, &in, "a bulk copy of " + std::to_string(bytes) + " bytes: size and both addresses are multiples of 16");
        continue;
      }
      Piece p;
      p.global = global;
      p.shared = place.offset;
      p.bytes = bytes;
      copy->pieces.push_back(p);
      copy->bytes = bytes;
    } else {
      TensorMap map;
      if (!read_map(w, l, in, global, &map)) {
        launch.stop = true;
        return;
      }
      if (map.rank != in.a || place.offset % 128) {
        launch.report(map.rank != in.a ? "descriptor" : "misaligned", &w, l, &in,
                      map.rank != in.a ? "a tensor map of " + std::to_string(map.rank) + " dimensions in a copy of " + std::to_string(in.a)
                                       : "a tensor copy at shared offset " + std::to_string(place.offset) + ", which is not a multiple of 128");
        continue;
      }
      int64_t origin[5] = {};
      uint32_t count[5] = {1, 1, 1, 1, 1};
      for (int i = 0; i < in.a; ++i) {
        origin[i] = (int32_t)w.at<uint32_t>(in.r[next++])[l];
        count[i] = map.box[i];
      }
      const uint32_t row_bytes = map.box[0] * map.element_bytes, unit = map.swizzle ? 16 : row_bytes;
      if (map.swizzle && row_bytes < 16u << map.swizzle) {  // legal, but where the next row begins is nowhere said
        launch.report("uncovered", &w, l, &in, "a box with rows of " + std::to_string(row_bytes) + " bytes, narrower than its swizzle");
        launch.stop = true;
        return;
      }
      // The PTX ISA has neither these two rules nor that of ragged rows below: an H100 ends in an illegal instruction, or writes there.
      if (origin[0] * map.element_bytes % 16) {
        launch.report("misaligned", &w, l, &in, "a tensor copy from byte " + std::to_string(origin[0] * map.element_bytes) +
                      " of the rows of a tensor, which is not a multiple of 16");
        continue;
      }
      const int64_t least = *std::min_element(origin, origin + 5);
      if (in.b && least < 0) {
        launch.report("out-of-range", &w, l, &in, "a tensor copy writes at coordinate " + std::to_string(least) + ", and stores take none below 0");
        continue;
      }
      uint32_t shared = place.offset;
      uint32_t index[5] = {};
      bool ragged = false;
      const uint64_t rows = (uint64_t)count[1] * count[2] * count[3] * count[4];
      if (rows * row_bytes > w.cta->shared.data.size()) {
        launch.report("out-of-range", &w, l, &in, "a box of " + std::to_string(rows * row_bytes) + " bytes, more than there is of shared memory");
        continue;
      }
      for (uint64_t row = 0; row < rows; ++row) {
        bool inside = true;
        uint64_t address = map.address;
        for (int i = 1; i < in.a; ++i) {
          const int64_t at = origin[i] + index[i];
          inside &= at >= 0 && at < (int64_t)map.dim[i];
          address += (uint64_t)at * map.stride[i];
        }
        for (uint32_t from = 0; from < row_bytes; from += unit, shared += unit) {
          // 5.5 "Out of Boundary Access": elements outside of the tensor read as zero and are not written.
          const int64_t first = origin[0] + from / map.element_bytes, wanted = unit / map.element_bytes;
          const int64_t low = std::max<int64_t>(first, 0), high = std::min<int64_t>(first + wanted, (int64_t)map.dim[0]);
          ragged |= inside && low < high && high < first + wanted && high * map.element_bytes % 16;
          const uint32_t to = swizzled(shared + kSharedBase, map.swizzle) - kSharedBase;
          const auto add = [&](int64_t begin, int64_t end, bool fill) {
            if (begin >= end || (fill && in.b)) return;
            Piece p;
            p.global = address + (uint64_t)begin * map.element_bytes;
            p.shared = to + (uint32_t)((begin - first) * map.element_bytes);
            p.bytes = (uint32_t)((end - begin) * map.element_bytes);
            p.fill = fill;
            copy->pieces.push_back(p);
          };
          if (!inside || low >= high) {
            add(first, first + wanted, true);
          } else {
            add(first, low, true);
            add(low, high, false);
            add(high, first + wanted, true);
          }
        }
        for (int i = 1; i < 5 && ++index[i] == count[i]; ++i) index[i] = 0;
      }
      if (ragged && in.b) {  // hardware writes 16 bytes or none of them
        launch.report("out-of-range", &w, l, &in, "a tensor copy writes beyond rows of " + std::to_string(map.dim[0] * map.element_bytes) +
                      " bytes, up to the next multiple of 16");
        continue;
      }
      copy->swizzle = (uint8_t)(1 + map.swizzle);
      copy->bytes = (int64_t)rows * row_bytes;  // what lies outside counts too
    }
    Mask targets = place.target;
    if (in.b) {
      if (place.target != 1u << w.cta->rank) launch.report("out-of-range", &w, l, &in, "a copy from the shared memory of another block");
      copy->group = w.async.bulk_committed[(size_t)l];
      targets = 1u << w.cta->rank;
    } else {
      const Where mbarrier = shared_place(w, w.address(in.r[next++], l, in.d & 4));
      if (mbarrier.target != place.target)
        launch.report("mbarrier", &w, l, &in, "the mbarrier of a copy lies in another block than its destination");
      copy->mbarrier = mbarrier.offset + kSharedBase;
      if (in.c) targets = w.at<uint32_t>(in.r[next])[l] & 0xffff;
    }
    issue(w, l, in, std::move(copy), targets);
  }
}

// 9.7.9.25.6 commit_group, wait_group: wait.read waits only until the sources may be written again.
// in.a: 0 commit, 1 wait, 2 wait.read; in.c: groups that may stay open
void bulk_group(Warp &w, const Inst &in, Mask m) {
  Launch &launch = w.launch();
  if (in.a == 0) {
    for (; m; m &= m - 1) ++w.async.bulk_committed[(size_t)__builtin_ctz(m)];
    return;
  }
  auto &all = launch.queue.bulk;
  for (size_t i = 0; i < all.size();) {
    BulkCopy &c = *all[i];
    const bool waited = c.store && c.warp == &w && m >> c.lane & 1 && c.group + (uint64_t)in.c < w.async.bulk_committed[(size_t)c.lane];
    if (!waited || in.a == 2) {
      if (waited) free_source(launch, c);
      ++i;
      continue;
    }
    complete_store(launch, c);
    all.erase(all.begin() + (long)i);
  }
}

void no_effect(Warp &, const Inst &, Mask) {}

}  // namespace

bool decode_tensor_copy(Decoder &d, const Statement &s, Inst &in) {
  if (s.parts[0] != "cp" || !s.has("bulk")) return false;
  in.klass = Class::kAsync;
  if (s.has("commit_group") || s.has("wait_group")) {
    in.a = s.has("commit_group") ? 0 : s.has("read") ? 2 : 1;
    if (in.a) in.c = (int)s.operands[0].immediate;
    in.exec = bulk_group;
    return true;
  }
  if (s.has("prefetch")) {
    in.exec = no_effect;
    return true;
  }
  const bool tensor = s.has("tensor");
  in.a = !tensor ? 0 : s.has("1d") ? 1 : s.has("2d") ? 2 : s.has("3d") ? 3 : s.has("4d") ? 4 : 5;
  in.b = s.has("bulk_group");  // to global memory
  in.c = s.has("multicast::cluster");
  const Operand &shared_operand = s.operands[in.b ? 1 : 0], &global_operand = s.operands[in.b ? 0 : 1];
  Inst parts;
  int wide = 0;
  d.address(shared_operand, parts);
  wide |= parts.d ? 1 : 0;
  if (parts.offset) return false;
  d.address(global_operand, parts);
  wide |= parts.d ? 2 : 0;
  in.offset = parts.offset;
  size_t next = 2;
  for (const Operand &coordinate : global_operand.elements) d.source(coordinate, Type::kB32);
  if ((int)global_operand.elements.size() != in.a) return false;
  if (!tensor) d.source(s.operands[next++], Type::kB32);
  if (!in.b) {
    d.address(s.operands[next++], parts);
    wide |= parts.d ? 4 : 0;
    if (parts.offset) return false;
    if (in.c) d.source(s.operands[next++], Type::kB16);
  }
  in.d = wide;  // a cache policy may follow
  in.exec = bulk_copy;
  return true;
}

}  // namespace vgpu
