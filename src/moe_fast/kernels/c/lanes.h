/* Steps over LANES values at once that compilers do not reliably find in plain loops: comparisons
   as bits, and choosing by them. One text for every width of vector and for both types. */

#ifndef MOE_FAST_LANES_H
#define MOE_FAST_LANES_H

#include "vector.h"
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PREFETCH(address) __builtin_prefetch((const void *)(address), 0, 2)
#elif defined(_M_X64)
#define PREFETCH(address) _mm_prefetch((const char *)(address), _MM_HINT_T1)
#else
#define PREFETCH(address) ((void)(address))
#endif

/* Fetch n bytes that lie `ahead` bytes after x, or none if that is 0. They may lie past the end of
   the array. Into the second cache: in the first they took the place of rows in use. */
static inline void prefetch_ahead(const void *x, ptrdiff_t n, ptrdiff_t ahead) {
    if (ahead)
        for (ptrdiff_t i = 0; i < n; i += 64)
            PREFETCH((uintptr_t)x + (uintptr_t)(ahead + i));
}

#if defined(__aarch64__) && defined(__ARM_NEON)
#define OWN_MASKS
#define MASK_OF_BLOCK(op, x, bound, S)  MASK_OF_BLOCK_(op, x, bound, S)
#define MASK_OF_BLOCK_(op, x, bound, S) neon_mask_##op##_##S(x, bound)

/* 16 bytes, each 0 or all bits set, as 16 bits. */
static inline uint32_t neon_bits_of_bytes(uint8x16_t bytes) {
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    bytes = vandq_u8(bytes, bit);
    bytes = vpaddq_u8(bytes, bytes);
    bytes = vpaddq_u8(bytes, bytes);
    bytes = vpaddq_u8(bytes, bytes);
    return vgetq_lane_u16(vreinterpretq_u16_u8(bytes), 0);
}

/* The same of 16 words, which are narrowed to bytes first. */
static inline uint32_t neon_bits_of_words(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    uint16x8_t ab = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    uint16x8_t cd = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return neon_bits_of_bytes(vuzp1q_u8(vreinterpretq_u8_u16(ab), vreinterpretq_u8_u16(cd)));
}

static inline uint32x4_t neon_words(uint64x2_t a, uint64x2_t b) {
    return vuzp1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b));
}

#define NEON_MASKS(op)                                                                             \
    static inline uint32_t neon_mask_##op##_ps(const float *x, float32x4_t bound) {                \
        return neon_bits_of_words(                                                                 \
            neon_##op##_ps(vld1q_f32(x), bound), neon_##op##_ps(vld1q_f32(x + 4), bound),          \
            neon_##op##_ps(vld1q_f32(x + 8), bound), neon_##op##_ps(vld1q_f32(x + 12), bound)      \
        );                                                                                         \
    }                                                                                              \
    static inline uint32_t neon_mask_##op##_pd(const double *x, float64x2_t bound) {               \
        uint32x4_t word[4];                                                                        \
        for (int i = 0; i < 4; i++)                                                                \
            word[i] = neon_words(                                                                  \
                neon_##op##_pd(vld1q_f64(x + 4 * i), bound),                                       \
                neon_##op##_pd(vld1q_f64(x + 4 * i + 2), bound)                                    \
            );                                                                                     \
        return neon_bits_of_words(word[0], word[1], word[2], word[3]);                             \
    }
NEON_MASKS(gt)
NEON_MASKS(ge)
#endif

#define REAL float
#define S    ps
#include "lanes_of_real.h"
#undef REAL
#undef S

#define REAL double
#define S    pd
#include "lanes_of_real.h"
#undef REAL
#undef S

#endif
