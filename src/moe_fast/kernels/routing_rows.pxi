# Logits in, as rows or as columns, and the scores of all experts.

cdef enum:
    NATIVE = 0
    BFLOAT16 = 1
    FLOAT16 = 2


cdef inline Py_ssize_t padded_to_lanes(Py_ssize_t n) noexcept nogil:
    return (n + LANES - 1) // LANES * LANES


cdef inline bint in_columns(Py_ssize_t n) noexcept nogil:
    return n < 2 * LANES


cdef void load_row(const uint8_t* row, int encoding, Py_ssize_t n, real* x) noexcept nogil:
    # x[0:n], and -inf up to a multiple of LANES.
    cdef Py_ssize_t i
    if encoding == BFLOAT16:
        for i in range(n):
            x[i] = from_bfloat16((<const uint16_t*>row)[i])
    elif encoding == FLOAT16:
        for i in range(n):
            x[i] = from_float16((<const uint16_t*>row)[i])
    else:
        memcpy(x, row, n * sizeof(real))
    for i in range(n, padded_to_lanes(n)):
        x[i] = -INFINITY


cdef inline const real* readable_row(
    const uint8_t* row, int encoding, Py_ssize_t n, real* room
) noexcept nogil:
    # The row where it stands if it can be read as it is, or a copy.
    if encoding == NATIVE and n % LANES == 0:
        return <const real*>row
    load_row(row, encoding, n, room)
    return room


cdef Py_ssize_t first_nan(const real** row, Py_ssize_t tokens, Py_ssize_t padded) noexcept nogil:
    # The first of the rows with a NaN, or -1.
    cdef Py_ssize_t t
    for t in range(tokens):
        if has_nan(row[t], padded):
            return t
    return -1


cdef real largest_of_row(const real* x, Py_ssize_t padded) noexcept nogil:
    cdef real[LANES] lane
    cdef Py_ssize_t j
    fold(x, padded, LANES, lane)
    for j in range(8):
        lane[j] = lane[j + 8] if lane[j + 8] > lane[j] else lane[j]
    for j in range(4):
        lane[j] = lane[j + 4] if lane[j + 4] > lane[j] else lane[j]
    for j in range(1, 4):
        lane[0] = lane[j] if lane[j] > lane[0] else lane[0]
    return lane[0]


cdef inline real sum_of_lanes(const real* lane) noexcept nogil:
    cdef real[8] half
    cdef Py_ssize_t j
    for j in range(8):
        half[j] = lane[j] + lane[j + 8]
    for j in range(4):
        half[j] += half[j + 4]
    return (half[0] + half[2]) + (half[1] + half[3])


cdef inline real exponentials_of_row(
    const real* x, Py_ssize_t n, real largest, real* e
) noexcept nogil:
    # Below the largest, for x that ends with -inf up to a multiple of LANES. Returns their sum, in
    # which lane j adds up columns j, j + LANES, ...; -inf everywhere counts as n equal logits.
    cdef real[LANES] lane
    cdef real[LANES] top
    cdef real[LANES] difference
    cdef Py_ssize_t i, j
    for j in range(LANES):
        lane[j] = 0
        top[j] = largest
    for i in range(0, n, 16):
        exponentials_below(x + i, top, difference, e + i)
        add_to(lane, e + i)
    return sum_of_lanes(lane) if largest > -INFINITY else <real>n


cdef void scores_of_row(
    const real* x, Py_ssize_t n, bint is_sigmoid, real* largest, real* total, real* score
) noexcept nogil:
    # Up to a multiple of LANES, as x. Only softmax sets the largest and the total.
    cdef Py_ssize_t padded = padded_to_lanes(n)
    cdef Py_ssize_t i
    cdef real top, divisor  # of our own: `total` might lie among the scores
    if is_sigmoid:
        for i in range(padded):
            score[i] = sigmoid(x[i])
        return
    top = largest_of_row(x, padded)
    divisor = exponentials_of_row(x, n, top, score)
    for i in range(padded):
        score[i] /= divisor
    largest[0] = top
    total[0] = divisor


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
            column[e * LANES + t] = (<const real*>(rows + t * stride))[e]


cdef inline void to_rows(
    const real* column, Py_ssize_t tokens, Py_ssize_t k, real* rows
) noexcept nogil:
    # And back: rows[t * k + s] = column[s * LANES + t].
    cdef Py_ssize_t s, t
    if k == 1:
        memcpy(rows, column, tokens * sizeof(real))
        return
    if real is float:
        if tokens == LANES and rows_of_columns(column, k, rows):
            return
    for t in range(tokens):
        for s in range(k):
            rows[t * k + s] = column[s * LANES + t]


cdef Py_ssize_t load_columns(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    Py_ssize_t n, real* column, real* row
) noexcept nogil:
    # column[e * LANES + t]; lanes without a token hold 0. Returns the first with a NaN, or -1.
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
        # Some token's; now the first token that has one.
        for t in range(tokens):
            for e in range(n):
                if column[e * LANES + t] != column[e * LANES + t]:
                    return t
    return -1


cdef void exponentials_of_columns(
    const real* column, Py_ssize_t n, real* largest, real* total, real* e
) noexcept nogil:
    # For each lane those below its largest, and their sum. `e` may be `column`.
    cdef real[LANES] top
    cdef real[LANES] sums
    cdef real[LANES] difference
    cdef Py_ssize_t i, t
    fold(column, n * LANES, LANES, top)
    for t in range(LANES):
        sums[t] = 0
    for i in range(0, n * LANES, 16):
        exponentials_below(column + i, top, difference, e + i)
        add_to(sums, e + i)
    for t in range(LANES):
        largest[t] = top[t]
        total[t] = sums[t]


cdef void scores_of_columns(
    const real* column, Py_ssize_t n, bint is_sigmoid, real* largest, real* total, real* score
) noexcept nogil:
    # `score` may be `column`. Only softmax sets the largest and the total.
    cdef Py_ssize_t i, t
    if is_sigmoid:
        for i in range(n * LANES):
            score[i] = sigmoid(column[i])
        return
    exponentials_of_columns(column, n, largest, total, score)
    for i in range(0, n * LANES, 16):
        for t in range(LANES):
            score[i + t] /= total[t]
