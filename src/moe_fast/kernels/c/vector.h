/* A vector of floats or doubles, as wide as the SIMD level has them, or one number wide.

   A block is LANES numbers, whatever the width: results are defined by it, so that every level
   gives the same bits. */

#ifndef MOE_FAST_VECTOR_H
#define MOE_FAST_VECTOR_H

#include "platform.h"
#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define LANES 16

/* VECTOR_OP(name, ps): the instruction `name` on vectors of floats; with pd, of doubles.
   COMPARE(gt, x, y, ps): x > y as bits, bit i that of element i; ge is >=, unord that one is NaN.
   FLAGS(ps): what UNORDERED(x, y, ps) makes, JOIN_FLAGS joins, and ANY_FLAG looks at.
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
#elif defined(__aarch64__) && defined(__ARM_NEON)
typedef float32x4_t vector_float;
typedef float64x2_t vector_double;
#define VECTOR_OP_(name, S)          neon_##name##_##S
#define SELECT_ABOVE_(x, y, a, b, S) neon_select_##S(neon_gt_##S(x, y), a, b)
#define neon_set1_ps                 vdupq_n_f32
#define neon_set1_pd                 vdupq_n_f64
#define neon_loadu_ps                vld1q_f32
#define neon_loadu_pd                vld1q_f64
#define neon_storeu_ps               vst1q_f32
#define neon_storeu_pd               vst1q_f64
#define neon_add_ps                  vaddq_f32
#define neon_add_pd                  vaddq_f64
#define neon_sub_ps                  vsubq_f32
#define neon_sub_pd                  vsubq_f64
#define neon_mul_ps                  vmulq_f32
#define neon_mul_pd                  vmulq_f64
#define neon_div_ps                  vdivq_f32
#define neon_div_pd                  vdivq_f64
#define neon_gt_ps                   vcgtq_f32
#define neon_gt_pd                   vcgtq_f64
#define neon_ge_ps                   vcgeq_f32
#define neon_ge_pd                   vcgeq_f64
#define neon_select_ps               vbslq_f32
#define neon_select_pd               vbslq_f64
/* As SSE2 has them: y where one is NaN, and of two zeros. Arm's own instructions differ. */
#define neon_max_ps(x, y)            vbslq_f32(vcgtq_f32(x, y), x, y)
#define neon_max_pd(x, y)            vbslq_f64(vcgtq_f64(x, y), x, y)
#define neon_min_ps(x, y)            vbslq_f32(vcgtq_f32(y, x), x, y)
#define neon_min_pd(x, y)            vbslq_f64(vcgtq_f64(y, x), x, y)
/* All bits of an element set or none, for no instruction makes one bit of each. */
#define FLAGS(S)                     JOIN(neon_flags, S)
#define UNORDERED(x, y, S)           JOIN(neon_unordered, S)(x, y)
#define JOIN_FLAGS(a, b)             ((a) | (b))
#define ANY_FLAG(flags)              (vmaxvq_u32((uint32x4_t)(flags)) != 0)
typedef uint32x4_t neon_flags_ps;
typedef uint64x2_t neon_flags_pd;

static inline uint32x4_t neon_unordered_ps(float32x4_t x, float32x4_t y) {
    return ~(vceqq_f32(x, x) & vceqq_f32(y, y));
}

static inline uint64x2_t neon_unordered_pd(float64x2_t x, float64x2_t y) {
    return ~(vceqq_f64(x, x) & vceqq_f64(y, y));
}
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
#define one_div(x, y)                ((x) / (y))
#define one_max(x, y)                ((x) > (y) ? (x) : (y))
#define one_min(x, y)                ((x) < (y) ? (x) : (y))
#define one_gt(x, y)                 ((x) > (y))
#define one_ge(x, y)                 ((x) >= (y))
#define one_unord(x, y)              ((x) != (x) || (y) != (y))
#endif
#ifndef FLAGS
#define FLAGS(S)           uint32_t
#define UNORDERED(x, y, S) ((uint32_t)COMPARE(unord, x, y, S))
#define JOIN_FLAGS(a, b)   ((a) | (b))
#define ANY_FLAG(flags)    ((flags) != 0)
#endif
#define ORDERED_gt                  _CMP_GT_OQ
#define ORDERED_ge                  _CMP_GE_OQ
#define ORDERED_unord               _CMP_UNORD_Q
#define VECTOR_OP(name, S)          VECTOR_OP_(name, S)
#define COMPARE(op, x, y, S)        COMPARE_(op, x, y, S)
#define SELECT_ABOVE(x, y, a, b, S) SELECT_ABOVE_(x, y, a, b, S)

#endif
