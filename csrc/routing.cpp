// The choice of experts, in the library _native: see `Kernels.route` and `Kernels.group_pairs` in shoal.kernels.base.

#include "cache_types.h"

#include <cmath>

namespace {

constexpr int32_t kMaxExperts = 1024;
constexpr int64_t kExpertsPerThread = 1 << 12;  // less takes longer to hand to a thread than to compute

// A rule as Python describes it (shoal.kernels.native).
struct Routing {
    int64_t experts, top_k, groups, top_groups;
    int32_t sigmoid, best_two, normalize;
    float scale;
};

// Scores of at most kMaxExperts experts, with room for whole vectors.
typedef float Scores[kMaxExperts + kChunk];

// scores = softmax(logits).
CLONED void softmax(const float* logits, int64_t size, float* scores) {
    Floats largest = splat(-std::numeric_limits<float>::infinity()), total = {};
    alignas(64) float last[kLanes];
    const auto load_logits = [&](int64_t i) __attribute__((always_inline)) {
        if (size - i >= kLanes) return load_floats(logits + i);
        std::fill_n(last, kLanes, -std::numeric_limits<float>::infinity());
        std::copy(logits + i, logits + size, last);
        return load_floats(last);
    };
    for (int64_t i = 0; i < size; i += kLanes) largest = larger(load_logits(i), largest);
    float maximum = largest[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) maximum = std::max(largest[lane], maximum);
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats e = exp_of(load_logits(i) - maximum);
        store_floats(scores + i, e);
        total += e;
    }
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += total[lane];
    for (int64_t i = 0; i < size; i += kLanes) store_floats(scores + i, load_floats(scores + i) / sum);
}

// The place of the largest number among those that are not taken, the first of equal ones. A NaN is only found if it
// comes first.
int64_t best_of(const float* numbers, const bool* taken, int64_t size) {
    int64_t best = -1;
    for (int64_t i = 0; i < size; ++i)
        if (!taken[i] && (best < 0 || numbers[i] > numbers[best])) best = i;
    return best;
}

// Takes all experts that are not in one of the best groups.
void keep_best_groups(const Routing& rule, const float* ranked, bool* taken) {
    const int64_t size = rule.experts / rule.groups;
    Scores of_groups;
    bool chosen[kMaxExperts] = {};
    for (int64_t group = 0; group < rule.groups; ++group) {
        float first = -std::numeric_limits<float>::infinity(), second = first;
        for (int64_t i = group * size; i < (group + 1) * size; ++i) {
            if (ranked[i] > first)
                second = first, first = ranked[i];
            else if (ranked[i] > second)
                second = ranked[i];
        }
        of_groups[group] = rule.best_two ? first + second : first;
    }
    for (int64_t i = 0; i < rule.top_groups; ++i) chosen[best_of(of_groups, chosen, rule.groups)] = true;
    for (int64_t i = 0; i < rule.experts; ++i) taken[i] = !chosen[i / size];
}

void route_row(const Routing& rule, const float* logits, const float* bias, int64_t* experts, float* weights) {
    alignas(64) Scores scores, biased;
    if (rule.sigmoid)
        for (int64_t i = 0; i < rule.experts; ++i)
            scores[i] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(logits[i]))));
    else
        softmax(logits, rule.experts, scores);
    if (bias)
        for (int64_t i = 0; i < rule.experts; ++i) biased[i] = scores[i] + bias[i];
    const float* ranked = bias ? biased : scores;
    bool taken[kMaxExperts] = {};
    if (rule.top_groups < rule.groups) keep_best_groups(rule, ranked, taken);
    float total = 0.0f;
    for (int64_t j = 0; j < rule.top_k; ++j) {
        experts[j] = best_of(ranked, taken, rule.experts);
        taken[experts[j]] = true;
        weights[j] = scores[experts[j]];
        total += weights[j];
    }
    constexpr float kTiny = 1e-20f;  // avoids a division by 0 if all chosen scores are 0
    for (int64_t j = 0; j < rule.top_k; ++j) {
        if (rule.normalize) weights[j] /= total + kTiny;
        weights[j] *= rule.scale;
    }
}

}  // namespace

EXPORT int32_t shoal_most_routed_experts() { return kMaxExperts; }

// logits: [rows, experts], float32 or bfloat16 (DataType). bias: [experts], or null. experts, weights: [rows, top_k]. The
// best `top_groups` groups have at least `top_k` experts.
EXPORT void shoal_route(int32_t type, const Routing* rule, const void* logits, const float* bias, int64_t rows,
                        int64_t* experts, float* weights, int64_t threads) {
    threads = std::min(threads, rows * rule->experts / kExpertsPerThread);
    const int64_t pieces = std::max<int64_t>(1, threads);
    in_parallel(pieces, threads, [&](int64_t piece, int64_t) {
        Scores widened;
        for (int64_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row) {
            const float* own = static_cast<const float*>(logits) + row * rule->experts;
            if (type == kBFloat16) {
                const BFloat16* narrow = static_cast<const BFloat16*>(logits) + row * rule->experts;
                for (int64_t i = 0; i < rule->experts; ++i) widened[i] = to_float(narrow[i]);
                own = widened;
            }
            route_row(*rule, own, bias, experts + row * rule->top_k, weights + row * rule->top_k);
        }
    });
}

// Sorts pairs of a row and an expert by experts. experts: [pairs], `each` for a row, from 0 to count - 1, or negative for
// none. counts: [count], how many pairs each expert has. rows: [pairs], the rows of the sorted pairs. places: [pairs],
// where each pair is among them, -1 without an expert. Returns how many pairs have an expert.
EXPORT int64_t shoal_group_pairs(const int64_t* experts, int64_t pairs, int64_t each, int64_t count, int64_t* counts,
                                 int64_t* rows, int64_t* places) {
    std::fill_n(counts, count, int64_t{0});
    for (int64_t i = 0; i < pairs; ++i)
        if (experts[i] >= 0) ++counts[experts[i]];
    int64_t sorted = 0;
    for (int64_t expert = 0; expert < count; ++expert) {  // for a while, counts are where the next pair of each expert goes
        const int64_t own = counts[expert];
        counts[expert] = sorted;
        sorted += own;
    }
    for (int64_t i = 0; i < pairs; ++i) {
        places[i] = experts[i] < 0 ? -1 : counts[experts[i]]++;
        if (places[i] >= 0) rows[places[i]] = i / each;
    }
    for (int64_t expert = count - 1; expert > 0; --expert) counts[expert] -= counts[expert - 1];
    return sorted;
}
