// The arithmetic of attention with AVX-512: keys are transposed 16 x 16, and AVX512-BF16 multiplies bfloat16 elements
// without widening them.

#include "attention_bytes.h"

#define FEW_TARGET "arch=x86-64-v4,avx512bf16"
#include "attention_few.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define BF16 __attribute__((target("arch=x86-64-v4,avx512bf16")))
#define BF16_INLINE static inline __attribute__((always_inline, target("arch=x86-64-v4,avx512bf16")))

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

// Keys are transposed as rows of words, whatever the words contain.
template <class T>
AVX512_INLINE void pack_words(const Tile& tile, int64_t vectors, uint32_t* panel) {
    constexpr int64_t kStep = 64 / sizeof(T), kWordElements = 4 / sizeof(T);
    for (int64_t vector = 0; vector < vectors; ++vector) {
        const T* keys[kLanes];
        for (int t = 0; t < kLanes; ++t)
            keys[t] = reinterpret_cast<const T*>(tile.head + tile.offsets[vector * kLanes + t]);
        for (int64_t d = 0; d < padded_dim(tile.head_dim); d += kStep) {
            const __mmask64 mask = first_bytes((tile.head_dim - d) * static_cast<int64_t>(sizeof(T)));
            __m512i rows[kLanes];
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) rows[t] = load_bytes(keys[t] + d, mask);
            transpose(rows);
            uint32_t* to = panel + d / kWordElements * kPanel + vector * kLanes;
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) _mm512_storeu_si512(to + i * kPanel, rows[i]);
            tile.next->lines(kLanes);
        }
    }
}

AVX512 void pack_keys_float(const Tile& tile, int64_t vectors, uint32_t* panel) {
    pack_words<float>(tile, vectors, panel);
}

AVX512 void pack_keys_bfloat16(const Tile& tile, int64_t vectors, uint32_t* panel) {
    pack_words<BFloat16>(tile, vectors, panel);
}

AVX512 void pack_query_bfloat16(const void* query, int64_t head_dim, uint32_t* words) {
    for (int64_t d = 0; d < head_dim; d += kChunk)
        _mm512_storeu_si512(words + d / 2,
                            load_bytes(static_cast<const BFloat16*>(query) + d, first_bytes(2 * (head_dim - d))));
}

// The elements of a cache in bfloat16, for attention_few.h. Interleaving two tokens works within 128-bit lanes: of 32
// elements the first vector has those with d % 8 < 4, the second one the others. `finish` puts them in order.
struct BFloat16Elements {
    static constexpr int kWords = 1;
    struct Table {};

    FEW_INLINE Table table() { return {}; }
    FEW_INLINE void words(__m512i keys, const Table&, __m512i (&words)[kWords]) { words[0] = keys; }
    FEW_INLINE void pairs(const char* even, const char* odd, __mmask32 even_mask, __mmask32 odd_mask, const Table&,
                          __m512i (&words)[2]) {
        const __m512i x = _mm512_maskz_loadu_epi16(even_mask, even), y = _mm512_maskz_loadu_epi16(odd_mask, odd);
        words[0] = _mm512_unpacklo_epi16(x, y);
        words[1] = _mm512_unpackhi_epi16(x, y);
    }
};

