// The PTX parser (PTX ISA 9.0, sections 4 "Syntax" and 5 "State Spaces, Types, and Variables").
#include "ptx.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <unordered_map>

namespace vgpu {
namespace {

struct Token {
  std::string text;
  size_t begin, end;
  int line;
};

bool is_word(char c) { return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%' || c == '.' || c == ':'; }

// Words keep their dots and double colons (ld.shared::cta.u32, %tid.x); everything else is one character.
std::vector<Token> tokenize(const std::string &s) {
  std::vector<Token> tokens;
  int line = 1;
  for (size_t i = 0; i < s.size();) {
    const char c = s[i];
    if (c == '\n') ++line;
    if (isspace((unsigned char)c) || c == '\0') {
      ++i;
    } else if (c == '/' && i + 1 < s.size() && s[i + 1] == '/') {
      while (i < s.size() && s[i] != '\n') ++i;
    } else if (c == '/' && i + 1 < s.size() && s[i + 1] == '*') {
      for (i += 2; i + 1 < s.size() && !(s[i] == '*' && s[i + 1] == '/'); ++i) line += s[i] == '\n';
      i += 2;
    } else if (c == '"') {
      size_t j = i + 1;
      while (j < s.size() && s[j] != '"') ++j;
      tokens.push_back({s.substr(i + 1, j - i - 1), i, j + 1, line});
      i = j + 1;
    } else if (is_word(c) && c != ':') {
      size_t j = i;
      while (j < s.size() && is_word(s[j])) {
        if (s[j] == ':' && !(j + 1 < s.size() && s[j + 1] == ':')) break;  // the colon of a label
        j += s[j] == ':' ? 2 : 1;
      }
      tokens.push_back({s.substr(i, j - i), i, j, line});
      i = j;
    } else {
      tokens.push_back({std::string(1, c), i, i + 1, line});
      ++i;
    }
  }
  tokens.push_back({"", s.size(), s.size(), line});
  return tokens;
}

std::vector<std::string> split_dots(const std::string &s) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t i = 0; i <= s.size(); ++i)
    if (i == s.size() || s[i] == '.') {
      parts.push_back(s.substr(begin, i - begin));
      begin = i + 1;
    }
  return parts;
}

int type_bytes(const std::string &type) {
  if (type == ".pred") return 0;
  size_t i = 0;
  while (i < type.size() && !isdigit((unsigned char)type[i])) ++i;
  const int bits = atoi(type.c_str() + i);
  return type.size() > 3 && type.substr(type.size() - 2) == "x2" ? bits / 4 : bits / 8;
}

class Parser {
 public:
  explicit Parser(const std::string &text) : text_(text), tokens_(tokenize(text)), module_(new Module) {}

  std::unique_ptr<Module> run() {
    find_functions();
    while (!at("")) {
      const std::string word = peek();
      if (word == ".version" || word == ".address_size") {
        next(), next();
      } else if (word == ".target") {
        next();
        const std::string arch = next();
        if (arch.rfind("sm_", 0)) fail("not a target");
        module_->target = atoi(arch.c_str() + 3);
        module_->arch_specific = arch.back() == 'a';
        while (accept(",")) next();
      } else if (word == ".file") {
        next();
        const int index = (int)number(next());
        module_->files[index] = next();
        while (accept(",")) next();
      } else if (word == ".section") {
        while (!at("{")) next();
        skip_braces();
      } else if (word == ".visible" || word == ".weak" || word == ".extern" || word == ".common") {
        next();
      } else if (word == ".entry") {
        next();
        entry();
      } else if (word == ".func") {
        device_function();
      } else if (word == ".global" || word == ".const" || word == ".shared") {
        variable(module_->variables);
      } else {
        fail("not covered at module scope");
      }
    }
    resolve_inlining();
    return std::move(module_);
  }

 private:
  struct Scope {
    std::unordered_map<std::string, int> registers, labels;
    std::unordered_map<std::string, std::string> variables;  // .local and .param: what the kernel calls them
    std::vector<std::pair<std::string, int>> families;  // %r<10>: prefix and its first register
  };
  struct Function {
    std::vector<Variable> params;  // the one of the result first
    size_t body = 0;               // its brace
    bool open = false;             // being inlined
  };

