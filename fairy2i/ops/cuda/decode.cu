// Products of packed layers with few tokens: phase codes, scales of the tensor or of rows.
//
// Digits, for the fewest tokens: sums of integers. Signs become operands of int8 tensor cores with one instruction for four: an int32 of words AND (0x01010101 << b) is
// four numbers bit * 2^b. Activations are integers: X = x * 2^e, rounded, e from the largest of the token; X * 2^(7 - b)
// (negated for b = 7, whose bit is -128) is cut into four signed digits of 8 bits. The 8 columns of a product are
// (digit, part), part 0 real and 1 imaginary, of ONE token; its 16 rows are the signs p of 8 rows of the codes, then q.
// Sums of integers are exact.
//
// Halves (HALVES), for up to 16 tokens of bf16 or fp16: sums in float32. An int32 of words AND (0x00010001 << b), b < 8,
// is two fp16 numbers bit * 2^(b - 24), denormals; bits 8 to 15 are moved to the right by 8 first. Activations are fp16
// numbers x * 2^(e + 7 - b), e from the largest of the token, which becomes 2^8 or more: all that is lost is below 2^-32
// of it. The 8 columns of a product are (token, part) of 4 tokens: a quarter of the products of digits, but twice the
// instructions for signs.
//
// The order of all sums is fixed: a result has the same bits in each run.
//
//     unit      8 rows of the codes (a tile) times a slice of 128 J columns, all signs: a lane (g = lane / 4 is the
//               row, t = lane % 4) has J int32 of each sign, 4 J neighbouring bytes, and copies them itself into a
//               place of shared memory that only it reads, DEPTH units ahead: no barrier, no registers
//     columns   int32 v = J t + j of a slice, byte y, bit b: column (16 c + b + 8 (y & 1)) BK + 8 J h + 2 v + (y >> 1),
//               slice h of chunk c. The activations are put in this order once a block, as fragments. For halves,
//               b has 4 bits and y 1: column (16 c + b) BK + 8 J h + 2 v + y
//     ranges    the blocks of a cluster (RANGES) have the same tiles, and each a range of the slices: fragments of many
//               tokens and columns do not fit into one, and take their time. They add up out of each other's memory
//     warps     `parts` of them share a tile, each has every so many-th slice; the others have other tiles. At the end
//               of a tile a warp knows its part of 16 outputs; parts are added once, at the end of the block
//     signs     bits are 0 or 1: the sum of +-X 2^7 is 2 acc - S, S the sum for bits that are all 1
//
// float32 activations are two integers each (PIECES), 46 bits; others one of 22 bits, a magic number's mantissa.
// Activations that are not finite make their token's outputs NaN. Where the largest of a token is below 2^-105 (halves:
// 2^-112), its bits get fewer.
//
// Compiled at run time for: STAGES G BK (of the words), HALVES, TOKENS (1, 2 or 4; halves: 4, 8, 12 or 16), KIND (of x and y: 1 float32, 2 bf16,
// 3 fp16), ALIGNED (whether 4 activations can be read at once), J (2, or 4 where BK is 32), WARPS, DEPTH, BLOCKS (of a
// multiprocessor), RANGES, JOBS (16 activations of a lane each, for a warp).

typedef unsigned u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
struct alignas(8) Two { u32 v[2]; };
struct alignas(16) Four { u32 v[4]; };
extern __shared__ __align__(128) unsigned char memory[];

