#include "runtime.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "decode.h"
#include "tensor_map.h"

namespace vgpu {

Device &device() {
  static Device *d = new Device;  // never destroyed: kernels are unregistered after static destructors
  return *d;
}

// Header: magic, version, header size, size of all entries. Entry: u16 kind (1: PTX), u32 header size at +4, u64 payload at +8.
std::vector<std::string> ptx_of_fat_binary(const void *data) {
  std::vector<std::string> found;
  const uint8_t *p = (const uint8_t *)data;
  uint32_t magic;
  uint16_t header;
  uint64_t size;
  memcpy(&magic, p, 4);
  memcpy(&header, p + 6, 2);
  memcpy(&size, p + 8, 8);
  if (magic != 0xba55ed50) return found;
  const uint8_t *at = p + header, *end = at + size;
  while (at < end) {
    uint16_t kind;
    uint32_t entry_header;
    uint64_t payload;
    memcpy(&kind, at, 2);
    memcpy(&entry_header, at + 4, 4);
    memcpy(&payload, at + 8, 8);
    if (kind == 1) {
      const char *text = (const char *)at + entry_header;
      found.emplace_back(text, strnlen(text, payload));
    }
    at += entry_header + payload;
  }
  return found;
}

std::unique_ptr<LoadedModule> Device::load(const std::string &ptx) {
  std::unique_ptr<LoadedModule> loaded(new LoadedModule);
  loaded->text = ptx;
  loaded->module = parse_ptx(loaded->text);
  for (Variable &v : loaded->module->variables) {
    if (v.space == Space::kShared) continue;
    if (v.bytes > 1ull << 32) throw std::runtime_error("the variable " + v.name + " has " + std::to_string(v.bytes) + " bytes, more than 4 GiB");
    std::vector<uint8_t> bytes(v.bytes + v.align, 0);
    const uint64_t address = ((uint64_t)bytes.data() + v.align - 1) / v.align * v.align;
    std::copy_n(v.initial.begin(), std::min<size_t>(v.initial.size(), v.bytes), (uint8_t *)address);
    v.address = address;
    memory.map(address, v.bytes, "the variable " + v.name, v.space == Space::kGlobal, true);
    loaded->storage.push_back(std::move(bytes));
  }
  return loaded;
}

Program *LoadedModule::program(const std::string &name) {
  std::unique_ptr<Program> &p = programs[name];
  if (!p)
    for (const auto &kernel : module->kernels)
      if (kernel->name == name) p = make_program(*module, *kernel);
  return p.get();
}

LoadedModule *FatBinary::select(int architecture) const {
  LoadedModule *best = nullptr;
  for (const auto &m : modules) {
    const int target = m->module->target;
    if (m->module->arch_specific ? target != architecture : target > architecture) continue;
    if (m->module->arch_specific && architecture == target) return m.get();
    if (!best || target > best->module->target) best = m.get();
  }
  return best;
}

std::vector<uint8_t> arguments(const Program &program, void **args) {
  std::vector<uint8_t> copy(program.param_bytes);
  for (size_t i = 0; i < program.kernel->params.size(); ++i) {
    const Variable &p = program.kernel->params[i];
    memcpy(&copy[p.address], args[i], p.bytes);
  }
  return copy;
}

bool Device::prepare(LoadedModule &loaded, const Function &function, const LaunchShape &shape, Launch &launch) {
  const auto refuse = [&](const std::string &why) {
    error = "launch of " + function.name + ": " + why;
    return false;
  };
  Program *program;
  try {
    program = loaded.program(function.name);
  } catch (const std::exception &e) {
    return refuse(e.what());
  }
  if (!program) return refuse("there is no such kernel for this architecture");
  const int target = loaded.module->target;
  if (loaded.module->arch_specific ? target != options.architecture : target > options.architecture)
    return refuse("code for sm_" + std::to_string(target) + (loaded.module->arch_specific ? "a" : "") +
                  " on a device of sm_" + std::to_string(options.architecture));
  launch.program = program;
  launch.options = options;
  launch.global = &memory;
  launch.reports = &reports;
  const uint64_t limits[3] = {0x7fffffff, 65535, 65535};
  uint64_t threads = 1, cluster = 1;
  for (int i = 0; i < 3; ++i) {
    launch.grid[i] = shape.grid[i];
    launch.block[i] = shape.block[i];
    launch.cluster[i] = shape.cluster[i] ? shape.cluster[i] : program->kernel->cluster[i] ? (uint32_t)program->kernel->cluster[i] : 1;
    if (program->kernel->cluster[i] && shape.cluster[i] && (int)shape.cluster[i] != program->kernel->cluster[i])
      return refuse("a cluster of " + std::to_string(shape.cluster[i]) + " in dimension " + std::to_string(i) + ", the kernel requires " +
                    std::to_string(program->kernel->cluster[i]));
    threads *= shape.block[i];
    cluster *= launch.cluster[i];
    if (shape.grid[i] == 0 || shape.grid[i] > limits[i])
      return refuse("a grid of " + std::to_string(shape.grid[i]) + " blocks in dimension " + std::to_string(i));
    if (shape.grid[i] % launch.cluster[i]) return refuse("a grid that is not whole clusters in dimension " + std::to_string(i));
  }
  if (threads == 0 || threads > 1024 || shape.block[0] > 1024 || shape.block[1] > 1024 || shape.block[2] > 64)  // the product may overflow
    return refuse("a block of " + std::to_string(shape.block[0]) + " x " + std::to_string(shape.block[1]) + " x " + std::to_string(shape.block[2]) +
                  " threads: expected 1 to 1024 in all, and 64 in z at most");
  if (program->kernel->max_threads && threads > (uint64_t)program->kernel->max_threads)
    return refuse("a block of " + std::to_string(threads) + " threads, __launch_bounds__ says at most " +
                  std::to_string(program->kernel->max_threads));
  if (program->kernel->required_threads && threads != (uint64_t)program->kernel->required_threads)
    return refuse("a block of " + std::to_string(threads) + " threads, the kernel requires " +
                  std::to_string(program->kernel->required_threads));
  if (cluster > 1 && options.architecture < 90) return refuse("a cluster on sm_80");
  if (cluster > (function.wide_clusters ? 16u : 8u)) return refuse("a cluster of " + std::to_string(cluster) + " blocks");
  if (shape.dynamic_shared > (uint64_t)function.max_dynamic_shared || shape.dynamic_shared + program->shared_bytes > (uint64_t)max_shared())
    return refuse(std::to_string(shape.dynamic_shared) + " bytes of dynamic shared memory; allowed are " +
                  std::to_string(function.max_dynamic_shared) +
                  " (cudaFuncAttributeMaxDynamicSharedMemorySize), and " + std::to_string(max_shared()) + " with static ones");
  launch.dynamic_shared = (uint32_t)shape.dynamic_shared;
  launch.shared_bytes = program->shared_bytes + launch.dynamic_shared;
  launch.shared = program->shared;
  if (program->dynamic) launch.shared.back().bytes = launch.dynamic_shared;
  if (shape.cooperative) {
    const uint64_t blocks = (uint64_t)shape.grid[0] * shape.grid[1] * shape.grid[2];
    const size_t most = launch.capacity();
    if (blocks > most)
      return refuse("a cooperative grid of " + std::to_string(blocks) + " blocks, of which " + std::to_string(most) + " are resident at once");
  }
  return true;
}

bool Device::launch(LoadedModule &loaded, const Function &function, const LaunchShape &shape, const std::vector<uint8_t> &arguments) {
  Launch launch;
  if (!prepare(loaded, function, shape, launch)) return false;
  launch.params = arguments;
  launch.order.id = launch.order.running = launch.order.waited_for = ++launches;
  launch.random.seed(options.seed * 0x9e3779b97f4a7c15 + ++since_clear);  // what ran before vgpu_clear changes no schedule
  if (shape.programmatic && last_runs) {  // 9.7.13.13: the wait is for the launch before, and so for what that one waited for
    launch.order.running = last.running;
    launch.order.waited_for = last_waited ? last.waited_for : last.id;
  }
  // A body guarded by __CUDA_ARCH__ for another architecture compiles to nothing, and its launch would silently do nothing.
  const auto &body = launch.program->kernel->statements;
  if (body.empty() || (body.size() == 1 && body[0].parts[0] == "ret"))
    launch.report("empty-kernel", nullptr, 0, &launch.program->code[0], "this kernel has no body for sm_" + std::to_string(loaded.module->target));
  uint64_t barrier = 0;  // what cooperative_groups counts the arrivals of blocks in, and its size
  if (shape.cooperative) {
    launch.workspace = (uint64_t)&barrier;
    memory.map(launch.workspace, sizeof(barrier), "the barrier of the grid", true, true);
  }
  launch.run();
  last = launch.order;
  last_runs = true;
  last_waited = launch.waited;
  if (shape.cooperative) memory.unmap(launch.workspace);
  counters.push_back(launch.counters);
  return true;
}

}  // namespace vgpu

