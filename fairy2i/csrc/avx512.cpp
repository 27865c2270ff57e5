// Segment kernels for AVX-512 with VNNI (and F, BW, VL, DQ): one register is one block.
#include "kernels.h"
#include <immintrin.h>
#include <stdlib.h>

namespace fairy2i_avx512 {
enum { LUT = 16 };
#define KERNEL static __attribute__((noinline))

// acc + products of 4 unsigned and 4 signed bytes, or of 2 and 2 words of 16 bits, in each lane. In assembler because
// GCC 12 copies the sums of the intrinsics from register to register, twice for each instruction.
static inline __m512i dot_bytes(__m512i acc, __m512i bits, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(bits), "v"(x));
    return acc;
}
static inline __m512i dot_words(__m512i acc, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}

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
                    acc[g % SETS][j][2 * k] = dot_bytes(acc[g % SETS][j][2 * k], bits[k], first);
                    acc[g % SETS][j][2 * k + 1] = dot_bytes(acc[g % SETS][j][2 * k + 1], bits[k], second);
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
                    acc[r][2 * k] = dot_bytes(acc[r][2 * k], bits, first);
                    acc[r][2 * k + 1] = dot_bytes(acc[r][2 * k + 1], bits, second);
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
            for (int j = 0; j < NT; j++) acc[j][g] = dot_bytes(acc[j][g], bits, four(x[j] + b * 32 + g * 4));
        }
    }
    for (int j = 0; j < NT; j++) {
        __m512i sum = acc[j][0];
        for (int g = 1; g < 8; g++) sum = _mm512_add_epi32(sum, _mm512_srai_epi32(acc[j][g], g));
        _mm512_storeu_si512(sums + j * LANES, sum);
    }
}

// Many tokens, int8: the codes of 16 complex rows and a segment become 16-bit weights once, all stages added up, and
// those are multiplied with all the tokens. A weight is off by at most `stages * 2` units, a unit being 1/32000 of the
// largest weight that the scales of its row allow; a sum of 256 products of 16 and 8 bits fits 32.
#define DENSE 1

