// The linear layers of shoal.kernels.int8_linear, in the library _quantized: products of int8 numbers, summed in int32.
//
// A row x is quantized as it comes: its largest absolute value becomes 127, so the row has one scale. An output is
//
//     (sum of x's codes times the weight's codes) * scale of the row * scale of the output [+ bias]
//
// The sum of integers is exact, in any order, and the products with scales are rounded one after the other (setup.py
// compiles with -ffp-contract=off). So a row has the same bits in any batch, with any number of threads, on any CPU, and
// in PyTorch.
//
// The weight is packed for the instruction vpdpbusd of AVX-512 VNNI, which multiplies four unsigned by four signed bytes
// in each of 16 lanes and adds the four products to an int32:
//
//     packed[panel][step][block][output in block][4]      4 inputs of a step; 16 outputs of a block; 4 blocks of a panel
//
// The last panel may have fewer blocks. Absent outputs and inputs are zeros. The codes of x are stored with 128 added, as
// unsigned bytes; `offsets`, 128 times the sum of an output's codes, is what this adds to each sum.

#include "integer_rows.h"

namespace {

constexpr uint8_t kZero = 128;  // the code of 0

// A layer as Python describes it (shoal.kernels.int8_linear). Offsets, scales and bias have a number for each output of
// all blocks; there may be no bias.
struct Layer {
    const int8_t* packed;
    const int32_t* offsets;
    const float* scales;
    const float* bias;
    int64_t inputs, outputs;
    int32_t level;

