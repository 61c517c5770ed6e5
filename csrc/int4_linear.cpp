// The linear layers of shoal.kernels.int4_linear, in the library _quantized: weights of 4 bits with scales for groups of
// inputs, times rows that are quantized to 8 bits.
//
// Each row has a scale for each group: the group's largest absolute value becomes 127. An output is the sum over groups,
// in order, of
//
//     ((sum of x's codes times the weight's codes) - zero * (sum of x's codes)) * scale of the weight * scale of the row
//
// and then the bias is added. All that is in the outer brackets is an integer below 2^24, so it is exact as a float32 too;
// what follows is rounded after each operation (setup.py compiles with -ffp-contract=off). So a row has the same bits in
// any batch, with any number of threads, on any CPU, and in PyTorch.
//
// A weight is packed as one stream of lines of 64 bytes, in the order in which it is read:
//
//     panel of 64 outputs, group, { words[block][output in block], codes[pair of steps][block][output in block][4] }
//
// A word has the zero in its lowest byte and is the scale without it: the lowest 8 bits of a scale are 0. The low halves
// of the bytes of a line are the codes of 4 inputs, those of a step, and the high halves the codes of the next 4. The last
// panel may have fewer blocks, the last group fewer pairs of steps. Absent outputs and inputs are zeros.

#include "int4_tiles.h"

namespace {

// A layer as Python describes it (shoal.kernels.int4_linear). The bias has a number for each output of all blocks; there
// may be none. `group` is a multiple of 16 up to kMostGroup.
struct Layer {
    const uint8_t* packed;
    const float* bias;
    int64_t inputs, outputs, group;
    int32_t level;

