// The arithmetic of attention with AVX2: GCC computes its own vectors of 64 bytes number by number on such machines,
// where it compares or converts them. A word is a float32, and elements are widened, in order, when they are packed.

#include "attention_tiles.h"
#include "avx2.h"

#if defined(__x86_64__) && defined(__GNUC__)

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Eight elements as float32. Those of Int8 are without their scale.

AVX2_INLINE __m128i load_bits128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
AVX2_INLINE __m128i load_bits64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }

AVX2_INLINE __m256 load_eight(const float* p) { return _mm256_loadu_ps(p); }
AVX2_INLINE __m256 load_eight(const BFloat16* p) {
    return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits128(p)), 16);
}
AVX2_INLINE __m256 load_eight(const Float16* p) { return _mm256_cvtph_ps(load_bits128(p)); }
AVX2_INLINE __m256 load_eight(const Int8* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_bits64(p))); }

// The upper half of a float16.
AVX2_INLINE __m256 load_eight(const Float8E5M2* p) {
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(load_bits64(p)), 8));
}

// As a float16 with an exponent of one bit more, which is too small by 8.
AVX2_INLINE __m256 load_eight(const Float8E4M3* p) {
    using B = SmallFloatBits<Float8E4M3>;
    const __m128i x = _mm_cvtepu8_epi16(load_bits64(p)), all_ones = _mm_set1_epi16(B::kMagnitude);
    const __m128i magnitude = _mm_and_si128(x, all_ones), sign = _mm_slli_epi16(_mm_xor_si128(x, magnitude), 8);
    const __m128i nan = _mm_and_si128(_mm_cmpeq_epi16(magnitude, all_ones), _mm_set1_epi16(0x7e00));
    const __m128i number = _mm_or_si128(_mm_slli_epi16(magnitude, 7), _mm_or_si128(sign, nan));
    return _mm256_mul_ps(_mm256_cvtph_ps(number), _mm256_set1_ps(256.0f));
}

// The elements of a row from p on, at least kChunk: behind the last one that is `left`, zeros in `padded`.
template <class C>
AVX2_INLINE const C* whole_chunk(const C* p, int64_t left, C (&padded)[kChunk]) {
    if (left >= kChunk) return p;
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, p, left * sizeof(C));
    return padded;
}

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

// Transposes 8 x 8 words: first within the 128-bit lanes of four rows each, then the lanes.
AVX2_INLINE void transpose(__m256 (&rows)[kEight]) {
    __m256 quads[2][4];  // quads[i][c]: columns c and c + 4 of the rows 4 i to 4 i + 3
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m256d low_01 = (__m256d)_mm256_unpacklo_ps(rows[4 * i], rows[4 * i + 1]);
        const __m256d high_01 = (__m256d)_mm256_unpackhi_ps(rows[4 * i], rows[4 * i + 1]);
        const __m256d low_23 = (__m256d)_mm256_unpacklo_ps(rows[4 * i + 2], rows[4 * i + 3]);
        const __m256d high_23 = (__m256d)_mm256_unpackhi_ps(rows[4 * i + 2], rows[4 * i + 3]);
        quads[i][0] = (__m256)_mm256_unpacklo_pd(low_01, low_23);
        quads[i][1] = (__m256)_mm256_unpackhi_pd(low_01, low_23);
        quads[i][2] = (__m256)_mm256_unpacklo_pd(high_01, high_23);
        quads[i][3] = (__m256)_mm256_unpackhi_pd(high_01, high_23);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        rows[c] = _mm256_permute2f128_ps(quads[0][c], quads[1][c], 0x20);
        rows[c + 4] = _mm256_permute2f128_ps(quads[0][c], quads[1][c], 0x31);
    }
}

