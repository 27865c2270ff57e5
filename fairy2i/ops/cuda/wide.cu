// Products of packed layers with many tokens: weights are made of the codes in registers, tensor cores multiply them.
//
// A block has 64 rows of the codes, that is 128 outputs, and TOKENS tokens. y^T = W x^T: a warpgroup multiplies 32 rows
// of the codes, A of wgmma, with all tokens, B, which lie in shared memory as the tensor memory accelerator brings
// them: (half, token, 64 columns), rows of 128 bytes, swizzled. A step is 64 columns of the codes, 128 of the weight.
//
//     lane      g = lane / 4 is the row among 8 of a warp, t = lane % 4: the columns 2 t, 2 t + 1 (and + 8) of 16
//     words     an int32 of them has at bits k and 16 + k the signs of two columns that are neighbours: two numbers of
//               an operand of wgmma. The signs p, q of U and W of all stages give the 2 x 2 block: real and imaginary
//               outputs (rows g and g + 8 of 16) from real inputs (one wgmma) and from imaginary ones (another).
//     numbers   a phase is p = +-1 where p == q, and p i elsewhere. So p and x = p ^ q are put side by side, once for
//               16 columns: bits 15 and 14 of what is shifted to the top are then a bf16, +-2 or +-0: the imaginary
//               part; with bit 14 the other way, the real part.
//     scales    those of U's first stage wait for the end, in float32, where the sums of real and of imaginary inputs
//               are apart: with 32 to 128 tokens. Numbers of first stages are then as they are, those of others are
//               multiplied with scales beside the first's, and so is W when it is added to U and taken from it. That is
//               20 instructions for 8 weights of two stages (4 shifts, 8 of bits, 8 of bf16). Sums of 256 tokens need
//               the registers: numbers are multiplied with all of the scales, 24 instructions.
//     few       a product with 16 tokens takes hardly longer with 32 columns: B has the real activations and then the
//               imaginary ones, one product the parts of U (rows g and g + 8), another those of W, and the sums make
//               outputs at the end, with the scales of both first stages: 16 instructions.
//     order     bits from 15 down to 0, even and odd ones in two words; columns of a chunk thus descend
//     early     blocks begin while the kernel before runs, fetch words of two chunks, and have scales brought to the L2
//               cache; all else waits for that one's end. More words would be in the way of what it still reads, and
//               then of activations.
//     threads   2 warpgroups multiply; of a third one warp asks for activations, one for words, one tells other blocks
//               of sums and waits for theirs, one prefetches scales. The next 16 columns are decoded into other
//               registers before products of these are waited for.
//     cluster   PAIR blocks with other rows share the activations, each brings a half and sends it to all of them;
//               SPLIT blocks have ranges of the columns, and tell each other their sums at the end: TOKENS / SPLIT
//               tokens are added by each, always in the same order.
//     grid      SPLIT = 1: the first `shared` tiles are shared: every cluster takes as many of their steps as the
//               others, from its last tile to its first one. Of a tile that several clusters have, the one with its
//               last step gathers the sums of those before it, which left them in memory as the first thing that they
//               did, and nobody waits for a cluster that starts later (it might never start while others wait). The
//               other tiles follow, one for each cluster at a time. What the next tile needs is fetched meanwhile.
//
// Compiled at run time for: STAGES PASSES G BK (of the words), ROWS (scales of rows), TOKENS SPLIT PAIR, SLOTS (steps
// of activations in shared memory), WORD_SLOTS (chunks of words there).

typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int BLOCK_ROWS = 64;             // of the codes
constexpr int WARPS = 8;                   // that multiply
constexpr int MULTIPLIERS = 32 * WARPS;    // threads
constexpr int SIGNS = 4 * STAGES;          // of a row and column
constexpr int SLOT = TOKENS * 256;         // bytes of the activations of a step
constexpr int ROW_BYTES = G * BK * 2;      // of the words of a row, chunk and pass
constexpr int PARTS = ROW_BYTES / 128;     // of the words of a row: in shared memory (pass, part, row, 128 bytes),
constexpr int PART = BLOCK_ROWS * 128;     // swizzled: the same columns of 8 rows lie in different banks
constexpr int WORDS = PASSES * PARTS * PART;
constexpr int BITS = 64 / BK;              // of a word in a step
constexpr int CHUNK_STEPS = BK / 4;
constexpr int WIDTHS = BK / 16;            // groups of 16 columns of a bit
constexpr bool KEEP = STAGES <= 2;         // whether the words of a chunk stay in registers
constexpr int HELD = KEEP ? WIDTHS : 1;
constexpr int TILES = TOKENS / 8;
// Sums of products that need not wait for each other: a wgmma that does takes about 100 clocks, which pass meanwhile
// with 256 tokens.
constexpr int CHAINS = TOKENS <= 64 ? 4 : TOKENS == 128 ? 2 : 1;
constexpr bool TOGETHER = TOKENS == 16;    // both halves of the activations in B
constexpr int COLUMNS = TOGETHER ? 2 * TOKENS : TOKENS; // of B
constexpr bool SUMS_APART = CHAINS > 1 && !TOGETHER; // of real and of imaginary inputs
constexpr bool LATE = TOGETHER || SUMS_APART; // some scales wait for the end
// Registers of who multiplies, and of the others: in all what they begin with.
constexpr int REGISTERS = 224, OTHERS_REGISTERS = 56;
constexpr int LEFT = 2, READY = 3;         // barriers: sums lie in memory; those of other blocks do
constexpr int FAR = 16;                    // sums that are loaded at once:
constexpr int FAR_TILES = TILES < FAR ? TILES : FAR; // of so many groups of 8 tokens
constexpr int FAR_BLOCKS = FAR / FAR_TILES; // of so many blocks
constexpr int MOST = (TILES + SPLIT - 1) / SPLIT; // groups of 8 tokens that a block adds
constexpr int SUMS = SPLIT * MOST * MULTIPLIERS * 16;
constexpr int OUT = BLOCK_ROWS * 4;               // bytes of a token's results
constexpr int PIECES = OUT / 16;                  // 8 outputs each
static_assert(SPLIT == 1 || SLOT * SLOTS + WORDS * WORD_SLOTS >= SUMS + MOST * 8 * OUT,
              "sums lie where activations and words were");

struct alignas(64) Map { u64 opaque[16]; }; // CUtensorMap

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__

DEVICE unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }
DEVICE unsigned cluster_rank() { unsigned r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE unsigned in_block(unsigned address, unsigned rank) {
    unsigned found;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(rank));
    return found;
}
DEVICE void barrier_init(unsigned barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(unsigned barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
DEVICE void barrier_arrive_at(unsigned barrier, unsigned rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];"
                 :: "r"(in_block(barrier, rank)) : "memory");
}
DEVICE void barrier_wait(unsigned barrier, int phase) {
    asm volatile("{\n.reg .pred p;\nagain:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;\n}"
                 :: "r"(barrier), "r"(phase) : "memory");
}
DEVICE void bring_tile(unsigned to, const Map *map, int column, int token, int half, unsigned barrier, u16 blocks) {
    if (PAIR == 1)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3, %4}], [%5];"
                     :: "r"(to), "l"(map), "r"(column), "r"(token), "r"(half), "r"(barrier) : "memory");
    else
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
                     ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;"
                     :: "r"(to), "l"(map), "r"(column), "r"(token), "r"(half), "r"(barrier), "h"(blocks) : "memory");
}
DEVICE void bring_words(unsigned to, const Map *map, int part, int row, int pass, int chunk, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3, %4, %5}], [%6];"
                 :: "r"(to), "l"(map), "r"(part * 64), "r"(row), "r"(pass), "r"(chunk), "r"(barrier) : "memory");
}
DEVICE void prefetch(const Map *map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }
DEVICE void prefetch_line(const void *from) { asm volatile("prefetch.global.L2 [%0];" :: "l"(from)); }
DEVICE unsigned load_shared(unsigned address) {
    unsigned found;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(found) : "r"(address) : "memory");
    return found;
}
DEVICE float4 load_shared4(unsigned address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address) : "memory");
    return v;
}
DEVICE void store_cluster4(unsigned address, unsigned rank, const float *v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "r"(in_block(address, rank)), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
// Two times 8 x 8 numbers of 16 bits, lane 4 i + j has (i, 2 j) and (i, 2 j + 1): their columns go where lanes say, the
// first ones where lanes 0 to 7 do, the others where lanes 8 to 15 do.
DEVICE void store_transposed(unsigned at, unsigned first, unsigned second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" :: "r"(at), "r"(first), "r"(second)
                 : "memory");
}
DEVICE void kernel_after_may_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void kernel_before_ended() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Of shared memory alone: else it waits for what lies in the GPU's, results among it.
DEVICE void before_fetching() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Sums that other blocks read: past the L1 cache. A flag is set after them, and read before.
DEVICE void store_far4(float *to, const float *v) {
    asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
DEVICE float4 load_far4(const float *from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
    return v;
}
DEVICE void flag_set(int *flag) {
    asm volatile("st.release.gpu.global.s32 [%0], 1;" :: "l"(flag) : "memory");
}
DEVICE void flag_take(int *flag) { // wait until it is set, and set it back
    int value;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    while (value == 0);
    asm volatile("st.global.s32 [%0], 0;" :: "l"(flag) : "memory");
}
// Barriers between the multiplying threads and the warp that knows of other blocks: those who arrive do not wait.
template <int ID> DEVICE void told_arrive() {
    asm volatile("bar.arrive %0, %1;" :: "n"(ID), "n"(MULTIPLIERS + 32) : "memory");
}
template <int ID> DEVICE void told_wait() {
    asm volatile("bar.sync %0, %1;" :: "n"(ID), "n"(MULTIPLIERS + 32) : "memory");
}
DEVICE void multipliers_sync() { asm volatile("bar.sync 1, %0;" :: "n"(MULTIPLIERS) : "memory"); }
DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS)); }
DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(OTHERS_REGISTERS)); }
DEVICE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DEVICE void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

