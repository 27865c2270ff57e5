// Segment kernels in plain C++, for any processor: the same layout, one row at a time.
#include "kernels.h"
#include <stdlib.h>

namespace fairy2i_portable {
enum { LUT = 16 };
#define KERNEL static __attribute__((noinline))

template <int NT>
KERNEL void exact_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, float* sums) {
    for (int i = 0; i < NT * 8 * LANES; i++) sums[i] = 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int j = 0; j < NT; j++) {
            const float* table = reinterpret_cast<const float*>(prepared[j]) + b * 64;
            for (int n = 0; n < 8; n++)
                for (int r = 0; r < LANES; r++) {
                    const uint32_t index = words[b * stride + r] >> (4 * n) & 15;
                    float* sum = sums + (j * 8 + n % 4 * 2) * LANES + r;
                    sum[0] += table[n / 4 * 16 + index];
                    sum[LANES] += table[(2 + n / 4) * 16 + index];
                }
        }
}

template <int NT>
KERNEL void exact_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, float* sums) {
    for (int i = 0; i < NT * LANES; i++) sums[i] = 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int j = 0; j < NT; j++) {
            const float* table = reinterpret_cast<const float*>(prepared[j]) + b * 128;
            for (int g = 0; g < 8; g++)
                for (int r = 0; r < LANES; r++) sums[j * LANES + r] += table[g * 16 + (words[b * stride + r] >> (4 * g) & 15)];
        }
}

static inline int32_t dot4(uint32_t bits, const int8_t* x) {  // bits 0, 8, 16, 24 say which of 4 activations count
    int32_t sum = 0;
    for (int c = 0; c < 4; c++) sum += static_cast<int32_t>(bits >> (8 * c) & 1) * x[c];
    return sum;
}

template <int NT>
KERNEL void int8_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, int32_t* sums) {
    for (int i = 0; i < NT * 8 * LANES; i++) sums[i] = 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int j = 0; j < NT; j++) {
            const int8_t* x = reinterpret_cast<const int8_t*>(prepared[j]) + b * 16;
            for (int n = 0; n < 8; n++)
                for (int r = 0; r < LANES; r++) {
                    const uint32_t bits = words[b * stride + r] >> n;
                    int32_t* sum = sums + (j * 8 + n % 4 * 2) * LANES + r;
                    sum[0] += dot4(bits, x + n / 4 * 4);
                    sum[LANES] += dot4(bits, x + 8 + n / 4 * 4);
                }
        }
}

template <int NT>
KERNEL void int8_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, int32_t* sums) {
    for (int i = 0; i < NT * LANES; i++) sums[i] = 0;
    for (int64_t b = 0; b < blocks; b++)
        for (int j = 0; j < NT; j++) {
            const int8_t* x = reinterpret_cast<const int8_t*>(prepared[j]) + b * 32;
            for (int g = 0; g < 8; g++)
                for (int r = 0; r < LANES; r++) sums[j * LANES + r] += dot4(words[b * stride + r] >> g, x + g * 4);
        }
}

#include "work.inc"
}  // namespace fairy2i_portable

extern "C" void fairy2i_work_portable(Job* job) { fairy2i_portable::work(*job); }
