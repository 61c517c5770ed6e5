// The replay of a recorded step: see shoal.kernels.recording.

#include "common.h"

struct RecordedCall {
    int32_t (*function)(const int64_t* words);
    const int64_t* words;
};

// Calls one function after the other. Returns -1, or the number of the first call whose status was not 0.
EXPORT int64_t shoal_replay(const RecordedCall* calls, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        if (calls[i].function(calls[i].words) != 0) return i;
    }
    return -1;
}