#define BF16X2(name, code)                                                                                         \
    DEVICE unsigned name(unsigned a, unsigned b) {                                                                 \
        unsigned c; asm(code ".rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b)); return c; }
BF16X2(add, "add")
BF16X2(subtract, "sub")
BF16X2(multiply, "mul")
DEVICE unsigned multiply_add(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE unsigned multiply_subtract(unsigned a, unsigned b, unsigned c) {
    unsigned d;
    asm("{\n.reg .b32 minus;\nneg.bf16x2 minus, %3;\nfma.rn.bf16x2 %0, %1, %2, minus;\n}"
        : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE unsigned and_xor(unsigned a, unsigned b, unsigned c) { // one instruction: the compiler makes two
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE unsigned even_odd(unsigned a, unsigned b) { // odd bits of a, even ones of b
    unsigned d;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(0xAAAAAAAAu));
    return d;
}
DEVICE unsigned bfloats(float low, float high) {
    unsigned c;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
    return c;
}
DEVICE float of_half(u16 x) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x)); return f; }
#else
#include "wide_on_cpu.h" // the same functions, for g++
#endif

DEVICE void add4(float *sum, float4 v) { sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w; }

// Rows g and g + 8 of the A of two products, two columns, from the two highest bits of both halves of a word of every
// phase: A11, A21 and A12, A22 (with sums apart -A22), or the parts of U and of W.
DEVICE void decode(const unsigned *word, const unsigned *factor, unsigned &one1, unsigned &one2, unsigned &two1,
                   unsigned &two2) {
    unsigned sum[4]; // of U and of W: re, im
#pragma unroll
    for (int i = 0; i < SIGNS / 2; i++) {
        const unsigned re = and_xor(word[2 * i], 0xC000C000u, 0x40004000u), im = word[2 * i] & 0xC000C000u;
        unsigned *of = sum + i % 2 * 2;
        if (i >= 2) {
            of[0] = multiply_add(re, factor[2 * i], of[0]);
            of[1] = multiply_add(im, factor[2 * i + 1], of[1]);
        } else {
            of[0] = LATE ? re : multiply(re, factor[2 * i]);
            of[1] = LATE ? im : multiply(im, factor[2 * i + 1]);
        }
    }
    if (TOGETHER) one1 = sum[0], one2 = sum[1], two1 = sum[2], two2 = sum[3];
    else if (SUMS_APART) {
        one1 = multiply_add(sum[2], factor[2], sum[0]);
        one2 = multiply_add(sum[3], factor[3], sum[1]);
        two1 = multiply_subtract(sum[3], factor[3], sum[1]);
        two2 = multiply_subtract(sum[2], factor[2], sum[0]);
    } else {
        one1 = add(sum[0], sum[2]);
        one2 = add(sum[1], sum[3]);
        two1 = subtract(sum[3], sum[1]);
        two2 = subtract(sum[0], sum[2]);
    }
}

// Of the scales of a row (stage, U or W, re or im) what numbers are multiplied with, twice in a register, and what sums
// are: the first stage's, times -1/2. A first scale below 2^-20 of those beside it is raised to that, and to 2^-124, as
// quotients have to be finite.
DEVICE void prepare_scales(const float *scale, unsigned *factor, float *of_sums) {
#pragma unroll
    for (int k = 3; k >= 0; k--) {
        float first = scale[k], most = SUMS_APART && k < 2 ? -2.0f * of_sums[k + 2] : 0.0f; // W's, beside which U's is
        most = fabsf(most);
#pragma unroll
        for (int i = k + 4; i < SIGNS; i += 4) most = fmaxf(most, fabsf(scale[i]));
        const float least = fmaxf(most * 0x1p-20f, 0x1p-124f);
        if (LATE && most > 0.0f && fabsf(first) < least) first = least;
        // a quarter, so that the quotient of the largest is no subnormal number, which would become 0
        const float times = fabsf(first) < 0x1p-124f ? 0.0f : reciprocal(0.25f * first);
        auto beside = [&](float x) { return LATE ? times * x * 0.25f : -0.5f * x; };
#pragma unroll
        for (int i = LATE ? k + 4 : k; i < SIGNS; i += 4) factor[i] = bfloats(beside(scale[i]), beside(scale[i]));
        if (SUMS_APART && k < 2) {
            const float of_w = beside(-2.0f * of_sums[k + 2]);
            factor[k + 2] = bfloats(of_w, of_w);
        }
        of_sums[k] = -0.5f * first;
    }
}

// Outputs (groups of 8 tokens; two real ones and two imaginary ones of each lane) from sums whose scales are left.
DEVICE void make_outputs(const float (*sums)[COLUMNS / 2], const float *scale, float *to) {
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
        auto sum = [&](int chain, int j) { return CHAINS == 4 ? sums[chain][j] + sums[chain + 2][j] : sums[chain][j]; };
        const int other = i ^ 2; // of the other part of U or W
        const bool real = i % 4 < 2;
        if (!TOGETHER)
            to[i] = real ? scale[0] * sum(0, i) + scale[1] * sum(1, i) : scale[1] * sum(0, i) - scale[0] * sum(1, i);
        else if (real) // products with real activations, and with imaginary ones
            to[i] = scale[0] * sum(0, i) - scale[1] * sum(0, other + TOKENS / 2) +
                    (scale[2] * sum(1, i) + scale[3] * sum(1, other + TOKENS / 2));
        else
            to[i] = scale[0] * sum(0, other + TOKENS / 2) + scale[1] * sum(0, i) +
                    (scale[3] * sum(1, i) - scale[2] * sum(1, other + TOKENS / 2));
    }
}

// Scales of a row.
DEVICE void load_scales(const float *scales, int row, int n, float *scale) {
#pragma unroll
    for (int i = 0; i < SIGNS; i++) scale[i] = ROWS ? scales[(long long)i * n + row] : scales[i];
}

DEVICE float bias_at(const void *bias, int kind, int place) {
    if (kind == 0) return 0.0f;
    if (kind == 1) return ((const float *)bias)[place];
    const u16 bits = ((const u16 *)bias)[place];
    return kind == 2 ? __uint_as_float((unsigned)bits << 16) : of_half(bits);
}

// Where a step lies: chunk, and number in the chunk. The empty steps of the last chunk, its highest columns, are none.
struct Step {
    int chunk, number;
    DEVICE Step(int step, int steps, int chunks) : chunk(step / CHUNK_STEPS), number(step % CHUNK_STEPS) {
        if (chunk == chunks - 1) number += chunks * CHUNK_STEPS - steps;
    }
    DEVICE int column() const { return (chunk * CHUNK_STEPS + CHUNK_STEPS - 1 - number) * 64; }
    // Go on; return whether a chunk begins.
    DEVICE bool next(int steps, int chunks) {
        if (++number < CHUNK_STEPS) return false;
        number = ++chunk == chunks - 1 ? chunks * CHUNK_STEPS - steps : 0;
        return true;
    }
};

// Words of 16 columns: (two pairs of columns, phases, even and odd bits), shifted so that the next bit is the highest.
// `at`: the first word of the lane in the chunk, where the swizzle has put it.
DEVICE void take_words(unsigned *word, unsigned at, int width, int shift) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++)
#pragma unroll
        for (int i = 0; i < SIGNS; i += 2) {
            auto load = [&](int sign) {
                const int place = sign % G * (BK * 2) + width * 32 + pair * 16; // in the row
                return load_shared((at ^ place % 128) + (sign / G * PARTS + place / 128) * PART);
            };
            const unsigned p = load(i), x = load(i + 1) ^ p;
            word[pair * SIGNS + i] = even_odd(p, x >> 1);
            word[pair * SIGNS + i + 1] = even_odd(p << 1, x);
        }
    if (shift) // where a tile does not begin with a chunk
