// PTX text as data: what a module declares and the statements of its kernels, names resolved to indices.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace vgpu {

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kSharedCluster, kLocal, kParam, kConst };

// A declared register. 16-bit registers live in 32-bit lanes.
struct Register {
  enum Class : uint8_t { kPredicate, k32, k64, kSpecial };
  std::string name;
  Class kind;
  bool narrow = false;  // 16-bit: its lanes hold the value zero-extended
};

struct Operand {
  enum Kind : uint8_t { kRegister, kImmediate, kAddress, kVector, kSymbol, kSink };
  Kind kind = kSink;
  bool negated = false;           // !%p
  bool pair = false;              // kVector written as d|p
  bool real = false;              // kImmediate written as 1.0: its bits are those of a double
  int reg = -1;                   // kRegister; kAddress: the base, or -1
  std::string symbol;             // kSymbol; kAddress: the base variable, or ""
  int64_t immediate = 0;          // kImmediate: its bits; kAddress: the byte offset
  std::vector<Operand> elements;  // kVector; kAddress: tensor coordinates
};

// Where a statement comes from: innermost first, then the call sites it was inlined at. caller: the location of the call, in a
// device function that nvcc did not inline.
struct Location {
  struct Line {
    int file = 0, line = 0, column = 0;
  };
  std::vector<Line> lines;
  int caller = -1;
};

struct Statement {
  int guard = -1;  // register
  bool guard_negated = false;
  std::vector<std::string> parts;  // the opcode at its dots: ld, global, v4, u32
  std::vector<Operand> operands;
  std::string text;
  int location = -1;  // index into Module::locations
  int target = -1;    // bra: statement index

  bool has(const char *part) const {
    for (size_t i = 1; i < parts.size(); ++i)
      if (parts[i] == part) return true;
    return false;
  }
};

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  uint32_t align = 1;
  uint64_t bytes = 0;
  bool dynamic = false;             // extern __shared__ x[]
  std::vector<uint8_t> initial;     // empty: zero
  uint64_t address = 0;             // set when the module or kernel is laid out
};

struct Kernel {
  std::string name;
  std::vector<Variable> params;
  std::vector<Register> registers;
  std::vector<Variable> variables;  // .shared, .local and .param of the body
  std::vector<Statement> statements;
  int max_threads = 0;              // .maxntid, or 0
  int required_threads = 0;         // .reqntid, or 0
  int cluster[3] = {0, 0, 0};       // .reqnctapercluster, or 0
};

struct Module {
  int target = 0;                   // 80 of sm_80
  bool arch_specific = false;       // the a of sm_90a
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<Variable> variables;  // .global, .const and .shared of the module
  std::vector<Location> locations;
  std::map<int, std::string> files;

  // "kernel.cu:17 < caller.cu:30", innermost first.
  std::string where(int location) const;
};

// Throws std::runtime_error that names the line of PTX.
std::unique_ptr<Module> parse_ptx(const std::string &text);

}  // namespace vgpu
