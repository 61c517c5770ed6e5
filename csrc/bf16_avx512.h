// Products of bfloat16 numbers with AVX-512 BF16 or with AMX, which multiply pairs. Subnormal numbers count as 0.

#pragma once

#include "bf16_tiles.h"

#if HAS_BF16

#include <sys/syscall.h>
#include <unistd.h>

#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define TARGET_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,amx-tile,amx-bf16")))

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// From sums to outputs.

// Some panels: sums of the rows of each, and the outputs from `first` to `end`; bias: of all outputs, or null. All
// outputs of a row are written one after the other: rows are so far apart that each takes another page, and few of
// them fit into the cache at a time.
TARGET_AVX512 void avx512_finish(const Sums& sums, int64_t rows, const float* bias, const Output<BFloat16>& out, int64_t first,
                                 int64_t end) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t o = first; o < end; o += kPanel) {
            const float* of_row = sums[(o - first) / kPanel] + row * kPanel;
            __m512 low = _mm512_load_ps(of_row), high = _mm512_load_ps(of_row + kBlock);
            if (bias) {
                low = _mm512_add_ps(low, _mm512_loadu_ps(bias + o));
                high = _mm512_add_ps(high, _mm512_loadu_ps(bias + o + kBlock));
            }
            const __m512i numbers = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            BFloat16* target = out.of(row, o);
            if (out.streamed && end - o >= kPanel && reinterpret_cast<uintptr_t>(target) % sizeof numbers == 0)
                _mm512_stream_si512(reinterpret_cast<__m512i*>(target), numbers);
            else
                _mm512_mask_storeu_epi16(target, end - o < kPanel ? (1u << (end - o)) - 1 : ~0u, numbers);
        }
    if (out.streamed) _mm_sfence();  // before another thread reads them
}

// ---------------------------------------------------------------------------------------------------------------------
// AVX-512: the sums of 12 rows x 2 blocks, two vectors of weights and a pair of a row are in registers.

