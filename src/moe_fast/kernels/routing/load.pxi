# Logits of a block as floats, in rows or in columns, and the first token with a NaN.

cdef enum:
    # How logits are encoded: as the floats that a kernel computes with, or as 16-bit floats.
    NATIVE = 0
    BFLOAT16 = 1
    FLOAT16 = 2


cdef void load_row(const uint8_t* row, int encoding, Py_ssize_t n, real* x) noexcept nogil:
    # x[0:n], and -inf up to a multiple of LANES.
    cdef Py_ssize_t i
    if encoding == BFLOAT16:
        for i in range(n):
            x[i] = widen_bfloat16((<const uint16_t*>row)[i])
    elif encoding == FLOAT16:
        for i in range(n):
            x[i] = widen_float16((<const uint16_t*>row)[i])
    else:
        memcpy(x, row, n * sizeof(real))
    for i in range(n, round_up_to_lanes(n)):
        x[i] = -INFINITY


cdef inline const real* view_or_load_row(
    const uint8_t* row, int encoding, Py_ssize_t n, real* room
) noexcept nogil:
    # The row itself if it needs neither conversion nor padding, or a copy in `room`.
    if encoding == NATIVE and n % LANES == 0:
        return <const real*>row
    load_row(row, encoding, n, room)
    return room


cdef Py_ssize_t load_rows(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens, Py_ssize_t n,
    const real** row, real* room, real* folded
) noexcept nogil:
    # row[t] points to a padded row; folded[t * LANES + j] is the largest of its values j,
    # j + LANES, ... There is room for LANES rows. Returns the first with a NaN, or -1.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef Py_ssize_t t, j
    for t in range(tokens):
        row[t] = view_or_load_row(logits + t * stride, encoding, n, room + t * padded)
        if fold_max_checked(row[t], padded, folded + t * LANES):
            return t
    for t in range(tokens, LANES):
        for j in range(LANES):
            folded[t * LANES + j] = 0
    return -1


cdef inline Py_ssize_t prefetch_distance(
    const real* row, const real* room, Py_ssize_t stride
) noexcept nogil:
    # In bytes, from a row to the same one of the next block; 0 if rows are copied to `room`.
    return 0 if row == room else LANES * stride


cdef Py_ssize_t load_columns(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    Py_ssize_t n, real* column, real* row
) noexcept nogil:
    # Lanes without a token hold 0. Returns the first token with a NaN, or -1.
    cdef Py_ssize_t e, t
    if encoding == NATIVE:
        to_columns(logits, stride, tokens, n, column)
    else:
        for t in range(tokens):
            load_row(logits + t * stride, encoding, n, row)
            for e in range(n):
                column[e * LANES + t] = row[e]
    for t in range(tokens, LANES):
        for e in range(n):
            column[e * LANES + t] = 0
    if has_nan(column, n * LANES):
        # Some token has one: find the first that does.
        for t in range(tokens):
            for e in range(n):
                if column[e * LANES + t] != column[e * LANES + t]:
                    return t
    return -1
