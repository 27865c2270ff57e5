// Products of packed layers with 3 to 16 tokens of bf16 or fp16: phase codes, scales of the tensor or of rows.
// prelude.cu comes first.
//
// Sums in float32. An int32 of words AND (0x00010001 << b), b < 8, is two fp16 numbers bit * 2^(b - 24), denormals;
// bits 8 to 15 are moved to the right by 8 first. Activations are fp16 numbers x * 2^(e + 7 - b), e from the largest of
// the token, which becomes 2^8 or more: all that is lost is below 2^-32 of it. The 8 columns of a product are (token,
// part) of 4 tokens, part 0 real and 1 imaginary: a quarter of the products of decode.cu, but twice the instructions
// for signs. Its 16 rows are the signs p of 8 rows of the codes, then q. The order of all sums is fixed: a result has
// the same bits in each run.
//
//     unit      8 rows of the codes (a tile) times a chunk of 16 BK columns, all signs: a lane (g = lane / 4 is the
//               row, t = lane % 4) has J int32 of each sign, 4 J neighbouring bytes, and copies them itself into a
//               place of shared memory that only it reads, DEPTH units ahead: no barrier, no registers
//     columns   int32 v = J t + j of a row, bit b, half y: column b BK + 2 v + y of the chunk. The activations are put
//               in this order once a block, as fragments
//     ranges    the blocks of a cluster (RANGES) have the same tiles, and each a range of the chunks: fragments of many
//               tokens and columns do not fit into one, and take their time. They add up out of each other's memory
//     warps     `parts` of them share a tile, each has every so many-th chunk; the others have other tiles. At the end
//               of a tile a warp knows its part of 16 outputs; parts are added once, at the end of the block
//     signs     bits are 0 or 1: the sum of +-X 2^7 is 2 acc - S, S the sum for bits that are all 1
//
// Activations that are not finite make their token's outputs NaN. Where the largest of a token is below 2^-112, its
// bits get fewer.
//
// Compiled at run time for: STAGES G BK (of the words), TOKENS (4, 8, 12 or 16), KIND (of x and y: 2 bf16, 3 fp16),
// ALIGNED (whether 8 activations can be read at once), EARLY, WARPS, DEPTH, BLOCKS (of a multiprocessor), RANGES, JOBS
// (16 activations of a lane each, for a warp).

constexpr int TILES = TOKENS / 4; // products of 8 columns
constexpr int QUADS = 4 * J;      // of a chunk: 4 registers of B, two steps of 16 columns
constexpr int PLACE = 32 * 4 * J; // bytes of a sign of a unit
constexpr int UNIT = 2 * PAIRS * PLACE;
constexpr int TOP = 135;          // X < 2^9
constexpr int LEAST = TOP - 119;  // exponent of the largest activation
constexpr bool LATE = PAIRS * TILES > 24; // scales are loaded when sums are known: registers are scarce

// 4 activations of a part from column `at`, zeros outside
DEVICE Two load_four(const Arguments &a, i64 row, int at) {
    Two found = {};
    const u16 *from = (const u16 *)a.x + row + at;
    if (ALIGNED) {
        if (at < a.m) found = load_now((const Two *)from);
    } else {
        for (int i = 0; i < 4; i++)
            if (at + i < a.m) found.v[i / 2] |= (u32)from[i] << 16 * (i % 2);
    }
    return found;
}

// The words of a warp's units, one after the other, on their way into shared memory.
struct Fetcher {
    const u16 *words; // of the lane in row 0
    unsigned char *to;
    int tile, chunk, slot;

    DEVICE void next(const Arguments &a, int last, int again, int end, int groups, int g) {
        if (tile < last) {
            int row = tile * 8 + g;
            row = row < a.n ? row : a.n - 1;
            const u16 *from = words + chunk * a.chunk_stride + (i64)row * (G * BK);
            unsigned char *here = to + slot * UNIT;
#pragma unroll
            for (int pair = 0; pair < PAIRS; pair++)
#pragma unroll
                for (int q = 0; q < 2; q++)
                    copy_async<4 * J>(here + (2 * pair + q) * PLACE,
                                      from + pair / (G / 2) * a.pass_stride + (2 * (pair % (G / 2)) + q) * BK);
            chunk += 1 << a.log_parts;
            if (chunk >= end) chunk = again, tile += groups;
        }
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
        commit();
    }
    DEVICE void fill(const Arguments &a, int last, int again, int end, int groups, int g) {
#pragma unroll 1
        for (int d = 0; d < DEPTH; d++) next(a, last, again, end, groups, g);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) CLUSTER
multiply_few(const __grid_constant__ Arguments a) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int parts = 1 << a.log_parts, part = warp & (parts - 1); // warps of a tile
    const int groups = WARPS >> a.log_parts, group = warp >> a.log_parts;
    const int rank = blockIdx.x % RANGES, cluster = blockIdx.x / RANGES;
    const int before = a.chunks * rank / RANGES, end_chunk = a.chunks * (rank + 1) / RANGES;
    const int chunks = end_chunk - before; // of this block
    const int first = cluster * a.tiles + (cluster < a.more ? cluster : a.more);
    const int last = first + a.tiles + (cluster < a.more ? 1 : 0);
    unsigned char *const fragments = memory + WARPS * DEPTH * UNIT; // [chunk][quad][tile][lane] of 16 bytes
    // [tile][part][token][row][half], 16 numbers between tiles: other banks. At the same place in all blocks
    // of a cluster
    float *const sums = (float *)(fragments + (a.chunks + RANGES - 1) / RANGES * QUADS * TILES * 512);
    const int tile_sums = (parts * TOKENS + 1) * 16;
    u32 *const largest = (u32 *)(sums + a.batch * tile_sums); // [token]
    float *const parts_of_ones = (float *)(largest + TOKENS); // [half of a chunk][tile][t][part]
    if (threadIdx.x < TOKENS) largest[threadIdx.x] = 0;