  const std::string &peek() const { return tokens_[at_].text; }
  bool at(const char *s) const { return peek() == s; }
  const std::string &next() {
    if (at_ + 1 == tokens_.size()) fail("the text ends here");
    return tokens_[at_++].text;
  }
  bool accept(const char *s) { return at(s) ? (next(), true) : false; }
  void expect(const char *s) {
    if (!accept(s)) fail((std::string("expected ") + s).c_str());
  }
  [[noreturn]] void fail(const char *what) const {
    throw std::runtime_error("PTX line " + std::to_string(tokens_[at_].line) + ": at \"" + peek() + "\": " + what);
  }
  void skip_braces() {
    int depth = 0;
    do {
      if (at("")) fail("unbalanced braces");
      depth += at("{") - at("}");
      next();
    } while (depth);
  }

  int64_t number(const std::string &s) const {
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) return (int64_t)strtoull(s.c_str() + 2, nullptr, 16);
    if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D')) return (int64_t)strtoull(s.c_str() + 2, nullptr, 16);
    char *end;
    const uint64_t value = strtoull(s.c_str(), &end, 0);
    if (end == s.c_str() || (*end && strcmp(end, "U"))) fail("not a number");
    return (int64_t)value;
  }

  void variable(std::vector<Variable> &into) {
    Variable v;
    const std::string space = next();
    v.space = space == ".global" ? Space::kGlobal : space == ".const" ? Space::kConst : space == ".local" ? Space::kLocal : Space::kShared;
    uint64_t element = 1;
    while (peek()[0] == '.') {
      const std::string word = next();
      if (word == ".align")
        v.align = (uint32_t)number(next());
      else if (word != ".attribute")
        element = (uint64_t)type_bytes(word);
    }
    v.name = next();
    v.bytes = element;
    if (accept("[")) {
      v.dynamic = at("]");
      v.bytes = v.dynamic ? 0 : element * (uint64_t)number(next());
      expect("]");
    }
    if (v.align < element) v.align = (uint32_t)element;
    if (accept("=")) {
      const bool list = accept("{");
      do {
        const bool minus = accept("-");
        if (!isdigit((unsigned char)peek()[0])) fail(("the variable " + v.name + " is initialised with an address, which is not covered").c_str());
        const int64_t value = number(next()) * (minus ? -1 : 1);
        for (uint64_t i = 0; i < element; ++i) v.initial.push_back((uint8_t)(value >> (8 * i)));
      } while (list && accept(","));
      if (list) expect("}");
    }
    expect(";");
    into.push_back(v);
  }

  // Device functions are inlined where they are called. Other calls are not covered: recursive, indirect, of external functions.
  void find_functions() {
    while (!at("")) {
      if (next() != ".func") continue;
      Function f;
      f.params = parameters();
      const std::string name = next();
      for (const Variable &p : parameters()) f.params.push_back(p);
      while (!at("{") && !at(";")) next();
      f.body = at_;
      if (at("{")) functions_[name] = f;
    }
    at_ = 0;
  }

  void device_function() {
    while (!at("{") && !at(";")) next();
    if (!accept(";")) skip_braces();
  }

  Variable parameter() {
    Variable p;
    p.space = Space::kParam;
    uint64_t element = 1;
    expect(".param");
    while (peek()[0] == '.') {
      const std::string word = next();
      if (word == ".align")
        p.align = (uint32_t)number(next());
      else if (word != ".ptr" && word != ".global")
        element = (uint64_t)type_bytes(word);
    }
    p.name = next();
    p.bytes = element;
    if (accept("[")) {
      p.bytes = element * (uint64_t)number(next());
      expect("]");
    }
    if (p.align < element) p.align = (uint32_t)element;
    return p;
  }

  std::vector<Variable> parameters() {
    std::vector<Variable> list;
    if (!accept("(") || accept(")")) return list;
    do list.push_back(parameter());
    while (accept(","));
    expect(")");
    return list;
  }

