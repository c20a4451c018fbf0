# Sorting networks, for LANES tokens at once: lane t of each column belongs to token t. Written out,
# so that what is sorted stays in registers.

cdef extern from *:
    """
    /* The larger of x[a] and x[b] to x[a], the smaller to x[b]. */
    #define EXCHANGE(a, b, S) \
        most = PART(max, S)(x[a], x[b]); \
        x[b] = PART(min, S)(x[a], x[b]); \
        x[a] = most;
    #define EXCHANGE_4(a, b, c, d, e, f, g, h, S) \
        EXCHANGE(a, b, S) EXCHANGE(c, d, S) EXCHANGE(e, f, S) EXCHANGE(g, h, S)
    /* Batcher's odd-even merge sort of x[o] to x[o + 7], and his bitonic merger of them. */
    #define SORT_8(o, S) \
        EXCHANGE_4(o, o + 1, o + 2, o + 3, o + 4, o + 5, o + 6, o + 7, S) \
        EXCHANGE_4(o, o + 2, o + 1, o + 3, o + 4, o + 6, o + 5, o + 7, S) \
        EXCHANGE(o + 1, o + 2, S) EXCHANGE(o + 5, o + 6, S) \
        EXCHANGE_4(o, o + 4, o + 1, o + 5, o + 2, o + 6, o + 3, o + 7, S) \
        EXCHANGE(o + 2, o + 4, S) EXCHANGE(o + 3, o + 5, S) \
        EXCHANGE(o + 1, o + 2, S) EXCHANGE(o + 3, o + 4, S) EXCHANGE(o + 5, o + 6, S)
    #define MERGE_8(o, S) \
        EXCHANGE_4(o, o + 4, o + 1, o + 5, o + 2, o + 6, o + 3, o + 7, S) \
        EXCHANGE_4(o, o + 2, o + 1, o + 3, o + 4, o + 6, o + 5, o + 7, S) \
        EXCHANGE_4(o, o + 1, o + 2, o + 3, o + 4, o + 5, o + 6, o + 7, S)

    #define SORT_HALVES(T, S) \
        /* Columns 0 to 7 and 8 to 15, each half by itself, largest first. */ \
        static inline void sort_halves_##T(T* column) { \
            part_##T x[16], most; \
            int i, j; \
            EACH_PART(T) { \
                for (j = 0; j < 16; j++) x[j] = PART(loadu, S)(column + 16 * j + i); \
                SORT_8(0, S) \
                SORT_8(8, S) \
                for (j = 0; j < 16; j++) PART(storeu, S)(column + 16 * j + i, x[j]); \
            } \
        }
    SORT_HALVES(float, ps)
    SORT_HALVES(double, pd)

    /* The k largest of 16 columns to the first k, largest first. */
    static inline void sort_best_double(double* column, Py_ssize_t k) {
        part_double x[16], most;
        int i, j;
        EACH_PART(double) {
            for (j = 0; j < 16; j++) x[j] = PART(loadu, pd)(column + 16 * j + i);
            SORT_8(0, pd)
            SORT_8(8, pd)
            EXCHANGE_4(0, 15, 1, 14, 2, 13, 3, 12, pd)
            EXCHANGE_4(4, 11, 5, 10, 6, 9, 7, 8, pd)
            MERGE_8(0, pd)
            for (j = 0; j < 8; j++) PART(storeu, pd)(column + 16 * j + i, x[j]);
            if (k > 8) {
                MERGE_8(8, pd)
                for (j = 8; j < 16; j++) PART(storeu, pd)(column + 16 * j + i, x[j]);
            }
        }
    }
    """
    void sort_halves_float(float* column) noexcept nogil
    void sort_halves_double(double* column) noexcept nogil
    void sort_best_double(double* column, Py_ssize_t k) noexcept nogil


cdef enum:
    # The index behind all others.
    LAST = 0x7FFFFFFF


cdef inline double key_of(float value, int32_t index) noexcept nogil:
    # A positive number, the larger the larger the value and, of equal values, the smaller the
    # index: 32 bits that are ordered as floats are, then those of the index, all turned around.
    # Between them finite floats leave the exponents of zero and infinity unused.
    cdef uint32_t bits = bits_of_float(value + <float>0.0)  # -0 becomes 0
    bits ^= <uint32_t>(<int32_t>bits >> 31) | <uint32_t>0x80000000
    return double_of_bits(<uint64_t>bits << 31 | <uint32_t>(index ^ LAST))


cdef inline float value_of(double key) noexcept nogil:
    cdef uint32_t bits = <uint32_t>(bits_of_double(key) >> 31)
    return float_of_bits(bits ^ (<uint32_t>(~<int32_t>bits >> 31) | <uint32_t>0x80000000))


cdef inline int32_t index_of(double key) noexcept nogil:
    return <int32_t>(<uint32_t>bits_of_double(key) & <uint32_t>LAST) ^ LAST


cdef void best_of_lists(
    const float* value, const int32_t* found, Py_ssize_t k, float* best, int32_t* index
) noexcept nogil:
    # Of LANES lists of LANES values, with no NaN, the k largest, largest first, and what was found
    # there, the smaller first where values are equal. Both results in columns.
    cdef double[LANES * LANES] key
    cdef float[LANES * LANES] x
    cdef float[LANES * LANES] at
    cdef Py_ssize_t i
    to_columns(<const uint8_t*>value, LANES * sizeof(float), LANES, LANES, x)
    to_columns(<const uint8_t*>found, LANES * sizeof(int32_t), LANES, LANES, at)
    for i in range(LANES * LANES):
        key[i] = key_of(x[i], (<const int32_t*>at)[i])
    sort_best_double(key, k)
    for i in range(k * LANES):
        best[i] = value_of(key[i])
        index[i] = index_of(key[i])
