/* Sums of numbers from 0 to 1 in units of 2^-32, exact in any order. */

#ifndef MOE_FAST_UNITS_H
#define MOE_FAST_UNITS_H

#include "bits.h"
#include "vector.h"
#include <stddef.h>

/* A double of this size has a last place of 2^-32: what is added to it is rounded to a multiple, and
   the bits of the sum, as an integer, exceed those of UNITS_BASE by the number of units. */
#define UNITS_BASE 1572864.0

/* units: integers as wide as a vector of doubles. widened(x): the next floats, or doubles. */
#if defined(__AVX512F__)
typedef __m512i units;
#define UNITS_OF(x)        _mm512_castpd_si512(x)
#define ADD_UNITS(a, b)    _mm512_add_epi64(a, b)
#define LOAD_UNITS(x)      _mm512_loadu_si512(x)
#define STORE_UNITS(to, x) _mm512_storeu_si512(to, x)
#define WIDENED_float(x)   _mm512_cvtps_pd(_mm256_loadu_ps(x))
#elif defined(__AVX2__)
typedef __m256i units;
#define UNITS_OF(x)        _mm256_castpd_si256(x)
#define ADD_UNITS(a, b)    _mm256_add_epi64(a, b)
#define LOAD_UNITS(x)      _mm256_loadu_si256((const __m256i *)(x))
#define STORE_UNITS(to, x) _mm256_storeu_si256((__m256i *)(to), x)
#define WIDENED_float(x)   _mm256_cvtps_pd(_mm_loadu_ps(x))
#elif defined(__SSE2__) || defined(_M_X64)
typedef __m128i units;
#define UNITS_OF(x)        _mm_castpd_si128(x)
#define ADD_UNITS(a, b)    _mm_add_epi64(a, b)
#define LOAD_UNITS(x)      _mm_loadu_si128((const __m128i *)(x))
#define STORE_UNITS(to, x) _mm_storeu_si128((__m128i *)(to), x)
#define WIDENED_float(x)   _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(x))))
#elif defined(__aarch64__) && defined(__ARM_NEON)
typedef uint64x2_t units;
#define UNITS_OF(x)        vreinterpretq_u64_f64(x)
#define ADD_UNITS(a, b)    vaddq_u64(a, b)
#define LOAD_UNITS(x)      vld1q_u64(x)
#define STORE_UNITS(to, x) vst1q_u64(to, x)
#define WIDENED_float(x)   vcvt_f64_f32(vld1_f32(x))
#else
typedef uint64_t units;
#define UNITS_OF(x)        bits_of_double(x)
#define ADD_UNITS(a, b)    ((a) + (b))
#define LOAD_UNITS(x)      (*(x))
#define STORE_UNITS(to, x) (*(to) = (x))
#define WIDENED_float(x)   ((double)*(x))
#endif
#define WIDENED_double(x) VECTOR_OP(loadu, pd)(x)

/* sums[i] += the bits of UNITS_BASE + x[t * step + i], for i < LANES and all t < count. */
#define DEFINE_ADD_UNITS(REAL)                                                                     \
    static inline void add_units_##REAL(                                                           \
        uint64_t *sums, const REAL *x, ptrdiff_t step, ptrdiff_t count                             \
    ) {                                                                                            \
        enum { WIDTH = sizeof(units) / sizeof(uint64_t) };                                         \
        const vector_double base = VECTOR_OP(set1, pd)(UNITS_BASE);                                \
        units sum[LANES / WIDTH];                                                                  \
        for (int i = 0; i < LANES / WIDTH; i++)                                                    \
            sum[i] = LOAD_UNITS(sums + i * WIDTH);                                                 \
        for (ptrdiff_t t = 0; t < count; t++, x += step)                                           \
            for (int i = 0; i < LANES / WIDTH; i++) {                                              \
                vector_double y = VECTOR_OP(add, pd)(WIDENED_##REAL(x + i * WIDTH), base);         \
                sum[i] = ADD_UNITS(sum[i], UNITS_OF(y));                                           \
            }                                                                                      \
        for (int i = 0; i < LANES / WIDTH; i++)                                                    \
            STORE_UNITS(sums + i * WIDTH, sum[i]);                                                 \
    }
DEFINE_ADD_UNITS(float)
DEFINE_ADD_UNITS(double)

#endif
