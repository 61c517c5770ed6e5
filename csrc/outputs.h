// What linear layers do with their outputs: they write all, or keep the top one of each row, as an output head does whose
// tokens are greedy.
//
// Both classes have these functions:
//
//  * of(row, first, worker): where a worker writes outputs from `first` on, of rows from `row` on;
//  * take(row, count, first, end, worker): it has written the outputs from `first` to `end` of `count` rows there.

#pragma once

#include <vector>

#include "top_tokens.h"

namespace {

// Rows of results: outputs from `begin` on, the rows `distance` numbers apart.
template <class T>
struct Output {
    T* first;
    int64_t begin, distance;
    bool streamed;  // past the caches: what they do not hold would be read from memory before it is written

    T* of(int64_t row, int64_t output) const { return first + row * distance + output - begin; }
};

// Results that are written: [rows, outputs].
template <class T>
struct AllOutputs {
    T* out;
    int64_t outputs;
    bool streamed;

    Output<T> of(int64_t row, int64_t first, int64_t) const {
        return {out + row * outputs + first, first, outputs, streamed};
    }
    void take(int64_t, int64_t, int64_t, int64_t, int64_t) const {}
};

// The largest output of each row, while the others are forgotten.
template <class T>
class TopOutputs {
  public:
    // start: the id of the first output. A worker writes at most `most_rows` rows of `width` outputs at a time.
    TopOutputs(int64_t rows, int64_t start, int64_t workers, int64_t most_rows, int64_t width)
        : rows_(rows), start_(start), width_(width), room_(std::min(rows, most_rows) * width),
          buffers_(workers * room_), best_(workers * rows, std::numeric_limits<int64_t>::min()) {}

    Output<T> of(int64_t, int64_t first, int64_t worker) {
        return {buffers_.data() + worker * room_, first, width_, false};
    }
    void take(int64_t row, int64_t count, int64_t first, int64_t end, int64_t worker) {
        const T* outputs = buffers_.data() + worker * room_;
        int64_t* best = best_.data() + worker * rows_ + row;
        for (int64_t i = 0; i < count; ++i, outputs += width_)
            best[i] = std::max(best[i], top_token(outputs, 0, end - first, start_ + first));
    }
    // Writes the top output of each row, and its id: [rows].
    void finish(float* values, int64_t* ids) const {
        for (int64_t row = 0; row < rows_; ++row) {
            int64_t best = best_[row];
            for (size_t i = row + rows_; i < best_.size(); i += rows_) best = std::max(best, best_[i]);
            const Token token = unpack_token(best);
            values[row] = token.logit;
            ids[row] = token.id;
        }
    }

  private:
    const int64_t rows_, start_, width_, room_;
    std::vector<T> buffers_;     // [workers, room]
    std::vector<int64_t> best_;  // [workers, rows], as packed tokens
};

}  // namespace