    int64_t steps() const { return ceil_div(inputs, kStep); }
    int64_t blocks() const { return ceil_div(outputs, kBlock); }
    int64_t panels() const { return ceil_div(outputs, kPanel); }
    int64_t row_bytes() const { return ceil_div(inputs, kRowAlignment) * kRowAlignment; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Quantizing rows.

// Writes the codes of a row and returns its scale. A row with an infinite or undefined number has the scale NaN, which
// makes all outputs NaN.
template <class T>
ALWAYS_INLINE float quantize_row(const T* x, int64_t size, uint8_t* codes, int64_t row_bytes) {
    const float top = largest_of(x, size);
    const float inverse = 127.0f / top;
    for (int64_t i = 0; i < size; i += kLanes)
        store_bytes(codes + i, nearest(in_order(x + i, size - i) * inverse) + uint32_t{kZero});
    const int64_t written = ceil_div(size, kLanes) * kLanes;
    std::memset(codes + written, kZero, row_bytes - written);
    return top / 127.0f;
}

// ---------------------------------------------------------------------------------------------------------------------
// Tiles: up to kMaxRows rows times the outputs of a panel.

// rows: the codes of the tile's rows, `row_bytes` apart; sums: [rows][kPanel].
using Tile = void (*)(const uint8_t* rows, int64_t row_bytes, const int8_t* panel, const int32_t* offsets,
                      int64_t steps, int32_t* sums);

#if HAS_VNNI
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
#endif

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
#if HAS_VNNI
    TILES(vnni_tile),
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// From sums to outputs.

// The outputs from `first` on of one row: those of one panel. `out` is the whole row.
template <class T>
ALWAYS_INLINE void finish_row(const Layer& layer, const int32_t* sums, float row_scale, T* out, int64_t first) {
    const int64_t end = std::min(first + kPanel, layer.outputs);
    for (int64_t o = first; o < end; o += kBlock) {
        Ints sum;
        std::memcpy(&sum, sums + (o - first), sizeof sum);
        Floats value = __builtin_convertvector(sum, Floats) * row_scale * load_floats(layer.scales + o);
        if (layer.bias) value += load_floats(layer.bias + o);
        store_in_order(out + o, value, end - o);
    }
}

#define DEFINE_LOOPS(T)                                                                                               \
    CLONED void quantize_rows(const T* x, int64_t size, uint8_t* codes, int64_t row_bytes, float* scales,             \
                              int64_t first, int64_t end) {                                                           \
        for (int64_t row = first; row < end; ++row)                                                                   \
            scales[row] = quantize_row(x + row * size, size, codes + row * row_bytes, row_bytes);                     \
    }                                                                                                                 \
    CLONED void finish_rows(const Layer& layer, const int32_t* sums, const float* row_scales, T* out, int64_t rows,   \
                            int64_t first) {                                                                          \
        for (int64_t row = 0; row < rows; ++row)                                                                      \
            finish_row(layer, sums + row * kPanel, row_scales[row], out + row * layer.outputs, first);                \
    }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

template <class T>
void multiply(const Layer& layer, const T* x, int64_t rows, uint8_t* codes, float* scales, T* out, int64_t threads) {
    const int64_t row_bytes = layer.row_bytes(), steps = layer.steps(), panels = layer.panels();
    const int64_t quantizers = std::max<int64_t>(1, std::min(threads, rows * layer.inputs / kNumbersPerThread));
    in_parallel(quantizers, quantizers, [&](int64_t piece, int64_t) {
        quantize_rows(x, layer.inputs, codes, row_bytes, scales, rows * piece / quantizers,
                      rows * (piece + 1) / quantizers);
    });
    const int64_t products = rows * layer.inputs * layer.outputs;
    threads = std::max<int64_t>(1, std::min(threads, products / kProductsPerThread));
    const int64_t parts = ceil_div(rows, kRowsPerPiece);
    in_parallel(panels * parts, threads, [&](int64_t piece, int64_t) {
        const int64_t panel = piece / parts, part = piece % parts, first = panel * kPanel;
        const int64_t blocks = std::min(kPanelBlocks, layer.blocks() - panel * kPanelBlocks);
        const int8_t* weights = layer.packed + panel * kPanelBlocks * kStepBytes * steps;
        const int64_t start = rows * part / parts, end = rows * (part + 1) / parts;
        const int64_t tiles = ceil_div(end - start, kMaxRows);
        alignas(64) int32_t sums[kMaxRows * kPanel];
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = start + (end - start) * tile / tiles;
            const int64_t count = start + (end - start) * (tile + 1) / tiles - row;
            kTiles[layer.level][count - 1][blocks - 1](codes + row * row_bytes, row_bytes, weights,
                                                       layer.offsets + first, steps, sums);
            finish_rows(layer, sums, scales + row, out + row * layer.outputs, count, first);
        }
    });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C interface.

// codes: [outputs, inputs]; packed: blocks * steps * 64 bytes; offsets: a number for each output of all blocks.
EXPORT void shoal_int8_pack(const int8_t* codes, int64_t outputs, int64_t inputs, int8_t* packed, int32_t* offsets,
                            int64_t threads) {
    const int64_t steps = ceil_div(inputs, kStep), blocks = ceil_div(outputs, kBlock);
    in_parallel(ceil_div(outputs, kPanel), threads, [&](int64_t panel, int64_t) {
        const int64_t before = panel * kPanelBlocks, count = std::min(kPanelBlocks, blocks - before);
        for (int64_t b = 0; b < count; ++b) {
            for (int64_t lane = 0; lane < kBlock; ++lane) {
                const int64_t output = (before + b) * kBlock + lane;
                int8_t* target = packed + before * kStepBytes * steps + b * kStepBytes + lane * kStep;
                int32_t sum = 0;
                for (int64_t step = 0; step < steps; ++step, target += count * kStepBytes) {
                    int8_t four[kStep] = {};
                    if (output < outputs)
                        std::memcpy(four, codes + output * inputs + step * kStep,
                                    std::min(kStep, inputs - step * kStep));
                    std::memcpy(target, four, kStep);
                    sum += four[0] + four[1] + four[2] + four[3];
                }
                offsets[output] = sum * int32_t{kZero};
            }
        }
    });
}

// x: [rows, inputs] and out: [rows, outputs], contiguous. scratch: rows * (row_bytes + 4) bytes.
EXPORT void shoal_int8_linear(int32_t type, const Layer* layer, const void* x, int64_t rows, void* scratch, void* out,
                              int64_t threads) {
    auto* codes = static_cast<uint8_t*>(scratch);
    auto* scales = reinterpret_cast<float*>(codes + rows * layer->row_bytes());
    if (type == kFloat32)
        multiply(*layer, static_cast<const float*>(x), rows, codes, scales, static_cast<float*>(out), threads);
    else
        multiply(*layer, static_cast<const BFloat16*>(x), rows, codes, scales, static_cast<BFloat16*>(out), threads);
}

REPLAYABLE(shoal_int8_linear)
