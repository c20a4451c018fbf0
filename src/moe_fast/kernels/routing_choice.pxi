# The k largest, ties to the lower index.

cdef void choose_in_columns(
    const real* column, Py_ssize_t n, Py_ssize_t k, int32_t* chosen, real* best
) noexcept nogil:
    # LANES tokens at once: column[e * LANES + t] is the value of expert e for token t. Each value
    # goes below those not smaller than it; those it passes move down one.
    cdef Py_ssize_t e, s, t, filled
    cdef real value, above, here
    cdef bint passes, passes_above
    for e in range(n):
        filled = e if e < k else k
        if e < k:
            for t in range(LANES):
                best[e * LANES + t] = column[e * LANES + t]
                chosen[e * LANES + t] = <int32_t>e
            filled = e + 1
        for s in range(filled - 1, 0, -1):
            for t in range(LANES):
                value = column[e * LANES + t]
                above = best[(s - 1) * LANES + t]
                here = best[s * LANES + t]
                passes_above = value > above
                passes = value > here
                best[s * LANES + t] = above if passes_above else (value if passes else here)
                chosen[s * LANES + t] = (
                    chosen[(s - 1) * LANES + t] if passes_above
                    else (<int32_t>e if passes else chosen[s * LANES + t])
                )
        for t in range(LANES):
            value = column[e * LANES + t]
            passes = value > best[t]
            best[t] = value if passes else best[t]
            chosen[t] = <int32_t>e if passes else chosen[t]


cdef void sort_descending(
    const real* value, Py_ssize_t n, Py_ssize_t padded, int32_t* order
) noexcept nogil:
    # order[r] = index of the value with r others before it: the larger ones and, among equals,
    # those with a lower index. value[n:padded] is readable; padded is a multiple of LANES.
    cdef int32_t[LANES] rank
    cdef Py_ssize_t i, j, t
    for i in range(0, n, 16):
        for t in range(LANES):
            rank[t] = 0
        for j in range(i):
            for t in range(LANES):
                rank[t] += value[j] >= value[i + t]
        for j in range(i, i + LANES if i + LANES < n else n):
            for t in range(LANES):
                rank[t] += (value[j] > value[i + t]) | (
                    (value[j] == value[i + t]) & (j - i < t)
                )
        for j in range(i + LANES, n):
            for t in range(LANES):
                rank[t] += value[j] > value[i + t]
        for t in range(LANES if i + LANES < n else n - i):
            order[rank[t]] = <int32_t>(i + t)


cdef real lower_bound(
    const real* x, Py_ssize_t padded, Py_ssize_t k, real* folded, int32_t* order
) noexcept nogil:
    # Fold the row into at least k lanes, each keeping its largest: these are values of the row at
    # different places, so the k-th largest of them is at most the k-th largest of the row.
    cdef Py_ssize_t lanes = (k + LANES - 1) // LANES * LANES
    cdef Py_ssize_t i, j, to
    cdef real value
    if 2 * lanes > padded:
        return -INFINITY
    for j in range(lanes):
        folded[j] = x[j]
    to = 0
    for i in range(lanes, padded, 16):
        for j in range(LANES):
            value = x[i + j]
            folded[to + j] = value if value > folded[to + j] else folded[to + j]
        to += LANES
        if to == lanes:
            to = 0
    sort_descending(folded, lanes, lanes, order)
    return folded[order[k - 1]]


cdef Py_ssize_t survivors(
    const real* x, Py_ssize_t n, Py_ssize_t k, real bound, int32_t* found
) noexcept nogil:
    # Indices of the values from `bound` up, ascending: at least k, and few. Where many equal the
    # bound, as many of them as are needed.
    cdef Py_ssize_t i, wanted
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t above = 0
    for i in range(n):
        found[count] = <int32_t>i
        count += x[i] >= bound
    if count <= 2 * k + LANES:
        return count
    for i in range(n):
        above += x[i] > bound
    if above >= k:
        return count
    wanted = k - above
    count = 0
    for i in range(n):
        found[count] = <int32_t>i
        if x[i] > bound:
            count += 1
        elif x[i] == bound and wanted > 0:
            count += 1
            wanted -= 1
    return count


cdef void choose_in_row(
    const real* x, Py_ssize_t n, Py_ssize_t padded, Py_ssize_t k,
    int32_t* found, int32_t* order, real* value
) noexcept nogil:
    # found[order[0:k]] are the indices of the k largest of x[0:n], largest first.
    cdef real bound = lower_bound(x, padded, k, value, order)
    cdef Py_ssize_t count = survivors(x, n, k, bound, found)
    cdef Py_ssize_t i
    for i in range(count):
        value[i] = x[found[i]]
    for i in range(count, (count + LANES - 1) // LANES * LANES):
        value[i] = -INFINITY
    sort_descending(value, count, (count + LANES - 1) // LANES * LANES, order)


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


cdef Py_ssize_t keep_best_groups(
    const real* x, const Rule* rule, real* kept, int32_t* expert, int32_t* order, real* work
) noexcept nogil:
    # Copy the values of the topk_group best groups to `kept`, and which experts they are.
    cdef Py_ssize_t size = rule.num_experts // rule.n_group
    cdef Py_ssize_t padded = (rule.n_group + LANES - 1) // LANES * LANES
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t g, i
    for g in range(rule.n_group):
        work[g] = sum_of_best(x + g * size, size, rule.experts_per_group_score, work + padded)
    for g in range(rule.n_group, padded):
        work[g] = -INFINITY
    sort_descending(work, rule.n_group, padded, order)
    for g in range(rule.n_group):
        work[order[g]] = 1 if g < rule.topk_group else 0
    for g in range(rule.n_group):
        if work[g] == 1:
            for i in range(size):
                kept[count] = x[g * size + i]
                expert[count] = <int32_t>(g * size + i)
                count += 1
    for i in range(count, (count + LANES - 1) // LANES * LANES):
        kept[i] = -INFINITY
    return count
