// What ops/cuda/wide.cu takes from the machine, for g++.
// wgmma happens where it is waited for, so that memory and registers that are given back too early show as wrong
// results. The layouts are those of the PTX ISA: fragments of wgmma m64nNk16, descriptors, and the swizzle of 128 bytes
// by address bits.
#include <algorithm>
#include <cmath>
#include <map>

#include "fibres.h"

#define DEVICE inline
#define __global__
#define __shared__
#define __grid_constant__
struct float4 { float x, y, z, w; };
struct Index { int x, y, z; };

struct Arrivals { // an mbarrier
    int count = 0, pending = 0, bytes = 0, phase = 0;
    void check() { if (pending == 0 && bytes == 0) pending = count, phase ^= 1; }
};
struct Product { const unsigned *a[128]; u64 descriptor; };
struct Warpgroup {
    Meeting meeting;
    std::vector<std::unique_ptr<Product>> products;
};
struct Cluster;
struct Block {
    Cluster *cluster;
    Index index;
    unsigned rank;
    std::vector<unsigned char> memory;
    std::map<unsigned, Arrivals> arrivals;
    Meeting all, multipliers, told[4], warps[WARPS + 4];
    unsigned lanes[WARPS + 4][2][32];
    Warpgroup groups[2];
};
struct Cluster { std::vector<std::unique_ptr<Block>> blocks; Meeting all; };
struct Fibre : BareFibre {
    Block *block;
    Index thread;
    int issued = 0, finished = 0;       // products
    std::vector<int> groups;            // products up to each commit
    std::vector<float *> sums;          // of each product
};
#define current static_cast<Fibre *>(running)
#define threadIdx (current->thread)
#define blockIdx (current->block->index)
static char memory[1];
static Index gridDim;

DEVICE unsigned shared_address(const void *) { return 1040; } // not aligned: the kernel does that
DEVICE unsigned cluster_rank() { return current->block->rank; }
DEVICE void cluster_sync() { meet(current->block->cluster->all); }
DEVICE void __syncthreads() { meet(current->block->all); }
DEVICE void __syncwarp() { meet(current->block->warps[current->thread.x / 32]); }
DEVICE void multipliers_sync() { meet(current->block->multipliers); }
template <int ID> void told_wait() { meet(current->block->told[ID]); }
template <int ID> void told_arrive() {
    Meeting &m = current->block->told[ID];
    if (++m.here == m.size) m.here = 0, m.round++;
    idle = 0;
}
DEVICE unsigned in_block(unsigned address, unsigned rank) { return (rank + 1) << 24 | address; }
inline Block &block_of(unsigned address) {
    const unsigned rank = address >> 24;
    return rank ? *current->block->cluster->blocks.at(rank - 1) : *current->block;
}
inline unsigned char *memory_of(Block &block, unsigned address, int bytes) {
    address &= 0xffffff;
    if (address + bytes > block.memory.size() || address < 1024 || address % bytes) fail("a wrong address");
    return block.memory.data() + address;
}
inline Arrivals &arrivals_of(Block &block, unsigned address) {
    auto found = block.arrivals.find(address & 0xffffff);
    if (found == block.arrivals.end()) fail("no barrier there");
    return found->second;
}
DEVICE void barrier_init(unsigned barrier, int count) {
    memory_of(*current->block, barrier, 8);
    current->block->arrivals[barrier] = {count, count, 0, 0};
}
DEVICE void barriers_ready() {}
inline void arrive(Arrivals &a, int bytes) {
    if (a.pending == 0) fail("one arrival too many");
    a.pending--, a.bytes += bytes, idle = 0;
    a.check();
}
DEVICE void barrier_expect(unsigned barrier, int bytes) { arrive(arrivals_of(*current->block, barrier), bytes); }
DEVICE void barrier_arrive(unsigned barrier) { arrive(arrivals_of(*current->block, barrier), 0); }
DEVICE void barrier_arrive_at(unsigned barrier, unsigned rank) {
    arrive(arrivals_of(block_of(in_block(barrier, rank)), barrier), 0);
}
DEVICE void barrier_wait(unsigned barrier, int phase) {
    while (arrivals_of(*current->block, barrier).phase == phase) give_way();
}
inline void brought(Block &block, unsigned barrier, int bytes) {
    Arrivals &a = arrivals_of(block, barrier);
    a.bytes -= bytes, idle = 0;
    if (a.pending < a.count) a.check(); // before anything is expected, a phase does not end
}

DEVICE void kernel_after_may_begin() {}
DEVICE void kernel_before_ended() { current->after = true, unlock(true); }
inline void only_after() { if (!current->after) fail("the kernel before may still run"); }

