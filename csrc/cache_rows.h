// Rows of the KV cache in another type than the activations: what rows.cpp calls.

#pragma once

#include "cache_types.h"

// Writes `heads` rows of head_dim numbers each to a slot of the cache, with their scales if its type has some.
typedef void (*StoreHeads)(const void* rows, int64_t heads, int64_t head_dim, void* slot, uint16_t* scales);

// The function for activations of this DataType and a cache of this CacheType; null if both are the same.
StoreHeads store_heads(int32_t type, int32_t cache_type);

int64_t cache_item_bytes(int32_t cache_type);
