// Products of int8 codes, up to kMaxRows rows times the outputs of a panel at a time: for AVX-512 VNNI, for AVX2, and for
// every CPU. int8_linear.cpp has the layout of panels.
//
// The codes of rows are stored as the instructions of a level take them: for AVX2 as int16, in each step of 4 inputs in
// the order 0, 2, 1, 3; otherwise as bytes with kZero added.

#pragma once

#include "integer_rows.h"

namespace {

constexpr uint8_t kZero = 128;  // the code of 0

constexpr int64_t bytes_of_code(int32_t level) { return level == kAvx2 ? sizeof(int16_t) : sizeof(uint8_t); }

// rows: the codes of the tile's rows, `row_bytes` apart; sums: [rows][kPanel].
using Tile = void (*)(const uint8_t* rows, int64_t row_bytes, const int8_t* panel, const int32_t* offsets,
                      int64_t steps, int32_t* sums);

#if HAS_X86_TILES

// ---------------------------------------------------------------------------------------------------------------------
// AVX-512 VNNI.

template <int kRows, int kBlocks>
VNNI_CODE void vnni_tile(const uint8_t* rows, int64_t row_bytes, const int8_t* panel, const int32_t* offsets,
                         int64_t steps, int32_t* sums) {
    __m512i total[kRows][kBlocks];
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
        const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_loadu_si512(offsets + b * kBlock));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) total[r][b] = start;
    }
    for (int64_t step = 0; step < steps; ++step) {
        __m512i weights[kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) weights[b] = _mm512_loadu_si512(panel + (step * kBlocks + b) * kStepBytes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            int32_t four;
            std::memcpy(&four, rows + r * row_bytes + step * kStep, sizeof four);
            const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 8
            for (int b = 0; b < kBlocks; ++b) total[r][b] = _mm512_dpbusd_epi32(total[r][b], codes, weights[b]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) _mm512_storeu_si512(sums + r * kPanel + b * kBlock, total[r][b]);
}

// ---------------------------------------------------------------------------------------------------------------------
// AVX2: vpmaddwd multiplies two numbers of 16 bits by two others in each of 8 lanes and adds the two products, without
// loss. Weights are widened as they are loaded, once for all rows of the tile. (vpmaddubsw multiplies bytes, but sums of
// two products of 8 bits do not fit into its 16.)

// The even or the odd inputs of a step of 8 outputs: the lower or the upper bytes of the halves of their words.
template <bool kOdd>
AVX2_CODE ALWAYS_INLINE __m256i widened(const int8_t* weights) {
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
    return _mm256_srai_epi16(kOdd ? pairs : _mm256_slli_epi16(pairs, 8), 8);
}

template <bool kOdd, int kRows, int kVectors>
AVX2_CODE ALWAYS_INLINE void add_products(const uint8_t* rows, int64_t row_bytes, const int8_t* weights,
                                          __m256i (&total)[kRows][kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        int32_t two;
        std::memcpy(&two, rows + r * row_bytes + kOdd * sizeof two, sizeof two);
        const __m256i codes = _mm256_set1_epi32(two);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const __m256i products = _mm256_madd_epi16(widened<kOdd>(weights + v * kStepBytes / 2), codes);
            total[r][v] = _mm256_add_epi32(total[r][v], products);
            KEEP_ORDER(total[r][v]);
        }
    }
}

// Some blocks of a panel, of which a step has `step_bytes`.
template <int kRows, int kBlocks>
AVX2_CODE ALWAYS_INLINE void multiply_blocks(const uint8_t* rows, int64_t row_bytes, const int8_t* weights,
                                             int64_t step_bytes, int64_t steps, int32_t* sums) {
    constexpr int kVectors = 2 * kBlocks;
    __m256i total[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) total[r][v] = _mm256_setzero_si256();
    for (int64_t step = 0; step < steps; ++step, weights += step_bytes, rows += kStep * sizeof(int16_t)) {
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; ++b) _mm_prefetch(weights + b * kStepBytes + kAhead, _MM_HINT_T0);
        add_products<false>(rows, row_bytes, weights, total);
        add_products<true>(rows, row_bytes, weights, total);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * kPanel + v * kBlock / 2), total[r][v]);
}

template <int kRows, int kBlocks>
AVX2_CODE void avx2_tile(const uint8_t* rows, int64_t row_bytes, const int8_t* panel, const int32_t*, int64_t steps,
                         int32_t* sums) {
    constexpr int kAtATime = avx2_blocks(kRows, kBlocks);
    for (int b = 0; b < kBlocks; b += kAtATime)
        multiply_blocks<kRows, kAtATime>(rows, row_bytes, panel + b * kStepBytes, kBlocks * kStepBytes, steps,
                                         sums + b * kBlock);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Every CPU.

// One row times `blocks` blocks, for every CPU. Two products of 8-bit numbers fit into 16 bits.
CLONED void portable_row(const uint8_t* row, const int8_t* panel, int64_t blocks, int64_t steps, int32_t* sums) {
    Ints total[kPanelBlocks] = {};
    for (int64_t step = 0; step < steps; ++step) {
        const uint8_t* four = row + step * kStep;
        const auto pair = [&](int i) {  // the codes i and i + 2, as in the halves of a word of the weights
            const uint32_t low = static_cast<uint16_t>(four[i] - kZero), high = static_cast<uint16_t>(four[i + 2] - kZero);
            return (Shorts)(Words{} + (low | high << 16));
        };
        const Shorts even = pair(0), odd = pair(1);
        for (int64_t b = 0; b < blocks; ++b) {
            Shorts weights;
            std::memcpy(&weights, panel + (step * blocks + b) * kStepBytes, sizeof weights);
            const Shorts low = (Shorts)((UnsignedShorts)weights << 8) >> 8, high = weights >> 8;
            const Ints products = (Ints)(low * even + high * odd);
            total[b] += ((Ints)((Words)products << 16) >> 16) + (products >> 16);
        }
    }
    std::memcpy(sums, total, sizeof total);
}

template <int kRows, int kBlocks>
void portable_tile(const uint8_t* rows, int64_t row_bytes, const int8_t* panel, const int32_t*, int64_t steps,
                   int32_t* sums) {
    for (int r = 0; r < kRows; ++r) portable_row(rows + r * row_bytes, panel, kBlocks, steps, sums + r * kPanel);
}

constexpr Tile kTiles[][kMaxRows][kPanelBlocks] = {
    TILES(portable_tile),
#if HAS_X86_TILES
    TILES(avx2_tile),
    TILES(vnni_tile),
#endif
};

}  // namespace
