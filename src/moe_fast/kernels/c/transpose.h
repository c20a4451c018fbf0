/* Matrix transpose in registers: LANES rows of numbers of four bytes to columns, and back.

   columns_of_rows: column[LANES * e + t] = number e of row t, rows `stride` bytes apart.
   rows_of_columns: the way back, to rows of length k.
   Both return 0, and change nothing, where there is no quick way. */

#ifndef MOE_FAST_TRANSPOSE_H
#define MOE_FAST_TRANSPOSE_H

#include "vector.h"
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__) || defined(_M_X64) || (defined(__aarch64__) && defined(__ARM_NEON))

#if defined(__aarch64__)
/* What is moved may be integers, and vld1q_f32 may read floats alone. */
static inline uint32x4_t load_words(const void *from) {
    uint32x4_t words;
    memcpy(&words, from, sizeof words);
    return words;
}

static inline void store_words(void *to, uint32x4_t words) {
    memcpy(to, &words, sizeof words);
}

static inline void store_pairs(void *to, uint64x2_t pairs) {
    memcpy(to, &pairs, sizeof pairs);
}

static inline void transpose_4x4(
    const float *x0, const float *x1, const float *x2, const float *x3, float *y0, float *y1,
    float *y2, float *y3
) {
    uint32x4_t a = load_words(x0), b = load_words(x1), c = load_words(x2), d = load_words(x3);
    uint64x2_t ab0 = vreinterpretq_u64_u32(vtrn1q_u32(a, b));
    uint64x2_t ab1 = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
    uint64x2_t cd0 = vreinterpretq_u64_u32(vtrn1q_u32(c, d));
    uint64x2_t cd1 = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
    store_pairs(y0, vtrn1q_u64(ab0, cd0));
    store_pairs(y1, vtrn1q_u64(ab1, cd1));
    store_pairs(y2, vtrn2q_u64(ab0, cd0));
    store_pairs(y3, vtrn2q_u64(ab1, cd1));
}

static inline void interleave(const float *x, const float *y, float *to) {
    uint32x4_t a = load_words(x), b = load_words(y);
    store_words(to, vzip1q_u32(a, b));
    store_words(to + 4, vzip2q_u32(a, b));
}
#else
static inline void interleave(const float *x, const float *y, float *to) {
    __m128 a = _mm_loadu_ps(x), b = _mm_loadu_ps(y);
    _mm_storeu_ps(to, _mm_unpacklo_ps(a, b));
    _mm_storeu_ps(to + 4, _mm_unpackhi_ps(a, b));
}

static inline void transpose_4x4(
    const float *x0, const float *x1, const float *x2, const float *x3, float *y0, float *y1,
    float *y2, float *y3
) {
    __m128 a = _mm_loadu_ps(x0), b = _mm_loadu_ps(x1);
    __m128 c = _mm_loadu_ps(x2), d = _mm_loadu_ps(x3);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(y0, a);
    _mm_storeu_ps(y1, b);
    _mm_storeu_ps(y2, c);
    _mm_storeu_ps(y3, d);
}
#endif

/* In whole vectors: one read from two halves just written has to wait for both. */
#if defined(__AVX512F__)
/* The 8 x 8 in the lower halves, and those in the upper halves. */
static inline void transpose_halves(__m512 *x) {
    const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
    const __m512i upper = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    __m512 pair[8];
    __m512d four[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
        pair[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i], pair[i + 2], 0x44));
        four[i + 1] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i], pair[i + 2], 0xEE));
        four[i + 2] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44));
        four[i + 3] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE));
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(four[i], lower, four[i + 4]));
        x[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(four[i], upper, four[i + 4]));
    }
}

