// Collective operations and messages between the ranks of one host, through memory that all of them have mapped: the
// library _shared_memory, which `shoal/comm/shared_memory.py` calls through ctypes.
//
// Collectives proceed in rounds. In round n each rank writes what it has for the others to its slot of parity n % 2,
// publishes n, waits until all have published n, and reads the others' slots. A rank that publishes n + 1 has read all
// of round n, so a slot of parity n % 2 is free for round n + 2 when all have published n + 1. One wait a round is
// therefore enough. Large tensors take several rounds.
//
// A message from one rank to another is copied to the pair's arena, in parts, and needs no wait of the sender while the
// arena has room. The memory of the file is taken only where it is written to: arenas are large, but cost what they use.
//
// Sums are formed in rank order, for half-precision types in float32, so all ranks and all runs get the same bits.
//
// Every wait ends: at a deadline, when a rank aborts the group, or when the process of the awaited rank has ended.

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <new>

#include "chunks.h"
#include "replay.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef std::atomic<uint32_t> Word;  // on which processes can sleep (futex)
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free, "a futex is a plain 32-bit word");

constexpr uint32_t kMagic = 0x53484d31;
constexpr int64_t kMaxRanks = 256;
constexpr int64_t kSlot = 256 << 10;          // bytes that a rank publishes in a round
constexpr int64_t kOneRound = 16 << 10;       // an all-reduce of at most these bytes takes one round
constexpr int64_t kPipelined = 128 << 10;     // bytes of a round of a larger all-reduce: two rounds fit a core's cache
constexpr int64_t kParts = 256;               // of messages that a pair's arena can have at a time
constexpr int64_t kPart = 1 << 20;            // a message is copied in parts, which the receiver reads meanwhile
constexpr int64_t kArena = int64_t{256} << 20;  // address space of a pair
constexpr int64_t kAlign = 4096;
constexpr int64_t kParallel = 32 << 10;  // bytes of work that are worth another thread
constexpr int64_t kSleepNs = 50'000'000;  // the longest sleep without a look at deadline, abort and the awaited process
constexpr int64_t kYieldNs = 200'000;     // how long a wait only yields its core, before it sleeps

enum Operation : int32_t {
    kNone, kAllReduce, kAllGather, kReduceScatter, kAllToAll, kBroadcast, kSend, kReceive, kBarrier, kOperations
};

enum Status : int32_t { kDone = 0, kTimeout = 1, kAborted = 2, kDied = 3, kMismatch = 4, kBroken = 5 };

// A status and the rank that it is about, as one number.
int32_t outcome(Status status, int64_t rank) { return status | static_cast<int32_t>(rank) << 8; }

enum ElementType : int32_t {
    kElementFloat32, kElementBFloat16, kElementFloat16, kElementFloat64, kElementInt32, kElementInt64, kElementUInt8
};

struct alignas(128) RankState {
    Word round;                         // the last round that the rank has published
    Word sleepers;                      // ranks that sleep on `round`
    std::atomic<uint64_t> signature[2];  // of the operation of a round, by parity: the same on all ranks
    std::atomic<uint64_t> position;     // the operation in the upper 16 bits, kNone between operations; its number below
};

struct Part {
    int64_t offset, bytes;
    uint64_t signature;
};

struct alignas(128) Pair {
    Word sent, sent_sleepers;  // parts that the sender has written
    alignas(128) Word received, received_sleepers;  // parts that the receiver has read
    alignas(128) Part parts[kParts];
};

struct alignas(128) Group {
    uint32_t magic;
    int32_t ranks;
    uint64_t nonce;
    std::atomic<int32_t> aborted;
};

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Where the parts of the shared memory begin.
struct Places {
    explicit Places(int64_t ranks)
        : counts_bytes(aligned(ranks * 8)),
          states(aligned(sizeof(Group))),
          slots(states + aligned(ranks * sizeof(RankState))),
          slot_bytes(counts_bytes + 2 * kSlot),
          pairs(slots + ranks * 2 * slot_bytes),
          arenas(pairs + aligned(ranks * ranks * sizeof(Pair))),
          end(arenas + ranks * ranks * kArena) {}
    int64_t counts_bytes, states, slots, slot_bytes, pairs, arenas, end;
};

