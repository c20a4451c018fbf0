# Transposing a block: rows of LANES tokens to columns, and back.
#
# Indices are moved as the floats whose bits they would be. Elements are copied by memcpy, and by
# vectors that may alias: C lets a compiler assume that a float written is no integer read.

cdef extern from "c/transpose.h":
    bint columns_of_rows(
        const uint8_t* rows, Py_ssize_t stride, Py_ssize_t n, float* column
    ) noexcept nogil
    bint rows_of_columns(const float* column, Py_ssize_t k, float* rows) noexcept nogil


cdef inline void to_columns(
    const uint8_t* rows, Py_ssize_t stride, Py_ssize_t tokens, Py_ssize_t n, real* column
) noexcept nogil:
    # column[e * LANES + t] = value e of row t.
    cdef Py_ssize_t e, t
    if real is float:
        if tokens == LANES and columns_of_rows(rows, stride, n, column):
            return
    for t in range(tokens):
        for e in range(n):
            memcpy(&column[e * LANES + t], rows + t * stride + e * sizeof(real), sizeof(real))


cdef inline void to_rows(
    const real* column, Py_ssize_t tokens, Py_ssize_t k, real* rows
) noexcept nogil:
    # The way back: rows[t * k + s] = column[s * LANES + t].
    cdef Py_ssize_t s, t
    if k == 1:
        memcpy(rows, column, tokens * sizeof(real))
        return
    if real is float:
        if tokens == LANES and rows_of_columns(column, k, rows):
            return
    for t in range(tokens):
        for s in range(k):
            memcpy(&rows[t * k + s], &column[s * LANES + t], sizeof(real))
