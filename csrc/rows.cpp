// The row operations of shoal.kernels.native, in the library _native: norms, activations, and rotation of queries and
// keys with the writes to the KV cache.

#include "cache_rows.h"
#include "over_rows.h"
#include "replay.h"

#include <cmath>
#include <type_traits>

namespace {

constexpr int32_t kAbiVersion = 10;  // of the whole library, including attention.cpp

enum NormKind : int32_t { kNoNorm = -1, kRms = 0, kRmsWide = 1, kLayer = 2 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// ---------------------------------------------------------------------------------------------------------------------
// Norms.

struct NormArgs {
    const void* weight;  // [size], float for kRmsWide and T for the others; null: ones
    const void* bias;    // [size] of T, for kLayer; null: zeros
    float eps;
};

template <NormKind kind>
using Kind = std::integral_constant<NormKind, kind>;

// Calls visit(Kind<kind>()), so that the loops inside are compiled for each kind.
template <class Visit>
ALWAYS_INLINE void with_kind(NormKind kind, const Visit& visit) {
    if (kind == kRms)
        visit(Kind<kRms>());
    else if (kind == kRmsWide)
        visit(Kind<kRmsWide>());
    else
        visit(Kind<kLayer>());
}

// A chunk with 1 for its first `left` elements and 0 for the others, in the lane order of T.
ALWAYS_INLINE Chunk present(const float*, int64_t left) {
    float ones[kChunk];
    std::fill_n(ones, kChunk, 1.0f);
    return load(ones, left);
}
ALWAYS_INLINE Chunk present(const BFloat16*, int64_t left) {
    BFloat16 ones[kChunk];
    std::fill_n(ones, kChunk, BFloat16{0x3f80});
    return load(ones, left);
}

// The first pass over a row: it sums squares, or for a LayerNorm the values.
template <NormKind kind>
ALWAYS_INLINE void accumulate(Chunk& total, Chunk value) {
    total.first += kind == kLayer ? value.first : value.first * value.first;
    total.second += kind == kLayer ? value.second : value.second * value.second;
}

// The variance, in a pass of its own: the difference of two large sums would lose its digits.
template <class T>
ALWAYS_INLINE float variance_of(const T* x, int64_t size, float mean) {
    Chunk squares = {};
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk value = load(x + i, size - i);
        Chunk off = {value.first - mean, value.second - mean};
        if (size - i < kChunk) {
            const Chunk mask = present(x, size - i);
            off = {off.first * mask.first, off.second * mask.second};
        }
        squares.first += off.first * off.first;
        squares.second += off.second * off.second;
    }
    return sum_of(squares.first + squares.second) / static_cast<float>(size);
}

// The second pass: writes the norm of x to `out`, which may be `x`. `total` is the result of the first pass.
template <NormKind kind, class T>
ALWAYS_INLINE void finish_norm(const T* x, const NormArgs& norm, T* out, int64_t size, Chunk total) {
    const float average = sum_of(total.first + total.second) / static_cast<float>(size);
    const float second_moment = kind == kLayer ? variance_of(x, size, average) : average;
    const float scale = 1.0f / std::sqrt(second_moment + norm.eps);
    using Weight = std::conditional_t<kind == kRmsWide, float, T>;
    const auto* weight = static_cast<const Weight*>(norm.weight);
    const T* bias = static_cast<const T*>(norm.bias);
    const auto write = [&](auto weighted, auto biased) __attribute__((always_inline)) {
        for (int64_t i = 0; i < size; i += kChunk) {
            const int64_t left = size - i;
            Chunk value = load(x + i, left);
            if constexpr (kind == kLayer) value = {value.first - average, value.second - average};
            value = {value.first * scale, value.second * scale};
            if constexpr (kind == kRms) value = rounded(value, x);
            if constexpr (weighted) {
                Chunk w = load(weight + i, left);
                if constexpr (kind == kRmsWide) w = in_order_of(w, x);
                value = {value.first * w.first, value.second * w.second};
            }
            if constexpr (biased) {
                const Chunk b = load(bias + i, left);
                value = {value.first + b.first, value.second + b.second};
            }
            store(out + i, value, left);
        }
    };
    const std::true_type yes;
    const std::false_type no;
    if (kind == kLayer && bias)
        weight ? write(yes, yes) : write(no, yes);
    else
        weight ? write(yes, no) : write(no, no);
}

template <NormKind kind, class T>
ALWAYS_INLINE void norm_row(const T* x, const NormArgs& norm, T* out, int64_t size) {
    Chunk total = {};
    for (int64_t i = 0; i < size; i += kChunk) accumulate<kind>(total, load(x + i, size - i));
    finish_norm<kind>(x, norm, out, size, total);
}

// Computes residual += x, then x = norm(residual).
template <NormKind kind, class T>
ALWAYS_INLINE void add_norm_row(T* x, T* residual, const NormArgs& norm, int64_t size) {
    Chunk total = {};
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk a = load(x + i, size - i), b = load(residual + i, size - i);
        const Chunk sum = rounded({a.first + b.first, a.second + b.second}, x);
        store(residual + i, sum, size - i);
        accumulate<kind>(total, sum);
    }
    finish_norm<kind>(residual, norm, x, size, total);
}

