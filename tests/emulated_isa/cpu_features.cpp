// Replaces core/cpu_features.cpp: with emulated instructions every architecture is there.
#include "../../csrc/core/cpu_features.h"

namespace mixtral {
bool cpu_has(mixtral_arch arch) { return arch >= MIXTRAL_ARCH_CPU_PORTABLE && arch <= MIXTRAL_ARCH_CPU_AMX; }
}  // namespace mixtral