template <int BYTES> DEVICE void copy_async(void *to, const void *from) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8;" ::"r"(address), "l"(from) : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
DEVICE void mma(int *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE Two load_now(const Two *from) { // before what follows: the compiler would rather load later
    Two found;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(found.v[0]), "=r"(found.v[1]) : "l"(from) : "memory");
    return found;
}
DEVICE Four load_now(const Four *from) {
    Four found;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.v[0]), "=r"(found.v[1]), "=r"(found.v[2]), "=r"(found.v[3]) : "l"(from) : "memory");
    return found;
}
DEVICE u32 warp_max(u32 value) { return __reduce_max_sync(0xffffffffu, value); }
DEVICE float from_lane_xor(float value, int other) { return __shfl_xor_sync(0xffffffffu, value, other); }
DEVICE u32 bytes_of(u32 low, u32 high, u32 which) { return __byte_perm(low, high, which); }
DEVICE float of_half(u16 x) {
    float found;
    asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"(x));
    return found;
}
DEVICE u16 to_half(float x) {
    u16 found;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(found) : "f"(x));
    return found;
}
DEVICE u16 to_bfloat(float x) {
    u16 found;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(found) : "f"(x));
    return found;
}
DEVICE u32 to_halves(float low, float high) {
    u32 found;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(high), "f"(low));
    return found;
}
DEVICE void shared_max(u32 *to, u32 value) { atomicMax(to, value); }
#if RANGES > 1
#define CLUSTER __cluster_dims__(RANGES, 1, 1)
DEVICE void all_sync() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }
DEVICE Two load_of(const Two *from, int rank) { // from the same place of another block of the cluster
    Two found;
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"((u32)__cvta_generic_to_shared(from)), "r"(rank));
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(found.v[0]), "=r"(found.v[1]) : "r"(address) : "memory");
    return found;
}
#else
#define CLUSTER
DEVICE void all_sync() { __syncthreads(); }
DEVICE Two load_of(const Two *from, int) { return *from; }
#endif
#else
#include "decode_on_cpu.h"
#endif

constexpr int THREADS = WARPS * 32;
constexpr int PAIRS = 2 * STAGES;        // (p, q): U and W of each stage
constexpr int PIECES = KIND == 1 ? 2 : 1;
constexpr int TILES = HALVES ? TOKENS / 4 : TOKENS * PIECES; // products of 8 columns
constexpr int SIZE = KIND == 1 ? 4 : 2;  // bytes of an activation
constexpr int SLICES = BK / (8 * J);     // of a chunk
constexpr int MASKS = HALVES ? 8 : 4;    // pairs of bits of an operand's int32
constexpr int QUADS = MASKS * J / 2;     // of a slice: 4 registers of B, two steps of 32 columns (halves: 16)
constexpr int PLACE = 32 * 4 * J;        // bytes of a sign of a unit
constexpr int UNIT = 2 * PAIRS * PLACE;
constexpr int TOP = HALVES ? 135 : KIND == 1 ? 149 : 148; // X < 2^9, 2^23 or 2^22
constexpr int LEAST = TOP - (HALVES ? 119 : 126);         // exponent of the largest activation
constexpr u32 ONE_BIT = HALVES ? 0x00010001u : 0x01010101u;
template <int> struct SumOf { typedef int Type; };
template <> struct SumOf<1> { typedef float Type; };
typedef SumOf<HALVES>::Type Sum;
constexpr bool LATE = PAIRS * TILES > 24; // scales are loaded when sums are known: registers are scarce

struct Arguments {
    const void *x;
    const u16 *words;
    const float *scales;
    const void *bias;
    const int *places;
    void *y;
    i64 x_stride, y_stride, chunk_stride, pass_stride;
    int tokens, n, m, chunks;
    int bias_kind;       // as KIND
    int scale_width;     // between two scales of a row: n, or 1 where they are the tensor's
    int scale_step;      // between rows: 1 or 0
    int log_parts;       // warps of a tile
    int batch;           // tiles between two barriers
};

DEVICE float number(u16 x, int kind) { return kind == 2 ? __uint_as_float((u32)x << 16) : of_half(x); }

DEVICE float load_number(const void *from, i64 at, int kind) {
    return kind == 1 ? ((const float *)from)[at] : number(((const u16 *)from)[at], kind);
}

template <int COUNT> struct Several { typedef Two Type; };
template <> struct Several<4> { typedef Four Type; };
typedef Several<SIZE>::Type Fourfold; // 4 neighbouring activations