  void entry() {
    module_->kernels.emplace_back(new Kernel);
    kernel_ = module_->kernels.back().get();
    kernel_->name = next();
    kernel_->params = parameters();
    uint64_t offset = 0;
    for (Variable &p : kernel_->params) {
      offset = (offset + p.align - 1) / p.align * p.align;
      p.address = offset;
      offset += p.bytes;
    }
    while (!at("{")) {
      const std::string word = next();
      if (word == ".maxntid" || word == ".reqntid") {
        int threads = 1;
        do threads *= (int)number(next());
        while (accept(","));
        (word == ".maxntid" ? kernel_->max_threads : kernel_->required_threads) = threads;
      } else if (word == ".reqnctapercluster") {
        int i = 0;
        do kernel_->cluster[i++] = (int)number(next());
        while (accept(",") && i < 3);
        for (; i < 3; ++i) kernel_->cluster[i] = 1;
      } else if (word == ".minnctapersm" || word == ".maxnreg" || word == ".maxclusterrank") {
        next();
      } else if (word != ".explicitcluster" && word != ".noreturn") {
        fail("a kernel directive that is not covered");
      }
    }
    location_ = -1;
    body();
    for (const auto &[statement, label] : jumps_) {
      const auto &[name, scopes] = label;
      int target = -1;
      for (size_t i = scopes.size(); i-- && target < 0;) {
        const auto found = scopes_[(size_t)scopes[i]].labels.find(name);
        if (found != scopes_[(size_t)scopes[i]].labels.end()) target = found->second;
      }
      if (target < 0) throw std::runtime_error("PTX: no label " + name + " in " + kernel_->name);
      kernel_->statements[(size_t)statement].target = target;
    }
    jumps_.clear();
    scopes_.clear();
    specials_.clear();
  }

  void body() {
    expect("{");
    open_.push_back((int)scopes_.size());
    scopes_.emplace_back();
    while (!accept("}")) {
      if (at("")) fail("a kernel without an end");
      if (at("{")) {
        body();
      } else if (at(".reg") || peek().rfind(".reg.", 0) == 0) {
        registers();
      } else if (at(".shared") || at(".local") || at(".param")) {
        body_variable();
      } else if (at(".loc")) {
        location();
      } else if (at(".pragma")) {
        while (!accept(";")) next();
      } else if (at(";")) {
        next();
      } else if (tokens_[at_ + 1].text == ":") {
        scopes_[(size_t)open_.back()].labels[next()] = (int)kernel_->statements.size();
        next();
      } else {
        statement();
      }
    }
    open_.pop_back();
  }

  // Shared variables of a device function are there once; local ones, and what is passed, once a call: local memory too.
  void body_variable() {
    std::vector<Variable> declared;
    if (at(".param")) {
      declared.push_back(parameter());
      declared[0].space = Space::kLocal;
      expect(";");
    } else {
      variable(declared);
    }
    Variable &v = declared[0];
    if (v.space == Space::kLocal) {
      const std::string unique = v.name + "#" + std::to_string(kernel_->variables.size());
      scopes_[(size_t)open_.back()].variables[v.name] = unique;
      v.name = unique;
    } else if (is_variable(v.name)) {
      return;
    }
    kernel_->variables.push_back(v);
  }

  bool is_variable(const std::string &name) const {
    for (const Variable &v : kernel_->variables)
      if (v.name == name) return true;
    return false;
  }

  // The statements of a device function in place of its call: registers, labels and local variables are new ones, its parameters
  // are the variables that were passed, ret jumps behind them.
  bool inline_call(const Statement &call) {
    std::string name;
    std::vector<std::string> passed;
    for (const Operand &o : call.operands) {
      if (o.kind == Operand::kSymbol) name = o.symbol;
      for (const Operand &e : o.elements) passed.push_back(e.symbol);
    }
    const auto found = functions_.find(name);
    if (call.parts.size() > 1 + (size_t)call.has("uni") || found == functions_.end() || found->second.open || passed.size() != found->second.params.size()) return false;
    Function &f = found->second;
    std::vector<int> open{(int)scopes_.size()}, returns;
    scopes_.emplace_back();
    for (size_t i = 0; i < passed.size(); ++i) scopes_.back().variables[f.params[i].name] = passed[i];
    const size_t behind = at_;
    const int location = location_, caller = caller_;
    std::vector<int> *const outer = returns_;
    open.swap(open_);
    returns_ = &returns;
    caller_ = location_;
    at_ = f.body;
    f.open = true;
    body();
    f.open = false;
    for (const int r : returns) kernel_->statements[(size_t)r].target = (int)kernel_->statements.size();
    open.swap(open_);
    returns_ = outer;
    caller_ = caller;
    location_ = location;
    at_ = behind;
    return true;
  }

