// Products of bfloat16 numbers, a few rows times the outputs of a panel at a time: what classes of tiles have in common.
//
// There is one for AVX2 (bf16_avx2.h), and one each for AVX-512 BF16 and AMX (bf16_avx512.h). It has
//
//  * kRows, the most rows that `add` takes;
//  * Scratch, what a worker keeps for its next panels; `reserve` allocates for the largest chunk, and may throw;
//  * a constructor for a chunk of rows; reused: the worker will take more panels with the same rows;
//  * first_row(turn, turns, rows): how rows are divided into turns; most_rows(inputs): of a chunk;
//  * add, which multiplies the rows from `row` on, at most kRows, by the weights of some steps, and adds the products to
//    sums, [rows of the chunk][kPanel] in float32, which begin at 0 in the first step. While it does so it prefetches
//    the weights that will be multiplied later: they come from memory, and neither the processor's own prefetching nor
//    its execution out of order looks far enough ahead to use its bandwidth;
//  * finish, from sums to outputs, with one rounding.

#pragma once

#include <memory>
#include <new>

#include "outputs.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && (defined(__clang__) || __GNUC__ >= 11)
#define HAS_BF16 1
#include <immintrin.h>
#else
#define HAS_BF16 0
#endif

namespace {

constexpr int64_t kBlock = kLanes;                 // outputs
constexpr int64_t kPanelBlocks = 2;                // blocks
constexpr int64_t kPanel = kPanelBlocks * kBlock;  // outputs
constexpr int64_t kPairs = 16;                     // of a step
constexpr int64_t kStep = 2 * kPairs;              // inputs
constexpr int64_t kBlockStep = kBlock * kStep;     // numbers that a block has for a step
constexpr int64_t kMaxRows = 256;                  // of a chunk
constexpr int64_t kPanelsAtATime = 4;              // whose outputs are written together

// Some steps of a panel.
struct Weights {
    const uint16_t* numbers;
    int64_t blocks, first_step, steps;
    const char* ahead;    // what to prefetch in the first step
    int64_t ahead_bytes;  // how much to prefetch in each step
    bool once;            // no other rows of the chunk are multiplied by them
};

// Of some panels: for each the sums of its rows.
typedef float Sums[kPanelsAtATime][kMaxRows * kPanel];

}  // namespace
