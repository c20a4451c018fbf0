# Top-k selection, ties to the lower index: insertion for tokens in columns; for rows, a lower bound
# of the k-th largest, then a sort of the few values that reach it.

cdef enum:
    # The largest k for which the k best are kept sorted, and the most that the network sorts.
    SMALL_K = 16


cdef void select_in_columns(
    const real* column, Py_ssize_t n, Py_ssize_t k, int32_t* index, real* best
) noexcept nogil:
    # k <= SMALL_K. Both results stand in columns.
    cdef real[SMALL_K * LANES] chosen
    cdef Py_ssize_t t
    top_k_of_columns(column, n, k, best, chosen)
    for t in range(k * LANES):
        index[t] = <int32_t>chosen[t]


cdef void rank_sort(real* value, Py_ssize_t n, int32_t* order) noexcept nogil:
    # Rank sort: order[r] is the index of the value with r others before it, the larger ones and, of
    # equal ones, those with a lower index. The room up to a multiple of LANES becomes -inf.
    cdef Py_ssize_t i, j
    cdef uint32_t before
    cdef int rank
    for i in range(n, round_up_to_lanes(n)):
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


cdef void kth_largest_of_columns(real* column, Py_ssize_t k, real* kth) noexcept nogil:
    # The k-th largest of LANES values of each of LANES tokens; sorts the halves of the column. Of
    # sorted halves a and b it is the largest of min(a[i], b[k - 2 - i]), where a[-1] and b[-1] are
    # +inf.
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


cdef void bound_kth_largest(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t padded, Py_ssize_t k,
    real* bound, real* work, int32_t* order
) noexcept nogil:
    # Fold each row into at least k lanes, each with the maximum of its values. These are values of
    # the row at different places, so their k-th largest is at most the k-th largest of the row.
    cdef Py_ssize_t lanes = round_up_to_lanes(k)
    cdef real[LANES * LANES] column
    cdef Py_ssize_t t, j
    if 2 * lanes > padded:
        for t in range(tokens):
            bound[t] = -INFINITY
    elif lanes == LANES and tokens > 1:
        to_columns(<const uint8_t*>folded, LANES * sizeof(real), LANES, LANES, column)
        kth_largest_of_columns(column, k, bound)
    else:
        for t in range(tokens):
            for j from 0 <= j < lanes by LANES:
                fold_max(row[t] + j, padded - j, lanes, work + j)
            rank_sort(work, lanes, order)
            bound[t] = work[order[k - 1]]


cdef Py_ssize_t find_candidates(
    const real* x, Py_ssize_t n, Py_ssize_t k, real bound, int32_t* found, real* value
) noexcept nogil:
    # Indices and values from `bound` up, indices ascending: at least k of them. If many equal the
    # bound, only as many of those as are needed.
    cdef Py_ssize_t i, wanted
    cdef Py_ssize_t larger = 0
    cdef Py_ssize_t count = collect_at_least(x, round_up_to_lanes(n), bound, 0, found, value)
    if bound == -INFINITY:
        # The padding of the row is among them, at the end.
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


cdef inline int32_t find_first_at_least(
    const real* x, Py_ssize_t padded, real bound
) noexcept nogil:
    # The index of the first value from `bound` up; there is one. Goes through all, from the end: a
    # loop that stops early would cost a mispredicted branch for each token.
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


cdef void select_each_token(
    const real** row, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t k, const real* bound,
    int32_t* index, real* chosen, real* value, int32_t* found, int32_t* order
) noexcept nogil:
    cdef Py_ssize_t t, s, count
    for t in range(tokens):
        count = find_candidates(row[t], n, k, bound[t], found, value)
        rank_sort(value, count, order)
        for s in range(k):
            index[t * k + s] = found[order[s]]
            chosen[s * LANES + t] = value[order[s]]


