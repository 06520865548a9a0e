#include "strong.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace vgpu {
namespace {

uint64_t key_of(const Warp &w, const Span &span) {
  if (span.space == Space::kGlobal) return span.at;
  uint64_t owner = 0;
  for (const auto &cta : w.cta->cluster->ctas)
    if (&cta->shared.shadow == span.shadow) owner = cta->index;
  return span.at | (owner + 1) << 40 | 1ull << 63;
}

Access by(const Warp &w, int lane) {
  Access a;
  a.cta = w.cta->index;
  a.lanes = 1u << lane;
  a.epoch = w.epoch;
  a.warp = (uint8_t)w.index;
  return a;
}

}  // namespace

Replaced *old_value(Warp &w, int lane, const Inst &in, const Span &span, unsigned bytes, bool atomic) {
  Launch &launch = w.launch();
  const uint64_t key = key_of(w, span);
  const auto found = launch.strong.replaced.find(key / 16);
  if (found == launch.strong.replaced.end()) return nullptr;
  const Actor who = actor(w, lane, in);
  Replaced *old = nullptr;
  for (Replaced &r : found->second) {
    if (r.key + r.bytes <= key || r.key >= key + bytes) continue;
    // No value is read that is older than a write which precedes the read in causality order (8.10, axiom "Causality"): by itself, by a
    // read that observed it (8.9.5), or by the order of fence.sc (8.9.4).
    const auto before = [&](const Access &a) { return happened_before(a, who.clock, who) || happened_before(a, w.cta->ordered.get(), who); };
    if (before(r.writer) || std::any_of(r.seen.begin(), r.seen.end(), before)) continue;
    // One that overlaps, of another size, is not told apart into bytes: it gets the newest value.
    if (!atomic && r.key == key && r.bytes == bytes && launch.chance(2))
      old = &r;
    else
      r.seen.push_back(by(w, lane));
  }
  if (old) ++launch.counters.stale_loads_by_line[launch.program->where(in)];
  return old;
}

void observe(Warp &w, int lane, const Span &span, Replaced *old, int order, int scope) {
  Published *from = old ? &old->published : nullptr;
  if (!old) {
    const auto found = w.launch().strong.published.find(key_of(w, span));
    if (found == w.launch().strong.published.end()) return;
    from = &found->second;
  }
  ClockBuilder seen, seen_of_cta;
  const auto own = from->of_cta.find(w.cta->index);
  if (own != from->of_cta.end()) seen_of_cta.join(own->second.freeze_if_any());
  seen.join(seen_of_cta.freeze_if_any());
  if (scope != kCtaScope) seen.join(from->clock.freeze_if_any());
  Knowledge told;
  told.fenced_shared = from->fenced_shared.freeze_if_any();
  told.fenced_global = from->fenced_global.freeze_if_any();
  if (order == kAcquire || order == kAcquireRelease) {
    told.clock = seen.freeze_if_any();
  } else {
    told.pending = seen.freeze_if_any();
    seen_of_cta.join(w.lanes[(size_t)lane].pending_cta);
    w.lanes[(size_t)lane].pending_cta = seen_of_cta.freeze_if_any();
  }
  acquire(w, 1u << lane, told);
}

void replace(Warp &w, int lane, const Span &span, unsigned bytes) {
  Launch &launch = w.launch();
  if (!launch.options.seed) return;
  Replaced r;
  r.key = key_of(w, span);
  r.bytes = bytes;
  memcpy(r.data, span.data, bytes);
  r.valid = 0;
  for (unsigned i = 0; i < bytes; ++i) r.valid |= (uint16_t)(span.shadow->valid(span.cells + ((span.at & 3) + i) / 4, span.at + i, 1) << i);
  r.writer = by(w, lane);
  if (const auto found = launch.strong.published.find(r.key); found != launch.strong.published.end()) r.published = found->second;
  std::vector<Replaced> &here = launch.strong.replaced[r.key / 16];
  for (size_t i = here.size(); i-- > 0;)
    if (here[i].key < r.key + bytes && r.key < here[i].key + here[i].bytes) here.erase(here.begin() + (long)i);
  here.push_back(std::move(r));
}

void publish(Warp &w, int lane, const Span &span, int order, int scope, bool atomic) {
  StrongMemory &strong = w.launch().strong;
  const uint64_t key = key_of(w, span);
  const std::pair<uint64_t, uint64_t> own{key, (uint64_t)w.cta->index << 16 | (uint64_t)(w.index * 32 + lane)};
  Published &here = strong.published[key];
  if (!atomic) here = Published();
  const Lane &l = w.lanes[(size_t)lane];
  if (order == kRelease || order == kAcquireRelease) {
    KnowledgeBuilder all;
    release(w, 1u << lane, all);
    Release &mine = strong.releases[own];
    mine.of_cta = all.clock().freeze();
    if (scope != kCtaScope) mine.wide = mine.of_cta;
  }
  const auto found = strong.releases.find(own);
  for (const Release &r : {Release{l.released, l.released_cta}, found == strong.releases.end() ? Release() : found->second}) {
    if (scope != kCtaScope) here.clock.join(r.wide);
    if (r.of_cta) here.of_cta[w.cta->index].join(r.of_cta);
  }
  here.fenced_shared.join(l.fenced_shared);
  here.fenced_global.join(l.fenced_global);
}

}  // namespace vgpu
