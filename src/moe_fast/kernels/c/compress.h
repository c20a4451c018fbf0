/* Stream compaction: of many values, how many reach a bound, and those that do brought together.

   n is always a multiple of LANES, but for collect_equal. Without a branch for each value: whether
   one reaches the bound cannot be predicted. */

#ifndef MOE_FAST_COMPRESS_H
#define MOE_FAST_COMPRESS_H

#include "bits.h"
#include "lanes.h"

#if defined(__AVX512F__)

#define OWN_COLLECT

static inline ptrdiff_t collect_at_least_float(
    const float *x, ptrdiff_t n, float bound, int32_t first, int32_t *index, float *value
) {
    const __m512 least = _mm512_set1_ps(bound);
    const __m512i step = _mm512_set1_epi32(16);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        __mmask16 bits = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
        /* In the register, then whole: compressing into memory is slow on some processors. So is a
           store of 64 bytes, and more than half of them are seldom needed. */
        __m512i some = _mm512_maskz_compress_epi32(bits, at);
        v = _mm512_maskz_compress_ps(bits, v);
        _mm256_storeu_si256((__m256i *)(index + count), _mm512_castsi512_si256(some));
        _mm256_storeu_ps(value + count, _mm512_castps512_ps256(v));
        if (number_of_bits(bits) > 8) {
            _mm512_storeu_si512(index + count, some);
            _mm512_storeu_ps(value + count, v);
        }
        count += number_of_bits(bits);
        at = _mm512_add_epi32(at, step);
    }
    return count;
}

/* One store of 64 bytes that ends in the next cache line takes longer than two of 32. */
static inline void store_halves(void *to, __m512d v) {
    _mm256_storeu_pd((double *)to, _mm512_extractf64x4_pd(v, 0));
    _mm256_storeu_pd((double *)to + 4, _mm512_extractf64x4_pd(v, 1));
}

#define OWN_COMPACT

static inline void compact_at_least_float(int32_t *index, float *x, ptrdiff_t n, float bound) {
    const __m512 least = _mm512_set1_ps(bound);
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        __m512i at = _mm512_loadu_si512(index + i);
        __mmask16 bits = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
        at = _mm512_maskz_compress_epi32(bits, at);
        v = _mm512_maskz_compress_ps(bits, v);
        store_halves(index + count, _mm512_castsi512_pd(at));
        store_halves(x + count, _mm512_castps_pd(v));
        count += number_of_bits(bits);
    }
}

#elif defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64) ||                                  \
    (defined(__aarch64__) && defined(__ARM_NEON))

#if defined(__AVX2__)
typedef __m256i vector_int;
#define INT_OP(name)      _mm256_##name
#define AT_LEAST(x, y)    _mm256_castps_si256(_mm256_cmp_ps(x, y, _CMP_GE_OQ))
#define STORE_INTS(to, v) _mm256_storeu_si256((__m256i *)(to), v)
#elif defined(__aarch64__)
typedef int32x4_t vector_int;
#define INT_OP(name)      neon_##name
#define neon_set1_epi32   vdupq_n_s32
#define neon_sub_epi32    vsubq_s32
#define AT_LEAST(x, y)    vreinterpretq_s32_u32(vcgeq_f32(x, y))
#define STORE_INTS(to, v) vst1q_s32(to, v)
#else
typedef __m128i vector_int;
#define INT_OP(name)      _mm_##name
#define AT_LEAST(x, y)    _mm_castps_si128(_mm_cmpge_ps(x, y))
#define STORE_INTS(to, v) _mm_storeu_si128((__m128i *)(to), v)
#endif

#define OWN_COUNT

static inline ptrdiff_t count_at_least_float(const float *x, ptrdiff_t n, float bound) {
    enum { WIDTH = sizeof(vector_int) / sizeof(int32_t) };

    const vector_float least = VECTOR_OP(set1, ps)(bound);
    vector_int counts[2] = {INT_OP(set1_epi32)(0), INT_OP(set1_epi32)(0)};
    int32_t lanes[2 * WIDTH];
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += 2 * WIDTH) {
        vector_float a = VECTOR_OP(loadu, ps)(x + i);
        vector_float b = VECTOR_OP(loadu, ps)(x + i + WIDTH);
        /* What is true has all bits set: -1. */
        counts[0] = INT_OP(sub_epi32)(counts[0], AT_LEAST(a, least));
        counts[1] = INT_OP(sub_epi32)(counts[1], AT_LEAST(b, least));
    }
    STORE_INTS(lanes, counts[0]);
    STORE_INTS(lanes + WIDTH, counts[1]);
    for (int i = 0; i < 2 * WIDTH; i++)
        count += lanes[i];
    return count;
}

