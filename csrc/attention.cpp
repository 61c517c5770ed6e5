// The attention of shoal.kernels.native, in the library _native: attention over the paged KV cache for sequences with
// any number of queries.
//
// Here the work is divided into units (attention_unit.h), which changes no bit of a result. Sequences with many queries
// are divided by queries and heads. With few queries also the splits are divided among threads, and their states are
// stored and merged at the end (FlashDecoding, Dao et al., 2023).

#include "attention_unit.h"
#include "cache_rows.h"
#include "replay.h"

#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace {

enum Status : int32_t { kOk = 0, kOutOfMemory = 1, kUnsupported = 2 };

constexpr int64_t kFewQueries = 8;  // sequences with at most these are divided by splits, others by queries
constexpr int64_t kMaxRows = 144;   // of a unit: its scores and sums stay in the L2 cache; each tile serves many rows
constexpr int64_t kMinRows = 24;    // fewer would spend too much time on packing

// Less work per thread than this takes longer to hand to a thread than to compute. Work is counted in bytes of the KV
// cache that are read; the arithmetic of a row with an element of it takes as long as reading half a byte.
constexpr int64_t kWorkPerThread = 128 * 1024;
constexpr int64_t kUnitsPerThread = 4;

// A sequence whose splits are divided among threads.
struct DividedSequence {
    int64_t sequence, first_split;
    int64_t states;  // offset of [splits, queries, q_heads, state_size]
};

int64_t work_of(const Attention& a, const Sequence& s, Range queries, Range positions, int64_t heads, int64_t q_heads) {
    int64_t seen = 0;
    for (int64_t query = queries.begin; query < queries.end; ++query)
        seen += common(s.seen(query, a.window), positions).size();
    const int64_t tokens = common(s.seen(queries, a.window), positions).size();
    return a.head_dim * (2 * a.cache_item * tokens * heads + seen * q_heads);
}

Range splits_of(const Attention& a, const Sequence& s, Range queries) {
    const Range seen = s.seen(queries, a.window);
    return {seen.begin / kSplit, (seen.end + kSplit - 1) / kSplit};
}

int64_t pieces(int64_t count, int64_t largest) { return (count + largest - 1) / largest; }

// Calls visit(range) for `count` pieces of a range that are as equal as possible.
template <class Visit>
void for_each_piece(Range range, int64_t count, const Visit& visit) {
    for (int64_t i = 0; i < count; ++i)
        visit(Range{range.begin + range.size() * i / count, range.begin + range.size() * (i + 1) / count});
}

// The units of a batch. They are small enough for each thread to have several.
class Division {
   public:
    std::vector<Unit> units;
    std::vector<DividedSequence> divided;
    int64_t states_size = 0, max_rows = 0, threads = 1;

    Division(const Attention& a, int64_t most_threads) : a_(a) {
        int64_t work = 0;
        for (int64_t head = 0; head < a.kv_heads; ++head) group_ = std::max(group_, a.group_size(head));
        for (int64_t i = 0; i < a.sequences; ++i) {
            const Sequence s(a, i);
            if (s.queries > 0) work += work_of(a, s, {0, s.queries}, {0, s.context}, a.kv_heads, a.q_heads);
        }
        threads = std::max<int64_t>(1, std::min(most_threads, work / kWorkPerThread));
        share_ = threads == 1 ? work : work / (threads * kUnitsPerThread);
        for (int64_t i = 0; i < a.sequences; ++i) {
            const Sequence s(a, i);
            if (s.queries > kFewQueries)
                divide_queries(i, s);
            else if (s.queries > 0)
                divide_splits(i, s);
        }
        // The largest first, so that no thread works alone for long at the end.
        std::stable_sort(units.begin(), units.end(), [](const Unit& x, const Unit& y) { return x.work > y.work; });
    }

   private:
    // Units of one KV head: its keys and values are packed for a block of queries.
    void divide_queries(int64_t sequence, const Sequence& s) {
        const int64_t rows = std::min(group_, kMaxRows);
        int64_t queries = kMaxRows / rows;
        while (queries / 2 * rows >= kMinRows &&
               work_of(a_, s, {s.queries - queries, s.queries}, {0, s.context}, 1, rows) > share_)
            queries /= 2;
        for_each_piece({0, s.queries}, pieces(s.queries, queries), [&](Range block) {
            for (int64_t head = 0; head < a_.kv_heads; ++head)
                add(sequence, s, block, {head, head + 1}, splits_of(a_, s, block), kNoStates);
        });
    }

