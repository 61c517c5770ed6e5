// The replay of a recorded step: see shoal.kernels.recording.

#include "common.h"

struct RecordedCall {
    int32_t (*function)(const int64_t* words);
    const int64_t* words;
};

// Calls one function after the other, up to the first whose status is not 0. Returns that status, or 0. `done`: how many
// have returned 0.
EXPORT int32_t shoal_replay(const RecordedCall* calls, int64_t count, int64_t* done) {
    for (*done = 0; *done < count; ++*done) {
        const RecordedCall& call = calls[*done];
        if (const int32_t status = call.function(call.words)) return status;
    }
    return 0;
}
