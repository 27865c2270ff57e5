// What ops/cuda/decode.cu and several.cu take from the machine, for g++.
// Asynchronous copies happen where they are waited for, so that memory which is read too early, or is asked for again
// before it was read, shows as wrong results. Fragments of mma m16n8k32 and m16n8k16 are laid out as the PTX ISA says.
// The blocks of a cluster run at the same time, clusters one after the other.
#include <cmath>
#include <map>

#include "fibres.h"

#define DEVICE inline
#define __global__
#define __grid_constant__
#define CLUSTER
#define __launch_bounds__(...)
struct alignas(8) Two { u32 v[2]; };
struct alignas(16) Four { u32 v[4]; };
struct Index { int x; };

struct Block {
    int index, running; // fibres
    Meeting meeting;
    std::vector<Four> room;
    unsigned char *start;
};
struct Warp {
    Meeting meeting;
    u32 values[32], a[32][4], b[32][2];
};
struct Copy { void *to; const void *from; int bytes; };
struct Fibre : BareFibre {
    Block *block;
    Warp *warp;
    int thread;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
static Index gridDim;
static Meeting all; // of a cluster
static std::vector<Block> blocks;
#define current static_cast<Fibre *>(running)
#define threadIdx (Index{current->thread})
#define blockIdx (Index{current->block->index})
#define memory (current->block->start)

inline void let_next_begin() {}
inline void wait_for_previous() { current->after = true, unlock(true); }
template <int BYTES> void copy_async(void *to, const void *from) {
    if ((u64)to % BYTES || (u64)from % BYTES) fail("a copy that is not aligned");
    std::memset(to, 0x55, BYTES);
    current->open.push_back({to, from, BYTES});
}
// A barrier's phase is in memory; what it waits for is in a map.
struct Awaited { bool expected = false; long bytes = 0; std::vector<Copy> copies; };
static std::map<u64 *, Awaited> awaited;
inline void barrier_init(u64 *barrier) { *barrier = 0, awaited[barrier] = Awaited(); }
inline void barriers_ready() {}
inline void expect(u64 *barrier, u32 bytes) {
    Awaited &here = awaited.at(barrier);
    if (here.expected) fail("a barrier that is expected twice");
    here.expected = true, here.bytes += bytes;
}
inline void copy_bulk(void *to, const void *from, u32 bytes, u64 *barrier) {
    if ((u64)to % 16 || (u64)from % 16 || bytes % 16 || bytes == 0) fail("a copy that is not aligned");
    std::memset(to, 0x55, bytes);
    awaited.at(barrier).bytes -= bytes, awaited.at(barrier).copies.push_back({to, from, (int)bytes});
}
inline void wait_for(u64 *barrier, u32 parity) {
    while (*barrier == parity) {
        Awaited &here = awaited.at(barrier);
        if (here.expected && here.bytes == 0) {
            for (const Copy &copy : here.copies) std::memcpy(copy.to, copy.from, copy.bytes);
            here = Awaited(), *barrier ^= 1, idle = 0;
        } else {
            give_way();
        }
    }
}
template <class T> T load_now(const T *from) {
    if ((u64)from % sizeof(T)) fail("a load that is not aligned");
    return *from;
}
inline void commit() {
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}
template <int LEFT> void wait() {
    while (current->groups.size() > LEFT) {
        for (const Copy &copy : current->groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
        current->groups.erase(current->groups.begin());
    }
}
inline void shared_max(u32 *to, u32 value) { *to = *to > value ? *to : value; }
inline void __syncthreads() { meet(current->block->meeting); }
inline void all_sync() { meet(all); }
template <class T> T load_of(const T *from, int rank) {
    const u64 at = (u64)from - (u64)memory;
    if (blocks.at(rank).running == 0) fail("memory of a block that has ended");
    return *(const T *)(blocks.at(rank).start + at);
}
inline Warp &warp_here() { return *current->warp; }
inline int lane_here() { return current->thread % 32; }
inline void warp_sync() { meet(warp_here().meeting); }

inline Warp &with_operands(u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Warp &w = warp_here();
    const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    std::memcpy(w.a[lane_here()], a, sizeof a);
    std::memcpy(w.b[lane_here()], b, sizeof b);
    meet(w.meeting);
    return w;
}
inline void mma(int *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int lane = lane_here(), g = lane / 4, t = lane % 4;
    Warp &w = with_operands(a0, a1, a2, a3, b0, b1);
    const auto byte = [](u32 word, int i) { return (int)(signed char)(word >> 8 * i); };
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < 32; k++)
            c[i] += byte(w.a[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)], k % 4)
                  * byte(w.b[column * 4 + k % 16 / 4][k / 16], k % 4);
    }
    meet(w.meeting);
}
inline float half_at(u32 word, int i) {
    const u16 bits = (u16)(word >> 16 * i);
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return (float)h;
}
inline void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int lane = lane_here(), g = lane / 4, t = lane % 4;
    Warp &w = with_operands(a0, a1, a2, a3, b0, b1);
    for (int i = 0; i < 4; i++) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; k++)
            sum += half_at(w.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k % 2)
                 * half_at(w.b[column * 4 + k % 8 / 2][k / 8], k % 2);
        c[i] += sum;
    }
    meet(w.meeting);
}
inline u32 exchange(u32 value, const std::function<u32(const u32 *)> &take) {
    Warp &w = warp_here();
    w.values[lane_here()] = value;
    meet(w.meeting);
    const u32 found = take(w.values);
    meet(w.meeting);
    return found;
}
inline u32 warp_max(u32 value) {
    return exchange(value, [](const u32 *v) {
        u32 most = 0;
        for (int i = 0; i < 32; i++) most = v[i] > most ? v[i] : most;
        return most;
    });
}
#define __uint_as_float(x) of_bits(x)
#define __float_as_uint(x) bits_of(x)
template <class T> T from_lane_xor(T value, int other) {
    const int lane = lane_here();
    u32 bits[sizeof(T) / 4];
    std::memcpy(bits, &value, sizeof value);
    for (u32 &one : bits) one = exchange(one, [=](const u32 *v) { return v[lane ^ other]; });
    std::memcpy(&value, bits, sizeof value);
    return value;
}
inline int from_first_lane(int value) { return (int)exchange((u32)value, [](const u32 *v) { return v[0]; }); }
inline u32 bytes_of(u32 low, u32 high, u32 which) {
    const u64 both = (u64)high << 32 | low;
    u32 found = 0;
    for (int i = 0; i < 4; i++) found |= (u32)(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
inline int __float2int_rn(float x) { return std::isfinite(x) ? (int)std::nearbyint(x) : 0; }
inline float of_half(u16 x) { _Float16 h; std::memcpy(&h, &x, 2); return (float)h; }
inline u16 to_half(float x) { const _Float16 h = (_Float16)x; u16 bits; std::memcpy(&bits, &h, 2); return bits; }
inline u16 to_bfloat(float x) {
    if (std::isnan(x)) return 0x7fff;
    const u32 bits = bits_of(x);
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 to_halves(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }

// Run blocks of threads, one cluster of them after the other.
inline void run_blocks(int grid, int together, int threads, int bytes, std::function<void()> kernel) {
    body = [=] { kernel(), current->block->running--; };
    gridDim.x = grid;
    if (grid % together) fail("a cluster that is not whole");
    for (int first = 0; first < grid; first += together) {
        all = {threads * together, 0, 0};
        blocks.assign(together, Block());
        std::vector<Warp> warps(threads / 32 * together);
        for (Warp &warp : warps) warp.meeting.size = 32;
        std::vector<std::unique_ptr<Fibre>> fibres;
        for (int i = 0; i < together; i++) {
            Block &block = blocks[i];
            block.index = first + i, block.running = block.meeting.size = threads;
            block.room.resize(bytes / 16 + 9);
            std::memset(block.room.data(), 0xff, block.room.size() * 16);
            block.start = (unsigned char *)(((u64)block.room.data() + 127) / 128 * 128);
            for (int thread = 0; thread < threads; thread++) {
                auto fibre = std::make_unique<Fibre>();
                fibre->thread = thread, fibre->block = &block, fibre->warp = &warps[(i * threads + thread) / 32];
                prepare(*fibre);
                fibres.push_back(std::move(fibre));
            }
        }
        run_all(fibres);
    }
}
