// From statements to instructions that run: registers are packed into slots by liveness, each family's decoder picks the
// function. A statement that no decoder takes gets one that stops the launch with its text.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "isa.h"

namespace vgpu {

class Decoder {
 public:
  Decoder(Program &program, const std::map<std::string, uint64_t> &symbols) : program_(program), symbols_(symbols) {}
  void run();

  // Family decoders call these in the order in which they want the slots in Inst::r. Each pushes one slot, or one a vector
  // element. They throw Uncovered for an operand that does not fit.
  // A register has 64 bits if, and only if, the type has; it is a predicate only for kPred.
  void destination(const Operand &o, Type type = Type::kB32);  // a register, _ (kNoSlot), or a vector of those
  void source(const Operand &o, Type type);  // a register, an immediate splatted as `type`, the address of a variable; or a vector
  bool is_predicate(const Operand &o) const;
  void predicate(const Operand &o);          // a predicate register as a source; kNegated is set for !%p
  void address(const Operand &o, Inst &in);  // [base + offset]: pushes a 64-bit or 32-bit slot (in.d = 1 if 64-bit), sets in.offset
  Slot constant(uint64_t value, bool wide);
  bool narrow(const Operand &o) const;       // a 16-bit register
  bool wide(const Operand &o) const;         // a 64-bit register
  bool special(const Operand &o, const char *name) const;  // that special register
  bool guess_of_cas(const Statement &load);  // whether a CAS checks what it loads, before anything else uses it

  struct Uncovered {};

 private:
  bool fits(const Register &r, Type type) const;
  void allocate_registers();
  void flow_graph();
  Slot slot_of(int reg) const { return slots_[(size_t)reg]; }
  Slot special(const std::string &name);

  Program &program_;
  const std::map<std::string, uint64_t> &symbols_;
  std::vector<Slot> slots_;        // by register
  std::vector<Slot> operands_;     // of the statement being decoded
  std::vector<Slot> defined_, used_;  // and which of its registers it writes and reads
  std::map<std::pair<uint64_t, bool>, Slot> constants_;
  std::map<std::string, Slot> specials_;
  std::vector<int> reconverge_;    // by statement
  std::vector<const Statement *> compare_and_swaps_;
};

constexpr Slot kNegated = 0x8000;  // of a predicate source

// "u32" -> Type::kU32; kNone if it is not a type.
Type parse_type(const std::string &part);
// The last part of the opcode that is a type.
Type last_type(const Statement &s);

// Whether a form is one that a family knows; true for arithmetic and conversions, which look themselves.
bool known_form(const Kernel &k, const Statement &s);

// The families. Each returns false for a statement it does not know; `in` is then as it was.
bool decode_arithmetic(Decoder &d, const Statement &s, Inst &in);
bool decode_convert(Decoder &d, const Statement &s, Inst &in);
bool decode_memory(Decoder &d, const Statement &s, Inst &in);
bool decode_collective(Decoder &d, const Statement &s, Inst &in);
bool decode_barrier(Decoder &d, const Statement &s, Inst &in);
bool decode_async(Decoder &d, const Statement &s, Inst &in);
bool decode_tensor_copy(Decoder &d, const Statement &s, Inst &in);
bool decode_matrix(Decoder &d, const Statement &s, Inst &in);
bool decode_wgmma(Decoder &d, const Statement &s, Inst &in);

std::unique_ptr<Program> make_program(const Module &module, const Kernel &kernel);

}  // namespace vgpu