struct Totals {
    int64_t count, sent_bytes, nanoseconds, waited;
    int64_t waited_for[kMaxRanks];  // by the rank that came last
};

struct Context {
    Context(char* memory, int32_t rank, int32_t ranks) : memory(memory), rank(rank), ranks(ranks), places(ranks) {}
    char* memory;
    int32_t rank, ranks;
    Places places;
    bool broken = false;  // an operation has failed: the ranks' rounds may differ now
    uint32_t round = 0;
    uint64_t number = 0;
    int64_t spin_ns = 0;
    int64_t timeout_ns = 0;
    int64_t threads = 1;
    int32_t processes[kMaxRanks];     // a pidfd of each other rank, -1 for none
    uint32_t sent[kMaxRanks] = {}, received[kMaxRanks] = {};
    int64_t head[kMaxRanks] = {};     // by receiver: the end of the last part
    Totals totals[kOperations] = {};

    Group& group() const { return *reinterpret_cast<Group*>(memory); }
    RankState& state(int64_t r) const { return reinterpret_cast<RankState*>(memory + places.states)[r]; }
    Pair& pair(int64_t from, int64_t to) const {
        return reinterpret_cast<Pair*>(memory + places.pairs)[from * ranks + to];
    }
    char* arena(int64_t from, int64_t to) const { return memory + places.arenas + (from * ranks + to) * kArena; }
    char* slot_of(int64_t r, uint32_t n) const { return memory + places.slots + (2 * r + n % 2) * places.slot_bytes; }
    int64_t* counts(int64_t r, uint32_t n) const { return reinterpret_cast<int64_t*>(slot_of(r, n)); }
    char* input(int64_t r, uint32_t n) const { return slot_of(r, n) + places.counts_bytes; }
    char* result(int64_t r, uint32_t n) const { return input(r, n) + kSlot; }
};

int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

// ---------------------------------------------------------------------------------------------------------------------
// Waiting.

