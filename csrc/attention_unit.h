// A unit of work of attention: some queries and heads of a sequence, and all splits of their contexts, or one. The
// arithmetic is in attention_tiles.h; here is the order of memory accesses, which changes no bit of a result.
//
// A split needs no rescaling: the scores of its rows fit into the L2 cache, so their maxima are known before the
// exponentials. Splits that are computed one after the other are merged at once (rescaling: Milakov & Gimelshein,
// "Online normalizer calculation for softmax", 2018; FlashAttention, Dao et al., 2022).

#pragma once

#include "attention_tiles.h"

namespace {

struct Attention {
    const char* q;       // [n, q_heads, head_dim]
    const char* keys;    // [num_slots, kv_heads, head_dim]
    const char* values;  // the same
    const uint16_t* key_scales;    // bfloat16 [num_slots, kv_heads]; null: keys and values have no scales
    const uint16_t* value_scales;  // the same
    char* out;           // [n, q_heads, head_dim]
    int64_t item;        // bytes of an element of q and out
    int64_t cache_item;  // bytes of an element of keys and values
    const int32_t* query_starts;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t table_stride, block_size, sequences;
    int64_t q_heads, kv_heads, head_dim;
    const int32_t* group_starts;  // [kv_heads + 1] into q_order
    const int32_t* q_order;       // [q_heads]: query heads, ordered by KV head
    int64_t window;               // the most keys that a query attends to, its own included
    Softmax softmax;
    const AttentionTiles* tiles;

    int64_t num_sums() const { return padded_dim(head_dim); }
    int64_t state_size() const { return kStatistics + num_sums(); }
    int64_t group_size(int64_t head) const { return group_starts[head + 1] - group_starts[head]; }
};

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
};

Range common(Range x, Range y) { return {std::max(x.begin, y.begin), std::min(x.end, y.end)}; }

// A sequence of the batch. Queries are numbered from 0 within it.
struct Sequence {
    int64_t first_row, queries, context;
    const int32_t* block_table;

    Sequence(const Attention& a, int64_t i)
        : first_row(a.query_starts[i]),
          queries(a.query_starts[i + 1] - a.query_starts[i]),
          context(a.context_lens[i]),
          block_table(a.block_tables + i * a.table_stride) {}

    // The first element of a query in q and out. i counts query heads in the order of q_order.
    int64_t element(const Attention& a, int64_t query, int64_t i) const {
        return ((first_row + query) * a.q_heads + a.q_order[i]) * a.head_dim;
    }

    int64_t position(int64_t query) const { return context - queries + query; }

    // The positions that a query attends to.
    Range seen(int64_t query, int64_t window) const {
        const int64_t end = position(query) + 1;
        return {std::max<int64_t>(0, end - window), end};
    }

    // The positions that some of these queries attend to.
    Range seen(Range some, int64_t window) const {
        return {seen(some.begin, window).begin, seen(some.end - 1, window).end};
    }

    // Those of these queries that attend to some of these positions.
    Range that_see(Range positions, Range some, int64_t window) const {
        return common(some, {positions.begin - position(0), positions.end - 1 + window - position(0)});
    }
};

struct Unit {
    int64_t sequence;
    Range queries, heads;  // heads: KV heads
    Range q_heads;         // of these heads, in the order of q_order; all if there are several heads
    Range splits;
    int64_t states;  // where to store the states of the only split: [queries, q_heads, state_size] for all queries and
                     // heads of the sequence. kNoStates: results are written instead
    int64_t work;
};

constexpr int64_t kNoStates = -1;

// The memory of a thread, for units of up to `rows` rows.
struct Scratch {
    int64_t query_stride;  // words
    uint32_t* queries;     // [rows, query_stride]
    float* scores;         // [rows, kScoreStride]: scores, then weights
    float* split;          // [rows, state_size]: of the current split
    float* total;          // [rows, state_size]: of all splits until now
    uint32_t* tile;        // the packed keys or values of a tile
    float* scales;         // [2, kv_heads, kSplit]: of keys and of values, for the current split

    static int64_t size(const Attention& a, int64_t rows) {
        return rows * (a.num_sums() + kScoreStride + 2 * a.state_size()) + tile_size(a) + scales_size(a);
    }
    static int64_t scales_size(const Attention& a) { return a.key_scales ? 2 * a.kv_heads * kSplit : 0; }
    static int64_t tile_size(const Attention& a) { return round_up(a.head_dim, kPanel) * kTile; }

