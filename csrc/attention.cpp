// The attention of shoal.kernels.native, in the library _native: attention over the paged KV cache for sequences with
// few queries.
//
// The visible context of a query is divided into splits at the positions that are multiples of kSplit, so the splits
// depend only on the query's position and the window. Each split gives an unnormalized sum of values, the maximum of
// its scores and the sum of their exponentials, and the splits of a row are merged in order (rescaling: Milakov &
// Gimelshein, "Online normalizer calculation for softmax", 2018; parallel splits: FlashDecoding, Dao et al. 2023). A
// split itself needs no rescaling: its scores fit into the L1 cache, so its maximum is known before the exponentials.

#include "chunks.h"

#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace {

enum Status : int32_t { kOk = 0, kOutOfMemory = 1, kUnsupported = 2 };

constexpr int64_t kSplit = 256;
constexpr int64_t kTile = 8;  // tokens; all heads of these are computed before those of the next tile
constexpr int64_t kMaxHeadDim = 576;
constexpr int64_t kCacheLine = 64;

// Up to eight query heads of a KV head are computed together, with as many keys or chunks at a time as leave the sums
// in registers.
constexpr int keys_per_pass(int group) { return group >= 8 ? 2 : 4; }
constexpr int chunks_per_pass(int group) { return group >= 8 ? 1 : group >= 4 ? 2 : 4; }

ALWAYS_INLINE int64_t padded_dim(int64_t head_dim) { return (head_dim + kChunk - 1) / kChunk * kChunk; }

// A partial result has kStatistics floats (maximum, sum), then the padded sum of values in the lane order of the type.
constexpr int64_t kStatistics = kLanes;
ALWAYS_INLINE int64_t partial_size(int64_t head_dim) { return kStatistics + padded_dim(head_dim); }

// The scratch space of a thread: for every query head the query as float32, the sum of values, and the scores, which
// become weights.
ALWAYS_INLINE int64_t scratch_size(int64_t q_heads, int64_t head_dim) {
    return q_heads * (2 * padded_dim(head_dim) + kSplit);
}

// Prefetches `count` rows of `row_bytes` bytes, at base + offsets[..], into the L2 cache.
template <class T>
ALWAYS_INLINE void prefetch_rows(const T* base, const int64_t* offsets, int64_t count, int64_t row_bytes) {
    for (int64_t t = 0; t < count; ++t) {
        const char* row = reinterpret_cast<const char*>(base + offsets[t]);
        for (int64_t i = 0; i < row_bytes; i += kCacheLine) __builtin_prefetch(row + i, 0, 2);
    }
}

// The keys or values of one KV head for a tile of tokens.
template <class T>
struct Tile {
    const T* rows;           // the cache's keys or values, from this head on
    const int64_t* offsets;  // [count]: the offset of each token from `rows`, in elements
    int64_t count;
    int64_t head_dim;
};

// scores[g, t] = query g . key t, for a count of t rounded up to whole passes. q: [Group, padded_dim]; scores: [Group,
// kSplit].
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

