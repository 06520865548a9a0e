// Memory with shadow state: every 4 bytes of shared and global memory have a Cell that says which bytes were ever written,
// who wrote and read them last, and whether an asynchronous copy or matrix product still reads or writes them.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "isa.h"

namespace vgpu {

struct Actor;
struct Launch;
struct Cta;

// Who touched a cell: lanes of one warp in one epoch, or the asynchronous copies of one mbarrier (rows after the warps).
struct Access {
  uint32_t cta = 0;
  Mask lanes = 0;  // 0: nobody
  uint32_t epoch = 0;
  uint16_t statement = 0;
  uint8_t warp = 0;
  uint8_t flags = 0;  // bytes of the cell in the low four bits, then the flags below
};
constexpr uint8_t kBytes = 15, kStrong = 16, kAsyncProxy = 32, kWrite = 64, kBlockScope = 128;

struct Cell {
  Access write, read;       // the last ones
  uint32_t more = 0;        // 1 + index into Shadow::overflow, for readers and sub-word writers beyond these
  uint8_t valid = 0;        // bytes that hold a defined value
  uint8_t constant = 0;     // bytes that this launch read with ld.global.nc
  uint16_t reads_in_flight = 0, writes_in_flight = 0;
};

// Stand for all blocks of launches before this one, if it was allowed to start before their end (griddepcontrol): of those that have
// ended behind its griddepcontrol.wait, and of earlier ones that may run even then, for the launch between did not wait.
constexpr uint32_t kPrimary = 0xffffffff, kOlder = 0xfffffffe;

// Which launch asks for cells (0: the host), the first one that may still run when it starts, and the first one that has ended
// behind its griddepcontrol.wait. Both are the launch itself if it starts behind the end of all others.
struct LaunchOrder {
  uint64_t id = 0, running = 0, waited_for = 0;
};

// The part of the checks that shared and global memory have in common.
class Shadow {
 public:
  explicit Shadow(bool global) : global_(global) {}
  // One access to bytes [address, address + bytes) whose first cell is `cell`; the cells follow each other.
  // observes: an atomic whose result tells what atomics wrote before it.
  void touch(Cell *cell, uint64_t address, unsigned bytes, bool write, const Actor &actor, bool observes = false);
  // The same for asynchronous work: checked when it is issued, recorded when it completes; in between it is in flight.
  void probe(Cell *cell, uint64_t address, unsigned bytes, bool write, const Actor &actor);
  void record(Cell *cell, uint64_t address, unsigned bytes, bool write, const Actor &actor);
  void in_flight(Cell *cell, uint64_t address, unsigned bytes, bool write, int change);
  bool valid(const Cell *cell, uint64_t address, unsigned bytes) const;
  const Access *writer(const Cell *cell, uint64_t address, unsigned bytes) const;  // who wrote any of these in this launch, or null
  void set_valid(Cell *cell, uint64_t address, unsigned bytes, bool value);
  template <class Body>
  void each_access(const Cell &cell, const Body &body) const {
    if (cell.write.lanes) body(cell.write);
    if (cell.read.lanes) body(cell.read);
    if (!cell.more) return;
    for (const Access &access : overflow_[cell.more - 1]) body(access);
  }
  void set_constant(Cell *cell, uint64_t address, unsigned bytes);  // it may not be written in this launch
  void forget(Cell &cell);  // the accesses, not the validity
  void keep_as(Cell &cell, uint32_t own, uint32_t earlier);  // what the launch did as by these blocks, and what it knew of as kPrimary

 private:
  void probe_cell(Cell &cell, uint8_t bytes, bool write, const Actor &actor, uint64_t address);
  void check(const Access &access, uint8_t bytes, bool write, const Actor &actor, uint64_t address);
  void record_read(Cell &cell, uint8_t bytes, const Actor &actor);
  void record_write(Cell &cell, uint8_t bytes, const Actor &actor, bool observes = false);
  std::vector<Access> &overflow(Cell &cell);

  bool global_;
  std::vector<std::vector<Access>> overflow_;
  std::vector<uint32_t> free_;
};

// A resolved access: where the bytes are and their first cell. data is null if it was reported and must not happen.
struct Span {
  uint8_t *data = nullptr;
  Cell *cells = nullptr;     // null: no shadow (param, const, local)
  Shadow *shadow = nullptr;
  Space space = Space::kGeneric;
  uint64_t at = 0;           // what the shadow calls the address: global, or the offset in the block's shared memory
};

// "Device memory" is host memory that was mapped: what is not mapped is out of range.
struct Allocation : Range {
  bool writable, initialised;
};

// Where an access lies that is in no memory: "ending 4 bytes behind the 256 bytes of x", "beginning 4 bytes before y", whichever
// is nearer, of the memory that begins last at or below it and the one above; nothing if it is far from both.
std::string beside(uint64_t address, uint64_t bytes, const Range *below, const Range *above);

class GlobalMemory {
 public:
  GlobalMemory() : shadow_(true) {}
  void map(uint64_t address, uint64_t bytes, const std::string &name, bool writable, bool initialised);
  bool unmap(uint64_t address);
  const Allocation *find(uint64_t address) const;
  const Allocation *below(uint64_t address) const;  // the last one that begins there or before
  const Allocation *above(uint64_t address) const;  // and the first one behind
  Cell *cells(uint64_t address, const LaunchOrder &order = {});  // a page is 4096 bytes
  void set_initialised(uint64_t address, uint64_t bytes);  // by the host
  Shadow &shadow() { return shadow_; }

 private:
  struct Page {
    Cell cells[1024];
    uint64_t launch = 0;
  };
  void reset(uint64_t address, uint64_t bytes, bool initialised);
  void initialise(Page &page, uint64_t base, const Allocation &a);

  std::map<uint64_t, Allocation> allocations_;
  mutable const Allocation *last_ = nullptr;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  uint64_t last_page_ = ~0ull;
  Page *last_page_data_ = nullptr;
  Shadow shadow_;
};

// Global bytes page by page: the cells of a page follow each other, those of the next lie elsewhere.
template <class Body>
void by_page(uint64_t address, uint64_t bytes, const Body &body) {
  while (bytes) {
    const uint32_t here = (uint32_t)std::min<uint64_t>(bytes, 4096 - (address & 4095));
    body(address, here);
    address += here;
    bytes -= here;
  }
}

struct SharedMemory {
  explicit SharedMemory(uint32_t bytes) : data(bytes), cells(bytes / 4 + 1), swizzle(bytes / 16 + 1), shadow(false) {}
  std::vector<uint8_t> data;
  std::vector<Cell> cells;
  std::vector<uint8_t> swizzle;  // by 16 bytes: 1 + swizzle (0, 32, 64, 128 bytes as 0 to 3) of the tensor copy that wrote them last
  Shadow shadow;
};

// Where the windows of generic addresses lie, and where a block's shared memory begins in its window.
constexpr uint64_t kSharedWindow = 0x0100000000000000, kLocalWindow = 0x0200000000000000, kParamWindow = 0x0300000000000000,
                   kConstWindow = 0x0400000000000000;
Space space_of_window(uint64_t address);
uint64_t window_of(Space space);  // 0: it has none
constexpr uint32_t kSharedBase = 1024;      // the driver keeps the first KiB; so no shared object lies at 0
constexpr uint32_t kClusterShift = 24;      // shared::cluster address: (rank + 1) << 24 | address, or a plain one for its own block

}  // namespace vgpu
