// Products of codes of 4 bits with those of rows, of 8 bits: a group of up to kMaxRows rows times the outputs of a panel at
// a time, for AVX-512 VNNI, for AVX2, and for every CPU. int4_linear.cpp has the layout of panels.

#pragma once

#include "integer_rows.h"

namespace {

constexpr int64_t kLine = kStepBytes;            // bytes: a pair of steps of a block, or its words
constexpr int64_t kPair = 2 * kStep;             // inputs
constexpr int64_t kMostGroup = 128;              // inputs
constexpr int64_t kStepsOfShorts = 8;            // whose products have sums that fit into 16 bits: 8 * 2 * 15 * 127
constexpr uint32_t kZeroBits = 0xffu;            // of a word

// What a group of a row has beside its codes: its scale, and the sum of its codes.
struct Factor {
    float scale, sum;
};

// One group of some rows and of a panel.
struct Operands {
    const int8_t* rows;     // codes, [row][input]
    int64_t row_bytes;      // between rows
    const Factor* factors;  // [row]
    const uint8_t* words;   // [block]
    const uint8_t* lines;   // [pair of steps][block] as the weight is packed, or [step][block] with a byte for each code
    int64_t pairs;
    float* sums;  // [rows][kPanel], to which the products are added
};

using Tile = void (*)(const Operands&);

#if HAS_X86_TILES

// ---------------------------------------------------------------------------------------------------------------------
// AVX-512 VNNI.

template <int kRows, int kBlocks, bool kPacked>
VNNI_CODE void vnni_tile(const Operands& of) {
    const int8_t* rows = of.rows;
    const uint8_t* lines = of.lines;
    const __m512i low_halves = _mm512_set1_epi8(15);
    const int64_t times = kPacked ? of.pairs : 2 * of.pairs;
    __m512i total[kRows][kBlocks];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) total[r][b] = _mm512_setzero_si512();
    for (int64_t i = 0; i < times; ++i, lines += kBlocks * kLine, rows += kPacked ? kPair : kStep) {
        __m512i weights[2][kBlocks];
#pragma GCC unroll 8
        for (int b = 0; b < kBlocks; ++b) {
            weights[0][b] = _mm512_loadu_si512(lines + b * kLine);
            if (kPacked) {
                _mm_prefetch(lines + b * kLine + kAhead, _MM_HINT_T0);
                weights[1][b] = _mm512_and_si512(_mm512_srli_epi16(weights[0][b], 4), low_halves);
                weights[0][b] = _mm512_and_si512(weights[0][b], low_halves);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < (kPacked ? 2 : 1); ++half)
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
                int32_t four;
                std::memcpy(&four, rows + r * of.row_bytes + half * kStep, sizeof four);
                const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 8
                for (int b = 0; b < kBlocks; ++b)
                    total[r][b] = _mm512_dpbusd_epi32(total[r][b], weights[half][b], codes);
            }
    }
    const __m512i zero_bits = _mm512_set1_epi32(kZeroBits);
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b) {
        const __m512i word = _mm512_loadu_si512(of.words + b * kLine);
        const __m512 scale = _mm512_castsi512_ps(word & ~zero_bits);
        const __m512 zero = __builtin_convertvector((Ints)(word & zero_bits), Floats);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            asm("" : "+v"(total[r][b]));  // or GCC keeps two copies of each sum in the loop above, most of them in memory
            const Factor& factor = of.factors[r];
            const __m512 products = __builtin_convertvector((Ints)total[r][b], Floats);
            const __m512 sum = _mm512_fnmadd_ps(zero, _mm512_set1_ps(factor.sum), products);
            float* sums = of.sums + r * kPanel + b * kBlock;
            store_floats(sums, load_floats(sums) + sum * scale * factor.scale);
        }
    }
}

template <int kRows, int kBlocks>
constexpr Tile vnni_packed = vnni_tile<kRows, kBlocks, true>;
template <int kRows, int kBlocks>
constexpr Tile vnni_unpacked = vnni_tile<kRows, kBlocks, false>;

