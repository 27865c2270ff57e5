// One token of a decoder layer of LLaMA's form around its packed layers: norms, rotary positions, the gated unit and the
// sums. They are small, but as operations of a framework they take as long as the codes take to be read.
#include "kernels.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT extern "C" __attribute__((visibility("default")))
#if defined(FAIRY2I_X86) && defined(__linux__)
#define VECTORIZED __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define VECTORIZED
#endif

extern "C" int32_t fairy2i_linear(int32_t count, const Layer* const* layers, const void* x, void* const* y,
                                  const float* const* bias, int64_t tokens, int32_t dtype, int32_t threads);

static int64_t columns_in(const Layer& layer) { return layer.cols * (layer.kind == KIND_PHASE ? 2 : 1); }
static int64_t columns_out(const Layer& layer) { return layer.rows * (layer.kind == KIND_PHASE ? 2 : 1); }

// x / sqrt(mean(x^2) + eps) * weight
VECTORIZED static void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
    enum { WAYS = 16 };
    float parts[WAYS] = {};
    int64_t i = 0;
    for (; i + WAYS <= size; i += WAYS)
        for (int j = 0; j < WAYS; j++) parts[j] += x[i + j] * x[i + j];
    for (; i < size; i++) parts[0] += x[i] * x[i];
    double sum = 0;
    for (int j = 0; j < WAYS; j++) sum += static_cast<double>(parts[j]);
    const float factor = 1 / sqrtf(static_cast<float>(sum / static_cast<double>(size)) + eps);
    for (i = 0; i < size; i++) out[i] = x[i] * factor * weight[i];
}

// Turn the two halves of each head by the angles whose cosines and sines are given.
VECTORIZED static void turn(float* x, const float* cosine, const float* sine, int64_t heads, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t h = 0; h < heads; h++, x += size)
        for (int64_t i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cosine[i] - b * sine[i];
            x[i + half] = b * cosine[i + half] + a * sine[i + half];
        }
}

// gate = gate / (1 + exp(-gate)) * up
VECTORIZED static void gated(float* gate, const float* up, int64_t size) {
    for (int64_t i = 0; i < size; i++) {
        // exp(-g) = 2^n e^r, |r| <= log(2) / 2; the polynomial is Taylor's, short of e^r by less than 2^-26 of it
        float x = -gate[i];
        x = x > 87 ? 87 : x < -87 ? -87 : x;  // beyond, exp is past what float32 holds
        const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low bits
        const float n = shifted - 12582912.0f;
        const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
        float e = 1.98412698e-4f;
        e = e * r + 1.38888889e-3f, e = e * r + 8.33333333e-3f, e = e * r + 4.16666667e-2f;
        e = e * r + 1.66666667e-1f, e = e * r + 0.5f, e = e * r + 1, e = e * r + 1;
        int32_t bits;
        memcpy(&bits, &shifted, 4);
        const int32_t power = (bits - 0x4B400000 + 127) << 23;
        float scale;
        memcpy(&scale, &power, 4);
        gate[i] = gate[i] == gate[i] ? gate[i] / (1 + e * scale) * up[i] : gate[i];
    }
}

VECTORIZED static void add(float* to, const float* x, int64_t size) {
    for (int64_t i = 0; i < size; i++) to[i] += x[i];
}

// Queries, keys and values of `layers` {q, k, v} for the normalized hidden states, queries and keys turned.
//     hidden (tokens, features); cosine, sine (tokens, head), or of one token where `shared`; outputs as the layers' are
// Returns 0, or -1 when memory ran out.
EXPORT int32_t fairy2i_decoder_in(const Layer* const* layers, const float* const* bias, const float* hidden,
                                  const float* norm, float eps, const float* cosine, const float* sine, int32_t shared,
                                  int64_t head, void* const* outputs, int64_t tokens, int32_t threads) {
    const int64_t features = columns_in(*layers[0]);
    float* x = static_cast<float*>(malloc(tokens * features * sizeof(float)));
    if (!x) return -1;
    for (int64_t t = 0; t < tokens; t++) rms_norm(hidden + t * features, norm, eps, features, x + t * features);
    const int32_t failed = fairy2i_linear(3, layers, x, outputs, bias, tokens, DTYPE_F32, threads);
    for (int i = 0; i < 2 && !failed; i++) {
        const int64_t size = columns_out(*layers[i]);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = shared ? 0 : t * head;
            turn(static_cast<float*>(outputs[i]) + t * size, cosine + at, sine + at, size / head, head);
        }
    }
    free(x);
    return failed;
}

// What follows the attention: `layers` {o, gate, up, down}; `hidden` (tokens, features) becomes the layer's output.
// Returns 0, or -1 when memory ran out, with `hidden` as it was.
EXPORT int32_t fairy2i_decoder_out(const Layer* const* layers, const float* const* bias, const float* attended,
                                   const float* norm, float eps, float* hidden, int64_t tokens, int32_t threads) {
    const int64_t features = columns_out(*layers[0]), wide = columns_out(*layers[1]);
    float* memory = static_cast<float*>(malloc(tokens * (3 * features + 2 * wide) * sizeof(float)));
    if (!memory) return -1;
    float *sum = memory, *x = sum + tokens * features, *y = x + tokens * features;
    float *gate = y + tokens * features, *up = gate + tokens * wide;
    void* first[1] = {sum};
    int32_t failed = fairy2i_linear(1, layers, attended, first, bias, tokens, DTYPE_F32, threads);
    if (!failed) {
        add(sum, hidden, tokens * features);
        for (int64_t t = 0; t < tokens; t++) rms_norm(sum + t * features, norm, eps, features, x + t * features);
        void* both[2] = {gate, up};
        failed = fairy2i_linear(2, layers + 1, x, both, bias + 1, tokens, DTYPE_F32, threads);
    }
    if (!failed) {
        gated(gate, up, tokens * wide);
        void* last[1] = {y};
        failed = fairy2i_linear(1, layers + 3, gate, last, bias + 3, tokens, DTYPE_F32, threads);
    }
    if (!failed) {
        add(sum, y, tokens * features);
        memcpy(hidden, sum, tokens * features * sizeof(float));
    }
    free(memory);
    return failed;
}