// ---------------------------------------------------------------------------------------------------------------------
// Activations.

template <Activation activation>
ALWAYS_INLINE Floats activated(Floats x) {
    if constexpr (activation == kSilu) return x / (1.0f + exp_of(-x));
    if constexpr (activation == kRelu) return (x < 0.0f) ? Floats{} : x;
    if constexpr (activation == kGeluTanh) {
        // (1 + tanh u) / 2 = 1 / (1 + e^-2u), which loses no digits if tanh u is near -1.
        constexpr float kTwoRootTwoOverPi = 1.59576912f, kCubic = 0.044715f;
        return x / (1.0f + exp_of(x * (-kTwoRootTwoOverPi) * (1.0f + kCubic * (x * x))));
    }
    if constexpr (activation == kGelu) {
        // The tail of the normal distribution beyond |x| is e^(-x^2 / 2) times a function of t = 1 / (1 + 0.35 |x|).
        // The polynomial approximates that function with a relative error of 3.2e-8 for |x| <= 14; beyond, the tail is
        // 0.
        const Floats size = (x < 0.0f) ? -x : x;
        const Floats t = 1.0f / (1.0f + 0.35f * size);
        Floats p = splat(-0.0291458949f);
        p = p * t + 0.143971539f;
        p = p * t - 0.255713955f;
        p = p * t + 0.15917385f;
        p = p * t - 0.0231096435f;
        p = p * t + 0.105507932f;
        p = p * t + 0.119832884f;
        p = p * t + 0.139861868f;
        p = p * t + 0.139621404f;
        const Floats tail = p * t * exp_of(x * x * -0.5f);
        return x * ((x < 0.0f) ? tail : 1.0f - tail);
    }
}

// Calls visit with the activation as an integral constant, so that the loops inside are compiled for each activation.
template <class Visit>
ALWAYS_INLINE void with_activation(Activation activation, const Visit& visit) {
    if (activation == kSilu)
        visit(std::integral_constant<Activation, kSilu>());
    else if (activation == kGelu)
        visit(std::integral_constant<Activation, kGelu>());
    else if (activation == kGeluTanh)
        visit(std::integral_constant<Activation, kGeluTanh>());
    else
        visit(std::integral_constant<Activation, kRelu>());
}

// `out` may be `x`.
template <Activation activation, class T>
ALWAYS_INLINE void activate_row(const T* x, T* out, int64_t size) {
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk value = load(x + i, size - i);
        store(out + i, {activated<activation>(value.first), activated<activation>(value.second)}, size - i);
    }
}