// Writes kChunk elements of eight keys as columns of a panel.
template <class C>
AVX2_INLINE void pack_eight_keys(const C* const* keys, float* panel) {
    for (int64_t d = 0; d < kChunk; d += kEight) {
        __m256 rows[kEight];
#pragma GCC unroll 8
        for (int t = 0; t < kEight; ++t) rows[t] = load_eight(keys[t] + d);
        transpose(rows);
#pragma GCC unroll 8
        for (int i = 0; i < kEight; ++i) _mm256_storeu_ps(panel + (d + i) * kPanel, rows[i]);
    }
}

// Pairs of elements are transposed before they are widened.
AVX2_INLINE void pack_eight_keys(const BFloat16* const* keys, float* panel) {
    const __m256 upper_halves = (__m256)_mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    for (int64_t d = 0; d < kChunk; d += 2 * kEight) {
        __m256 rows[kEight];
#pragma GCC unroll 8
        for (int t = 0; t < kEight; ++t) rows[t] = _mm256_loadu_ps(reinterpret_cast<const float*>(keys[t] + d));
        transpose(rows);
#pragma GCC unroll 8
        for (int i = 0; i < kEight; ++i) {
            float* to = panel + (d + 2 * i) * kPanel;
            _mm256_storeu_ps(to, (__m256)_mm256_slli_epi32((__m256i)rows[i], 16));
            _mm256_storeu_ps(to + kPanel, _mm256_and_ps(rows[i], upper_halves));
        }
    }
}

template <class C>
AVX2 void pack_keys(const Tile& tile, int64_t vectors, uint32_t* panel) {
    for (int64_t first = 0; first < vectors * kLanes; first += kLanes)
        for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
            C padded[kLanes][kChunk];
            const C* keys[kLanes];
            for (int64_t t = 0; t < kLanes; ++t)
                keys[t] = whole_chunk(reinterpret_cast<const C*>(tile.head + tile.offsets[first + t]) + d,
                                      tile.head_dim - d, padded[t]);
            float* to = reinterpret_cast<float*>(panel) + d * kPanel + first;
            pack_eight_keys(keys, to);
            pack_eight_keys(keys + kEight, to + kEight);
            tile.next->lines(kLanes * kChunk * static_cast<int64_t>(sizeof(C)) / kCacheLine);
        }
}

template <class C>
AVX2 void pack_values(const Tile& tile, int64_t first, int64_t end, uint32_t* panels) {
    for (int64_t t = first; t < end; ++t) {
        const C* row = reinterpret_cast<const C*>(tile.head + tile.offsets[t]);
        for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
            C padded[kChunk];
            const C* values = whole_chunk(row + d, tile.head_dim - d, padded);
            float* to = reinterpret_cast<float*>(panels) + (d / kPanel * kTile + t) * kPanel + d % kPanel;
#pragma GCC unroll 4
            for (int64_t i = 0; i < kChunk; i += kEight) _mm256_storeu_ps(to + i, load_eight(values + i));
        }
        tile.next->lines((tile.head_dim * static_cast<int64_t>(sizeof(C)) + kCacheLine - 1) / kCacheLine);
    }
}

