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
    top_k_of_columns(column, n, k, best, chosen)
    for t in range(k * LANES):
        index[t] = <int32_t>chosen[t]


cdef void sort_descending(real* value, Py_ssize_t n, int32_t* order) noexcept nogil:
    # order[r] = index of the value with r others before it: the larger ones and, among equals,
    # those with a lower index. There is room up to a multiple of LANES, which becomes -inf.
    cdef Py_ssize_t i, j
    cdef uint32_t before
    cdef int rank
    for i in range(n, padded_to_lanes(n)):
        value[i] = -INFINITY
    for j in range(n):
        rank = 0
        for i from 0 <= i < n by LANES:
            if i + LANES <= j:
                before = mask_at_least(value + i, value[j])
            elif i > j:
                before = mask_above(value + i, value[j])
            else:
                before = (<uint32_t>1 << (j - i)) - 1
                before = (mask_at_least(value + i, value[j]) & before) | (
                    mask_above(value + i, value[j]) & ~before
                )
            rank += number_of_bits(before)
        order[rank] = <int32_t>j


cdef void kth_of_columns(real* column, Py_ssize_t k, real* kth) noexcept nogil:
    # The k-th largest of LANES values of each of LANES tokens, which lose their order. Of sorted
    # halves a and b it is the largest of min(a[i], b[k - 2 - i]), where a[-1] and b[-1] are +inf.
    cdef real* other = column + 8 * LANES
    cdef real[LANES] infinite
    cdef Py_ssize_t i, t
    if real is float:
        sort_halves_float(column)
    else:
        sort_halves_double(column)
    for t in range(LANES):
        kth[t] = -INFINITY
        infinite[t] = INFINITY
    for i in range(k - 1 - 8 if k > 8 else -1, k if k < 8 else 8):
        max_with_min(
            kth,
            column + i * LANES if i >= 0 else infinite,
            other + (k - 2 - i) * LANES if k - 2 - i >= 0 else infinite,
        )


cdef void lower_bounds(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t padded, Py_ssize_t k,
    real* bound, real* work, int32_t* order
) noexcept nogil:
    # Fold each row into at least k lanes, each keeping its largest: these are values of the row at
    # different places, so the k-th largest of them is at most the k-th largest of the row.
    cdef Py_ssize_t lanes = padded_to_lanes(k)
    cdef real[LANES * LANES] column
    cdef Py_ssize_t t, j
    if 2 * lanes > padded:
        for t in range(tokens):
            bound[t] = -INFINITY
    elif lanes == LANES and tokens > 1:
        to_columns(<const uint8_t*>folded, LANES * sizeof(real), LANES, LANES, column)
        kth_of_columns(column, k, bound)
    else:
        for t in range(tokens):
            for j from 0 <= j < lanes by LANES:
                fold_max(row[t] + j, padded - j, lanes, work + j)
            sort_descending(work, lanes, order)
            bound[t] = work[order[k - 1]]


cdef Py_ssize_t survivors(
    const real* x, Py_ssize_t n, Py_ssize_t k, real bound, int32_t* found, real* value
) noexcept nogil:
    # Indices and values from `bound` up, ascending: at least k, and few. Where many equal it,
    # as many of them as are needed.
    cdef Py_ssize_t i, wanted
    cdef Py_ssize_t larger = 0
    cdef Py_ssize_t count = collect_at_least(x, padded_to_lanes(n), bound, 0, found, value)
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


