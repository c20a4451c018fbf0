/* A vector of floats or doubles, as wide as the SIMD level has them, or one number wide.

   A block is LANES numbers, whatever the width: results are defined by it, so that every level
   gives the same bits. */

#ifndef MOE_FAST_VECTOR_H
#define MOE_FAST_VECTOR_H

#include "platform.h"

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#endif

#define LANES 16

/* VECTOR_OP(name, ps): the instruction `name` on vectors of floats; with pd, of doubles.
   COMPARE(gt, x, y, ps): x > y as bits, bit i that of element i; ge is >=, unord that one is NaN.
   SELECT_ABOVE(x, y, a, b, ps): a where x > y, b elsewhere. */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b)  JOIN_(a, b)
#if defined(__AVX512F__)
typedef __m512 vector_float;
typedef __m512d vector_double;
#define VECTOR_OP_(name, S)          _mm512_##name##_##S
#define COMPARE_(op, x, y, S)        _mm512_cmp_##S##_mask(x, y, ORDERED_##op)
#define SELECT_ABOVE_(x, y, a, b, S) _mm512_mask_blend_##S(COMPARE_(gt, x, y, S), b, a)
#elif defined(__AVX2__)
typedef __m256 vector_float;
typedef __m256d vector_double;
#define VECTOR_OP_(name, S)          _mm256_##name##_##S
#define COMPARE_(op, x, y, S)        _mm256_movemask_##S(_mm256_cmp_##S(x, y, ORDERED_##op))
#define SELECT_ABOVE_(x, y, a, b, S) _mm256_blendv_##S(b, a, _mm256_cmp_##S(x, y, ORDERED_gt))
#elif defined(__SSE2__) || defined(_M_X64)
typedef __m128 vector_float;
typedef __m128d vector_double;
#define VECTOR_OP_(name, S)   _mm_##name##_##S
#define COMPARE_(op, x, y, S) _mm_movemask_##S(_mm_cmp##op##_##S(x, y))
#define SELECT_ABOVE_(x, y, a, b, S)                                                               \
    _mm_or_##S(_mm_and_##S(_mm_cmpgt_##S(x, y), a), _mm_andnot_##S(_mm_cmpgt_##S(x, y), b))
#else
typedef float vector_float;
typedef double vector_double;
#define VECTOR_OP_(name, S)          one_##name
#define COMPARE_(op, x, y, S)        one_##op(x, y)
#define SELECT_ABOVE_(x, y, a, b, S) ((x) > (y) ? (a) : (b))
#define one_set1(x)                  (x)
#define one_loadu(x)                 (*(x))
#define one_storeu(to, x)            (*(to) = (x))
#define one_add(x, y)                ((x) + (y))
#define one_sub(x, y)                ((x) - (y))
#define one_mul(x, y)                ((x) * (y))
#define one_max(x, y)                ((x) > (y) ? (x) : (y))
#define one_min(x, y)                ((x) < (y) ? (x) : (y))
#define one_gt(x, y)                 ((x) > (y))
#define one_ge(x, y)                 ((x) >= (y))
#define one_unord(x, y)              ((x) != (x) || (y) != (y))
#endif
#define ORDERED_gt                  _CMP_GT_OQ
#define ORDERED_ge                  _CMP_GE_OQ
#define ORDERED_unord               _CMP_UNORD_Q
#define VECTOR_OP(name, S)          VECTOR_OP_(name, S)
#define COMPARE(op, x, y, S)        COMPARE_(op, x, y, S)
#define SELECT_ABOVE(x, y, a, b, S) SELECT_ABOVE_(x, y, a, b, S)

#endif