template <class T>
AVX2 void pack_query(const void* query, int64_t head_dim, uint32_t* words) {
    for (int64_t d = 0; d < head_dim; d += kChunk) {
        T padded[kChunk];
        const T* elements = whole_chunk(static_cast<const T*>(query) + d, head_dim - d, padded);
        for (int64_t i = 0; i < kChunk; i += kEight)
            _mm256_storeu_ps(reinterpret_cast<float*>(words) + d + i, load_eight(elements + i));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products.

template <int Rows, int Vectors>
AVX2_INLINE void multiply_block(const Product& p, int64_t row, int64_t column) {
    const float* a = reinterpret_cast<const float*>(p.a) + row * p.a_stride;
    const float* b = reinterpret_cast<const float*>(p.b) + column;
    float* c = p.c + row * p.c_stride + column;
    __m256 sums[Rows][Vectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
            sums[r][v] = p.add ? _mm256_loadu_ps(c + r * p.c_stride + v * kEight) : _mm256_setzero_ps();
    for (int64_t i = 0; i < p.depth; ++i) {
        __m256 words[Vectors];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) words[v] = _mm256_loadu_ps(b + i * kPanel + v * kEight);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
            const __m256 word = _mm256_broadcast_ss(a + r * p.a_stride + i);
#pragma GCC unroll 8
            for (int v = 0; v < Vectors; ++v) sums[r][v] = _mm256_fmadd_ps(word, words[v], sums[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) _mm256_storeu_ps(c + r * p.c_stride + v * kEight, sums[r][v]);
}

// Few rows take many columns at a time, so that enough sums are formed side by side.
template <int Rows, int Vectors>
AVX2_INLINE void multiply_rows(const Product& p, int64_t row) {
    int64_t column = 0;
    for (; column + Vectors * kEight <= p.vectors * kLanes; column += Vectors * kEight)
        multiply_block<Rows, Vectors>(p, row, column);
    for (; column < p.vectors * kLanes; column += kLanes) multiply_block<Rows, 2>(p, row, column);
}

AVX2 void multiply(const Product& p) {
    const int64_t whole = p.rows / 6 * 6;
    for (int64_t column = 0; column < p.vectors * kLanes; column += kLanes)
        for (int64_t row = 0; row < whole; row += 6) multiply_block<6, 2>(p, row, column);
    switch (p.rows - whole) {
        case 5: multiply_rows<5, 2>(p, whole); break;
        case 4: multiply_rows<4, 2>(p, whole); break;
        case 3: multiply_rows<3, 4>(p, whole); break;
        case 2: multiply_rows<2, 4>(p, whole); break;
        case 1: multiply_rows<1, 8>(p, whole);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Products of few rows with keys and values that are not packed.

constexpr int64_t kMostFewRows = 3;  // as there are registers for

// Adds the products of 16 elements, from `d` on, of eight keys with those of Rows queries.
template <int Rows, class C>
AVX2_INLINE void add_eight_keys(const C* const* keys, int64_t d, const float* queries, int64_t stride,
                                __m256 (&sums)[Rows]) {
    for (int64_t half = 0; half < 2 * kEight; half += kEight) {
        __m256 rows[kEight];
#pragma GCC unroll 8
        for (int t = 0; t < kEight; ++t) rows[t] = load_eight(keys[t] + d + half);
        transpose(rows);
#pragma GCC unroll 8
        for (int i = 0; i < kEight; ++i)
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r)
                sums[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(queries + r * stride + half + i), rows[i], sums[r]);
    }
}

template <int Rows>
AVX2_INLINE void add_eight_keys(const BFloat16* const* keys, int64_t d, const float* queries, int64_t stride,
                                __m256 (&sums)[Rows]) {
    const __m256 upper_halves = (__m256)_mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    __m256 rows[kEight];
#pragma GCC unroll 8
    for (int t = 0; t < kEight; ++t) rows[t] = _mm256_loadu_ps(reinterpret_cast<const float*>(keys[t] + d));
    transpose(rows);
#pragma GCC unroll 8
    for (int i = 0; i < kEight; ++i) {
        const __m256 even = (__m256)_mm256_slli_epi32((__m256i)rows[i], 16);
        const __m256 odd = _mm256_and_ps(rows[i], upper_halves);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
            const float* query = queries + r * stride + 2 * i;
            sums[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(query), even, sums[r]);
            sums[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(query + 1), odd, sums[r]);
        }
    }
}

// The scores of 16 keys: of two times eight, since the additions of a sum wait for each other.
template <class C, int Rows>
AVX2_INLINE void score_keys(const FewRows& few, const Tile& tile, int64_t first) {
    __m256 low[Rows], high[Rows];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) low[r] = high[r] = _mm256_setzero_ps();
    for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
        C padded[kLanes][kChunk];
        const C* keys[kLanes];
        for (int64_t t = 0; t < kLanes; ++t)
            keys[t] = whole_chunk(reinterpret_cast<const C*>(tile.head + tile.offsets[first + t]) + d,
                                  tile.head_dim - d, padded[t]);
        const float* queries = reinterpret_cast<const float*>(few.a) + d;
        for (int64_t i = 0; i < kChunk; i += 2 * kEight) {
            add_eight_keys<Rows>(keys, i, queries + i, few.a_stride, low);
            add_eight_keys<Rows>(keys + kEight, i, queries + i, few.a_stride, high);
        }
        tile.next->lines(kLanes * kChunk * static_cast<int64_t>(sizeof(C)) / kCacheLine);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
        _mm256_storeu_ps(few.c + r * few.c_stride + first, low[r]);
        _mm256_storeu_ps(few.c + r * few.c_stride + first + kEight, high[r]);
    }
}

// The weighted sums of kChunk elements from `d` on.
template <class C, int Rows>
AVX2_INLINE void sum_chunk(const FewRows& few, const Tile& tile, int64_t first, int64_t end, int64_t d) {
    constexpr int kVectorsOfChunk = kChunk / kEight;
    const float* weights = reinterpret_cast<const float*>(few.a);
    __m256 sums[Rows][kVectorsOfChunk];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsOfChunk; ++v)
            sums[r][v] = _mm256_loadu_ps(few.c + r * few.c_stride + d + v * kEight);
    for (int64_t t = first; t < end; ++t) {
        C padded[kChunk];
        const C* row = reinterpret_cast<const C*>(tile.head + tile.offsets[t]);
        const C* elements = whole_chunk(row + d, tile.head_dim - d, padded);
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsOfChunk; ++v) {
            const __m256 values = load_eight(elements + v * kEight);
#pragma GCC unroll 4
            for (int r = 0; r < Rows; ++r)
                sums[r][v] = _mm256_fmadd_ps(_mm256_broadcast_ss(weights + r * few.a_stride + t), values, sums[r][v]);
        }
        if (d == 0) tile.next->lines((tile.head_dim * static_cast<int64_t>(sizeof(C)) + kCacheLine - 1) / kCacheLine);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectorsOfChunk; ++v)
            _mm256_storeu_ps(few.c + r * few.c_stride + d + v * kEight, sums[r][v]);
}

