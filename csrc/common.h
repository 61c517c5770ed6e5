// Code that the libraries share: vectors of floats, exp, and threads. All are C++ with a plain C interface, which Python
// calls through ctypes.
//
// Everything in the headers is local to the file that includes it: the files are compiled with different flags
// (setup.py), and the linker must not replace all compiled versions of a function by one of them.
//
// Three properties always hold:
//
//  * A row's result has the same bits in any batch and with any number of threads. Work is divided by rows, heads and
//    fixed spans, never by anything that depends on the batch; the order of every sum is written out, and the compiler
//    may not change it (no -ffast-math, no -fassociative-math).
//  * There is no state between calls, so ranks that are threads of one process may call at the same time.
//  * The only OpenMP symbol in use is GOMP_parallel, in on_threads below. It is not resolved at link time but bound at
//    load time to the runtime that PyTorch has loaded: a second runtime in the process would add a second pool of
//    spinning threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

// One binary serves every x86-64 machine: a function marked CLONED is compiled once per instruction set level, and one
// version is chosen at load time. The compiler moves an OpenMP region into a function of its own, which is not cloned;
// so the time-critical loops are in CLONED functions that the region calls.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED __attribute__((noinline))
#endif

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// Vectors. GCC maps each to the registers of the target: one zmm, two ymm or four xmm.

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;

ALWAYS_INLINE Floats splat(float x) { return x - Floats{}; }

ALWAYS_INLINE Floats load_floats(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

ALWAYS_INLINE void store_floats(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

template <class Vector>
ALWAYS_INLINE Vector larger(Vector x, Vector y) {
    return (x > y) ? x : y;
}

// The range of exp: -125 ln 2, and the logarithm of the largest float.
constexpr float kExpLowest = -86.6434f, kExpHighest = 88.72283f;

// fraction * 2^n.
struct Scaled {
    Floats fraction;
    Words n;  // modulo 2^32
};

// exp(x), kExpLowest <= x <= kExpHighest: x = n ln 2 + r with |r| <= ln 2 / 2, and e^r by its Taylor polynomial of
// degree 7 (relative error below 2^-24 before rounding). n is from -125 to 128.
ALWAYS_INLINE Scaled scaled_exp_of(Floats x) {
    constexpr float kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part times |n| <= 128 is exact
    constexpr float kRoundToInteger = 12582912.0f;                       // 1.5 * 2^23
    const Floats shifted = x * kLog2E + kRoundToInteger;
    const Floats n = shifted - kRoundToInteger;
    const Floats r = (x - n * kLn2High) - n * kLn2Low;
    Floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return {p, (Words)shifted - (Words)splat(kRoundToInteger)};
}

// exp(x). Results below the exponent range are 0, results above it infinity.
ALWAYS_INLINE Floats exp_of(Floats x) {
    const Floats bounded = (x < kExpLowest) ? splat(kExpLowest) : ((x > kExpHighest) ? splat(kExpHighest) : x);
    const Scaled e = scaled_exp_of(bounded);
    // 2^128 is not a float: multiply by 2^(n - 1), then by 2.
    const Words exponent = (e.n + 126u) << 23;
    const Floats result = e.fraction * (Floats)exponent * 2.0f;
    const Floats above = (x > kExpHighest) ? splat(std::numeric_limits<float>::infinity()) : result;
    return (x < kExpLowest) ? Floats{} : above;
}

// exp(x) for x <= 0, in fewer steps. 0 below kExpLowest.
ALWAYS_INLINE Floats exp_of_negative(Floats x) {
    const Scaled e = scaled_exp_of((x < kExpLowest) ? splat(kExpLowest) : x);
    const Words exponent = (e.n + 127u) << 23;
    return (x < kExpLowest) ? Floats{} : e.fraction * (Floats)exponent;
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads.

// Calls work(worker) for every worker of [0, threads), each on a thread of its own.
template <class Work>
void on_threads(int64_t threads, const Work& work) {
    std::atomic<int64_t> next_worker{0};
    const auto run = [&] { work(next_worker.fetch_add(1, std::memory_order_relaxed)); };
#pragma omp parallel num_threads(static_cast<int>(threads))
    run();
}

// Calls work(piece, worker) for every piece of [0, pieces). Each worker of [0, threads) takes the next piece when free.
template <class Work>
void in_parallel(int64_t pieces, int64_t threads, const Work& work) {
    threads = std::min(threads, pieces);
    if (threads <= 1) {
        for (int64_t piece = 0; piece < pieces; ++piece) work(piece, int64_t{0});
        return;
    }
    std::atomic<int64_t> next_piece{0};
    on_threads(threads, [&](int64_t worker) {
        for (int64_t piece; (piece = next_piece.fetch_add(1, std::memory_order_relaxed)) < pieces;)
            work(piece, worker);
    });
}

// The pieces of a worker, from the next one on.
struct alignas(64) PieceSpan {
    std::atomic<int64_t> next;
    int64_t end;
};

constexpr int64_t kMostSpans = 64;

// Does the same as in_parallel, but first divides the pieces among the workers. Each takes those of its own span in their
// order, so it can prefetch what its next piece will read. A worker without pieces helps the others.
template <class Work>
void in_spans(int64_t pieces, int64_t threads, const Work& work) {
    threads = std::min(threads, pieces);
    const int64_t count = std::min(threads, kMostSpans);
    if (count <= 1) return in_parallel(pieces, threads, work);
    alignas(PieceSpan) char memory[kMostSpans * sizeof(PieceSpan)];  // so that only `count` spans are written
    PieceSpan* spans = reinterpret_cast<PieceSpan*>(memory);
    for (int64_t i = 0; i < count; ++i) new (spans + i) PieceSpan{{pieces * i / count}, pieces * (i + 1) / count};
    on_threads(threads, [&](int64_t worker) {
        for (int64_t i = 0; i < count; ++i) {
            PieceSpan& span = spans[(worker + i) % count];
            for (int64_t piece; (piece = span.next.fetch_add(1, std::memory_order_relaxed)) < span.end;)
                work(piece, worker);
        }
    });
}

}  // namespace