void pause_core() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void sleep_on(Word& word, uint32_t seen, int64_t ns) {
    const timespec t{ns / 1'000'000'000, ns % 1'000'000'000};
    syscall(SYS_futex, &word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

void wake(Word& word) { syscall(SYS_futex, &word, FUTEX_WAKE, std::numeric_limits<int32_t>::max(), nullptr, nullptr, 0); }

// Publishes a value, and wakes those who sleep on it.
void publish(Word& word, Word& sleepers, uint32_t value) {
    word.store(value, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) != 0) wake(word);
}

bool has_ended(int32_t process) {
    pollfd f{process, POLLIN, 0};
    return process >= 0 && poll(&f, 1, 0) == 1;
}

// Waits until ready(value of the word), for rank `whom`. First it spins, if each rank has a core; then it yields its core
// to whoever is ready to run; then it sleeps.
template <class Ready>
int32_t wait_for(Context& c, Word& word, Word& sleepers, int64_t whom, int64_t deadline, const Ready& ready) {
    if (ready(word.load(std::memory_order_acquire))) return kDone;
    const int64_t begun = now_ns();
    const int64_t spin_until = begun + c.spin_ns, yield_until = spin_until + kYieldNs;
    for (int64_t now = begun; now < yield_until; now = now_ns()) {
        if (now < spin_until) {
            for (int i = 0; i < 32; ++i) {
                if (ready(word.load(std::memory_order_acquire))) return kDone;
                pause_core();
            }
        } else {
            sched_yield();
            if (ready(word.load(std::memory_order_acquire))) return kDone;
        }
        if (c.group().aborted.load(std::memory_order_relaxed)) return outcome(kAborted, whom);
    }
    while (true) {
        sleepers.fetch_add(1, std::memory_order_seq_cst);
        const uint32_t seen = word.load(std::memory_order_seq_cst);
        const bool done = ready(seen);
        if (!done && !c.group().aborted.load(std::memory_order_seq_cst)) sleep_on(word, seen, kSleepNs);
        sleepers.fetch_sub(1, std::memory_order_seq_cst);
        if (done || ready(word.load(std::memory_order_acquire))) return kDone;
        if (c.group().aborted.load(std::memory_order_seq_cst)) return outcome(kAborted, whom);
        const bool ended = has_ended(c.processes[whom]);
        if (ready(word.load(std::memory_order_acquire))) return kDone;  // what it published before its end counts
        if (ended) return outcome(kDied, whom);
        if (now_ns() >= deadline) return outcome(kTimeout, whom);
    }
}

// The work of one operation of this rank. Its end is noted when the scope ends.
class Running {
  public:
    // `sent_bytes`: what is counted as sent. If `status` is not kDone, the operation cannot begin.
    Running(Context& c, Operation operation, int64_t sent_bytes) : c_(c), operation_(operation), begun_(now_ns()) {
        note_position(operation, ++c.number);
        Totals& totals = c.totals[operation];
        ++totals.count;
        totals.sent_bytes += sent_bytes;
        if (c.group().aborted.load(std::memory_order_seq_cst))
            status = outcome(kAborted, c.rank);
        else if (c.broken)
            status = outcome(kBroken, c.rank);
    }

    // After an error the position stays, since it shows where the rank stopped.
    ~Running() {
        if (status == kDone)
            note_position(kNone, c_.number);
        else
            c_.broken = true;
        c_.totals[operation_].nanoseconds += now_ns() - begun_;
    }

    // Publishes the next round, and waits for the others.
    bool next_round(uint64_t signature) {
        RankState& own = c_.state(c_.rank);
        const uint32_t n = ++c_.round;
        own.signature[n % 2].store(signature, std::memory_order_relaxed);
        publish(own.round, own.sleepers, n);
        int64_t last = -1;
        const int64_t begun = now_ns();
        for (int64_t i = 1; i < c_.ranks && status == kDone; ++i) {
            const int64_t r = (c_.rank + i) % c_.ranks;
            RankState& other = c_.state(r);
            const auto there = [n](uint32_t round) { return static_cast<int32_t>(round - n) >= 0; };
            if (there(other.round.load(std::memory_order_acquire))) continue;
            last = r;
            status = wait_for(c_, other.round, other.sleepers, r, begun_ + c_.timeout_ns, there);
        }
        note_wait(last, begun);
        for (int64_t r = 0; r < c_.ranks && status == kDone; ++r)
            if (c_.state(r).signature[n % 2].load(std::memory_order_relaxed) != signature) status = outcome(kMismatch, r);
        return status == kDone;
    }

    template <class Ready>
    bool wait(Word& word, Word& sleepers, int64_t whom, const Ready& ready) {
        if (ready(word.load(std::memory_order_acquire))) return true;
        const int64_t begun = now_ns();
        status = wait_for(c_, word, sleepers, whom, begun_ + c_.timeout_ns, ready);
        note_wait(whom, begun);
        return status == kDone;
    }

    uint32_t round() const { return c_.round; }

    int32_t status = kDone;

  private:
    void note_position(Operation operation, uint64_t number) {
        const uint64_t position = static_cast<uint64_t>(operation) << 48 | number;
        c_.state(c_.rank).position.store(position, std::memory_order_relaxed);
    }

    void note_wait(int64_t whom, int64_t begun) {
        if (whom < 0) return;
        const int64_t waited = now_ns() - begun;
        c_.totals[operation_].waited += waited;
        c_.totals[operation_].waited_for[whom] += waited;
    }

    Context& c_;
    const Operation operation_;
    const int64_t begun_;
};

uint64_t signature_of(Operation operation, int32_t detail, int64_t bytes) {
    return static_cast<uint64_t>(operation) << 56 | static_cast<uint64_t>(detail & 0xffff) << 40 |
           (static_cast<uint64_t>(bytes) & 0xffffffffff);
}

// ---------------------------------------------------------------------------------------------------------------------
// Sums and copies.

// Adds the parts in their order. Any of them may be the output.
template <class T>
ALWAYS_INLINE void sum_floats(T* out, const T* const* parts, int64_t ranks, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i += kChunk) {
        Chunk total = load(parts[0] + i, end - i);
        for (int64_t r = 1; r < ranks; ++r) {
            const Chunk part = load(parts[r] + i, end - i);
            total.first += part.first;
            total.second += part.second;
        }
        store(out + i, total, end - i);
    }
}

