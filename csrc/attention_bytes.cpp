// Packing of a KV cache with elements of one byte, with AVX512-VBMI: a byte becomes the two bytes of the bfloat16 element
// of the same value by two look-ups in tables of 128 entries, one for each magnitude.

#include "attention_bytes.h"

#define FEW_TARGET "arch=x86-64-v4,avx512bf16,avx512vbmi"
#include "attention_few.h"

#if defined(__x86_64__) && defined(__GNUC__)

#define VBMI __attribute__((target("arch=x86-64-v4,avx512vbmi")))
#define VBMI_INLINE static inline __attribute__((always_inline, target("arch=x86-64-v4,avx512vbmi")))

namespace {

// The bits of number * 2^exponent as bfloat16, for 0 <= number < 256.
constexpr uint32_t bfloat16_of(uint32_t number, int exponent) {
    if (number == 0) return 0;
    for (; number < 128; number *= 2) --exponent;
    return (static_cast<uint32_t>(exponent + 7 + 127) << 7) | (number & 127);
}

constexpr uint32_t value_of(uint32_t magnitude, const Int8*) { return bfloat16_of(magnitude, 0); }

template <int exponent, int mantissa, bool has_infinity>
constexpr uint32_t value_of(uint32_t magnitude, const SmallFloat<exponent, mantissa, has_infinity, uint8_t>*) {
    using B = SmallFloatBits<SmallFloat<exponent, mantissa, has_infinity, uint8_t>>;
    if (magnitude >= B::kSpecial) return has_infinity && magnitude == B::kSpecial ? 0x7f80 : 0x7fc0;
    const uint32_t power = magnitude >> mantissa, fraction = magnitude & ((1u << mantissa) - 1);
    const int last_digit = static_cast<int>(B::kRebias) - 127 - mantissa;  // exponent of the mantissa's unit for power 0
    return power ? bfloat16_of(fraction + (1u << mantissa), last_digit + static_cast<int>(power))
                 : bfloat16_of(fraction, last_digit + 1);
}

// The lower and upper bytes of the bfloat16 elements of all magnitudes.
template <class C>
struct Table {
    alignas(64) uint8_t low[128] = {}, high[128] = {};

    constexpr Table() {
        for (uint32_t magnitude = 0; magnitude < 128; ++magnitude) {
            const uint32_t bits = value_of(magnitude, static_cast<const C*>(nullptr));
            low[magnitude] = bits & 255;
            high[magnitude] = bits >> 8;
        }
    }
};

template <class C>
constexpr Table<C> kTable;

struct Registers {
    __m512i low[2], high[2];
};

template <class C>
VBMI_INLINE Registers load_table() {
    const Table<C>& table = kTable<C>;
    return {{_mm512_load_si512(table.low), _mm512_load_si512(table.low + 64)},
            {_mm512_load_si512(table.high), _mm512_load_si512(table.high + 64)}};
}

// The bfloat16 elements of the even and of the odd bytes.
struct Widened {
    __m512i even, odd;
};

template <class C>
VBMI_INLINE Widened widen(__m512i bytes, const Registers& table) {
    // The look-ups ignore the sign bit.
    const __m512i magnitudes = std::is_same_v<C, Int8> ? _mm512_abs_epi8(bytes) : bytes;
    const __m512i low = _mm512_permutex2var_epi8(table.low[0], magnitudes, table.low[1]);
    const __m512i size = _mm512_permutex2var_epi8(table.high[0], magnitudes, table.high[1]);
    constexpr int kOrAnd = 0xf8, kAndOr = 0xea;  // x | (y & z), (x & y) | z
    const __m512i high = _mm512_ternarylogic_epi32(size, bytes, _mm512_set1_epi8(static_cast<char>(0x80)), kOrAnd);
    return {_mm512_ternarylogic_epi32(low, _mm512_set1_epi16(0xff), _mm512_slli_epi16(high, 8), kAndOr),
            _mm512_ternarylogic_epi32(high, _mm512_set1_epi16(static_cast<int16_t>(0xff00)),
                                      _mm512_srli_epi16(low, 8), kAndOr)};
}

// A word of a key has elements 4 i and 4 i + 2, the next one 4 i + 1 and 4 i + 3: so they are after `widen`.
template <class C>
VBMI void pack_keys(const Tile& tile, int64_t vectors, uint32_t* panel) {
    const Registers table = load_table<C>();
    for (int64_t vector = 0; vector < vectors; ++vector) {
        const char* keys[kLanes];
        for (int t = 0; t < kLanes; ++t) keys[t] = tile.head + tile.offsets[vector * kLanes + t];
        for (int64_t d = 0; d < tile.head_dim; d += 64) {
            const __mmask64 mask = first_bytes(tile.head_dim - d);
            __m512i rows[kLanes];
#pragma GCC unroll 16
            for (int t = 0; t < kLanes; ++t) rows[t] = load_bytes(keys[t] + d, mask);
            transpose(rows);
            uint32_t* to = panel + d / 2 * kPanel + vector * kLanes;
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                const Widened words = widen<C>(rows[i], table);
                _mm512_storeu_si512(to + 2 * i * kPanel, words.even);
                _mm512_storeu_si512(to + (2 * i + 1) * kPanel, words.odd);
            }
            tile.next->lines(kLanes);
        }
    }
}

