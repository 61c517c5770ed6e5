// The arithmetic of attention with GCC's vectors, for any machine. A word is a float32, and bfloat16 elements are
// widened when they are packed; their order within a chunk is that of chunks.h.

#include "attention_tiles.h"

namespace {

template <class T>
ALWAYS_INLINE void pack_query_of(const T* query, int64_t head_dim, float* words) {
    for (int64_t d = 0; d < head_dim; d += kChunk) store(words + d, load(query + d, head_dim - d));
}

template <class T>
ALWAYS_INLINE const T* row_of(const Tile& tile, int64_t t) {
    return reinterpret_cast<const T*>(tile.head + tile.offsets[t]);
}

ALWAYS_INLINE Floats4 load_four(const float* p) {
    Floats4 x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// Writes 4 x 4 elements transposed. Both strides are in floats.
ALWAYS_INLINE void transpose_four(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    const Floats4 a = load_four(from), b = load_four(from + from_stride), c = load_four(from + 2 * from_stride),
                  d = load_four(from + 3 * from_stride);
    const Floats4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Floats4 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Floats4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Floats4 cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const Floats4 columns[4] = {
        __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7),
        __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * to_stride, &columns[i], sizeof columns[i]);
}

// T: of the activations, C: of the cache.
template <class T, class C>
ALWAYS_INLINE void pack_keys_of(const Tile& tile, int64_t vectors, float* panel) {
    float rows[kLanes][kChunk];
    for (int64_t first = 0; first < vectors * kLanes; first += kLanes)
        for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
            for (int64_t t = 0; t < kLanes; ++t)
                store(rows[t], load_as<T>(row_of<C>(tile, first + t) + d, tile.head_dim - d));
            for (int64_t t = 0; t < kLanes; t += 4)
                for (int64_t i = 0; i < kChunk; i += 4)
                    transpose_four(&rows[t][i], kChunk, panel + (d + i) * kPanel + first + t, kPanel);
            tile.next->lines(kLanes * kChunk * static_cast<int64_t>(sizeof(C)) / kCacheLine);
        }
}

template <class T, class C>
ALWAYS_INLINE void pack_values_of(const Tile& tile, int64_t first, int64_t end, float* panels) {
    for (int64_t t = first; t < end; ++t) {
        for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
            float* to = panels + (d / kPanel * kTile + t) * kPanel + d % kPanel;
            store(to, load_as<T>(row_of<C>(tile, t) + d, tile.head_dim - d));
        }
        tile.next->lines((tile.head_dim * static_cast<int64_t>(sizeof(C)) + kCacheLine - 1) / kCacheLine);
    }
}

// The product with vectors of type V: GCC keeps a vector in registers only if the machine has registers of this size.
template <class V, int Rows, int Vectors>
ALWAYS_INLINE void multiply_block(const Product& p, int64_t row, int64_t column) {
    constexpr int64_t kWidth = sizeof(V) / sizeof(float);
    const float* a = reinterpret_cast<const float*>(p.a) + row * p.a_stride;
    const float* b = reinterpret_cast<const float*>(p.b) + column;
    float* c = p.c + row * p.c_stride + column;
    V sums[Rows][Vectors] = {};
    if (p.add)
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) std::memcpy(&sums[r][v], c + r * p.c_stride + v * kWidth, sizeof(V));
    for (int64_t i = 0; i < p.depth; ++i) {
        V words[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) std::memcpy(&words[v], b + i * kPanel + v * kWidth, sizeof(V));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const float word = a[r * p.a_stride + i];
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sums[r][v] += word * words[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) std::memcpy(c + r * p.c_stride + v * kWidth, &sums[r][v], sizeof(V));
}

template <class V, int Vectors>
ALWAYS_INLINE void multiply_columns(const Product& p, int64_t column) {
    int64_t row = 0;
    for (; row + 6 <= p.rows; row += 6) multiply_block<V, 6, Vectors>(p, row, column);
    for (; row + 2 <= p.rows; row += 2) multiply_block<V, 2, Vectors>(p, row, column);
    for (; row < p.rows; ++row) multiply_block<V, 1, Vectors>(p, row, column);
}

// Vectors: as many as there are registers for, with six rows.
template <class V, int Vectors>
ALWAYS_INLINE void multiply_with(const Product& p) {
    constexpr int64_t kWidth = sizeof(V) / sizeof(float);
    int64_t column = 0;
    for (; column + Vectors * kWidth <= p.vectors * kLanes; column += Vectors * kWidth)
        multiply_columns<V, Vectors>(p, column);
    for (; column < p.vectors * kLanes; column += kWidth) multiply_columns<V, 1>(p, column);
}

template <class T>
ALWAYS_INLINE void finish_of(const float* state, int64_t head_dim, T* out) {
    const float inverse = 1.0f / state[1];
    for (int64_t d = 0; d < head_dim; d += kChunk) {
        const Chunk sums = load(state + kStatistics + d);
        store(out + d, {sums.first * inverse, sums.second * inverse}, head_dim - d);
    }
}

#if defined(__x86_64__) && defined(__GNUC__)