template <class C, int Rows>
AVX2_INLINE void score_rows(const FewRows& few, const Tile& tile, int64_t vectors) {
    for (int64_t vector = 0; vector < vectors; ++vector) score_keys<C, Rows>(few, tile, vector * kLanes);
}

template <class C, int Rows>
AVX2_INLINE void sum_rows(const FewRows& few, const Tile& tile, int64_t first, int64_t end) {
    for (int64_t d = 0; d < tile.head_dim; d += kChunk) sum_chunk<C, Rows>(few, tile, first, end, d);
}

template <class C>
AVX2 void multiply_few_keys(const FewRows& few, const Tile& tile, int64_t vectors) {
    switch (few.rows) {
        case 1: return score_rows<C, 1>(few, tile, vectors);
        case 2: return score_rows<C, 2>(few, tile, vectors);
        default: return score_rows<C, kMostFewRows>(few, tile, vectors);
    }
}

template <class C>
AVX2 void add_few_values(const FewRows& few, const Tile& tile, int64_t first, int64_t end) {
    switch (few.rows) {
        case 1: return sum_rows<C, 1>(few, tile, first, end);
        case 2: return sum_rows<C, 2>(few, tile, first, end);
        default: return sum_rows<C, kMostFewRows>(few, tile, first, end);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Softmax and results.

// exp(x) for x from kExpLowest to 88, as scaled_exp_of.
AVX2_INLINE __m256 bounded_exp_of(__m256 x) {
    const __m256 to_integer = _mm256_set1_ps(12582912.0f);  // 1.5 * 2^23
    const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(1.44269504f), to_integer);
    const __m256 n = _mm256_sub_ps(shifted, to_integer);
    const __m256 high = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), high);
    __m256 p = _mm256_set1_ps(1.0f / 5040);
    for (const float coefficient : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(coefficient));
    const __m256i exponent = _mm256_sub_epi32((__m256i)shifted, (__m256i)to_integer);
    const __m256i biased = _mm256_add_epi32(exponent, _mm256_set1_epi32(127));
    return _mm256_mul_ps(p, (__m256)_mm256_slli_epi32(biased, 23));
}