// The elements of a query in the order of those of a key.
VBMI void pack_query(const void* query, int64_t head_dim, uint32_t* words) {
    constexpr auto kOrder = 0xd8;  // 0, 2, 1, 3
    for (int64_t d = 0; d < head_dim; d += kChunk) {
        const __m512i x = load_bytes(static_cast<const uint16_t*>(query) + d, first_bytes(2 * (head_dim - d)));
        _mm512_storeu_si512(words + d / 2, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(x, kOrder), kOrder));
    }
}

// The order of the bytes of two tokens in which `widen` gives the elements d to d + 15 and d + 16 to d + 31 of both.
struct PairOrder {
    alignas(64) uint8_t places[64] = {};

    constexpr PairOrder() {
        for (int i = 0; i < 64; ++i) places[i] = static_cast<uint8_t>(i / 4 + i % 2 * 16 + i / 2 % 2 * 32);
    }
};

constexpr PairOrder kPairOrder;

// 32 elements of two tokens, a word for each element.
template <class C>
VBMI_INLINE Widened widen_pair(const char* even, const char* odd, uint32_t even_mask, uint32_t odd_mask, __m512i order,
                               const Registers& table) {
    const __m256i x = _mm256_maskz_loadu_epi8(even_mask, even), y = _mm256_maskz_loadu_epi8(odd_mask, odd);
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    return widen<C>(_mm512_permutexvar_epi8(order, both), table);
}

template <class C>
VBMI void pack_values(const Tile& tile, int64_t first, int64_t end, uint32_t* panels) {
    const Registers table = load_table<C>();
    const __m512i order = _mm512_load_si512(kPairOrder.places);
    for (int64_t word = first / 2; 2 * word < end; ++word) {
        const TokenPair pair(word, first, end);
        const char *even = tile.head + tile.offsets[pair.even], *odd = tile.head + tile.offsets[pair.odd];
        for (int64_t d = 0; d < tile.head_dim; d += kChunk) {
            const uint32_t mask = static_cast<uint32_t>(first_bytes(tile.head_dim - d));
            const Widened words =
                widen_pair<C>(even + d, odd + d, pair.even_mask & mask, pair.odd_mask & mask, order, table);
            uint32_t* to = panels + (d / kPanel * (kTile / 2) + word) * kPanel + d % kPanel;
            _mm512_storeu_si512(to, words.even);
            _mm512_storeu_si512(to + kLanes, words.odd);
            tile.next->lines(1);
        }
    }
}

// The elements of such a cache, for attention_few.h.
template <class C>
struct ByteElements {
    static constexpr int kWords = 2;
    struct Table {
        Registers values;
        __m512i order;
    };

    FEW_INLINE Table table() { return {load_table<C>(), _mm512_load_si512(kPairOrder.places)}; }

    FEW_INLINE void words(__m512i keys, const Table& table, __m512i (&words)[kWords]) {
        const Widened widened = widen<C>(keys, table.values);
        words[0] = widened.even;
        words[1] = widened.odd;
    }

    FEW_INLINE void pairs(const char* even, const char* odd, __mmask32 even_mask, __mmask32 odd_mask,
                          const Table& table, __m512i (&words)[2]) {
        const Widened widened = widen_pair<C>(even, odd, even_mask, odd_mask, table.order, table.values);
        words[0] = widened.even;
        words[1] = widened.odd;
    }
};

template <class C>
constexpr BytePacking kPacking = {
    pack_query,   pack_keys<C>, pack_values<C>, kMostFewRows, multiply_few_keys<ByteElements<C>>,
    add_few_values<ByteElements<C>>};

}  // namespace

bool byte_packing(int32_t cache_type, BytePacking* packing) {
    if (!has_avx512() || !__builtin_cpu_supports("avx512vbmi")) return false;
    if (cache_type == kCacheInt8) *packing = kPacking<Int8>;
    if (cache_type == kCacheFloat8E4M3) *packing = kPacking<Float8E4M3>;
    if (cache_type == kCacheFloat8E5M2) *packing = kPacking<Float8E5M2>;
    return cache_type == kCacheInt8 || cache_type == kCacheFloat8E4M3 || cache_type == kCacheFloat8E5M2;
}

#endif
