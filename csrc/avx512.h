// What the files with AVX-512 share: targets, loads of bytes, and the transposition of keys.

#pragma once

#include "attention_tiles.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms in GCC 12's immintrin.h
#endif

#define AVX512 __attribute__((target("arch=x86-64-v4")))
#define AVX512_INLINE static inline __attribute__((always_inline, target("arch=x86-64-v4")))

namespace {

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

// Transposes 16 x 16 words: first within the 128-bit lanes of four rows each, then the lanes.
AVX512_INLINE void transpose(__m512i (&rows)[16]) {
    __m512i quads[4][4];  // quads[i][c]: columns c, c + 4, c + 8 and c + 12 of the rows 4 i to 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i low_01 = _mm512_unpacklo_epi32(rows[4 * i], rows[4 * i + 1]);
        const __m512i high_01 = _mm512_unpackhi_epi32(rows[4 * i], rows[4 * i + 1]);
        const __m512i low_23 = _mm512_unpacklo_epi32(rows[4 * i + 2], rows[4 * i + 3]);
        const __m512i high_23 = _mm512_unpackhi_epi32(rows[4 * i + 2], rows[4 * i + 3]);
        quads[i][0] = _mm512_unpacklo_epi64(low_01, low_23);
        quads[i][1] = _mm512_unpackhi_epi64(low_01, low_23);
        quads[i][2] = _mm512_unpacklo_epi64(high_01, high_23);
        quads[i][3] = _mm512_unpackhi_epi64(high_01, high_23);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low_01 = _mm512_shuffle_i32x4(quads[0][c], quads[1][c], 0x44);
        const __m512i high_01 = _mm512_shuffle_i32x4(quads[0][c], quads[1][c], 0xee);
        const __m512i low_23 = _mm512_shuffle_i32x4(quads[2][c], quads[3][c], 0x44);
        const __m512i high_23 = _mm512_shuffle_i32x4(quads[2][c], quads[3][c], 0xee);
        rows[c] = _mm512_shuffle_i32x4(low_01, low_23, 0x88);
        rows[c + 4] = _mm512_shuffle_i32x4(low_01, low_23, 0xdd);
        rows[c + 8] = _mm512_shuffle_i32x4(high_01, high_23, 0x88);
        rows[c + 12] = _mm512_shuffle_i32x4(high_01, high_23, 0xdd);
    }
}

// Loads 64 bytes, or only the first ones: the mask says which. The others are 0.
AVX512_INLINE __m512i load_bytes(const void* p, __mmask64 mask) { return _mm512_maskz_loadu_epi8(mask, p); }

AVX512_INLINE __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~__mmask64(0) : (__mmask64(1) << std::max<int64_t>(0, count)) - 1;
}

// The two tokens of a word of values, of the tokens from `first` to `end`. One outside is absent, and not to be read: the
// place of the other one stands for it. Masks have all bits or none.
struct TokenPair {
    int64_t even, odd;
    uint32_t even_mask, odd_mask;

    TokenPair(int64_t pair, int64_t first, int64_t end)
        : even(std::max(2 * pair, first)),
          odd(std::min(2 * pair + 1, end - 1)),
          even_mask(even == 2 * pair ? ~0u : 0),
          odd_mask(odd == 2 * pair ? 0 : ~0u) {}
};

}  // namespace

#endif
