# The k largest, ties to the lower index.

cdef enum:
    # The most experts a token that are kept in order one by one.
    FEW = 16


cdef void choose_in_columns(
    const real* column, Py_ssize_t n, Py_ssize_t k, int32_t* index, real* best
) noexcept nogil:
    # LANES tokens at once: column[e * LANES + t] is the value of expert e for token t. k <= FEW.
    cdef real[FEW * LANES] chosen
    cdef Py_ssize_t t
    best_of_columns(column, n, k, best, chosen)
    for t in range(k * LANES):
        index[t] = <int32_t>chosen[t]


cdef void sort_descending(const real* value, Py_ssize_t n, int32_t* order) noexcept nogil:
    # order[r] = index of the value with r others before it: the larger ones and, among equals,
    # those with a lower index. Readable up to a multiple of LANES, where it is -inf.
    cdef Py_ssize_t i, j
    cdef uint32_t before
    cdef int rank
    for j in range(n):
        rank = 0
        for i in range(0, n, 16):
            if i + LANES <= j:
                before = at_least(value + i, value[j])
            elif i > j:
                before = above(value + i, value[j])
            else:
                before = (<uint32_t>1 << (j - i)) - 1
                before = (at_least(value + i, value[j]) & before) | (
                    above(value + i, value[j]) & ~before
                )
            rank += number_of_bits(before)
        order[rank] = <int32_t>j


cdef extern from *:
    """
    /* Batcher's odd-even merge sort of eight: which two to put in order, one after another. */
    static const unsigned char NETWORK[38] = {
        0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 1, 3, 4, 6, 5, 7, 1, 2, 5, 6,
        0, 4, 1, 5, 2, 6, 3, 7, 2, 4, 3, 5, 1, 2, 3, 4, 5, 6
    };
    """
    const unsigned char[38] NETWORK


cdef void kth_of_columns(real* column, Py_ssize_t k, real* kth) noexcept nogil:
    # The k-th largest of LANES values of each of LANES tokens, which lose their order. Of sorted
    # halves a and b it is the largest of min(a[i], b[k - 2 - i]), where a[-1] and b[-1] are +inf.
    cdef real* other = column + 8 * LANES
    cdef real[LANES] infinite
    cdef Py_ssize_t i, t
    for i in range(0, 38, 2):
        exchange(column + NETWORK[i] * LANES, column + NETWORK[i + 1] * LANES)
        exchange(other + NETWORK[i] * LANES, other + NETWORK[i + 1] * LANES)
    for t in range(LANES):
        kth[t] = -INFINITY
        infinite[t] = INFINITY
    for i in range(k - 1 - 8 if k > 8 else -1, k if k < 8 else 8):
        raise_to(
            kth,
            column + i * LANES if i >= 0 else infinite,
            other + (k - 2 - i) * LANES if k - 2 - i >= 0 else infinite,
        )


cdef void fold_row(const real* x, Py_ssize_t padded, Py_ssize_t lanes, real* folded) noexcept nogil:
    # The largest of columns j, j + lanes, j + 2 lanes, ... in folded[j].
    cdef Py_ssize_t j
    for j in range(0, lanes, 16):
        fold(x + j, padded - j, lanes, folded + j)


cdef void lower_bounds(
    const real** row, Py_ssize_t tokens, Py_ssize_t padded, Py_ssize_t k,
    real* bound, real* folded, int32_t* order
) noexcept nogil:
    # Fold each row into at least k lanes, each keeping its largest: these are values of the row at
    # different places, so the k-th largest of them is at most the k-th largest of the row.
    cdef Py_ssize_t lanes = padded_to_lanes(k)
    cdef real[LANES * LANES] column
    cdef Py_ssize_t t
    if 2 * lanes > padded:
        for t in range(tokens):
            bound[t] = -INFINITY
    elif lanes == LANES and tokens > 1:
        for t in range(LANES):
            fold(row[t if t < tokens else 0], padded, LANES, folded + t * LANES)
        to_columns(<const uint8_t*>folded, LANES * sizeof(real), LANES, LANES, column)
        kth_of_columns(column, k, bound)
    else:
        for t in range(tokens):
            fold_row(row[t], padded, lanes, folded)
            sort_descending(folded, lanes, order)
            bound[t] = folded[order[k - 1]]