// exp(x) for x <= 0; 0 below kExpLowest.
AVX2_INLINE __m256 exp_of_nonpositive(__m256 x) {
    const __m256 lowest = _mm256_set1_ps(kExpLowest);
    const __m256 e = bounded_exp_of(_mm256_max_ps(lowest, x));  // NaN if x is
    return _mm256_andnot_ps(_mm256_cmp_ps(x, lowest, _CMP_LT_OQ), e);
}

// As tanh_of in attention_tiles.h.
AVX2_INLINE __m256 tanh_of(__m256 x) {
    const __m256 sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f)), size = _mm256_xor_ps(x, sign);
    const __m256 square = _mm256_mul_ps(x, x), one = _mm256_set1_ps(1.0f);
    __m256 p = _mm256_set1_ps(-0.00589515035f);
    for (const float coefficient : {0.0207959656f, -0.0537838287f, 0.133319241f, -0.33333298f})
        p = _mm256_fmadd_ps(p, square, _mm256_set1_ps(coefficient));
    const __m256 near = _mm256_fmadd_ps(x, _mm256_mul_ps(square, p), x);
    const __m256 power = bounded_exp_of(_mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_add_ps(size, size)));
    const __m256 far = _mm256_sub_ps(one, _mm256_div_ps(_mm256_set1_ps(2.0f), _mm256_add_ps(power, one)));
    return _mm256_blendv_ps(_mm256_or_ps(far, sign), near, _mm256_cmp_ps(size, _mm256_set1_ps(0.6f), _CMP_LT_OQ));
}