// ---------------------------------------------------------------------------------------------------------------------
// AVX2: vpmaddubsw multiplies two unsigned bytes by two signed ones in each of 16 lanes and adds the two products, here
// without loss, since the codes of weights have 4 bits. Up to kStepsOfShorts such sums fit into 16 bits too.

// The codes of a step of 8 outputs, from a line with a byte for each, or from the low or high halves of its bytes.
template <bool kPacked, bool kHigh>
AVX2_CODE ALWAYS_INLINE __m256i codes_of(const uint8_t* line) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
    if (!kPacked) return bytes;
    return _mm256_and_si256(kHigh ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

template <bool kPacked, bool kHigh, int kRows, int kVectors>
AVX2_CODE ALWAYS_INLINE void add_products(const int8_t* rows, int64_t row_bytes, const uint8_t* line,
                                          __m256i (&some)[kRows][kVectors]) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, rows + r * row_bytes, sizeof four);
        const __m256i codes = _mm256_set1_epi32(four);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const __m256i products = _mm256_maddubs_epi16(codes_of<kPacked, kHigh>(line + v * kLine / 2), codes);
            some[r][v] = _mm256_add_epi16(some[r][v], products);
            KEEP_ORDER(some[r][v]);
        }
    }
}

// The sums of the products of some blocks. They are added in 16 bits, two sums for each output, and these in 32 bits.
template <int kRows, int kBlocks, bool kPacked>
AVX2_CODE ALWAYS_INLINE void sums_of_blocks(const Operands& of, const uint8_t* lines, int64_t step_bytes,
                                            __m256i (&total)[kRows][2 * kBlocks]) {
    const int8_t* rows = of.rows;
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t done = 0; done < of.pairs; done += kStepsOfShorts / 2) {
        __m256i some[kRows][2 * kBlocks] = {};
        const int64_t pairs = std::min(kStepsOfShorts / 2, of.pairs - done);
        for (int64_t pair = 0; pair < pairs; ++pair, rows += kPair) {
            if (kPacked) {
#pragma GCC unroll 4
                for (int b = 0; b < kBlocks; ++b) _mm_prefetch(lines + b * kLine + kAhead, _MM_HINT_T0);
            }
            add_products<kPacked, false>(rows, of.row_bytes, lines, some);
            if (!kPacked) lines += step_bytes;
            add_products<kPacked, true>(rows + kStep, of.row_bytes, lines, some);
            lines += step_bytes;
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < 2 * kBlocks; ++v)
                total[r][v] = _mm256_add_epi32(total[r][v], _mm256_madd_epi16(some[r][v], ones));
    }
}

// Multiplies some blocks of the panel, from `first` on. `step_bytes`: between lines of a block.
template <int kRows, int kBlocks, bool kPacked>
AVX2_CODE ALWAYS_INLINE void multiply_blocks(const Operands& of, int first, int64_t step_bytes) {
    __m256i total[kRows][2 * kBlocks] = {};
    sums_of_blocks<kRows, kBlocks, kPacked>(of, of.lines + first * kLine, step_bytes, total);
    const __m256i zero_bits = _mm256_set1_epi32(kZeroBits);
#pragma GCC unroll 8
    for (int v = 0; v < 2 * kBlocks; ++v) {
        const int64_t output = first * kBlock + v * kBlock / 2;
        const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of.words + output * sizeof(uint32_t)));
        const __m256 scale = _mm256_castsi256_ps(_mm256_andnot_si256(zero_bits, word));
        const __m256 zero = _mm256_cvtepi32_ps(_mm256_and_si256(word, zero_bits));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Factor& factor = of.factors[r];
            float* sums = of.sums + r * kPanel + output;
            const __m256 sum =
                _mm256_fnmadd_ps(zero, _mm256_set1_ps(factor.sum), _mm256_cvtepi32_ps(total[r][v]));
            const __m256 product = _mm256_mul_ps(_mm256_mul_ps(sum, scale), _mm256_set1_ps(factor.scale));
            _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), product));
        }
    }
}