// weights: [half of the activations][pair of columns][first, second half of the outputs][16 rows][2 columns].
// units: of each row. scales: [stage][u_re, u_im, w_re, w_im][16 rows].
KERNEL void dense_weights(const uint32_t* words, int64_t stride, int64_t stage_stride, int64_t blocks, int stages,
                          const float* scales, int16_t* weights, float* units) {
    __m512 re = _mm512_setzero_ps(), im = _mm512_setzero_ps();
    for (int t = 0; t < stages; t++) {
        const float* of = scales + t * 4 * LANES;
        re = _mm512_add_ps(re, _mm512_add_ps(_mm512_loadu_ps(of), _mm512_loadu_ps(of + 2 * LANES)));
        im = _mm512_add_ps(im, _mm512_add_ps(_mm512_loadu_ps(of + LANES), _mm512_loadu_ps(of + 3 * LANES)));
    }
    const __m512 most = _mm512_max_ps(re, im);
    const __mmask16 used = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(used, _mm512_set1_ps(32000.0f), most);
    _mm512_storeu_ps(units, _mm512_div_ps(most, _mm512_set1_ps(32000.0f)));
    __m512i step[8][4], base_u = _mm512_setzero_si512(), base_w = base_u;  // a scale, in both columns of a lane
    for (int t = 0; t < stages; t++)
        for (int k = 0; k < 4; k++) {  // half a scale is a whole number of units
            const __m512 half = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(scales + (t * 4 + k) * LANES), inverse),
                                              _mm512_set1_ps(0.5f));
            const __m512i whole = _mm512_slli_epi32(_mm512_cvtps_epi32(half), 1);
            step[t][k] = _mm512_or_si512(whole, _mm512_slli_epi32(whole, 16));
            if (k == 0) base_u = _mm512_sub_epi16(base_u, step[t][k]);
            if (k == 2) base_w = _mm512_sub_epi16(base_w, step[t][k]);
        }
    const __m512i low = _mm512_set4_epi32(static_cast<int>(0xff0dff0cu), static_cast<int>(0xff09ff08u),
                                          static_cast<int>(0xff05ff04u), static_cast<int>(0xff01ff00u));
    const __m512i high = _mm512_add_epi8(low, _mm512_set1_epi16(2));
    int16_t* second = weights + blocks * 4 * 2 * 32;
    for (int64_t b = 0; b < blocks; b++)
        for (int i = 0; i < 4; i++) {  // pairs of columns: group i / 2, columns 0 and 1 or 2 and 3 of it
            __m512i ru = base_u, rw = base_w, iu = _mm512_setzero_si512(), iw = iu;
            for (int t = 0; t < stages; t++) {
                const __m512i word = _mm512_loadu_si512(words + t * stage_stride + b * stride);
                const __m512i bits = _mm512_shuffle_epi8(word, i % 2 ? high : low);
                const int one = i < 2 ? 1 : 16;
                const __mmask32 pu = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(static_cast<int16_t>(one)));
                const __mmask32 qu = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(static_cast<int16_t>(one * 2)));
                const __mmask32 pw = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(static_cast<int16_t>(one * 4)));
                const __mmask32 qw = _mm512_test_epi16_mask(bits, _mm512_set1_epi16(static_cast<int16_t>(one * 8)));
                ru = _mm512_mask_add_epi16(ru, pu, ru, step[t][0]);
                ru = _mm512_mask_add_epi16(ru, qu, ru, step[t][0]);
                iu = _mm512_mask_add_epi16(iu, pu, iu, step[t][1]);
                iu = _mm512_mask_sub_epi16(iu, qu, iu, step[t][1]);
                rw = _mm512_mask_add_epi16(rw, pw, rw, step[t][2]);
                rw = _mm512_mask_add_epi16(rw, qw, rw, step[t][2]);
                iw = _mm512_mask_add_epi16(iw, pw, iw, step[t][3]);
                iw = _mm512_mask_sub_epi16(iw, qw, iw, step[t][3]);
            }
            const int64_t at = (b * 4 + i) * 2 * 32;
            _mm512_storeu_si512(weights + at, _mm512_add_epi16(ru, rw));
            _mm512_storeu_si512(weights + at + 32, _mm512_add_epi16(iu, iw));
            _mm512_storeu_si512(second + at, _mm512_sub_epi16(iw, iu));
            _mm512_storeu_si512(second + at + 32, _mm512_sub_epi16(ru, rw));
        }
}

// NT tokens: x + token * x_stride are the activations of one half of a segment, in 16 bits.
template <int NT>
KERNEL void dense_multiply(const int16_t* weights, int64_t pairs, const int16_t* x, int64_t x_stride, const float* units,
                           const float* scales, int64_t scale_stride, float* out, int64_t stride, int64_t half_stride) {
    __m512i first[NT], second[NT];
#pragma GCC unroll 8
    for (int j = 0; j < NT; j++) first[j] = second[j] = _mm512_setzero_si512();
    for (int64_t i = 0; i < pairs; i++) {
        const __m512i a = _mm512_loadu_si512(weights + i * 64), b = _mm512_loadu_si512(weights + i * 64 + 32);
#pragma GCC unroll 8
        for (int j = 0; j < NT; j++) {
            int32_t two;
            __builtin_memcpy(&two, x + j * x_stride + i * 2, 4);
            const __m512i both = _mm512_set1_epi32(two);
            first[j] = dot_words(first[j], a, both);
            second[j] = dot_words(second[j], b, both);
        }
    }
    const __m512 unit = _mm512_loadu_ps(units);
#pragma GCC unroll 8
    for (int j = 0; j < NT; j++) {
        const __m512 scale = _mm512_mul_ps(unit, _mm512_set1_ps(scales[j * scale_stride]));
        float* y = out + j * stride;
        _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(first[j]), scale, _mm512_loadu_ps(y)));
        y += half_stride;
        _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(second[j]), scale, _mm512_loadu_ps(y)));
    }
}

#include "work.inc"
}  // namespace fairy2i_avx512

extern "C" void fairy2i_work_avx512(Job* job) { fairy2i_avx512::work(*job); }
