// The element types of the KV cache, which may have fewer bits than those of the activations, and rows of them.

#pragma once

#include <type_traits>

#include "chunks.h"

namespace {

constexpr int64_t kMaxHeadDim = 576;  // the longest row of a head that is handled here

enum CacheType : int32_t {
    kCacheFloat32 = 0,
    kCacheBFloat16 = 1,
    kCacheFloat16 = 2,
    kCacheInt8 = 3,
    kCacheFloat8E4M3 = 4,
    kCacheFloat8E5M2 = 5
};

// A number is its code times the scale of its row, which is stored apart as a BFloat16. Codes are from -127 to 127.
struct Int8 {
    int8_t code;
};

// Numbers of a sign, an exponent and a mantissa, as IEEE 754 has them. E4M3 (Micikevicius et al., "FP8 Formats for Deep
// Learning", 2022) has no infinities: its largest magnitude is NaN, and the one below is finite.
template <int exponent, int mantissa, bool has_infinity, class Bits>
struct SmallFloat {
    static constexpr int kExponent = exponent, kMantissa = mantissa;
    static constexpr bool kHasInfinity = has_infinity;
    Bits bits;
};
typedef SmallFloat<5, 10, true, uint16_t> Float16;
typedef SmallFloat<4, 3, false, uint8_t> Float8E4M3;
typedef SmallFloat<5, 2, true, uint8_t> Float8E5M2;

// Constants of a SmallFloat type as bits of a float32.
template <class C>
struct SmallFloatBits {
    static constexpr int kShift = 23 - C::kMantissa;
    static constexpr uint32_t kMagnitude = (1u << (C::kExponent + C::kMantissa)) - 1;
    static constexpr uint32_t kRebias = 127 - ((1u << (C::kExponent - 1)) - 1);  // between the biases of the exponents
    static constexpr uint32_t kSmallestNormal = (kRebias + 1) << 23;
    static constexpr uint32_t kSpecial =  // the first magnitude that is no number, and the largest one below
        C::kHasInfinity ? ((1u << C::kExponent) - 1) << C::kMantissa : kMagnitude;
    static constexpr uint32_t kLargest = ((kSpecial - 1) << kShift) + (kRebias << 23);
};

template <class C>
ALWAYS_INLINE Floats widened(Words x) {
    using B = SmallFloatBits<C>;
    const Words magnitude = x & B::kMagnitude, sign = (x >> (C::kExponent + C::kMantissa)) << 31;
    const Words shifted = magnitude << B::kShift;
    const Words normal = shifted + (B::kRebias << 23);
    // A subnormal number is the fraction of the smallest normal number that its mantissa says.
    const Words one = Words{} + B::kSmallestNormal;
    const Words subnormal = (Words)((Floats)(shifted + B::kSmallestNormal) - (Floats)one);
    const Words finite = (magnitude < (1u << C::kMantissa)) ? subnormal : normal;
    const Words special = C::kHasInfinity ? shifted | 0x7f800000u : Words{} + 0x7fc00000u;
    return (Floats)(((magnitude >= B::kSpecial) ? special : finite) | sign);
}

// Rounds to nearest even; numbers beyond the largest one become that one. A NaN stays a NaN.
template <class C>
ALWAYS_INLINE Words narrowed(Floats x) {
    using B = SmallFloatBits<C>;
    const Words bits = (Words)x, sign = (bits >> 31) << (C::kExponent + C::kMantissa), size = bits & 0x7fffffffu;
    const Words bounded = (size > B::kLargest) ? Words{} + B::kLargest : size;
    const Words rounded = bounded + ((1u << (B::kShift - 1)) - 1) + ((bounded >> B::kShift) & 1u);
    const Words normal = (rounded >> B::kShift) - (B::kRebias << C::kMantissa);
    // The last digit of the sum with this power of two is that of a subnormal number.
    const Words unit = Words{} + ((B::kRebias + 1 + B::kShift) << 23);
    const Words subnormal = (Words)((Floats)bounded + (Floats)unit) - unit;
    const Words finite = (bounded < B::kSmallestNormal) ? subnormal : normal;
    return ((size > 0x7f800000u) ? Words{} + B::kMagnitude : finite) | sign;
}

// ---------------------------------------------------------------------------------------------------------------------
// Chunks with their elements in order.

template <class Vector>
ALWAYS_INLINE Vector load_vector(const void* p) {
    Vector x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

ALWAYS_INLINE Chunk load_ordered(const float* p) { return load(p); }

ALWAYS_INLINE Chunk in_order(Chunk x, const float*) { return x; }
ALWAYS_INLINE Chunk in_order(Chunk x, const BFloat16*) {
    return {__builtin_shufflevector(x.first, x.second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
            __builtin_shufflevector(x.first, x.second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)};
}

ALWAYS_INLINE Chunk load_ordered(const BFloat16* p) { return in_order(load(p), p); }

ALWAYS_INLINE Chunk load_ordered(const Int8* p) {
    typedef int8_t Codes __attribute__((vector_size(kLanes)));
    return {__builtin_convertvector(load_vector<Codes>(p), Floats),
            __builtin_convertvector(load_vector<Codes>(p + kLanes), Floats)};
}

template <int exponent, int mantissa, bool has_infinity, class Bits>
ALWAYS_INLINE Chunk load_ordered(const SmallFloat<exponent, mantissa, has_infinity, Bits>* p) {
    typedef SmallFloat<exponent, mantissa, has_infinity, Bits> C;
    typedef Bits Vector __attribute__((vector_size(kLanes * sizeof(Bits))));
    return {widened<C>(__builtin_convertvector(load_vector<Vector>(p), Words)),
            widened<C>(__builtin_convertvector(load_vector<Vector>(p + kLanes), Words))};
}

template <class C>
ALWAYS_INLINE Chunk load_ordered(const C* p, int64_t left) {
    if (left >= kChunk) return load_ordered(p);
    C padded[kChunk] = {};
    std::memcpy(padded, p, left * sizeof(C));
    return load_ordered(padded);
}

// Elements of a row of the cache as float32, with the lanes of a chunk of T. Those of Int8 are without their scale.
template <class T, class C>
ALWAYS_INLINE Chunk load_as(const C* p, int64_t left) {
    if constexpr (std::is_same_v<T, C>) return load(p, left);
    return in_order_of(load_ordered(p, left), static_cast<const T*>(nullptr));
}

ALWAYS_INLINE void store_ordered(float* p, Chunk x) { store(p, x); }
ALWAYS_INLINE void store_ordered(BFloat16* p, Chunk x) { store(p, in_order_of(x, p)); }

template <int exponent, int mantissa, bool has_infinity, class Bits>
ALWAYS_INLINE void store_ordered(SmallFloat<exponent, mantissa, has_infinity, Bits>* p, Chunk x) {
    typedef SmallFloat<exponent, mantissa, has_infinity, Bits> C;
    typedef Bits Vector __attribute__((vector_size(kLanes * sizeof(Bits))));
    const Vector first = __builtin_convertvector(narrowed<C>(x.first), Vector);
    const Vector second = __builtin_convertvector(narrowed<C>(x.second), Vector);
    std::memcpy(p, &first, sizeof first);
    std::memcpy(p + kLanes, &second, sizeof second);
}

// Codes for numbers that were divided by their scale: rounded to nearest even, 0 for NaN.
ALWAYS_INLINE void store_ordered(Int8* p, Chunk x) {
    typedef int8_t Codes __attribute__((vector_size(kLanes)));
    typedef int32_t Ints __attribute__((vector_size(64)));
    constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23
    const auto codes_of = [](Floats y) __attribute__((always_inline)) {
        const Floats number = (y == y) ? y : Floats{};
        const Floats high = (number > 127.0f) ? splat(127.0f) : number;
        const Floats bounded = (high < -127.0f) ? splat(-127.0f) : high;
        return __builtin_convertvector((Ints)(bounded + kRoundToInteger) - (Ints)splat(kRoundToInteger), Codes);
    };
    const Codes first = codes_of(x.first), second = codes_of(x.second);
    std::memcpy(p, &first, sizeof first);
    std::memcpy(p + kLanes, &second, sizeof second);
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows.

// The scale of a row of Int8: its largest magnitude is 127 times the scale, up to the rounding of the scale. A NaN or
// an infinity in the row makes the scale so too, and with it all numbers of the row.
template <class T>
ALWAYS_INLINE BFloat16 scale_of(const T* x, int64_t size) {
    Words largest = {};
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk value = load(x + i, size - i);
        largest = larger(larger(largest, (Words)value.first & 0x7fffffffu), (Words)value.second & 0x7fffffffu);
    }
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) bits = std::max<uint32_t>(bits, largest[lane]);
    const Words scale = bfloat16_bits((Floats)(Words{} + bits) * (1.0f / 127));
    return {static_cast<uint16_t>(scale[0] >> 16)};
}

// Writes a row of a head to the cache. `scale` is written for Int8 only.
template <class C, class T>
ALWAYS_INLINE void store_row(const T* x, int64_t size, C* out, BFloat16* scale) {
    Floats divisor = splat(1.0f);
    if constexpr (std::is_same_v<C, Int8>) {
        *scale = scale_of(x, size);
        divisor = splat(to_float(*scale));
    }
    for (int64_t i = 0; i < size; i += kChunk) {
        Chunk value = load_ordered(x + i, size - i);
        if constexpr (std::is_same_v<C, Int8>) value = {value.first / divisor, value.second / divisor};
        if (size - i >= kChunk) {
            store_ordered(out + i, value);
        } else {
            C padded[kChunk];
            store_ordered(padded, value);
            std::memcpy(out + i, padded, (size - i) * sizeof(C));
        }
    }
}

}  // namespace
