// Tokens in the order of their logits, and the top one of a row, whose logits may be bfloat16.
//
// Files that include this must be compiled with signed zeros: adding 0.0f has to turn -0.0 into 0.0.

#pragma once

#include "chunks.h"

namespace {

constexpr int64_t kLargestId = 0x7fffffff;

typedef int32_t Ints __attribute__((vector_size(64)));

struct Token {
    float logit;
    int32_t id;
};

// The largest lane, found by folding one half of the vector onto the other, again and again.
template <class Vector>
ALWAYS_INLINE auto largest(Vector x) {
    x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = larger(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}

// Integers with the order of the floats; zeros of both signs are equal.
ALWAYS_INLINE Ints ordered(Floats x) {
    const Ints bits = (Ints)(x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

ALWAYS_INLINE int32_t ordered(float x) {
    x += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// An integer with the order of the tokens: larger logits are larger, and of equal logits lower ids are. It is the same
// as `pack_tokens` in kernels/sampling.py.
ALWAYS_INLINE int64_t pack_token(float logit, int64_t id) {
    return static_cast<int64_t>((static_cast<uint64_t>(static_cast<int64_t>(ordered(logit))) << 32) |
                                static_cast<uint64_t>(kLargestId - id));
}

ALWAYS_INLINE Token unpack_token(int64_t packed) {
    const int32_t value = static_cast<int32_t>(packed >> 32);
    const int32_t bits = value ^ ((value >> 31) & 0x7fffffff);
    Token token{0, static_cast<int32_t>(kLargestId - (packed & 0xffffffff))};
    std::memcpy(&token.logit, &bits, sizeof bits);
    return token;
}

// The largest logit of columns `begin` to `end`, as an ordered integer. There is at least one column.
template <class T>
ALWAYS_INLINE int32_t largest_of_span(const T* row, int64_t begin, int64_t end) {
    Ints top = Ints{} + ordered(to_float(row[begin]));
    int64_t column = begin;
    for (; column + kChunk <= end; column += kChunk) {
        const Chunk x = load(row + column);
        top = larger(top, larger(ordered(x.first), ordered(x.second)));
    }
    int32_t best = largest(top);
    for (; column < end; ++column) best = std::max(best, ordered(to_float(row[column])));
    return best;
}

// The top token of columns `begin` to `end`, packed. The span with the largest logit is searched again for its column.
template <class T>
ALWAYS_INLINE int64_t top_of_columns(const T* row, int64_t begin, int64_t end, int64_t start) {
    constexpr int64_t kSpan = 1024;
    int32_t best = 0;
    int64_t column = -1;
    for (int64_t span = begin; span < end; span += kSpan) {
        const int32_t top = largest_of_span(row, span, std::min(end, span + kSpan));
        if (column >= 0 && top <= best) continue;
        best = top;
        column = span;
    }
    while (ordered(to_float(row[column])) != best) ++column;
    return pack_token(to_float(row[column]), start + column);
}

[[maybe_unused]] CLONED int64_t top_token(const float* row, int64_t begin, int64_t end, int64_t start) {
    return top_of_columns(row, begin, end, start);
}
[[maybe_unused]] CLONED int64_t top_token(const BFloat16* row, int64_t begin, int64_t end, int64_t start) {
    return top_of_columns(row, begin, end, start);
}

}  // namespace