// ----------------------------------------------------------------------------------------------------- for the tests

#define VGPU_API extern "C" __attribute__((visibility("default")))

using vgpu::device;

VGPU_API int vgpu_set(const char *name, int64_t value) {
  vgpu::Options &o = device().options;
  const std::string n = name;
  if (value < (n == "sm_count" || n == "max_reports" || n == "instruction_limit") || (n == "architecture" && value != 80 && value != 90)) return 1;
  if (n == "architecture") o.architecture = (int)value;
  else if (n == "sm_count") o.sm_count = (int)value;
  else if (n == "seed") o.seed = (uint64_t)value;
  else if (n == "random_completion") o.random_completion = value != 0;
  else if (n == "max_reports") o.max_reports = (int)value;
  else if (n == "instruction_limit") o.instruction_limit = (uint64_t)value;
  else return 1;
  return 0;
}

VGPU_API void vgpu_map(const void *data, uint64_t bytes, const char *name, int writable, int initialised) {
  device().memory.map((uint64_t)data, bytes, name, writable, initialised);
}

VGPU_API int vgpu_unmap(const void *data) { return !device().memory.unmap((uint64_t)data); }

// The texts stay valid until the next call of the same function.
VGPU_API const char *vgpu_reports() {
  static std::string text;
  text = device().reports.json();
  return text.c_str();
}

