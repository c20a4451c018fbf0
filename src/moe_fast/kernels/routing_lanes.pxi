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
    /* How many of n values, a multiple of 16, are at least the bound. */
    #define COUNT(T) \
        static inline Py_ssize_t count_at_least_##T(const T* x, Py_ssize_t n, T bound) { \
            Py_ssize_t i, count = 0; \
            for (i = 0; i < n; i += 16) count += number_of_bits(at_least_##T(x + i, bound)); \
            return count; \
        }
    /* Bring the values from `bound` up, and what stands beside them, to the front in their order; n
       is a multiple of 16. Without a branch: whether one stays cannot be foreseen. */
    #define KEEP(T) \
        static inline void keep_at_least_##T(int32_t* index, T* x, Py_ssize_t n, T bound) { \
            Py_ssize_t i, count = 0; \
            for (i = 0; i < n; i++) { \
                T value = x[i]; \
                index[count] = index[i]; \
                x[count] = value; \
                count += value >= bound; \
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
    EXTREMES(float, ps)
    EXTREMES(double, pd)
    COLUMNS(float, ps)
    COLUMNS(double, pd)
    COUNT(double)
    COLLECT(double)
    KEEP(double)

    #if defined(__AVX512F__)
    COUNT(float)
    /* Indices and values of those from `bound` up, ascending, and how many; indices begin at
       `first`, n is a multiple of 16, and both outputs have room for 16 more. */
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
            /* In the register, then whole: compressing into memory is slow on some processors. So
               is a store of 64 bytes, and more than half of them are seldom needed. */
            __m512i some = _mm512_maskz_compress_epi32(bits, at);
            v = _mm512_maskz_compress_ps(bits, v);
            _mm256_storeu_si256((__m256i*)(index + count), _mm512_castsi512_si256(some));
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
    static inline void keep_at_least_float(int32_t* index, float* x, Py_ssize_t n, float bound) {
        const __m512 least = _mm512_set1_ps(bound);
        Py_ssize_t i, count = 0;
        for (i = 0; i < n; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            __m512i at = _mm512_loadu_si512(index + i);
            __mmask16 bits = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
            _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(bits, at));
            _mm512_storeu_ps(x + count, _mm512_maskz_compress_ps(bits, v));
            count += number_of_bits(bits);
        }
    }
    #elif defined(__AVX2__) || defined(__SSE2__) || defined(_M_X64)
    #if defined(__AVX2__)
    #define INTS(name) _mm256_##name
    #define FLAGS(op, x, y) _mm256_castps_si256(_mm256_cmp_ps(x, y, WIDE_##op))
    #define STORE_INTS(to, x) _mm256_storeu_si256((__m256i*)(to), x)
    typedef __m256i part_int;
    #else
    #define INTS(name) _mm_##name
    #define FLAGS(op, x, y) _mm_castps_si128(_mm_cmp##op##_ps(x, y))
    #define STORE_INTS(to, x) _mm_storeu_si128((__m128i*)(to), x)
    typedef __m128i part_int;
    #endif
    static inline Py_ssize_t count_at_least_float(const float* x, Py_ssize_t n, float bound) {
        enum { SIZE = sizeof(part_int) / 4 };
        const part_float least = PART(set1, ps)(bound);
        part_int counts[2] = {INTS(set1_epi32)(0), INTS(set1_epi32)(0)};
        int32_t lanes[2 * SIZE];
        Py_ssize_t i, count = 0;
        for (i = 0; i < n; i += 2 * SIZE) {
            counts[0] = INTS(sub_epi32)(counts[0], FLAGS(ge, PART(loadu, ps)(x + i), least));
            counts[1] = INTS(sub_epi32)(counts[1], FLAGS(ge, PART(loadu, ps)(x + i + SIZE), least));
        }
        STORE_INTS(lanes, counts[0]);
        STORE_INTS(lanes + SIZE, counts[1]);
        for (i = 0; i < 2 * SIZE; i++) count += lanes[i];
        return count;
    }
    #if defined(__AVX2__)
    /* The places of the bits of a byte, one a byte, and how many. */
    static uint8_t PLACES[256][8];
    static void list_places(void) {
        int byte, bit, count;
        for (byte = 0; byte < 256; byte++)
            for (bit = count = 0; bit < 8; bit++)
                if (byte >> bit & 1) PLACES[byte][count++] = (uint8_t)bit;
    }
    static inline Py_ssize_t collect_float(
        const float* x, Py_ssize_t n, float bound, int32_t first, int32_t* index, float* value
    ) {
        const __m256 least = _mm256_set1_ps(bound);
        const __m256i step = _mm256_set1_epi32(8);
        __m256i base = _mm256_set1_epi32(first);
        Py_ssize_t i, count = 0;
        for (i = 0; i < n; i += 8) {
            __m256 v = _mm256_loadu_ps(x + i);
            int bits = _mm256_movemask_ps(_mm256_cmp_ps(v, least, _CMP_GE_OQ));
            __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)PLACES[bits]));
            _mm256_storeu_si256((__m256i*)(index + count), _mm256_add_epi32(at, base));
            _mm256_storeu_ps(value + count, _mm256_permutevar8x32_ps(v, at));
            count += number_of_bits(bits);
            base = _mm256_add_epi32(base, step);
        }
        return count;
    }
    #else
    COLLECT(float)
    #endif
    #else
    COUNT(float)
    COLLECT(float)
    #endif
    #if !defined(__AVX512F__)
    KEEP(float)
    #endif
    #if !defined(__AVX2__) || defined(__AVX512F__)
    static void list_places(void) {}
    #endif

    /* Indices of those that equal y, ascending, up to `room` of them. Where this is a matter of
       few instructions, experts up to FEW_TO_COMPARE are sorted by. */
    static inline void collect_equal(
        const int32_t* x, Py_ssize_t n, int32_t y, int32_t* index, Py_ssize_t room
    ) {
        Py_ssize_t i = 0, count = 0;
    #if defined(__AVX512F__)
    #define FEW_TO_COMPARE 8
        const __m512i equal = _mm512_set1_epi32(y), step = _mm512_set1_epi32(16);
        __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; i + 16 <= n && count + 16 <= room; i += 16) {
            __mmask16 bits = _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(x + i), equal);
            _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(bits, at));
            count += number_of_bits(bits);
            at = _mm512_add_epi32(at, step);
        }
    #elif defined(__AVX2__)
    #define FEW_TO_COMPARE 8
        const __m256i equal = _mm256_set1_epi32(y);
        for (; i + 8 <= n && count + 8 <= room; i += 8) {
            __m256i v = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i*)(x + i)), equal);
            int bits = _mm256_movemask_ps(_mm256_castsi256_ps(v));
            __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)PLACES[bits]));
            _mm256_storeu_si256((__m256i*)(index + count),
                _mm256_add_epi32(at, _mm256_set1_epi32((int)i)));
            count += number_of_bits(bits);
        }
    #else
    #define FEW_TO_COMPARE 0
    #endif
        for (; i < n && count < room; i++)
            if (x[i] == y) index[count++] = (int32_t)i;
    }

    /* Four bytes each: to[16 * c + r] = x[r][c] for 16 rows, and back, where k is the length of a
       row; or no change and 0 where there is no quick way. */
    #if defined(__SSE2__) || defined(_M_X64)
    static inline void transpose_4x4(
        const float* x0, const float* x1, const float* x2, const float* x3,
        float* y0, float* y1, float* y2, float* y3
    ) {
        __m128 a = _mm_loadu_ps(x0), b = _mm_loadu_ps(x1);
        __m128 c = _mm_loadu_ps(x2), d = _mm_loadu_ps(x3);
        _MM_TRANSPOSE4_PS(a, b, c, d);
        _mm_storeu_ps(y0, a);
        _mm_storeu_ps(y1, b);
        _mm_storeu_ps(y2, c);
        _mm_storeu_ps(y3, d);
    }
    /* In whole vectors: one read from two halves just written has to wait for both. */
    #if defined(__AVX512F__)
    /* The 8 x 8 in the lower halves, and those in the upper halves. */
    static inline void transpose_halves(__m512* x) {
        const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
        const __m512i upper = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
        __m512 pair[8];
        __m512d four[8];
        int i;
        for (i = 0; i < 8; i += 2) {
            pair[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
            pair[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
        for (i = 0; i < 8; i += 4) {
            four[i] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i], pair[i + 2], 0x44));
            four[i + 1] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i], pair[i + 2], 0xEE));
            four[i + 2] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0x44));
            four[i + 3] = _mm512_castps_pd(_mm512_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE));
        }
        for (i = 0; i < 4; i++) {
            x[i] = _mm512_castpd_ps(_mm512_permutex2var_pd(four[i], lower, four[i + 4]));
            x[i + 4] = _mm512_castpd_ps(_mm512_permutex2var_pd(four[i], upper, four[i + 4]));
        }
    }
    static inline void eight_columns(const uint8_t* rows, Py_ssize_t stride, float* column) {
        __m512 x[8];
        int i;
        for (i = 0; i < 8; i++) {
            const double* later = (const double*)(rows + (i + 8) * stride);
            x[i] = _mm512_castps256_ps512(_mm256_loadu_ps((const float*)(rows + i * stride)));
            x[i] = _mm512_castpd_ps(_mm512_insertf64x4(
                _mm512_castps_pd(x[i]), _mm256_loadu_pd(later), 1));
        }
        transpose_halves(x);
        for (i = 0; i < 8; i++) _mm512_storeu_ps(column + 16 * i, x[i]);
    }
    static inline void rows_of_eight(const float* column, float* rows, Py_ssize_t width) {
        __m512 x[8];
        int i;
        for (i = 0; i < 8; i++) x[i] = _mm512_loadu_ps(column + 16 * i);
        transpose_halves(x);
        for (i = 0; i < 8; i++) {
            _mm256_storeu_ps(rows + i * width, _mm512_castps512_ps256(x[i]));
            _mm256_storeu_pd((double*)(rows + (i + 8) * width),
                _mm512_extractf64x4_pd(_mm512_castps_pd(x[i]), 1));
        }
    }
    #elif defined(__AVX2__)
    static inline void transpose_8x8(
        const uint8_t* from, Py_ssize_t stride, float* to, Py_ssize_t width
    ) {
        __m256 x[8], pair[8], four[8];
        int i;
        for (i = 0; i < 8; i++) x[i] = _mm256_loadu_ps((const float*)(from + i * stride));
        for (i = 0; i < 8; i += 2) {
            pair[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
            pair[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
        }
        for (i = 0; i < 8; i += 4) {
            four[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
            four[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xEE);
            four[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
            four[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xEE);
        }
        for (i = 0; i < 4; i++) {
            _mm256_storeu_ps(to + i * width,
                _mm256_permute2f128_ps(four[i], four[i + 4], 0x20));
            _mm256_storeu_ps(to + (i + 4) * width,
                _mm256_permute2f128_ps(four[i], four[i + 4], 0x31));
        }
    }
    static inline void eight_columns(const uint8_t* rows, Py_ssize_t stride, float* column) {
        transpose_8x8(rows, stride, column, 16);
        transpose_8x8(rows + 8 * stride, stride, column + 8, 16);
    }
    static inline void rows_of_eight(const float* column, float* rows, Py_ssize_t width) {
        transpose_8x8((const uint8_t*)column, 64, rows, width);
        transpose_8x8((const uint8_t*)(column + 8), 64, rows + 8 * width, width);
    }
    #endif
    static inline int columns_of_rows(
        const uint8_t* rows, Py_ssize_t stride, Py_ssize_t n, float* column
    ) {
        Py_ssize_t e;
        int t;
        #if defined(__AVX2__)
        if (n % 8 == 0) {
            for (e = 0; e < n; e += 8) eight_columns(rows + e * 4, stride, column + 16 * e);
            return 1;
        }
        #endif
        if (n % 4) return 0;
        for (t = 0; t < 16; t += 4)
            for (e = 0; e < n; e += 4) {
                const uint8_t* at = rows + t * stride + e * 4;
                float* to = column + 16 * e + t;
                transpose_4x4((const float*)at, (const float*)(at + stride),
                    (const float*)(at + 2 * stride), (const float*)(at + 3 * stride),
                    to, to + 16, to + 32, to + 48);
            }
        return 1;
    }
    static inline int rows_of_columns(const float* column, Py_ssize_t k, float* rows) {
        Py_ssize_t s;
        int t;
        if (k == 2) {
            for (t = 0; t < 16; t += 4) {
                __m128 a = _mm_loadu_ps(column + t), b = _mm_loadu_ps(column + 16 + t);
                _mm_storeu_ps(rows + 2 * t, _mm_unpacklo_ps(a, b));
                _mm_storeu_ps(rows + 2 * t + 4, _mm_unpackhi_ps(a, b));
            }
            return 1;
        }
        #if defined(__AVX2__)
        if (k % 8 == 0) {
            for (s = 0; s < k; s += 8) rows_of_eight(column + 16 * s, rows + s, k);
            return 1;
        }
        #endif
        if (k % 4) return 0;
        for (t = 0; t < 16; t += 4)
            for (s = 0; s < k; s += 4) {
                const float* at = column + 16 * s + t;
                float* to = rows + t * k + s;
                transpose_4x4(at, at + 16, at + 32, at + 48, to, to + k, to + 2 * k, to + 3 * k);
            }
        return 1;
    }
    #else
    static inline int columns_of_rows(
        const uint8_t* rows, Py_ssize_t stride, Py_ssize_t n, float* column
    ) {
        return 0;
    }
    static inline int rows_of_columns(const float* column, Py_ssize_t k, float* rows) { return 0; }
    #endif
    """
    uint32_t above_float(const float* x, float bound) noexcept nogil
    uint32_t above_double(const double* x, double bound) noexcept nogil
    uint32_t at_least_float(const float* x, float bound) noexcept nogil
    uint32_t at_least_double(const double* x, double bound) noexcept nogil
    Py_ssize_t count_at_least_float(const float* x, Py_ssize_t n, float bound) noexcept nogil
    Py_ssize_t count_at_least_double(const double* x, Py_ssize_t n, double bound) noexcept nogil
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
    Py_ssize_t collect_float(
        const float* x, Py_ssize_t n, float bound, int32_t first, int32_t* index, float* value
    ) noexcept nogil
    Py_ssize_t collect_double(
        const double* x, Py_ssize_t n, double bound, int32_t first, int32_t* index, double* value
    ) noexcept nogil
    void keep_at_least_float(int32_t* index, float* x, Py_ssize_t n, float bound) noexcept nogil
    void keep_at_least_double(int32_t* index, double* x, Py_ssize_t n, double bound) noexcept nogil
    void best_of_columns_float(
        const float* column, Py_ssize_t n, int k, float* best, float* index
    ) noexcept nogil
    void best_of_columns_double(
        const double* column, Py_ssize_t n, int k, double* best, double* index
    ) noexcept nogil
    bint columns_of_rows(
        const uint8_t* rows, Py_ssize_t stride, Py_ssize_t n, float* column
    ) noexcept nogil
    bint rows_of_columns(const float* column, Py_ssize_t k, float* rows) noexcept nogil
    void list_places() noexcept nogil
    void ask_ahead(const void* x, Py_ssize_t n, Py_ssize_t ahead) noexcept nogil
    void collect_equal(
        const int32_t* x, Py_ssize_t n, int32_t y, int32_t* index, Py_ssize_t room
    ) noexcept nogil
    enum:
        FEW_TO_COMPARE
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


cdef inline bint has_nan(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return has_nan_float(x, n)
    else:
        return has_nan_double(x, n)


cdef inline void exponentials_below(
    const real* x, const real* largest, real* difference, real* e
) noexcept nogil:
    # Of LANES values: x - largest, and exponentials. From a plain expression compilers take the
    # cases apart, and compute each.
    cdef Py_ssize_t j
    if real is float:
        below_float(x, largest, difference)
    else:
        below_double(x, largest, difference)
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


cdef inline Py_ssize_t collect(
    const real* x, Py_ssize_t n, real bound, int32_t first, int32_t* index, real* value
) noexcept nogil:
    if real is float:
        return collect_float(x, n, bound, first, index, value)
    else:
        return collect_double(x, n, bound, first, index, value)


cdef inline void keep_at_least(int32_t* index, real* x, Py_ssize_t n, real bound) noexcept nogil:
    if real is float:
        keep_at_least_float(index, x, n, bound)
    else:
        keep_at_least_double(index, x, n, bound)


cdef inline void best_of_columns(
    const real* column, Py_ssize_t n, Py_ssize_t k, real* best, real* index
) noexcept nogil:
    if real is float:
        best_of_columns_float(column, n, <int>k, best, index)
    else:
        best_of_columns_double(column, n, <int>k, best, index)


list_places()
