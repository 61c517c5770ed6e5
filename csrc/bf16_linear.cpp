// The linear layers of shoal.kernels.bf16_linear, in the library _bf16: products of bfloat16, summed in float32.
//
// The weight is packed for instructions that multiply pairs of inputs, vdpbf16ps of AVX-512 BF16 and tdpbf16ps of AMX.
// With AVX2 a pair is a word, from which two instructions make two numbers in float32:
//
//     packed[panel][step][block][pair][output in block][2]    16 pairs of a step; 16 outputs of a block; 2 blocks of
//                                                             a panel
//
// The last panel may have one block. Absent outputs and inputs are zeros. A block of a step, 1 KiB, is a tile of AMX.
//
// The products of an output are added in the order of the steps, and within a step as the instructions do it. Work is
// divided by rows and panels only. Where the steps of a row are not computed in one go, its sums are kept in float32,
// so nothing is rounded in between. So a row has the same bits in any batch and with any number of threads.

#include "bf16_avx2.h"
#include "bf16_avx512.h"
#include "replay.h"

#if HAS_BF16
#include <sys/mman.h>
#endif

namespace {

constexpr int32_t kAbiVersion = 4;

enum Level : int32_t { kNone = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };
enum Status : int32_t { kOk = 0, kOutOfMemory = 1 };

constexpr int64_t kProductsPerThread = 1 << 18;  // less takes longer to hand to a thread than to compute
constexpr int64_t kPiecesPerThread = 8;          // so that threads end at about the same time
constexpr int64_t kStreamedBytes = 1 << 20;      // of results, about what a core's second cache holds
constexpr int64_t kAhead = 8192;                 // bytes
constexpr int64_t kStepsAtATime = 32;            // of kMaxRows rows 512 KiB, of a panel's weights 64 KiB

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A layer as Python describes it (shoal.kernels.bf16_linear). The bias has a number for each output of all panels, or
// there is none.
struct Layer {
    const uint16_t* packed;
    const float* bias;
    int64_t steps, outputs;
    int32_t level;