#pragma unroll
        for (int i = 0; i < 2 * SIGNS; i++) word[i] <<= shift;
}

extern "C" __global__ void
#ifdef __CUDACC__
__launch_bounds__(MULTIPLIERS + 128, 1) __cluster_dims__(PAIR, SPLIT, 1)
#endif
multiply_wide(const __grid_constant__ Map map, const __grid_constant__ Map words, const float *scales, const void *bias,
              int bias_kind, const int *places, u16 *y, int tokens, int out_features, int n, int m, int chunks,
              int shared, float *far_sums, int *flags) {
    extern __shared__ char memory[];
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    if (thread == 0) prefetch(&map), prefetch(&words);
    const unsigned base = (shared_address(memory) + 1023) / 1024 * 1024;
    const unsigned words_at = base + SLOTS * SLOT, barriers = words_at + WORD_SLOTS * WORDS;
    const unsigned full = barriers, empty = barriers + 8 * SLOTS, words_full = empty + 8 * SLOTS,
                   words_empty = words_full + 8 * WORD_SLOTS;
    const unsigned rank = PAIR * SPLIT > 1 ? cluster_rank() : 0;
    const unsigned in_pair = rank % PAIR, range = rank / PAIR;
    const int row_tiles = (n + PAIR * BLOCK_ROWS - 1) / (PAIR * BLOCK_ROWS);
    const int tiles = row_tiles * ((tokens + TOKENS - 1) / TOKENS), cluster = blockIdx.x / PAIR;
    const int clusters = gridDim.x / PAIR;
    const int steps = (m + 63) / 64;
    // steps `begin` to `end` of the shared tiles, or of the cluster's only tile, are multiplied here
    auto cut = [&](int at) {
        if (SPLIT > 1) return cluster * steps + steps * (at - cluster + (int)range) / SPLIT;
        return (int)((unsigned)(shared * steps) * at / clusters); // less than 2^32 below 15 million columns
    };
    const int begin = cut(cluster), end = cut(cluster + 1);
    const int tile0 = SPLIT > 1 ? cluster : shared ? begin / steps : -1;
    const int tile1 = SPLIT > 1 ? cluster : shared ? (end - 1) / steps : shared + cluster;
    auto first_of = [&](int tile) { return tile == tile0 ? begin - tile * steps : 0; };
    auto last_of = [&](int tile) { return tile == tile1 && tile0 >= 0 ? end - tile * steps : steps; };
    auto row0_of = [&](int tile) { return (tile % row_tiles * PAIR + (int)in_pair) * BLOCK_ROWS; }; // of the codes
    auto after = [&](int tile) {
        if (SPLIT > 1) return tiles;
        return tile >= shared ? tile + clusters : tile > tile0 ? tile - 1 : shared + cluster;
    };
    if (thread == 0) {
        for (int i = 0; i < SLOTS; i++) {
            barrier_init(full + 8 * i, 1);
            barrier_init(empty + 8 * i, WARPS * PAIR);
        }
        for (int i = 0; i < WORD_SLOTS; i++) {
            barrier_init(words_full + 8 * i, 1);
            barrier_init(words_empty + 8 * i, WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (PAIR > 1) cluster_sync(); // the other block's barriers are there
    kernel_after_may_begin();

    if (warp >= WARPS) { // who fetches
        fewer_registers();
        if (warp == WARPS && lane == 0) {
            kernel_before_ended();
            int slot = 0, round = 0;
            for (int tile = tile1; tile < tiles; tile = after(tile)) {
                const int first = first_of(tile), last = last_of(tile);
                Step at(first, steps, chunks);
                for (int step = first; step < last; step++) {
                    if (round) barrier_wait(empty + 8 * slot, (round - 1) & 1);
                    barrier_expect(full + 8 * slot, SLOT);
                    const unsigned to = base + slot * SLOT;
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        if (PAIR == 1 || half == (int)in_pair)
                            bring_tile(to + half * (SLOT / 2), &map, at.column(), tile / row_tiles * TOKENS, half,
                                       full + 8 * slot, (u16)(((1 << PAIR) - 1) << (range * PAIR)));
                    at.next(steps, chunks);
                    if (++slot == SLOTS) slot = 0, round++;
                }
            }
        }
        if (warp == WARPS + 1 && lane == 0) {
            int slot = 0, round = 0;
            for (int tile = tile1; tile < tiles; tile = after(tile)) {
                const int first = first_of(tile), last = last_of(tile);
                const int row0 = row0_of(tile);
                for (int c = first / CHUNK_STEPS; c <= (last - 1) / CHUNK_STEPS && first < last; c++) {
                    if (round) barrier_wait(words_empty + 8 * slot, (round - 1) & 1);
                    barrier_expect(words_full + 8 * slot, WORDS);
                    for (int i = 0; i < PASSES * PARTS; i++)
                        bring_words(words_at + slot * WORDS + i * PART, &words, i % PARTS, row0, i / PARTS, c,
                                    words_full + 8 * slot);
                    if (tile == tile1 && c == first / CHUNK_STEPS + 1) kernel_before_ended();
                    if (++slot == WORD_SLOTS) slot = 0, round++;
                }
            }
        }
        if (warp == WARPS + 2 && SPLIT == 1 && tile0 >= 0) { // at most one tile is left to others, one taken from them
            kernel_before_ended();
            if (last_of(tile1) < steps) {
                told_wait<LEFT>();
                if (lane == 0) flag_set(flags + blockIdx.x);
            }
            if (first_of(tile0) > 0 && last_of(tile0) == steps) {
                for (int from = cluster - 1 - lane; from >= 0 && cut(from + 1) > tile0 * steps; from -= 32)
                    flag_take(flags + from * PAIR + in_pair);
                __syncwarp();
                told_arrive<READY>();
            }
        }
        if (warp == WARPS + 3) // who multiplies reads them when the kernel before has ended
            for (int i = lane; i < (ROWS ? SIGNS * BLOCK_ROWS / 16 : 1); i += 32) {
                const int row = row0_of(tile1) + i % (BLOCK_ROWS / 16) * 16;
                if (!ROWS) prefetch_line(scales);
                else if (row < n) prefetch_line(scales + (long long)(i / (BLOCK_ROWS / 16)) * n + row);
            }
        __syncwarp();
        if (PAIR * SPLIT > 1) cluster_sync();
        if (SPLIT > 1) cluster_sync();
    } else { // who multiplies
        more_registers();
        const int g = lane / 4, t = lane % 4, in_block_row = warp * 8 + g;
        auto row_of = [&](int tile) { // of the codes; the last one for those that are none
            const int row = row0_of(tile) + in_block_row;
            return row < n ? row : n - 1;
        };
        float sums[CHAINS][COLUMNS / 2], outputs[TOKENS / 2], *const acc = LATE ? outputs : sums[0];
        unsigned factor[SIGNS];
        float of_sums[4];
        unsigned word[HELD][2 * SIGNS], a[2][8];
        float loaded[SIGNS]; // of the next tile
        int word_slot = 0, word_phase = 0; // where the next chunk comes
        unsigned taken;                    // barrier of the last one
        int slot = 0, phase = 0, before;
        unsigned my_words; // the first one of the lane in the chunk
        // K-major rows of 128 bytes, swizzled, groups of 8 tokens 1024 bytes apart
        const u64 kind = (u64)1 << 62 | (u64)64 << 32 | (u64)1 << 16;
        // Decode group q of 4 of the step `at` of 16 columns.
        auto make = [&](const Step &at, int q, unsigned *into) {
            const int width = WIDTHS == 2 ? q / 2 : 0, bit = WIDTHS == 2 ? q % 2 : q;
            unsigned *mine = word[KEEP ? width : 0];
            if (!KEEP && bit == 0) take_words(mine, my_words, width, at.number * BITS);
            decode(mine + bit % 2, factor, into[0], into[1], into[4], into[5]);
            decode(mine + SIGNS + bit % 2, factor, into[2], into[3], into[6], into[7]);
#pragma unroll
            for (int i = bit % 2; i < 2 * SIGNS; i += 2) mine[i] <<= 2;
        };
        auto end_chunk = [&] { // its words are not read any more
            __syncwarp();
            if (lane == 0) barrier_arrive(taken);
        };
        auto begin_chunk = [&](const Step &at) {
            barrier_wait(words_full + 8 * word_slot, word_phase);
            my_words = words_at + word_slot * WORDS + in_block_row * 128 + g * 16 + t * 4;
            taken = words_empty + 8 * word_slot;
            if (++word_slot == WORD_SLOTS) word_slot = 0, word_phase ^= 1;
            if (KEEP) {
#pragma unroll
                for (int width = 0; width < HELD; width++) take_words(word[width], my_words, width, at.number * BITS);
                end_chunk();
            }
        };
        auto release = [&](int slot) {
            if (lane < PAIR) {
                if (PAIR == 1) barrier_arrive(empty + 8 * slot);
                else barrier_arrive_at(empty + 8 * slot, range * PAIR + lane);
            }
        };

        for (int tile = tile1; tile < tiles; tile = after(tile)) {
            const int first = first_of(tile), last = last_of(tile);
            const int row0 = row0_of(tile), token0 = tile / row_tiles * TOKENS;
            Step at(first, steps, chunks);
            before = -1;
            if (first < last) begin_chunk(at);
            if (tile == tile1) {
                kernel_before_ended();
                load_scales(scales, row_of(tile), n, loaded);
            }
            prepare_scales(loaded, factor, of_sums);
            const int then = after(tile); // its scales arrive while this one begins
            if (KEEP && then < tiles) load_scales(scales, row_of(then), n, loaded);
            // of the thread: the row whose sums it has, and the 8 outputs that it will write; loaded ahead
            const int row = row_of(tile), out1 = places ? places[row] : row, out2 = places ? places[n + row] : row + n;
            const float bias1 = bias_at(bias, bias_kind, out1), bias2 = bias_at(bias, bias_kind, out2);
            const int piece = thread % PIECES, half = piece / WARPS, row8 = row0 + piece % WARPS * 8;
            const int left = n - row8 < 8 ? n - row8 : 8;
            const int start = left <= 0 ? 0 : places ? places[half * n + row8] : half * n + row8;
            bool together = left == 8 && start % 8 == 0 && out_features % 8 == 0;
            if (places)
                for (int i = 1; i < left; i++) together &= places[half * n + row8 + i] == start + i;
#pragma unroll
            for (int i = 0; i < CHAINS * COLUMNS / 2; i++) sums[i / (COLUMNS / 2)][i % (COLUMNS / 2)] = 0.0f;
            if (first < last) make(at, 0, a[0]);
            for (int step = first; step < last; step++) {
                barrier_wait(full + 8 * slot, phase);
                const u64 real = kind | (base + slot * SLOT) >> 4, other = TOGETHER ? real : real + (SLOT / 2 >> 4);
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    // the columns of group q: for two widths (1, 0), (0, 0), (1, 1), (0, 1) of (bit, width), else down
                    const int offset = WIDTHS == 2 ? (q % 2 ? 0 : 4) + q / 2 * 2 : 6 - 2 * q;
                    mma_fence();
                    mma(sums[2 * q % CHAINS], a[q % 2], real + offset);
                    mma(sums[(2 * q + 1) % CHAINS], a[q % 2] + 4, other + offset);
                    mma_commit();
                    mma_wait<1>();
                    if (q == 0 && before >= 0) release(before); // nobody reads it any more
                    if (q < 3) make(at, q + 1, a[(q + 1) % 2]);
                    else if (step + 1 < last) {
                        const bool done = at.next(steps, chunks);
                        if (done) {
                            if (!KEEP) end_chunk();
                            begin_chunk(at);
                        }
                        make(at, 0, a[0]);
                    }
                }
                before = slot;
                if (++slot == SLOTS) slot = 0, phase ^= 1;
            }
            mma_wait<0>();
            if (LATE) make_outputs(sums, of_sums, outputs);
            if (!KEEP && first < last) end_chunk();
            if (!KEEP && then < tiles) load_scales(scales, row_of(then), n, loaded);

            // the sums of a block that other blocks read: groups of 8 tokens, threads, 4 of each
            auto far_at = [&](int block, int j) {
                return far_sums + (((long long)block * TILES + j) * MULTIPLIERS + thread) * 4;
            };
            if (SPLIT == 1 && last < steps) { // the rest is another cluster's, which gathers
#pragma unroll
                for (int j = 0; j < TILES; j++) store_far4(far_at(blockIdx.x, j), acc + 4 * j);
                told_arrive<LEFT>();
                release(before);
                continue;
            }
            if (SPLIT == 1 && first > 0) {
                told_wait<READY>();
                int lowest = cluster - 1; // of those that have a part of the tile
                while (cut(lowest) > tile * steps) lowest--;
                for (int from = cluster - 1; from >= lowest; from -= FAR_BLOCKS)
#pragma unroll
                    for (int j0 = 0; j0 < TILES; j0 += FAR_TILES) {
                        float4 v[FAR];
#pragma unroll
                        for (int k = 0; k < FAR; k++)
                            v[k] = from - k / FAR_TILES < lowest
                                       ? float4{0.0f, 0.0f, 0.0f, 0.0f}
                                       : load_far4(far_at((from - k / FAR_TILES) * PAIR + (int)in_pair,
                                                          j0 + k % FAR_TILES));
#pragma unroll
                        for (int k = 0; k < FAR; k++) add4(acc + 4 * (j0 + k % FAR_TILES), v[k]);
                    }
            }

            // Results: TILES groups of 8 tokens, of each lane tokens 2 t and 2 t + 1, real outputs, then imaginary.
            // They go through shared memory: pieces of 8 outputs of a token, swizzled.
            const unsigned out_at = SPLIT == 1 ? base + before * SLOT : base + SUMS;
            auto piece_at = [&](int token, int piece) { return out_at + token * OUT + (piece ^ (token & 7)) * 16; };
            auto put = [&](int j, const float *v) {
                store_transposed(piece_at(8 * j + (lane & 7), lane / 8 % 2 * WARPS + warp),
                                 bfloats(v[0] + bias1, v[1] + bias1), bfloats(v[2] + bias2, v[3] + bias2));
            };
            int from0 = 0, count = TILES;
            if (SPLIT == 1) {
                multipliers_sync(); // nobody reads the last activations any more
#pragma unroll
                for (int j = 0; j < TILES; j++) put(j, acc + 4 * j);
            } else {
                cluster_sync(); // nobody reads or fetches activations any more
                from0 = (int)range * MOST, count = from0 + MOST < TILES ? MOST : TILES - from0;
                auto sums_at = [&](int from, int j) {
                    return base + ((from * MOST + j % MOST) * MULTIPLIERS + thread) * 16;
                };
#pragma unroll
                for (int j = 0; j < TILES; j++)
                    if (j / MOST != (int)range)
                        store_cluster4(sums_at(range, j), j / MOST * PAIR + in_pair, acc + 4 * j);
                cluster_sync();
#pragma unroll
                for (int mine = 0; mine < SPLIT; mine++)
                    if (mine == (int)range)
#pragma unroll
                        for (int j = mine * MOST; j < (mine + 1) * MOST && j < TILES; j++) {
#pragma unroll
                            for (int from = 0; from < SPLIT; from++)
                                if (from != mine) add4(acc + 4 * j, load_shared4(sums_at(from, j)));
                            put(j % MOST, acc + 4 * j);
                        }
            }
            multipliers_sync();
            for (int i = thread / PIECES; i < count * 8 && left > 0; i += MULTIPLIERS / PIECES) {
                const int token = token0 + from0 * 8 + i;
                if (token >= tokens) break;
                const float4 found = load_shared4(piece_at(i, piece));
                u16 *to = y + (long long)token * out_features;
                if (together) *(float4 *)(to + start) = found;
                else {
                    const unsigned pairs[4] = {__float_as_uint(found.x), __float_as_uint(found.y),
                                               __float_as_uint(found.z), __float_as_uint(found.w)};
#pragma unroll
                    for (int k = 0; k < 8; k++)
                        if (k < left)
                            to[places ? places[half * n + row8 + k] : start + k] = (u16)(pairs[k / 2] >> k % 2 * 16);
                }
            }
            if (SPLIT == 1) {
                before_fetching();
                __syncwarp();
                release(before);
            }
        }
        if (PAIR > 1 && SPLIT == 1) cluster_sync(); // nobody sends to a block that has ended
    }
}
