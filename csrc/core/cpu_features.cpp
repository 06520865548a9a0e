#include "cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mixtral {

#if defined(__x86_64__)
namespace {

// AMX state is off until a process asks for it (Linux arch_prctl ARCH_REQ_XCOMP_PERM, component 18 = XTILEDATA).
bool request_amx() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  return tile && bf16 && request_amx();
}

}  // namespace

bool cpu_has(mixtral_arch arch) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (arch) {
    case MIXTRAL_ARCH_CPU_PORTABLE: return true;
    case MIXTRAL_ARCH_CPU_AVX2: return avx2;
    case MIXTRAL_ARCH_CPU_AVX512: return avx512;
    case MIXTRAL_ARCH_CPU_AVX512_BF16: return avx512_bf16;
    case MIXTRAL_ARCH_CPU_AMX: return avx512_bf16 && has_amx_bf16();
    default: return false;
  }
}
#else
bool cpu_has(mixtral_arch arch) { return arch == MIXTRAL_ARCH_CPU_PORTABLE; }
#endif

}  // namespace mixtral
