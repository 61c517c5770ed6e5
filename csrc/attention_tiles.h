// The arithmetic of attention, for a tile of tokens and one KV head: what attention_unit.h calls, and what exists once
// per element type of the activations, element type of the cache, and instruction set.
//
// Every number of a row (one query head of one query) is formed by a fixed sequence of operations, in which no other
// row takes part. So a row has the same bits however many rows are computed with it:
//
//  * Positions are divided into splits at the multiples of kSplit. Each split gives the maximum of the row's scores,
//    the weights exp(score - maximum), their sum, and the sum of the values times the weights. Splits are merged in
//    order.
//  * The product of a query and a key is summed in the order of the head's elements, and weighted values in the order
//    of positions, each sum in a lane of its own (`multiply`).
//  * A weight of a token that the row does not attend to is 0. Adding it changes nothing, if its value is finite, so
//    it does not matter which other tokens of a tile are computed.
//
// Elements are handled in words of 32 bits: a float32, or two bfloat16 elements that one instruction multiplies and
// adds. Weights are in words too: two bfloat16 weights are those of the positions 2 i and 2 i + 1. Elements of the cache
// become those of the activations when they are packed, which is exact for all types of fewer bits. The codes of int8
// are packed without their scales: a score is multiplied with the scale of its key, and a weight with that of its value.

#pragma once

#include "cache_types.h"

constexpr int64_t kSplit = 256;  // positions
constexpr int64_t kTile = 64;    // positions: the most tokens that are packed at a time
constexpr int64_t kVectors = 4;  // vectors of kLanes words in a row of a panel
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kStatistics = kLanes;  // floats of a state before its sums: maximum, sum of weights, unused
constexpr int64_t kScoreStride = kSplit + kLanes;  // floats; no power of two, which would put rows in few cache sets

ALWAYS_INLINE int64_t round_down(int64_t x, int64_t step) { return x / step * step; }
ALWAYS_INLINE int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
ALWAYS_INLINE int64_t padded_dim(int64_t head_dim) { return round_up(head_dim, kChunk); }

// c[r, :] = a[r, :] b, or added to c, for rows r. A row of `a` has `depth` words; b is a panel: [depth, kPanel] words,
// of which the first `vectors` * kLanes of each row are used. Strides are in words.
struct Product {
    const uint32_t* a;
    int64_t a_stride, rows;
    const uint32_t* b;
    int64_t vectors, depth;
    float* c;
    int64_t c_stride;
    bool add;
};

// Rows that are computed without packing. Strides are in words.
struct FewRows {
    const uint32_t* a;  // queries or weights
    int64_t a_stride, rows;
    float* c;  // scores or sums
    int64_t c_stride;
};

// Rows of the cache that are needed next. They are fetched into the L2 cache bit by bit, while other rows are packed or
// multiplied: a processor has only few memory accesses in flight, and more at a time would hold up that work. It has no
// effect on results.
class Prefetch {
   public:
    Prefetch(const char* rows, const int64_t* offsets, int64_t count, int64_t row_bytes)
        : rows_(rows), offsets_(offsets), end_(offsets + count), row_bytes_(row_bytes) {}

    void lines(int64_t count) {
        for (; count > 0 && offsets_ < end_; --count) {
            __builtin_prefetch(rows_ + *offsets_ + byte_, 0, 2);
            byte_ += kCacheLine;
            if (byte_ >= row_bytes_) {
                byte_ = 0;
                ++offsets_;
            }
        }
    }

   private:
    const char* rows_;
    const int64_t *offsets_, *end_;
    int64_t row_bytes_, byte_ = 0;
};

// The keys or values of one KV head for a tile of tokens.
struct Tile {
    const char* head;        // in the first slot of the cache
    const int64_t* offsets;  // of the tokens from `head`, in bytes
    int64_t head_dim;
    Prefetch* next;          // as many lines are fetched as are read
};

struct Softmax {
    float scale, softcap;  // softcap 0: none
};

// The scales of keys and values for one KV head and the positions of a split; null without scales.
struct Scales {
    const float *keys, *values;  // [kSplit]
};

// A state is kStatistics + padded_dim(head_dim) floats: the maximum of scores, the sum of weights, and the sum of
// weighted values, whose lanes are in an order of the implementation.
struct AttentionTiles {
    int64_t word_elements;  // elements in a word: 1 or 2

    // Writes a query as padded_dim(head_dim) / word_elements words, zeros after its end.
    void (*pack_query)(const void* query, int64_t head_dim, uint32_t* words);

    // Writes the first `vectors` * kLanes tokens of a tile as a panel: row i has word i of each key. Keys are padded as
    // queries are.
    void (*pack_keys)(const Tile& tile, int64_t vectors, uint32_t* panel);

