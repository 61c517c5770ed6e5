// Making weights of 4 bits, for shoal.kernels.int4_weights: a scale and a zero for each group of inputs of an output.
//
// The numbers of a group are (code - zero) * scale, with codes from 0 to 15. The zero is the code nearest to 0.0 if the
// smallest number has the code 0 and the largest 15. With smaller scales the largest numbers are cut off, which pays if it
// makes the errors of all others smaller. With larger scales numbers that were made from 4 bits, with fewer codes between
// the smallest and the largest, become the same again. So scales of several sizes are tried. The codes that each of them
// gives have a best scale, the one with the least squares of errors:
//
//     scale = sum of v c / sum of c c,   whose error is  sum of v v - (sum of v c)^2 / sum of c c     (c = code - zero)
//
// The best is rounded to codes again, and its scale replaced again. It is kept with 16 significant bits (int4_linear.cpp
// has the zero in the others). All operations are in float32 in the order written here, as in PyTorch's version.

#include "integer_rows.h"

namespace {

constexpr int64_t kMostGroup = 128;     // inputs
constexpr float kMostCode = 15.0f;
constexpr float kWidths[] = {15, 14, 13, 12, 16, 17, 18, 20};  // codes between the smallest and the largest number

ALWAYS_INLINE Floats smaller(Floats x, Floats y) { return (x < y) ? x : y; }
ALWAYS_INLINE Floats rounded_to_integer(Floats x) { return (x + kRoundToInteger) - kRoundToInteger; }

// A group of 16 outputs, one in each lane.
struct Group {
    Floats numbers[kMostGroup];
    uint8_t codes[kMostGroup * kLanes];
    float scales[kLanes];
    int8_t zeros[kLanes];
};

// The sums of v c and of c c.
struct Sums {
    Floats vc, cc;
};

ALWAYS_INLINE Floats code_of(Floats v, Floats inverse, Floats lowest) {
    return smaller(larger(rounded_to_integer(v * inverse), lowest), lowest + kMostCode);
}

ALWAYS_INLINE Sums sums_of(const Floats* v, int64_t size, Floats inverse, Floats lowest) {
    Sums sums = {};
    for (int64_t i = 0; i < size; ++i) {
        const Floats c = code_of(v[i], inverse, lowest);
        sums.vc += v[i] * c;
        sums.cc += c * c;
    }
    return sums;
}

// The scale with the least error; 1 if all codes are zeros.
ALWAYS_INLINE Floats scale_of(Sums sums) { return (sums.cc > 0.0f) ? sums.vc / sums.cc : splat(1.0f); }

// Sets codes, scales and zeros. An output with an infinite or undefined number gets the scale NaN.
CLONED void quantize_group(Group& group, int64_t size) {
    Floats low = {}, high = {};
    Words largest = {};
    for (int64_t i = 0; i < size; ++i) {
        low = smaller(group.numbers[i], low);
        high = larger(group.numbers[i], high);
        largest = larger((Words)group.numbers[i] & 0x7fffffffu, largest);
    }
    const auto finite = largest < 0x7f800000u;
    const Floats unit = larger(high / kMostCode - low / kMostCode, splat(kSmallest));
    const Floats per_unit = 1.0f / unit;
    const Floats lowest = finite ? -rounded_to_integer(-low * per_unit) : Floats{};
    Floats* v = group.numbers;
    for (int64_t i = 0; i < size; ++i) v[i] = finite ? v[i] * per_unit : Floats{};
    Floats best = splat(-1.0f), scale = {};
    for (const float width : kWidths) {
        const Sums sums = sums_of(v, size, splat(width / kMostCode), lowest);
        const Floats gain = (sums.cc > 0.0f) ? sums.vc * sums.vc / sums.cc : Floats{};
        scale = (gain > best) ? scale_of(sums) : scale;
        best = larger(gain, best);
    }
    scale = scale_of(sums_of(v, size, 1.0f / scale, lowest)) * unit;
    const Floats kept = (Floats)(((Words)scale + 0x80u) & 0xffffff00u);
    const Floats inverse = unit / kept;
    for (int64_t i = 0; i < size; ++i)
        store_bytes(group.codes + i * kLanes, nearest(code_of(v[i], inverse, lowest) - lowest));
    store_floats(group.scales, finite ? kept : splat(std::numeric_limits<float>::quiet_NaN()));
    const Words zeros = nearest(-lowest);
    for (int64_t lane = 0; lane < kLanes; ++lane) group.zeros[lane] = static_cast<int8_t>(zeros[lane]);
}

template <class T>
void quantize(const T* weight, int64_t outputs, int64_t inputs, int64_t size, uint8_t* codes, float* scales,
              int8_t* zeros, int64_t threads) {
    const int64_t groups = ceil_div(inputs, size);
    in_parallel(ceil_div(outputs, kLanes), threads, [&](int64_t block, int64_t) {
        const int64_t first_output = block * kLanes, count = std::min(kLanes, outputs - first_output);
        Group group;
        auto* numbers = reinterpret_cast<float*>(group.numbers);
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * size, width = std::min(size, inputs - first);
            for (int64_t lane = 0; lane < kLanes; ++lane) {
                const T* row = weight + (first_output + lane) * inputs + first;
                for (int64_t i = 0; i < width; ++i) numbers[i * kLanes + lane] = lane < count ? to_float(row[i]) : 0.0f;
            }
            quantize_group(group, width);
            for (int64_t lane = 0; lane < count; ++lane) {
                const int64_t output = first_output + lane;
                uint8_t* row = codes + output * inputs + first;
                for (int64_t i = 0; i < width; ++i) row[i] = group.codes[i * kLanes + lane];
                scales[output * groups + g] = group.scales[lane];
                zeros[output * groups + g] = group.zeros[lane];
            }
        }
    });
}

}  // namespace

// weight and codes: [outputs, inputs]; scales and zeros: [outputs, groups]. group: the inputs of a group.
EXPORT void shoal_int4_quantize(int32_t type, const void* weight, int64_t outputs, int64_t inputs, int64_t group,
                                uint8_t* codes, float* scales, int8_t* zeros, int64_t threads) {
    if (type == kFloat32)
        quantize(static_cast<const float*>(weight), outputs, inputs, group, codes, scales, zeros, threads);
    else
        quantize(static_cast<const BFloat16*>(weight), outputs, inputs, group, codes, scales, zeros, threads);
}