template <int kCount, int kBlocks>
TARGET_AVX512 void avx512_tile(const uint16_t* x, int64_t stride, const Weights& weights, float* sums) {
    __m512 total[kCount][kBlocks];
#pragma GCC unroll 12
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b)
            total[r][b] = weights.first_step ? _mm512_load_ps(sums + r * kPanel + b * kBlock) : _mm512_setzero_ps();
    const uint16_t* numbers = weights.numbers;
    const char* ahead = weights.ahead;
    const int64_t ahead_bytes = weights.ahead_bytes / kPairs;
    for (int64_t step = 0; step < weights.steps; ++step, x += kStep, numbers += kBlocks * kBlockStep) {
        for (int64_t pair = 0; pair < kPairs; ++pair, ahead += ahead_bytes) {
            _mm_prefetch(ahead, _MM_HINT_T1);
            if (kBlocks > 1) _mm_prefetch(ahead + ahead_bytes / 2, _MM_HINT_T1);
            __m512bh of_blocks[kBlocks];
#pragma GCC unroll 2
            for (int b = 0; b < kBlocks; ++b)
                of_blocks[b] = (__m512bh)_mm512_loadu_si512(numbers + b * kBlockStep + pair * 2 * kBlock);
#pragma GCC unroll 12
            for (int r = 0; r < kCount; ++r) {
                int32_t two;
                std::memcpy(&two, x + r * stride + pair * 2, sizeof two);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 2
                for (int b = 0; b < kBlocks; ++b) total[r][b] = _mm512_dpbf16_ps(total[r][b], of_blocks[b], both);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kCount; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(sums + r * kPanel + b * kBlock, total[r][b]);
}

class Avx512Tiles {
  public:
    static constexpr int64_t kRows = 12;
    struct Scratch {
        void reserve(int64_t, int64_t) {}
    };
    static constexpr auto finish = avx512_finish;

    // All turns have about as many rows: the sums of a few rows alone would wait for each other.
    static int64_t first_row(int64_t turn, int64_t turns, int64_t rows) { return rows * turn / turns; }
    static int64_t most_rows(int64_t) { return kMaxRows; }

    Avx512Tiles(const uint16_t* x, int64_t, int64_t inputs, Scratch&, bool) : x(x), inputs(inputs) {}

    void add(int64_t row, int64_t count, const Weights& weights, float* sums) {
        using Tile = void (*)(const uint16_t*, int64_t, const Weights&, float*);
#define OF_ROWS(rows) {avx512_tile<rows, 1>, avx512_tile<rows, 2>}
        static constexpr Tile kTiles[kRows][kPanelBlocks] = {OF_ROWS(1),  OF_ROWS(2),  OF_ROWS(3), OF_ROWS(4),
                                                             OF_ROWS(5),  OF_ROWS(6),  OF_ROWS(7), OF_ROWS(8),
                                                             OF_ROWS(9),  OF_ROWS(10), OF_ROWS(11), OF_ROWS(12)};
#undef OF_ROWS
        kTiles[count - 1][weights.blocks - 1](x + row * inputs + weights.first_step * kStep, inputs, weights,
                                              sums + row * kPanel);
    }

  private:
    const uint16_t* x;
    int64_t inputs;
};

// ---------------------------------------------------------------------------------------------------------------------
// AMX: 2 x 16 rows. The registers, which hold tiles of 16 rows of 64 bytes: 0 to 3 for sums, 4 and 5 for rows, 6 and 7
// for weights.

constexpr int64_t kTileRows = 16;

// Asks the kernel of the operating system for the use of AMX, which a process may not use at first.
bool amx_is_allowed() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Rows that are `to_row` numbers apart, whose steps are `to_step` numbers apart.
struct Rows {
    const uint16_t* numbers;
    int64_t to_row, to_step;
};

template <int kTiles, int kBlocks>
TARGET_AMX void amx_tile(const Rows& rows, const Weights& weights, float* sums) {
    constexpr int64_t kSums = kPanel * sizeof(float), kPairsOfBlock = 2 * kBlock * sizeof(uint16_t);
    const uint16_t *x = rows.numbers, *below = x + kTileRows * rows.to_row, *numbers = weights.numbers;
    float* sums_below = sums + kTileRows * kPanel;
    const int64_t to_row = rows.to_row * sizeof(uint16_t);
    const char* ahead = weights.ahead;
    if (weights.first_step == 0) {
        _tile_zero(0);
        if (kBlocks > 1) _tile_zero(1);
        if (kTiles > 1) _tile_zero(2);
        if (kTiles > 1 && kBlocks > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, kSums);
        if (kBlocks > 1) _tile_loadd(1, sums + kBlock, kSums);
        if (kTiles > 1) _tile_loadd(2, sums_below, kSums);
        if (kTiles > 1 && kBlocks > 1) _tile_loadd(3, sums_below + kBlock, kSums);
    }
    for (int64_t step = 0; step < weights.steps; ++step) {
        for (int64_t byte = 0; byte < weights.ahead_bytes; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
        ahead += weights.ahead_bytes;
        _tile_loadd(4, x, to_row);
        _tile_loadd(6, numbers, kPairsOfBlock);
        _tile_dpbf16ps(0, 4, 6);
        if (kBlocks > 1) {
            _tile_loadd(7, numbers + kBlockStep, kPairsOfBlock);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (kTiles > 1) {
            _tile_loadd(5, below, to_row);
            _tile_dpbf16ps(2, 5, 6);
            if (kBlocks > 1) _tile_dpbf16ps(3, 5, 7);
        }
        x += rows.to_step, below += rows.to_step, numbers += kBlocks * kBlockStep;
    }
    _tile_stored(0, sums, kSums);
    if (kBlocks > 1) _tile_stored(1, sums + kBlock, kSums);
    if (kTiles > 1) _tile_stored(2, sums_below, kSums);
    if (kTiles > 1 && kBlocks > 1) _tile_stored(3, sums_below + kBlock, kSums);
}

class AmxTiles {
  public:
    static constexpr int64_t kRows = 2 * kTileRows;
    static constexpr auto finish = avx512_finish;

    // A tile takes as long with fewer rows.
    static int64_t first_row(int64_t turn, int64_t, int64_t rows) { return std::min(turn * kRows, rows); }
    static int64_t most_rows(int64_t inputs) {
        constexpr int64_t kMostBytes = 8 << 20;  // of the copy below
        return std::max(kRows, std::min(kMaxRows, kMostBytes / 2 / std::max<int64_t>(inputs, 1)));
    }

    // A copy of the rows of a chunk, which a worker keeps for its next panels.
    struct Scratch {
        std::unique_ptr<uint16_t[]> copy;
        const uint16_t* of = nullptr;
        int64_t size = 0;

        void reserve(int64_t, int64_t) {}  // most calls need no copy
    };

    // A tile of rows as they are in memory is 16 cache lines far apart. So many rows that a worker uses again are
    // copied tile by tile: [kRows rows][step][row][input]. Other rows are read in place, and all if memory is out.
    AmxTiles(const uint16_t* x, int64_t rows, int64_t inputs, Scratch& scratch, bool reused)
        : x{x, inputs, kStep}, inputs(inputs) {
        if (rows > kRows && reused && copied(x, rows, inputs, scratch))
            this->x = {scratch.copy.get(), kStep, kRows * kStep};
    }
    TARGET_AMX ~AmxTiles() {
        if (configured) _tile_release();
    }

    void add(int64_t row, int64_t count, const Weights& weights, float* sums) {
        using Tile = void (*)(const Rows&, const Weights&, float*);
        static constexpr Tile kTiles[2][kPanelBlocks] = {{amx_tile<1, 1>, amx_tile<1, 2>},
                                                         {amx_tile<2, 1>, amx_tile<2, 2>}};
        if (configured != count) configure(count);
        const Rows rows{x.numbers + row * inputs + weights.first_step * x.to_step, x.to_row, x.to_step};
        kTiles[count > kTileRows][weights.blocks - 1](rows, weights, sums + row * kPanel);
    }

  private:
    Rows x;
    int64_t inputs;
    int64_t configured = 0;  // rows

    static bool copied(const uint16_t* x, int64_t rows, int64_t inputs, Scratch& scratch) {
        if (scratch.of == x) return true;
        const int64_t size = (rows + kRows - 1) / kRows * kRows * inputs;
        if (size > scratch.size) {
            scratch.copy.reset(new (std::nothrow) uint16_t[size]);
            scratch.of = nullptr;
            scratch.size = scratch.copy ? size : 0;
            if (!scratch.copy) return false;
        }
        copy_tiles(x, rows, inputs, scratch.copy.get());
        scratch.of = x;
        return true;
    }

    TARGET_AVX512 static void copy_tiles(const uint16_t* x, int64_t rows, int64_t inputs, uint16_t* copy) {
        for (int64_t row = 0; row < rows; ++row, x += inputs) {
            uint16_t* target = copy + row / kRows * kRows * inputs + row % kRows * kStep;
            for (int64_t i = 0; i < inputs; i += kStep)
                _mm512_storeu_si512(target + i * kRows, _mm512_loadu_si512(x + i));
        }
    }

    TARGET_AMX void configure(int64_t rows) {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {};
        } tiles;
        static_assert(sizeof tiles == 64);
        const auto above = static_cast<uint8_t>(std::min(rows, kTileRows));
        const auto below = static_cast<uint8_t>(std::max(rows - kTileRows, int64_t{1}));
        tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = above;
        tiles.rows[2] = tiles.rows[3] = tiles.rows[5] = below;
        tiles.rows[6] = tiles.rows[7] = kPairs;
        _tile_loadconfig(&tiles);
        configured = rows;
        asm volatile("" ::: "memory");  // the intrinsics do not say that tiles are loaded from memory
    }
};

}  // namespace

#endif
