// The library _quantized: linear layers with weights in 8 and 4 bits. Here is what Python asks it first.

#include "integer_rows.h"

namespace {
constexpr int32_t kAbiVersion = 2;
}

EXPORT int32_t shoal_quantized_abi_version() { return kAbiVersion; }

// The best level of this CPU.
EXPORT int32_t shoal_quantized_level() {
#if HAS_VNNI
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return kVnni;
#endif
    return kPortable;
}
