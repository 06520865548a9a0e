// The forms of all families but arithmetic and conversions, which take their opcodes apart themselves: an opcode with its modifiers
// in their order (PTX ISA 9.7.9 to 9.7.15), then a letter for each operand. What is not here is not covered.
#include <cstring>
#include <map>
#include <regex>

#include "decode.h"

namespace vgpu {
namespace {

// r: a register, p, n: a predicate, !predicate, i: a number, y: a name, a: an address, c: of a tensor, _: nothing, Pxy: x|y. Vectors
// of n: Rn of registers, Dn with _ among them, Vn with numbers or names, X of anything else.
std::string shape(const Kernel &k, const Operand &o) {
  switch (o.kind) {
    case Operand::kRegister: {
      const bool predicate = k.registers[(size_t)o.reg].kind == Register::kPredicate;
      return predicate ? o.negated ? "n" : "p" : o.negated ? "X" : "r";
    }
    case Operand::kImmediate: return o.negated ? "X" : "i";
    case Operand::kSymbol: return o.negated ? "X" : "y";
    case Operand::kAddress: return o.elements.empty() ? "a" : "c";
    case Operand::kSink: return "_";
    default: break;
  }
  std::string all;
  for (const Operand &e : o.elements) all += shape(k, e);
  if (o.pair) return "P" + all;
  const auto made_of = [&](const char *letters) { return all.find_first_not_of(letters) == std::string::npos; };
  return (made_of("r") ? "R" : made_of("r_") ? "D" : made_of("riy") ? "V" : "X") + std::to_string(o.elements.size());
}

// A dot is a dot. SCOPE, SPACE, ... stand for what `words` has; longer ones first.
const std::pair<const char *, const char *> words[] = {
    {"ORDER", "(.(relaxed|acquire|release|acq_rel))?(.SCOPE)?"},
    {"SCOPE", "(cta|cluster|gpu|sys)"},
    {"SPACE", "(.global|.shared|.shared::cta|.shared::cluster|.local|.const|.param|.param::entry)"},
    {"BLOCK", "(.shared|.shared::cta)"},                      // shared memory of the block
    {"CLUSTER", "(.shared|.shared::cta|.shared::cluster)"},   // of a block of the cluster
    {"HINTS", "(.L1::(evict_normal|evict_unchanged|evict_first|evict_last|no_allocate))?(.L2::evict_(normal|first|last))?(.L2::(64|128|256)B)?"},
    {"TYPE", "(.[bus](8|16|32|64)|.f32|.f64)"},
    {"INTEGER_OP", "(.add.[us](32|64)|.(min|max).[us](32|64)|.(and|or|xor).b(32|64)|.(inc|dec).u32)"},
    {"REAL_OP", "(.add(.f32|.f64|.noftz.b?f16(x2)?))"},
    {"BY_2", "(.add(.v2.f32|.noftz.v2.b?f16(x2)?))"},
    {"BY_4", "(.add(.v4.f32|.noftz.v4.b?f16(x2)?))"},
    {"BY_8", "(.add.noftz.v8.b?f16)"},
    {"S", "[riy]"}};

const std::pair<const char *, const char *> forms[] = {
    {"bra", "(.uni)? y?"}, {"ret", "(.uni)? "}, {"exit", " "}, {"trap", " "}, {"call", "(.uni)? yV5"},
    // 9.7.9.8 ld, 9.7.9.11 st. A cache policy has been taken off.
    {"ld", "((.weak|.volatile|.(relaxed|acquire).SCOPE|.mmio.relaxed.sys)?SPACE?(.c[agsv]|.lu)?|.global(.c[ags])?.nc)HINTS"
           "(TYPE [r_]a|.v2TYPE [RD]2a|.v4TYPE [RD]4a)"},
    {"st", "(.weak|.volatile|.(relaxed|release).SCOPE|.mmio.relaxed.sys)?SPACE?(.wb|.cg|.cs|.wt)?HINTS(TYPE aS|.v2TYPE a[RV]2|.v4TYPE a[RV]4)"},
    // 9.7.13.5 atom, 9.7.13.6 red. CUDA's headers have the order behind the operation too.
    {"atom", "ORDERSPACE?((INTEGER_OP|REAL_OP|.exch.b(32|64)) [r_]aS|.cas.b(16|32|64) [r_]aSS)|"
             "ORDER.global(BY_2 [RD]2a[RV]2|BY_4 [RD]4a[RV]4|BY_8 [RD]8a[RV]8)|"
             ".add.(acquire|release|acq_rel).SCOPE.u32 [r_]aS"},
    {"red", "ORDERSPACE?(INTEGER_OP|REAL_OP) aS|ORDER.global(BY_2 a[RV]2|BY_4 a[RV]4|BY_8 a[RV]8)"},
    {"cvta", "(.to)?SPACE.u64 rS"}, {"isspacep", "SPACE pS"}, {"mapa", "(.shared::cluster)?.u(32|64) rSS"},
    {"prefetch", "((.global|.local)?.L[12]|.global.L2::evict_(last|normal)|(.const|.param)?.tensormap) a"}, {"prefetchu", ".L1 a"},
    {"createpolicy", ".fractional(.L2::evict_(last|normal|first|unchanged))+.b64 ri?"}, {"applypriority", "(.global)?.L2::evict_normal ai"},
    // Collectives.
    {"activemask", ".b32 r"}, {"shfl", ".sync.(up|down|bfly|idx).b32 ([r_]|P[r_][p_])SSSS"},
    {"vote", ".sync.((all|any|uni).pred [p_]|ballot.b32 [r_])[pn]S"}, {"match", ".(any.sync.b(32|64) [r_]|all.sync.b(32|64) ([r_]|P[r_][p_]))SS"},
    {"redux", ".sync.((add|min|max).[us]32|(and|or|xor).b32) [r_]SS"}, {"elect", ".sync P[r_][p_]S"},
    // Barriers and fences.
    {"bar", ".warp.sync S|(.cta)?(.sync SS?|.arrive SS|.red(.popc.u32 r|.(and|or).pred p)SS?[pn])"},
    {"barrier", "(.cta)?(.sync(.aligned)? SS?|.arrive(.aligned)? SS|.red(.popc(.aligned)?.u32 r|.(and|or)(.aligned)?.pred p)SS?[pn])|"
                ".cluster(.arrive(.release|.relaxed)?|.wait(.acquire)?)(.aligned)? "},
    {"membar", ".(cta|gl|sys) |.proxy.async(.global|.shared::cta|.shared::cluster)? "},
    {"fence", "(.sc|.acq_rel)?.SCOPE |.proxy.async(.global|.shared::cta|.shared::cluster)? |.mbarrier_init.release.cluster "},
    {"nanosleep", ".u32 S"}, {"griddepcontrol", ".(wait|launch_dependents) "}, {"setmaxnreg", ".(inc|dec).sync.aligned.u32 i"},
    {"mbarrier", ".(initBLOCK?.b64 aS|invalBLOCK?.b64 a|(test_wait|try_wait)(.parity)?(.(acquire|relaxed).(cta|cluster))?BLOCK?.b64 paSS?|"
                 "arrive(.(release|relaxed).(cta|cluster))?CLUSTER?.b64 [r_]aS?|arrive.expect_tx(.(release|relaxed).(cta|cluster))?CLUSTER?.b64 [r_]aS|"
                 "(expect_tx|complete_tx)(.relaxed.(cta|cluster))?CLUSTER?.b64 aS)"},
    // 9.7.9.25 cp.async: without im2col, masks and reductions.
    {"cp", ".async.(c[ag]BLOCK.global(.L2::(64|128|256)B)? aai([pn]|S)?|commit_group |wait_group i|wait_all |mbarrier.arrive(.noinc)?BLOCK?.b64 a|"
           "bulk.(commit_group |wait_group(.read)? i|prefetch.L2.global aS|prefetch.tensor.[1-5]d.L2.global(.tile)? c|"
           "shared::(cta|cluster).global.mbarrier::complete_tx::bytes aaSa|shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster aaSaS|"
           "global.shared::cta.bulk_group aaS|tensor.[1-5]d.(shared::(cta|cluster).global(.tile)?.mbarrier::complete_tx::bytes aca|"
           "shared::cluster.global(.tile)?.mbarrier::complete_tx::bytes.multicast::cluster acaS|global.shared::cta(.tile)?.bulk_group ca)))"},
    // 9.7.14.5 matrices of a warp, 9.7.15 of a warpgroup.
    {"mma", ".sync.aligned(.m16n8k16.row.col(.f32.(bf16.bf16|f16.f16).f32 [RD]4[RV]4[RV]2[RV]4|.f16.f16.f16.f16 [RD]2[RV]4[RV]2[RV]2)|"
            ".m16n8k8.row.col(.f32.(bf16.bf16|f16.f16).f32 [RD]4[RV]2([RV]1|S)[RV]4|.f16.f16.f16.f16 [RD]2[RV]2([RV]1|S)[RV]2))"},
    {"ldmatrix", ".sync.aligned.m8n8(.x1(.trans)?BLOCK?.b16 (r|R1)|.x2(.trans)?BLOCK?.b16 [RD]2|.x4(.trans)?BLOCK?.b16 [RD]4)a"},
    {"stmatrix", ".sync.aligned.m8n8(.x1(.trans)?BLOCK?.b16 a(r|R1)|.x2(.trans)?BLOCK?.b16 a[RV]2|.x4(.trans)?BLOCK?.b16 a[RV]4)"},
    {"movmatrix", ".sync.aligned.m8n8.trans.b16 rr"},
    {"wgmma", ".(fence|commit_group).sync.aligned |.wait_group.sync.aligned i|"
              ".mma_async.sync.aligned.m64n[0-9]+k16.(f32|f16).(bf16.bf16|f16.f16) R[0-9]+(R4r[pni]iii|rr[pni]iiii)"}};

std::regex compiled(const std::string &name, std::string form) {
  for (const auto &[word, text] : words)
    for (size_t at; (at = form.find(word)) != std::string::npos;) form.replace(at, strlen(word), text);
  for (size_t at = 0; (at = form.find('.', at)) != std::string::npos; at += 2) form.insert(at, "\\");
  return std::regex(name + "(" + form + ")", std::regex::optimize);
}

}  // namespace

// A cache policy, the last operand of a form with .L2::cache_hint, changes no result.
bool known_form(const Kernel &k, const Statement &s) {
  static const auto *const patterns = [] {
    auto *all = new std::map<std::string, std::regex>;
    for (const auto &[name, form] : forms) all->emplace(name, compiled(name, form));
    return all;
  }();
  static auto *const known = new std::map<std::string, bool>;
  const auto pattern = patterns->find(s.parts[0]);
  if (pattern == patterns->end()) return true;
  const Operand last = s.operands.empty() ? Operand() : s.operands.back();
  const bool policy = s.has("L2::cache_hint") && last.kind == Operand::kRegister && k.registers[(size_t)last.reg].kind == Register::k64;
  std::string form;
  for (const std::string &part : s.parts)
    if (!policy || part != "L2::cache_hint") form += (form.empty() ? "" : ".") + part;
  form += ' ';
  for (size_t i = 0; i + policy < s.operands.size(); ++i) form += shape(k, s.operands[i]);
  const auto [found, added] = known->emplace(form, false);
  if (added) found->second = std::regex_match(form, pattern->second);
  return found->second;
}

}  // namespace vgpu