template <int kRows, int kBlocks, bool kPacked>
AVX2_CODE void avx2_tile(const Operands& of) {
    constexpr int kAtATime = avx2_blocks(kRows, kBlocks);
    for (int b = 0; b < kBlocks; b += kAtATime)
        multiply_blocks<kRows, kAtATime, kPacked>(of, b, kBlocks * kLine);
}

template <int kRows, int kBlocks>
constexpr Tile avx2_packed = avx2_tile<kRows, kBlocks, true>;
template <int kRows, int kBlocks>
constexpr Tile avx2_unpacked = avx2_tile<kRows, kBlocks, false>;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Every CPU.

// One row times one unpacked group of `blocks` blocks, for every CPU.
CLONED void portable_row(const Operands& of, int64_t row, int64_t blocks) {
    const int8_t* codes = of.rows + row * of.row_bytes;
    const int64_t steps = 2 * of.pairs;
    Ints total[kPanelBlocks] = {};
    for (int64_t start = 0; start < steps; start += kStepsOfShorts) {
        UnsignedShorts some[kPanelBlocks] = {};  // two sums for each output
        for (int64_t step = start; step < std::min(start + kStepsOfShorts, steps); ++step) {
            const int8_t* four = codes + step * kStep;
            const auto pair = [&](int i) {  // the codes i and i + 2, as in the halves of a word of the weights
                const uint32_t low = static_cast<uint16_t>(four[i]), high = static_cast<uint16_t>(four[i + 2]);
                return (UnsignedShorts)(Words{} + (low | high << 16));
            };
            const UnsignedShorts even = pair(0), odd = pair(1);
            for (int64_t b = 0; b < blocks; ++b) {
                UnsignedShorts weights;
                std::memcpy(&weights, of.lines + (step * blocks + b) * kLine, sizeof weights);
                some[b] += (weights & 0xff) * even + (weights >> 8) * odd;
            }
        }
        for (int64_t b = 0; b < blocks; ++b) total[b] += ((Ints)((Words)some[b] << 16) >> 16) + ((Ints)some[b] >> 16);
    }
    const Factor factor = of.factors[row];
    for (int64_t b = 0; b < blocks; ++b) {
        Words word;
        std::memcpy(&word, of.words + b * kLine, sizeof word);
        const Floats zero = __builtin_convertvector((Ints)(word & kZeroBits), Floats);
        const Floats sum = __builtin_convertvector(total[b], Floats) - zero * factor.sum;
        float* sums = of.sums + row * kPanel + b * kBlock;
        store_floats(sums, load_floats(sums) + sum * (Floats)(word & ~kZeroBits) * factor.scale);
    }
}

template <int kRows, int kBlocks>
void portable_unpacked(const Operands& of) {
    for (int64_t row = 0; row < kRows; ++row) portable_row(of, row, kBlocks);
}

constexpr Tile kUnpackedTiles[][kMaxRows][kPanelBlocks] = {
    TILES(portable_unpacked),
#if HAS_X86_TILES
    TILES(avx2_unpacked),
    TILES(vnni_unpacked),
#endif
};
#if HAS_X86_TILES
constexpr Tile kPackedTiles[][kMaxRows][kPanelBlocks] = {{}, TILES(avx2_packed), TILES(vnni_packed)};
#else
constexpr auto& kPackedTiles = kUnpackedTiles;  // not used
#endif

// Writes the codes of a group with a byte for each: [step][block][output in block][4].
CLONED void unpack(const uint8_t* packed, int64_t pairs, int64_t blocks, uint8_t* steps) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
        for (int64_t b = 0; b < blocks; ++b, packed += kLine) {
            Words line;
            std::memcpy(&line, packed, sizeof line);
            __builtin_prefetch(packed + kAhead);
            const Words low = line & 0x0f0f0f0fu, high = (line >> 4) & 0x0f0f0f0fu;
            std::memcpy(steps + (2 * pair * blocks + b) * kLine, &low, sizeof low);
            std::memcpy(steps + ((2 * pair + 1) * blocks + b) * kLine, &high, sizeof high);
        }
    }
}

}  // namespace
