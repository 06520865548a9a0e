// Which CPU kernels this machine can run.
#pragma once
#include "../include/mixtral_ext.h"

namespace mixtral {

// True if instructions and operating system allow `arch` (one of MIXTRAL_ARCH_CPU_*). Asking for AMX requests the tile
// state from the kernel for this process; that may be refused, and then AMX is not there.
bool cpu_has(mixtral_arch arch);

}  // namespace mixtral
