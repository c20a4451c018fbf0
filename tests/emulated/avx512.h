/* The AVX-512 instructions that the kernels name, in plain C, for processors without them. Arithmetic
   on whole vectors is the compiler's own and needs none of this. */
#include <immintrin.h>
#include <string.h>

typedef int Words16 __attribute__((vector_size(64)));
typedef long long Words8 __attribute__((vector_size(64)));

#define EMULATED static inline __attribute__((always_inline))
#define EACH(count) for (int i = 0; i < (count); i++)

EMULATED int holds(double x, double y, int comparison) {
    switch (comparison) {
    case _CMP_GT_OQ: return x > y;
    case _CMP_GE_OQ: return x >= y;
    case _CMP_UNORD_Q: return x != x || y != y;
    default: __builtin_trap();
    }
}

#define OF_FLOATS(S, vector, number, count) \
    EMULATED vector loadu_##S(const void *from) { vector v; memcpy(&v, from, sizeof v); return v; } \
    EMULATED void storeu_##S(void *to, vector v) { memcpy(to, &v, sizeof v); } \
    EMULATED vector set1_##S(number x) { vector v; EACH(count) v[i] = x; return v; } \
    EMULATED vector max_##S(vector x, vector y) { \
        EACH(count) x[i] = x[i] > y[i] ? x[i] : y[i]; \
        return x; \
    } \
    EMULATED vector min_##S(vector x, vector y) { \
        EACH(count) x[i] = x[i] < y[i] ? x[i] : y[i]; \
        return x; \
    } \
    EMULATED unsigned cmp_mask_##S(vector x, vector y, int comparison) { \
        unsigned bits = 0; \
        EACH(count) bits |= (unsigned)holds(x[i], y[i], comparison) << i; \
        return bits; \
    } \
    EMULATED vector blend_##S(unsigned bits, vector x, vector y) { \
        EACH(count) x[i] = bits >> i & 1 ? y[i] : x[i]; \
        return x; \
    }
OF_FLOATS(ps, __m512, float, 16)
OF_FLOATS(pd, __m512d, double, 8)

EMULATED __m512 compress_ps(unsigned bits, __m512 v) {
    __m512 kept = {0};
    int count = 0;
    EACH(16) if (bits >> i & 1) kept[count++] = v[i];
    return kept;
}

EMULATED __m512i set1_epi32(int x) { Words16 v; EACH(16) v[i] = x; return (__m512i)v; }

EMULATED __m512i setr_epi32(const int *x) { Words16 v; EACH(16) v[i] = x[i]; return (__m512i)v; }

EMULATED __m512i compress_epi32(unsigned bits, __m512i v) {
    Words16 kept = {0};
    int count = 0;
    EACH(16) if (bits >> i & 1) kept[count++] = ((Words16)v)[i];
    return (__m512i)kept;
}

EMULATED __m512i setr_epi64(const long long *x) { Words8 v; EACH(8) v[i] = x[i]; return (__m512i)v; }

EMULATED __m512i loadu_si512(const void *from) { return (__m512i)loadu_ps(from); }

EMULATED __m512d cvtps_pd(__m256 x) { __m512d v; EACH(8) v[i] = x[i]; return v; }

EMULATED unsigned cmpeq_epi32(__m512i x, __m512i y) {
    unsigned bits = 0;
    EACH(16) bits |= (unsigned)(((Words16)x)[i] == ((Words16)y)[i]) << i;
    return bits;
}

/* Of each quarter of x and y in turn: two from its half number `high`. */
EMULATED __m512 unpack_ps(__m512 x, __m512 y, int high) {
    __m512 v;
    EACH(16) v[i] = (i % 2 ? y : x)[i / 4 * 4 + 2 * high + i % 4 / 2];
    return v;
}

/* Of each quarter two of x, then two of y, each numbered by two bits of `which`. */
EMULATED __m512 shuffle_ps(__m512 x, __m512 y, int which) {
    __m512 v;
    EACH(16) v[i] = (i % 4 < 2 ? x : y)[i / 4 * 4 + (which >> i % 4 * 2 & 3)];
    return v;
}