  void registers() {
    std::string type = next().substr(4);  // .reg.b32 may be one word
    if (type.empty()) type = next();
    const int bytes = type_bytes(type);
    if (bytes > 8) fail("128-bit registers are not covered");
    const Register::Class kind = bytes == 0 ? Register::kPredicate : bytes == 8 ? Register::k64 : Register::k32;
    Scope &scope = scopes_[(size_t)open_.back()];
    do {
      const std::string name = next();
      if (accept("<")) {
        const int64_t count = number(next());
        if (count < 0 || count > 1 << 20) fail("too many registers");
        expect(">");
        for (int64_t i = 0; i < count; ++i) scope.registers[name + std::to_string(i)] = add_register(name + std::to_string(i), kind, bytes == 2);
      } else {
        scope.registers[name] = add_register(name, kind, bytes == 2);
      }
    } while (accept(","));
    expect(";");
  }

  int add_register(const std::string &name, Register::Class kind, bool narrow = false) {
    kernel_->registers.push_back({name, kind, narrow});
    return (int)kernel_->registers.size() - 1;
  }

  void location() {
    next();
    Location::Line line = position();
    Location l;
    l.lines.push_back(line);
    l.caller = caller_;
    if (accept(",")) {
      next(), next();  // function_name $L__info_string0 (+ offset)
      if (accept("+")) next();
      expect(",");
      next();  // inlined_at
      l.lines.push_back(position());
    }
    module_->locations.push_back(l);
    location_ = (int)module_->locations.size() - 1;
  }

  Location::Line position() {
    Location::Line line;
    line.file = (int)number(next());
    line.line = (int)number(next());
    line.column = (int)number(next());
    return line;
  }

  // ".loc f l c, inlined_at F L C" gives one step out; that place was inlined itself where an earlier .loc says so.
  void resolve_inlining() {
    std::map<std::vector<int>, Location::Line> outer;
    for (Location &l : module_->locations) {
      const auto key = [](const Location::Line &p) { return std::vector<int>{p.file, p.line, p.column}; };
      if (l.lines.size() > 1) outer[key(l.lines[0])] = l.lines[1];
      while (l.lines.size() > 1 && l.lines.size() < 12) {
        const auto found = outer.find(key(l.lines.back()));
        if (found == outer.end()) break;
        l.lines.push_back(found->second);
      }
    }
  }

  void statement() {
    Statement s;
    const size_t first = at_;
    if (accept("@")) {
      s.guard_negated = accept("!");
      s.guard = find_register(next());
      if (s.guard < 0 || kernel_->registers[(size_t)s.guard].kind != Register::kPredicate) fail("the guard is not a predicate");
    }
    s.parts = split_dots(next());
    s.location = location_;
    while (!accept(";")) {
      if (at("")) fail("a statement without an end");
      Operand o = operand();
      if (accept("|")) {
        Operand both;
        both.kind = Operand::kVector;
        both.pair = true;
        both.elements = {o, operand()};
        o = both;
      }
      s.operands.push_back(o);
      accept(",");
    }
    s.text = text_.substr(tokens_[first].begin, tokens_[at_ - 1].begin - tokens_[first].begin);
    if (s.parts[0] == "call" && s.guard < 0 && inline_call(s)) return;
    if (returns_ && s.parts[0] == "ret") {
      s.parts[0] = "bra";
      returns_->push_back((int)kernel_->statements.size());
    } else if (s.parts[0] == "bra" && !s.operands.empty()) {
      jumps_.push_back({(int)kernel_->statements.size(), {s.operands[0].symbol, open_}});
    }
    for (const Operand &o : s.operands)  // what is passed is local memory; a kernel's own parameters are not
      if ((s.parts[0] == "ld" || s.parts[0] == "st") && o.kind == Operand::kAddress && (returns_ || is_variable(o.symbol)))
        std::replace(s.parts.begin(), s.parts.end(), std::string("param"), std::string("local"));
    kernel_->statements.push_back(std::move(s));
  }

