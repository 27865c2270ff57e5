// Products of packed layers with one or two tokens: phase codes, scales of the tensor or of rows.
// prelude.cu comes first.
//
// Sums of integers. Signs become operands of int8 tensor cores with one instruction for four: an int32 of words AND
// (0x01010101 << b) is four numbers bit * 2^b. Activations are integers: X = x * 2^e, rounded, e from the largest of
// the token; X * 2^(7 - b) (negated for b = 7, whose bit is -128) is cut into four signed digits of 8 bits. The 8
// columns of a product are (digit, part), part 0 real and 1 imaginary, of ONE token; its 16 rows are the signs p of 8
// rows of the codes, then q. Bits are 0 or 1: (p + q) / 2 is accP + accQ - S, S the sum of all activations. Sums of
// integers are exact; the order of others is fixed: a result has the same bits in each run.
//
//     unit      8 rows of the codes (a tile) times a chunk of 16 BK columns, all signs: 8 rows of words lie together in
//               each pass. A warp copies its units to its own places in shared memory, DEPTH of them ahead. A lane (g =
//               lane / 4 is the row, t = lane % 4) reads J int32 of each sign; in odd rows p is q and q is p, for the
//               banks
//     columns   int32 v = J t + j of a row, byte y, bit b: column (b + 8 (y & 1)) BK + 2 v + (y >> 1) of the chunk
//     B         made once a block, as fragments [chunk][quad][product][lane]
//     ranges    the blocks of a cluster (RANGES) have the same tiles, and each a range of the chunks. They add up out
//               of each other's memory
//     warps     `parts` of them share a tile, each has every so many-th chunk; the others have other tiles. At the end
//               of a tile a warp knows its part of 16 outputs; parts are added once, at the end of the block
//
// float32 activations are two integers each (PIECES), 46 bits; others one of 22 bits, a magic number's mantissa.
// Activations that are not finite make their token's outputs NaN. Where the largest of a token is below 2^-105, its
// bits get fewer.
//
// Compiled at run time for: STAGES G BK (of the words), TOKENS (1 or 2), KIND (of x and y: 1 float32, 2 bf16, 3 fp16),
// ALIGNED (whether 8 activations can be read at once), HOPPER (whether for 9.0 or more, which copies by itself), EARLY,
// WARPS, DEPTH, BLOCKS (of a multiprocessor), RANGES, JOBS (16 activations of a lane each, for a warp).

constexpr int PIECES = KIND == 1 ? 2 : 1;
constexpr int TILES = TOKENS * PIECES;     // products of 8 columns
constexpr int COLUMNS = 16 * BK;           // of a chunk
constexpr int ROW = G * BK * 2;            // bytes of a row of a unit in a pass
constexpr int PASSES = 2 * PAIRS / G;
constexpr int UNIT = PASSES * 8 * ROW;
constexpr int QUADS = 2 * J;               // of a chunk: 4 registers of B, two steps of 32 columns
constexpr int CHUNK = QUADS * TILES * 512; // bytes of B
constexpr int TOP = KIND == 1 ? 149 : 148; // X < 2^23 or 2^22
constexpr int LEAST = TOP - 126;           // exponent of the largest activation
template <int> struct RealOf { typedef float Type; };
template <> struct RealOf<1> { typedef double Type; };
typedef RealOf<KIND>::Type Real;
template <int> struct WholeOf { typedef int Type; };
template <> struct WholeOf<1> { typedef i64 Type; };
typedef WholeOf<KIND>::Type Whole; // the sum of what a lane has of X
constexpr bool LATE = PAIRS * TILES > 24; // scales are loaded when sums are known: registers are scarce

struct Group { u32 v[2 * J * SIZE / 4]; }; // 2 J neighbouring activations