EMULATED __m512d permutex2var_pd(__m512d x, __m512i which, __m512d y) {
    __m512d v;
    EACH(8) v[i] = (((Words8)which)[i] & 8 ? y : x)[((Words8)which)[i] & 7];
    return v;
}

EMULATED __m512d insertf64x4(__m512d v, __m256d part, int half) {
    EACH(4) v[4 * half + i] = part[i];
    return v;
}

EMULATED __m256d extractf64x4(__m512d v, int half) {
    __m256d part;
    EACH(4) part[i] = v[4 * half + i];
    return part;
}

#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#undef _mm512_extractf64x4_pd
#undef _mm512_insertf64x4
#undef _mm512_setr_epi32
#undef _mm512_setr_epi64
#undef _mm512_shuffle_ps
#define _mm512_add_epi32(x, y) ((__m512i)((Words16)(x) + (Words16)(y)))
#define _mm512_add_epi64(x, y) ((__m512i)((Words8)(x) + (Words8)(y)))
#define _mm512_add_pd(x, y) ((x) + (y))
#define _mm512_add_ps(x, y) ((x) + (y))
#define _mm512_castpd_ps(v) ((__m512)(v))
#define _mm512_castpd_si512(v) ((__m512i)(v))
#define _mm512_castps256_ps512(v) ((__m512)insertf64x4((__m512d){0}, (__m256d)(v), 0))
#define _mm512_castps512_ps256(v) ((__m256)extractf64x4((__m512d)(v), 0))
#define _mm512_castps_pd(v) ((__m512d)(v))
#define _mm512_castsi512_pd(v) ((__m512d)(v))
#define _mm512_castsi512_si256(v) ((__m256i)extractf64x4((__m512d)(v), 0))
#define _mm512_cmp_pd_mask cmp_mask_pd
#define _mm512_cmp_ps_mask cmp_mask_ps
#define _mm512_cmpeq_epi32_mask cmpeq_epi32
#define _mm512_cvtps_pd cvtps_pd
#define _mm512_extractf64x4_pd extractf64x4
#define _mm512_insertf64x4 insertf64x4
#define _mm512_loadu_pd loadu_pd
#define _mm512_loadu_ps loadu_ps
#define _mm512_loadu_si512 loadu_si512
#define _mm512_mask_blend_pd blend_pd
#define _mm512_mask_blend_ps blend_ps
#define _mm512_maskz_compress_epi32 compress_epi32
#define _mm512_maskz_compress_ps compress_ps
#define _mm512_max_pd max_pd
#define _mm512_max_ps max_ps
#define _mm512_min_pd min_pd
#define _mm512_min_ps min_ps
#define _mm512_div_pd(x, y) ((x) / (y))
#define _mm512_div_ps(x, y) ((x) / (y))
#define _mm512_mul_pd(x, y) ((x) * (y))
#define _mm512_mul_ps(x, y) ((x) * (y))
#define _mm512_permutex2var_pd permutex2var_pd
#define _mm512_set1_epi32 set1_epi32
#define _mm512_set1_pd set1_pd
#define _mm512_set1_ps set1_ps
#define _mm512_setr_epi32(...) setr_epi32((const int[16]){__VA_ARGS__})
#define _mm512_setr_epi64(...) setr_epi64((const long long[8]){__VA_ARGS__})
#define _mm512_shuffle_ps shuffle_ps
#define _mm512_storeu_pd storeu_pd
#define _mm512_storeu_ps storeu_ps
#define _mm512_storeu_si512(to, v) storeu_ps(to, (__m512)(v))
#define _mm512_stream_pd storeu_pd
#define _mm512_sub_pd(x, y) ((x) - (y))
#define _mm512_sub_ps(x, y) ((x) - (y))
#define _mm512_unpackhi_ps(x, y) unpack_ps(x, y, 1)
#define _mm512_unpacklo_ps(x, y) unpack_ps(x, y, 0)
