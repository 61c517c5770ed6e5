// The CPU kernels of shoal.kernels.sampling: the library _sampling.
//
//  * Operations that are exact in PyTorch are exact here: comparisons, order, and which tokens can win a draw. The
//    rounding of logarithms depends on their implementation, so PyTorch makes the last choice, between a few tokens.
//  * One worker computes a whole row.
//  * The caller allocates all memory.

#include "top_tokens.h"

#include <cmath>
#include <functional>

namespace {

constexpr int32_t kAbiVersion = 3;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

constexpr int64_t kGroup = 4 * kLanes;  // columns; they are examined one by one only if their largest logit matters

// The group of a row with this number. The last group is copied to `padded` and filled up with -inf.
ALWAYS_INLINE const float* group_of(const float* row, int64_t columns, int64_t group, float* padded) {
    const int64_t left = columns - group * kGroup;
    if (left >= kGroup) return row + group * kGroup;
    std::fill(padded, padded + kGroup, kMinusInfinity);
    std::memcpy(padded, row + group * kGroup, left * sizeof(float));
    return padded;
}

ALWAYS_INLINE int64_t groups_of(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

struct Row {
    const float* logits;
    int64_t columns;
    int64_t start;  // the token of column 0
    float temperature;
    Token limit;  // only tokens that come before the limit in the order of tokens count
};

// ---------------------------------------------------------------------------------------------------------------------
// The top tokens of a row.

// A group of a row, and the lowest logit that is within the row's limit.
struct Group {
    const float* logits;
    float bound;
};

// A token with a lower id than the limit's is within the limit if its logit is at least the limit's; with a higher id
// its logit must be larger. The group that contains the limit's id is copied, and tokens outside the limit get -inf.
ALWAYS_INLINE Group group_of(const Row& row, int64_t group, float* padded) {
    const float* logits = group_of(row.logits, row.columns, group, padded);
    const int64_t before = row.limit.id - (row.start + group * kGroup);
    if (before >= kGroup) return {logits, row.limit.logit};
    if (before <= 0) return {logits, std::nextafter(row.limit.logit, std::numeric_limits<float>::infinity())};
    if (logits != padded) std::memcpy(padded, logits, kGroup * sizeof(float));
    for (int64_t i = before; i < kGroup; ++i) {
        if (padded[i] <= row.limit.logit) padded[i] = kMinusInfinity;
    }
    return {padded, row.limit.logit};
}

// The logits from i on, with -inf (which has no weight and wins no draw) for tokens outside the limit.
ALWAYS_INLINE Floats within_limit(const Group& group, int64_t i) {
    const Floats x = load_floats(group.logits + i);
    return (x >= group.bound) ? x : splat(kMinusInfinity);
}

CLONED void group_maxima(const float* row, int64_t columns, int32_t* maxima) {
    float padded[kGroup];
    for (int64_t group = 0; group < groups_of(columns); ++group) {
        const float* x = group_of(row, columns, group, padded);
        const Ints first = larger(ordered(load_floats(x)), ordered(load_floats(x + kLanes)));
        const Ints second = larger(ordered(load_floats(x + 2 * kLanes)), ordered(load_floats(x + 3 * kLanes)));
        maxima[group] = largest(larger(first, second));
    }
}

// The `count` top tokens. The threshold is the count-th largest of the groups' maxima: at least `count` logits reach
// it, so the top `count` logits do. One pass over the row finds the threshold, and then only groups that reach it are
// examined. `scratch` has space for columns + groups 64-bit numbers.
void top_of_row(const float* row, int64_t columns, int64_t start, int64_t count, int64_t* scratch, int64_t* out) {
    const int64_t groups = groups_of(columns);
    int64_t* found = scratch;
    int32_t* maxima = reinterpret_cast<int32_t*>(scratch + columns);
    int32_t* sorted = maxima + groups;
    group_maxima(row, columns, maxima);
    int32_t threshold = std::numeric_limits<int32_t>::min();
    if (count <= groups) {
        std::copy(maxima, maxima + groups, sorted);
        std::nth_element(sorted, sorted + count - 1, sorted + groups, std::greater<int32_t>());
        threshold = sorted[count - 1];
    }
    int64_t size = 0;
    for (int64_t group = 0; group < groups; ++group) {
        if (maxima[group] < threshold) continue;
        const int64_t end = std::min(columns, (group + 1) * kGroup);
        for (int64_t column = group * kGroup; column < end; ++column) {
            if (ordered(row[column]) >= threshold) found[size++] = pack_token(row[column], start + column);
        }
    }
    if (size > count) std::nth_element(found, found + count - 1, found + size, std::greater<int64_t>());
    std::sort(found, found + count, std::greater<int64_t>());
    std::copy(found, found + count, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums of exponentials.

// The largest logit within the limit.
CLONED float largest_of_row(const Row& row) {
    Floats best = splat(kMinusInfinity);
    float padded[kGroup];
    for (int64_t group = 0; group < groups_of(row.columns); ++group) {
        const Group x = group_of(row, group, padded);
        for (int64_t i = 0; i < kGroup; i += kLanes) best = larger(best, within_limit(x, i));
    }
    return largest(best);
}

// The sum of exp(x / temperature - best) over the logits within the limit for which x / temperature >= floor. Lanes are
// summed in float32 over a span that is short enough not to lose digits, then in float64.
CLONED double sum_of_row(const Row& row, float floor, float best) {
    constexpr int64_t kSpan = 16;  // groups
    const int64_t groups = groups_of(row.columns);
    float padded[kGroup];
    double total = 0;
    for (int64_t begin = 0; begin < groups; begin += kSpan) {
        Floats sum{};
        for (int64_t group = begin; group < std::min(groups, begin + kSpan); ++group) {
            const Group x = group_of(row, group, padded);
            for (int64_t i = 0; i < kGroup; i += kLanes) {
                const Floats scaled = within_limit(x, i) / splat(row.temperature);
                // Select before the call, not after it: GCC 12 would compile a selection between results lane by lane.
                const Floats counted = (scaled >= splat(floor)) ? scaled : splat(kMinusInfinity);
                sum += exp_of_negative(counted - best);
            }
        }
        for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    }
    return total;
}

CLONED int64_t above_in_row(const float* row, int64_t columns, float value) {
    constexpr int64_t kSpan = int64_t{1} << 30;  // a count that fits an int32
    int64_t total = 0;
    for (int64_t begin = 0; begin < columns; begin += kSpan) {
        int32_t count = 0;
        for (int64_t i = begin; i < std::min(columns, begin + kSpan); ++i) count += row[i] > value;
        total += count;
    }
    return total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Draws.

ALWAYS_INLINE Words mix(Words x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

struct Key {
    uint32_t low, high;
};

// The uniforms of kernels/noise.py, bit for bit: the noise is -log(-log1p(-v)).
ALWAYS_INLINE Floats uniforms(Key key, uint32_t first_id) {
    constexpr float kLargestBelowOne = 1.0f - 0x1p-24f;
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Words bits = mix(mix((lanes + first_id) ^ key.low) ^ key.high) & 0x7fffffffu;
    const Floats v = (__builtin_convertvector((Ints)bits, Floats) + 0.5f) * 0x1p-31f;
    return (v > kLargestBelowOne) ? splat(kLargestBelowOne) : v;
}

// An upper bound of the noise of v. -log(-log1p(-v)) <= -log(v) since -log1p(-v) >= v; and log2(v) is at least the
// exponent plus the mantissa of v, which its bits are if they are read as one number, since log2(1 + f) >= f.
ALWAYS_INLINE Floats noise_bound(Floats v) {
    constexpr float kLn2 = 0.693147181f;
    return 127 * kLn2 - __builtin_convertvector((Ints)v, Floats) * (kLn2 * 0x1p-23f);
}

constexpr float kLargestNoise = 22.2f;  // at v = 2^-32

ALWAYS_INLINE double score_of(const Row& row, int64_t column, float v) {
    return static_cast<double>(row.logits[column] / row.temperature) - std::log(-std::log1p(-static_cast<double>(v)));
}

struct Candidate {
    double score;
    int64_t column;
};

constexpr int64_t kMaxCandidates = 64;

// Drops the candidates that cannot win any more, and returns how many are left.
int64_t prune(Candidate* candidates, int64_t size, double bound) {
    Candidate* const end = candidates + size;
    return std::remove_if(candidates, end, [=](const Candidate& c) { return c.score < bound; }) - candidates;
}

// Finds the columns that may have the largest score in float32, however its logarithms are rounded, in ascending order.
// Returns their number; 0 if every logit is -inf; -1 if they are too many or logits or temperature are not finite.
CLONED int64_t candidates_of_row(const Row& row, Key key, int64_t capacity, int64_t* out) {
    const float top = largest_of_row(row);
    if (top == kMinusInfinity) return 0;
    const double best_scaled = top / row.temperature;
    if (!std::isfinite(best_scaled)) return -1;
    const double margin = 1e-3 + 1e-5 * (std::fabs(best_scaled) + kLargestNoise);
    const float inverse = 1.0f / row.temperature;
    if (!std::isfinite(inverse)) return -1;
    Candidate candidates[kMaxCandidates];
    int64_t size = 0;
    double best = best_scaled - 3;  // noise is above -2.9
    float padded[kGroup], vs[kGroup], bounds[kGroup];
    for (int64_t group = 0; group < groups_of(row.columns); ++group) {
        const Group x = group_of(row, group, padded);
        const uint32_t id = static_cast<uint32_t>(row.start + group * kGroup);
        const float needed = static_cast<float>(best - margin);
        Floats high = splat(kMinusInfinity);
        for (int64_t i = 0; i < kGroup; i += kLanes) high = larger(high, within_limit(x, i));
        if (largest(high) * inverse + kLargestNoise < needed) continue;
        Floats bound = splat(kMinusInfinity);
        for (int64_t i = 0; i < kGroup; i += kLanes) {
            const Floats v = uniforms(key, id + static_cast<uint32_t>(i));
            const Floats b = within_limit(x, i) * inverse + noise_bound(v);
            store_floats(vs + i, v);
            store_floats(bounds + i, b);
            bound = larger(bound, b);
        }
        if (largest(bound) < needed) continue;
        const int64_t end = std::min(kGroup, row.columns - group * kGroup);
        for (int64_t i = 0; i < end; ++i) {
            if (!(bounds[i] >= static_cast<float>(best - margin))) continue;
            const int64_t column = group * kGroup + i;
            const double score = score_of(row, column, vs[i]);
            if (!(score >= best - margin)) continue;
            best = std::max(best, score);
            if (size == kMaxCandidates) size = prune(candidates, size, best - margin);
            if (size == kMaxCandidates) return -1;
            candidates[size++] = {score, column};
        }
    }
    size = prune(candidates, size, best - margin);
    if (size == 0 || size > capacity) return -1;
    for (int64_t i = 0; i < size; ++i) out[i] = candidates[i].column;
    return size;
}

// ---------------------------------------------------------------------------------------------------------------------
// Masks.

CLONED void mask_row(float* row, int64_t columns, int64_t start, const int32_t* bits, int64_t words) {
    const Words lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t column = 0; column < columns;) {
        const int64_t id = start + column, word = id / 32;
        const int64_t end = std::min(columns, column + 32 - id % 32);
        const uint32_t allowed = word < words ? static_cast<uint32_t>(bits[word]) : 0;
        if (allowed == 0) {
            std::fill(row + column, row + end, kMinusInfinity);
        } else if (allowed != 0xffffffffu && end - column == 32) {
            for (int64_t i = 0; i < 32; i += kLanes) {
                const Words bit = ((Words{} + allowed) >> (lanes + static_cast<uint32_t>(i))) & 1u;
                const Floats kept = (bit != 0u) ? load_floats(row + column + i) : splat(kMinusInfinity);
                store_floats(row + column + i, kept);
            }
        } else if (allowed != 0xffffffffu) {
            for (int64_t i = column; i < end; ++i) {
                if (!(allowed >> ((start + i) % 32) & 1)) row[i] = kMinusInfinity;
            }
        }
        column = end;
    }
}

}  // namespace

// The C interface. `logits` points to row 0, and `stride` is the distance between rows, in elements. The functions work
// on the rows rows[0] to rows[num_rows - 1].

EXPORT int32_t shoal_sampling_abi_version() { return kAbiVersion; }

// How many 64-bit numbers of scratch space each thread of shoal_first needs.
EXPORT int64_t shoal_first_scratch(int64_t columns) { return columns + groups_of(columns); }

// out: [num_rows, count], 1 <= count <= columns.
EXPORT void shoal_first(const float* logits, int64_t stride, const int64_t* rows, int64_t num_rows, int64_t columns,
                        int64_t start, int64_t count, int64_t* scratch, int64_t* out, int64_t threads) {
    const int64_t scratch_size = shoal_first_scratch(columns);
    in_parallel(num_rows, threads, [&](int64_t i, int64_t worker) {
        top_of_row(logits + rows[i] * stride, columns, start, count, scratch + worker * scratch_size,
                     out + i * count);
    });
}

// The top token of each row is written as its logit and its id: [num_rows]. The logits are float32 or bfloat16
// (DataType). Each row is cut into `parts`, of which none is empty: 1 <= parts <= columns. scratch: [num_rows, parts]; with one part it may be
// `ids`.
EXPORT void shoal_argmax(int32_t type, const void* logits, int64_t stride, int64_t num_rows, int64_t columns,
                         int64_t start, int64_t parts, int64_t* scratch, float* values, int64_t* ids,
                         int64_t threads) {
    in_parallel(num_rows * parts, threads, [&](int64_t piece, int64_t) {
        const int64_t row = piece / parts, part = piece % parts;
        const int64_t begin = columns * part / parts, end = columns * (part + 1) / parts;
        scratch[piece] = type == kBFloat16
                             ? top_token(static_cast<const BFloat16*>(logits) + row * stride, begin, end, start)
                             : top_token(static_cast<const float*>(logits) + row * stride, begin, end, start);
    });
    for (int64_t row = 0; row < num_rows; ++row) {
        const Token top = unpack_token(*std::max_element(scratch + row * parts, scratch + (row + 1) * parts));
        values[row] = top.logit;
        ids[row] = top.id;
    }
}

// limits: packed tokens; only larger tokens count.
EXPORT void shoal_log_totals(const float* logits, int64_t stride, const int64_t* rows, int64_t num_rows,
                             int64_t columns, int64_t start, const float* temperature, const float* floor,
                             const int64_t* limits, float* out, int64_t threads) {
    in_parallel(num_rows, threads, [&](int64_t i, int64_t) {
        const Row row{logits + rows[i] * stride, columns, start, temperature[i], unpack_token(limits[i])};
        const float best = largest_of_row(row) / temperature[i];
        const double sum = std::isfinite(best) ? sum_of_row(row, floor[i], best) : 1.0;
        out[i] = static_cast<float>(best + std::log(sum));
    });
}

EXPORT void shoal_count_above(const float* logits, int64_t stride, int64_t num_rows, int64_t columns,
                              const float* values, int64_t* out, int64_t threads) {
    in_parallel(num_rows, threads, [&](int64_t i, int64_t) {
        out[i] = above_in_row(logits + i * stride, columns, values[i]);
    });
}

// columns_out: [num_rows, capacity], the first counts[i] of row i are filled. counts[i] is -1 if the row is undecided.
EXPORT void shoal_draw(const float* logits, int64_t stride, const int64_t* rows, int64_t num_rows, int64_t columns,
                       int64_t start, const float* temperature, const int32_t* keys, const int64_t* limits,
                       int64_t capacity, int64_t* columns_out, int64_t* counts, int64_t threads) {
    in_parallel(num_rows, threads, [&](int64_t i, int64_t) {
        const Row row{logits + rows[i] * stride, columns, start, temperature[i], unpack_token(limits[i])};
        const Key key{static_cast<uint32_t>(keys[2 * i]), static_cast<uint32_t>(keys[2 * i + 1])};
        counts[i] = candidates_of_row(row, key, capacity, columns_out + i * capacity);
    });
}

EXPORT void shoal_apply_masks(float* logits, int64_t stride, const int64_t* rows, int64_t num_rows, int64_t columns,
                              int64_t start, const int32_t* bits, int64_t words, int64_t threads) {
    in_parallel(num_rows, threads, [&](int64_t i, int64_t) {
        mask_row(logits + rows[i] * stride, columns, start, bits + i * words, words);
    });
}