ALWAYS_INLINE float max_of(Floats x) {
    float best = x[0];
    for (int i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
    return best;
}

// tanh(x): near zero an odd polynomial with a relative error of 3e-9, elsewhere 1 - 2 / (e^2|x| + 1).
ALWAYS_INLINE Floats tanh_of(Floats x) {
    const Floats size = (x < 0.0f) ? -x : x, square = x * x;
    Floats p = splat(-0.00589515035f);
    p = p * square + 0.0207959656f;
    p = p * square - 0.0537838287f;
    p = p * square + 0.133319241f;
    p = p * square - 0.33333298f;
    const Floats near = x + x * (square * p);
    const Floats far = 1.0f - 2.0f / (exp_of(2.0f * size) + 1.0f);
    return (size < 0.6f) ? near : ((x < 0.0f) ? -far : far);
}

// Replaces scores by exp(s - maximum), and by zero beyond count. s is scale * score, with the softcap if that is not 0.
ALWAYS_INLINE void exponentiate(float* scores, int64_t count, float scale, float softcap, float* maximum, float* sum) {
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    if (softcap != 0.0f) {
        const float inner = scale / softcap;
        for (int64_t t = 0; t < padded; t += kLanes)
            store_floats(scores + t, tanh_of(load_floats(scores + t) * inner));
        scale = softcap;
    }
    std::fill(scores + count, scores + padded, -std::numeric_limits<float>::infinity());
    Floats best = splat(-std::numeric_limits<float>::infinity());
    for (int64_t t = 0; t < padded; t += kLanes) {
        const Floats scaled = load_floats(scores + t) * scale;
        store_floats(scores + t, scaled);
        best = larger(best, scaled);
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

// sums[g, d..] += weights[g, t] * value t for all tokens of the tile, for Chunks chunks from d on.
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
    const int32_t* q_order;       // [q_heads]: query heads, ordered by KV head
    int64_t window;               // the most keys that a query attends to, its own included
    float scale, softcap;         // softcap 0: none
};

// One split of one row: `count` tokens of the context from position `start` on.
struct Item {
    int64_t row, sequence, start, count;
    float* partials;  // [q_heads, partial_size], null if the row has one split
};

// Calls visit(first, group) for the query heads of a KV head, divided into groups of 8, 4, 2 or 1 that begin at `first`
// in q_order. `group` is a compile-time constant.
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

    // The outer loop is over tokens, the inner one over heads: the heads of a token are neighbours in memory, and whole
    // rows are read twice as fast as single heads. Each head prefetches its share of the next tile's rows.
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
        // The query is not needed any more: its space is used for the two statistics.
        float* statistics = queries + i * stride;
        exponentiate(scores + i * kSplit, item.count, a.scale, a.softcap, &statistics[0], &statistics[1]);
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

// Merges the partial results of a row, [splits, q_heads, partial_size], for every head.
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
// CLONED functions that call the loops above: one plain function for each type, since a template cannot be cloned.

#define DEFINE_LOOPS(T)                                                                                               \
    CLONED void attend_heads(const AttendArgs<T>& a, const Item& item, int64_t first_head, int64_t end_head,          \
                             float* scratch) {                                                                        \
        attend_item(a, item, first_head, end_head, scratch);                                                          \
    }                                                                                                                 \
    CLONED void merge_splits(const AttendArgs<T>& a, const Item& item, int64_t splits) { merge_row(a, item, splits); }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

// Attention over fewer bytes of KV cache per thread than this takes longer to hand to a thread than to compute.
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
            const int64_t seen = std::min(context, a.window), oldest = context - seen;
            const int64_t splits = (context + kSplit - 1) / kSplit - oldest / kSplit;
            if (splits > 1) split_rows.push_back({static_cast<int64_t>(items.size()), splits});
            for (int64_t start = oldest, next; start < context; start = next) {
                next = std::min(context, (start / kSplit + 1) * kSplit);
                items.push_back({row, sequence, start, next - start, nullptr});
            }
            tokens += seen;
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

    // A piece of work is a range of KV heads of one item. Whole items read longer stretches of the cache; ranges of
    // fewer heads give every thread something to do. The choice does not change a result.
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

EXPORT int32_t shoal_max_head_dim() { return kMaxHeadDim; }

// Computes the rows of sequences with at most max_queries queries, and does not write the other rows of `out`. window:
// at least 1. softcap: 0 for none.
EXPORT int32_t shoal_attend(int32_t type, const void* q, const void* keys, const void* values, void* out,
                            const int32_t* query_starts, const int32_t* context_lens, const int32_t* block_tables,
                            int64_t table_stride, int64_t block_size, int64_t sequences, int64_t max_queries,
                            int64_t q_heads, int64_t kv_heads, int64_t head_dim, const int32_t* groups, int64_t window,
                            float scale, float softcap, int64_t threads) {
    if (head_dim > kMaxHeadDim) return kUnsupported;
    const auto call = [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const AttendArgs<T> args = {
            static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values), static_cast<T*>(out),
            query_starts, context_lens, block_tables, table_stride, block_size, sequences, max_queries,
            q_heads, kv_heads, head_dim, groups, groups + kv_heads + 1, window, scale, softcap};
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
