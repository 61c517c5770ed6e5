// Products of bfloat16 numbers with AVX2 and FMA, in float32: a word of weights holds two inputs of an output, and each
// becomes a float32 by one instruction. Rows are widened once for all panels. Subnormal numbers keep their values.

#pragma once

#include "avx2.h"
#include "bf16_tiles.h"
#include "chunks.h"

#if HAS_BF16

namespace {

constexpr int64_t kStepsOfPass = 4;   // of one block, before the other one's
constexpr int kRowsOfWholePanel = 3;  // up to these both blocks' sums are in registers

// ---------------------------------------------------------------------------------------------------------------------
// Sums.

// The sums of some rows and blocks over some steps. With 6 rows x 1 block, or 3 rows x 2 blocks, 12 of 16 registers hold
// sums. A row of x has the even inputs of each step, then the odd ones. What is read once is prefetched past the second
// cache, which is an eighth faster.
template <int kCount, int kBlocks, bool kOnce>
AVX2_INLINE void avx2_pass(const float* x, int64_t stride, const uint16_t* numbers, int64_t to_step, int64_t steps,
                           bool first, const char* ahead, int64_t ahead_bytes, float* sums) {
    constexpr int kVectors = 2 * kBlocks;
    __m256 total[kCount][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
            total[r][v] = first ? _mm256_setzero_ps() : _mm256_load_ps(sums + r * kPanel + v * kEight);
    const __m256i upper_halves = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    for (int64_t step = 0; step < steps; ++step, x += kStep, numbers += to_step) {
        for (int64_t pair = 0; pair < kPairs; ++pair, ahead += ahead_bytes) {
            _mm_prefetch(ahead, kOnce ? _MM_HINT_NTA : _MM_HINT_T1);
            if (kBlocks > 1) _mm_prefetch(ahead + ahead_bytes / 2, kOnce ? _MM_HINT_NTA : _MM_HINT_T1);
            __m256i words[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                words[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(
                    numbers + v / 2 * kBlockStep + pair * 2 * kBlock + v % 2 * 2 * kEight));
#pragma GCC unroll 6
            for (int r = 0; r < kCount; ++r) {
                const __m256 even = _mm256_broadcast_ss(x + r * stride + pair);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    total[r][v] = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(words[v], 16), even, total[r][v]);
            }
#pragma GCC unroll 6
            for (int r = 0; r < kCount; ++r) {
                const __m256 odd = _mm256_broadcast_ss(x + r * stride + kPairs + pair);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    total[r][v] = _mm256_fmadd_ps((__m256)_mm256_and_si256(words[v], upper_halves), odd, total[r][v]);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) _mm256_store_ps(sums + r * kPanel + v * kEight, total[r][v]);
}

template <int kCount, int kBlocks, bool kOnce>
AVX2 void avx2_tile(const float* x, int64_t stride, const Weights& weights, float* sums) {
    constexpr int kTogether = kCount <= kRowsOfWholePanel ? kBlocks : 1;
    constexpr int64_t kToStep = kBlocks * kBlockStep;
    const int64_t ahead_bytes = weights.ahead_bytes * kTogether / kBlocks / kPairs;  // with each pair of a pass
    const char* ahead = weights.ahead;
    for (int64_t step = 0; step < weights.steps; step += kStepsOfPass) {
        const int64_t steps = std::min(kStepsOfPass, weights.steps - step);
        for (int block = 0; block < kBlocks; block += kTogether, ahead += steps * kPairs * ahead_bytes)
            avx2_pass<kCount, kTogether, kOnce>(
                x + step * kStep, stride, weights.numbers + step * kToStep + block * kBlockStep, kToStep, steps,
                weights.first_step + step == 0, ahead, ahead_bytes, sums + block * kBlock);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// From sums to outputs.

AVX2_INLINE __m256i block_of(const float* sums, const float* bias) {
    __m256 low = _mm256_load_ps(sums), high = _mm256_load_ps(sums + kEight);
    if (bias) {
        low = _mm256_add_ps(low, _mm256_loadu_ps(bias));
        high = _mm256_add_ps(high, _mm256_loadu_ps(bias + kEight));
    }
    return bfloat16_of(low, high);
}

// Some panels: sums of the rows of each, and the outputs from `first` to `end`; bias: of all outputs, or null. All
// outputs of a row are written one after the other, as in avx512_finish.
AVX2 void avx2_finish(const Sums& sums, int64_t rows, const float* bias, const Output<BFloat16>& out, int64_t first,
                             int64_t end) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = first; o < end; o += kBlock) {
            const float* of_row = sums[(o - first) / kPanel] + row * kPanel + (o - first) % kPanel;
            const __m256i numbers = block_of(of_row, bias ? bias + o : nullptr);
            BFloat16* target = out.of(row, o);
            if (end - o < kBlock)
                std::memcpy(target, &numbers, (end - o) * sizeof *target);
            else if (out.streamed && reinterpret_cast<uintptr_t>(target) % sizeof numbers == 0)
                _mm256_stream_si256(reinterpret_cast<__m256i*>(target), numbers);
            else
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), numbers);
        }
    if (out.streamed) _mm_sfence();  // before another thread reads them
}

// ---------------------------------------------------------------------------------------------------------------------
// The class of tiles.

class Avx2Tiles {
  public:
    static constexpr int64_t kRows = 6;

    // A chunk of rows in float32, which a worker keeps for its next panels.
    struct Scratch {
        std::unique_ptr<float[]> rows;
        const uint16_t* of = nullptr;

        void reserve(int64_t count, int64_t inputs) { rows.reset(new float[count * distance(inputs)]); }
    };

    // All turns have about as many rows: the sums of a few rows alone would wait for each other.
    static int64_t first_row(int64_t turn, int64_t turns, int64_t rows) { return rows * turn / turns; }
    static int64_t most_rows(int64_t inputs) {
        constexpr int64_t kMostBytes = 8 << 20;  // of rows in float32
        const int64_t rows = kMostBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(inputs, 1);
        return std::max(kRows, std::min(kMaxRows, rows));
    }

    Avx2Tiles(const uint16_t* x, int64_t rows, int64_t inputs, Scratch& scratch, bool)
        : x(scratch.rows.get()), stride(distance(inputs)) {
        if (scratch.of == x) return;
        for (int64_t row = 0; row < rows; ++row) widen(x + row * inputs, inputs, scratch.rows.get() + row * stride);
        scratch.of = x;
    }

    void add(int64_t row, int64_t count, const Weights& weights, float* sums) {
        using Tile = void (*)(const float*, int64_t, const Weights&, float*);
#define OF_ROWS(rows) \
    {{avx2_tile<rows, 1, false>, avx2_tile<rows, 1, true>}, {avx2_tile<rows, 2, false>, avx2_tile<rows, 2, true>}}
        static constexpr Tile kTiles[kRows][kPanelBlocks][2] = {OF_ROWS(1), OF_ROWS(2), OF_ROWS(3),
                                                                OF_ROWS(4), OF_ROWS(5), OF_ROWS(6)};
#undef OF_ROWS
        kTiles[count - 1][weights.blocks - 1][weights.once](x + row * stride + weights.first_step * kStep, stride,
                                                            weights, sums + row * kPanel);
    }

    static constexpr auto finish = avx2_finish;

  private:
    const float* x;
    int64_t stride;

    // From a row to the next one, in floats. A power of two would put the rows of a tile into few sets of the cache.
    static int64_t distance(int64_t inputs) { return inputs + kLanes; }

    AVX2 static void widen(const uint16_t* row, int64_t inputs, float* out) {
        for (int64_t i = 0; i < inputs; i += kStep) store(out + i, load(reinterpret_cast<const BFloat16*>(row + i)));
    }
};

}  // namespace

#endif