template <class T, class Total>
ALWAYS_INLINE void sum_plain(T* out, const T* const* parts, int64_t ranks, int64_t first, int64_t end) {
    constexpr int64_t kBlock = 512;
    Total total[kBlock];
    for (int64_t start = first; start < end; start += kBlock) {
        const int64_t count = std::min(kBlock, end - start);
        for (int64_t i = 0; i < count; ++i) total[i] = static_cast<Total>(parts[0][start + i]);
        for (int64_t r = 1; r < ranks; ++r)
            for (int64_t i = 0; i < count; ++i) total[i] += static_cast<Total>(parts[r][start + i]);
        for (int64_t i = 0; i < count; ++i) out[start + i] = static_cast<T>(total[i]);
    }
}

CLONED void sum_float32(float* out, const float* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_floats(out, parts, ranks, first, end);
}
CLONED void sum_bfloat16(BFloat16* out, const BFloat16* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_floats(out, parts, ranks, first, end);
}
CLONED void sum_float64(double* out, const double* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_plain<double, double>(out, parts, ranks, first, end);
}
CLONED void sum_int32(uint32_t* out, const uint32_t* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_plain<uint32_t, uint32_t>(out, parts, ranks, first, end);
}
CLONED void sum_int64(uint64_t* out, const uint64_t* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_plain<uint64_t, uint64_t>(out, parts, ranks, first, end);
}
CLONED void sum_uint8(uint8_t* out, const uint8_t* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_plain<uint8_t, uint8_t>(out, parts, ranks, first, end);
}
#if defined(__FLT16_MANT_DIG__)
typedef _Float16 Half;
CLONED void sum_float16(Half* out, const Half* const* parts, int64_t ranks, int64_t first, int64_t end) {
    sum_plain<Half, float>(out, parts, ranks, first, end);
}
#endif

int64_t element_bytes(int32_t type) {
    switch (type) {
        case kElementBFloat16:
        case kElementFloat16: return 2;
        case kElementFloat64:
        case kElementInt64: return 8;
        case kElementUInt8: return 1;
        default: return 4;
    }
}

template <class T>
void sum_in_parallel(void (*sum)(T*, const T* const*, int64_t, int64_t, int64_t), char* out, const char* const* parts,
                     int64_t ranks, int64_t count, int64_t threads) {
    const auto* typed = reinterpret_cast<const T* const*>(parts);
    auto* target = reinterpret_cast<T*>(out);
    const int64_t piece = kParallel / static_cast<int64_t>(sizeof(T));
    in_parallel((count + piece - 1) / piece, threads, [&](int64_t i, int64_t) {
        sum(target, typed, ranks, i * piece, std::min(count, (i + 1) * piece));
    });
}

void add(int32_t type, char* out, const char* const* parts, int64_t ranks, int64_t count, int64_t threads) {
    if (count <= 0) return;
    switch (type) {
        case kElementFloat32: return sum_in_parallel(sum_float32, out, parts, ranks, count, threads);
        case kElementBFloat16: return sum_in_parallel(sum_bfloat16, out, parts, ranks, count, threads);
        case kElementFloat64: return sum_in_parallel(sum_float64, out, parts, ranks, count, threads);
        case kElementInt32: return sum_in_parallel(sum_int32, out, parts, ranks, count, threads);
        case kElementInt64: return sum_in_parallel(sum_int64, out, parts, ranks, count, threads);
        case kElementUInt8: return sum_in_parallel(sum_uint8, out, parts, ranks, count, threads);
#if defined(__FLT16_MANT_DIG__)
        case kElementFloat16: return sum_in_parallel(sum_float16, out, parts, ranks, count, threads);
#endif
        default: return;
    }
}

void copy(char* to, const char* from, int64_t bytes, int64_t threads) {
    if (bytes <= 0 || to == from) return;
    in_parallel((bytes + kParallel - 1) / kParallel, threads, [&](int64_t i, int64_t) {
        std::memcpy(to + i * kParallel, from + i * kParallel, std::min(kParallel, bytes - i * kParallel));
    });
}

// The part of [first, end) that lies in [from, to), relative to `from`.
struct Span {
    Span(int64_t first, int64_t end, int64_t from, int64_t to)
        : start(std::max(first, from) - from), bytes(std::max(int64_t{0}, std::min(end, to) - std::max(first, from))) {}
    int64_t start, bytes;
};