    int64_t pairs() const { return ceil_div(inputs, kPair); }
    int64_t groups() const { return ceil_div(inputs, group); }
    int64_t blocks() const { return ceil_div(outputs, kBlock); }
    int64_t panels() const { return ceil_div(outputs, kPanel); }
    int64_t row_bytes() const { return groups() * group; }  // the codes of a row
    int64_t block_bytes() const { return (groups() + pairs()) * kLine; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Quantizing rows.

// The codes of rows, [group][row][input of the group], and their factors, [group][row]: a tile, which has one group of
// several rows, reads them in one piece.
struct Rows {
    int8_t* codes;
    Factor* factors;
    int64_t count;
};

// A group with an infinite or undefined number has the scale NaN, which makes all outputs of the row NaN.
template <class T>
ALWAYS_INLINE void quantize_row(const T* x, const Layer& layer, Rows rows, int64_t row) {
    for (int64_t first = 0; first < layer.inputs; first += layer.group, row += rows.count) {
        const int64_t size = std::min(layer.group, layer.inputs - first);
        const float top = largest_of(x + first, size);
        const float inverse = 127.0f / top;
        auto* codes = reinterpret_cast<uint8_t*>(rows.codes + row * layer.group);
        Words sums = {};
        for (int64_t i = 0; i < size; i += kLanes) {
            const Words code = nearest(in_order(x + first + i, size - i) * inverse);
            store_bytes(codes + i, code);
            sums += code;
        }
        uint32_t sum = 0;
        for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
        rows.factors[row] = {top / 127.0f, static_cast<float>(static_cast<int32_t>(sum))};
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

#define DEFINE_LOOPS(T)                                                                                               \
    CLONED void quantize_rows(const T* x, const Layer& layer, const Rows& rows, int64_t first, int64_t end) {         \
        for (int64_t row = first; row < end; ++row) quantize_row(x + row * layer.inputs, layer, rows, row);           \
    }                                                                                                                 \
    CLONED void finish_rows(const Layer& layer, const float* sums, const Output<T>& out, int64_t rows, int64_t first) {\
        const int64_t end = std::min(first + kPanel, layer.outputs);                                                  \
        for (int64_t row = 0; row < rows; ++row, sums += kPanel) {                                                    \
            for (int64_t o = first; o < end; o += kBlock) {                                                           \
                Floats value = load_floats(sums + (o - first));                                                       \
                if (layer.bias) value += load_floats(layer.bias + o);                                                 \
                store_in_order(out.of(row, o), value, end - o);                                                       \
            }                                                                                                         \
        }                                                                                                             \
    }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// Writes the sums of some rows, from `first` on, times a panel of `blocks` blocks: [rows][kPanel]. The codes of several
// tiles are unpacked once for all; those of a single tile are unpacked where they are used.
void multiply_panel(const Layer& layer, const Rows& rows, int64_t first, int64_t count, const uint8_t* weights,
                    int64_t blocks, float* sums) {
    const int64_t tiles = ceil_div(count, kMaxRows), group_pairs = layer.group / kPair;
    const bool packed = tiles == 1 && layer.level != kPortable;
    alignas(64) uint8_t steps[kMostGroup / kStep * kPanelBlocks * kStepBytes];
    std::memset(sums, 0, count * kPanel * sizeof *sums);
    for (int64_t group = 0; group < layer.groups(); ++group, first += rows.count) {
        const int64_t pairs = std::min(group_pairs, layer.pairs() - group * group_pairs);
        const uint8_t* lines = weights + blocks * kLine;
        if (!packed) unpack(lines, pairs, blocks, steps);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = count * tile / tiles, height = count * (tile + 1) / tiles - row;
            (packed ? kPackedTiles : kUnpackedTiles)[layer.level][height - 1][blocks - 1](
                {rows.codes + (first + row) * layer.group, layer.group, rows.factors + first + row, weights,
                 packed ? lines : steps, pairs, sums + row * kPanel});
        }
        weights = lines + pairs * blocks * kLine;
    }
}

template <class T, class Outputs>
void multiply(const Layer& layer, const T* x, int64_t count_of_rows, void* scratch, Outputs& out, int64_t threads) {
    auto* codes = static_cast<int8_t*>(scratch);
    const Rows rows{codes, reinterpret_cast<Factor*>(codes + count_of_rows * layer.row_bytes()), count_of_rows};
    const int64_t quantizers = std::max<int64_t>(1, std::min(threads, rows.count * layer.inputs / kNumbersPerThread));
    in_parallel(quantizers, quantizers, [&](int64_t piece, int64_t) {
        quantize_rows(x, layer, rows, rows.count * piece / quantizers, rows.count * (piece + 1) / quantizers);
    });
    const int64_t products = rows.count * layer.inputs * layer.outputs;
    threads = std::max<int64_t>(1, std::min(threads, products / kProductsPerThread));
    const int64_t parts = ceil_div(rows.count, kRowsPerPiece);
    in_spans(layer.panels() * parts, threads, [&](int64_t piece, int64_t worker) {
        const int64_t panel = piece / parts, part = piece % parts;
        const int64_t blocks = std::min(kPanelBlocks, layer.blocks() - panel * kPanelBlocks);
        const uint8_t* weights = layer.packed + panel * kPanelBlocks * layer.block_bytes();
        const int64_t first = rows.count * part / parts, count = rows.count * (part + 1) / parts - first;
        alignas(64) float sums[kRowsPerPiece * kPanel];
        multiply_panel(layer, rows, first, count, weights, blocks, sums);
        const int64_t output = panel * kPanel;
        finish_rows(layer, sums, out.of(first, output, worker), count, output);
        out.take(first, count, output, std::min(output + kPanel, layer.outputs), worker);
    });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C interface.

// codes: [outputs, inputs], from 0 to 15; words: [outputs, groups]; packed: blocks * block_bytes of the layer, whose other
// fields are not read.
EXPORT void shoal_int4_pack(const Layer* layer, const uint8_t* codes, const uint32_t* words, uint8_t* packed,
                            int64_t threads) {
    const int64_t groups = layer->groups(), group_pairs = layer->group / kPair;
    in_parallel(layer->panels(), threads, [&](int64_t panel, int64_t) {
        const int64_t before = panel * kPanelBlocks, blocks = std::min(kPanelBlocks, layer->blocks() - before);
        for (int64_t lane = 0; lane < blocks * kBlock; ++lane) {
            const int64_t output = panel * kPanel + lane;
            const bool absent = output >= layer->outputs;
            uint8_t* target = packed + before * layer->block_bytes() + lane * kStep;
            const auto write = [&](uint32_t word) {
                std::memcpy(target, &word, sizeof word);
                target += blocks * kLine;
            };
            for (int64_t group = 0; group < groups; ++group) {
                write(absent ? 0 : words[output * groups + group]);
                const int64_t first = group * group_pairs;
                for (int64_t pair = first; pair < std::min(first + group_pairs, layer->pairs()); ++pair) {
                    uint32_t steps[2] = {};
                    if (!absent)
                        std::memcpy(steps, codes + output * layer->inputs + pair * kPair,
                                    std::min(kPair, layer->inputs - pair * kPair));
                    write(steps[0] | steps[1] << 4);
                }
            }
        }
    });
}

// x: [rows, inputs] and out: [rows, outputs], contiguous. scratch: count * (row_bytes + 8 * groups) bytes.
EXPORT void shoal_int4_linear(int32_t type, const Layer* layer, const void* x, int64_t count, void* scratch, void* out,
                              int64_t threads) {
    of_type(type, [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        AllOutputs<T> all{static_cast<T*>(out), layer->outputs, false};
        multiply(*layer, static_cast<const T*>(x), count, scratch, all, threads);
    });
}

// Writes the largest output of each row, and its id: [count]. Of equal ones it is the first. The id of output 0 is
// `start`. Returns a Status.
EXPORT int32_t shoal_int4_top(int32_t type, const Layer* layer, const void* x, int64_t count, void* scratch,
                              int64_t start, float* values, int64_t* ids, int64_t threads) {
    return top_of_type(type, count, start, threads, kRowsPerPiece, values, ids, [&](auto* element, auto& top) {
        using T = std::remove_pointer_t<decltype(element)>;
        multiply(*layer, static_cast<const T*>(x), count, scratch, top, threads);
    });
}

REPLAYABLE(shoal_int4_linear)
