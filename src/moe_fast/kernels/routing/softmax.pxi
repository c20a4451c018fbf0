# Numerically stable softmax (the largest logit is subtracted first) and sigmoid over blocks.

cdef real max_of_row(const real* x, Py_ssize_t padded) noexcept nogil:
    cdef real[LANES] lane
    cdef Py_ssize_t j
    fold_max(x, padded, LANES, lane)
    for j in range(8):
        lane[j] = lane[j + 8] if lane[j + 8] > lane[j] else lane[j]
    for j in range(4):
        lane[j] = lane[j + 4] if lane[j + 4] > lane[j] else lane[j]
    for j in range(1, 4):
        lane[0] = lane[j] if lane[j] > lane[0] else lane[0]
    return lane[0]


cdef void max_of_rows(const real* folded, real* largest) noexcept nogil:
    # Of LANES rows of LANES values.
    cdef real[LANES * LANES] column
    to_columns(<const uint8_t*>folded, LANES * sizeof(real), LANES, LANES, column)
    fold_max(column, LANES * LANES, LANES, largest)


cdef inline real sum_lanes(const real* lane) noexcept nogil:
    cdef real[8] half
    cdef Py_ssize_t j
    for j in range(8):
        half[j] = lane[j] + lane[j + 8]
    for j in range(4):
        half[j] += half[j + 4]
    return (half[0] + half[2]) + (half[1] + half[3])


cdef void sum_rows(real* sums, Py_ssize_t tokens, real* total) noexcept nogil:
    # As sum_lanes of each of LANES rows; those without a token become 0.
    cdef real[LANES * LANES] column
    cdef Py_ssize_t j, t
    for t in range(tokens, LANES):
        for j in range(LANES):
            sums[t * LANES + j] = 0
    to_columns(<const uint8_t*>sums, LANES * sizeof(real), LANES, LANES, column)
    for j in range(8):
        add_to(column + j * LANES, column + (j + 8) * LANES)
    for j in range(4):
        add_to(column + j * LANES, column + (j + 4) * LANES)
    for j in range(2):
        add_to(column + j * LANES, column + (j + 2) * LANES)
    for t in range(LANES):
        total[t] = column[t] + column[LANES + t]


cdef inline void sum_exponentials(
    const real* x, Py_ssize_t size, const real* largest, real* e, real* total
) noexcept nogil:
    # In each lane, over x[lane], x[lane + LANES], ... before `size`: the exponentials
    # e^(x - largest) and their sum. `e` may be x.
    #
    # In an array of their own: in memory that might overlap, sums would not stay in registers.
    cdef real[LANES] sums
    cdef Py_ssize_t i, j
    for j in range(LANES):
        sums[j] = 0
    for i from 0 <= i < size by LANES:
        exponentials_below(x + i, largest, e + i)
        add_to(sums, e + i)
    for j in range(LANES):
        total[j] = sums[j]


cdef void sum_exponentials_of_rows(
    const real** row, const real* largest, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead,
    real* e, real* total
) noexcept nogil:
    # For each row the exponentials e^(x - largest) and their sum. e[t * padded:] may be row t. Rows
    # `ahead` bytes further on are fetched meanwhile.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef real[LANES * LANES] sums
    cdef real[LANES] top
    cdef Py_ssize_t t, j
    for t in range(tokens):
        prefetch_ahead(row[t], n * sizeof(real), ahead)
        for j in range(LANES):
            top[j] = largest[t]
        sum_exponentials(row[t], padded, top, e + t * padded, sums + t * LANES)
    sum_rows(sums, tokens, total)
    for t in range(LANES):
        # Logits that are all -inf count as equal, without the padding of the row.
        total[t] = total[t] if largest[t] > -INFINITY else <real>n


cdef void score_rows(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead,
    bint is_sigmoid, real* score, real* largest, real* total
) noexcept nogil:
    # score[t * padded + e], which may be the rows. Only softmax sets the largest and the total.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef Py_ssize_t t, i
    if not is_sigmoid:
        max_of_rows(folded, largest)
        sum_exponentials_of_rows(row, largest, tokens, n, ahead, score, total)
    for t in range(tokens):
        if is_sigmoid:
            prefetch_ahead(row[t], n * sizeof(real), ahead)
            for i in range(padded):
                score[t * padded + i] = sigmoid(row[t][i])
        else:
            for i in range(padded):
                score[t * padded + i] /= total[t]


cdef void score_columns(
    const real* column, Py_ssize_t n, bint is_sigmoid, real* largest, real* total, real* score
) noexcept nogil:
    # `score` may be `column`. Only softmax sets the largest and the total.
    cdef Py_ssize_t i
    if is_sigmoid:
        for i in range(n * LANES):
            score[i] = sigmoid(column[i])
        return
    fold_max(column, n * LANES, LANES, largest)
    sum_exponentials(column, n * LANES, largest, score, total)
    for i from 0 <= i < n * LANES by LANES:
        divide_by(score + i, total)