cdef void keep_top_k(
    int32_t* found, float* value, Py_ssize_t count, Py_ssize_t k, int32_t* order
) noexcept nogil:
    # Bring the k <= SMALL_K largest of a list to its beginning, largest first.
    cdef int32_t[SMALL_K] best_found
    cdef float[SMALL_K] best_value
    cdef Py_ssize_t s
    rank_sort(value, count, order)
    for s in range(k):
        best_found[s] = found[order[s]]
        best_value[s] = value[order[s]]
    memcpy(found, best_found, k * sizeof(int32_t))
    memcpy(value, best_value, k * sizeof(float))


cdef void select_block(
    const float** row, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead, Py_ssize_t k,
    const float* bound, int32_t* index, float* chosen, float* value, int32_t* found, int32_t* order
) noexcept nogil:
    # A whole block by one sorting network; k <= SMALL_K.
    cdef int32_t[SMALL_K * LANES] column
    cdef Py_ssize_t t, j, count
    # A list longer than LANES runs into the place of the next, which is written after it.
    for t in range(LANES):
        if t < tokens:
            prefetch_ahead(row[t], n * sizeof(float), ahead)
            count = find_candidates(row[t], n, k, bound[t], found + t * LANES, value + t * LANES)
        else:
            count = 0
        if count > LANES:
            keep_top_k(found + t * LANES, value + t * LANES, count, k, order)
            count = k
        for j in range(t * LANES + count, t * LANES + count + LANES):
            value[j] = -INFINITY
            found[j] = LAST_INDEX
    top_k_of_lists(value, found, k, chosen, column)
    to_rows(<const float*>column, tokens, k, <float*>index)


cdef void select_in_rows(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t padded,
    Py_ssize_t ahead, Py_ssize_t k,
    int32_t* index, real* chosen, real* value, int32_t* found, int32_t* order
) noexcept nogil:
    # index[t * k + s] is the index of the s-th largest of row[t][0:n], chosen[s * LANES + t] its
    # value; the rest of a row up to `padded` is -inf. folded[t * LANES + j] is the largest of row
    # t's values j, j + LANES, ... Rows `ahead` bytes further on are fetched meanwhile. For k = 1
    # the values are in `chosen` already.
    cdef real[LANES] bound
    cdef Py_ssize_t t
    if k == 1:
        for t in range(tokens):
            index[t] = find_first_at_least(row[t], padded, chosen[t])
        return
    bound_kth_largest(row, folded, tokens, padded, k, bound, value, order)
    # For one token alone, the network of a block would take longer.
    if real is float and k <= SMALL_K and tokens > 1:
        select_block(
            row, tokens, n, ahead, k, bound, index, chosen, value, found, order
        )
    else:
        select_each_token(row, tokens, n, k, bound, index, chosen, value, found, order)


cdef real sum_top_k(const real* x, Py_ssize_t n, Py_ssize_t k, real* best) noexcept nogil:
    # The sum of the k largest, added largest first, by insertion.
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


cdef void keep_top_groups(
    real* x, const Rule* rule, int32_t* expert, int32_t* order, real* work
) noexcept nogil:
    # Group-limited routing: move the values of the topk_group best groups to the front, and list
    # the experts they belong to.
    cdef Py_ssize_t size = rule.num_experts // rule.n_group
    cdef Py_ssize_t padded = round_up_to_lanes(rule.n_group)
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t g, i
    for g in range(rule.n_group):
        work[g] = sum_top_k(x + g * size, size, rule.experts_per_group_score, work + padded)
    rank_sort(work, rule.n_group, order)
    for g in range(rule.n_group):
        work[order[g]] = 1 if g < rule.topk_group else 0
    for g in range(rule.n_group):
        if work[g] == 1:
            for i in range(size):
                x[count] = x[g * size + i]
                expert[count] = <int32_t>(g * size + i)
                count += 1
    for i in range(count, round_up_to_lanes(count)):
        x[i] = -INFINITY