// ---------------------------------------------------------------------------------------------------------------------
// Collectives.

int32_t all_reduce_in_one_round(Context& c, Running& running, int32_t type, const char* in, char* out, int64_t count,
                                int64_t bytes, uint64_t signature) {
    std::memcpy(c.input(c.rank, c.round + 1), in, bytes);
    if (!running.next_round(signature)) return running.status;
    const char* parts[kMaxRanks];
    for (int64_t r = 0; r < c.ranks; ++r) parts[r] = r == c.rank ? in : c.input(r, running.round());
    add(type, out, parts, c.ranks, count, 1);
    return kDone;
}

// Each rank sums its share of a piece and publishes the result together with its input of the next piece.
int32_t all_reduce_in_pieces(Context& c, Running& running, int32_t type, const char* in, char* out, int64_t count,
                             uint64_t signature) {
    const int64_t size = element_bytes(type), piece = kPipelined / size;
    const int64_t pieces = (count + piece - 1) / piece;
    const auto share_of = [&](int64_t k, int64_t r, int64_t* first, int64_t* end) {  // in elements of the piece
        const int64_t length = std::min(piece, count - k * piece);
        const int64_t each = ((length + c.ranks - 1) / c.ranks + kChunk - 1) / kChunk * kChunk;
        *first = std::min(length, r * each);
        *end = std::min(length, (r + 1) * each);
        return length;
    };
    for (int64_t k = 0; k <= pieces; ++k) {
        int64_t first, end;
        if (k < pieces) {
            const int64_t length = share_of(k, c.rank, &first, &end);
            const char* from = in + k * piece * size;
            char* to = c.input(c.rank, c.round + 1);
            copy(to, from, first * size, c.threads);
            copy(to + end * size, from + end * size, (length - end) * size, c.threads);
        }
        if (!running.next_round(signature)) return running.status;
        const uint32_t n = running.round();
        for (int64_t i = 1; k > 0 && i < c.ranks; ++i) {
            const int64_t r = (c.rank + i) % c.ranks;
            share_of(k - 1, r, &first, &end);
            copy(out + ((k - 1) * piece + first) * size, c.result(r, n) + first * size, (end - first) * size, c.threads);
        }
        if (k < pieces) {
            share_of(k, c.rank, &first, &end);
            const char* parts[kMaxRanks];
            for (int64_t r = 0; r < c.ranks; ++r)
                parts[r] = (r == c.rank ? in + k * piece * size : c.input(r, n)) + first * size;
            char* sum = c.result(c.rank, n + 1) + first * size;
            add(type, sum, parts, c.ranks, end - first, c.threads);
            copy(out + (k * piece + first) * size, sum, (end - first) * size, c.threads);
        }
    }
    return kDone;
}

}  // namespace

EXPORT int32_t shoal_shared_memory_version() { return 3; }

EXPORT int64_t shoal_shared_memory_bytes(int32_t ranks) { return Places(ranks).end; }

// Maps the file of a group, and returns the address or minus the error number.
EXPORT int64_t shoal_shared_memory_map(int32_t file, int32_t ranks) {
    void* memory = mmap(nullptr, Places(ranks).end, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) return -errno;
    madvise(memory, Places(ranks).end, MADV_DONTDUMP);
    return reinterpret_cast<int64_t>(memory);
}

EXPORT void shoal_shared_memory_unmap(char* memory, int32_t ranks) { munmap(memory, Places(ranks).end); }

EXPORT int32_t shoal_shared_memory_max_ranks() { return kMaxRanks; }

// Whether sums of an element type are implemented: a compiler may lack float16.
EXPORT int32_t shoal_shared_memory_sums(int32_t type) {
#if !defined(__FLT16_MANT_DIG__)
    if (type == kElementFloat16) return 0;
#endif
    return type >= kElementFloat32 && type <= kElementUInt8;
}

// Prepares memory that is all zero. The first rank calls this, before the others map the memory.
EXPORT void shoal_shared_memory_prepare(char* memory, int32_t ranks, uint64_t nonce) {
    auto* group = new (memory) Group;
    group->ranks = ranks;
    group->nonce = nonce;
    group->magic = kMagic;
}