    // Writes tokens [first, end) of a tile as panels of kPanel elements of the head each, one after the other with room
    // for kTile / word_elements rows: row i has the values of the tokens of word i. Tokens outside of [first, end) that
    // share a word with one inside are not read, and written as zeros.
    void (*pack_values)(const Tile& tile, int64_t first, int64_t end, uint32_t* panels);

    void (*multiply)(const Product& product);

    // Replaces the scores of a row in a split by weights, and writes the statistics of its state. The row attends to
    // positions [from, to) of the split; the weights of others are zeros up to the ends of their tiles. The weights are
    // multiplied with the scales of the values, their sum is not.
    void (*exponentiate)(float* scores, int64_t from, int64_t to, const Softmax& softmax, const Scales& scales,
                         float* state);

    // Adds the state of the next split to the state of the splits before. Both have `size` sums.
    void (*merge)(const float* next, int64_t size, float* state);

    // Writes the result of a row: sums divided by the sum of weights.
    void (*finish)(const float* state, int64_t head_dim, void* out);

    // The same products as after packing, of at most `most_few_rows` rows, with the same bits. The first gives the
    // scores of the first `vectors` * kLanes tokens. The second is added to sums; its weights begin at the tile's first
    // token.
    int64_t most_few_rows = 0;  // 0: rows are always multiplied after packing
    void (*multiply_few_keys)(const FewRows& few, const Tile& tile, int64_t vectors) = nullptr;
    void (*add_few_values)(const FewRows& few, const Tile& tile, int64_t first, int64_t end) = nullptr;
};

// Which instructions may be used. kAttentionBest: all that this machine has; the others are for tests.
enum AttentionLevel : int32_t { kAttentionPortable = 0, kAttentionAvx2 = 1, kAttentionBest = 2 };

// The implementation for activations of this DataType and a cache of this CacheType on this machine.
const AttentionTiles& attention_tiles(int32_t type, int32_t cache_type, AttentionLevel level);

// Replaces an implementation by a faster one if this machine has AVX2 (csrc/attention_avx2.cpp).
void use_avx2(int32_t type, int32_t cache_type, AttentionTiles* tiles);

// Replaces functions of an implementation by faster ones if this machine has AVX-512 (csrc/attention_avx512.cpp).
void use_avx512(int32_t type, int32_t cache_type, AttentionTiles* tiles);

namespace {

// tanh(x): near zero an odd polynomial with a relative error of 3e-9, elsewhere 1 - 2 / (e^2|x| + 1).
ALWAYS_INLINE Floats tanh_of(Floats x) {
    const Floats size = (x < 0.0f) ? -x : x, square = x * x;
    Floats p = splat(-0.00589515035f);
    p = p * square + 0.0207959656f;
    p = p * square - 0.0537838287f;
    p = p * square + 0.133319241f;
    p = p * square - 0.33333298f;
    const Floats near = x + x * (square * p);
    const Floats far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
    return (size < 0.6f) ? near : ((x < 0.0f) ? -far : far);
}

ALWAYS_INLINE float max_of(Floats x) {
    const Floats8 eight = larger(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
    const Floats4 four =
        larger(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
    return std::max(std::max(four[0], four[2]), std::max(four[1], four[3]));
}

// Scales the scores of positions [from, to), with the softcap, and sets the others in their vectors to -infinity.
// Returns the maximum. key_scales: null for none.
ALWAYS_INLINE float scale_scores(float* scores, int64_t from, int64_t to, const Softmax& softmax,
                                 const float* key_scales) {
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Floats lowest = splat(-std::numeric_limits<float>::infinity());
    float scale = softmax.scale;
    if (key_scales)
        for (int64_t t = round_down(from, kLanes); t < to; t += kLanes)
            store_floats(scores + t, load_floats(scores + t) * load_floats(key_scales + t));
    if (softmax.softcap != 0.0f) {
        const float inner = scale / softmax.softcap;
        for (int64_t t = round_down(from, kLanes); t < to; t += kLanes)
            store_floats(scores + t, tanh_of(load_floats(scores + t) * inner));
        scale = softmax.softcap;
    }
    Floats best = lowest;
    for (int64_t t = round_down(from, kLanes); t < to; t += kLanes) {
        const Words distances = lanes + static_cast<uint32_t>(t - from);  // wraps around before `from`
        const Floats scaled = load_floats(scores + t) * scale;
        const Floats visible = (distances < static_cast<uint32_t>(to - from)) ? scaled : lowest;
        store_floats(scores + t, visible);
        best = larger(best, visible);
    }
    return max_of(best);
}

}  // namespace
