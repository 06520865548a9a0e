// Linked into a program beside the virtual GPU: its arguments name=value are settings, made before main().
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

extern "C" int vgpu_set(const char *name, int64_t value);

__attribute__((constructor)) static void set(int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    const std::string setting = argv[i];
    const size_t at = setting.find('=');
    if (at != std::string::npos && !vgpu_set(setting.substr(0, at).c_str(), atoll(argv[i] + at + 1))) continue;
    fprintf(stderr, "virtual GPU: there is no such setting: %s\n", argv[i]);
    exit(1);
  }
}