  Operand operand() {
    Operand o;
    if (accept("!")) {
      o = operand();
      o.negated = true;
    } else if (accept("_")) {
      o.kind = Operand::kSink;
    } else if (accept("-")) {
      o = operand();
      if (o.kind != Operand::kImmediate) fail("not a number");
      o.immediate = o.real ? o.immediate ^ INT64_MIN : -o.immediate;
    } else if (accept("{")) {
      o.kind = Operand::kVector;
      do o.elements.push_back(operand());
      while (accept(","));
      expect("}");
    } else if (accept("(")) {
      o.kind = Operand::kVector;
      while (!accept(")")) o.elements.push_back(operand()), accept(",");
    } else if (accept("[")) {
      o = operand();
      if (o.kind == Operand::kVector) fail("not an address");
      o.kind = Operand::kAddress;
      while (at("+") || at("-")) {
        bool minus = next() == "-";
        minus ^= accept("-");
        o.immediate += (minus ? -1 : 1) * number(next());
      }
      if (accept(",")) o.elements = operand().elements;
      expect("]");
    } else if (isdigit((unsigned char)peek()[0])) {
      o.kind = Operand::kImmediate;
      o.real = peek().find('.') != std::string::npos;
      if (o.real) {
        const double value = strtod(next().c_str(), nullptr);
        memcpy(&o.immediate, &value, 8);
      } else {
        o.immediate = number(next());
      }
    } else {
      o.reg = find_register(peek());
      o.kind = o.reg >= 0 ? Operand::kRegister : at("WARP_SZ") ? Operand::kImmediate : Operand::kSymbol;
      o.symbol = o.kind == Operand::kSymbol ? variable_of(peek()) : "";
      o.immediate = o.kind == Operand::kImmediate ? 32 : 0;  // (PTX ISA 4.5.3)
      next();
    }
    return o;
  }

  std::string variable_of(const std::string &name) const {
    for (size_t i = open_.size(); i--;) {
      const auto &variables = scopes_[(size_t)open_[i]].variables;
      const auto found = variables.find(name);
      if (found != variables.end()) return found->second;
    }
    return name;
  }

  // Declared registers, innermost scope first; then special registers, declared by their first use.
  int find_register(const std::string &name) {
    for (size_t i = open_.size(); i--;) {
      const auto &registers = scopes_[(size_t)open_[i]].registers;
      const auto found = registers.find(name);
      if (found != registers.end()) return found->second;
    }
    if (name[0] != '%') return -1;
    const auto found = specials_.find(name);
    return found != specials_.end() ? found->second : specials_[name] = add_register(name, Register::kSpecial);
  }

  const std::string &text_;
  std::vector<Token> tokens_;
  std::unique_ptr<Module> module_;
  Kernel *kernel_ = nullptr;
  size_t at_ = 0;
  int location_ = -1, caller_ = -1;
  std::unordered_map<std::string, Function> functions_;
  std::vector<int> *returns_ = nullptr;  // statements of the function being inlined that return from it; null in the kernel itself
  std::vector<Scope> scopes_;
  std::vector<int> open_;  // indices of the scopes we are in, outermost first
  std::unordered_map<std::string, int> specials_;
  std::vector<std::pair<int, std::pair<std::string, std::vector<int>>>> jumps_;
};

}  // namespace

std::string Module::where(int location) const {
  if (location < 0) return "?";
  std::string out;
  for (; location >= 0; location = locations[(size_t)location].caller)
    for (const Location::Line &line : locations[(size_t)location].lines) {
      const auto file = files.find(line.file);
      std::string name = file == files.end() ? "?" : file->second;
      name = name.substr(name.rfind('/') == std::string::npos ? 0 : name.rfind('/') + 1);
      out += (out.empty() ? "" : " < ") + name + ":" + std::to_string(line.line);
    }
  return out;
}

std::unique_ptr<Module> parse_ptx(const std::string &text) { return Parser(text).run(); }

}  // namespace vgpu
