#include "report.h"

#include <cstdio>

namespace vgpu {

const char *const kClassNames[] = {"integer", "float", "convert", "move", "control", "load_global", "store_global", "load_shared",
                                   "store_shared", "local", "atomic", "collective", "barrier", "async", "matrix"};

bool Reports::add(const Report &report, int limit) {
  if (counts_[report.kind + "|" + report.kernel + "|" + report.where]++ > 0) return true;
  reports_.push_back(report);
  return (int)reports_.size() < limit;
}

std::string json_string(const std::string &s) {
  std::string out = "\"";
  for (const char c : s) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n')
      out += "\\n";
    else if ((unsigned char)c < 32)
      out += ' ';
    else
      out += c;
  }
  return out + "\"";
}

std::string Reports::json() const {
  std::string out = "[";
  for (const Report &r : reports_) {
    const int times = counts_.at(r.kind + "|" + r.kernel + "|" + r.where);
    out += (out.size() > 1 ? ", " : "") + std::string("{\"kind\": ") + json_string(r.kind) + ", \"kernel\": " + json_string(r.kernel) +
           ", \"where\": " + json_string(r.where) + ", \"thread\": " + json_string(r.thread) + ", \"text\": " + json_string(r.text) +
           ", \"statement\": " + json_string(r.statement) + ", \"times\": " + std::to_string(times) + "}";
  }
  return out + "]";
}

std::string counters_json(const std::vector<Counters> &all) {
  std::string out = "[";
  const auto number = [&](const char *name, uint64_t value) { out += std::string(", \"") + name + "\": " + std::to_string(value); };
  const auto table = [&](const char *name, const std::map<std::string, uint64_t> &values) {
    out += std::string(", \"") + name + "\": {";
    bool first = true;
    for (const auto &[key, value] : values) {
      out += (first ? "" : ", ") + json_string(key) + ": " + std::to_string(value);
      first = false;
    }
    out += "}";
  };
  for (const Counters &c : all) {
    out += (out.size() > 1 ? ", {\"kernel\": " : "{\"kernel\": ") + json_string(c.kernel);
    std::map<std::string, uint64_t> warps, threads;
    for (size_t i = 0; i < (size_t)Class::kCount; ++i) {
      if (!c.warp_instructions[i]) continue;
      warps[kClassNames[i]] = c.warp_instructions[i];
      threads[kClassNames[i]] = c.thread_instructions[i];
    }
    table("warp_instructions", warps);
    table("thread_instructions", threads);
    number("blocks", c.blocks);
    number("dynamic_shared_bytes", c.dynamic_shared_bytes);
    number("matrix_flops", c.matrix_flops);
    number("global_load_bytes", c.global_load_bytes);
    number("global_load_sectors", c.global_load_sectors);
    number("global_store_bytes", c.global_store_bytes);
    number("global_store_sectors", c.global_store_sectors);
    number("async_load_bytes", c.async_load_bytes);
    number("async_store_bytes", c.async_store_bytes);
    number("shared_wavefronts", c.shared_wavefronts);
    number("shared_conflicts", c.shared_conflicts);
    number("barriers", c.barriers);
    table("conflicts_by_line", c.conflicts_by_line);
    table("executed_by_line", c.executed_by_line);
    table("selections_by_line", c.selections_by_line);
    table("stale_loads_by_line", c.stale_loads_by_line);
    out += "}";
  }
  return out + "]";
}

}  // namespace vgpu
