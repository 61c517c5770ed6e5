// The division of rows among threads.

#pragma once

#include "common.h"

namespace {

// Element-wise work with fewer elements per thread than this takes longer to hand to a thread than to compute.
constexpr int64_t kElementsPerThread = 32768;

template <class Work>
void over_rows(int64_t rows, int64_t row_elements, int64_t threads, const Work& work) {
    const int64_t worthwhile = rows * row_elements / kElementsPerThread;
    threads = std::max<int64_t>(1, std::min(threads, worthwhile));
    in_parallel(threads, threads, [&](int64_t piece, int64_t) {
        work(rows * piece / threads, rows * (piece + 1) / threads);
    });
}

}  // namespace