// opaque: pointer, columns, tokens, halves, strides of tokens and halves in elements
DEVICE void bring_tile(unsigned to, const Map *map, int column, int token, int half, unsigned barrier, u16 blocks) {
    only_after();
    const u16 *x = (const u16 *)map->opaque[0];
    const long m = map->opaque[1], tokens = map->opaque[2], halves = map->opaque[3];
    if (to % 1024 || half >= halves) fail("a wrong tile");
    for (unsigned rank = 0; rank < current->block->cluster->blocks.size(); rank++) {
        if (PAIR == 1 ? rank != current->block->rank : !(blocks >> rank & 1)) continue;
        Block &block = *current->block->cluster->blocks[rank];
        for (int i = 0; i < TOKENS; i++)
            for (int j = 0; j < 64; j++) {
                const bool inside = token + i < tokens && column + j < m;
                const u16 value = inside ? x[(token + i) * map->opaque[4] + half * map->opaque[5] + column + j] : 0;
                const unsigned at = to + i * 128 + ((j / 8) ^ (i % 8)) * 16 + j % 8 * 2;
                std::memcpy(memory_of(block, at, 2), &value, 2);
            }
        brought(block, barrier, TOKENS * 128);
    }
}
// opaque: pointer, columns, rows, passes, chunks, strides of rows, passes and chunks in elements
DEVICE void bring_words(unsigned to, const Map *map, int part, int row, int pass, int chunk, unsigned barrier) {
    const u16 *words = (const u16 *)map->opaque[0] + pass * map->opaque[6] + chunk * map->opaque[7];
    const int columns = map->opaque[1], rows = map->opaque[2];
    if (to % 1024 || pass >= (int)map->opaque[3] || chunk >= (int)map->opaque[4]) fail("wrong words");
    for (int i = 0; i < BLOCK_ROWS; i++)
        for (int j = 0; j < 64; j++) {
            const bool inside = row + i < rows && part * 64 + j < columns;
            const u16 value = inside ? words[(row + i) * map->opaque[5] + part * 64 + j] : 0;
            std::memcpy(memory_of(*current->block, to + i * 128 + ((j / 8) ^ (i % 8)) * 16 + j % 8 * 2, 2), &value, 2);
        }
    brought(*current->block, barrier, BLOCK_ROWS * 128);
}
DEVICE void prefetch(const Map *) {}
DEVICE void prefetch_line(const void *) {} // nothing is read, so it may come early
template <class T> T shared(unsigned address) {
    T found;
    std::memcpy(&found, memory_of(block_of(address), address, sizeof(T)), sizeof(T));
    return found;
}
DEVICE unsigned load_shared(unsigned address) { return shared<unsigned>(address); }
DEVICE float4 load_shared4(unsigned address) { return shared<float4>(address); }
DEVICE void store_cluster4(unsigned address, unsigned rank, const float *v) {
    address = in_block(address, rank);
    std::memcpy(memory_of(block_of(address), address, 16), v, 16);
}
DEVICE void store_transposed(unsigned at, unsigned first, unsigned second) {
    const int warp = current->thread.x / 32, lane = current->thread.x % 32;
    auto &lanes = current->block->lanes[warp];
    lanes[0][lane] = first, lanes[1][lane] = second;
    __syncwarp();
    for (int i = 0; i < 8 && lane < 16; i++) {
        const u16 value = (u16)(lanes[lane / 8][i * 4 + lane % 8 / 2] >> lane % 2 * 16);
        std::memcpy(memory_of(*current->block, at + 2 * i, 2), &value, 2);
    }
    __syncwarp();
}
DEVICE void before_fetching() {}
DEVICE void more_registers() {}
DEVICE void fewer_registers() {}

