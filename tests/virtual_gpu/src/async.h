// Asynchronous work in flight: cp.async, bulk and tensor copies, wgmma. "Late" means at the last legal moment.
#pragma once
#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "clock.h"
#include "isa.h"

namespace vgpu {

struct Cta;
struct Launch;
struct Actor;
class Shadow;

// A contiguous piece of a copy between global memory and the shared memory of a block.
struct Piece {
  uint64_t global = 0;
  uint32_t shared = 0;       // offset in the block's shared memory
  uint32_t bytes = 0;
  bool fill = false;         // loads: zeros, nothing is read
};

// One cp.async of one lane, or the arrival that it triggers.
struct CpAsync {
  const Inst *inst;
  int lane;
  uint64_t group;            // of the lane
  Piece piece;
  uint32_t read = 0;         // bytes beyond are zeros
  bool arrive = false;       // cp.async.mbarrier.arrive
  bool done = false;         // completed at a random moment, and nobody knows yet
  uint64_t mbarrier = 0;
};

// A bulk or tensor copy.
struct BulkCopy {
  const Inst *inst = nullptr;
  Warp *warp = nullptr;      // who issued it
  int lane = 0;
  bool store = false;        // shared -> global
  std::vector<Piece> pieces;
  std::vector<Cta *> targets;        // loads: blocks whose shared memory is written (several: multicast); stores: the source
  uint32_t mbarrier = 0;             // loads: its address in each target
  int64_t bytes = 0;                 // what completes there
  uint64_t group = 0;                // stores: of the lane
  uint8_t swizzle = 0;               // loads: SharedMemory::swizzle of what they write
  std::vector<uint8_t> captured;     // stores: what was read, once the source is free again
  std::vector<bool> captured_valid;
  bool source_free = false;
};

struct WarpAsync {
  std::deque<CpAsync> copies;
  std::array<uint64_t, 32> committed{};       // cp.async groups by lane
  std::array<uint64_t, 32> bulk_committed{};  // bulk groups by lane
  std::array<Ref<Clock>, 32> landed;          // by lane: what its cp.async.mbarrier.arrive have announced
};

struct AsyncQueue {
  std::deque<std::unique_ptr<BulkCopy>> bulk;
};

// Completes one piece of pending work, chosen at random; false if there is none. Called at random moments or, if completion is
// late, when nothing else can go on: then only what somebody may wait for at an mbarrier. (Groups complete in their wait.)
bool complete_some(Launch &launch);
void complete_load(Launch &launch, BulkCopy &copy);
void free_source(Launch &launch, BulkCopy &copy);       // stores: reads shared memory
void complete_store(Launch &launch, BulkCopy &copy);
// A touch of a cell in which a copy or product in flight reads or writes: reports it if they meet in one of these bytes.
void report_in_flight(Launch &launch, const Actor &actor, uint64_t address, uint8_t bytes, const Shadow &shadow, bool global, bool write);
void async_at_exit(Warp &warp);                // the warp has exited
void async_at_cta_exit(Cta &cta);

// wgmma of one warp. A group's products run when it is waited for.
struct WgmmaOp {
  const Inst *inst;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool scale_d = true;
  uint64_t number = 0;              // in the warp: the warps of a warpgroup issue the same numbers
  uint64_t group = 0;
  std::vector<uint32_t> a_values;   // A in registers, as they are when the product runs
  std::vector<Piece> reads;         // this warp's part of what the product reads
};

struct WarpMatrix {
  std::deque<WgmmaOp> pending;            // not known to be complete to this warp
  uint64_t issued = 0, committed = 0;     // products; groups
  std::vector<uint32_t> accessed;         // by slot: value of `fences` + 1 when another instruction last read or wrote it
  uint32_t fences = 0;
  std::vector<uint16_t> accumulates, reads;  // by slot: pending products that write it, and that read it as A
};

// Four consecutive warps.
struct WarpGroup {
  std::array<Warp *, 4> warps{};
  uint64_t completed = 0;                 // products done for all four
};

void run_product(WarpGroup &group);     // the next one, which all four warps have issued

// Operands of an ordinary instruction against products in flight; notes what it accesses.
void wgmma_check(Warp &warp, const Inst &in);

}  // namespace vgpu
