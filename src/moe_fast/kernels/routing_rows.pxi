# Logits in, as rows or as columns of a block, and sums over a row.

cdef enum:
    NATIVE = 0
    BFLOAT16 = 1
    FLOAT16 = 2


cdef void load_row(
    const uint8_t* row, int encoding, Py_ssize_t n, real* x
) noexcept nogil:
    cdef Py_ssize_t i
    if encoding == BFLOAT16:
        for i in range(n):
            x[i] = from_bfloat16((<const uint16_t*>row)[i])
    elif encoding == FLOAT16:
        for i in range(n):
            x[i] = from_float16((<const uint16_t*>row)[i])
    else:
        memcpy(x, row, n * sizeof(real))


cdef bint holds_nan(const real* x, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef int32_t bad = 0
    for i in range(n):
        bad |= x[i] != x[i]
    return bad != 0


cdef real largest_of_row(const real* x, Py_ssize_t padded) noexcept nogil:
    cdef real[LANES] lane
    cdef Py_ssize_t i, j
    for j in range(LANES):
        lane[j] = x[j]
    for i in range(LANES, padded, 16):
        for j in range(LANES):
            lane[j] = x[i + j] if x[i + j] > lane[j] else lane[j]
    for j in range(1, LANES):
        lane[0] = lane[j] if lane[j] > lane[0] else lane[0]
    return lane[0]


cdef inline real sum_of_lanes(real* lane) noexcept nogil:
    cdef Py_ssize_t j
    for j in range(8):
        lane[j] += lane[j + 8]
    for j in range(4):
        lane[j] += lane[j + 4]
    return (lane[0] + lane[2]) + (lane[1] + lane[3])


cdef real sum_of_exponentials(
    const real* x, Py_ssize_t n, Py_ssize_t padded, real largest
) noexcept nogil:
    # Lane j adds up columns j, j + LANES, ...; -inf everywhere counts as n equal logits.
    cdef real[LANES] lane
    cdef Py_ssize_t i, j
    for j in range(LANES):
        lane[j] = 0
    for i in range(0, padded, 16):
        for j in range(LANES):
            lane[j] += exponential_below(x[i + j], largest)
    if largest == -INFINITY:
        return <real>n
    return sum_of_lanes(lane)
