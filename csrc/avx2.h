// What the files with AVX2 share: targets, and rounding to bfloat16.

#pragma once

#include "common.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX2_INLINE static inline __attribute__((always_inline, target("avx2,fma,f16c")))

namespace {

constexpr int64_t kEight = 8;  // numbers of a vector

inline bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// Rounds to nearest even. A NaN stays a NaN: rounding it up could carry into the sign.
AVX2_INLINE __m256i bfloat16_of(__m256 x) {
    const __m256i bits = (__m256i)x;
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_srli_epi32((__m256i)_mm256_blendv_ps((__m256)rounded, (__m256)quiet, is_nan), 16);
}

// 16 numbers.
AVX2_INLINE __m256i bfloat16_of(__m256 low, __m256 high) {
    constexpr int kInOrder = 0xd8;  // 0, 2, 1, 3: the vectors are packed in halves
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat16_of(low), bfloat16_of(high)), kInOrder);
}

}  // namespace

#endif
