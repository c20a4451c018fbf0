# Which of many values: how many reach a bound, and where they stand.

cdef extern from *:
    """
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
    /* One store of 64 bytes that ends in the next cache line takes longer than two of 32. */
    static inline void store_halves(void* to, __m512d v) {
        _mm256_storeu_pd((double*)to, _mm512_extractf64x4_pd(v, 0));
        _mm256_storeu_pd((double*)to + 4, _mm512_extractf64x4_pd(v, 1));
    }
    static inline void keep_at_least_float(int32_t* index, float* x, Py_ssize_t n, float bound) {
        const __m512 least = _mm512_set1_ps(bound);
        Py_ssize_t i, count = 0;
        for (i = 0; i < n; i += 16) {
            __m512 v = _mm512_loadu_ps(x + i);
            __m512i at = _mm512_loadu_si512(index + i);
            __mmask16 bits = _mm512_cmp_ps_mask(v, least, _CMP_GE_OQ);
            store_halves(index + count,
                _mm512_castsi512_pd(_mm512_maskz_compress_epi32(bits, at)));
            store_halves(x + count, _mm512_castps_pd(_mm512_maskz_compress_ps(bits, v)));
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
    """
    Py_ssize_t count_at_least_float(const float* x, Py_ssize_t n, float bound) noexcept nogil
    Py_ssize_t count_at_least_double(const double* x, Py_ssize_t n, double bound) noexcept nogil
    Py_ssize_t collect_float(
        const float* x, Py_ssize_t n, float bound, int32_t first, int32_t* index, float* value
    ) noexcept nogil
    Py_ssize_t collect_double(
        const double* x, Py_ssize_t n, double bound, int32_t first, int32_t* index, double* value
    ) noexcept nogil
    void keep_at_least_float(int32_t* index, float* x, Py_ssize_t n, float bound) noexcept nogil
    void keep_at_least_double(int32_t* index, double* x, Py_ssize_t n, double bound) noexcept nogil
    void list_places() noexcept nogil
    void collect_equal(
        const int32_t* x, Py_ssize_t n, int32_t y, int32_t* index, Py_ssize_t room
    ) noexcept nogil
    enum:
        FEW_TO_COMPARE


cdef inline Py_ssize_t count_at_least(const real* x, Py_ssize_t n, real bound) noexcept nogil:
    if real is float:
        return count_at_least_float(x, n, bound)
    else:
        return count_at_least_double(x, n, bound)


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


list_places()