// activations of a part from column `at`, zeros outside
DEVICE Fourfold load_four(const Arguments &a, i64 row, int at) {
    Fourfold found = {};
    const unsigned char *from = (const unsigned char *)a.x + (row + at) * SIZE;
    if (ALIGNED) {
        if (at < a.m) found = load_now((const Fourfold *)from);
    } else {
        for (int i = 0; i < 4; i++)
            if (at + i < a.m) {
                if (KIND == 1)
                    found.v[i % SIZE] = ((const u32 *)from)[i];
                else
                    found.v[i / 2] |= (u32)((const u16 *)from)[i] << 16 * (i % 2);
            }
    }
    return found;
}

DEVICE float number_of(const Fourfold &x, int i) {
    if (KIND == 1) return __uint_as_float(x.v[i % SIZE]);
    if (KIND == 2) return __uint_as_float(i % 2 ? x.v[i / 2] & 0xffff0000u : x.v[i / 2] << 16);
    return of_half((u16)(x.v[i / 2] >> 16 * (i % 2)));
}

// the bits of the largest magnitude so far: of float32, or 16 bits in the upper half
DEVICE u32 larger(u32 most, const Fourfold &x) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) {
        const u32 one = x.v[i] & (KIND == 1 ? 0x7fffffffu : 0x7fff0000u);
        most = most > one ? most : one;
        if (KIND != 1) {
            const u32 other = x.v[i] << 16 & 0x7fffffffu;
            most = most > other ? most : other;
        }
    }
    return most;
}

// The words of a warp's units, one after the other, on their way into shared memory.
struct Fetcher {
    const u16 *words; // of the lane in row 0, slice 0
    unsigned char *to;
    int tile, slice, slot;

    DEVICE void next(const Arguments &a, int last, int again, int end, int groups, int g) {
        if (tile < last) {
            int row = tile * 8 + g;
            row = row < a.n ? row : a.n - 1;
            const u16 *from = words + (slice / SLICES) * a.chunk_stride + (i64)row * (G * BK) + slice % SLICES * (8 * J);
            unsigned char *here = to + slot * UNIT;
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
                for (int q = 0; q < 2; q++)
                    copy_async<4 * J>(here + (2 * pair + q) * PLACE,
                                      from + pair / (G / 2) * a.pass_stride + (2 * (pair % (G / 2)) + q) * BK);
            slice += 1 << a.log_parts;
            if (slice >= end) slice = again, tile += groups;
        }
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        commit();
    }
};

// exponent of the largest activation of a token, from what `larger` found
DEVICE int exponent_of(u32 size) {
    if (KIND == 3) size = __float_as_uint(of_half((u16)(size >> 16)));
    return (int)(size >> 23) > LEAST ? (int)(size >> 23) : LEAST;
}
DEVICE float power_of_two(int exponent) { return __uint_as_float((u32)(exponent + 127) << 23); }

DEVICE void load_scales(const Arguments &a, int row, float (*scale)[2]) {
    row = row < a.n ? row : a.n - 1;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) scale[i / 2][i % 2] = a.scales[(i64)i * a.scale_width + row * a.scale_step];
}

