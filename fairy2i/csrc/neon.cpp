// Segment kernels for ARM with the dot-product extension (ARMv8.2 and later): 4 rows at a time.
#include "kernels.h"
#include <arm_neon.h>
#include <stdlib.h>

namespace fairy2i_neon {
enum { LUT = 16 };
#define KERNEL static __attribute__((noinline))

// The bytes of the floats that the lowest nibbles of 4 words choose from a table of 16: 4 * index + 0, 1, 2, 3.
static inline uint8x16_t float_bytes(uint32x4_t index) {
    static const uint8_t first[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    static const uint8_t within[16] = {0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3};
    const uint8x16_t low = vqtbl1q_u8(vandq_u8(vreinterpretq_u8_u32(index), vdupq_n_u8(15)), vld1q_u8(first));
    return vaddq_u8(vshlq_n_u8(low, 2), vld1q_u8(within));
}

static inline uint8x16x4_t load_table(const float* table) {
    uint8x16x4_t all;
    for (int i = 0; i < 4; i++) all.val[i] = vreinterpretq_u8_f32(vld1q_f32(table + 4 * i));
    return all;
}

static inline float32x4_t look_up(float32x4_t sum, const uint8x16x4_t& table, uint8x16_t bytes) {
    return vaddq_f32(sum, vreinterpretq_f32_u8(vqtbl4q_u8(table, bytes)));
}

template <int NT>
KERNEL void exact_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared,
                                float* sums) {
    for (int j = 0; j < NT; j++)
        for (int rows = 0; rows < LANES; rows += 4) {
            float32x4_t acc[8];
            for (int k = 0; k < 8; k++) acc[k] = vdupq_n_f32(0);
            for (int64_t b = 0; b < blocks; b++) {
                const float* table = reinterpret_cast<const float*>(prepared[j]) + b * 64;
                uint32x4_t word = vld1q_u32(words + b * stride + rows);
                for (int g = 0; g < 2; g++) {
                    const uint8x16x4_t first = load_table(table + g * 16), second = load_table(table + (2 + g) * 16);
                    for (int k = 0; k < 4; k++) {
                        const uint8x16_t bytes = float_bytes(word);
                        acc[2 * k] = look_up(acc[2 * k], first, bytes);
                        acc[2 * k + 1] = look_up(acc[2 * k + 1], second, bytes);
                        word = vshrq_n_u32(word, 4);
                    }
                }
            }
            for (int k = 0; k < 8; k++) vst1q_f32(sums + (j * 8 + k) * LANES + rows, acc[k]);
        }
}

template <int NT>
KERNEL void exact_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared,
                               float* sums) {
    for (int j = 0; j < NT; j++)
        for (int rows = 0; rows < LANES; rows += 4) {
            float32x4_t acc[2] = {vdupq_n_f32(0), vdupq_n_f32(0)};
            for (int64_t b = 0; b < blocks; b++) {
                const float* table = reinterpret_cast<const float*>(prepared[j]) + b * 128;
                uint32x4_t word = vld1q_u32(words + b * stride + rows);
                for (int g = 0; g < 8; g++) {
                    acc[g % 2] = look_up(acc[g % 2], load_table(table + g * 16), float_bytes(word));
                    word = vshrq_n_u32(word, 4);
                }
            }
            vst1q_f32(sums + j * LANES + rows, vaddq_f32(acc[0], acc[1]));
        }
}

static inline int8x16_t four(const int8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}

static inline int8x16_t lowest_bits(uint32x4_t word) {
    return vreinterpretq_s8_u8(vandq_u8(vreinterpretq_u8_u32(word), vdupq_n_u8(1)));
}

template <int NT>
KERNEL void int8_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared,
                               int32_t* sums) {
    for (int j = 0; j < NT; j++)
        for (int rows = 0; rows < LANES; rows += 4) {
            int32x4_t acc[8];
            for (int k = 0; k < 8; k++) acc[k] = vdupq_n_s32(0);
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t* x = reinterpret_cast<const int8_t*>(prepared[j]) + b * 16;
                uint32x4_t word = vld1q_u32(words + b * stride + rows);
                for (int g = 0; g < 2; g++) {
                    const int8x16_t first = four(x + g * 4), second = four(x + 8 + g * 4);
                    for (int k = 0; k < 4; k++) {
                        const int8x16_t bits = lowest_bits(word);
                        acc[2 * k] = vdotq_s32(acc[2 * k], bits, first);
                        acc[2 * k + 1] = vdotq_s32(acc[2 * k + 1], bits, second);
                        word = vshrq_n_u32(word, 1);
                    }
                }
            }
            for (int k = 0; k < 8; k++) vst1q_s32(sums + (j * 8 + k) * LANES + rows, acc[k]);
        }
}

template <int NT>
KERNEL void int8_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared,
                              int32_t* sums) {
    for (int j = 0; j < NT; j++)
        for (int rows = 0; rows < LANES; rows += 4) {
            int32x4_t acc[2] = {vdupq_n_s32(0), vdupq_n_s32(0)};
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t* x = reinterpret_cast<const int8_t*>(prepared[j]) + b * 32;
                uint32x4_t word = vld1q_u32(words + b * stride + rows);
                for (int g = 0; g < 8; g++) {
                    acc[g % 2] = vdotq_s32(acc[g % 2], lowest_bits(word), four(x + g * 4));
                    word = vshrq_n_u32(word, 1);
                }
            }
            vst1q_s32(sums + j * LANES + rows, vaddq_s32(acc[0], acc[1]));
        }
}

#include "work.inc"
}  // namespace fairy2i_neon

extern "C" void fairy2i_work_neon(Job* job) { fairy2i_neon::work(*job); }
