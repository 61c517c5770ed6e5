// Code that libraries share: the element types of tensors, and loading and storing rows as float32.

#pragma once

#include "common.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bfloat16 loads below are written for little-endian machines"
#endif

namespace {

enum DataType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct BFloat16 {
    uint16_t bits;
};

ALWAYS_INLINE float to_float(float x) { return x; }
ALWAYS_INLINE float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

constexpr int64_t kChunk = 2 * kLanes;

// 32 consecutive elements of a row as float32. The order of the lanes depends on the element type: for bfloat16 `first`
// has the even elements and `second` the odd ones, because separating the halves of a 32-bit word takes one instruction
// each, while widening in order takes a shuffle more. Arithmetic between chunks of the same type is not affected.
struct Chunk {
    Floats first, second;
};

// Rounds to nearest even; the result is in the upper half of each word. A NaN stays a NaN: rounding it up could carry
// into the sign.
ALWAYS_INLINE Words bfloat16_bits(Floats x) {
    const Words bits = (Words)x;
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (x == x) ? rounded : (bits | 0x400000u);
}

ALWAYS_INLINE Chunk load(const float* p) { return {load_floats(p), load_floats(p + kLanes)}; }

ALWAYS_INLINE Chunk load(const BFloat16* p) {
    Words pairs;
    std::memcpy(&pairs, p, sizeof pairs);
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
}

ALWAYS_INLINE void store(float* p, Chunk x) {
    store_floats(p, x.first);
    store_floats(p + kLanes, x.second);
}

ALWAYS_INLINE void store(BFloat16* p, Chunk x) {
    const Words pairs = (bfloat16_bits(x.first) >> 16) | (bfloat16_bits(x.second) & 0xffff0000u);
    std::memcpy(p, &pairs, sizeof pairs);
}

// The first half of a chunk, the other half zero.
template <class T>
ALWAYS_INLINE Chunk load_half(const T* p) {
    T padded[kChunk] = {};
    std::memcpy(padded, p, kLanes * sizeof(T));
    return load(padded);
}

// The last `left` elements of a row, the rest of the chunk zero.
template <class T>
ALWAYS_INLINE Chunk load_tail(const T* p, int64_t left) {
    if (left == kLanes) return load_half(p);  // as half the elements of a head often are; a fixed size takes no loop
    T padded[kChunk] = {};
    std::memcpy(padded, p, left * sizeof(T));
    return load(padded);
}

template <class T>
ALWAYS_INLINE Chunk load(const T* p, int64_t left) {
    return left >= kChunk ? load(p) : load_tail(p, left);
}

template <class T>
ALWAYS_INLINE void store(T* p, Chunk x, int64_t left) {
    if (left >= kChunk) {
        store(p, x);
        return;
    }
    T padded[kChunk];
    store(padded, x);
    if (left == kLanes)
        std::memcpy(p, padded, kLanes * sizeof(T));
    else
        std::memcpy(p, padded, left * sizeof(T));
}

// x as it would be after a store and a load.
ALWAYS_INLINE Chunk rounded(Chunk x, const float*) { return x; }
ALWAYS_INLINE Chunk rounded(Chunk x, const BFloat16*) {
    return {(Floats)(bfloat16_bits(x.first) & 0xffff0000u), (Floats)(bfloat16_bits(x.second) & 0xffff0000u)};
}

// A chunk of a float32 table, with its lanes reordered as in a chunk of T.
ALWAYS_INLINE Chunk in_order_of(Chunk x, const float*) { return x; }
ALWAYS_INLINE Chunk in_order_of(Chunk x, const BFloat16*) {
    return {__builtin_shufflevector(x.first, x.second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(x.first, x.second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

ALWAYS_INLINE float sum_of(Floats x) {
    const Floats8 eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    const Floats4 four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

}  // namespace