// activations of a part from column `at`, zeros outside
DEVICE Group load_group(const Arguments &a, i64 row, int at) {
    constexpr int WIDE = 2 * J * SIZE / 4 < 4 ? 2 : 4; // int32 of a load
    Group found = {};
    const u32 *from = (const u32 *)((const unsigned char *)a.x + (row + at) * SIZE);
    if (ALIGNED) {
        if (at < a.m)
#pragma unroll
            for (int i = 0; i < 2 * J * SIZE / 4; i += WIDE) {
                const Several<WIDE>::Type some = load_now((const Several<WIDE>::Type *)(from + i));
#pragma unroll
                for (int k = 0; k < WIDE; k++) found.v[i + k] = some.v[k];
            }
    } else {
#pragma unroll
        for (int i = 0; i < 2 * J; i++)
            if (at + i < a.m) {
                if (KIND == 1)
                    found.v[i * SIZE / 4] = from[i];
                else
                    found.v[i * SIZE / 4] |= (u32)((const u16 *)from)[i] << 16 * (i % 2);
            }
    }
    return found;
}

// The words of a warp's units, one after the other, on their way into shared memory. All lanes of the warp call.
struct Fetcher {
    unsigned char *places;
    u64 *full;                  // barriers of the places
    int tile, chunk, slot;      // to fetch next
    int ready = 0, parity = 0;  // to wait for next

    DEVICE void prepare(int lane) {
#if HOPPER
        if (lane == 0) {
#pragma unroll 1
            for (int i = 0; i < DEPTH; i++) barrier_init(full + i);
            barriers_ready();
        }
        warp_sync();
#endif
    }
    DEVICE void next(const Arguments &a, int last, int again, int end, int tiles, int chunks, int lane) {
        if (tile < last) {
            const u32 bytes = (a.n - tile * 8 < 8 ? a.n - tile * 8 : 8) * ROW; // of a pass
            const u16 *from = a.words + chunk * a.chunk_stride + (i64)tile * (8 * G * BK);
            unsigned char *to = places + slot * UNIT;
#if HOPPER
            if (lane == 0) {
                expect(full + slot, PASSES * bytes);
#pragma unroll
                for (int pass = 0; pass < PASSES; pass++)
                    copy_bulk(to + pass * (8 * ROW), from + pass * a.pass_stride, bytes, full + slot);
            }
#else
#pragma unroll
            for (int pass = 0; pass < PASSES; pass++)
#pragma unroll
                for (u32 at = 16 * lane; at < 8 * ROW; at += 512)
                    if (at < bytes) copy_async<16>(to + pass * (8 * ROW) + at, from + pass * a.pass_stride + at / 2);
#endif
            chunk += chunks;
            if (chunk >= end) chunk = again, tile += tiles;
        }
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
#if !HOPPER
        commit();
#endif
    }
    DEVICE void fill(const Arguments &a, int last, int again, int end, int tiles, int chunks, int lane) {
        prepare(lane);
#pragma unroll 1
        for (int d = 0; d < DEPTH; d++) next(a, last, again, end, tiles, chunks, lane);
    }
    // the words of the next unit, in registers
    DEVICE void take(int g, int t, u32 (*word)[J]) {
#if HOPPER
        wait_for(full + ready, parity);
#else
        wait<DEPTH - 1>();
        warp_sync();
#endif
        const unsigned char *here = places + ready * UNIT + g * ROW + 4 * J * t;
        const int other = g % 2 * (2 * BK);
#pragma unroll
        for (int sign = 0; sign < 2 * PAIRS; sign++) {
            const int at = sign / G * (8 * ROW) + sign % G * (2 * BK);
            const Words found = *(const Words *)(sign % 2 ? here - other + at : here + other + at);
#pragma unroll
            for (int j = 0; j < J; j++) word[sign][j] = found.v[j];
        }
        if (++ready == DEPTH) ready = 0, parity ^= 1;
        warp_sync();
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) CLUSTER
multiply_few(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, warp = from_first_lane(threadIdx.x / 32), g = lane / 4, t = lane % 4;
    const int parts = 1 << a.log_parts, part = warp & (parts - 1); // warps of a tile
    const int groups = WARPS >> a.log_parts, group = warp >> a.log_parts;
    const int rank = blockIdx.x % RANGES, cluster = blockIdx.x / RANGES;
    const int before = a.chunks * rank / RANGES, end_chunk = a.chunks * (rank + 1) / RANGES;
    const int chunks = end_chunk - before, most_chunks = (a.chunks + RANGES - 1) / RANGES; // of this block, of any
    const int first = cluster * a.tiles + (cluster < a.more ? cluster : a.more);
    const int last = first + a.tiles + (cluster < a.more ? 1 : 0);
    unsigned char *const operands = memory + WARPS * DEPTH * UNIT; // B, [chunk]
    // [tile][part][token][row][half], 16 numbers between tiles: other banks. At the same place in all blocks
    // of a cluster
    Part *const sums = (Part *)(operands + most_chunks * CHUNK);
    const int tile_sums = (parts * TOKENS + 1) * 16;
    u64 *const full = (u64 *)(sums + a.batch * tile_sums); // barriers: [warp][place]
    i64 *const totals = (i64 *)(full + WARPS * DEPTH);     // sums of X, [warp][part]
    u32 *const largest = (u32 *)(totals + 2 * WARPS);      // [warp]

    Fetcher fetcher = {memory + warp * (DEPTH * UNIT), full + warp * DEPTH, first + group, before + part, 0};
    let_next_begin();
    // activations first, as what comes after them waits for them; or words while the kernel before this one still runs
    if (EARLY) fetcher.fill(a, last, before + part, end_chunk, groups, parts, lane);
    wait_for_previous();
    constexpr int E = 4 / J; // bits of a job
    const int i = lane / 8, half = lane / 4 % 2, its = warp % TOKENS;
    const i64 row = (its < a.tokens ? its : a.tokens - 1) * a.x_stride + half * a.m;
    Group x[JOBS][E][2]; // of bits 2 i + e, and 8 more
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        const int piece = (warp + job * WARPS) / TOKENS, bit = 2 * i + piece % (J / 2);
        const int at = (before + piece / (J / 2)) * COLUMNS + bit * BK + 2 * J * t;
#pragma unroll
        for (int e = 0; e < E; e++)
#pragma unroll
            for (int more = 0; more < 2; more++) x[job][e][more] = load_group(a, row, at + (e + 8 * more) * BK);
    }
    if (!EARLY) fetcher.fill(a, last, before + part, end_chunk, groups, parts, lane);
    u32 most = 0;
#pragma unroll
    for (int k = 0; k < JOBS * E * 2; k++) most = larger(most, x[k / 2 / E][k / 2 % E][k % 2]);
    most = warp_max(most);
    if (lane == 0) largest[warp] = most;
    __syncthreads();
    u32 sizes[TOKENS];
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
        sizes[token] = 0;
#pragma unroll
        for (int w = token; w < WARPS; w += TOKENS)
            sizes[token] = sizes[token] > largest[w] ? sizes[token] : largest[w];
    }

    // fragments: a lane makes 16 columns of a part, 4 digits each
    const float up = power_of_two(TOP - exponent_of(its ? sizes[TOKENS - 1] : sizes[0], LEAST));
    Whole total = 0;
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        const int piece = (warp + job * WARPS) / TOKENS;
        if (piece >= chunks * (J / 2)) break;