// what the sums of a row and a tile give to the outputs; (p + q) / 2 = accP + accQ - S, (p - q) / 2 = accP - accQ
DEVICE void outputs(const Sum (*acc)[TILES][4], int tile, const Sum *ones, const float (*scale)[2], float &re, float &im) {
    re = im = 0.0f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        const Sum *c = acc[pair][tile];
        const float sum_re = (float)(c[0] + c[2] - ones[0]), sum_im = (float)(c[1] + c[3] - ones[1]);
        const float gap_re = (float)(c[0] - c[2]), gap_im = (float)(c[1] - c[3]);
        re += scale[pair][0] * sum_re;
        im += scale[pair][1] * gap_re;
        if (pair % 2 == 0) { // U x
            re -= scale[pair][1] * gap_im;
            im += scale[pair][0] * sum_im;
        } else { // W conj(x)
            re += scale[pair][1] * gap_im;
            im -= scale[pair][0] * sum_im;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) CLUSTER multiply_few(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int parts = 1 << a.log_parts, part = warp & (parts - 1), group = warp >> a.log_parts, groups = WARPS >> a.log_parts;
    const int rank = blockIdx.x % RANGES, cluster = blockIdx.x / RANGES, clusters = gridDim.x / RANGES;
    const int before = a.chunks * SLICES * rank / RANGES, end_slice = a.chunks * SLICES * (rank + 1) / RANGES;
    const int slices = end_slice - before, tiles = (a.n + 7) / 8; // slices of this block
    const int first = (int)((i64)tiles * cluster / clusters), last = (int)((i64)tiles * (cluster + 1) / clusters);
    unsigned char *const fragments = memory + WARPS * DEPTH * UNIT; // [slice][quad][tile][lane] of 16 bytes
    // [tile][part][token][row][half], 16 numbers between tiles: other banks. In all blocks of a cluster at the same place
    float *const sums = (float *)(fragments + (a.chunks * SLICES + RANGES - 1) / RANGES * QUADS * TILES * 512);
    const int tile_sums = (parts * TOKENS + 1) * 16;
    u32 *const largest = (u32 *)(sums + a.batch * tile_sums); // [token]
    Sum *const parts_of_ones = (Sum *)(largest + TOKENS);     // [half of a slice][tile][t][part]
    if (threadIdx.x < TOKENS) largest[threadIdx.x] = 0;

    // activations first: what comes after them waits for them
    const int i = lane / 8, half = lane / 4 % 2;
    Fourfold x[JOBS][2][2]; // of bits 2 i + e, and 8 more
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        const int piece = (warp + job * WARPS) / TOKENS, its = (warp + job * WARPS) % TOKENS;
        const int slice = before + piece / (J / 2);
        const int at = slice / SLICES * 16 * BK + slice % SLICES * (8 * J) + 2 * J * t + piece % (J / 2) * 4;
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int more = 0; more < 2; more++)
                x[job][e][more] = load_four(a, (its < a.tokens ? its : a.tokens - 1) * a.x_stride + half * a.m,
                                            at + (2 * i + e + 8 * more) * BK);
    }
    Fetcher fetcher = {a.words + 2 * J * t, memory + warp * (DEPTH * UNIT) + lane * (4 * J), first + group, before + part, 0};
#pragma unroll 1
    for (int d = 0; d < DEPTH; d++) fetcher.next(a, last, before + part, end_slice, groups, g);

    __syncthreads();
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        u32 most = 0;
#pragma unroll
        for (int k = 0; k < 4; k++) most = larger(most, x[job][k / 2][k % 2]);
        most = warp_max(most);
        if (lane == 0) shared_max(largest + (warp + job * WARPS) % TOKENS, most);
    }
    __syncthreads();
    float down[HALVES ? TILES : TOKENS]; // of the lane's sums
#pragma unroll
    for (int k = 0; k < (HALVES ? TILES : TOKENS); k++) {
        const u32 size = largest[HALVES ? 4 * k + t : k];
        down[k] = power_of_two(exponent_of(size) - TOP) * (HALVES ? 1.0f : 1.0f / 128 * (float)(1 << 8 * t));
        if (size >= (KIND == 3 ? 0x7c000000u : 0x7f800000u)) down[k] = __uint_as_float(0x7fc00000u);
    }

    // fragments: a lane makes 16 columns of a part, 4 digits each, or as many halves
    u32 times[2], plus[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        times[e] = i == 3 && e == 1 ? ~0u : 128u >> (2 * i + e);
        plus[e] = 0x80808080u - (KIND == 1 ? 0u : 0x4b400000u * times[e]);
    }
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        const int piece = (warp + job * WARPS) / TOKENS, its = (warp + job * WARPS) % TOKENS;
        if (piece >= slices * (J / 2)) break;
        const float up = power_of_two(TOP - exponent_of(largest[its]));
        if (HALVES) {
#pragma unroll
            for (int more = 0; more < 2; more++) {
                Four b;
#pragma unroll
                for (int e = 0; e < 2; e++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const Fourfold &from = x[job][e][more];
                        const float factor = up * (float)(128 >> (2 * i + e));
                        b.v[2 * e + j] = to_halves(number_of(from, 2 * j) * factor, number_of(from, 2 * j + 1) * factor);
                    }
                ((Four *)fragments)[((piece * 8 + i + 4 * more) * TILES + its / 4) * 32 + its % 4 * 8 + 4 * half + t] = b;
            }
            continue;
        }