#endif

#if defined(__AVX2__) && !defined(__AVX512F__)

/* The positions of the bits set in each byte, in order. */
static uint8_t bit_positions[256][8];

static void fill_bit_positions(void) {
    for (int byte = 0; byte < 256; byte++)
        for (int bit = 0, count = 0; bit < 8; bit++)
            if (byte >> bit & 1)
                bit_positions[byte][count++] = (uint8_t)bit;
}

static inline __m256i positions_of(int byte) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)bit_positions[byte]));
}

#define OWN_COLLECT

static inline ptrdiff_t collect_at_least_float(
    const float *x, ptrdiff_t n, float bound, int32_t first, int32_t *index, float *value
) {
    const __m256 least = _mm256_set1_ps(bound);
    const __m256i step = _mm256_set1_epi32(8);
    __m256i base = _mm256_set1_epi32(first);
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        int bits = _mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ));
        __m256i at = positions_of(bits);
        _mm256_storeu_si256((__m256i *)(index + count), _mm256_add_epi32(at, base));
        _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps(v, at));
        count += number_of_bits(bits);
        base = _mm256_add_epi32(base, step);
    }
    return count;
}

#elif defined(__aarch64__) && defined(__ARM_NEON)

/* For four bits, which bytes of four words come to the front. */
static uint8_t bit_positions[16][16];

static void fill_bit_positions(void) {
    for (int word = 0; word < 16; word++)
        for (int bit = 0, count = 0; bit < 4; bit++)
            if (word >> bit & 1)
                for (int byte = 0; byte < 4; byte++)
                    bit_positions[word][count++] = (uint8_t)(4 * bit + byte);
}

#define OWN_COMPACT

static inline void compact_at_least_float(int32_t *index, float *x, ptrdiff_t n, float bound) {
    const float32x4_t least = vdupq_n_f32(bound);
    const uint32x4_t bit = {0x11, 0x12, 0x14, 0x18}; /* and 16 for the count */
    ptrdiff_t count = 0;
    for (ptrdiff_t i = 0; i < n; i += 4) {
        float32x4_t v = vld1q_f32(x + i);
        int32x4_t at = vld1q_s32(index + i);
        uint32_t sum = vaddvq_u32(vandq_u32(vcgeq_f32(v, least), bit));
        uint8x16_t from = vld1q_u8(bit_positions[sum & 15]);
        vst1q_s32(
            index + count, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(at), from))
        );
        vst1q_f32(x + count, vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(v), from)));
        count += sum >> 4;
    }
}

#else

static void fill_bit_positions(void) {}

#endif

#define REAL float
#include "compress_of_real.h"
#undef REAL
#undef OWN_COUNT
#undef OWN_COLLECT
#undef OWN_COMPACT

#define REAL double
#include "compress_of_real.h"
#undef REAL

/* Experts up to this many are sorted by, one after the other, where collect_equal is a matter of
   few instructions. */
#if defined(__AVX2__)
#define MAX_EXPERTS_TO_COMPARE 8
#else
#define MAX_EXPERTS_TO_COMPARE 0
#endif

/* Indices of those that equal y, ascending, up to `room` of them; n is any number. */
static inline void collect_equal(
    const int32_t *x, ptrdiff_t n, int32_t y, int32_t *index, ptrdiff_t room
) {
    ptrdiff_t i = 0, count = 0;
#if defined(__AVX512F__)
    const __m512i equal = _mm512_set1_epi32(y), step = _mm512_set1_epi32(16);
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= n && count + 16 <= room; i += 16) {
        __mmask16 bits = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(x + i), equal);
        _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(bits, at));
        count += number_of_bits(bits);
        at = _mm512_add_epi32(at, step);
    }
#elif defined(__AVX2__)
    const __m256i equal = _mm256_set1_epi32(y);
    for (; i + 8 <= n && count + 8 <= room; i += 8) {
        __m256i v = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)(x + i)), equal);
        int bits = _mm256_movemask_ps(_mm256_castsi256_ps(v));
        __m256i at = _mm256_add_epi32(positions_of(bits), _mm256_set1_epi32((int)i));
        _mm256_storeu_si256((__m256i *)(index + count), at);
        count += number_of_bits(bits);
    }
#endif
    for (; i < n && count < room; i++)
        if (x[i] == y)
            index[count++] = (int32_t)i;
}

#endif
