# Sorting networks, for LANES tokens at once: lane t of each column belongs to token t. Written out,
# so that what is sorted stays in registers.

cdef extern from "c/sorting_network.h":
    void sort_halves_float(float* column) noexcept nogil
    void sort_halves_double(double* column) noexcept nogil
    void sort_top_k_double(double* column, Py_ssize_t k) noexcept nogil


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
    sort_top_k_double(key, k)
    for i in range(k * LANES):
        best[i] = value_of(key[i])
        index[i] = index_of(key[i])
