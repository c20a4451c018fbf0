# Steps over LANES values at once that compilers do not reliably find in plain loops: comparisons as
# bits, and choosing by them. One text for every width of vector, and one value at a time elsewhere.

cdef extern from *:
    """
    #if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
    #include <immintrin.h>
    #endif

    #define WIDE_gt _CMP_GT_OQ
    #define WIDE_ge _CMP_GE_OQ
    #define WIDE_unord _CMP_UNORD_Q
    #if defined(__AVX512F__)
    typedef __m512 part_float;
    typedef __m512d part_double;
    #define VECTOR(name, S) _mm512_##name##_##S
    #define BITS(op, x, y, S) _mm512_cmp_##S##_mask(x, y, WIDE_##op)
    #define WHERE_ABOVE(x, y, a, b, S) _mm512_mask_blend_##S(BITS(gt, x, y, S), b, a)
    #elif defined(__AVX2__)
    typedef __m256 part_float;
    typedef __m256d part_double;
    #define VECTOR(name, S) _mm256_##name##_##S
    #define BITS(op, x, y, S) _mm256_movemask_##S(_mm256_cmp_##S(x, y, WIDE_##op))
    #define WHERE_ABOVE(x, y, a, b, S) _mm256_blendv_##S(b, a, _mm256_cmp_##S(x, y, _CMP_GT_OQ))
    #elif defined(__SSE2__) || defined(_M_X64)
    typedef __m128 part_float;
    typedef __m128d part_double;
    #define VECTOR(name, S) _mm_##name##_##S
    #define BITS(op, x, y, S) _mm_movemask_##S(_mm_cmp##op##_##S(x, y))
    #define WHERE_ABOVE(x, y, a, b, S) _mm_or_##S( \
        _mm_and_##S(_mm_cmpgt_##S(x, y), a), _mm_andnot_##S(_mm_cmpgt_##S(x, y), b))
    #else
    typedef float part_float;
    typedef double part_double;
    #define VECTOR(name, S) one_##name
    #define one_set1(x) (x)
    #define one_loadu(x) (*(x))
    #define one_storeu(to, x) (*(to) = (x))
    #define one_max(x, y) ((x) > (y) ? (x) : (y))
    #define one_min(x, y) ((x) < (y) ? (x) : (y))
    #define one_gt(x, y) ((x) > (y))
    #define one_ge(x, y) ((x) >= (y))
    #define one_unord(x, y) ((x) != (x) || (y) != (y))
    #define BITS(op, x, y, S) one_##op(x, y)
    #define WHERE_ABOVE(x, y, a, b, S) ((x) > (y) ? (a) : (b))
    #endif

    #if defined(_MSC_VER) && !defined(__clang__)
    #include <intrin.h>
    static inline int lowest_bit(uint64_t bits) {
        unsigned long i;
        if (_BitScanForward(&i, (unsigned long)bits)) return (int)i;
        _BitScanForward(&i, (unsigned long)(bits >> 32));
        return (int)i + 32;
    }
    #else
    static inline int lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }
    #endif
    #if defined(__POPCNT__)
    static inline int number_of_bits(uint32_t bits) { return __builtin_popcount(bits); }
    #else
    /* Of 16 bits: sums of pairs, fours, eights. */
    static inline int number_of_bits(uint32_t bits) {
        bits = bits - ((bits >> 1) & 0x5555);
        bits = (bits & 0x3333) + ((bits >> 2) & 0x3333);
        bits = (bits + (bits >> 4)) & 0x0F0F;
        return (int)((bits + (bits >> 8)) & 0x1F);
    }
    #endif

    #define EACH_PART(T) for (i = 0; i < 16; i += (int)(sizeof(part_##T) / sizeof(T)))
    #define STEPS(T, S) \
        /* Bit i: x[i] > bound. */ \
        static inline uint32_t above_##T(const T* x, T bound) { \
            uint32_t bits = 0; \
            int i; \
            EACH_PART(T) bits |= (uint32_t)BITS( \
                gt, VECTOR(loadu, S)(x + i), VECTOR(set1, S)(bound), S) << i; \
            return bits; \
        } \
        /* Bit i: x[i] >= bound. */ \
        static inline uint32_t at_least_##T(const T* x, T bound) { \
            uint32_t bits = 0; \
            int i; \
            EACH_PART(T) bits |= (uint32_t)BITS( \
                ge, VECTOR(loadu, S)(x + i), VECTOR(set1, S)(bound), S) << i; \
            return bits; \
        } \
        /* How many of n values, a multiple of 16, are at least the bound. */ \
        static inline Py_ssize_t count_at_least_##T(const T* x, Py_ssize_t n, T bound) { \
            Py_ssize_t i, count = 0; \
            for (i = 0; i < n; i += 16) count += number_of_bits(at_least_##T(x + i, bound)); \
            return count; \
        } \
        /* Whether x[i] or y[i] is a NaN for any i. */ \
        static inline int has_nan_##T(const T* x, const T* y) { \
            uint32_t bits = 0; \
            int i; \
            EACH_PART(T) bits |= (uint32_t)BITS( \
                unord, VECTOR(loadu, S)(x + i), VECTOR(loadu, S)(y + i), S); \
            return bits != 0; \
        } \
        /* to[i] = the largest of x[i], x[i + step], ... before n. */ \
        static inline void fold_##T(const T* x, Py_ssize_t n, Py_ssize_t step, T* to) { \
            Py_ssize_t j; \
            int i; \
            EACH_PART(T) { \
                part_##T most = VECTOR(loadu, S)(x + i); \
                for (j = i + step; j < n; j += step) \
                    most = VECTOR(max, S)(VECTOR(loadu, S)(x + j), most); \
                VECTOR(storeu, S)(to + i, most); \
            } \
        } \
        /* The larger of each two to a, the smaller to b. */ \
        static inline void exchange_##T(T* a, T* b) { \
            int i; \
            EACH_PART(T) { \
                part_##T x = VECTOR(loadu, S)(a + i), y = VECTOR(loadu, S)(b + i); \
                VECTOR(storeu, S)(a + i, VECTOR(max, S)(x, y)); \
                VECTOR(storeu, S)(b + i, VECTOR(min, S)(x, y)); \
            } \
        } \
        /* to[i] = the largest of to[i] and the smaller of a[i] and b[i]. */ \
        static inline void raise_##T(T* to, const T* a, const T* b) { \
            int i; \
            EACH_PART(T) VECTOR(storeu, S)(to + i, VECTOR(max, S)(VECTOR(loadu, S)(to + i), \
                VECTOR(min, S)(VECTOR(loadu, S)(a + i), VECTOR(loadu, S)(b + i)))); \
        } \
        /* order[r] = index of the value with r others before it: the larger ones and, among \
           equals, those with a lower index. At most 16; value[n:16] is -inf. */ \
        static inline void sort_few_##T(const T* value, int n, int32_t* order) { \
            uint32_t lower = 0; \
            int j; \
            for (j = 0; j < n; j++) { \
                uint32_t before = (at_least_##T(value, value[j]) & lower) \
                    | (above_##T(value, value[j]) & ~lower); \
                order[number_of_bits(before)] = j; \
                lower = 2 * lower + 1; \
            } \
        } \
        /* Put x below those in best[0], best[16], ... best[16 * last] that are not smaller, and \
           e among their indices; those it passes move down and the last one out. */ \
        static inline void insert_##T(T* best, T* index, Py_ssize_t last, const T* x, T e) { \
            Py_ssize_t s; \
            int i; \
            EACH_PART(T) { \
                part_##T v = VECTOR(loadu, S)(x + i), new_index = VECTOR(set1, S)(e); \
                part_##T here = VECTOR(loadu, S)(best + 16 * last + i); \
                part_##T here_index = VECTOR(loadu, S)(index + 16 * last + i); \
                for (s = last; s > 0; s--) { \
                    part_##T up = VECTOR(loadu, S)(best + 16 * (s - 1) + i); \
                    part_##T up_index = VECTOR(loadu, S)(index + 16 * (s - 1) + i); \
                    here_index = WHERE_ABOVE(v, here, new_index, here_index, S); \
                    here = VECTOR(max, S)(v, here); \
                    VECTOR(storeu, S)(best + 16 * s + i, WHERE_ABOVE(v, up, up, here, S)); \
                    VECTOR(storeu, S)(index + 16 * s + i, \
                        WHERE_ABOVE(v, up, up_index, here_index, S)); \
                    here = up; \
                    here_index = up_index; \
                } \
                VECTOR(storeu, S)(index + i, WHERE_ABOVE(v, here, new_index, here_index, S)); \
                VECTOR(storeu, S)(best + i, VECTOR(max, S)(v, here)); \
            } \
        }
    #define COLLECT(T) \
        static inline Py_ssize_t collect_##T( \
            const T* x, Py_ssize_t n, T bound, int32_t first, int32_t* index, T* value \
        ) { \
            Py_ssize_t i, j, count = 0; \
            for (i = 0; i < n; i += 64) { \
                uint64_t bits = 0; \
                for (j = i; j < i + 64 && j < n; j += 16) \
                    bits |= (uint64_t)at_least_##T(x + j, bound) << (j - i); \
                for (; bits; bits &= bits - 1) { \
                    Py_ssize_t at = i + lowest_bit(bits); \
                    index[count] = first + (int32_t)at; \
                    value[count] = x[at]; \
                    count++; \
                } \
            } \
            return count; \
        }
    STEPS(float, ps)
    STEPS(double, pd)

    /* Indices and values of those from `bound` up, ascending, and how many; indices begin at
       `first`, n is a multiple of 16, and both outputs have room for 16 more. */
    #if defined(__AVX512F__)
    static inline Py_ssize_t collect_float(
        const float* x, Py_ssize_t n, float bound, int32_t first, int32_t* index, float* value
    ) {
        const __m512 least = _mm512_set1_ps(bound);
        const __m512i step = _mm512_set1_epi32(16);
        __m512i at = _mm512_add_epi32(_mm512_set1_epi32(first),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        Py_ssize_t i, count = 0;
        for (i = 0; i < n; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            __mmask16 bits = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
            /* In the register, then whole: compressing into memory is slow on some processors. */
            _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(bits, at));
            _mm512_storeu_ps(value + count, _mm512_maskz_compress_ps(bits, v));
            count += number_of_bits(bits);
            at = _mm512_add_epi32(at, step);
        }
        return count;
    }
    #else
    COLLECT(float)
    #endif
    COLLECT(double)
    """
    uint32_t above_float(const float* x, float bound) noexcept nogil
    uint32_t above_double(const double* x, double bound) noexcept nogil
    uint32_t at_least_float(const float* x, float bound) noexcept nogil
    uint32_t at_least_double(const double* x, double bound) noexcept nogil
    Py_ssize_t count_at_least_float(const float* x, Py_ssize_t n, float bound) noexcept nogil
    Py_ssize_t count_at_least_double(const double* x, Py_ssize_t n, double bound) noexcept nogil
    int has_nan_float(const float* x, const float* y) noexcept nogil
    int has_nan_double(const double* x, const double* y) noexcept nogil
    void fold_float(const float* x, Py_ssize_t n, Py_ssize_t step, float* to) noexcept nogil
    void fold_double(const double* x, Py_ssize_t n, Py_ssize_t step, double* to) noexcept nogil
    void exchange_float(float* a, float* b) noexcept nogil
    void exchange_double(double* a, double* b) noexcept nogil
    void raise_float(float* to, const float* a, const float* b) noexcept nogil
    void raise_double(double* to, const double* a, const double* b) noexcept nogil
    void sort_few_float(const float* value, int n, int32_t* order) noexcept nogil
    void sort_few_double(const double* value, int n, int32_t* order) noexcept nogil
    Py_ssize_t collect_float(
        const float* x, Py_ssize_t n, float bound, int32_t first, int32_t* index, float* value
    ) noexcept nogil
    Py_ssize_t collect_double(
        const double* x, Py_ssize_t n, double bound, int32_t first, int32_t* index, double* value
    ) noexcept nogil
    void insert_float(
        float* best, float* index, Py_ssize_t last, const float* x, float e
    ) noexcept nogil
    void insert_double(
        double* best, double* index, Py_ssize_t last, const double* x, double e
    ) noexcept nogil
    int lowest_bit(uint64_t bits) noexcept nogil
    int number_of_bits(uint32_t bits) noexcept nogil