__attribute__((target("arch=x86-64-v4"))) void multiply_v4(const Product& product) {
    multiply_with<Floats, 4>(product);
}
__attribute__((target("arch=x86-64-v3"))) void multiply_v3(const Product& product) {
    multiply_with<Floats8, 2>(product);
}
void multiply_v1(const Product& product) { multiply_with<Floats4, 2>(product); }

void (*multiply())(const Product&) {
    if (__builtin_cpu_supports("avx512f")) return multiply_v4;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? multiply_v3 : multiply_v1;
}

#else

void multiply_plain(const Product& product) { multiply_with<Floats4, 4>(product); }

void (*multiply())(const Product&) { return multiply_plain; }

#endif

// ---------------------------------------------------------------------------------------------------------------------
// CLONED functions that call the loops above: one plain function for each type, since a template cannot be cloned.

CLONED void exponentiate(float* scores, int64_t from, int64_t to, const Softmax& softmax, const Scales& scales,
                         float* state) {
    const float maximum = scale_scores(scores, from, to, softmax, scales.keys);
    const int64_t first = round_down(from, kLanes), end = round_up(to, kLanes);
    Floats total = {};
    for (int64_t t = first; t < end; t += kLanes) {
        const Floats weights = exp_of_negative(load_floats(scores + t) - maximum);
        store_floats(scores + t, scales.values ? weights * load_floats(scales.values + t) : weights);
        total += weights;
    }
    std::fill(scores + round_down(from, kTile), scores + first, 0.0f);
    std::fill(scores + end, scores + round_up(to, kTile), 0.0f);
    state[0] = maximum;
    state[1] = sum_of(total);
}

CLONED void merge(const float* next, int64_t size, float* state) {
    const float maximum = std::max(state[0], next[0]);
    const float factor = exp_of_negative(splat(std::min(state[0], next[0]) - maximum))[0];
    const float before = state[0] < maximum ? factor : 1.0f, now = next[0] < maximum ? factor : 1.0f;
    state[0] = maximum;
    state[1] = before * state[1] + now * next[1];
    for (int64_t d = kStatistics; d < kStatistics + size; d += kLanes)
        store_floats(state + d, before * load_floats(state + d) + now * load_floats(next + d));
}

#define DEFINE_LOOPS(T)                                                                                        \
    CLONED void pack_query_##T(const void* query, int64_t head_dim, uint32_t* words) {                         \
        pack_query_of(static_cast<const T*>(query), head_dim, reinterpret_cast<float*>(words));                \
    }                                                                                                          \
    CLONED void finish_##T(const float* state, int64_t head_dim, void* out) {                                  \
        finish_of(state, head_dim, static_cast<T*>(out));                                                      \
    }

#define DEFINE_PACKING(T, C)                                                                                   \
    CLONED void pack_keys_##T##_##C(const Tile& tile, int64_t vectors, uint32_t* panel) {                      \
        pack_keys_of<T, C>(tile, vectors, reinterpret_cast<float*>(panel));                                    \
    }                                                                                                          \
    CLONED void pack_values_##T##_##C(const Tile& tile, int64_t first, int64_t end, uint32_t* panels) {        \
        pack_values_of<T, C>(tile, first, end, reinterpret_cast<float*>(panels));                              \
    }

#define DEFINE_TYPE(T)               \
    DEFINE_LOOPS(T)                  \
    DEFINE_PACKING(T, float)         \
    DEFINE_PACKING(T, BFloat16)      \
    DEFINE_PACKING(T, Float16)       \
    DEFINE_PACKING(T, Int8)          \
    DEFINE_PACKING(T, Float8E4M3)    \
    DEFINE_PACKING(T, Float8E5M2)

DEFINE_TYPE(float)
DEFINE_TYPE(BFloat16)

#define TILES_OF(T, C) \
    { 1, pack_query_##T, pack_keys_##T##_##C, pack_values_##T##_##C, multiply(), exponentiate, merge, finish_##T }

// In the order of CacheType.
#define ALL_TILES_OF(T)                                                                                        \
    {                                                                                                          \
        TILES_OF(T, float), TILES_OF(T, BFloat16), TILES_OF(T, Float16), TILES_OF(T, Int8),                    \
            TILES_OF(T, Float8E4M3), TILES_OF(T, Float8E5M2)                                                   \
    }

struct Implementations {
    AttentionTiles of[2][6] = {ALL_TILES_OF(float), ALL_TILES_OF(BFloat16)};  // by DataType and CacheType

    explicit Implementations(AttentionLevel level) {
        const bool avx2 = level == kAttentionAvx2 || (level == kAttentionBest && !has_avx512());
        for (int32_t type = 0; type < 2; ++type)
            for (int32_t cache_type = 0; cache_type < 6; ++cache_type) {
                if (avx2) use_avx2(type, cache_type, &of[type][cache_type]);
                if (level == kAttentionBest) use_avx512(type, cache_type, &of[type][cache_type]);
            }
    }

    static bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
        return __builtin_cpu_supports("avx512f");
#else
        return false;
#endif
    }
};

}  // namespace

const AttentionTiles& attention_tiles(int32_t type, int32_t cache_type, AttentionLevel level) {
    static const Implementations levels[] = {Implementations(kAttentionPortable), Implementations(kAttentionAvx2),
                                             Implementations(kAttentionBest)};
    return levels[level].of[type][cache_type];
}
