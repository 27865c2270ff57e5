// ops/cuda/wide.cu as a library for the processor: `run` is a launch. Its arguments are those of the kernel, the grid,
// and bytes of memory.
#include "wide.cu"

static struct {
    Map map, words;
    const float *scales;
    const void *bias;
    int bias_kind;
    const int *places;
    u16 *y;
    int tokens, out_features, n, m, chunks;
    int shared;
    float *far_sums;
    int *flags;
} call;

static void one() {
    multiply_wide(call.map, call.words, call.scales, call.bias, call.bias_kind, call.places, call.y, call.tokens,
                  call.out_features, call.n, call.m, call.chunks, call.shared, call.far_sums,
                  call.flags);
}

extern "C" void run(const u64 *map, const u64 *words, const float *scales, const void *bias, int bias_kind,
                    const int *places, u16 *y, int tokens, int out_features, int n, int m, int chunks, int shared,
                    float *far_sums, int *flags, int grid_x, int bytes) {
    const long results = 2L * tokens * out_features;
    call = {{}, {}, guarded(scales, 16 * STAGES * (ROWS ? n : 1)),
            guarded(bias, out_features * (bias_kind == 1 ? 4 : 2)), bias_kind, guarded(places, 8 * n),
            guarded(y, results), tokens, out_features, n, m, chunks, shared, far_sums, flags};
    std::memcpy(call.map.opaque, map, sizeof(Map));
    std::memcpy(call.words.opaque, words, sizeof(Map));
    gridDim = {grid_x, SPLIT, 1};
    for (int x = 0; x < grid_x; x += PAIR) run_cluster(x, PAIR, SPLIT, bytes, one);
    give_back(y, call.y, results);
}
