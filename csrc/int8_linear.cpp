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
// The last panel may have fewer blocks. Absent outputs and inputs are zeros. For that instruction the codes of x are stored
// with 128 added, as unsigned bytes; `offsets`, 128 times the sum of an output's codes, is what this adds to each sum. Other
// instructions read the same panels (int8_tiles.h).

#include "int8_tiles.h"

namespace {

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
    int64_t row_bytes() const { return ceil_div(inputs, kRowAlignment) * kRowAlignment * bytes_of_code(level); }
};

// ---------------------------------------------------------------------------------------------------------------------
// Quantizing rows.

// Writes 16 codes of a row as the tiles of the level read them.
ALWAYS_INLINE void store_codes(uint8_t* row, int64_t first, Words codes, bool as_shorts) {
    if (as_shorts)
        store_shorts(row + first * sizeof(int16_t),
                     __builtin_shufflevector(codes, codes, 0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
    else
        store_bytes(row + first, codes + uint32_t{kZero});
}

// Writes the codes of a row and returns its scale. A row with an infinite or undefined number has the scale NaN, which
// makes all outputs NaN.
template <class T>
ALWAYS_INLINE float quantize_row(const T* x, int64_t size, uint8_t* codes, bool as_shorts) {
    const float top = largest_of(x, size);
    const float inverse = 127.0f / top;
    for (int64_t i = 0; i < size; i += kLanes)
        store_codes(codes, i, nearest(in_order(x + i, size - i) * inverse), as_shorts);
    return top / 127.0f;
}

// ---------------------------------------------------------------------------------------------------------------------
// From sums to outputs.

// The outputs from `first` on of one row: those of one panel, which are written to `out`.
template <class T>
ALWAYS_INLINE void finish_row(const Layer& layer, const int32_t* sums, float row_scale, T* out, int64_t first) {
    const int64_t end = std::min(first + kPanel, layer.outputs);
    for (int64_t o = first; o < end; o += kBlock) {
        Ints sum;
        std::memcpy(&sum, sums + (o - first), sizeof sum);
        Floats value = __builtin_convertvector(sum, Floats) * row_scale * load_floats(layer.scales + o);
        if (layer.bias) value += load_floats(layer.bias + o);
        store_in_order(out + o - first, value, end - o);
    }
}

#define DEFINE_LOOPS(T)                                                                                               \
    CLONED void quantize_rows(const T* x, const Layer& layer, uint8_t* codes, float* scales, int64_t first,           \
                              int64_t end) {                                                                          \
        const int64_t size = layer.inputs, row_bytes = layer.row_bytes();                                             \
        for (int64_t row = first; row < end; ++row)                                                                   \
            scales[row] = quantize_row(x + row * size, size, codes + row * row_bytes, layer.level == kAvx2);          \
    }                                                                                                                 \
    CLONED void finish_rows(const Layer& layer, const int32_t* sums, const float* row_scales, const Output<T>& out,   \
                            int64_t rows, int64_t first) {                                                            \
        for (int64_t row = 0; row < rows; ++row)                                                                      \
            finish_row(layer, sums + row * kPanel, row_scales[row], out.of(row, first), first);                       \
    }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

template <class T, class Outputs>
void multiply(const Layer& layer, const T* x, int64_t rows, void* scratch, Outputs& out, int64_t threads) {
    auto* codes = static_cast<uint8_t*>(scratch);
    auto* scales = reinterpret_cast<float*>(codes + rows * layer.row_bytes());
    const int64_t row_bytes = layer.row_bytes(), steps = layer.steps(), panels = layer.panels();
    const int64_t quantizers = std::max<int64_t>(1, std::min(threads, rows * layer.inputs / kNumbersPerThread));
    in_parallel(quantizers, quantizers, [&](int64_t piece, int64_t) {
        quantize_rows(x, layer, codes, scales, rows * piece / quantizers, rows * (piece + 1) / quantizers);
    });
    const int64_t products = rows * layer.inputs * layer.outputs;
    threads = std::max<int64_t>(1, std::min(threads, products / kProductsPerThread));
    const int64_t parts = ceil_div(rows, kRowsPerPiece);
    in_spans(panels * parts, threads, [&](int64_t piece, int64_t worker) {
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
            finish_rows(layer, sums, scales + row, out.of(row, first, worker), count, first);
            out.take(row, count, first, std::min(first + kPanel, layer.outputs), worker);
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
    of_type(type, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        AllOutputs<T> all{static_cast<T*>(out), layer->outputs, false};
        multiply(*layer, static_cast<const T*>(x), rows, scratch, all, threads);
    });
}

// Writes the largest output of each row, and its id: [rows]. Of equal ones it is the first. The id of output 0 is `start`.
// Returns a Status.
EXPORT int32_t shoal_int8_top(int32_t type, const Layer* layer, const void* x, int64_t rows, void* scratch,
                              int64_t start, float* values, int64_t* ids, int64_t threads) {
    return top_of_type(type, rows, start, threads, kMaxRows, values, ids, [&](auto* element, auto& top) {
        using T = std::remove_pointer_t<decltype(element)>;
        multiply(*layer, static_cast<const T*>(x), rows, scratch, top, threads);
    });
}

REPLAYABLE(shoal_int8_linear)
