# Numerically stable softmax (the largest logit subtracted first) and sigmoid over blocks.

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


cdef inline void exponentials_of_row(
    const real* x, Py_ssize_t n, real largest, real* e, real* sums
) noexcept nogil:
    # Below the largest, for x that ends with -inf up to a multiple of LANES. sums[j] adds up
    # columns j, j + LANES, ...
    cdef real[LANES] lane
    cdef real[LANES] top
    cdef Py_ssize_t i, j
    for j in range(LANES):
        lane[j] = 0
        top[j] = largest
    for i from 0 <= i < n by LANES:
        exponentials_below(x + i, top, e + i)
        add_to(lane, e + i)
    for j in range(LANES):
        sums[j] = lane[j]


cdef inline void sum_exponentials(
    const real* x, Py_ssize_t padded, real largest, real* sums
) noexcept nogil:
    # As exponentials_of_row, of which nothing else is kept; 0 where the largest is infinite.
    cdef real[LANES] lane
    cdef real[LANES] e
    cdef Py_ssize_t i, j
    for j in range(LANES):
        lane[j] = 0
    for i from 0 <= i < padded by LANES:
        for j in range(LANES):
            e[j] = exponential(x[i + j] - largest)
        add_to(lane, e)
    for j in range(LANES):
        sums[j] = lane[j]


cdef void totals_of_rows(
    const real** row, const real* largest, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead,
    real* total
) noexcept nogil:
    # Of the exponentials below the largest. While they are computed, what is read next is fetched:
    # rows so many bytes ahead.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef real[LANES * LANES] sums
    cdef Py_ssize_t t, j
    for t in range(tokens):
        prefetch_ahead(row[t], n * sizeof(real), ahead)
        sum_exponentials(row[t], padded, largest[t], sums + t * LANES)
    sum_rows(sums, tokens, total)
    for t in range(tokens):
        if total[t] == 0:
            # Infinite ones count as equal: each has the exponential 1, and all others 0.
            j = count_at_least(row[t], padded, largest[t])
            total[t] = <real>(j if j < n else n)


cdef void exponentials_of_rows(
    const real** row, const real* largest, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead,
    real* e, real* total
) noexcept nogil:
    # e[t * padded:] are those below the largest of row t, which may stand there itself.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef real[LANES * LANES] sums
    cdef Py_ssize_t t
    for t in range(tokens):
        prefetch_ahead(row[t], n * sizeof(real), ahead)
        exponentials_of_row(row[t], n, largest[t], e + t * padded, sums + t * LANES)
    sum_rows(sums, tokens, total)
    for t in range(LANES):
        # -inf everywhere counts as equal logits.
        total[t] = total[t] if largest[t] > -INFINITY else <real>n


cdef void exponentials_of_columns(
    const real* column, Py_ssize_t n, const real* largest, real* e, real* total
) noexcept nogil:
    # For each lane those below its largest, and their sum. `e` may be `column`.
    cdef real[LANES] top
    cdef real[LANES] sums
    cdef Py_ssize_t i, t
    for t in range(LANES):
        top[t] = largest[t]
        sums[t] = 0
    for i from 0 <= i < n * LANES by LANES:
        exponentials_below(column + i, top, e + i)
        add_to(sums, e + i)
    for t in range(LANES):
        total[t] = sums[t]


cdef void score_rows(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead,
    bint is_sigmoid, real* score, real* largest, real* total
) noexcept nogil:
    # score[t * padded + e]; may be where the rows are. Only softmax sets the largest and the total.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef Py_ssize_t t, i
    if not is_sigmoid:
        max_of_rows(folded, largest)
        exponentials_of_rows(row, largest, tokens, n, ahead, score, total)
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
    cdef Py_ssize_t i, t
    if is_sigmoid:
        for i in range(n * LANES):
            score[i] = sigmoid(column[i])
        return
    fold_max(column, n * LANES, LANES, largest)
    exponentials_of_columns(column, n, largest, score, total)
    for i from 0 <= i < n * LANES by LANES:
        for t in range(LANES):
            score[i + t] /= total[t]
