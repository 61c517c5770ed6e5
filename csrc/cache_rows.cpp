// Writing rows of the KV cache in another type than the activations, for rows.cpp.

#include "cache_rows.h"

namespace {

// CLONED functions that call the loops of cache_types.h: one plain function for each pair of types, since a template
// cannot be cloned.
#define DEFINE_STORE(T, C)                                                                                            \
    CLONED void store_##T##_as_##C(const void* rows, int64_t heads, int64_t head_dim, void* slot, uint16_t* scales) { \
        for (int64_t head = 0; head < heads; ++head) {                                                                \
            BFloat16* scale = scales ? reinterpret_cast<BFloat16*>(scales) + head : nullptr;                          \
            const int64_t first = head * head_dim;                                                                    \
            store_row(static_cast<const T*>(rows) + first, head_dim, static_cast<C*>(slot) + first, scale);           \
        }                                                                                                             \
    }

DEFINE_STORE(float, BFloat16)
DEFINE_STORE(float, Float16)
DEFINE_STORE(float, Int8)
DEFINE_STORE(float, Float8E4M3)
DEFINE_STORE(float, Float8E5M2)
DEFINE_STORE(BFloat16, float)
DEFINE_STORE(BFloat16, Float16)
DEFINE_STORE(BFloat16, Int8)
DEFINE_STORE(BFloat16, Float8E4M3)
DEFINE_STORE(BFloat16, Float8E5M2)

}  // namespace

StoreHeads store_heads(int32_t type, int32_t cache_type) {
    static constexpr StoreHeads kFromFloat[] = {nullptr,
                                                store_float_as_BFloat16,
                                                store_float_as_Float16,
                                                store_float_as_Int8,
                                                store_float_as_Float8E4M3,
                                                store_float_as_Float8E5M2};
    static constexpr StoreHeads kFromBFloat16[] = {store_BFloat16_as_float,
                                                   nullptr,
                                                   store_BFloat16_as_Float16,
                                                   store_BFloat16_as_Int8,
                                                   store_BFloat16_as_Float8E4M3,
                                                   store_BFloat16_as_Float8E5M2};
    return (type == kFloat32 ? kFromFloat : kFromBFloat16)[cache_type];
}

int64_t cache_item_bytes(int32_t cache_type) {
    static constexpr int64_t kBytes[] = {4, 2, 2, 1, 1, 1};
    return kBytes[cache_type];
}