AVX2_INLINE float largest_of(__m256 x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

AVX2_INLINE float total_of(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Eight scores as they are before the softmax: scaled, and with the softcap.
AVX2_INLINE __m256 scaled_scores(const float* scores, const Softmax& softmax, const float* key_scales) {
    __m256 x = _mm256_loadu_ps(scores);
    if (key_scales) x = _mm256_mul_ps(x, _mm256_loadu_ps(key_scales));
    if (softmax.softcap == 0.0f) return _mm256_mul_ps(x, _mm256_set1_ps(softmax.scale));
    const __m256 part = tanh_of(_mm256_mul_ps(x, _mm256_set1_ps(softmax.scale / softmax.softcap)));
    return _mm256_mul_ps(part, _mm256_set1_ps(softmax.softcap));
}

AVX2 void exponentiate(float* scores, int64_t from, int64_t to, const Softmax& softmax, const Scales& scales,
                       float* state) {
    const int64_t first = round_down(from, kLanes), end = round_up(to, kLanes);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_set1_epi32(static_cast<int32_t>(from) - 1);
    const __m256i behind = _mm256_set1_epi32(static_cast<int32_t>(to));
    const __m256 lowest = _mm256_set1_ps(-std::numeric_limits<float>::infinity());
    __m256 best = lowest;
    for (int64_t t = first; t < end; t += kEight) {
        const __m256i positions = _mm256_add_epi32(lanes, _mm256_set1_epi32(static_cast<int32_t>(t)));
        const __m256i seen =
            _mm256_and_si256(_mm256_cmpgt_epi32(positions, before), _mm256_cmpgt_epi32(behind, positions));
        const __m256 scaled = scaled_scores(scores + t, softmax, scales.keys ? scales.keys + t : nullptr);
        const __m256 visible = _mm256_blendv_ps(lowest, scaled, (__m256)seen);
        _mm256_storeu_ps(scores + t, visible);
        best = _mm256_max_ps(visible, best);
    }
    const float maximum = largest_of(best);
    __m256 total = _mm256_setzero_ps();
    for (int64_t t = first; t < end; t += kEight) {
        __m256 weights = exp_of_nonpositive(_mm256_sub_ps(_mm256_loadu_ps(scores + t), _mm256_set1_ps(maximum)));
        total = _mm256_add_ps(total, weights);
        if (scales.values) weights = _mm256_mul_ps(weights, _mm256_loadu_ps(scales.values + t));
        _mm256_storeu_ps(scores + t, weights);
    }
    std::fill(scores + round_down(from, kTile), scores + first, 0.0f);
    std::fill(scores + end, scores + round_up(to, kTile), 0.0f);
    state[0] = maximum;
    state[1] = total_of(total);
}

AVX2 void merge(const float* next, int64_t size, float* state) {
    const float maximum = std::max(state[0], next[0]);
    const __m256 distance = _mm256_set1_ps(std::min(state[0], next[0]) - maximum);
    const float factor = _mm256_cvtss_f32(exp_of_nonpositive(distance));
    const float before = state[0] < maximum ? factor : 1.0f, now = next[0] < maximum ? factor : 1.0f;
    state[0] = maximum;
    state[1] = before * state[1] + now * next[1];
    for (int64_t d = kStatistics; d < kStatistics + size; d += kEight) {
        const __m256 added = _mm256_mul_ps(_mm256_set1_ps(now), _mm256_loadu_ps(next + d));
        _mm256_storeu_ps(state + d, _mm256_fmadd_ps(_mm256_set1_ps(before), _mm256_loadu_ps(state + d), added));
    }
}

AVX2_INLINE void store_sixteen(float* p, __m256 low, __m256 high) {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + kEight, high);
}
AVX2_INLINE void store_sixteen(BFloat16* p, __m256 low, __m256 high) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bfloat16_of(low, high));
}

template <class T>
AVX2 void finish(const float* state, int64_t head_dim, void* out) {
    const __m256 inverse = _mm256_set1_ps(1.0f / state[1]);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
        const float* sums = state + kStatistics + d;
        const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(sums), inverse);
        const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(sums + kEight), inverse);
        T* to = static_cast<T*>(out) + d;
        if (head_dim - d >= kLanes) {
            store_sixteen(to, low, high);
        } else {
            T padded[kLanes];
            store_sixteen(padded, low, high);
            std::memcpy(to, padded, (head_dim - d) * sizeof(T));
        }
    }
}

template <class T, class C>
constexpr AttentionTiles kTiles = {1,
                                   pack_query<T>,
                                   pack_keys<C>,
                                   pack_values<C>,
                                   multiply,
                                   exponentiate,
                                   merge,
                                   finish<T>,
                                   kMostFewRows,
                                   multiply_few_keys<C>,
                                   add_few_values<C>};

// In the order of CacheType.
template <class T>
AttentionTiles tiles_of(int32_t cache_type) {
    static constexpr const AttentionTiles* kAll[] = {&kTiles<T, float>, &kTiles<T, BFloat16>,   &kTiles<T, Float16>,
                                                     &kTiles<T, Int8>,  &kTiles<T, Float8E4M3>, &kTiles<T, Float8E5M2>};
    return *kAll[cache_type];
}

}  // namespace

void use_avx2(int32_t type, int32_t cache_type, AttentionTiles* tiles) {
    if (!has_avx2()) return;
    *tiles = type == kFloat32 ? tiles_of<float>(cache_type) : tiles_of<BFloat16>(cache_type);
}

#else

void use_avx2(int32_t, int32_t, AttentionTiles*) {}

#endif
