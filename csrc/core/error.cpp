#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace mixtral {
namespace {
thread_local char last_error[512] = "";
}

mixtral_status fail(mixtral_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case MIXTRAL_DTYPE_I32: return "int32";
    case MIXTRAL_DTYPE_I64: return "int64";
    case MIXTRAL_DTYPE_F16: return "float16";
    case MIXTRAL_DTYPE_F32: return "float32";
    case MIXTRAL_DTYPE_BF16: return "bfloat16";
    // DLPack codes of what no op takes, as the bindings pass them on.
    case 0x00010800: return "int8";
    case 0x00011000: return "int16";
    case 0x00010801: return "uint8";
    case 0x00011001: return "uint16";
    case 0x00012001: return "uint32";
    case 0x00014001: return "uint64";
    case 0x00014002: return "float64";
    case 0x00014005: return "complex64";
    case 0x00018005: return "complex128";
    case 0x00010806: return "bool";
    default: return "unknown";
  }
}

}  // namespace mixtral

extern "C" const char *mixtral_last_error(void) { return mixtral::last_error; }