static inline void eight_columns(const uint8_t *rows, ptrdiff_t stride, float *column) {
    __m512 x[8];
    for (int i = 0; i < 8; i++) {
        const double *later = (const double *)(rows + (i + 8) * stride);
        x[i] = _mm512_castps256_ps512(_mm256_loadu_ps((const float *)(rows + i * stride)));
        x[i] =
            _mm512_castpd_ps(_mm512_insertf64x4(_mm512_castps_pd(x[i]), _mm256_loadu_pd(later), 1));
    }
    transpose_halves(x);
    for (int i = 0; i < 8; i++)
        _mm512_storeu_ps(column + LANES * i, x[i]);
}

static inline void rows_of_eight(const float *column, float *rows, ptrdiff_t width) {
    __m512 x[8];
    for (int i = 0; i < 8; i++)
        x[i] = _mm512_loadu_ps(column + LANES * i);
    transpose_halves(x);
    for (int i = 0; i < 8; i++) {
        _mm256_storeu_ps(rows + i * width, _mm512_castps512_ps256(x[i]));
        _mm256_storeu_pd(
            (double *)(rows + (i + 8) * width), _mm512_extractf64x4_pd(_mm512_castps_pd(x[i]), 1)
        );
    }
}
#elif defined(__AVX2__)
static inline void transpose_8x8(
    const uint8_t *from, ptrdiff_t stride, float *to, ptrdiff_t width
) {
    __m256 x[8], pair[8], four[8];
    for (int i = 0; i < 8; i++)
        x[i] = _mm256_loadu_ps((const float *)(from + i * stride));
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
        four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
        four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
        four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * width, _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * width, _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
    }
}

static inline void eight_columns(const uint8_t *rows, ptrdiff_t stride, float *column) {
    transpose_8x8(rows, stride, column, LANES);
    transpose_8x8(rows + 8 * stride, stride, column + 8, LANES);
}

static inline void rows_of_eight(const float *column, float *rows, ptrdiff_t width) {
    transpose_8x8((const uint8_t *)column, LANES * 4, rows, width);
    transpose_8x8((const uint8_t *)(column + 8), LANES * 4, rows + 8 * width, width);
}
#endif
static inline int columns_of_rows(
    const uint8_t *rows, ptrdiff_t stride, ptrdiff_t n, float *column
) {
#if defined(__AVX2__)
    if (n % 8 == 0) {
        for (ptrdiff_t e = 0; e < n; e += 8)
            eight_columns(rows + e * 4, stride, column + LANES * e);
        return 1;
    }
#endif
    if (n % 4)
        return 0;
    for (int t = 0; t < LANES; t += 4)
        for (ptrdiff_t e = 0; e < n; e += 4) {
            const uint8_t *at = rows + t * stride + e * 4;
            float *to = column + LANES * e + t;
            transpose_4x4(
                (const float *)at, (const float *)(at + stride), (const float *)(at + 2 * stride),
                (const float *)(at + 3 * stride), to, to + LANES, to + 2 * LANES, to + 3 * LANES
            );
        }
    return 1;
}

static inline int rows_of_columns(const float *column, ptrdiff_t k, float *rows) {
    if (k == 2) {
        for (int t = 0; t < LANES; t += 4)
            interleave(column + t, column + LANES + t, rows + 2 * t);
        return 1;
    }
#if defined(__AVX2__)
    if (k % 8 == 0) {
        for (ptrdiff_t s = 0; s < k; s += 8)
            rows_of_eight(column + LANES * s, rows + s, k);
        return 1;
    }
#endif
    if (k % 4)
        return 0;
    for (int t = 0; t < LANES; t += 4)
        for (ptrdiff_t s = 0; s < k; s += 4) {
            const float *at = column + LANES * s + t;
            float *to = rows + t * k + s;
            transpose_4x4(
                at, at + LANES, at + 2 * LANES, at + 3 * LANES, to, to + k, to + 2 * k, to + 3 * k
            );
        }
    return 1;
}
#else
static inline int columns_of_rows(
    const uint8_t *rows, ptrdiff_t stride, ptrdiff_t n, float *column
) {
    return 0;
}

static inline int rows_of_columns(const float *column, ptrdiff_t k, float *rows) {
    return 0;
}
#endif

#endif