// Returns null if the memory is not that of the group.
EXPORT void* shoal_shared_memory_attach(char* memory, int32_t rank, int32_t ranks, uint64_t nonce,
                                        const int32_t* processes, int64_t timeout_ns, int64_t spin_ns, int64_t threads) {
    const auto* group = reinterpret_cast<Group*>(memory);
    if (group->magic != kMagic || group->ranks != ranks || group->nonce != nonce) return nullptr;
    auto* c = new (std::nothrow) Context(memory, rank, ranks);
    if (c == nullptr) return nullptr;
    std::copy(processes, processes + ranks, c->processes);
    c->timeout_ns = timeout_ns;
    c->spin_ns = spin_ns;
    c->threads = threads;
    return c;
}

EXPORT void shoal_shared_memory_detach(Context* c) { delete c; }

EXPORT void shoal_shared_memory_abort(char* memory, int32_t ranks) {
    const Places places(ranks);
    reinterpret_cast<Group*>(memory)->aborted.store(1, std::memory_order_seq_cst);
    auto* states = reinterpret_cast<RankState*>(memory + places.states);
    for (int64_t r = 0; r < ranks; ++r) wake(states[r].round);
    auto* pairs = reinterpret_cast<Pair*>(memory + places.pairs);
    for (int64_t i = 0; i < int64_t{ranks} * ranks; ++i) {
        if (pairs[i].sent_sleepers.load()) wake(pairs[i].sent);
        if (pairs[i].received_sleepers.load()) wake(pairs[i].received);
    }
}

// What a rank is doing: the code of the operation in the upper 16 bits (0 between operations), its number in the others.
EXPORT uint64_t shoal_shared_memory_position(const Context* c, int32_t rank) {
    return c->state(rank).position.load(std::memory_order_relaxed);
}

// Fills out[0..3] with the totals of an operation (calls, sent bytes, nanoseconds, nanoseconds of waiting), and the rest,
// one for each rank, with the nanoseconds of waiting by the rank that came last.
EXPORT void shoal_shared_memory_totals(const Context* c, int32_t operation, int64_t* out) {
    const Totals& totals = c->totals[operation];
    out[0] = totals.count;
    out[1] = totals.sent_bytes;
    out[2] = totals.nanoseconds;
    out[3] = totals.waited;
    std::copy(totals.waited_for, totals.waited_for + c->ranks, out + 4);
}

// The operations. `sent_bytes` is what they count as sent. They return kDone, or what has failed and the rank that it is
// about.

EXPORT int32_t shoal_shared_memory_all_reduce(Context* c, int32_t type, const char* in, char* out, int64_t count,
                                            int64_t sent_bytes) {
    const int64_t bytes = count * element_bytes(type);
    Running running(*c, kAllReduce, sent_bytes);
    if (running.status != kDone) return running.status;
    const uint64_t signature = signature_of(kAllReduce, type, bytes);
    return bytes <= kOneRound ? all_reduce_in_one_round(*c, running, type, in, out, count, bytes, signature)
                              : all_reduce_in_pieces(*c, running, type, in, out, count, signature);
}

REPLAYABLE(shoal_shared_memory_all_reduce)

// Concatenates the ranks' bytes, sizes[r] of rank r.
EXPORT int32_t shoal_shared_memory_all_gather(Context* c, const char* in, char* out, const int64_t* sizes,
                                            int64_t sent_bytes) {
    int64_t total = 0, largest = 0;
    for (int64_t r = 0; r < c->ranks; ++r) {
        total += sizes[r];
        largest = std::max(largest, sizes[r]);
    }
    Running running(*c, kAllGather, sent_bytes);
    if (running.status != kDone) return running.status;
    const uint64_t signature = signature_of(kAllGather, 0, total);
    for (int64_t done = 0; done < largest || done == 0; done += kSlot) {
        copy(c->input(c->rank, c->round + 1), in + done, std::min(kSlot, sizes[c->rank] - done), c->threads);
        if (!running.next_round(signature)) return running.status;
        char* to = out + done;
        for (int64_t r = 0; r < c->ranks; to += sizes[r++]) {
            const char* from = r == c->rank ? in + done : c->input(r, running.round());
            copy(to, from, std::min(kSlot, sizes[r] - done), c->threads);
        }
    }
    return kDone;
}

