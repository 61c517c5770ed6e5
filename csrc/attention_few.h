// Attention of few rows with AVX512-BF16: keys and values are multiplied as they are read, and not packed in memory
// before, which pays only if many rows use them. Every sum is formed in the order of attention_tiles.h, so a row has
// the bits that it has among many.
//
// What differs between types of the cache is a class Elements:
//
//  * kWords, the number of words of a key that come from 32 bits of the cache, and Table, what it needs in registers;
//  * `words`, which makes them of 16 transposed keys;
//  * `pairs`, which makes the words of two tokens' values, for 32 elements of the head.
//
// A file that includes this one defines FEW_TARGET, the instruction sets that its classes use.

#pragma once

#include "avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define FEW __attribute__((target(FEW_TARGET)))
#define FEW_INLINE static inline __attribute__((always_inline, target(FEW_TARGET)))

namespace {

constexpr int64_t kMostFewRows = 8;  // as there are registers for

// The scores of Vectors * 16 keys for Rows rows. Several vectors are computed together, since the additions of a sum
// wait for each other.
template <class Elements, int Rows, int Vectors>
FEW_INLINE void score_keys(const FewRows& few, const Tile& tile, int64_t first) {
    constexpr int64_t kBytes = 64, kElementBytes = 2 / Elements::kWords;
    const typename Elements::Table table = Elements::table();
    __m512 sums[Vectors][Rows];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) sums[v][r] = _mm512_setzero_ps();
    const int64_t* offsets = tile.offsets + first;
    const uint32_t* word = few.a;
    const int64_t size = tile.head_dim * kElementBytes, padded_size = padded_dim(tile.head_dim) * kElementBytes;
    for (int64_t byte = 0; byte < size; byte += kBytes, word += Elements::kWords * kLanes) {
        const __mmask64 mask = first_bytes(size - byte);
        // A query has no words behind its padding.
        const int64_t used = std::min(kLanes, (padded_size - byte) / static_cast<int64_t>(sizeof(uint32_t)));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            __m512i keys[kLanes];
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) keys[t] = load_bytes(tile.head + offsets[v * kLanes + t] + byte, mask);
            transpose(keys);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                if (Elements::kWords > 1 && i >= used) break;
                __m512i words[Elements::kWords];
                Elements::words(keys[i], table, words);
#pragma GCC unroll 2
                for (int w = 0; w < Elements::kWords; ++w)
#pragma GCC unroll 8
                    for (int r = 0; r < Rows; ++r) {
                        const uint32_t own = word[r * few.a_stride + i * Elements::kWords + w];
                        sums[v][r] = _mm512_dpbf16_ps(sums[v][r], (__m512bh)words[w],
                                                      (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(own)));
                    }
            }
            tile.next->lines(kLanes);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) _mm512_storeu_ps(few.c + r * few.c_stride + first + v * kLanes, sums[v][r]);
}

template <class Elements, int Rows>
FEW_INLINE void score_rows(const FewRows& few, const Tile& tile, int64_t vectors) {
    constexpr int kTogether = Rows <= 4 ? 2 : 1;  // as there are registers for
    int64_t vector = 0;
    for (; vector + kTogether <= vectors; vector += kTogether)
        score_keys<Elements, Rows, kTogether>(few, tile, vector * kLanes);
    if (vector < vectors) score_keys<Elements, Rows, 1>(few, tile, vector * kLanes);
}

// The weighted sums of Chunks * 32 elements from `d` on, for Rows rows.
template <class Elements, int Rows, int Chunks>
FEW_INLINE void sum_elements(const FewRows& few, const Tile& tile, int64_t first, int64_t end, int64_t d) {
    constexpr int64_t kElementBytes = 2 / Elements::kWords;
    const typename Elements::Table table = Elements::table();
    __mmask32 masks[Chunks];
    __m512 sums[Rows][Chunks][2];
#pragma GCC unroll 4
    for (int c = 0; c < Chunks; ++c) masks[c] = static_cast<__mmask32>(first_bytes(tile.head_dim - d - c * kChunk));
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
                sums[r][c][half] = _mm512_loadu_ps(few.c + r * few.c_stride + d + c * kChunk + half * kLanes);
    for (int64_t word = first / 2; 2 * word < end; ++word) {
        const TokenPair pair(word, first, end);
        const char* even_row = tile.head + tile.offsets[pair.even] + d * kElementBytes;
        const char* odd_row = tile.head + tile.offsets[pair.odd] + d * kElementBytes;
#pragma GCC unroll 4
        for (int c = 0; c < Chunks; ++c) {
            __m512i words[2];
            Elements::pairs(even_row + c * kChunk * kElementBytes, odd_row + c * kChunk * kElementBytes,
                            pair.even_mask & masks[c], pair.odd_mask & masks[c], table, words);
#pragma GCC unroll 8
            for (int r = 0; r < Rows; ++r) {
                const __m512bh own =
                    (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(few.a[r * few.a_stride + word]));
                sums[r][c][0] = _mm512_dpbf16_ps(sums[r][c][0], (__m512bh)words[0], own);
                sums[r][c][1] = _mm512_dpbf16_ps(sums[r][c][1], (__m512bh)words[1], own);
            }
        }
        tile.next->lines(Chunks * kElementBytes);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < Chunks; ++c)
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
                _mm512_storeu_ps(few.c + r * few.c_stride + d + c * kChunk + half * kLanes, sums[r][c][half]);
}

template <class Elements, int Rows>
FEW_INLINE void sum_rows(const FewRows& few, const Tile& tile, int64_t first, int64_t end) {
    constexpr int kTogether = Rows <= 2 ? 4 : Rows <= 4 ? 2 : 1;  // as there are registers for
    int64_t d = 0;
    for (; d + kTogether * kChunk <= padded_dim(tile.head_dim); d += kTogether * kChunk)
        sum_elements<Elements, Rows, kTogether>(few, tile, first, end, d);
    for (; d < padded_dim(tile.head_dim); d += kChunk) sum_elements<Elements, Rows, 1>(few, tile, first, end, d);
}

template <class Elements>
FEW void multiply_few_keys(const FewRows& few, const Tile& tile, int64_t vectors) {
    switch (few.rows) {
        case 1: return score_rows<Elements, 1>(few, tile, vectors);
        case 2: return score_rows<Elements, 2>(few, tile, vectors);
        case 3: return score_rows<Elements, 3>(few, tile, vectors);
        case 4: return score_rows<Elements, 4>(few, tile, vectors);
        case 5: return score_rows<Elements, 5>(few, tile, vectors);
        case 6: return score_rows<Elements, 6>(few, tile, vectors);
        case 7: return score_rows<Elements, 7>(few, tile, vectors);
        default: return score_rows<Elements, kMostFewRows>(few, tile, vectors);
    }
}

template <class Elements>
FEW void add_few_values(const FewRows& few, const Tile& tile, int64_t first, int64_t end) {
    switch (few.rows) {
        case 1: return sum_rows<Elements, 1>(few, tile, first, end);
        case 2: return sum_rows<Elements, 2>(few, tile, first, end);
        case 3: return sum_rows<Elements, 3>(few, tile, first, end);
        case 4: return sum_rows<Elements, 4>(few, tile, first, end);
        case 5: return sum_rows<Elements, 5>(few, tile, first, end);
        case 6: return sum_rows<Elements, 6>(few, tile, first, end);
        case 7: return sum_rows<Elements, 7>(few, tile, first, end);
        default: return sum_rows<Elements, kMostFewRows>(few, tile, first, end);
    }
}

}  // namespace

#endif
