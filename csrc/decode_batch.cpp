// The tensors of a step in which every sequence computes one token: see shoal.worker.decode_batch.

#include "common.h"

namespace {

// The columns of the table of sequences that are read, and the tensors that are written: as `_Table` in Python.
struct DecodeTable {
    const int32_t* blocks;       // [rows, max_blocks]
    const int64_t* written;      // [rows]: positions before this are in shared blocks
    const int64_t* last_token;   // [rows]
    const int64_t* num_given;    // [rows]: later tokens were drawn
    const uint8_t* plain;        // [rows]
    const float* temperature;    // [rows]
    int64_t max_blocks, block_size, scratch_slot;
    int64_t *tokens, *positions, *slots;  // [n]
    int32_t* context_lens;                // [n]
    int32_t* block_tables;                // [n, max_blocks]
};

enum Kind : int32_t { kOther = 0, kGreedy = 1, kDrawn = 2 };

}  // namespace

// Writes the tensors of `count` sequences, whose rows in the table and positions are given, unless some of them compute
// a given token, or are not plain. Entries of block_tables that no token needs stay as they are. Returns the Kind.
EXPORT int32_t shoal_decode_batch(const DecodeTable* table, const int64_t* rows, const int64_t* positions,
                                  int64_t count) {
    const DecodeTable& t = *table;
    bool greedy = true;
    for (int64_t i = 0; i < count; ++i) {
        if (!t.plain[rows[i]] || positions[i] < t.num_given[rows[i]]) return kOther;
        greedy &= t.temperature[rows[i]] == 0.0f;
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows[i], position = positions[i], block = position / t.block_size;
        const int32_t* blocks = t.blocks + row * t.max_blocks;
        t.tokens[i] = t.last_token[row];
        t.positions[i] = position;
        t.slots[i] = position < t.written[row] ? t.scratch_slot : blocks[block] * t.block_size + position % t.block_size;
        t.context_lens[i] = static_cast<int32_t>(position + 1);
        std::copy(blocks, blocks + block + 1, t.block_tables + i * t.max_blocks);
    }
    return greedy ? kGreedy : kDrawn;
}