#define __float_as_int(x) ((int)bits_of(x))
#define __int_as_float(x) of_bits((unsigned)(x))
#define __float_as_uint(x) bits_of(x)
#define __uint_as_float(x) of_bits(x)
struct Bfloat {
    static float to(u16 bits) { return of_bits((unsigned)bits << 16); }
    static u16 from(double x) { // by way of float32 that is odd where something was cut off
        float f = (float)x;
        if (std::isnan(f)) return 0x7fff;
        unsigned bits = bits_of(f);
        if (std::fabs((double)f) > std::fabs(x)) bits--;
        if ((double)of_bits(bits) != x && std::isfinite(x)) bits |= 1;
        return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};
template <class F> unsigned pairwise(F f, unsigned a, unsigned b, unsigned c = 0) {
    const auto one = [&](int i) {
        const double x = Bfloat::to(a >> i), y = Bfloat::to(b >> i), z = Bfloat::to(c >> i);
        return (unsigned)Bfloat::from(f(x, y, z));
    };
    return one(0) | one(16) << 16;
}
DEVICE unsigned add(unsigned a, unsigned b) {
    return pairwise([](double x, double y, double) { return x + y; }, a, b);
}
DEVICE unsigned subtract(unsigned a, unsigned b) {
    return pairwise([](double x, double y, double) { return x - y; }, a, b);
}
DEVICE unsigned multiply(unsigned a, unsigned b) {
    return pairwise([](double x, double y, double) { return x * y; }, a, b);
}
DEVICE unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    return pairwise([](double x, double y, double z) { return x * y + z; }, a, b, c);
}
DEVICE unsigned multiply_subtract(unsigned a, unsigned b, unsigned c) {
    return pairwise([](double x, double y, double z) { return x * y - z; }, a, b, c);
}
DEVICE float reciprocal(float x) { // subnormal numbers are 0
    const float y = 1.0f / (std::fabs(x) < 0x1p-126f ? 0.0f * x : x);
    return std::fabs(y) < 0x1p-126f ? 0.0f : y;
}
DEVICE unsigned and_xor(unsigned a, unsigned b, unsigned c) { return (a & b) ^ c; }
DEVICE unsigned even_odd(unsigned a, unsigned b) { return (a & 0xAAAAAAAAu) | (b & 0x55555555u); }
DEVICE unsigned bfloats(float low, float high) { return Bfloat::from(low) | (unsigned)Bfloat::from(high) << 16; }
DEVICE float of_half(u16 bits) { _Float16 h; std::memcpy(&h, &bits, 2); return (float)h; }
DEVICE void store_far4(float *to, const float *v) { only_after(), std::memcpy(to, v, 16); }
DEVICE float4 load_far4(const float *from) { only_after(); return {from[0], from[1], from[2], from[3]}; }
DEVICE void flag_set(int *flag) {
    only_after();
    if (*flag) fail("a flag that is set twice");
    *flag = 1, idle = 0;
}
DEVICE void flag_take(int *flag) {
    only_after();
    while (*flag == 0) give_way(); // a block that has ended: in order
    *flag = 0;
}

inline Warpgroup &group() { return current->block->groups[current->thread.x / 128]; }
DEVICE void mma_fence() {}
DEVICE void mma(float *sums, const unsigned *a, u64 descriptor) {
    Warpgroup &g = group();
    if ((int)g.products.size() <= current->issued) g.products.push_back(std::make_unique<Product>());
    Product &product = *g.products[current->issued++];
    product.a[current->thread.x % 128] = a;
    product.descriptor = descriptor;
    current->sums.push_back(sums);
}
DEVICE void mma_commit() { current->groups.push_back(current->issued); }
template <int N> DEVICE void mma_wait() {
    Warpgroup &g = group();
    meet(g.meeting);
    const int last = (int)current->groups.size() - N;
    const int thread = current->thread.x % 128, warp = thread / 32, row = thread % 32 / 4, t = thread % 4;
    for (; last > 0 && current->finished < current->groups[last - 1]; current->finished++) {
        const Product &product = *g.products[current->finished];
        float *sums = current->sums[current->finished];
        const unsigned start = (product.descriptor & 0x3fff) << 4, stride = (product.descriptor >> 32 & 0x3fff) << 4;
        if (product.descriptor >> 62 != 1) fail("a descriptor of another swizzle");
        float a[2][16];
        for (int half = 0; half < 2; half++)
            for (int k = 0; k < 16; k++) {
                const unsigned two = product.a[warp * 32 + row * 4 + k % 8 / 2][k / 8 * 2 + half];
                a[half][k] = Bfloat::to((u16)(two >> k % 2 * 16));
            }
        for (int n = 0; n < COLUMNS; n++) {
            if (n / 2 % 4 != t) continue;
            for (int k = 0; k < 16; k++) {
                unsigned at = start + n / 8 * stride + n % 8 * 128 + k * 2;
                at ^= (at >> 7 & 7) << 4;
                const float b = Bfloat::to(shared<u16>(at));
                for (int half = 0; half < 2; half++) sums[n / 8 * 4 + half * 2 + n % 2] += a[half][k] * b;
            }
        }
    }
    meet(g.meeting);
}

// Run a cluster of blocks.
inline void run_cluster(int x0, int pair, int split, int bytes, void (*kernel)()) {
    body = kernel;
    Cluster cluster;
    std::vector<std::unique_ptr<Fibre>> fibres;
    const int threads = MULTIPLIERS + 128;
    for (int i = 0; i < pair * split; i++) {
        auto block = std::make_unique<Block>();
        block->cluster = &cluster;
        block->index = {x0 + i % pair, i / pair, 0};
        block->rank = i;
        block->memory.assign(1040 + bytes, 0xff); // NaN
        block->all.size = threads, block->multipliers.size = MULTIPLIERS;
        for (auto &warp : block->warps) warp.size = 32;
        for (auto &told : block->told) told.size = MULTIPLIERS + 32;
        for (auto &group : block->groups) group.meeting.size = 128;
        for (int thread = 0; thread < threads; thread++) {
            auto fibre = std::make_unique<Fibre>();
            fibre->block = block.get();
            fibre->thread = {thread, 0, 0};
            prepare(*fibre);
            fibres.push_back(std::move(fibre));
        }
        cluster.blocks.push_back(std::move(block));
    }
    cluster.all.size = threads * pair * split;
    run_all(fibres);
}