cdef inline uint32_t above(const real* x, real bound) noexcept nogil:
    if real is float:
        return above_float(x, bound)
    else:
        return above_double(x, bound)


cdef inline uint32_t at_least(const real* x, real bound) noexcept nogil:
    if real is float:
        return at_least_float(x, bound)
    else:
        return at_least_double(x, bound)


cdef inline Py_ssize_t count_at_least(const real* x, Py_ssize_t n, real bound) noexcept nogil:
    if real is float:
        return count_at_least_float(x, n, bound)
    else:
        return count_at_least_double(x, n, bound)


cdef inline bint has_nan(const real* x, const real* y) noexcept nogil:
    if real is float:
        return has_nan_float(x, y)
    else:
        return has_nan_double(x, y)


cdef inline void fold(const real* x, Py_ssize_t n, Py_ssize_t step, real* to) noexcept nogil:
    if real is float:
        fold_float(x, n, step, to)
    else:
        fold_double(x, n, step, to)


cdef inline void exchange(real* a, real* b) noexcept nogil:
    if real is float:
        exchange_float(a, b)
    else:
        exchange_double(a, b)


cdef inline void raise_to(real* to, const real* a, const real* b) noexcept nogil:
    if real is float:
        raise_float(to, a, b)
    else:
        raise_double(to, a, b)


cdef inline void sort_few(const real* value, int n, int32_t* order) noexcept nogil:
    if real is float:
        sort_few_float(value, n, order)
    else:
        sort_few_double(value, n, order)


cdef inline Py_ssize_t collect(
    const real* x, Py_ssize_t n, real bound, int32_t first, int32_t* index, real* value
) noexcept nogil:
    if real is float:
        return collect_float(x, n, bound, first, index, value)
    else:
        return collect_double(x, n, bound, first, index, value)


cdef inline void insert(
    real* best, real* index, Py_ssize_t last, const real* x, real e
) noexcept nogil:
    if real is float:
        insert_float(best, index, last, x, e)
    else:
        insert_double(best, index, last, x, e)
