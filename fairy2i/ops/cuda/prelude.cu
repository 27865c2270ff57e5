// What decode.cu and several.cu, which follow it, have in common: the machine, arguments, and the ends of sums.
//
// A kernel that is launched EARLY begins while the one before it still runs. Nothing before its wait_for_previous()
// reads what others may have written, words excepted, or writes to the GPU's memory.

typedef unsigned u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
struct alignas(8) Two { u32 v[2]; };
struct alignas(16) Four { u32 v[4]; };
extern __shared__ __align__(128) unsigned char memory[];

DEVICE u32 shared_address(const void *of) { return (u32)__cvta_generic_to_shared(of); }
template <int BYTES> DEVICE void copy_async(void *to, const void *from) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from)
                     : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
DEVICE void mma(int *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#if EARLY
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
DEVICE void let_next_begin() {}
DEVICE void wait_for_previous() {}
#endif
#if HOPPER
DEVICE void barrier_init(u64 *barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void expect(u64 *barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
DEVICE void wait_for(u64 *barrier, u32 parity) {
    asm volatile("{\n.reg .pred p;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 ::"r"(shared_address(barrier)), "r"(parity)
                 : "memory");
}
DEVICE void copy_bulk(void *to, const void *from, u32 bytes, u64 *barrier) { // multiples of 16
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
#endif
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
DEVICE void warp_sync() { __syncwarp(); }
DEVICE int from_first_lane(int value) { return __shfl_sync(0xffffffffu, value, 0); } // known to be the same in all
DEVICE u32 warp_max(u32 value) { return __reduce_max_sync(0xffffffffu, value); }
template <class T> DEVICE T from_lane_xor(T value, int other) { return __shfl_xor_sync(0xffffffffu, value, other); }
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
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(from)), "r"(rank));
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(found.v[0]), "=r"(found.v[1]) : "r"(address) : "memory");
    return found;
}
DEVICE Four load_of(const Four *from, int rank) {
    Four found;
    u32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(from)), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(found.v[0]), "=r"(found.v[1]), "=r"(found.v[2]), "=r"(found.v[3]) : "r"(address) : "memory");
    return found;
}
#else
#define CLUSTER
DEVICE void all_sync() { __syncthreads(); }
template <class T> DEVICE T load_of(const T *from, int) { return *from; }
#endif
#else
#include "decode_on_cpu.h"
#endif

constexpr int THREADS = WARPS * 32;
constexpr int PAIRS = 2 * STAGES;       // (p, q): U and W of each stage
constexpr int SIZE = KIND == 1 ? 4 : 2; // bytes of an activation
constexpr int J = BK / 8;               // int32 of a lane, sign and row of a unit: 2 or 4

struct Arguments {
    const void *x;
    const u16 *words;
    const float *scales;
    const void *bias;
    const int *places;
    void *y;
    i64 x_stride, y_stride, chunk_stride, pass_stride;
    int tokens, n, m, chunks;
    int tiles, more;     // of a cluster, and how many of the first have one more
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

template <int COUNT> struct Several { typedef Two Type; }; // int32
template <> struct Several<4> { typedef Four Type; };
typedef Several<J>::Type Words;

// one of neighbouring activations
template <class Group> DEVICE float number_of(const Group &x, int i) {
    const u32 v = x.v[i * SIZE / 4];
    if (KIND == 1) return __uint_as_float(v);
    if (KIND == 2) return __uint_as_float(i % 2 ? v & 0xffff0000u : v << 16);
    return of_half((u16)(v >> 16 * (i % 2)));
}

// the bits of the largest magnitude so far: of float32, or 16 bits in the upper half
template <class Group> DEVICE u32 larger(u32 most, const Group &x) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(Group) / 4; i++) {
        const u32 one = x.v[i] & (KIND == 1 ? 0x7fffffffu : 0x7fff0000u);
        most = most > one ? most : one;
        if (KIND != 1) {
            const u32 other = x.v[i] << 16 & 0x7fffffffu;
            most = most > other ? most : other;
        }
    }
    return most;
}

// whether what `larger` found is not finite
DEVICE bool too_large(u32 size) { return size >= (KIND == 3 ? 0x7c000000u : 0x7f800000u); }

// exponent of the largest activation of a token, from what `larger` found, and `least` at least
DEVICE int exponent_of(u32 size, int least) {
    if (KIND == 3) size = __float_as_uint(of_half((u16)(size >> 16)));
    return (int)(size >> 23) > least ? (int)(size >> 23) : least;
}
DEVICE float power_of_two(int exponent) { return __uint_as_float((u32)(exponent + 127) << 23); }