VGPU_API const char *vgpu_counters() {
  static std::string text;
  text = vgpu::counters_json(device().counters);
  return text.c_str();
}

VGPU_API void vgpu_clear() {
  device().reports.clear();
  device().counters.clear();
  device().since_clear = 0;
}

VGPU_API const char *vgpu_error() { return device().error.c_str(); }

VGPU_API void *vgpu_load(const char *ptx) {
  try {
    return device().load(ptx).release();
  } catch (const std::exception &e) {
    device().error = e.what();
    return nullptr;
  }
}

VGPU_API void vgpu_unload(void *module) {
  vgpu::LoadedModule *loaded = (vgpu::LoadedModule *)module;
  for (const vgpu::Variable &v : loaded->module->variables) device().memory.unmap(v.address);
  delete loaded;
}

VGPU_API int vgpu_launch(void *module, const char *kernel, const uint32_t *grid, const uint32_t *block, const uint32_t *cluster,
                         uint64_t dynamic_shared, int programmatic, int cooperative, void **args) {
  vgpu::LaunchShape shape;
  memcpy(shape.grid, grid, 12);
  memcpy(shape.block, block, 12);
  memcpy(shape.cluster, cluster, 12);
  shape.dynamic_shared = dynamic_shared;
  shape.programmatic = programmatic;
  shape.cooperative = cooperative;
  vgpu::Function function;
  function.name = kernel;
  function.max_dynamic_shared = device().max_shared();
  function.wide_clusters = true;
  vgpu::LoadedModule &loaded = *(vgpu::LoadedModule *)module;
  vgpu::Launch checked;
  if (!device().prepare(loaded, function, shape, checked)) return 1;
  return !device().launch(loaded, function, shape, vgpu::arguments(*checked.program, args));
}

// The kernels of a module and the statements in them that are not covered, as JSON.
VGPU_API const char *vgpu_describe(void *module) {
  static std::string text;
  vgpu::LoadedModule &loaded = *(vgpu::LoadedModule *)module;
  text = "[";
  for (const auto &kernel : loaded.module->kernels) {
    const vgpu::Program *p;
    try {
      p = loaded.program(kernel->name);
    } catch (const std::exception &e) {
      device().error = e.what();
      return nullptr;
    }
    text += (text.size() > 1 ? ", " : "") + std::string("{\"kernel\": ") + vgpu::json_string(kernel->name) + ", \"uncovered\": [";
    bool first = true;
    for (const vgpu::Statement *s : p->uncovered) {
      text += (first ? "" : ", ") + vgpu::json_string(s->text);
      first = false;
    }
    text += "]}";
  }
  text += "]";
  return text.c_str();
}

// The modules of the library's own kernels, to describe or to hand to ptxas.
VGPU_API int vgpu_library_modules() {
  int n = 0;
  for (const auto &binary : device().binaries) n += (int)binary->modules.size();
  return n;
}

VGPU_API void *vgpu_library_module(int index) {
  for (const auto &binary : device().binaries)
    for (const auto &module : binary->modules)
      if (index-- == 0) return module.get();
  return nullptr;
}

VGPU_API const char *vgpu_text(void *module) { return ((vgpu::LoadedModule *)module)->text.c_str(); }

VGPU_API int vgpu_encode_tiled(void *map, int type, uint32_t rank, void *address, const uint64_t *dim, const uint64_t *strides, const uint32_t *box,
                               const uint32_t *element_strides, int interleave, int swizzle, int l2, int fill) {
  return vgpu::encode_tiled(map, type, rank, address, dim, strides, box, element_strides, interleave, swizzle, l2, fill);
}