// Sums elements of which sizes[r] belong to rank r, and writes those of this rank.
EXPORT int32_t shoal_shared_memory_reduce_scatter(Context* c, int32_t type, const char* in, char* out,
                                                const int64_t* sizes, int64_t sent_bytes) {
    int64_t first = 0, total = 0;
    for (int64_t r = 0; r < c->ranks; ++r) {
        if (r < c->rank) first += sizes[r];
        total += sizes[r];
    }
    const int64_t size = element_bytes(type), end = first + sizes[c->rank], piece = kSlot / size;
    Running running(*c, kReduceScatter, sent_bytes);
    if (running.status != kDone) return running.status;
    const uint64_t signature = signature_of(kReduceScatter, type, total * size);
    for (int64_t done = 0; done < total || done == 0; done += piece) {
        const int64_t to = std::min(total, done + piece);
        const Span own(first, end, done, to);
        const char* from = in + done * size;
        char* slot = c->input(c->rank, c->round + 1);
        const int64_t behind = own.bytes > 0 ? own.start + own.bytes : 0;
        if (own.bytes > 0) copy(slot, from, own.start * size, c->threads);
        copy(slot + behind * size, from + behind * size, (to - done - behind) * size, c->threads);
        if (!running.next_round(signature)) return running.status;
        if (own.bytes == 0) continue;
        const char* parts[kMaxRanks];
        for (int64_t r = 0; r < c->ranks; ++r)
            parts[r] = (r == c->rank ? from : c->input(r, running.round())) + own.start * size;
        add(type, out + (done + own.start - first) * size, parts, c->ranks, own.bytes, c->threads);
    }
    return kDone;
}

// Sends send[r] bytes of `in` to rank r, and receives receive[r] bytes from it, both in rank order.
EXPORT int32_t shoal_shared_memory_all_to_all(Context* c, const char* in, char* out, const int64_t* send,
                                            const int64_t* receive, int64_t sent_bytes) {
    int64_t before = 0, total = 0;  // what lies in `in` before this rank's own share, and all of it
    for (int64_t r = 0; r < c->ranks; ++r) {
        if (r < c->rank) before += send[r];
        total += send[r];
    }
    const int64_t own = send[c->rank];
    Running running(*c, kAllToAll, sent_bytes);
    if (running.status != kDone) return running.status;
    const uint64_t signature = signature_of(kAllToAll, 0, 0);
    if (own != receive[c->rank]) return running.status = outcome(kMismatch, c->rank);
    int64_t sizes[kMaxRanks], starts[kMaxRanks];  // what each rank publishes in all, and where this rank's part of it is
    std::copy(send, send + c->ranks, c->counts(c->rank, c->round + 1));
    for (int64_t done = 0, largest = 1; done < largest; done += kSlot) {
        // What is published leaves out the rank's own share: positions from `before` on are shifted by it.
        const int64_t last = std::min(total - own, done + kSlot);
        const Span lower(0, before, done, last), upper(before, total - own, done, last);
        char* slot = c->input(c->rank, c->round + 1);
        copy(slot, in + done, lower.bytes, c->threads);
        copy(slot + upper.start, in + done + upper.start + own, upper.bytes, c->threads);
        if (!running.next_round(signature)) return running.status;
        if (done == 0) {
            for (int64_t r = 0; r < c->ranks; ++r) {
                const int64_t* counts = c->counts(r, running.round());
                if (counts[c->rank] != receive[r]) return running.status = outcome(kMismatch, r);
                starts[r] = sizes[r] = 0;
                for (int64_t to = 0; to < c->ranks; ++to) {
                    if (to == r) continue;
                    if (to < c->rank) starts[r] += counts[to];
                    sizes[r] += counts[to];
                }
                largest = std::max(largest, sizes[r]);
            }
        }
        char* to = out;
        for (int64_t r = 0; r < c->ranks; to += receive[r++]) {
            if (r == c->rank) {
                if (done == 0) copy(to, in + before, own, c->threads);
                continue;
            }
            const int64_t there = std::min(sizes[r], done + kSlot);
            const Span mine(starts[r], starts[r] + receive[r], done, there);
            if (mine.bytes > 0)
                copy(to + done + mine.start - starts[r], c->input(r, running.round()) + mine.start, mine.bytes,
                     c->threads);
        }
    }
    return kDone;
}