BF16 void pack_values_bfloat16(const Tile& tile, int64_t first, int64_t end, uint32_t* panels) {
    for (int64_t word = first / 2; 2 * word < end; ++word) {
        const TokenPair pair(word, first, end);
        const char *even = tile.head + tile.offsets[pair.even], *odd = tile.head + tile.offsets[pair.odd];
        for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
            const uint32_t mask = static_cast<uint32_t>(first_bytes(tile.head_dim - d));
            uint32_t* to = panels + (d / kPanel * (kTile / 2) + word) * kPanel + d % kPanel;
            __m512i words[2];
            BFloat16Elements::pairs(even + 2 * d, odd + 2 * d, pair.even_mask & mask, pair.odd_mask & mask, {}, words);
            _mm512_storeu_si512(to, words[0]);
            _mm512_storeu_si512(to + kLanes, words[1]);
            tile.next->lines(2);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products.

template <int Rows, int Vectors>
BF16_INLINE void multiply_block(const Product& p, int64_t row, int64_t vector) {
    const uint32_t* a = p.a + row * p.a_stride;
    const uint32_t* b = p.b + vector * kLanes;
    float* c = p.c + row * p.c_stride + vector * kLanes;
    __m512 sums[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
            sums[r][v] = p.add ? _mm512_loadu_ps(c + r * p.c_stride + v * kLanes) : _mm512_setzero_ps();
    for (int64_t i = 0; i < p.depth; ++i) {
        __m512i words[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) words[v] = _mm512_loadu_si512(b + i * kPanel + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const __m512i word = _mm512_set1_epi32(static_cast<int32_t>(a[r * p.a_stride + i]));
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v)
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], (__m512bh)words[v], (__m512bh)word);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * p.c_stride + v * kLanes, sums[r][v]);
}

template <int Vectors>
BF16_INLINE void multiply_vectors(const Product& p, int64_t vector) {
    int64_t row = 0;
    for (; row + 6 <= p.rows; row += 6) multiply_block<6, Vectors>(p, row, vector);
    for (; row + 4 <= p.rows; row += 4) multiply_block<4, Vectors>(p, row, vector);
    for (; row + 2 <= p.rows; row += 2) multiply_block<2, Vectors>(p, row, vector);
    for (; row < p.rows; ++row) multiply_block<1, Vectors>(p, row, vector);
}

BF16 void multiply(const Product& product) {
    static_assert(kVectors == 4);
    int64_t vector = 0;
    if (product.vectors == 4) multiply_vectors<4>(product, 0), vector = 4;
    for (; vector + 2 <= product.vectors; vector += 2) multiply_vectors<2>(product, vector);
    if (vector < product.vectors) multiply_vectors<1>(product, vector);
}

// ---------------------------------------------------------------------------------------------------------------------
// Softmax and results.

// 2^x for x <= 0, with a relative error of 3e-6, which is little beside the rounding to bfloat16: x = n + r with
// |r| <= 1/2, and a polynomial for 2^r that is 1 at 0.
BF16_INLINE __m512 power_of_two(__m512 x) {
    const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // NaN if x is
    const __m512 n = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_sub_ps(bounded, n);
    __m512 p = _mm512_set1_ps(0.009582853f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.055906427f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24024099f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69312419f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// The weights are rounded to bfloat16, and their sum is of the rounded ones, so that the errors of both mostly cancel.
// With scales the sum is of the weights before they are scaled and rounded.
BF16 void exponentiate(float* scores, int64_t from, int64_t to, const Softmax& softmax, const Scales& scales,
                       float* state) {
    const float maximum = scale_scores(scores, from, to, softmax, scales.keys);
    const int64_t first = round_down(from, kLanes), end = round_up(to, kLanes);
    // Weights are half as long as scores, so they are written where scores were read before.
    uint16_t* weights = reinterpret_cast<uint16_t*>(scores);
    constexpr float kLog2E = 1.44269504f;
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = first; t < end; t += kLanes) {
        const __m512 distance = _mm512_sub_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(maximum));
        const __m512 weight = power_of_two(_mm512_mul_ps(distance, _mm512_set1_ps(kLog2E)));
        const __m512 scaled = scales.values ? _mm512_mul_ps(weight, _mm512_loadu_ps(scales.values + t)) : weight;
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(scaled);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + t), rounded);
        const __m512 added = scales.values ? weight : (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
        total = _mm512_add_ps(total, added);
    }
    std::fill(weights + round_down(from, kTile), weights + first, uint16_t{0});
    std::fill(weights + end, weights + round_up(to, kTile), uint16_t{0});
    state[0] = maximum;
    state[1] = sum_of((Floats)total);
}

// Interleaved: the sums are in the order of pack_values_bfloat16.
template <bool interleaved>
BF16_INLINE void finish_of(const float* state, int64_t head_dim, void* out) {
    const __m512 inverse = _mm512_set1_ps(1.0f / state[1]);
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int64_t d = 0; d < head_dim; d += kChunk) {
        const float* sums = state + kStatistics + d;
        const __m512 low = _mm512_mul_ps(_mm512_loadu_ps(sums), inverse);
        const __m512 high = _mm512_mul_ps(_mm512_loadu_ps(sums + kLanes), inverse);
        __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        if constexpr (interleaved) rounded = _mm512_permutexvar_epi64(order, rounded);
        uint16_t* to = static_cast<uint16_t*>(out) + d;
        if (head_dim - d >= kChunk)
            _mm512_storeu_si512(to, rounded);
        else
            _mm512_mask_storeu_epi16(to, (__mmask32(1) << (head_dim - d)) - 1, rounded);
    }
}

BF16 void finish_interleaved(const float* state, int64_t head_dim, void* out) { finish_of<true>(state, head_dim, out); }
BF16 void finish(const float* state, int64_t head_dim, void* out) { finish_of<false>(state, head_dim, out); }

}  // namespace

void use_avx512(int32_t type, int32_t cache_type, AttentionTiles* tiles) {
    if (!has_avx512()) return;
    if (type == kFloat32 && cache_type == kCacheFloat32)
        tiles->pack_keys = pack_keys_float;
    else if (type == kBFloat16 && __builtin_cpu_supports("avx512bf16")) {
        if (cache_type == kCacheBFloat16)
            *tiles = {2,
                      pack_query_bfloat16,
                      pack_keys_bfloat16,
                      pack_values_bfloat16,
                      multiply,
                      exponentiate,
                      tiles->merge,
                      finish_interleaved,
                      kMostFewRows,
                      multiply_few_keys<BFloat16Elements>,
                      add_few_values<BFloat16Elements>};
        else if (BytePacking packing; byte_packing(cache_type, &packing))
            *tiles = {2,
                      packing.pack_query,
                      packing.pack_keys,
                      packing.pack_values,
                      multiply,
                      exponentiate,
                      tiles->merge,
                      finish,
                      packing.most_few_rows,
                      packing.multiply_few_keys,
                      packing.add_few_values};
    }
}

#else

void use_avx512(int32_t, int32_t, AttentionTiles*) {}

#endif