#pragma unroll
        for (int e = 0; e < E; e++) {
            const int bit = 2 * i + e + piece % (J / 2);
            const u32 times = bit == 7 ? ~0u : 128u >> bit, plus = 0x80808080u - (KIND == 1 ? 0u : 0x4b400000u * times);
#pragma unroll
            for (int rest = 0; rest < PIECES; rest++)
#pragma unroll
                for (int pair = 0; pair < J / 2; pair++) {
                    Two digits[4];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        u32 z[4];
#pragma unroll
                        for (int y = 0; y < 4; y++) {
                            const float value = number_of(x[job][e][y & 1], 4 * pair + 2 * j + (y >> 1)) * up;
                            if (KIND == 1) {
                                int whole = __float2int_rn(value);
                                if (rest) whole = __float2int_rn((value - (float)whole) * 8388608.0f);
                                total += rest ? (Whole)whole : (Whole)whole * 8388608;
                                z[y] = (u32)whole * times + plus;
                            } else {
                                const u32 bits = __float_as_uint(value + 12582912.0f);
                                total += (int)(bits - 0x4b400000u);
                                z[y] = bits * times + plus;
                            }
                        }
                        const u32 low01 = bytes_of(z[0], z[1], 0x5140), low23 = bytes_of(z[2], z[3], 0x5140);
                        const u32 high01 = bytes_of(z[0], z[1], 0x7362), high23 = bytes_of(z[2], z[3], 0x7362);
                        digits[0].v[j] = bytes_of(low01, low23, 0x5410) ^ 0x80808080u;
                        digits[1].v[j] = bytes_of(low01, low23, 0x7632) ^ 0x80808080u;
                        digits[2].v[j] = bytes_of(high01, high23, 0x5410) ^ 0x80808080u;
                        digits[3].v[j] = bytes_of(high01, high23, 0x7632) ^ 0x80808080u;
                    }
                    const int fragment = (4 * pair + i) * TILES + its * PIECES + rest;
                    unsigned char *to = operands + piece / (J / 2) * CHUNK + fragment * 512;
                    to += (4 * half + t) * 16 + bit % 2 * 8;
#pragma unroll
                    for (int digit = 0; digit < 4; digit++) *(Two *)(to + 128 * digit) = digits[digit];
                }
        }
    }
    Real down[TOKENS], all[TOKENS][2]; // of the lane's sums; sums of all activations
    i64 of_warp = total;