    int64_t blocks() const { return ceil_div(outputs, kBlock); }
    int64_t panels() const { return ceil_div(outputs, kPanel); }
    int64_t blocks_of(int64_t panel) const { return std::min(kPanelBlocks, blocks() - panel * kPanelBlocks); }
    const uint16_t* weights(int64_t panel, int64_t step) const {
        return packed + (panel * steps * kPanelBlocks + step * blocks_of(panel)) * kBlockStep;
    }
};

#if HAS_BF16

// ---------------------------------------------------------------------------------------------------------------------
// Packing.

typedef uint32_t Words8 __attribute__((vector_size(32)));

// Transposes 8 x 8 pairs. In each round, rows exchange the squares beside the diagonal: first of one pair, then of 2 x 2
// and 4 x 4.
AVX2_INLINE void transpose_eight(const uint16_t* const* rows, int64_t first_input, uint16_t* target) {
    Words8 a[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) std::memcpy(&a[i], rows[i] + first_input, sizeof a[i]);
#define EXCHANGE(distance, low, high)                                           \
    _Pragma("GCC unroll 8") for (int i = 0; i < 8; ++i) {                       \
        if (i & (distance)) continue;                                           \
        const Words8 upper = a[i], lower = a[i + (distance)];                   \
        a[i] = __builtin_shufflevector(upper, lower, UNPACK low);               \
        a[i + (distance)] = __builtin_shufflevector(upper, lower, UNPACK high); \
    }
#define UNPACK(...) __VA_ARGS__
    EXCHANGE(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
    EXCHANGE(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
    EXCHANGE(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#undef EXCHANGE
#undef UNPACK
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) std::memcpy(target + i * 2 * kBlock, &a[i], sizeof a[i]);
}

// A block of a step: the transposed matrix of 16 rows of 16 pairs.
AVX2 void transpose(const uint16_t* const* rows, uint16_t* target) {
    for (int64_t o = 0; o < kBlock; o += 8)
        for (int64_t pair = 0; pair < kPairs; pair += 8)
            transpose_eight(rows + o, 2 * pair, target + (pair * kBlock + o) * 2);
}

// Asks for pages of 2 MiB, which are read about a tenth faster. It must be called before the memory is first written.
void use_large_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t kPage = 2 << 20;
    const auto start = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
    const auto end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kPage * kPage;
    if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
}

// weight: [outputs, inputs]; `first` is the first output of the block; `distance`: from a step to the next in `packed`.
void pack_block(const uint16_t* weight, int64_t outputs, int64_t inputs, int64_t first, uint16_t* packed,
                int64_t distance) {
    const uint16_t* rows[kBlock];
    const int64_t present = std::min(kBlock, outputs - first);
    for (int64_t step = 0; step * kStep < inputs; ++step, packed += distance) {
        const int64_t left = inputs - step * kStep;
        for (int64_t o = 0; o < present; ++o) rows[o] = weight + (first + o) * inputs + step * kStep;
        alignas(64) uint16_t padded[kBlock][kStep];
        if (present < kBlock || left < kStep) {
            std::memset(padded, 0, sizeof padded);
            for (int64_t o = 0; o < present; ++o)
                std::memcpy(padded[o], rows[o], std::min(left, kStep) * sizeof(uint16_t));
            for (int64_t o = 0; o < kBlock; ++o) rows[o] = padded[o];
        }
        transpose(rows, packed);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The division of work among threads.

// What a worker has for its next panels.
template <class Tiles>
struct alignas(64) OfWorker {
    typename Tiles::Scratch scratch;
    const uint16_t* fetched = nullptr;  // the weights that were prefetched last
};

// The outputs of the panels from `first` to `end`, at most kPanelsAtATime, for the rows of a chunk.
template <class Tiles>
void multiply_panels(Tiles& tiles, const Layer& layer, int64_t first, int64_t end, int64_t rows,
                     const Output<BFloat16>& out, OfWorker<Tiles>& of_worker) {
    alignas(64) Sums sums;
    const int64_t turns = ceil_div(rows, Tiles::kRows);
    // Many rows go through all panels with some of their inputs, which stay in a core's second cache meanwhile.
    const int64_t part = turns == 1 ? layer.steps : kStepsAtATime;
    for (int64_t step = 0; step < layer.steps; step += part) {
        const int64_t steps = std::min(part, layer.steps - step);
        for (int64_t panel = first; panel < end; ++panel) {
            const int64_t blocks = layer.blocks_of(panel), bytes_of_step = blocks * kBlockStep * sizeof(uint16_t);
            const uint16_t* numbers = layer.weights(panel, step);
            // While these weights are multiplied, those that follow are prefetched: a share by the rows of each turn.
            // The first turn prefetches these weights instead if nothing else has.
            const uint16_t* next = panel + 1 < end              ? layer.weights(panel + 1, step)
                                   : step + part < layer.steps ? layer.weights(first, step + part)
                                                               : layer.weights(end, 0);
            const bool once = turns == 1;
            const int64_t own_turns = once || of_worker.fetched != numbers;
            const char* own = reinterpret_cast<const char*>(numbers) + kAhead;
            const char* ahead = reinterpret_cast<const char*>(next);
            const int64_t share = once ? 0 : ceil_div(bytes_of_step, turns - own_turns);
            for (int64_t turn = 0; turn < turns; ++turn) {
                const int64_t row = Tiles::first_row(turn, turns, rows);
                const int64_t end_row = Tiles::first_row(turn + 1, turns, rows);
                Weights weights{numbers, blocks, step, steps, own, bytes_of_step, once};
                if (turn >= own_turns) {
                    weights.ahead = ahead, weights.ahead_bytes = share;
                    ahead += steps * share;
                }
                tiles.add(row, end_row - row, weights, sums[panel - first]);
            }
            of_worker.fetched = next;
        }
    }
    Tiles::finish(sums, rows, layer.bias, out, first * kPanel, std::min(end * kPanel, layer.outputs));
}

// The rows of one layer, from `first_row` of all on. They are cut into chunks, and the layer's panels into groups.
struct Task {
    const Layer& layer;
    int64_t first_row, rows, turns, chunks, first_piece;
};

// `layers` of one shape; the first counts[0] rows of x belong to the first one, and so on.
template <class Tiles, class Outputs>
void multiply(const Layer* const* layers, const int64_t* counts, int64_t number, const uint16_t* x, Outputs& out,
              int64_t threads) {
    const int64_t inputs = layers[0]->steps * kStep, outputs = layers[0]->outputs, panels = layers[0]->panels();
    std::vector<Task> tasks;
    int64_t rows = 0, chunks = 0, most_rows = 0;
    for (int64_t i = 0; i < number; rows += counts[i++]) {
        if (counts[i] == 0) continue;
        const int64_t turns = ceil_div(counts[i], Tiles::kRows);
        tasks.push_back({*layers[i], rows, counts[i], turns,
                         ceil_div(turns, Tiles::most_rows(inputs) / Tiles::kRows), 0});
        chunks += tasks.back().chunks;
        most_rows = std::max(most_rows, ceil_div(turns, tasks.back().chunks) * Tiles::kRows);
    }
    threads = std::max<int64_t>(1, std::min(threads, rows * inputs * outputs / kProductsPerThread));
    const int64_t groups = std::min(panels, threads == 1 ? 1 : ceil_div(threads * kPiecesPerThread, chunks));
    int64_t pieces = 0;
    for (Task& task : tasks) task.first_piece = pieces, pieces += task.chunks * groups;
    const bool reused = panels * chunks >= threads * kPanelsAtATime;  // a worker takes that many with the same rows
    std::vector<OfWorker<Tiles>> workers(std::min(threads, pieces));
    for (auto& each : workers) each.scratch.reserve(most_rows, inputs);
    in_spans(pieces, threads, [&](int64_t piece, int64_t worker) {
        const auto after = [](int64_t number, const Task& task) { return number < task.first_piece; };
        const Task& task = *std::prev(std::upper_bound(tasks.begin(), tasks.end(), piece, after));
        const int64_t chunk = (piece - task.first_piece) / groups, group = (piece - task.first_piece) % groups;
        const int64_t start = task.turns * chunk / task.chunks * Tiles::kRows;
        const int64_t count = std::min(task.rows, task.turns * (chunk + 1) / task.chunks * Tiles::kRows) - start;
        const int64_t row = task.first_row + start;
        Tiles tiles(x + row * inputs, count, inputs, workers[worker].scratch, reused);
        const int64_t end_panel = panels * (group + 1) / groups;
        for (int64_t panel = panels * group / groups; panel < end_panel; panel += kPanelsAtATime) {
            const int64_t last = std::min(end_panel, panel + kPanelsAtATime), first = panel * kPanel;
            multiply_panels(tiles, task.layer, panel, last, count, out.of(row, first, worker), workers[worker]);
            out.take(row, count, first, std::min(last * kPanel, outputs), worker);
        }
    });
}

// Calls `multiply` with the instructions of the layers' level.
template <class Outputs>
void multiply_at_level(const Layer* const* layers, const int64_t* counts, int64_t number, const uint16_t* x,
                       Outputs& out, int64_t threads) {
    switch (layers[0]->level) {
        case kAmx: multiply<AmxTiles>(layers, counts, number, x, out, threads); break;
        case kAvx512: multiply<Avx512Tiles>(layers, counts, number, x, out, threads); break;
        default: multiply<Avx2Tiles>(layers, counts, number, x, out, threads);
    }
}

#endif

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// The C interface.

EXPORT int32_t shoal_bf16_abi_version() { return kAbiVersion; }

// The best level of this CPU.
EXPORT int32_t shoal_bf16_level() {
#if HAS_BF16
    __builtin_cpu_init();
    if (!has_avx2()) return kNone;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512bf16"))
        return kAvx2;
    return amx_is_allowed() ? kAmx : kAvx512;
#else
    return kNone;
#endif
}

// weight: [outputs, inputs]; packed: blocks * steps * 1 KiB.
EXPORT void shoal_bf16_pack(const uint16_t* weight, int64_t outputs, int64_t inputs, uint16_t* packed,
                            int64_t threads) {
#if HAS_BF16
    const int64_t steps = ceil_div(inputs, kStep), blocks = ceil_div(outputs, kBlock);
    use_large_pages(packed, blocks * steps * kBlockStep * static_cast<int64_t>(sizeof(uint16_t)));
    in_parallel(blocks, threads, [&](int64_t block, int64_t) {
        const int64_t panel = block / kPanelBlocks, before = panel * kPanelBlocks;
        const int64_t count = std::min(kPanelBlocks, blocks - before);
        pack_block(weight, outputs, inputs, block * kBlock,
                   packed + before * steps * kBlockStep + (block - before) * kBlockStep, count * kBlockStep);
    });
#endif
}

// layers: of one shape and level. x: [sum of counts, steps * 32] and out: [sum of counts, outputs], contiguous; the
// first counts[0] rows belong to the first layer, and so on.
EXPORT int32_t shoal_bf16_group(const Layer* const* layers, const int64_t* counts, int64_t number, const uint16_t* x,
                                uint16_t* out, int64_t threads) {
#if HAS_BF16
    int64_t rows = 0;
    for (int64_t i = 0; i < number; ++i) rows += counts[i];
    const int64_t outputs = layers[0]->outputs, bytes = rows * outputs * static_cast<int64_t>(sizeof *out);
    try {
        AllOutputs<BFloat16> all{reinterpret_cast<BFloat16*>(out), outputs, bytes >= kStreamedBytes};
        multiply_at_level(layers, counts, number, x, all, threads);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
#endif
    return kOk;
}

// x: [rows, steps * 32] and out: [rows, outputs], contiguous.
EXPORT int32_t shoal_bf16_linear(const Layer* layer, const uint16_t* x, int64_t rows, uint16_t* out, int64_t threads) {
    return shoal_bf16_group(&layer, &rows, 1, x, out, threads);
}

// Writes the largest output of each row, and its id: [rows]. Of equal ones it is the first. The id of output 0 is `start`.
EXPORT int32_t shoal_bf16_top(const Layer* layer, const uint16_t* x, int64_t rows, int64_t start, float* values,
                              int64_t* ids, int64_t threads) {
#if HAS_BF16
    try {
        TopOutputs<BFloat16> top(rows, start, threads, kMaxRows, kPanelsAtATime * kPanel);
        multiply_at_level(&layer, &rows, 1, x, top, threads);
        top.finish(values, ids);
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
#endif
    return kOk;
}

REPLAYABLE(shoal_bf16_linear)