#pragma unroll
        for (int rest = 0; rest < PIECES; rest++) {
            Four digits[4];
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    u32 z[4];
#pragma unroll
                    for (int y = 0; y < 4; y++) {
                        const float value = number_of(x[job][e][y & 1], 2 * j + (y >> 1)) * up;
                        if (KIND == 1) {
                            int whole = __float2int_rn(value);
                            if (rest) whole = __float2int_rn((value - (float)whole) * 8388608.0f);
                            z[y] = (u32)whole * times[e] + plus[e];
                        } else {
                            z[y] = __float_as_uint(value + 12582912.0f) * times[e] + plus[e];
                        }
                    }
                    const u32 low01 = bytes_of(z[0], z[1], 0x5140), low23 = bytes_of(z[2], z[3], 0x5140);
                    const u32 high01 = bytes_of(z[0], z[1], 0x7362), high23 = bytes_of(z[2], z[3], 0x7362);
                    digits[0].v[2 * e + j] = bytes_of(low01, low23, 0x5410) ^ 0x80808080u;
                    digits[1].v[2 * e + j] = bytes_of(low01, low23, 0x7632) ^ 0x80808080u;
                    digits[2].v[2 * e + j] = bytes_of(high01, high23, 0x5410) ^ 0x80808080u;
                    digits[3].v[2 * e + j] = bytes_of(high01, high23, 0x7632) ^ 0x80808080u;
                }
            Four *to = (Four *)fragments + ((piece * 4 + i) * TILES + its * PIECES + rest) * 32 + 4 * half + t;
#pragma unroll
            for (int digit = 0; digit < 4; digit++) to[8 * digit] = digits[digit];
        }
    }
    __syncthreads();

    const Four *const mine = (const Four *)fragments + lane;
    for (int item = warp; item < 2 * slices; item += WARPS) { // S of half a slice
        Sum all[TILES][2][4] = {};
#pragma unroll
        for (int quad = 0; quad < QUADS / 2; quad++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const Four b = mine[((item * (QUADS / 2) + quad) * TILES + tile) * 32];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const u32 mask = ONE_BIT << (2 * ((item * (QUADS / 2) + quad) % 4) + e);
                    mma(all[tile][e], mask, mask, mask, mask, b.v[2 * e], b.v[2 * e + 1]);
                }
            }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 2; i++) // the rows have all the same
                if (g == 0) parts_of_ones[(item * TILES + tile) * 8 + 2 * t + i] = all[tile][0][i] + all[tile][1][i];
    }
    __syncthreads();
    Sum ones[TILES][2] = {}; // S of this warp's slices
    for (int slice = part; slice < slices; slice += parts)
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++)
            ones[i / 2 % TILES][i % 2] += parts_of_ones[(2 * slice * TILES + i / 2) * 8 + 2 * t + i % 2];

    const unsigned char *const place = memory + warp * (DEPTH * UNIT) + lane * (4 * J);
    int slot = 0;
    for (int start = first; start < last; start += a.batch) {
        const int end = start + a.batch < last ? start + a.batch : last;
        for (int tile = start + group; tile < end; tile += groups) {
            float scale[PAIRS][2];
            if (!LATE) load_scales(a, tile * 8 + g, scale);
            Sum acc[PAIRS][TILES][4] = {};
#pragma unroll 1
            for (int slice = part; slice < slices; slice += parts) {
                u32 word[2 * PAIRS][J];
                wait<DEPTH - 1>();
                const unsigned char *here = place + slot * UNIT;
#pragma unroll
                for (int sign = 0; sign < 2 * PAIRS; sign++) {
                    if (J == 4) {
                        const Four found = *(const Four *)(here + sign * PLACE);
#pragma unroll
                        for (int j = 0; j < J; j++) word[sign][j] = found.v[j];
                    } else {
                        const Two found = *(const Two *)(here + sign * PLACE);
#pragma unroll
                        for (int j = 0; j < J; j++) word[sign][j] = found.v[j % 2];
                    }
                }
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
                fetcher.next(a, last, before + part, end_slice, groups, g);
                const Four *from = mine + slice * (QUADS * TILES * 32);
#pragma unroll
                for (int quad = 0; quad < QUADS; quad++) {
                    Four b[TILES];
                    const int j = quad / MASKS * 2;
                    if (quad % MASKS == 4) // halves: the upper 8 bits of both numbers
#pragma unroll
                        for (int sign = 0; sign < 2 * PAIRS; sign++) word[sign][j] >>= 8, word[sign][j + 1] >>= 8;
#pragma unroll
                    for (int i = 0; i < TILES; i++) b[i] = from[(quad * TILES + i) * 32];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const u32 mask = ONE_BIT << (2 * (quad % 4) + e);
#pragma unroll
                        for (int pair = 0; pair < PAIRS; pair++) {
                            const u32 p0 = word[2 * pair][j] & mask, p1 = word[2 * pair][j + 1] & mask;
                            const u32 q0 = word[2 * pair + 1][j] & mask, q1 = word[2 * pair + 1][j + 1] & mask;
#pragma unroll
                            for (int i = 0; i < TILES; i++) mma(acc[pair][i], p0, q0, p1, q1, b[i].v[2 * e], b[i].v[2 * e + 1]);
                        }
                    }
                }
            }
            if (LATE) load_scales(a, tile * 8 + g, scale);
            float *const to = sums + (tile - start) * tile_sums + part * (TOKENS * 16) + 2 * g;
            if (HALVES) { // this lane: row g, token t of a tile
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    float re, im;
                    outputs(acc, i, ones[i], scale, re, im);
                    const Two both = {__float_as_uint(re * 131072.0f * down[i]), __float_as_uint(im * 131072.0f * down[i])};
                    *(Two *)(to + (4 * i + t) * 16) = both;
                }
                continue;
            }
