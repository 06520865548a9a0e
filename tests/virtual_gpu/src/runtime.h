// The device behind the substitute CUDA runtime: modules, functions, memory, and what the launches left behind.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace vgpu {

struct LoadedModule {
  std::string text;
  std::unique_ptr<Module> module;
  std::map<std::string, std::unique_ptr<Program>> programs;
  std::vector<std::vector<uint8_t>> storage;  // of .global and .const variables

  Program *program(const std::string &kernel);  // null if there is none
};

// A fat binary: one PTX text for each architecture that it was compiled for.
struct FatBinary {
  std::vector<std::unique_ptr<LoadedModule>> modules;
  LoadedModule *select(int architecture) const;  // sm_90a code for 90, else the newest that is not newer than the device
};

struct Function {
  FatBinary *binary = nullptr;
  std::string name;
  int max_dynamic_shared = 48 * 1024;
  bool wide_clusters = false;  // cudaFuncAttributeNonPortableClusterSizeAllowed
};

struct LaunchShape {
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {0, 0, 0};
  uint64_t dynamic_shared = 0;
  bool cooperative = false;   // cudaLaunchAttributeCooperative: all blocks are resident at once, and may wait for each other
  bool programmatic = false;  // cudaLaunchAttributeProgrammaticStreamSerialization: may start before the launch before it ends
};

struct Device {
  Options options;
  GlobalMemory memory;
  Reports reports;
  std::vector<Counters> counters;
  uint64_t launches = 0, since_clear = 0;
  LaunchOrder last;         // the launch before
  bool last_runs = false;   // for all the host knows: it did not synchronise since
  bool last_waited = false;
  std::vector<std::unique_ptr<FatBinary>> binaries;
  std::map<const void *, Function> functions;
  std::string error;  // why the last launch or load failed

  int max_shared() const { return options.architecture >= 90 ? 227 * 1024 : 163 * 1024; }
  std::unique_ptr<LoadedModule> load(const std::string &ptx);
  // Both are false (and `error`) for a launch that the driver would refuse; problems of the kernel itself go to `reports`.
  bool prepare(LoadedModule &module, const Function &function, const LaunchShape &shape, Launch &launch);
  bool launch(LoadedModule &module, const Function &function, const LaunchShape &shape, const std::vector<uint8_t> &arguments);
};

Device &device();
std::vector<uint8_t> arguments(const Program &program, void **args);  // a copy of what they point to, as the kernel reads it
std::vector<std::string> ptx_of_fat_binary(const void *data);

}  // namespace vgpu