cdef inline int32_t first_at_least(const real* x, Py_ssize_t padded, real bound) noexcept nogil:
    # Where the first value from `bound` up stands; there is one. All are looked at, from the end,
    # as nobody can foresee where a loop may stop.
    cdef Py_ssize_t i, j, end
    cdef uint64_t bits
    cdef int32_t first = 0
    for i in range((padded - 1) // 64 * 64, -1, -64):
        bits = 0
        end = i + 64 if i + 64 < padded else padded
        for j from i <= j < end by LANES:
            bits |= <uint64_t>mask_at_least(x + j, bound) << (j - i)
        first = <int32_t>i + lowest_bit(bits) if bits else first
    return first


cdef void choose_one_by_one(
    const real** row, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t k, const real* bound,
    int32_t* index, real* chosen, real* value, int32_t* found, int32_t* order
) noexcept nogil:
    cdef Py_ssize_t t, s, count
    for t in range(tokens):
        count = survivors(row[t], n, k, bound[t], found, value)
        sort_descending(value, count, order)
        for s in range(k):
            index[t * k + s] = found[order[s]]
            chosen[s * LANES + t] = value[order[s]]


cdef void shorten(
    int32_t* found, float* value, Py_ssize_t count, Py_ssize_t k, int32_t* order
) noexcept nogil:
    # Bring the k <= FEW best of a list to its beginning, best first.
    cdef int32_t[FEW] best_found
    cdef float[FEW] best_value
    cdef Py_ssize_t s
    sort_descending(value, count, order)
    for s in range(k):
        best_found[s] = found[order[s]]
        best_value[s] = value[order[s]]
    memcpy(found, best_found, k * sizeof(int32_t))
    memcpy(value, best_value, k * sizeof(float))


cdef void choose_side_by_side(
    const float** row, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead, Py_ssize_t k,
    const float* bound, int32_t* index, float* chosen, float* value, int32_t* found, int32_t* order
) noexcept nogil:
    # k <= FEW.
    cdef int32_t[FEW * LANES] column
    cdef Py_ssize_t t, j, count
    # A list longer than LANES runs into the next one's place, and is needed no more by then.
    for t in range(LANES):
        if t < tokens:
            prefetch_ahead(row[t], n * sizeof(float), ahead)
            count = survivors(row[t], n, k, bound[t], found + t * LANES, value + t * LANES)
        else:
            count = 0
        if count > LANES:
            shorten(found + t * LANES, value + t * LANES, count, k, order)
            count = k
        for j in range(t * LANES + count, t * LANES + count + LANES):
            value[j] = -INFINITY
            found[j] = LAST
    best_of_lists(value, found, k, chosen, column)
    to_rows(<const float*>column, tokens, k, <float*>index)


cdef void choose_in_rows(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t padded,
    Py_ssize_t ahead, Py_ssize_t k,
    int32_t* index, real* chosen, real* value, int32_t* found, int32_t* order
) noexcept nogil:
    # index[t * k + s] is the s-th largest of row[t][0:n], chosen[s * LANES + t] its value; the rest
    # of a row up to `padded` is -inf. folded[t * LANES + j] is the largest of row t's values j,
    # j + LANES, ... What is read next is fetched meanwhile: rows so many bytes ahead. For k = 1 the
    # values are in `chosen` already.
    cdef real[LANES] bound
    cdef Py_ssize_t t
    if k == 1:
        for t in range(tokens):
            index[t] = first_at_least(row[t], padded, chosen[t])
        return
    lower_bounds(row, folded, tokens, padded, k, bound, value, order)
    # One token alone takes less than a block of which it is one.
    if real is float and k <= FEW and tokens > 1:
        choose_side_by_side(
            row, tokens, n, ahead, k, bound, index, chosen, value, found, order
        )
    else:
        choose_one_by_one(row, tokens, n, k, bound, index, chosen, value, found, order)


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
    real* x, const Rule* rule, int32_t* expert, int32_t* order, real* work
) noexcept nogil:
    # Move the values of the topk_group best groups to the front, and say which experts they are.
    cdef Py_ssize_t size = rule.num_experts // rule.n_group
    cdef Py_ssize_t padded = padded_to_lanes(rule.n_group)
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t g, i
    for g in range(rule.n_group):
        work[g] = sum_of_best(x + g * size, size, rule.experts_per_group_score, work + padded)
    sort_descending(work, rule.n_group, order)
    for g in range(rule.n_group):
        work[order[g]] = 1 if g < rule.topk_group else 0
    for g in range(rule.n_group):
        if work[g] == 1:
            for i in range(size):
                x[count] = x[g * size + i]
                expert[count] = <int32_t>(g * size + i)
                count += 1
    for i in range(count, padded_to_lanes(count)):
        x[i] = -INFINITY
