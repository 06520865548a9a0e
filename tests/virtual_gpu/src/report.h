// What went wrong, and what it cost.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "isa.h"

namespace vgpu {

struct Report {
  std::string kind, kernel, where, thread, text, statement;
};

class Reports {
 public:
  // Keeps the first of each kind and source line; false when there are more than `limit`.
  bool add(const Report &report, int limit);
  bool empty() const { return reports_.empty(); }
  void clear() { reports_.clear(); counts_.clear(); }
  std::string json() const;

 private:
  std::vector<Report> reports_;
  std::map<std::string, int> counts_;
};

struct Counters {
  std::string kernel;
  uint64_t blocks = 0, dynamic_shared_bytes = 0;         // of the grid; of one block
  std::array<uint64_t, (size_t)Class::kCount> warp_instructions{}, thread_instructions{};
  uint64_t matrix_flops = 0;
  uint64_t global_load_bytes = 0, global_load_sectors = 0, global_store_bytes = 0, global_store_sectors = 0;
  uint64_t async_load_bytes = 0, async_store_bytes = 0;  // cp.async and bulk copies from and to global memory
  uint64_t shared_wavefronts = 0, shared_conflicts = 0;  // beyond the least number that the access needs
  std::map<std::string, uint64_t> conflicts_by_line;
  std::map<std::string, uint64_t> stale_loads_by_line;   // strong loads that did not return the newest value
  uint64_t barriers = 0;
  std::map<std::string, uint64_t> executed_by_line;      // warp instructions of the matrix and async classes, by source line
  std::map<std::string, uint64_t> selections_by_line;    // and of selp
};

std::string counters_json(const std::vector<Counters> &all);
std::string json_string(const std::string &s);

}  // namespace vgpu