cdef Py_ssize_t survivors(
    const real* x, Py_ssize_t n, Py_ssize_t k, real bound, int32_t* found, real* value
) noexcept nogil:
    # Indices and values from `bound` up, ascending: at least k, and few. Where many equal it,
    # as many of them as are needed.
    cdef Py_ssize_t i, wanted
    cdef Py_ssize_t larger = 0
    cdef Py_ssize_t count = collect(x, padded_to_lanes(n), bound, 0, found, value)
    if bound == -INFINITY:
        # What pads the row is among them, at the end.
        return count if count < n else n
    if count <= 2 * k + LANES:
        return count
    for i in range(count):
        larger += value[i] > bound
    if larger >= k:
        return count
    wanted = k - larger
    larger = 0
    for i in range(count):
        if value[i] == bound:
            if wanted == 0:
                continue
            wanted -= 1
        found[larger] = found[i]
        value[larger] = value[i]
        larger += 1
    return larger


cdef inline int32_t first_at_least(const real* x, real bound) noexcept nogil:
    # Where the first value from `bound` up stands; there is one.
    cdef int32_t i = 0
    cdef uint32_t bits = at_least(x, bound)
    while bits == 0:
        i += LANES
        bits = at_least(x + i, bound)
    return i + lowest_bit(bits)


cdef void choose_in_rows(
    const real** row, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t padded, Py_ssize_t k,
    const real* largest, int32_t* index, real* value, int32_t* found, int32_t* order
) noexcept nogil:
    # index[t * k + s] is the s-th largest of row[t][0:n]; the rest up to `padded` is -inf.
    # `largest` holds that of each row, or is NULL.
    cdef real[LANES] bound
    cdef Py_ssize_t[LANES] count
    cdef Py_ssize_t t, s, j
    if k == 1:
        for t in range(tokens):
            index[t] = first_at_least(
                row[t], largest[t] if largest else largest_of_row(row[t], padded)
            )
        return
    lower_bounds(row, tokens, padded, k, bound, value, order)
    # All lists first, then their order: what is read while it is still being written has to wait.
    # A list longer than LANES runs into the next one's place, and is needed no more by then.
    for t in range(tokens):
        count[t] = survivors(row[t], n, k, bound[t], found, value)
        for j in range(LANES):
            value[count[t] + j] = -INFINITY
        if count[t] > LANES:
            sort_descending(value, count[t], order)
            for s in range(k):
                index[t * k + s] = found[order[s]]
        found += LANES
        value += LANES
    found -= tokens * LANES
    value -= tokens * LANES
    for t in range(tokens):
        if count[t] <= LANES:
            sort_few(value, <int>count[t], order)
            for s in range(k):
                index[t * k + s] = found[order[s]]
        found += LANES
        value += LANES


cdef real sum_of_best(const real* x, Py_ssize_t n, Py_ssize_t k, real* best) noexcept nogil:
    # The k largest, added largest first.
    cdef Py_ssize_t i, s
    cdef real value, passed, total
    for s in range(k):
        best[s] = -INFINITY
    for i in range(n):
        value = x[i]
        for s in range(k):
            passed = best[s]
            best[s] = value if value > passed else passed
            value = passed if value > passed else value
    total = best[0]
    for s in range(1, k):
        total += best[s]
    return total


cdef void keep_best_groups(
    const real* x, const Rule* rule, real* kept, int32_t* expert, int32_t* order, real* work
) noexcept nogil:
    # Copy the values of the topk_group best groups to `kept`, and which experts they are.
    cdef Py_ssize_t size = rule.num_experts // rule.n_group
    cdef Py_ssize_t padded = padded_to_lanes(rule.n_group)
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t g, i
    for g in range(rule.n_group):
        work[g] = sum_of_best(x + g * size, size, rule.experts_per_group_score, work + padded)
    for g in range(rule.n_group, padded):
        work[g] = -INFINITY
    sort_descending(work, rule.n_group, order)
    for g in range(rule.n_group):
        work[order[g]] = 1 if g < rule.topk_group else 0
    for g in range(rule.n_group):
        if work[g] == 1:
            for i in range(size):
                kept[count] = x[g * size + i]
                expert[count] = <int32_t>(g * size + i)
                count += 1
    for i in range(count, padded_to_lanes(count)):
        kept[i] = -INFINITY