    Scratch(const Attention& a, int64_t rows, float* memory)
        : query_stride(a.num_sums() / a.tiles->word_elements),
          queries(reinterpret_cast<uint32_t*>(memory)),
          scores(memory + rows * a.num_sums()),
          split(scores + rows * kScoreStride),
          total(split + rows * a.state_size()),
          tile(reinterpret_cast<uint32_t*>(total + rows * a.state_size())),
          scales(total + rows * a.state_size() + tile_size(a)) {}
};

// Computes one unit.
class UnitRun {
   public:
    UnitRun(const Attention& a, const Unit& u, const Scratch& scratch, float* states)
        : a_(a),
          u_(u),
          s_(a, u.sequence),
          x_(scratch),
          states_(u.states == kNoStates ? nullptr : states + u.states),
          words_(a.tiles->word_elements),
          tile_(u.heads.size() > 1 ? tile_of_heads() : kTile) {}

    void run() {
        pack_queries();
        for (int64_t split = u_.splits.begin; split < u_.splits.end; ++split) {
            begin_split(split);
            score();
            weigh();
            sum_values();
            end_split(split);
        }
        if (!states_) finish();
    }

   private:
    // The rows of a head are consecutive: its first query for all query heads, then the next one.
    int64_t row_of(int64_t head, int64_t query) const {
        const Range group = group_of(head);
        return (group.begin - u_.q_heads.begin) * u_.queries.size() + (query - u_.queries.begin) * group.size();
    }

    Range group_of(int64_t head) const {
        return common({a_.group_starts[head], a_.group_starts[head + 1]}, u_.q_heads);
    }

    // Calls visit(row, query, i, head) for the rows of some queries. i counts query heads in the order of q_order.
    template <class Visit>
    void for_each_row(Range queries, const Visit& visit) const {
        for (int64_t head = u_.heads.begin; head < u_.heads.end; ++head) {
            const Range group = group_of(head);
            int64_t row = row_of(head, queries.begin);
            for (int64_t query = queries.begin; query < queries.end; ++query)
                for (int64_t i = group.begin; i < group.end; ++i) visit(row++, query, i, head);
        }
    }

    // Of a token, for the heads of the unit.
    int64_t bytes_of_heads() const { return u_.heads.size() * a_.head_dim * a_.cache_item; }
    const char* first_head_in(const char* cache) const { return cache + u_.heads.begin * a_.head_dim * a_.cache_item; }

    // The tokens of a tile if there are several heads. Their time is that of reading the cache, so the tiles are small:
    // only few bytes are read before those of the next tile are prefetched. But without packing the additions of one
    // vector of sums wait for each other, unless there are several rows. How many bytes count as many was measured.
    int64_t tile_of_heads() const {
        constexpr int64_t kManyBytes = 2048;
        const int64_t heads = u_.heads.size(), rows = (u_.q_heads.size() * u_.queries.size() + heads - 1) / heads;
        const bool packed = rows > a_.tiles->most_few_rows;
        const bool small = packed ? a_.cache_item > 1 : bytes_of_heads() >= kManyBytes && rows > 1;
        return small ? kLanes : 2 * kLanes;
    }

    void pack_queries() {
        for_each_row(u_.queries, [&](int64_t row, int64_t query, int64_t i, int64_t) {
            const char* elements = a_.q + s_.element(a_, query, i) * a_.item;
            a_.tiles->pack_query(elements, a_.head_dim, x_.queries + row * x_.query_stride);
        });
    }

