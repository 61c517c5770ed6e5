// The library _quantized: linear layers with weights in 8 and 4 bits. Here is what Python asks it first.

#include "integer_rows.h"

namespace {
constexpr int32_t kAbiVersion = 4;
}

EXPORT int32_t shoal_quantized_abi_version() { return kAbiVersion; }

// The best level of this CPU.
EXPORT int32_t shoal_quantized_level() {
#if HAS_X86_TILES
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        return kVnni;
    if (avx2) return kAvx2;
#endif
    return kPortable;
}
