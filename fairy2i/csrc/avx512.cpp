// Segment kernels for AVX-512 with VNNI (and F, BW, VL, DQ): one register is one block.
#include "kernels.h"
#include <immintrin.h>
#include <stdlib.h>

namespace fairy2i_avx512 {
enum { LUT = 16 };
#define KERNEL static __attribute__((noinline))

// The hardware's prefetching loses the stream of codes among the tables, which fill the first cache: help it.
static inline void fetch_ahead(const uint32_t* words) {
    enum { AHEAD = 4096 / sizeof(uint32_t) };  // measured: 1 kB is too near, 8 kB is no better
    _mm_prefetch(reinterpret_cast<const char*>(words + AHEAD), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(words + AHEAD + LANES), _MM_HINT_T0);
}

// Sums under the signs of 4 planes, by both halves of the activations: a table of 16 floats is a register, and one
// permute looks up 4 columns of 16 rows. Additions only.
template <int NT>
KERNEL void exact_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, float* sums) {
    __m512 acc[NT][8];
    const float* table[NT];
    for (int j = 0; j < NT; j++) {
        table[j] = reinterpret_cast<const float*>(prepared[j]);
        for (int k = 0; k < 8; k++) acc[j][k] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b++) {
        const __m512i word = _mm512_loadu_si512(words + b * stride);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            __m512 first[NT], second[NT];
#pragma GCC unroll 3
            for (int j = 0; j < NT; j++) {
                first[j] = _mm512_loadu_ps(table[j] + (b * 4 + g) * 16);
                second[j] = _mm512_loadu_ps(table[j] + (b * 4 + 2 + g) * 16);
            }
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                const __m512i index = _mm512_srli_epi32(word, (g * 4 + k) * 4);  // a permute looks at the lowest 4 bits
#pragma GCC unroll 3
                for (int j = 0; j < NT; j++) {
                    acc[j][2 * k] = _mm512_add_ps(acc[j][2 * k], _mm512_permutexvar_ps(index, first[j]));
                    acc[j][2 * k + 1] = _mm512_add_ps(acc[j][2 * k + 1], _mm512_permutexvar_ps(index, second[j]));
                }
            }
        }
    }
    for (int j = 0; j < NT; j++)
        for (int k = 0; k < 8; k++) _mm512_storeu_ps(sums + (j * 8 + k) * LANES, acc[j][k]);
}

// One token and two blocks of rows: a table that is loaded serves both.
#define PAIRS 1
KERNEL void exact_phase_pair(const uint32_t* words, int64_t blocks, const char* prepared,
                             float* sums) {
    __m512 acc[2][8];
    const float* table = reinterpret_cast<const float*>(prepared);
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 8; k++) acc[r][k] = _mm512_setzero_ps();
    for (int64_t b = 0; b < blocks; b++) {
        fetch_ahead(words + b * 2 * LANES);
        const __m512i word[2] = {_mm512_loadu_si512(words + b * 2 * LANES), _mm512_loadu_si512(words + (b * 2 + 1) * LANES)};
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            const __m512 first = _mm512_loadu_ps(table + (b * 4 + g) * 16);
            const __m512 second = _mm512_loadu_ps(table + (b * 4 + 2 + g) * 16);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++)
#pragma GCC unroll 2
                for (int r = 0; r < 2; r++) {
                    const __m512i index = _mm512_srli_epi32(word[r], (g * 4 + k) * 4);
                    acc[r][2 * k] = _mm512_add_ps(acc[r][2 * k], _mm512_permutexvar_ps(index, first));
                    acc[r][2 * k + 1] = _mm512_add_ps(acc[r][2 * k + 1], _mm512_permutexvar_ps(index, second));
                }
        }
    }
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 8; k++) _mm512_storeu_ps(sums + (r * 8 + k) * LANES, acc[r][k]);
}

template <int NT>
KERNEL void exact_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, float* sums) {
    __m512 acc[NT][4];
    const float* table[NT];
    for (int j = 0; j < NT; j++) {
        table[j] = reinterpret_cast<const float*>(prepared[j]);
        for (int k = 0; k < 4; k++) acc[j][k] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b++) {
        if (NT == 1) fetch_ahead(words + b * stride);
        const __m512i word = _mm512_loadu_si512(words + b * stride);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
            const __m512i index = _mm512_srli_epi32(word, g * 4);
#pragma GCC unroll 3
            for (int j = 0; j < NT; j++) {
                const __m512 found = _mm512_permutexvar_ps(index, _mm512_loadu_ps(table[j] + (b * 8 + g) * 16));
                acc[j][g % 4] = _mm512_add_ps(acc[j][g % 4], found);
            }
        }
    }
    for (int j = 0; j < NT; j++)
        _mm512_storeu_ps(sums + j * LANES, _mm512_add_ps(_mm512_add_ps(acc[j][0], acc[j][1]),
                                                         _mm512_add_ps(acc[j][2], acc[j][3])));
}