    void begin_split(int64_t split) {
        start_ = split * kSplit;
        queries_ = s_.that_see({start_, start_ + kSplit}, u_.queries, a_.window);
        const Range seen = common(s_.seen(queries_, a_.window), {start_, start_ + kSplit});
        seen_ = {seen.begin - start_, seen.end - start_};
        // Whole vectors of keys are packed: positions that no query sees are replaced by ones that some query sees.
        const int64_t token_size = a_.kv_heads * a_.head_dim * a_.cache_item, begin = round_down(seen_.begin, tile_);
        int64_t block = seen.begin / a_.block_size, within = seen.begin % a_.block_size;
        for (int64_t t = seen_.begin; t < seen_.end; ++block, within = 0)
            for (; t < seen_.end && within < a_.block_size; ++t, ++within) {
                slots_[t] = s_.block_table[block] * a_.block_size + within;
                offsets_[t] = slots_[t] * token_size;
            }
        std::fill(offsets_ + begin, offsets_ + seen_.begin, offsets_[seen_.begin]);
        std::fill(offsets_ + seen_.end, offsets_ + round_up(seen_.end, kLanes), offsets_[seen_.end - 1]);
        if (a_.key_scales) gather_scales();
        // The first tile of keys, which no other prefetches.
        const Range first = {seen_.begin, std::min(seen_.end, begin + tile_)};
        Prefetch(first_head_in(a_.keys), offsets_ + first.begin, first.size(), bytes_of_heads())
            .lines(first.size() * ((bytes_of_heads() + kCacheLine - 1) / kCacheLine));
    }

    // Reads the scales of whole vectors of positions.
    void gather_scales() {
        const int64_t begin = round_down(seen_.begin, kLanes), end = round_up(seen_.end, kLanes);
        std::fill(slots_ + begin, slots_ + seen_.begin, slots_[seen_.begin]);
        std::fill(slots_ + seen_.end, slots_ + end, slots_[seen_.end - 1]);
        for (int64_t head = u_.heads.begin; head < u_.heads.end; ++head) {
            float *keys = x_.scales + head * kSplit, *values = keys + a_.kv_heads * kSplit;
            for (int64_t t = begin; t < end; ++t) {
                keys[t] = to_float(BFloat16{a_.key_scales[slots_[t] * a_.kv_heads + head]});
                values[t] = to_float(BFloat16{a_.value_scales[slots_[t] * a_.kv_heads + head]});
            }
        }
    }

    Scales scales_of(int64_t head) const {
        if (!a_.key_scales) return {nullptr, nullptr};
        return {x_.scales + head * kSplit, x_.scales + (a_.kv_heads + head) * kSplit};
    }

    // Calls visit(tile, queries that see a token of it) for the tiles of the split, which are ranges of its positions.
    template <class Visit>
    void for_each_tile(const Visit& visit) const {
        for (int64_t t = round_down(seen_.begin, tile_); t < seen_.end; t += tile_) {
            const Range tile = {t, std::min(t + tile_, seen_.end)};
            visit(tile, s_.that_see({start_ + tile.begin, start_ + tile.end}, queries_, a_.window));
        }
    }

    // The outer loop is over tokens, the inner one over heads: the heads of a token are neighbours in memory, and whole
    // rows are read twice as fast as single heads. Each head prefetches its share of the next tile.
    void score() {
        for_each_tile([&](Range tile, Range queries) {
            const int64_t vectors = (tile.size() + kLanes - 1) / kLanes;
            for (int64_t head = u_.heads.begin; head < u_.heads.end; ++head) {
                const int64_t rows = queries.size() * group_of(head).size(), row = row_of(head, queries.begin);
                if (rows == 0) continue;
                Prefetch next = tile.end < seen_.end ? share_of(a_.keys, tile.end, head)
                                                     : share_of(a_.values, round_down(seen_.begin, tile_), head);
                const Tile keys = tile_of(a_.keys, head, tile, &next);
                if (rows <= a_.tiles->most_few_rows) {
                    a_.tiles->multiply_few_keys({x_.queries + row * x_.query_stride, x_.query_stride, rows,
                                                 x_.scores + row * kScoreStride + tile.begin, kScoreStride},
                                                keys, vectors);
                    continue;
                }
                a_.tiles->pack_keys(keys, vectors, x_.tile);
                a_.tiles->multiply({x_.queries + row * x_.query_stride, x_.query_stride, rows, x_.tile, vectors,
                                    x_.query_stride, x_.scores + row * kScoreStride + tile.begin, kScoreStride,
                                    false});
            }
        });
    }

    void weigh() {
        for_each_row(queries_, [&](int64_t row, int64_t query, int64_t, int64_t head) {
            const Range seen = common(s_.seen(query, a_.window), {start_, start_ + kSplit});
            float* state = x_.split + row * a_.state_size();
            a_.tiles->exponentiate(x_.scores + row * kScoreStride, seen.begin - start_, seen.end - start_, a_.softmax,
                                   scales_of(head), state);
            std::fill(state + kStatistics, state + a_.state_size(), 0.0f);
        });
    }