#pragma unroll
    for (int other = 1; other < 32; other *= other == 2 ? 4 : 2) of_warp += from_lane_xor(of_warp, other);
    if (lane == 4 * half) totals[2 * warp + half] = of_warp;
    __syncthreads();
#pragma unroll
    for (int token = 0; token < TOKENS; token++) {
        const u32 size = sizes[token];
        const Real one = power_of_two(exponent_of(size, LEAST) - TOP); // of X
        down[token] = one * (1.0f / 128 * (float)(1 << 8 * t));
        if (too_large(size)) down[token] = __uint_as_float(0x7fc00000u);
#pragma unroll
        for (int of = 0; of < 2; of++) {
            i64 sum = 0;
            if (part == 0) // whose sums it is taken from
#pragma unroll
                for (int w = token; w < WARPS; w += TOKENS) sum += totals[2 * w + of];
            all[token][of] = (Real)sum * one * (KIND == 1 ? 1.0f / 8388608 : 1.0f);
        }
    }

    for (int start = first; start < last; start += a.batch) {
        const int end = start + a.batch < last ? start + a.batch : last;
        for (int tile = start + group; tile < end; tile += groups) {
            float scale[PAIRS][2];
            if (!LATE) load_scales(a, tile * 8 + g, g % 2 ? -1.0f : 1.0f, scale);
            int acc[PAIRS][TILES][4] = {};
#pragma unroll 1
            for (int chunk = part; chunk < chunks; chunk += parts) {
                u32 word[2 * PAIRS][J] = {};
                fetcher.take(g, t, word);
                fetcher.next(a, last, before + part, end_chunk, groups, parts, lane);
                const Four *const fragments = (const Four *)(operands + chunk * CHUNK) + lane;
#pragma unroll
                for (int quad = 0; quad < QUADS; quad++)
                    multiply_signs(word, quad / 4 * 2, 0x01010101u << 2 * (quad % 4), fragments + quad * TILES * 32,
                                   acc);
            }
            if (LATE) load_scales(a, tile * 8 + g, g % 2 ? -1.0f : 1.0f, scale);
            Part *const to = sums + (tile - start) * tile_sums + part * (TOKENS * 16) + 2 * g;
            const int none[2] = {};
            Real of_all[2] = {}; // what outputs have of the sums of all activations
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++) {
                of_all[0] += scale[pair][0];
                of_all[1] += pair % 2 ? -scale[pair][0] : scale[pair][0];
            }
#pragma unroll
            for (int token = 0; token < TOKENS; token++) { // this lane: row g, digit t
                Real re = 0.0f, im = 0.0f;
#pragma unroll
                for (int piece = PIECES - 1; piece >= 0; piece--) {
                    Real one, two;
                    outputs(acc, token * PIECES + piece, none, scale, one, two);
                    re = (re + one) * (piece ? 1.0f / 8388608 : down[token]);
                    im = (im + two) * (piece ? 1.0f / 8388608 : down[token]);
                }
                re += from_lane_xor(re, 1);
                im += from_lane_xor(im, 1);
                re += from_lane_xor(re, 2);
                im += from_lane_xor(im, 2);
                if (t == 0) to[token * 16] = re - of_all[0] * all[token][0];
                if (t == 1) to[token * 16 + 1] = im - of_all[1] * all[token][1];
            }
        }
        add_parts(a, sums, tile_sums, start, end, rank, parts);
        if (RANGES > 1 || end < last) all_sync();
    }
}