static inline __m512i four(const int8_t* p) {  // 4 activations for every row
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

// Counts of activations under the plus signs of 4 planes: the bits are used where they are in the byte, worth 1, 2, 4, 8
// (a segment is too short for the sums to overflow), and the shift comes once at the end.
template <int NT>
KERNEL void int8_phase_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, int32_t* sums) {
    constexpr int SETS = NT == 1 ? 2 : 1;  // with one token, two sets of sums hide the latency
    __m512i acc[SETS][NT][8];
    for (int e = 0; e < SETS; e++)
        for (int j = 0; j < NT; j++)
            for (int k = 0; k < 8; k++) acc[e][j][k] = _mm512_setzero_si512();
    const __m512i mask[4] = {_mm512_set1_epi8(1), _mm512_set1_epi8(2), _mm512_set1_epi8(4), _mm512_set1_epi8(8)};
    const int8_t* x[NT];
    for (int j = 0; j < NT; j++) x[j] = reinterpret_cast<const int8_t*>(prepared[j]);
    for (int64_t b = 0; b < blocks; b++) {
        __m512i word = _mm512_loadu_si512(words + b * stride);
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            __m512i bits[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) bits[k] = _mm512_and_si512(word, mask[k]);
#pragma GCC unroll 3
            for (int j = 0; j < NT; j++) {
                const __m512i first = four(x[j] + b * 16 + g * 4), second = four(x[j] + b * 16 + 8 + g * 4);
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    acc[g % SETS][j][2 * k] = _mm512_dpbusd_epi32(acc[g % SETS][j][2 * k], bits[k], first);
                    acc[g % SETS][j][2 * k + 1] = _mm512_dpbusd_epi32(acc[g % SETS][j][2 * k + 1], bits[k], second);
                }
            }
            word = _mm512_srli_epi32(word, 4);
        }
    }
    for (int j = 0; j < NT; j++)
        for (int k = 0; k < 8; k++) {
            __m512i sum = acc[0][j][k];
            if (SETS == 2) sum = _mm512_add_epi32(sum, acc[SETS - 1][j][k]);
            _mm512_storeu_si512(sums + (j * 8 + k) * LANES, _mm512_srai_epi32(sum, k / 2));
        }
}

KERNEL void int8_phase_pair(const uint32_t* words, int64_t blocks, const char* prepared,
                            int32_t* sums) {
    __m512i acc[2][8];
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 8; k++) acc[r][k] = _mm512_setzero_si512();
    const __m512i mask[4] = {_mm512_set1_epi8(1), _mm512_set1_epi8(2), _mm512_set1_epi8(4), _mm512_set1_epi8(8)};
    const int8_t* x = reinterpret_cast<const int8_t*>(prepared);
    for (int64_t b = 0; b < blocks; b++) {
        fetch_ahead(words + b * 2 * LANES);
        __m512i word[2] = {_mm512_loadu_si512(words + b * 2 * LANES), _mm512_loadu_si512(words + (b * 2 + 1) * LANES)};
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) {
            const __m512i first = four(x + b * 16 + g * 4), second = four(x + b * 16 + 8 + g * 4);
#pragma GCC unroll 2
            for (int r = 0; r < 2; r++) {
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    const __m512i bits = _mm512_and_si512(word[r], mask[k]);
                    acc[r][2 * k] = _mm512_dpbusd_epi32(acc[r][2 * k], bits, first);
                    acc[r][2 * k + 1] = _mm512_dpbusd_epi32(acc[r][2 * k + 1], bits, second);
                }
                word[r] = _mm512_srli_epi32(word[r], 4);
            }
        }
    }
    for (int r = 0; r < 2; r++)
        for (int k = 0; k < 8; k++)
            _mm512_storeu_si512(sums + (r * 8 + k) * LANES, _mm512_srai_epi32(acc[r][k], k / 2));
}

template <int NT>
KERNEL void int8_real_segment(const uint32_t* words, int64_t stride, int64_t blocks, const char* const* prepared, int32_t* sums) {
    __m512i acc[NT][8];
    for (int j = 0; j < NT; j++)
        for (int k = 0; k < 8; k++) acc[j][k] = _mm512_setzero_si512();
    const int8_t* x[NT];
    for (int j = 0; j < NT; j++) x[j] = reinterpret_cast<const int8_t*>(prepared[j]);
    for (int64_t b = 0; b < blocks; b++) {
        if (NT == 1) fetch_ahead(words + b * stride);
        const __m512i word = _mm512_loadu_si512(words + b * stride);
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
            const __m512i bits = _mm512_and_si512(word, _mm512_set1_epi8(static_cast<char>(1 << g)));
#pragma GCC unroll 3
            for (int j = 0; j < NT; j++) acc[j][g] = _mm512_dpbusd_epi32(acc[j][g], bits, four(x[j] + b * 32 + g * 4));
        }
    }
    for (int j = 0; j < NT; j++) {
        __m512i sum = acc[j][0];
        for (int g = 1; g < 8; g++) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[j][g], g));
        _mm512_storeu_si512(sums + j * LANES, sum);
    }
}

#include "work.inc"
}  // namespace fairy2i_avx512

extern "C" void fairy2i_work_avx512(Job* job) { fairy2i_avx512::work(*job); }
