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
    #define PART(name, S) _mm512_##name##_##S
    #define BITS(op, x, y, S) _mm512_cmp_##S##_mask(x, y, WIDE_##op)
    #define WHERE_ABOVE(x, y, a, b, S) _mm512_mask_blend_##S(BITS(gt, x, y, S), b, a)
    #elif defined(__AVX2__)
    typedef __m256 part_float;
    typedef __m256d part_double;
    #define PART(name, S) _mm256_##name##_##S
    #define BITS(op, x, y, S) _mm256_movemask_##S(_mm256_cmp_##S(x, y, WIDE_##op))
    #define WHERE_ABOVE(x, y, a, b, S) _mm256_blendv_##S(b, a, _mm256_cmp_##S(x, y, _CMP_GT_OQ))
    #elif defined(__SSE2__) || defined(_M_X64)
    typedef __m128 part_float;
    typedef __m128d part_double;
    #define PART(name, S) _mm_##name##_##S
    #define BITS(op, x, y, S) _mm_movemask_##S(_mm_cmp##op##_##S(x, y))
    #define WHERE_ABOVE(x, y, a, b, S) _mm_or_##S( \
        _mm_and_##S(_mm_cmpgt_##S(x, y), a), _mm_andnot_##S(_mm_cmpgt_##S(x, y), b))
    #else
    typedef float part_float;
    typedef double part_double;
    #define PART(name, S) one_##name
    #define one_set1(x) (x)
    #define one_loadu(x) (*(x))
    #define one_storeu(to, x) (*(to) = (x))
    #define one_add(x, y) ((x) + (y))
    #define one_sub(x, y) ((x) - (y))
    #define one_mul(x, y) ((x) * (y))
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

    #if defined(__GNUC__)
    #define PREFETCH(address) __builtin_prefetch((const void*)(address), 0, 2)
    #elif defined(_M_X64)
    #define PREFETCH(address) _mm_prefetch((const char*)(address), _MM_HINT_T1)
    #else
    #define PREFETCH(address) ((void)(address))
    #endif
    /* Ask for n bytes, `ahead` bytes after x, or for none where that is 0; they may lie past any
       end. Into the second cache: in the first they took the place of rows in use. */
    static inline void ask_ahead(const void* x, Py_ssize_t n, Py_ssize_t ahead) {
        Py_ssize_t i;
        if (ahead)
            for (i = 0; i < n; i += 64) PREFETCH((uintptr_t)x + (uintptr_t)(ahead + i));
    }

    #define EACH_PART(T) for (i = 0; i < 16; i += (int)(sizeof(part_##T) / sizeof(T)))
    #define STEPS(T, S) \
        /* Bit i: x[i] > bound. */ \
        static inline uint32_t above_##T(const T* x, T bound) { \
            uint32_t bits = 0; \
            int i; \
            EACH_PART(T) bits |= (uint32_t)BITS( \
                gt, PART(loadu, S)(x + i), PART(set1, S)(bound), S) << i; \
            return bits; \
        } \
        /* Bit i: x[i] >= bound. */ \
        static inline uint32_t at_least_##T(const T* x, T bound) { \
            uint32_t bits = 0; \
            int i; \
            EACH_PART(T) bits |= (uint32_t)BITS( \
                ge, PART(loadu, S)(x + i), PART(set1, S)(bound), S) << i; \
            return bits; \
        } \
        /* Whether any of n values, a multiple of 16, is a NaN. */ \
        static inline int has_nan_##T(const T* x, Py_ssize_t n) { \
            enum { SIZE = sizeof(part_##T) / sizeof(T), OTHER = SIZE < 16 ? 8 : 0 }; \
            uint32_t bits = 0; \
            Py_ssize_t j; \
            int i; \
            for (j = 0; j < n; j += 16) \
                for (i = 0; i + OTHER < 16; i += SIZE) bits |= (uint32_t)BITS( \
                    unord, PART(loadu, S)(x + j + i), PART(loadu, S)(x + j + i + OTHER), S); \
            return bits != 0; \
        }
    #define EXTREMES(T, S) \
        /* to[i] = x[i] - most[i] for x[i] <= most[i], and 0 for infinity less itself. */ \
        static inline void below_##T(const T* x, const T* most, T* to) { \
            int i; \
            EACH_PART(T) { \
                part_##T less = PART(sub, S)(PART(loadu, S)(x + i), PART(loadu, S)(most + i)); \
                PART(storeu, S)(to + i, PART(min, S)(less, PART(set1, S)((T)0))); \
            } \
        } \
        static inline void add_##T(T* to, const T* x) { \
            int i; \
            EACH_PART(T) PART(storeu, S)(to + i, PART(add, S)(PART(loadu, S)(to + i), \
                PART(loadu, S)(x + i))); \
        } \
        static inline void add_product_##T(T* to, const T* x, const T* y) { \
            int i; \
            EACH_PART(T) PART(storeu, S)(to + i, PART(add, S)(PART(loadu, S)(to + i), \
                PART(mul, S)(PART(loadu, S)(x + i), PART(loadu, S)(y + i)))); \
        } \
        /* to[i] = the largest of x[i], x[i + step], ... before n. */ \
        static inline void fold_##T(const T* x, Py_ssize_t n, Py_ssize_t step, T* to) { \
            Py_ssize_t j; \
            int i; \
            EACH_PART(T) { \
                part_##T most = PART(loadu, S)(x + i); \
                for (j = i + step; j < n; j += step) \
                    most = PART(max, S)(PART(loadu, S)(x + j), most); \
                PART(storeu, S)(to + i, most); \
            } \
        } \
        /* The same of x[i], x[i + 16], ...; returns whether a NaN is among them. */ \
        static inline int fold_checked_##T(const T* x, Py_ssize_t n, T* to) { \
            uint32_t bits = 0; \
            Py_ssize_t j; \
            int i; \
            EACH_PART(T) { \
                part_##T a, b, most = PART(loadu, S)(x + i); \
                bits |= (uint32_t)BITS(unord, most, most, S); \
                for (j = i + 16; j + 16 < n; j += 32) { \
                    a = PART(loadu, S)(x + j); \
                    b = PART(loadu, S)(x + j + 16); \
                    bits |= (uint32_t)BITS(unord, a, b, S); \
                    most = PART(max, S)(PART(max, S)(a, b), most); \
                } \
                if (j < n) { \
                    a = PART(loadu, S)(x + j); \
                    bits |= (uint32_t)BITS(unord, a, a, S); \
                    most = PART(max, S)(a, most); \
                } \
                PART(storeu, S)(to + i, most); \
            } \
            return bits != 0; \
        } \
        /* to[i] = the largest of to[i] and the smaller of a[i] and b[i]. */ \
        static inline void raise_##T(T* to, const T* a, const T* b) { \
            int i; \
            EACH_PART(T) PART(storeu, S)(to + i, PART(max, S)(PART(loadu, S)(to + i), \
                PART(min, S)(PART(loadu, S)(a + i), PART(loadu, S)(b + i)))); \
        }
    #define COLUMNS(T, S) \
        /* Put x, of index e, among best[0] >= best[1] >= ... best[last], behind its equals; \
           those it passes move on and the last one out. */ \
        static inline void insert_##T( \
            part_##T* best, part_##T* index, int last, part_##T x, part_##T e \
        ) { \
            int s; \
            for (s = last; s > 0; s--) { \
                index[s] = WHERE_ABOVE(x, best[s - 1], index[s - 1], \
                    WHERE_ABOVE(x, best[s], e, index[s], S), S); \
                best[s] = PART(max, S)(PART(min, S)(x, best[s - 1]), best[s]); \
            } \
            index[0] = WHERE_ABOVE(x, best[0], e, index[0], S); \
            best[0] = PART(max, S)(x, best[0]); \
        } \
        /* The k largest of each lane of column[0], column[16], ... before column[16 * n], and \
           their indices, in the same form. With k known, all of it stays in registers. */ \
        static inline void best_##T( \
            const T* column, Py_ssize_t n, int k, T* best, T* index \
        ) { \
            part_##T b[16], j[16]; \
            Py_ssize_t e; \
            int i, s; \
            EACH_PART(T) { \
                for (s = 0; s < k; s++) { \
                    /* The index is there for a -inf, which passes nothing. */ \
                    b[s] = PART(set1, S)(-(T)INFINITY); \
                    j[s] = PART(set1, S)((T)s); \
                    insert_##T(b, j, s, PART(loadu, S)(column + 16 * s + i), j[s]); \
                } \
                for (e = k; e < n; e++) \
                    insert_##T(b, j, k - 1, PART(loadu, S)(column + 16 * e + i), \
                        PART(set1, S)((T)e)); \
                for (s = 0; s < k; s++) { \
                    PART(storeu, S)(best + 16 * s + i, b[s]); \
                    PART(storeu, S)(index + 16 * s + i, j[s]); \
                } \
            } \
        } \
        static inline void best_of_columns_##T( \
            const T* column, Py_ssize_t n, int k, T* best, T* index \
        ) { \
            if (k == 1) best_##T(column, n, 1, best, index); \
            else if (k == 2) best_##T(column, n, 2, best, index); \
            else if (k == 3) best_##T(column, n, 3, best, index); \
            else if (k == 4) best_##T(column, n, 4, best, index); \
            else best_##T(column, n, k, best, index); \
        }
    STEPS(float, ps)
    STEPS(double, pd)
    EXTREMES(float, ps)
    EXTREMES(double, pd)
    COLUMNS(float, ps)
    COLUMNS(double, pd)
    """
    uint32_t above_float(const float* x, float bound) noexcept nogil
    uint32_t above_double(const double* x, double bound) noexcept nogil
    uint32_t at_least_float(const float* x, float bound) noexcept nogil
    uint32_t at_least_double(const double* x, double bound) noexcept nogil
    bint has_nan_float(const float* x, Py_ssize_t n) noexcept nogil
    bint has_nan_double(const double* x, Py_ssize_t n) noexcept nogil
    void below_float(const float* x, const float* most, float* to) noexcept nogil
    void below_double(const double* x, const double* most, double* to) noexcept nogil
    void add_float(float* to, const float* x) noexcept nogil
    void add_double(double* to, const double* x) noexcept nogil
    void add_product_float(float* to, const float* x, const float* y) noexcept nogil
    void add_product_double(double* to, const double* x, const double* y) noexcept nogil
    void fold_float(const float* x, Py_ssize_t n, Py_ssize_t step, float* to) noexcept nogil
    void fold_double(const double* x, Py_ssize_t n, Py_ssize_t step, double* to) noexcept nogil
    bint fold_checked_float(const float* x, Py_ssize_t n, float* to) noexcept nogil
    bint fold_checked_double(const double* x, Py_ssize_t n, double* to) noexcept nogil
    void raise_float(float* to, const float* a, const float* b) noexcept nogil
    void raise_double(double* to, const double* a, const double* b) noexcept nogil
    void best_of_columns_float(
        const float* column, Py_ssize_t n, int k, float* best, float* index
    ) noexcept nogil
    void best_of_columns_double(
        const double* column, Py_ssize_t n, int k, double* best, double* index
    ) noexcept nogil
    void ask_ahead(const void* x, Py_ssize_t n, Py_ssize_t ahead) noexcept nogil
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


cdef inline bint has_nan(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return has_nan_float(x, n)
    else:
        return has_nan_double(x, n)


cdef inline void below(const real* x, const real* largest, real* difference) noexcept nogil:
    # Of LANES values: x - largest. From a plain expression compilers take the cases apart, and
    # compute each.
    if real is float:
        below_float(x, largest, difference)
    else:
        below_double(x, largest, difference)


cdef inline void exponentials_below(const real* x, const real* largest, real* e) noexcept nogil:
    # Of LANES values: e^(x - largest).
    cdef real[LANES] difference
    cdef Py_ssize_t j
    below(x, largest, difference)
    for j in range(LANES):
        e[j] = exponential(difference[j])


cdef inline void add_to(real* total, const real* x) noexcept nogil:
    if real is float:
        add_float(total, x)
    else:
        add_double(total, x)


cdef inline void add_product_to(real* total, const real* x, const real* y) noexcept nogil:
    if real is float:
        add_product_float(total, x, y)
    else:
        add_product_double(total, x, y)


cdef inline void fold(const real* x, Py_ssize_t n, Py_ssize_t step, real* to) noexcept nogil:
    if real is float:
        fold_float(x, n, step, to)
    else:
        fold_double(x, n, step, to)


cdef inline bint fold_checked(const real* x, Py_ssize_t n, real* to) noexcept nogil:
    if real is float:
        return fold_checked_float(x, n, to)
    else:
        return fold_checked_double(x, n, to)


cdef inline void raise_to(real* to, const real* a, const real* b) noexcept nogil:
    if real is float:
        raise_float(to, a, b)
    else:
        raise_double(to, a, b)


cdef inline void best_of_columns(
    const real* column, Py_ssize_t n, Py_ssize_t k, real* best, real* index
) noexcept nogil:
    if real is float:
        best_of_columns_float(column, n, <int>k, best, index)
    else:
        best_of_columns_double(column, n, <int>k, best, index)
