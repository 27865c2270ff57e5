// Segment kernels for AVX2: 8 rows at a time, so that the sums stay in the 16 registers.
#include "kernels.h"
#include <immintrin.h>
#include <stdlib.h>

namespace fairy2i_avx2 {
enum { LUT = 8 };  // a register holds 8 floats: the entries that add x3; bit 3 of a nibble turns the sign
#define KERNEL static __attribute__((noinline))

static inline __m256 look_up(const float* table, __m256i index, __m256i sign) {
    const __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), index);  // looks at the lowest 3 bits
    return _mm256_xor_ps(found, _mm256_castsi256_ps(sign));
}

template <int NT>
KERNEL void exact_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, float* sums) {
    const __m256i top = _mm256_set1_epi32(INT32_MIN);
    for (int j = 0; j < NT; j++)
        for (int half_rows = 0; half_rows < LANES; half_rows += 8) {
            __m256 acc[8];
            for (int k = 0; k < 8; k++) acc[k] = _mm256_setzero_ps();
            for (int64_t b = 0; b < blocks; b++) {
                const float* table = reinterpret_cast<const float*>(prepared[j]) + b * 32;
                const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + b * stride + half_rows));
#pragma GCC unroll 8
                for (int n = 0; n < 8; n++) {
                    const __m256i index = _mm256_srli_epi32(word, 4 * n);
                    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(word, 28 - 4 * n), top);
                    const int k = n % 4 * 2;
                    acc[k] = _mm256_add_ps(acc[k], look_up(table + n / 4 * 8, index, sign));
                    acc[k + 1] = _mm256_add_ps(acc[k + 1], look_up(table + 16 + n / 4 * 8, index, sign));
                }
            }
            for (int k = 0; k < 8; k++) _mm256_storeu_ps(sums + (j * 8 + k) * LANES + half_rows, acc[k]);
        }
}

template <int NT>
KERNEL void exact_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, float* sums) {
    const __m256i top = _mm256_set1_epi32(INT32_MIN);
    for (int j = 0; j < NT; j++)
        for (int half_rows = 0; half_rows < LANES; half_rows += 8) {
            __m256 acc[4];
            for (int k = 0; k < 4; k++) acc[k] = _mm256_setzero_ps();
            for (int64_t b = 0; b < blocks; b++) {
                const float* table = reinterpret_cast<const float*>(prepared[j]) + b * 64;
                const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + b * stride + half_rows));
#pragma GCC unroll 8
                for (int n = 0; n < 8; n++) {
                    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(word, 28 - 4 * n), top);
                    acc[n % 4] = _mm256_add_ps(acc[n % 4], look_up(table + n * 8, _mm256_srli_epi32(word, 4 * n), sign));
                }
            }
            _mm256_storeu_ps(sums + j * LANES + half_rows,
                             _mm256_add_ps(_mm256_add_ps(acc[0], acc[1]), _mm256_add_ps(acc[2], acc[3])));
        }
}

static inline __m256i four(const int8_t* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm256_set1_epi32(v);
}

// Two neighbouring products in 16 bits: a segment adds at most 64 pairs of at most 2 * 127 each, 16256 in all.
static inline __m256i add_pairs(__m256i acc, __m256i bits, __m256i x) {
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(bits, x));
}

static inline void store_sums(int32_t* out, __m256i pairs) {
    const __m256i sum = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), sum);
}

template <int NT>
KERNEL void int8_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, int32_t* sums) {
    const __m256i one = _mm256_set1_epi8(1);
    for (int j = 0; j < NT; j++)
        for (int half_rows = 0; half_rows < LANES; half_rows += 8) {
            __m256i acc[8];
            for (int k = 0; k < 8; k++) acc[k] = _mm256_setzero_si256();
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t* x = reinterpret_cast<const int8_t*>(prepared[j]) + b * 16;
                const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + b * stride + half_rows));
#pragma GCC unroll 8
                for (int n = 0; n < 8; n++) {
                    const __m256i bits = _mm256_and_si256(_mm256_srli_epi32(word, n), one);
                    const int k = n % 4 * 2;
                    acc[k] = add_pairs(acc[k], bits, four(x + n / 4 * 4));
                    acc[k + 1] = add_pairs(acc[k + 1], bits, four(x + 8 + n / 4 * 4));
                }
            }
            for (int k = 0; k < 8; k++) store_sums(sums + (j * 8 + k) * LANES + half_rows, acc[k]);
        }
}

template <int NT>
KERNEL void int8_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, int32_t* sums) {
    const __m256i one = _mm256_set1_epi8(1);
    for (int j = 0; j < NT; j++)
        for (int half_rows = 0; half_rows < LANES; half_rows += 8) {
            __m256i acc[4];
            for (int k = 0; k < 4; k++) acc[k] = _mm256_setzero_si256();
            for (int64_t b = 0; b < blocks; b++) {
                const int8_t* x = reinterpret_cast<const int8_t*>(prepared[j]) + b * 32;
                const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + b * stride + half_rows));
#pragma GCC unroll 8
                for (int n = 0; n < 8; n++) {
                    const __m256i bits = _mm256_and_si256(_mm256_srli_epi32(word, n), one);
                    acc[n % 4] = add_pairs(acc[n % 4], bits, four(x + n * 4));
                }
            }
            const __m256i sum = _mm256_add_epi16(_mm256_add_epi16(acc[0], acc[1]), _mm256_add_epi16(acc[2], acc[3]));
            store_sums(sums + j * LANES + half_rows, sum);
        }
}

#include "work.inc"
}  // namespace fairy2i_avx2

extern "C" void fairy2i_work_avx2(Job* job) { fairy2i_avx2::work(*job); }