    void sum_values() {
        const int64_t tile_words = kTile / words_;
        for_each_tile([&](Range tile, Range queries) {
            // Tokens of the tile that some query sees, and the words that they are in.
            const Range tokens = {std::max(tile.begin, seen_.begin) - tile.begin, tile.end - tile.begin};
            const Range used = {tokens.begin / words_, words(tokens.end)};
            for (int64_t head = u_.heads.begin; head < u_.heads.end; ++head) {
                const int64_t rows = queries.size() * group_of(head).size(), row = row_of(head, queries.begin);
                if (rows == 0) continue;
                Prefetch next = share_of(a_.values, tile.end, head);
                const Tile values = tile_of(a_.values, head, tile, &next);
                const uint32_t* weights = reinterpret_cast<const uint32_t*>(x_.scores + row * kScoreStride);
                float* sums = x_.split + row * a_.state_size() + kStatistics;
                if (rows <= a_.tiles->most_few_rows) {
                    a_.tiles->add_few_values(
                        {weights + tile.begin / words_, kScoreStride, rows, sums, a_.state_size()}, values,
                        tokens.begin, tokens.end);
                    continue;
                }
                a_.tiles->pack_values(values, tokens.begin, tokens.end, x_.tile);
                for (int64_t d = 0; d < a_.num_sums(); d += kPanel)
                    a_.tiles->multiply({weights + tile.begin / words_ + used.begin, kScoreStride, rows,
                                        x_.tile + (d / kPanel * tile_words + used.begin) * kPanel,
                                        std::min(kPanel, a_.num_sums() - d) / kLanes, used.size(), sums + d,
                                        a_.state_size(), true});
            }
        });
    }

    void end_split(int64_t split) {
        const int64_t size = a_.state_size();
        for_each_row(queries_, [&](int64_t row, int64_t query, int64_t i, int64_t) {
            const float* state = x_.split + row * size;
            float* total = states_ ? states_ + (query * a_.q_heads + i) * size : x_.total + row * size;
            if (states_ || split == first_split(query))
                std::copy(state, state + size, total);
            else
                a_.tiles->merge(state, a_.num_sums(), total);
        });
    }

    int64_t first_split(int64_t query) const { return s_.seen(query, a_.window).begin / kSplit; }

    void finish() {
        for_each_row(u_.queries, [&](int64_t row, int64_t query, int64_t i, int64_t) {
            char* elements = a_.out + s_.element(a_, query, i) * a_.item;
            a_.tiles->finish(x_.total + row * a_.state_size(), a_.head_dim, elements);
        });
    }

    int64_t words(int64_t elements) const { return (elements + words_ - 1) / words_; }

    Tile tile_of(const char* cache, int64_t head, Range tile, Prefetch* next) const {
        return {cache + head * a_.head_dim * a_.cache_item, offsets_ + tile.begin, a_.head_dim, next};
    }

    // A head's share of the tile that begins at `begin`: some tokens, for all heads.
    Prefetch share_of(const char* cache, int64_t begin, int64_t head) const {
        const Range tokens = common({begin, begin + tile_}, seen_);
        const int64_t share = head - u_.heads.begin, heads = u_.heads.size();
        const int64_t from = tokens.size() * share / heads, to = tokens.size() * (share + 1) / heads;
        return {first_head_in(cache), offsets_ + tokens.begin + from, to - from, bytes_of_heads()};
    }

    const Attention& a_;
    const Unit& u_;
    const Sequence s_;
    const Scratch& x_;
    float* const states_;
    const int64_t words_;  // elements in a word
    // Tokens in a tile. Several heads are computed if the time is that of reading the cache; then tiles are small, so
    // that only few bytes are read before those of the next tile are prefetched.
    const int64_t tile_;

    // The current split: its first position, the queries that see some of it, and what they see, from its start on.
    int64_t start_ = 0;
    Range queries_{}, seen_{};
    int64_t slots_[kSplit], offsets_[kSplit];  // of its positions, offsets in bytes
};

}  // namespace
