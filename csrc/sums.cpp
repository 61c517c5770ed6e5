// Sums and multiples of rows, in the library _native.

#include "chunks.h"
#include "over_rows.h"
#include "replay.h"

namespace {

// x += y.
template <class T>
ALWAYS_INLINE void add_row(T* x, const T* y, int64_t size) {
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk a = load(x + i, size - i), b = load(y + i, size - i);
        store(x + i, {a.first + b.first, a.second + b.second}, size - i);
    }
}

// x *= factor.
template <class T>
ALWAYS_INLINE void scale_row(T* x, float factor, int64_t size) {
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk value = load(x + i, size - i);
        store(x + i, {value.first * factor, value.second * factor}, size - i);
    }
}

// out = the sum of weights[j] * x[indices[j]] for j from 0 to k - 1; negative indices are left out. x: [p, size].
template <class T>
ALWAYS_INLINE void weighted_sum_row(const T* x, const int64_t* indices, const float* weights, int64_t k, T* out,
                                    int64_t size) {
    for (int64_t i = 0; i < size; i += kChunk) {
        Chunk total = {};
        for (int64_t j = 0; j < k; ++j) {
            if (indices[j] < 0) continue;
            const Chunk value = load(x + indices[j] * size + i, size - i);
            total.first += value.first * weights[j];
            total.second += value.second * weights[j];
        }
        store(out + i, total, size - i);
    }
}

// One plain function for each type, since a template cannot be cloned.
#define DEFINE_LOOPS(T)                                                                                       \
    CLONED void add_rows(T* x, const T* y, int64_t step, int64_t size, int64_t first, int64_t end) {          \
        for (int64_t row = first; row < end; ++row) add_row(x + row * size, y + row * step, size);            \
    }                                                                                                         \
    CLONED void scale_rows(T* x, float factor, int64_t size, int64_t first, int64_t end) {                    \
        for (int64_t row = first; row < end; ++row) scale_row(x + row * size, factor, size);                  \
    }                                                                                                         \
    CLONED void weighted_sum_rows(const T* x, const int64_t* indices, const float* weights, int64_t k, T* out, \
                                  int64_t size, int64_t first, int64_t end) {                                 \
        for (int64_t row = first; row < end; ++row)                                                           \
            weighted_sum_row(x, indices + row * k, weights + row * k, k, out + row * size, size);             \
    }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

template <class T>
void add(void* x, const void* y, int64_t step, int64_t rows, int64_t size, int64_t threads) {
    over_rows(rows, size, threads, [=](int64_t first, int64_t end) {
        add_rows(static_cast<T*>(x), static_cast<const T*>(y), step, size, first, end);
    });
}

template <class T>
void scale(void* x, float factor, int64_t rows, int64_t size, int64_t threads) {
    over_rows(rows, size, threads, [=](int64_t first, int64_t end) {
        scale_rows(static_cast<T*>(x), factor, size, first, end);
    });
}

template <class T>
void weighted_sum(const void* x, const int64_t* indices, const float* weights, void* out, int64_t rows, int64_t k,
                  int64_t size, int64_t threads) {
    over_rows(rows, k * size, threads, [=](int64_t first, int64_t end) {
        weighted_sum_rows(static_cast<const T*>(x), indices, weights, k, static_cast<T*>(out), size, first, end);
    });
}

}  // namespace

// All tensors are contiguous; `threads` is an upper bound.

// Computes x += y. Row i of y begins at i * step: with a step of 0 its only row is added to each row of x.
EXPORT void shoal_add(int32_t type, void* x, const void* y, int64_t step, int64_t rows, int64_t size,
                      int64_t threads) {
    (type == kFloat32 ? add<float> : add<BFloat16>)(x, y, step, rows, size, threads);
}

// Computes x *= factor.
EXPORT void shoal_scale(int32_t type, void* x, float factor, int64_t rows, int64_t size, int64_t threads) {
    (type == kFloat32 ? scale<float> : scale<BFloat16>)(x, factor, rows, size, threads);
}

// x: [p, size]; indices and weights: [rows, k]; out: [rows, size].
EXPORT void shoal_weighted_sum(int32_t type, const void* x, const int64_t* indices, const float* weights, void* out,
                               int64_t rows, int64_t k, int64_t size, int64_t threads) {
    (type == kFloat32 ? weighted_sum<float> : weighted_sum<BFloat16>)(x, indices, weights, out, rows, k, size, threads);
}

REPLAYABLE(shoal_add)
REPLAYABLE(shoal_scale)
REPLAYABLE(shoal_weighted_sum)