    unsigned char *const place = memory + warp * (DEPTH * UNIT) + lane * (4 * J);
    Fetcher fetcher = {a.words + 2 * J * t, place, first + group, before + part, 0};
    let_next_begin();
    // activations first, as what comes after them waits for them; or words while the kernel before this one still runs
    if (EARLY) fetcher.fill(a, last, before + part, end_chunk, groups, g);
    wait_for_previous();
    const int i = lane / 8, half = lane / 4 % 2;
    Two x[JOBS][2][2]; // of bits 2 i + e, and 8 more
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        const int piece = (warp + job * WARPS) / TOKENS, its = (warp + job * WARPS) % TOKENS;
        const int at = (before + piece / (J / 2)) * 16 * BK + 2 * J * t + piece % (J / 2) * 4;
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
            for (int more = 0; more < 2; more++)
                x[job][e][more] = load_four(a, (its < a.tokens ? its : a.tokens - 1) * a.x_stride + half * a.m,
                                            at + (2 * i + e + 8 * more) * BK);
    }
    if (!EARLY) fetcher.fill(a, last, before + part, end_chunk, groups, g);

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
    float down[TILES]; // of the lane's sums
#pragma unroll
    for (int k = 0; k < TILES; k++) {
        const u32 size = largest[4 * k + t];
        down[k] = power_of_two(exponent_of(size, LEAST) - TOP);
        if (too_large(size)) down[k] = __uint_as_float(0x7fc00000u);
    }

    // fragments: a lane makes 16 columns of a part
#pragma unroll
    for (int job = 0; job < JOBS; job++) {
        const int piece = (warp + job * WARPS) / TOKENS, its = (warp + job * WARPS) % TOKENS;
        if (piece >= chunks * (J / 2)) break;
        const float up = power_of_two(TOP - exponent_of(largest[its], LEAST));
#pragma unroll
        for (int more = 0; more < 2; more++) {
            Four b;
#pragma unroll
            for (int e = 0; e < 2; e++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const Two &from = x[job][e][more];
                    const float factor = up * (float)(128 >> (2 * i + e));
                    b.v[2 * e + j] = to_halves(number_of(from, 2 * j) * factor, number_of(from, 2 * j + 1) * factor);
                }
            ((Four *)fragments)[((piece * 8 + i + 4 * more) * TILES + its / 4) * 32 + its % 4 * 8 + 4 * half + t] = b;
        }
    }
    __syncthreads();

    const Four *const mine = (const Four *)fragments + lane;
    for (int item = warp; item < 2 * chunks; item += WARPS) { // S of half a chunk
        float all[TILES][2][4] = {};
#pragma unroll
        for (int quad = 0; quad < QUADS / 2; quad++)
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                const Four b = mine[((item * (QUADS / 2) + quad) * TILES + tile) * 32];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const u32 mask = 0x00010001u << (2 * ((item * (QUADS / 2) + quad) % 4) + e);
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
    float ones[TILES][2] = {}; // S of this warp's chunks
    for (int chunk = part; chunk < chunks; chunk += parts)
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++)
            ones[i / 2 % TILES][i % 2] += parts_of_ones[(2 * chunk * TILES + i / 2) * 8 + 2 * t + i % 2];

    int slot = 0;
    for (int start = first; start < last; start += a.batch) {
        const int end = start + a.batch < last ? start + a.batch : last;
        for (int tile = start + group; tile < end; tile += groups) {
            float scale[PAIRS][2];
            if (!LATE) load_scales(a, tile * 8 + g, 1.0f, scale);
            float acc[PAIRS][TILES][4] = {};
#pragma unroll 1
            for (int chunk = part; chunk < chunks; chunk += parts) {
                u32 word[2 * PAIRS][J];
                wait<DEPTH - 1>();
                const unsigned char *here = place + slot * UNIT;
#pragma unroll
                for (int sign = 0; sign < 2 * PAIRS; sign++) {
                    const Words found = *(const Words *)(here + sign * PLACE);
#pragma unroll
                    for (int j = 0; j < J; j++) word[sign][j] = found.v[j];
                }
                slot = slot + 1 == DEPTH ? 0 : slot + 1;
                fetcher.next(a, last, before + part, end_chunk, groups, g);
                const Four *from = mine + chunk * (QUADS * TILES * 32);
#pragma unroll
                for (int quad = 0; quad < QUADS; quad++) {
                    const int j = quad / 8 * 2;
                    if (quad % 8 == 4) // the upper 8 bits of both numbers
#pragma unroll
                        for (int sign = 0; sign < 2 * PAIRS; sign++) word[sign][j] >>= 8, word[sign][j + 1] >>= 8;
                    multiply_signs(word, j, 0x00010001u << 2 * (quad % 4), from + quad * TILES * 32, acc);
                }
            }
            if (LATE) load_scales(a, tile * 8 + g, 1.0f, scale);
            float *const to = sums + (tile - start) * tile_sums + part * (TOKENS * 16) + 2 * g;
#pragma unroll
            for (int i = 0; i < TILES; i++) { // this lane: row g, token t of a tile
                float re, im;
                outputs(acc, i, ones[i], scale, re, im);
                const Two both = {__float_as_uint(re * 131072.0f * down[i]), __float_as_uint(im * 131072.0f * down[i])};
                *(Two *)(to + (4 * i + t) * 16) = both;
            }
        }
        add_parts(a, sums, tile_sums, start, end, rank, parts);
        if (RANGES > 1 || end < last) all_sync();
    }
}
