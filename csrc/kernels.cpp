// The CPU kernels of shoal.kernels.native, behind a plain C interface that ctypes calls.
//
// Three properties hold throughout:
//
//  * A row's result has the same bits whatever else is in the batch and however many threads there are. Work is cut
//    along rows, heads and fixed spans of the context, never along anything that depends on the batch; the order of
//    every sum is written out below, and the compiler is not allowed to change it (no -ffast-math, no
//    -fassociative-math).
//  * There is no state between calls, so that ranks which are threads of one process may call at the same time.
//  * The only OpenMP symbol used is GOMP_parallel. It is left unresolved at link time and bound, at load time, to the
//    runtime that PyTorch has loaded: a second runtime in the process would bring a second pool of spinning threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bfloat16 loads below are written for little-endian machines"
#endif

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define EXPORT extern "C" __attribute__((visibility("default")))

// One binary serves every x86-64 machine: functions marked CLONED are compiled once per level and chosen at load time.
// An OpenMP region is outlined into a function of its own, which does not inherit the levels, so the loops that matter
// live in CLONED functions which the region calls.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((noinline, target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED __attribute__((noinline))
#endif

namespace {

constexpr int32_t kAbiVersion = 1;

enum DataType : int32_t { kFloat32 = 0, kBFloat16 = 1 };
enum Status : int32_t { kOk = 0, kOutOfMemory = 1, kUnsupported = 2 };

struct BFloat16 {
    uint16_t bits;
};

// ---------------------------------------------------------------------------------------------------------------------
// Vectors. GCC lowers these to whatever registers the target has: one zmm, two ymm or four xmm.

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 2 * kLanes;

// 32 consecutive elements of a row as float32. The order of the lanes belongs to the element type: for bfloat16 `first`
// holds the even elements and `second` the odd ones, because taking the two halves of a 32-bit word apart costs one
// instruction each, where widening in order costs a shuffle more. Arithmetic between chunks of one type never notices.
struct Chunk {
    Floats first, second;
};

ALWAYS_INLINE Floats splat(float x) { return x - Floats{}; }

ALWAYS_INLINE Floats load_floats(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

ALWAYS_INLINE void store_floats(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

// Rounds to nearest even, in the upper half of each word. A NaN stays one: its low bits must not carry into the sign.
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

// The last `left` elements of a row, the rest of the chunk zero.
template <class T>
ALWAYS_INLINE Chunk load_tail(const T* p, int64_t left) {
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
    std::memcpy(p, padded, left * sizeof(T));
}

// What a store and a load would make of x.
ALWAYS_INLINE Chunk rounded(Chunk x, const float*) { return x; }
ALWAYS_INLINE Chunk rounded(Chunk x, const BFloat16*) {
    return {(Floats)(bfloat16_bits(x.first) & 0xffff0000u), (Floats)(bfloat16_bits(x.second) & 0xffff0000u)};
}

// A chunk of a float32 table with its lanes in the order of T.
ALWAYS_INLINE Chunk in_order_of(Chunk x, const float*) { return x; }
ALWAYS_INLINE Chunk in_order_of(Chunk x, const BFloat16*) {
    return {__builtin_shufflevector(x.first, x.second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
            __builtin_shufflevector(x.first, x.second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

ALWAYS_INLINE float sum_of(Floats x) {
    const Floats8 eight = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                          __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    const Floats4 four =
        __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

ALWAYS_INLINE Floats max_of(Floats x, Floats y) { return (x > y) ? x : y; }

ALWAYS_INLINE float max_of(Floats x) {
    float best = x[0];
    for (int i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
    return best;
}

// exp(x): x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7 (relative error below 2^-24
// before rounding), then n added to the exponent. Results too small for the exponent field are 0, too large infinity.
ALWAYS_INLINE Floats exp_of(Floats x) {
    constexpr float kLowest = -86.6434f, kHighest = 88.72283f;  // -125 ln 2, and the logarithm of the largest float
    constexpr float kLog2E = 1.44269504f;
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the high part times |n| <= 128 is exact
    constexpr float kRoundToInteger = 12582912.0f;                       // 1.5 * 2^23
    const Floats bounded = (x < kLowest) ? splat(kLowest) : ((x > kHighest) ? splat(kHighest) : x);
    const Floats shifted = bounded * kLog2E + kRoundToInteger;
    const Floats n = shifted - kRoundToInteger;
    const Floats r = (bounded - n * kLn2High) - n * kLn2Low;
    Floats p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    // n = 128 has no exponent of its own: multiply by 2^(n - 1), then by 2.
    const Words exponent = ((Words)shifted - (Words)splat(kRoundToInteger) + 126u) << 23;
    const Floats result = p * (Floats)exponent * 2.0f;
    const Floats above = (x > kHighest) ? splat(std::numeric_limits<float>::infinity()) : result;
    return (x < kLowest) ? Floats{} : above;
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads.

// Calls work(piece, worker) for every piece of [0, pieces), each taken by whichever worker of [0, threads) is free.
template <class Work>
void in_parallel(int64_t pieces, int64_t threads, const Work& work) {
    threads = std::min(threads, pieces);
    if (threads <= 1) {
        for (int64_t piece = 0; piece < pieces; ++piece) work(piece, int64_t{0});
        return;
    }
    std::atomic<int64_t> next_piece{0}, next_worker{0};
    const auto take_pieces = [&] {
        const int64_t worker = next_worker.fetch_add(1, std::memory_order_relaxed);
        for (int64_t piece; (piece = next_piece.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(piece, worker);
    };
#pragma omp parallel num_threads(static_cast<int>(threads))
    take_pieces();
}

// Rows of element-wise work: below this many elements a thread costs more to wake than it saves.
constexpr int64_t kElementsPerThread = 32768;

template <class Work>
void over_rows(int64_t rows, int64_t row_elements, int64_t threads, const Work& work) {
    const int64_t worthwhile = rows * row_elements / kElementsPerThread;
    threads = std::max<int64_t>(1, std::min(threads, worthwhile));
    in_parallel(threads, threads, [&](int64_t piece, int64_t) {
        work(rows * piece / threads, rows * (piece + 1) / threads);
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Row operations.

// out = rounded(x / rms(x)) * weight. `out` may be `x`.
template <class T>
ALWAYS_INLINE void normalize(const T* x, const T* weight, T* out, int64_t size, float inverse_rms) {
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk value = load(x + i, size - i), w = load(weight + i, size - i);
        const Chunk unit = rounded({value.first * inverse_rms, value.second * inverse_rms}, x);
        store(out + i, {unit.first * w.first, unit.second * w.second}, size - i);
    }
}

ALWAYS_INLINE float inverse_rms_of(Chunk squares, int64_t size, float eps) {
    return 1.0f / std::sqrt(sum_of(squares.first + squares.second) / static_cast<float>(size) + eps);
}

template <class T>
ALWAYS_INLINE void rms_norm_row(const T* x, const T* weight, T* out, int64_t size, float eps) {
    Chunk squares = {};
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk value = load(x + i, size - i);
        squares.first += value.first * value.first;
        squares.second += value.second * value.second;
    }
    normalize(x, weight, out, size, inverse_rms_of(squares, size, eps));
}

// residual += x, then x = rms_norm(residual).
template <class T>
ALWAYS_INLINE void add_rms_norm_row(T* x, T* residual, const T* weight, int64_t size, float eps) {
    Chunk squares = {};
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk a = load(x + i, size - i), b = load(residual + i, size - i);
        const Chunk sum = rounded({a.first + b.first, a.second + b.second}, x);
        store(residual + i, sum, size - i);
        squares.first += sum.first * sum.first;
        squares.second += sum.second * sum.second;
    }
    normalize(residual, weight, x, size, inverse_rms_of(squares, size, eps));
}

ALWAYS_INLINE Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

template <class T>
ALWAYS_INLINE void silu_mul_row(const T* gate, T* out, int64_t size) {
    const T* up = gate + size;
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk g = load(gate + i, size - i), u = load(up + i, size - i);
        const Chunk activated = rounded({silu(g.first), silu(g.second)}, gate);
        store(out + i, {activated.first * u.first, activated.second * u.second}, size - i);
    }
}

// Rotates the first 2 * half elements, halves against each other; the rest passes through. `out` may be `x`.
template <class T>
ALWAYS_INLINE void rotate_head(const T* x, const float* cos, const float* sin, T* out, int64_t half, int64_t size) {
    for (int64_t i = 0; i < half; i += kChunk) {
        const Chunk low = load(x + i, half - i), high = load(x + half + i, half - i);
        const Chunk c = in_order_of(load(cos + i, half - i), x), s = in_order_of(load(sin + i, half - i), x);
        store(out + i, {low.first * c.first - high.first * s.first, low.second * c.second - high.second * s.second},
              half - i);
        store(out + half + i,
              {high.first * c.first + low.first * s.first, high.second * c.second + low.second * s.second}, half - i);
    }
    if (out != x) std::memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(T));
}

template <class T>
struct RotateArgs {
    const T* qkv;        // [n, q_heads + 2 * kv_heads, head_dim]
    const T* q_weight;   // [head_dim], or null for no norm
    const T* k_weight;   // the same
    const float* cos;    // [max_positions, half]
    const float* sin;    // the same
    const int64_t* positions;
    const int64_t* slots;
    T* q_out;   // [n, q_heads, head_dim]
    T* keys;    // [num_slots, kv_heads, head_dim]
    T* values;  // the same
    int64_t q_heads, kv_heads, head_dim, half;
    float eps;
};

template <class T>
ALWAYS_INLINE void rotate_and_store_rows(const RotateArgs<T>& a, int64_t first, int64_t end) {
    const int64_t q_size = a.q_heads * a.head_dim, kv_size = a.kv_heads * a.head_dim;
    for (int64_t row = first; row < end; ++row) {
        const float* cos = a.cos + a.positions[row] * a.half;
        const float* sin = a.sin + a.positions[row] * a.half;
        const T* source = a.qkv + row * (q_size + 2 * kv_size);
        T* q_out = a.q_out + row * q_size;
        T* k_out = a.keys + a.slots[row] * kv_size;
        for (int64_t head = 0; head < a.q_heads + a.kv_heads; ++head) {
            const bool is_query = head < a.q_heads;
            const T* weight = is_query ? a.q_weight : a.k_weight;
            const T* x = source + head * a.head_dim;
            T* out = is_query ? q_out + head * a.head_dim : k_out + (head - a.q_heads) * a.head_dim;
            if (weight) {
                rms_norm_row(x, weight, out, a.head_dim, a.eps);
                x = out;
            }
            rotate_head(x, cos, sin, out, a.half, a.head_dim);
        }
        std::memcpy(a.values + a.slots[row] * kv_size, source + q_size + kv_size, kv_size * sizeof(T));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention of short query runs over the paged cache.
//
// A context is cut into splits of kSplit tokens, counted from its start, so that the cut depends on nothing but its own
// length. Each split gives an unnormalized sum of values with the maximum and the sum of its exponentials, and the
// splits of a row are merged in order (the rescaling of Milakov & Gimelshein, "Online normalizer calculation for
// softmax", 2018; the parallel splits of FlashDecoding, Dao et al. 2023). Within a split there is no rescaling: its
// scores fit in the first-level cache, so the maximum is known before the first exponential.

constexpr int64_t kSplit = 256;
constexpr int64_t kTile = 8;  // tokens; all their heads are visited before the next tile
constexpr int64_t kMaxHeadDim = 512;
constexpr int64_t kCacheLine = 64;

// Query heads of one KV head are taken up to eight at a time, with as many keys or chunks as leave the sums in registers.
constexpr int keys_per_pass(int group) { return group >= 8 ? 2 : 4; }
constexpr int chunks_per_pass(int group) { return group >= 8 ? 1 : group >= 4 ? 2 : 4; }

ALWAYS_INLINE int64_t padded_dim(int64_t head_dim) { return (head_dim + kChunk - 1) / kChunk * kChunk; }

// A partial result: kStatistics floats (maximum, sum), then the padded sum of values in the lane order of the type.
constexpr int64_t kStatistics = kLanes;
ALWAYS_INLINE int64_t partial_size(int64_t head_dim) { return kStatistics + padded_dim(head_dim); }

// What a thread needs of its own for one item, for every query head: the query as float32, the sum of values, and the
// scores, which become weights.
ALWAYS_INLINE int64_t scratch_size(int64_t q_heads, int64_t head_dim) {
    return q_heads * (2 * padded_dim(head_dim) + kSplit);
}

// Asks for `count` rows of `row_bytes` bytes at base + offsets[..], for the second-level cache.
template <class T>
ALWAYS_INLINE void prefetch_rows(const T* base, const int64_t* offsets, int64_t count, int64_t row_bytes) {
    for (int64_t t = 0; t < count; ++t) {
        const char* row = reinterpret_cast<const char*>(base + offsets[t]);
        for (int64_t i = 0; i < row_bytes; i += kCacheLine) __builtin_prefetch(row + i, 0, 2);
    }
}

// One KV head over one tile of tokens.
template <class T>
struct Tile {
    const T* rows;           // keys or values, at the head
    const int64_t* offsets;  // [count]: where each token's heads start, in elements
    int64_t count;
    int64_t head_dim;
};

// scores[g, t] = query g . key t, for t rounded up to whole passes. q: [Group, padded_dim]; scores: [Group, kSplit].
template <class T, int Group>
ALWAYS_INLINE void score_tile(const Tile<T>& tile, const float* q, float* scores) {
    constexpr int kKeys = keys_per_pass(Group);
    const int64_t stride = padded_dim(tile.head_dim);
    const int64_t whole = tile.head_dim / kChunk * kChunk, tail = tile.head_dim - whole;
    for (int64_t t = 0; t < tile.count; t += kKeys) {
        const T* keys[kKeys];
        Floats sums[Group][kKeys] = {};
#pragma GCC unroll 8
        for (int k = 0; k < kKeys; ++k) keys[k] = tile.rows + tile.offsets[std::min(t + k, tile.count - 1)];
        const auto add_chunk = [&](int64_t d, const auto& load_key) __attribute__((always_inline)) {
            Chunk key[kKeys];
#pragma GCC unroll 8
            for (int k = 0; k < kKeys; ++k) key[k] = load_key(keys[k] + d);
#pragma GCC unroll 8
            for (int g = 0; g < Group; ++g) {
                const Chunk query = load(q + g * stride + d);
#pragma GCC unroll 8
                for (int k = 0; k < kKeys; ++k) {
                    sums[g][k] += query.first * key[k].first;
                    sums[g][k] += query.second * key[k].second;
                }
            }
        };
        for (int64_t d = 0; d < whole; d += kChunk)
            add_chunk(d, [](const T* p) __attribute__((always_inline)) { return load(p); });
        if (tail) add_chunk(whole, [&](const T* p) __attribute__((always_inline)) { return load_tail(p, tail); });
#pragma GCC unroll 8
        for (int g = 0; g < Group; ++g)
#pragma GCC unroll 8
            for (int k = 0; k < kKeys; ++k) scores[g * kSplit + t + k] = sum_of(sums[g][k]);
    }
}

// scores -> exp(scale * score - maximum), zero beyond count.
ALWAYS_INLINE void exponentiate(float* scores, int64_t count, float scale, float* maximum, float* sum) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    Floats best = splat(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < padded; t += kLanes) {
        const Floats scaled = load_floats(scores + t) * scale;
        store_floats(scores + t, scaled);
        best = max_of(best, scaled);
    }
    *maximum = max_of(best);
    Floats total = {};
    for (int64_t t = 0; t < padded; t += kLanes) {
        const Floats e = exp_of(load_floats(scores + t) - *maximum);
        store_floats(scores + t, e);
        total += e;
    }
    *sum = sum_of(total);
}

// sums[g, d..] += weights[g, t] * value t over the tile, for Chunks chunks from d on.
template <class T, int Group, int Chunks, class LoadValue>
ALWAYS_INLINE void add_chunks(const Tile<T>& tile, const float* weights, float* sums, int64_t d,
                              const LoadValue& load_value) {
    const int64_t stride = padded_dim(tile.head_dim);
    Chunk total[Group][Chunks];
#pragma GCC unroll 8
    for (int g = 0; g < Group; ++g)
#pragma GCC unroll 8
        for (int c = 0; c < Chunks; ++c) total[g][c] = load(sums + g * stride + d + c * kChunk);
    for (int64_t t = 0; t < tile.count; ++t) {
        const T* value = tile.rows + tile.offsets[t] + d;
#pragma GCC unroll 8
        for (int c = 0; c < Chunks; ++c) {
            const Chunk v = load_value(value + c * kChunk);
#pragma GCC unroll 8
            for (int g = 0; g < Group; ++g) {
                total[g][c].first += weights[g * kSplit + t] * v.first;
                total[g][c].second += weights[g * kSplit + t] * v.second;
            }
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < Group; ++g)
#pragma GCC unroll 8
        for (int c = 0; c < Chunks; ++c) store(sums + g * stride + d + c * kChunk, total[g][c]);
}

template <class T, int Group>
ALWAYS_INLINE void add_tile(const Tile<T>& tile, const float* weights, float* sums) {
    constexpr int kChunks = chunks_per_pass(Group);
    const auto load_whole = [](const T* p) __attribute__((always_inline)) { return load(p); };
    int64_t d = 0;
    for (; d + kChunks * kChunk <= tile.head_dim; d += kChunks * kChunk)
        add_chunks<T, Group, kChunks>(tile, weights, sums, d, load_whole);
    for (; d + kChunk <= tile.head_dim; d += kChunk) add_chunks<T, Group, 1>(tile, weights, sums, d, load_whole);
    if (const int64_t tail = tile.head_dim - d)
        add_chunks<T, Group, 1>(tile, weights, sums, d,
                                [&](const T* p) __attribute__((always_inline)) { return load_tail(p, tail); });
}

template <class T>
struct AttendArgs {
    const T* q;       // [n, q_heads, head_dim]
    const T* keys;    // [num_slots, kv_heads, head_dim]
    const T* values;  // the same
    T* out;           // [n, q_heads, head_dim]
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t table_stride, block_size, sequences, max_queries;
    int64_t q_heads, kv_heads, head_dim;
    const int32_t* group_starts;  // [kv_heads + 1] into q_order
    const int32_t* q_order;       // [q_heads]: query heads, those of one KV head together
    float scale;
};

// A split of one row's context.
struct Item {
    int64_t row, sequence, start, count;
    float* partials;  // [q_heads, partial_size], null where the split is the whole context
};

// visit(first, group) for the query heads of a KV head, cut into groups of 8, 4, 2 or 1 that begin at `first` in
// q_order. `group` is a compile-time constant.
template <class T, class Visit>
ALWAYS_INLINE void for_each_group(const AttendArgs<T>& a, int64_t head, const Visit& visit) {
    int64_t i = a.group_starts[head];
    const int64_t end = a.group_starts[head + 1];
    for (; i + 8 <= end; i += 8) visit(i, std::integral_constant<int, 8>());
    for (; i + 4 <= end; i += 4) visit(i, std::integral_constant<int, 4>());
    for (; i + 2 <= end; i += 2) visit(i, std::integral_constant<int, 2>());
    for (; i < end; ++i) visit(i, std::integral_constant<int, 1>());
}

template <class T>
ALWAYS_INLINE void attend_item(const AttendArgs<T>& a, const Item& item, int64_t first_head, int64_t end_head,
                               float* scratch) {
    int64_t offsets[kSplit];
    const int32_t* table = a.block_tables + item.sequence * a.table_stride;
    const int64_t token_size = a.kv_heads * a.head_dim;
    int64_t block = item.start / a.block_size, within = item.start % a.block_size;
    for (int64_t t = 0; t < item.count; ++block, within = 0)
        for (; t < item.count && within < a.block_size; ++t, ++within)
            offsets[t] = (table[block] * a.block_size + within) * token_size;

    // Below, i counts query heads in the order of q_order.
    const int64_t begin = a.group_starts[first_head], end = a.group_starts[end_head], stride = padded_dim(a.head_dim);
    float* const queries = scratch - begin * stride;
    float* const sums = queries + (end - begin) * stride;
    float* const scores = scratch + 2 * (end - begin) * stride - begin * kSplit;
    for (int64_t i = begin; i < end; ++i) {
        const T* query = a.q + (item.row * a.q_heads + a.q_order[i]) * a.head_dim;
        for (int64_t d = 0; d < a.head_dim; d += kChunk) {
            store(queries + i * stride + d, load(query + d, a.head_dim - d));
            store(sums + i * stride + d, Chunk{});
        }
    }

    // Tokens outside, heads inside: the heads of a token are neighbours in memory, and whole rows, one after the other,
    // arrive at twice the speed of single heads. Each head asks for its share of the next tile's rows.
    const int64_t heads = end_head - first_head;
    const int64_t row_bytes = heads * a.head_dim * static_cast<int64_t>(sizeof(T));
    const auto prefetch_share = [&](const T* rows, int64_t t, int64_t head) __attribute__((always_inline)) {
        const int64_t next = std::min(kTile, item.count - t), share = head - first_head;
        const int64_t from = next * share / heads, to = next * (share + 1) / heads;
        prefetch_rows(rows + first_head * a.head_dim, offsets + t + from, to - from, row_bytes);
    };
    for (int64_t t = 0; t < item.count; t += kTile)
        for (int64_t head = first_head; head < end_head; ++head) {
            if (t + kTile < item.count)
                prefetch_share(a.keys, t + kTile, head);
            else
                prefetch_share(a.values, 0, head);
            const Tile<T> tile = {a.keys + head * a.head_dim, offsets + t, std::min(kTile, item.count - t), a.head_dim};
            for_each_group(a, head, [&](int64_t i, auto group) __attribute__((always_inline)) {
                score_tile<T, group>(tile, queries + i * stride, scores + i * kSplit + t);
            });
        }
    for (int64_t i = begin; i < end; ++i) {
        // The query has been used; its place takes the two statistics.
        float* statistics = queries + i * stride;
        exponentiate(scores + i * kSplit, item.count, a.scale, &statistics[0], &statistics[1]);
    }
    for (int64_t t = 0; t < item.count; t += kTile)
        for (int64_t head = first_head; head < end_head; ++head) {
            if (t + kTile < item.count) prefetch_share(a.values, t + kTile, head);
            const Tile<T> tile = {a.values + head * a.head_dim, offsets + t, std::min(kTile, item.count - t),
                                  a.head_dim};
            for_each_group(a, head, [&](int64_t i, auto group) __attribute__((always_inline)) {
                add_tile<T, group>(tile, scores + i * kSplit + t, sums + i * stride);
            });
        }

    for (int64_t i = begin; i < end; ++i) {
        const float* sum = sums + i * stride;
        const float maximum = queries[i * stride], total = queries[i * stride + 1];
        if (item.partials) {
            float* partial = item.partials + a.q_order[i] * partial_size(a.head_dim);
            partial[0] = maximum;
            partial[1] = total;
            std::memcpy(partial + kStatistics, sum, stride * sizeof(float));
            continue;
        }
        T* out = a.out + (item.row * a.q_heads + a.q_order[i]) * a.head_dim;
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < a.head_dim; d += kChunk) {
            const Chunk chunk = load(sum + d);
            store(out + d, {chunk.first * inverse, chunk.second * inverse}, a.head_dim - d);
        }
    }
}

// Merges the `splits` partial results of every head of a row; they lie [splits, q_heads, partial_size].
template <class T>
ALWAYS_INLINE void merge_row(const AttendArgs<T>& a, const Item& item, int64_t splits) {
    const int64_t size = partial_size(a.head_dim), step = a.q_heads * size;
    for (int64_t head = 0; head < a.q_heads; ++head) {
        const float* partials = item.partials + head * size;
        T* out = a.out + (item.row * a.q_heads + head) * a.head_dim;
        float maximum = partials[0];
        for (int64_t i = 1; i < splits; ++i) maximum = std::max(maximum, partials[i * step]);
        float total = 0.0f;
        alignas(64) float sums[kMaxHeadDim] = {};
        for (int64_t i = 0; i < splits; ++i) {
            const float* partial = partials + i * step;
            const float weight = exp_of(splat(partial[0] - maximum))[0];
            total += weight * partial[1];
            for (int64_t d = 0; d < padded_dim(a.head_dim); d += kLanes)
                store_floats(sums + d, load_floats(sums + d) + weight * load_floats(partial + kStatistics + d));
        }
        const float inverse = 1.0f / total;
        for (int64_t d = 0; d < a.head_dim; d += kChunk) {
            const Chunk sum = load(sums + d);
            store(out + d, {sum.first * inverse, sum.second * inverse}, a.head_dim - d);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The cloned entries to the loops above: one plain function for each type, since a template cannot be cloned.

#define DEFINE_LOOPS(T)                                                                                               \
    CLONED void rms_norm_rows(const T* x, const T* weight, T* out, int64_t size, float eps, int64_t first,            \
                              int64_t end) {                                                                          \
        for (int64_t row = first; row < end; ++row)                                                                   \
            rms_norm_row(x + row * size, weight, out + row * size, size, eps);                                        \
    }                                                                                                                 \
    CLONED void add_rms_norm_rows(T* x, T* residual, const T* weight, int64_t size, float eps, int64_t first,         \
                                  int64_t end) {                                                                      \
        for (int64_t row = first; row < end; ++row)                                                                   \
            add_rms_norm_row(x + row * size, residual + row * size, weight, size, eps);                               \
    }                                                                                                                 \
    CLONED void silu_mul_rows(const T* gate_up, T* out, int64_t size, int64_t first, int64_t end) {                   \
        for (int64_t row = first; row < end; ++row) silu_mul_row(gate_up + row * 2 * size, out + row * size, size);   \
    }                                                                                                                 \
    CLONED void rotate_rows(const RotateArgs<T>& a, int64_t first, int64_t end) {                                     \
        rotate_and_store_rows(a, first, end);                                                                         \
    }                                                                                                                 \
    CLONED void attend_heads(const AttendArgs<T>& a, const Item& item, int64_t first_head, int64_t end_head,          \
                             float* scratch) {                                                                        \
        attend_item(a, item, first_head, end_head, scratch);                                                          \
    }                                                                                                                 \
    CLONED void merge_splits(const AttendArgs<T>& a, const Item& item, int64_t splits) { merge_row(a, item, splits); }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// ---------------------------------------------------------------------------------------------------------------------
// The calls: what is shared out among the threads, and how.

template <class T>
void rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t size, float eps, int64_t threads) {
    over_rows(rows, size, threads, [=](int64_t first, int64_t end) {
        rms_norm_rows(static_cast<const T*>(x), static_cast<const T*>(weight), static_cast<T*>(out), size, eps, first,
                      end);
    });
}

template <class T>
void add_rms_norm(void* x, void* residual, const void* weight, int64_t rows, int64_t size, float eps,
                  int64_t threads) {
    over_rows(rows, size, threads, [=](int64_t first, int64_t end) {
        add_rms_norm_rows(static_cast<T*>(x), static_cast<T*>(residual), static_cast<const T*>(weight), size, eps,
                          first, end);
    });
}

template <class T>
void silu_mul(const void* gate_up, void* out, int64_t rows, int64_t size, int64_t threads) {
    over_rows(rows, 4 * size, threads, [=](int64_t first, int64_t end) {
        silu_mul_rows(static_cast<const T*>(gate_up), static_cast<T*>(out), size, first, end);
    });
}

// Below this many bytes of cache a thread costs more to wake than it saves.
constexpr int64_t kCacheBytesPerThread = 128 * 1024;

template <class T>
void attend(const AttendArgs<T>& a, int64_t threads) {
    struct SplitRow {
        int64_t first_item, splits;
    };
    std::vector<Item> items;
    std::vector<SplitRow> split_rows;
    int64_t tokens = 0;
    for (int64_t sequence = 0; sequence < a.sequences; ++sequence) {
        const int64_t first = a.query_starts[sequence], end = a.query_starts[sequence + 1];
        if (end - first > a.max_queries) continue;
        for (int64_t row = first; row < end; ++row) {
            const int64_t context = a.context_lens[sequence] - (end - 1 - row);
            const int64_t splits = (context + kSplit - 1) / kSplit;
            if (splits > 1) split_rows.push_back({static_cast<int64_t>(items.size()), splits});
            for (int64_t start = 0; start < context; start += kSplit)
                items.push_back({row, sequence, start, std::min(kSplit, context - start), nullptr});
            tokens += context;
        }
    }
    std::unique_ptr<float[]> partials;
    if (!split_rows.empty()) {
        int64_t splits = 0;
        for (const SplitRow& row : split_rows) splits += row.splits;
        const int64_t step = a.q_heads * partial_size(a.head_dim);
        partials.reset(new float[splits * step]);
        float* next = partials.get();
        for (const SplitRow& row : split_rows)
            for (int64_t i = 0; i < row.splits; ++i, next += step) items[row.first_item + i].partials = next;
    }

    // One piece of work is a range of KV heads of one item. Whole items read the cache in longer runs; fewer heads at a
    // time give every thread something to do. Neither changes a result.
    const int64_t bytes = tokens * a.kv_heads * a.head_dim * 2 * static_cast<int64_t>(sizeof(T));
    threads = std::max<int64_t>(1, std::min(threads, bytes / kCacheBytesPerThread));
    const int64_t count = items.size();
    const int64_t wanted = threads == 1 ? 1 : std::max<int64_t>(1, 4 * threads / std::max<int64_t>(1, count));
    const int64_t heads = (a.kv_heads + wanted - 1) / wanted, ranges = (a.kv_heads + heads - 1) / heads;
    const int64_t size = scratch_size(a.q_heads, a.head_dim);
    const std::unique_ptr<float[]> scratch(new float[threads * size]);
    in_parallel(count * ranges, threads, [&](int64_t piece, int64_t worker) {
        const int64_t head = piece % ranges * heads;
        attend_heads(a, items[piece / ranges], head, std::min(head + heads, a.kv_heads), scratch.get() + worker * size);
    });
    in_parallel(split_rows.size(), threads, [&](int64_t piece, int64_t) {
        merge_splits(a, items[split_rows[piece].first_item], split_rows[piece].splits);
    });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C interface. All tensors are contiguous; `threads` is an upper bound.

EXPORT int32_t shoal_abi_version() { return kAbiVersion; }

EXPORT int32_t shoal_max_head_dim() { return kMaxHeadDim; }

EXPORT void shoal_rms_norm(int32_t type, const void* x, const void* weight, void* out, int64_t rows, int64_t size,
                           float eps, int64_t threads) {
    (type == kFloat32 ? rms_norm<float> : rms_norm<BFloat16>)(x, weight, out, rows, size, eps, threads);
}

EXPORT void shoal_add_rms_norm(int32_t type, void* x, void* residual, const void* weight, int64_t rows, int64_t size,
                               float eps, int64_t threads) {
    (type == kFloat32 ? add_rms_norm<float> : add_rms_norm<BFloat16>)(x, residual, weight, rows, size, eps, threads);
}

EXPORT void shoal_silu_mul(int32_t type, const void* gate_up, void* out, int64_t rows, int64_t size, int64_t threads) {
    (type == kFloat32 ? silu_mul<float> : silu_mul<BFloat16>)(gate_up, out, rows, size, threads);
}

EXPORT void shoal_rotate_and_store(int32_t type, const void* qkv, const void* q_weight, const void* k_weight,
                                   const float* cos, const float* sin, const int64_t* positions, const int64_t* slots,
                                   void* q_out, void* keys, void* values, int64_t rows, int64_t q_heads,
                                   int64_t kv_heads, int64_t head_dim, int64_t half, float eps, int64_t threads) {
    const auto call = [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const RotateArgs<T> args = {
            static_cast<const T*>(qkv), static_cast<const T*>(q_weight), static_cast<const T*>(k_weight),
            cos, sin, positions, slots,
            static_cast<T*>(q_out), static_cast<T*>(keys), static_cast<T*>(values),
            q_heads, kv_heads, head_dim, half, eps};
        over_rows(rows, 2 * (q_heads + kv_heads) * head_dim, threads,
                  [&](int64_t first, int64_t end) { rotate_rows(args, first, end); });
    };
    if (type == kFloat32)
        call(static_cast<float*>(nullptr));
    else
        call(static_cast<BFloat16*>(nullptr));
}

// Rows of sequences with at most max_queries queries; the other rows of `out` are left alone.
EXPORT int32_t shoal_attend(int32_t type, const void* q, const void* keys, const void* values, void* out,
                            const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables,
                            int64_t table_stride, int64_t block_size, int64_t sequences, int64_t max_queries,
                            int64_t q_heads, int64_t kv_heads, int64_t head_dim, const int32_t* groups, float scale,
                            int64_t threads) {
    if (head_dim > kMaxHeadDim) return kUnsupported;
    const auto call = [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const AttendArgs<T> args = {
            static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values), static_cast<T*>(out),
            query_starts, context_lens, block_tables, table_stride, block_size, sequences, max_queries,
            q_heads, kv_heads, head_dim, groups, groups + kv_heads + 1, scale};
        attend(args, threads);
    };
    try {
        if (type == kFloat32)
            call(static_cast<float*>(nullptr));
        else
            call(static_cast<BFloat16*>(nullptr));
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kOk;
}