EXPORT int32_t shoal_shared_memory_broadcast(Context* c, char* data, int64_t bytes, int32_t root,
                                           int64_t sent_bytes) {
    Running running(*c, kBroadcast, sent_bytes);
    if (running.status != kDone) return running.status;
    const uint64_t signature = signature_of(kBroadcast, root, bytes);
    for (int64_t done = 0; done < bytes || done == 0; done += kSlot) {
        const int64_t length = std::min(kSlot, bytes - done);
        if (c->rank == root) copy(c->input(root, c->round + 1), data + done, length, c->threads);
        if (!running.next_round(signature)) return running.status;
        if (c->rank != root) copy(data + done, c->input(root, running.round()), length, c->threads);
    }
    return kDone;
}

EXPORT int32_t shoal_shared_memory_barrier(Context* c) {
    Running running(*c, kBarrier, 0);
    if (running.status != kDone) return running.status;
    running.next_round(signature_of(kBarrier, 0, 0));
    return running.status;
}

// ---------------------------------------------------------------------------------------------------------------------
// Messages.

// Returns where a part may be written, or -1 while there is no room. The parts in the arena are consecutive, but for one
// jump to its start; an empty arena is used from its start, so that no more memory is touched than is needed at a time.
static int64_t room_for(const Context& c, const Pair& pair, int64_t to, int64_t bytes, uint32_t received) {
    const uint32_t sent = c.sent[to];
    if (sent == received) return 0;
    if (sent - received == kParts) return -1;
    const int64_t oldest = pair.parts[received % kParts].offset, head = c.head[to];
    if (head <= oldest) return head + bytes < oldest ? head : -1;
    if (head + bytes <= kArena) return head;
    return bytes < oldest ? 0 : -1;
}

// Copies the message to the pair's arena. Waits only while the arena has no room.
EXPORT int32_t shoal_shared_memory_send(Context* c, const char* data, int64_t bytes, int32_t to,
                                      int64_t sent_bytes) {
    Running running(*c, kSend, sent_bytes);
    if (running.status != kDone) return running.status;
    Pair& pair = c->pair(c->rank, to);
    for (int64_t done = 0; done < bytes || done == 0; done += kPart) {
        const int64_t length = std::min(kPart, bytes - done);
        const int64_t taken = std::max(int64_t{64}, (length + 63) / 64 * 64);  // each part has an offset of its own
        int64_t offset = -1;
        const auto has_room = [&](uint32_t received) {
            return (offset = room_for(*c, pair, to, taken, received)) >= 0;
        };
        if (!running.wait(pair.received, pair.received_sleepers, to, has_room)) return running.status;
        copy(c->arena(c->rank, to) + offset, data + done, length, c->threads);
        pair.parts[c->sent[to] % kParts] = {offset, length, static_cast<uint64_t>(bytes)};
        c->head[to] = offset + taken;
        publish(pair.sent, pair.sent_sleepers, ++c->sent[to]);
        if (done + length == bytes) break;
    }
    return kDone;
}

EXPORT int32_t shoal_shared_memory_receive(Context* c, char* data, int64_t bytes, int32_t from) {
    Running running(*c, kReceive, 0);
    if (running.status != kDone) return running.status;
    Pair& pair = c->pair(from, c->rank);
    for (int64_t done = 0; done < bytes || done == 0; done += kPart) {
        const uint32_t number = c->received[from];
        const auto there = [number](uint32_t sent) { return sent != number; };
        if (!running.wait(pair.sent, pair.sent_sleepers, from, there)) return running.status;
        const Part part = pair.parts[number % kParts];
        if (part.signature != static_cast<uint64_t>(bytes)) return running.status = outcome(kMismatch, from);
        copy(data + done, c->arena(from, c->rank) + part.offset, part.bytes, c->threads);
        publish(pair.received, pair.received_sleepers, ++c->received[from]);
        if (done + part.bytes == bytes) break;
    }
    return kDone;
}