// of p + q and of p - q, whose sign is given
DEVICE void load_scales(const Arguments &a, int row, float sign, float (*scale)[2]) {
    row = row < a.n ? row : a.n - 1;
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; i++) {
        const float found = a.scales[(i64)i * a.scale_width + row * a.scale_step];
        scale[i / 2][i % 2] = i % 2 ? found * sign : found;
    }
}

// Multiply the signs of two bits, `ones` and the next, of int32 j and j + 1 of a unit, with the B of these columns.
template <class Sum, int TILES>
DEVICE void multiply_signs(const u32 (*word)[J], int j, u32 ones, const Four *from, Sum (*acc)[TILES][4]) {
    Four b[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) b[i] = from[i * 32];
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const u32 mask = ones << e;
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            const u32 p0 = word[2 * pair][j] & mask, p1 = word[2 * pair][j + 1] & mask;
            const u32 q0 = word[2 * pair + 1][j] & mask, q1 = word[2 * pair + 1][j + 1] & mask;
#pragma unroll
            for (int i = 0; i < TILES; i++)
                mma(acc[pair][i], p0, q0, p1, q1, b[i].v[2 * e], b[i].v[2 * e + 1]);
        }
    }
}

// what the sums of a row and a tile give to the outputs, those of p + q less `ones`
template <class Sum, int TILES, class Real>
DEVICE void outputs(Sum (*acc)[TILES][4], int tile, const Sum *ones, const float (*scale)[2], Real &re, Real &im) {
    re = im = 0.0f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        const Sum *c = acc[pair][tile];
        const Real sum_re = (Real)(c[0] + c[2] - ones[0]), sum_im = (Real)(c[1] + c[3] - ones[1]);
        const Real gap_re = (Real)(c[0] - c[2]), gap_im = (Real)(c[1] - c[3]);
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

// Where two sums go, and what is added to them, known before they are.
struct Output {
    i64 at[2];
    float bias[2];
    bool wanted;

    DEVICE void find(const Arguments &a, int row, int token) {
        wanted = row < a.n && token < a.tokens;
        if (!wanted) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int out = a.places ? a.places[half * a.n + row] : half * a.n + row;
            bias[half] = a.bias ? load_number(a.bias, out, a.bias_kind) : 0.0f;
            at[half] = token * a.y_stride + out;
        }
    }
    DEVICE void store(const Arguments &a, const float *sums) const {
        if (!wanted) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float sum = sums[half] + bias[half];
            if (KIND == 1) ((float *)a.y)[at[half]] = sum;
            if (KIND == 2) ((u16 *)a.y)[at[half]] = to_bfloat(sum);
            if (KIND == 3) ((u16 *)a.y)[at[half]] = to_half(sum);
        }
    }
};

// What a warp knows of an output. Of one-sided activations parts are far larger than their sum: float32 would
// lose bits.
template <int> struct PartOf { typedef float Type; typedef Two Both; };
template <> struct PartOf<1> { typedef double Type; typedef Four Both; };
typedef PartOf<KIND>::Type Part;
typedef PartOf<KIND>::Both Parts; // of both halves

// Add what warps and the blocks of a cluster have of the tiles from `start` to `end`: sums
// [tile][part][token][row][half], 16 numbers between tiles. All threads of the cluster call, each knows its own sums.
DEVICE void add_parts(const Arguments &a, const Part *sums, int tile_sums, int start, int end, int rank, int parts) {
    const int rows = (end - start) * 8;
    int i = rank * THREADS + threadIdx.x;
    Output output;
    if (i < rows * TOKENS) output.find(a, start * 8 + i % rows, i / rows);
    all_sync();
    for (; i < rows * TOKENS; i += RANGES * THREADS) {
        const int row = i % rows, token = i / rows;
        const Parts *from = (const Parts *)(sums + row / 8 * tile_sums + token * 16 + row % 8 * 2);
        Part total[2] = {};
#pragma unroll
        for (int range = 0; range < RANGES; range++)
#pragma unroll 4
            for (int p = 0; p < parts; p++) {
                const Parts found = load_of(from + p * (TOKENS * 8), range);
                Part both[2];
                memcpy(both, &found, sizeof both);
                total[0] += both[0];
                total[1] += both[1];
            }
        const float results[2] = {(float)total[0], (float)total[1]};
        output.store(a, results);
        const int next = i + RANGES * THREADS;
        if (next < rows * TOKENS) output.find(a, start * 8 + next % rows, next / rows);
    }
}