#pragma unroll
            for (int token = 0; token < TOKENS; token++) { // this lane: row g, digit t
                float re = 0.0f, im = 0.0f;
#pragma unroll
                for (int piece = PIECES - 1; piece >= 0; piece--) {
                    const int i = token * PIECES + piece;
                    float one, two;
                    outputs(acc, i, ones[i], scale, one, two);
                    re = (re + one) * (piece ? 1.0f / 8388608 : down[HALVES ? 0 : token]);
                    im = (im + two) * (piece ? 1.0f / 8388608 : down[HALVES ? 0 : token]);
                }
                re += from_lane_xor(re, 1);
                im += from_lane_xor(im, 1);
                re += from_lane_xor(re, 2);
                im += from_lane_xor(im, 2);
                if (t < 2) to[token * 16 + t] = t ? im : re;
            }
        }
        all_sync();
        const int rows_here = (end - start) * 8;
        for (int i = rank * THREADS + threadIdx.x; i < rows_here * TOKENS; i += RANGES * THREADS) {
            const int local = i % rows_here, token = i / rows_here, row = start * 8 + local;
            if (row >= a.n || token >= a.tokens) continue;
            const Two *from = (const Two *)(sums + local / 8 * tile_sums + token * 16 + local % 8 * 2);
            float total[2] = {};
#pragma unroll
            for (int range = 0; range < RANGES; range++)
#pragma unroll 4
                for (int p = 0; p < parts; p++) {
                    const Two found = load_of(from + p * (TOKENS * 8), range);
                    total[0] += __uint_as_float(found.v[0]);
                    total[1] += __uint_as_float(found.v[1]);
                }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int at = half * a.n + row, out = a.places ? a.places[at] : at;
                const float sum = total[half] + (a.bias ? load_number(a.bias, out, a.bias_kind) : 0.0f);
                const i64 to = token * a.y_stride + out;
                if (KIND == 1) ((float *)a.y)[to] = sum;
                if (KIND == 2) ((u16 *)a.y)[to] = to_bfloat(sum);
                if (KIND == 3) ((u16 *)a.y)[to] = to_half(sum);
            }
        }
        if (RANGES > 1 || end < last) all_sync();
    }
}
