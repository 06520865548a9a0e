// Decoded instructions. Registers are slots: 32-lane vectors in a warp's register file. Immediates, addresses of variables
// and special registers that never change are slots too, filled when the warp starts, so that every source is a slot.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "ptx.h"

namespace vgpu {

using Mask = uint32_t;  // bit l: lane l
using Slot = uint16_t;  // 32-bit slots are one unit of 32 x uint32_t; 64-bit slots two; predicates have their own file

enum class Type : uint8_t { kNone, kPred, kU8, kU16, kU32, kU64, kS8, kS16, kS32, kS64, kB8, kB16, kB32, kB64,
                           kF16, kF16x2, kBF16, kBF16x2, kF32, kF64 };

inline int type_bytes(Type t) {
  switch (t) {
    case Type::kU8: case Type::kS8: case Type::kB8: return 1;
    case Type::kU16: case Type::kS16: case Type::kB16: case Type::kF16: case Type::kBF16: return 2;
    case Type::kU64: case Type::kS64: case Type::kB64: case Type::kF64: return 8;
    case Type::kNone: case Type::kPred: return 0;
    default: return 4;
  }
}

// What counters call an instruction.
enum class Class : uint8_t { kInteger, kFloat, kConvert, kMove, kControl, kLoadGlobal, kStoreGlobal, kLoadShared, kStoreShared, kLocal,
                             kAtomic, kCollective, kBarrier, kAsync, kMatrix, kCount };
extern const char *const kClassNames[];

struct Warp;
struct Fragment;
struct Inst;

// What a control instruction did to the fragment that issued it.
enum class Flow : uint8_t {
  kNext,   // done: go on
  kWait,   // blocked: whoever completes it makes the fragment ready
  kPoll,   // done, nothing happened yet: go on, but let others run first
  kJumped  // the fragment has been moved, split or ended
};

using Exec = void (*)(Warp &, const Inst &, Mask);
using Control = Flow (*)(Warp &, Fragment &, const Inst &);

struct Inst {
  Exec exec = nullptr;        // either this: all lanes of the mask at once, never blocks
  Control control = nullptr;  // or this: for the fragment's whole mask (a guard splits the fragment first)
  Class klass = Class::kInteger;
  bool guard_negated = false;
  bool backward = false;      // bra: to an earlier statement
  uint8_t count = 0;          // slots in r
  int guard = -1;             // predicate
  const Slot *r = nullptr;    // operands in the order of the text, destinations first, vectors flattened
  int64_t offset = 0;         // byte offset of an address
  uint32_t target = 0;        // bra
  uint32_t reconverge = 0;    // bra: first statement that all paths come back to
  Space space = Space::kGeneric;
  Type type = Type::kNone, type2 = Type::kNone;
  uint8_t vector = 1;
  int32_t a = 0, b = 0, c = 0, d = 0;  // whatever the family needs; its decoder says what
  const Statement *statement = nullptr;
};

constexpr Slot kNoSlot = 0xffff;  // a destination written as _, an operand that is not there

// Memory with a name.
struct Range {
  uint64_t address = 0, bytes = 0;
  std::string name;
};

// A kernel ready to run.
struct Program {
  const Module *module = nullptr;
  const Kernel *kernel = nullptr;
  std::vector<Inst> code;                   // one per statement, and an exit at the end
  std::vector<std::vector<Slot>> operands;  // storage of Inst::r
  std::vector<std::vector<Slot>> defined, used;  // by statement: 32-bit and 64-bit slots, for the checks of wgmma
  int units = 0, predicates = 0;            // size of the register file
  struct Constant {
    Slot slot;
    uint64_t value;
    bool wide;
  };
  std::vector<Constant> constants;
  struct Special {
    Slot slot;
    std::string name;
  };
  std::vector<Special> specials;
  std::vector<Range> shared;    // shared variables by their addresses
  bool dynamic = false;         // the last one is dynamic shared memory, of 0 bytes here
  uint32_t shared_bytes = 0;    // static, without the gaps between them; dynamic shared memory follows, aligned as declared
  uint32_t local_bytes = 0;
  uint32_t param_bytes = 0;
  bool has_wgmma = false;
  std::vector<const Statement *> uncovered;  // these would stop a launch

  std::string where(const Inst &in) const { return module->where(in.statement ? in.statement->location : -1); }
};

}  // namespace vgpu