    // Units of all queries and, if possible, all heads, whose keys and values are neighbours in memory.
    void divide_splits(int64_t sequence, const Sequence& s) {
        const Range queries = {0, s.queries}, splits = splits_of(a_, s, queries);
        const bool divide =
            splits.size() > 1 && work_of(a_, s, queries, {0, s.context}, a_.kv_heads, a_.q_heads) > share_;
        const int64_t step = s.queries * a_.q_heads * a_.state_size();
        if (divide) divided.push_back({sequence, splits.begin, states_size});
        for_each_piece(splits, divide ? splits.size() : 1, [&](Range piece) {
            const int64_t work =
                work_of(a_, s, queries, {piece.begin * kSplit, piece.end * kSplit}, a_.kv_heads, a_.q_heads);
            const int64_t by_rows = pieces(s.queries * a_.q_heads, kMaxRows);
            const int64_t by_work = work / std::max<int64_t>(1, share_);
            for_each_piece({0, a_.kv_heads}, std::min(a_.kv_heads, std::max(by_rows, by_work)), [&](Range heads) {
                add(sequence, s, queries, heads, piece, divide ? states_size : kNoStates);
            });
            if (divide) states_size += step;
        });
    }

    // A group of query heads that is too large for a unit is divided.
    void add(int64_t sequence, const Sequence& s, Range queries, Range heads, Range splits, int64_t states) {
        const Range q_heads = {a_.group_starts[heads.begin], a_.group_starts[heads.end]};
        const int64_t count = heads.size() > 1 ? 1 : pieces(q_heads.size() * queries.size(), kMaxRows);
        for_each_piece(q_heads, std::min(count, q_heads.size()), [&](Range piece) {
            const Range positions = {splits.begin * kSplit, splits.end * kSplit};
            const int64_t work = work_of(a_, s, queries, positions, heads.size(), piece.size());
            units.push_back({sequence, queries, heads, piece, splits, states, work});
            max_rows = std::max(max_rows, queries.size() * piece.size());
        });
    }

    const Attention& a_;
    int64_t group_ = 1, share_ = 0;
};

// Merges the states of a query's splits, for all heads.
void merge_splits(const Attention& a, const DividedSequence& d, int64_t query, const float* states) {
    const Sequence s(a, d.sequence);
    const Range splits = splits_of(a, s, {query, query + 1});
    const int64_t size = a.state_size(), step = s.queries * a.q_heads * size;
    alignas(64) float total[kStatistics + kMaxHeadDim];
    for (int64_t i = 0; i < a.q_heads; ++i) {
        const float* state = states + d.states + (splits.begin - d.first_split) * step + (query * a.q_heads + i) * size;
        std::copy(state, state + size, total);
        for (int64_t split = splits.begin + 1; split < splits.end; ++split)
            a.tiles->merge(state += step, a.num_sums(), total);
        a.tiles->finish(total, a.head_dim, a.out + s.element(a, query, i) * a.item);
    }
}

struct AlignedDelete {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t(kCacheLine)); }
};
typedef std::unique_ptr<float[], AlignedDelete> Memory;

Memory allocate(int64_t floats) {
    return Memory(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(kCacheLine))));
}

void attend(const Attention& a, int64_t most_threads) {
    const Division division(a, most_threads);
    const Memory states = allocate(division.states_size);
    const int64_t size = Scratch::size(a, division.max_rows);
    const Memory scratch = allocate(division.threads * size);
    in_parallel(division.units.size(), division.threads, [&](int64_t unit, int64_t worker) {
        const Scratch own(a, division.max_rows, scratch.get() + worker * size);
        UnitRun(a, division.units[unit], own, states.get()).run();
    });
    std::vector<std::pair<const DividedSequence*, int64_t>> queries;
    for (const DividedSequence& divided : division.divided)
        for (int64_t query = 0; query < Sequence(a, divided.sequence).queries; ++query)
            queries.push_back({&divided, query});
    in_parallel(queries.size(), division.threads, [&](int64_t i, int64_t) {
        merge_splits(a, *queries[i].first, queries[i].second, states.get());
    });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C interface. All tensors are contiguous; `threads` is an upper bound.

EXPORT int32_t shoal_max_head_dim() { return kMaxHeadDim; }

// type: of q and out; cache_type: of keys and values. Scales are null unless that type has some. window: at least 1.
// softcap: 0 for none. groups: group_starts, then q_order.
EXPORT int32_t shoal_attend(int32_t type, int32_t cache_type, AttentionLevel level, const void* q, const void* keys, const void* values,
                            const void* key_scales, const void* value_scales, void* out, const int32_t* query_starts,
                            const int32_t* context_lens, const int32_t* block_tables, int64_t table_stride,
                            int64_t block_size, int64_t sequences, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                            const int32_t* groups, int64_t window, float scale, float softcap, int64_t threads) {
    if (head_dim > kMaxHeadDim) return kUnsupported;
    const int64_t item = type == kFloat32 ? sizeof(float) : sizeof(BFloat16);
    const Attention a = {static_cast<const char*>(q), static_cast<const char*>(keys), static_cast<const char*>(values),
                         static_cast<const uint16_t*>(key_scales), static_cast<const uint16_t*>(value_scales),
                         static_cast<char*>(out), item, cache_item_bytes(cache_type), query_starts, context_lens,
                         block_tables, table_stride, block_size, sequences, q_heads, kv_heads, head_dim, groups,
                         groups + kv_heads + 1, window, {scale, softcap}, &attention_tiles(type, cache_type, level)};
    try {
        attend(a, threads);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
    return kOk;
}

REPLAYABLE(shoal_attend)
