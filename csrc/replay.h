// Calls of exported functions whose arguments are words of 64 bits, so that a list of calls can be replayed by one call
// (shoal_replay in replay.cpp).

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

// An argument of a recorded call: its bytes are the first ones of the word.
template <class T>
T from_word(int64_t word) {
    static_assert(sizeof(T) <= sizeof word, "an argument is a number or a pointer");
    T value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

template <class... Arguments, size_t... places>
int32_t call_with_words(void (*function)(Arguments...), const int64_t* words, std::index_sequence<places...>) {
    function(from_word<Arguments>(words[places])...);
    return 0;
}

template <class... Arguments, size_t... places>
int32_t call_with_words(int32_t (*function)(Arguments...), const int64_t* words, std::index_sequence<places...>) {
    return function(from_word<Arguments>(words[places])...);
}

template <class Result, class... Arguments>
int32_t call_with_words(Result (*function)(Arguments...), const int64_t* words) {
    return call_with_words(function, words, std::index_sequence_for<Arguments...>{});
}

}  // namespace

// Exports `function` a second time, as `function`_words, which takes words and returns a status; 0 if it returns nothing.
#define REPLAYABLE(function) \
    EXPORT int32_t function##_words(const int64_t* words) { return call_with_words(function, words); }
