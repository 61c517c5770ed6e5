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

#include "integer_rows.h"

namespace {

constexpr int64_t kLine = kStepBytes;            // bytes: a pair of steps of a block, or its words
constexpr int64_t kPair = 2 * kStep;             // inputs
constexpr int64_t kMostGroup = 128;              // inputs
constexpr int64_t kStepsOfShorts = 8;            // whose products have sums that fit into 16 bits: 8 * 2 * 15 * 127
constexpr uint32_t kZeroBits = 0xffu;            // of a word
constexpr int64_t kAhead = 8192;                 // bytes that are fetched before they are needed

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

// What a group of a row has beside its codes: its scale, and the sum of its codes.
struct Factor {
    float scale, sum;
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
// Tiles: up to kMaxRows rows times the outputs of a panel.

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

#if HAS_VNNI
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
#endif

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
#if HAS_VNNI
    TILES(vnni_unpacked),
#endif
};
#if HAS_VNNI
constexpr Tile kPackedTiles[kMaxRows][kPanelBlocks] = TILES(vnni_packed);
#else
constexpr auto& kPackedTiles = kUnpackedTiles[kPortable];  // not used
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

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

#define DEFINE_LOOPS(T)                                                                                            \
    CLONED void quantize_rows(const T* x, const Layer& layer, const Rows& rows, int64_t first, int64_t end) {      \
        for (int64_t row = first; row < end; ++row) quantize_row(x + row * layer.inputs, layer, rows, row);        \
    }                                                                                                              \
    CLONED void finish_rows(const Layer& layer, const float* sums, T* out, int64_t rows, int64_t first) {          \
        const int64_t end = std::min(first + kPanel, layer.outputs);                                               \
        for (int64_t row = 0; row < rows; ++row, sums += kPanel, out += layer.outputs) {                           \
            for (int64_t o = first; o < end; o += kBlock) {                                                        \
                Floats value = load_floats(sums + (o - first));                                                    \
                if (layer.bias) value += load_floats(layer.bias + o);                                              \
                store_in_order(out + o, value, end - o);                                                           \
            }                                                                                                      \
        }                                                                                                          \
    }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// Writes the sums of some rows, from `first` on, times a panel of `blocks` blocks: [rows][kPanel]. The codes of several
// tiles are unpacked once for all; those of a single tile are unpacked where they are used.
void multiply_panel(const Layer& layer, const Rows& rows, int64_t first, int64_t count, const uint8_t* weights,
                    int64_t blocks, float* sums) {
    const int64_t tiles = ceil_div(count, kMaxRows), group_pairs = layer.group / kPair;
    const bool packed = tiles == 1 && layer.level == kVnni;
    alignas(64) uint8_t steps[kMostGroup / kStep * kPanelBlocks * kStepBytes];
    std::memset(sums, 0, count * kPanel * sizeof *sums);
    for (int64_t group = 0; group < layer.groups(); ++group, first += rows.count) {
        const int64_t pairs = std::min(group_pairs, layer.pairs() - group * group_pairs);
        const uint8_t* lines = weights + blocks * kLine;
        if (!packed) unpack(lines, pairs, blocks, steps);
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t row = count * tile / tiles, height = count * (tile + 1) / tiles - row;
            (packed ? kPackedTiles : kUnpackedTiles[layer.level])[height - 1][blocks - 1](
                {rows.codes + (first + row) * layer.group, layer.group, rows.factors + first + row, weights,
                 packed ? lines : steps, pairs, sums + row * kPanel});
        }
        weights = lines + pairs * blocks * kLine;
    }
}

template <class T>
void multiply(const Layer& layer, const T* x, const Rows& rows, T* out, int64_t threads) {
    const int64_t quantizers = std::max<int64_t>(1, std::min(threads, rows.count * layer.inputs / kNumbersPerThread));
    in_parallel(quantizers, quantizers, [&](int64_t piece, int64_t) {
        quantize_rows(x, layer, rows, rows.count * piece / quantizers, rows.count * (piece + 1) / quantizers);
    });
    const int64_t products = rows.count * layer.inputs * layer.outputs;
    threads = std::max<int64_t>(1, std::min(threads, products / kProductsPerThread));
    const int64_t parts = ceil_div(rows.count, kRowsPerPiece);
    in_parallel(layer.panels() * parts, threads, [&](int64_t piece, int64_t) {
        const int64_t panel = piece / parts, part = piece % parts;
        const int64_t blocks = std::min(kPanelBlocks, layer.blocks() - panel * kPanelBlocks);
        const uint8_t* weights = layer.packed + panel * kPanelBlocks * layer.block_bytes();
        const int64_t first = rows.count * part / parts, count = rows.count * (part + 1) / parts - first;
        alignas(64) float sums[kRowsPerPiece * kPanel];
        multiply_panel(layer, rows, first, count, weights, blocks, sums);
        finish_rows(layer, sums, out + first * layer.outputs, count, panel * kPanel);
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
    auto* codes = static_cast<int8_t*>(scratch);
    const Rows rows{codes, reinterpret_cast<Factor*>(codes + count * layer->row_bytes()), count};
    if (type == kFloat32)
        multiply(*layer, static_cast<const float*>(x), rows, static_cast<float*>(out), threads);
    else
        multiply(*layer, static_cast<const BFloat16*>(x), rows, static_cast<BFloat16*>(out), threads);
}

REPLAYABLE(shoal_int4_linear)
