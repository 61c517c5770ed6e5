// Packing of a KV cache with elements of one byte for products of bfloat16: what attention_avx512.cpp calls.

#pragma once

#include "avx512.h"

struct BytePacking {
    void (*pack_query)(const void* query, int64_t head_dim, uint32_t* words);
    void (*pack_keys)(const Tile& tile, int64_t vectors, uint32_t* panel);
    void (*pack_values)(const Tile& tile, int64_t first, int64_t end, uint32_t* panels);
    int64_t most_few_rows;
    void (*multiply_few_keys)(const FewRows& few, const Tile& tile, int64_t vectors);
    void (*add_few_values)(const FewRows& few, const Tile& tile, int64_t first, int64_t end);
};

// Finds the functions for a CacheType. False: its elements are longer, or this machine has no AVX512-VBMI.
bool byte_packing(int32_t cache_type, BytePacking* packing);
