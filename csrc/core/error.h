// The thread-local message behind mixtral_last_error().
#pragma once
#include "../include/mixtral_ext.h"

namespace mixtral {

// Formats the message as printf does, keeps it for mixtral_last_error() and returns `status`.
__attribute__((format(printf, 2, 3))) mixtral_status fail(mixtral_status status, const char *format, ...);

// "bfloat16" for MIXTRAL_DTYPE_BF16; the other common DLPack types have their names too, the rest is "unknown".
const char *dtype_name(int32_t dtype);

}  // namespace mixtral
