// What linear layers with integer weights share: reading rows, making integers of them, and writing outputs.

#pragma once

#include <type_traits>

#include "outputs.h"
#include "replay.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86_TILES 1
#include <immintrin.h>
#define AVX2_CODE __attribute__((target("avx2,fma")))
#define VNNI_CODE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
// Adds to a sum happen in the order written: GCC would add the products of two halves first, and keep most in memory.
#define KEEP_ORDER(sum) asm("" : "+x"(sum))
#else
#define HAS_X86_TILES 0
#endif

namespace {

enum Level : int32_t { kPortable = 0, kAvx2 = 1, kVnni = 2 };  // the instructions that are used
enum Status : int32_t { kOk = 0, kOutOfMemory = 1 };

typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t UnsignedShorts __attribute__((vector_size(64)));

constexpr int64_t kBlock = kLanes;                 // outputs
constexpr int64_t kPanelBlocks = 4;                // blocks
constexpr int64_t kPanel = kPanelBlocks * kBlock;  // outputs
constexpr int64_t kStep = 4;                       // inputs
constexpr int64_t kStepBytes = kBlock * kStep;     // of a block, with a byte for each number
constexpr int64_t kRowAlignment = 64;              // the bytes of a quantized row are a multiple of this
constexpr int64_t kMaxRows = 6;                    // that a tile has; 6 x 4 sums, 4 weights and a row fill 32 registers
constexpr int64_t kAhead = 8192;                   // bytes of weights that are fetched before they are needed
constexpr int64_t kRowsPerPiece = 96;              // whose codes stay in a core's cache while it goes through a panel
constexpr int64_t kProductsPerThread = 1 << 17;    // less takes longer to hand to a thread than to compute
constexpr int64_t kNumbersPerThread = 1 << 15;     // the same, for quantizing rows
constexpr float kSmallest = 7.888609052e-31f;      // 2^-100: the inverse of a scale stays finite
constexpr float kRoundToInteger = 12582912.0f;     // 1.5 * 2^23

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 16 consecutive elements of a row as float32, in order. Elements from `left` on are 0.
ALWAYS_INLINE Floats in_order(const float* p, int64_t left) {
    if (left >= kLanes) return load_floats(p);
    float padded[kLanes] = {};
    std::memcpy(padded, p, left * sizeof(float));
    return load_floats(padded);
}
ALWAYS_INLINE Floats in_order(const BFloat16* p, int64_t left) {
    Halves bits = {};
    std::memcpy(&bits, p, left >= kLanes ? sizeof bits : left * sizeof(BFloat16));
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

// The largest absolute value, at least kSmallest; NaN if a number is infinite or undefined.
template <class T>
ALWAYS_INLINE float largest_of(const T* x, int64_t size) {
    Words largest = {};  // the bits of floats without their sign are ordered like the floats; those of NaN are last
    for (int64_t i = 0; i < size; i += kLanes) {
        const Words bits = (Words)in_order(x + i, size - i) & 0x7fffffffu;
        largest = larger(bits, largest);
    }
    uint32_t most = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) most = std::max(most, largest[lane]);
    float top;
    std::memcpy(&top, &most, sizeof top);
    return most < 0x7f800000u ? std::max(top, kSmallest) : std::numeric_limits<float>::quiet_NaN();
}

// The integers nearest to x, modulo 2^32.
ALWAYS_INLINE Words nearest(Floats x) { return (Words)(x + kRoundToInteger) - (Words)splat(kRoundToInteger); }

ALWAYS_INLINE void store_bytes(uint8_t* p, Words x) {
    const Bytes bytes = __builtin_convertvector(x, Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
}

ALWAYS_INLINE void store_shorts(uint8_t* p, Words x) {
    const Halves shorts = __builtin_convertvector(x, Halves);
    std::memcpy(p, &shorts, sizeof shorts);
}

ALWAYS_INLINE void store_in_order(float* p, Floats x, int64_t left) {
    std::memcpy(p, &x, left >= kLanes ? sizeof x : left * sizeof(float));
}
ALWAYS_INLINE void store_in_order(BFloat16* p, Floats x, int64_t left) {
    const Halves bits = __builtin_convertvector(bfloat16_bits(x) >> 16, Halves);
    std::memcpy(p, &bits, left >= kLanes ? sizeof bits : left * sizeof(BFloat16));
}

// The blocks that a tile of AVX2 goes through at a time, so that their sums (2 for each row), 2 weights, the codes of a row
// and a product fit into 16 registers. One row takes the whole panel, which it then reads in one piece.
constexpr int avx2_blocks(int rows, int blocks) { return rows == 1 ? blocks : rows == 2 && blocks % 2 == 0 ? 2 : 1; }

// Tables of tiles: a function for each number of rows and of blocks.
#define TILES_OF(tile, rows) {tile<rows, 1>, tile<rows, 2>, tile<rows, 3>, tile<rows, 4>}
#define TILES(tile)                                                                                            \
    {                                                                                                          \
        TILES_OF(tile, 1), TILES_OF(tile, 2), TILES_OF(tile, 3), TILES_OF(tile, 4), TILES_OF(tile, 5),         \
            TILES_OF(tile, 6)                                                                                  \
    }

// Calls visit(null pointer to an element) with the type of the activations, a DataType.
template <class Visit>
void of_type(int32_t type, const Visit& visit) {
    if (type == kFloat32)
        visit(static_cast<float*>(nullptr));
    else
        visit(static_cast<BFloat16*>(nullptr));
}

// Calls multiply(null pointer to an element, outputs) with outputs that keep the top one of each row, and writes these.
// A worker multiplies at most `most_rows` rows at a time. Returns a Status.
template <class Multiply>
int32_t top_of_type(int32_t type, int64_t rows, int64_t start, int64_t threads, int64_t most_rows, float* values,
                    int64_t* ids, const Multiply& multiply) {
    try {
        of_type(type, [&](auto* element) {
            TopOutputs<std::remove_pointer_t<decltype(element)>> top(rows, start, threads, most_rows, kPanel);
            multiply(element, top);
            top.finish(values, ids);
        });
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kOk;
}

}  // namespace
