# Batcher's sorting networks, for LANES tokens at once: lane t of each column belongs to token t.

cdef extern from "c/sorting_network.h":
    void sort_halves_float(float* column) noexcept nogil
    void sort_halves_double(double* column) noexcept nogil
    void sort_top_k_double(double* column, Py_ssize_t k) noexcept nogil


cdef enum:
    # Larger than every index.
    LAST_INDEX = 0x7FFFFFFF


cdef inline double pack_key(float value, int32_t index) noexcept nogil:
    # A value and its index as one positive double. A larger value gives a larger key; of equal
    # values, the smaller index does. The upper bits are the value's, in an order that integers
    # share with floats; the lower are those of the index, inverted. The key is neither zero,
    # infinite nor NaN, as finite values leave those exponents unused.
    cdef uint32_t bits = bits_of_float(value + <float>0.0)  # -0 becomes 0
    bits ^= <uint32_t>(<int32_t>bits >> 31) | <uint32_t>0x80000000
    return double_of_bits(<uint64_t>bits << 31 | <uint32_t>(index ^ LAST_INDEX))


cdef inline float unpack_value(double key) noexcept nogil:
    cdef uint32_t bits = <uint32_t>(bits_of_double(key) >> 31)
    return float_of_bits(bits ^ (<uint32_t>(~<int32_t>bits >> 31) | <uint32_t>0x80000000))


cdef inline int32_t unpack_index(double key) noexcept nogil:
    return <int32_t>(<uint32_t>bits_of_double(key) & <uint32_t>LAST_INDEX) ^ LAST_INDEX


cdef void top_k_of_lists(
    const float* value, const int32_t* found, Py_ssize_t k, float* best, int32_t* index
) noexcept nogil:
    # The k largest values of each of LANES lists of LANES values, largest first, and the indices
    # found with them; ties to the smaller index. No value is NaN. Both results stand in columns.
    cdef double[LANES * LANES] key
    cdef float[LANES * LANES] x
    cdef float[LANES * LANES] at
    cdef Py_ssize_t i
    to_columns(<const uint8_t*>value, LANES * sizeof(float), LANES, LANES, x)
    to_columns(<const uint8_t*>found, LANES * sizeof(int32_t), LANES, LANES, at)
    for i in range(LANES * LANES):
        key[i] = pack_key(x[i], <int32_t>bits_of_float(at[i]))
    sort_top_k_double(key, k)
    for i in range(k * LANES):
        best[i] = unpack_value(key[i])
        index[i] = unpack_index(key[i])