template <Activation activation, class T>
ALWAYS_INLINE void activate_gated_row(const T* gate, T* out, int64_t size) {
    const T* up = gate + size;
    for (int64_t i = 0; i < size; i += kChunk) {
        const Chunk g = load(gate + i, size - i), u = load(up + i, size - i);
        const Chunk bent = rounded({activated<activation>(g.first), activated<activation>(g.second)}, gate);
        store(out + i, {bent.first * u.first, bent.second * u.second}, size - i);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Rotation.

// Rotates element i with element half + i, for i < half; elements from 2 * half on do not change. `out` may be `x`.
template <class T>
ALWAYS_INLINE void rotate(const T* x, const float* cos, const float* sin, T* out, int64_t half, int64_t size) {
    for (int64_t i = 0; i < half; i += kChunk) {
        const Chunk low = load(x + i, half - i), high = load(x + half + i, half - i);
        const Chunk c = in_order_of(load(cos + i, half - i), x), s = in_order_of(load(sin + i, half - i), x);
        store(out + i, {low.first * c.first - high.first * s.first, low.second * c.second - high.second * s.second},
              half - i);
        store(out + half + i,
              {high.first * c.first + low.first * s.first, high.second * c.second + low.second * s.second}, half - i);
    }
    if (out != x) std::memcpy(out + 2 * half, x + 2 * half, (size - 2 * half) * sizeof(T));
}

// The keys or values of the cache: [num_slots, kv_heads, head_dim], and scales [num_slots, kv_heads] or null.
struct CacheSlots {
    char* rows;
    uint16_t* scales;
    int64_t item;  // bytes of an element

    char* row(int64_t slot, int64_t heads, int64_t head_dim) const { return rows + slot * heads * head_dim * item; }
    uint16_t* scale(int64_t slot, int64_t heads) const { return scales ? scales + slot * heads : nullptr; }
};

template <class T>
struct RotateArgs {
    const T* qkv;      // [n, q_heads + 2 * kv_heads, head_dim]
    NormKind kind;     // of both norms, kNoNorm for none
    NormArgs q_norm;   // of each query head
    NormArgs k_norm;   // of each key head
    const float* cos;  // [max_positions, half], null where half is 0
    const float* sin;  // the same
    const int64_t* positions;
    const int64_t* slots;
    T* q_out;  // [n, q_heads, head_dim]
    CacheSlots keys, values;
    StoreHeads store;  // null if the cache has elements of T
    int64_t q_heads, kv_heads, head_dim;
    int64_t half;  // half the number of rotated elements of a head, 0 for no rotation
};

// Computes the query or key x of a head, with or without a norm.
template <NormKind kind, class T>
ALWAYS_INLINE void rotate_head(const RotateArgs<T>& a, int64_t row, const T* x, const NormArgs& norm, T* out) {
    if constexpr (kind != kNoNorm) {
        norm_row<kind>(x, norm, out, a.head_dim);
        x = out;
    }
    const int64_t angles = a.positions[row] * a.half;
    rotate(x, a.cos + angles, a.sin + angles, out, a.half, a.head_dim);
}

template <NormKind kind, class T>
ALWAYS_INLINE void rotate_and_store_rows(const RotateArgs<T>& a, int64_t first, int64_t end) {
    const int64_t q_size = a.q_heads * a.head_dim, kv_size = a.kv_heads * a.head_dim;
    T rotated[kMaxHeadDim];  // a key before it is stored in another type
    for (int64_t row = first; row < end; ++row) {
        const int64_t slot = a.slots[row];
        const T* queries = a.qkv + row * (q_size + 2 * kv_size);
        const T *keys = queries + q_size, *values = keys + kv_size;
        for (int64_t i = 0; i < q_size; i += a.head_dim)
            rotate_head<kind>(a, row, queries + i, a.q_norm, a.q_out + row * q_size + i);
        char* k_out = a.keys.row(slot, a.kv_heads, a.head_dim);
        uint16_t* scales = a.keys.scale(slot, a.kv_heads);
        for (int64_t head = 0; head < a.kv_heads; ++head) {
            char* out = k_out + head * a.head_dim * a.keys.item;
            rotate_head<kind>(a, row, keys + head * a.head_dim, a.k_norm,
                              a.store ? rotated : reinterpret_cast<T*>(out));
            if (a.store) a.store(rotated, 1, a.head_dim, out, scales + (scales ? head : 0));
        }
        char* v_out = a.values.row(slot, a.kv_heads, a.head_dim);
        if (a.store)
            a.store(values, a.kv_heads, a.head_dim, v_out, a.values.scale(slot, a.kv_heads));
        else
            std::memcpy(v_out, values, kv_size * sizeof(T));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// CLONED functions that call the loops above: one plain function for each type, since a template cannot be cloned.

#define DEFINE_LOOPS(T)                                                                                               \
    CLONED void norm_rows(NormKind kind, const T* x, const NormArgs& norm, T* out, int64_t size, int64_t first,       \
                          int64_t end) {                                                                              \
        with_kind(kind, [&](auto k) __attribute__((always_inline)) {                                                  \
            for (int64_t row = first; row < end; ++row) norm_row<k>(x + row * size, norm, out + row * size, size);    \
        });                                                                                                           \
    }                                                                                                                 \
    CLONED void add_norm_rows(NormKind kind, T* x, T* residual, const NormArgs& norm, int64_t size, int64_t first,    \
                              int64_t end) {                                                                          \
        with_kind(kind, [&](auto k) __attribute__((always_inline)) {                                                  \
            for (int64_t row = first; row < end; ++row)                                                               \
                add_norm_row<k>(x + row * size, residual + row * size, norm, size);                                   \
        });                                                                                                           \
    }                                                                                                                 \
    CLONED void activate_rows(Activation activation, const T* x, T* out, int64_t size, int64_t first, int64_t end) {  \
        with_activation(activation, [&](auto a) __attribute__((always_inline)) {                                      \
            for (int64_t row = first; row < end; ++row) activate_row<a>(x + row * size, out + row * size, size);      \
        });                                                                                                           \
    }                                                                                                                 \
    CLONED void activate_gated_rows(Activation activation, const T* gate_up, T* out, int64_t size, int64_t first,     \
                                    int64_t end) {                                                                    \
        with_activation(activation, [&](auto a) __attribute__((always_inline)) {                                      \
            for (int64_t row = first; row < end; ++row)                                                               \
                activate_gated_row<a>(gate_up + row * 2 * size, out + row * size, size);                              \
        });                                                                                                           \
    }                                                                                                                 \
    CLONED void rotate_rows(const RotateArgs<T>& a, int64_t first, int64_t end) {                                     \
        if (a.kind == kNoNorm)                                                                                        \
            rotate_and_store_rows<kNoNorm>(a, first, end);                                                            \
        else                                                                                                          \
            with_kind(a.kind, [&](auto k) __attribute__((always_inline)) { rotate_and_store_rows<k>(a, first, end); });\
    }

DEFINE_LOOPS(float)
DEFINE_LOOPS(BFloat16)

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

template <class T>
void norm(NormKind kind, const void* x, const NormArgs& args, void* out, int64_t rows, int64_t size, int64_t threads) {
    over_rows(rows, size, threads, [=](int64_t first, int64_t end) {
        norm_rows(kind, static_cast<const T*>(x), args, static_cast<T*>(out), size, first, end);
    });
}

template <class T>
void add_norm(NormKind kind, void* x, void* residual, const NormArgs& args, int64_t rows, int64_t size,
              int64_t threads) {
    over_rows(rows, size, threads, [=](int64_t first, int64_t end) {
        add_norm_rows(kind, static_cast<T*>(x), static_cast<T*>(residual), args, size, first, end);
    });
}

template <class T>
void activate(Activation activation, const void* x, void* out, int64_t rows, int64_t size, int64_t threads) {
    over_rows(rows, 2 * size, threads, [=](int64_t first, int64_t end) {
        activate_rows(activation, static_cast<const T*>(x), static_cast<T*>(out), size, first, end);
    });
}

template <class T>
void activate_gated(Activation activation, const void* gate_up, void* out, int64_t rows, int64_t size,
                    int64_t threads) {
    over_rows(rows, 4 * size, threads, [=](int64_t first, int64_t end) {
        activate_gated_rows(activation, static_cast<const T*>(gate_up), static_cast<T*>(out), size, first, end);
    });
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C interface. All tensors are contiguous; `threads` is an upper bound.

EXPORT int32_t shoal_abi_version() { return kAbiVersion; }

EXPORT void shoal_norm(int32_t type, int32_t kind, const void* x, const void* weight, const void* bias, void* out,
                       int64_t rows, int64_t size, float eps, int64_t threads) {
    (type == kFloat32 ? norm<float> : norm<BFloat16>)(NormKind(kind), x, {weight, bias, eps}, out, rows, size,
                                                      threads);
}

// Computes residual += x, then x = norm(residual) for every row.
EXPORT void shoal_add_norm(int32_t type, int32_t kind, void* x, void* residual, const void* weight, const void* bias,
                           int64_t rows, int64_t size, float eps, int64_t threads) {
    (type == kFloat32 ? add_norm<float> : add_norm<BFloat16>)(NormKind(kind), x, residual, {weight, bias, eps}, rows,
                                                              size, threads);
}

// `out` may be `x`.
EXPORT void shoal_activate(int32_t type, int32_t activation, const void* x, void* out, int64_t rows, int64_t size,
                           int64_t threads) {
    (type == kFloat32 ? activate<float> : activate<BFloat16>)(Activation(activation), x, out, rows, size, threads);
}

EXPORT void shoal_activate_gated(int32_t type, int32_t activation, const void* gate_up, void* out, int64_t rows,
                                 int64_t size, int64_t threads) {
    (type == kFloat32 ? activate_gated<float> : activate_gated<BFloat16>)(Activation(activation), gate_up, out, rows,
                                                                          size, threads);
}

// cache_type: of keys and values; scales: null unless that type has some. kind: of the norms of queries and keys,
// kNoNorm for none. half: 0 for no rotation.
EXPORT void shoal_rotate_and_store(int32_t type, int32_t cache_type, int32_t kind, const void* qkv,
                                   const void* q_weight, const void* q_bias, float q_eps, const void* k_weight,
                                   const void* k_bias, float k_eps, const float* cos, const float* sin,
                                   const int64_t* positions, const int64_t* slots, void* q_out, void* keys,
                                   void* values, void* key_scales, void* value_scales, int64_t rows, int64_t q_heads,
                                   int64_t kv_heads, int64_t head_dim, int64_t half, int64_t threads) {
    const int64_t item = cache_item_bytes(cache_type);
    const auto call = [&](auto* element) {
        using T = std::remove_pointer_t<decltype(element)>;
        const RotateArgs<T> args = {
            static_cast<const T*>(qkv), NormKind(kind), {q_weight, q_bias, q_eps}, {k_weight, k_bias, k_eps},
            cos, sin, positions, slots, static_cast<T*>(q_out),
            {static_cast<char*>(keys), static_cast<uint16_t*>(key_scales), item},
            {static_cast<char*>(values), static_cast<uint16_t*>(value_scales), item},
            store_heads(type, cache_type), q_heads, kv_heads, head_dim, half};
        over_rows(rows, 2 * (q_heads + kv_heads) * head_dim, threads,
                  [&](int64_t first, int64_t end) { rotate_rows(args, first, end); });
    };
    if (type == kFloat32)
        call(static_cast<float*>(nullptr));
    else
        call(static_cast<BFloat16*>(nullptr));
}

REPLAYABLE(shoal_norm)
REPLAYABLE(shoal_add_norm)
REPLAYABLE(shoal_activate)
REPLAYABLE(shoal_activate_gated)
REPLAYABLE(shoal_rotate_and_store)
