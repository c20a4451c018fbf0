# Reproducible summation over tokens, in any order: each term is first rounded to a multiple of a
# power of two, and a double adds up to 2^20 of those exactly.

cdef enum:
    # 2^-32 for probabilities, 2^-24 for entropies: adding and subtracting 1.5 * 2^(52 - n) rounds.
    ROUND_TO_32 = 1572864
    ROUND_TO_24 = 402653184


cdef inline double round_to_32(double x) noexcept nogil:
    return (x + <double>ROUND_TO_32) - <double>ROUND_TO_32


cdef extern from "c/units.h":
    double UNITS_BASE
    void add_units_float(
        uint64_t* sums, const float* x, Py_ssize_t step, Py_ssize_t count
    ) noexcept nogil
    void add_units_double(
        uint64_t* sums, const double* x, Py_ssize_t step, Py_ssize_t count
    ) noexcept nogil


cdef inline void add_units(
    uint64_t* sums, const real* x, Py_ssize_t step, Py_ssize_t count
) noexcept nogil:
    if real is float:
        add_units_float(sums, x, step, count)
    else:
        add_units_double(sums, x, step, count)


cdef inline double entropy_term(double p) noexcept nogil:
    # -p ln p, and 0 for p = 0: 1e-300 changes no p whose term is not negligible.
    return -p * logarithm(p + 1e-300)


cdef void sum_scores(
    const real* x, Py_ssize_t size, bint is_sigmoid, const real* largest,
    real* score, real* total, real* weighted, real* divisor
) noexcept nogil:
    # In each lane of x: `total`, the sum of e^(x - largest); `weighted`, that of the same times
    # x - largest; and scores before they are divided by their sum, `divisor`.
    cdef real[LANES] sums
    cdef real[LANES] products
    cdef real[LANES] difference
    cdef Py_ssize_t i, j
    for j in range(LANES):
        sums[j] = 0
        products[j] = 0
    for i from 0 <= i < size by LANES:
        exponentials_and_differences(x + i, largest, difference, score + i)
        add_to(sums, score + i)
        # Finite, for a product of 0 where the exponential is 0.
        raise_to(difference, <real>-1000)
        add_product_to(products, score + i, difference)
    for j in range(LANES):
        total[j] = sums[j]
        weighted[j] = products[j]
    if not is_sigmoid:
        for j in range(LANES):
            divisor[j] = total[j]
        return
    for j in range(LANES):
        divisor[j] = 0
    for i from 0 <= i < size by LANES:
        for j in range(LANES):
            score[i + j] = sigmoid(x[i + j])
            divisor[j] += score[i + j]
    for j in range(LANES):
        divisor[j] += <real>1e-20


cdef inline void invert(real* divisor) noexcept nogil:
    # One division a token, and not one a probability: it takes several times as long as a product.
    cdef Py_ssize_t t
    for t in range(LANES):
        divisor[t] = <real>1.0 / divisor[t]


cdef void add_columns(
    const real* x, Py_ssize_t tokens, Py_ssize_t n, bint is_sigmoid, real* score,
    uint64_t* sums, real* largest, real* total, real* weighted, double* entropy
) noexcept nogil:
    # Adds a block of tokens in columns, to a column of sums for each expert. `score` becomes their
    # probabilities.
    cdef real[LANES] divisor
    cdef Py_ssize_t e, t
    fold_max(x, n * LANES, LANES, largest)
    sum_scores(x, n * LANES, is_sigmoid, largest, score, total, weighted, divisor)
    invert(divisor)
    for t in range(tokens, LANES):
        divisor[t] = 0
    for e in range(n):
        multiply_by(score + e * LANES, divisor)
        add_units(sums + e * LANES, score + e * LANES, 0, 1)
    if is_sigmoid:
        for e in range(n):
            for t in range(LANES):
                entropy[t] += entropy_term(score[e * LANES + t])


cdef void add_rows(
    const real** row, const real* folded, Py_ssize_t tokens, Py_ssize_t n, Py_ssize_t ahead,
    bint is_sigmoid, real* score,
    uint64_t* sums, real* largest, real* total, real* weighted, double* entropy
) noexcept nogil:
    # Adds a block of tokens in rows, to one sum for each expert. Score[t * padded:] becomes the
    # probabilities of row t.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef real[LANES * LANES] totals
    cdef real[LANES * LANES] weights
    cdef real[LANES * LANES] divisors
    cdef real[LANES] top
    cdef real[LANES] divisor
    cdef double[LANES] lane
    cdef Py_ssize_t t, i, j
    max_of_rows(folded, largest)
    for t in range(tokens):
        prefetch_ahead(row[t], n * sizeof(real), ahead)
        for j in range(LANES):
            top[j] = largest[t]
        sum_scores(
            row[t], padded, is_sigmoid, top, score + t * padded,
            totals + t * LANES, weights + t * LANES, divisors + t * LANES
        )
    sum_rows(totals, tokens, total)
    sum_rows(weights, tokens, weighted)
    if is_sigmoid:
        sum_rows(divisors, tokens, divisor)
    for t in range(LANES):
        # If all logits are -inf they count as equal, and so did the padding of the row.
        total[t] = total[t] if largest[t] > -INFINITY else <real>n
        if not is_sigmoid:
            divisor[t] = total[t]
    invert(divisor)
    for t in range(tokens):
        for j in range(LANES):
            top[j] = divisor[t]
        for i from 0 <= i < padded by LANES:
            multiply_by(score + t * padded + i, top)
    for i from 0 <= i < padded by LANES:
        add_units(sums + i, score + i, padded, tokens)
    if not is_sigmoid:
        return
    for t in range(tokens):
        for j in range(LANES):
            lane[j] = 0
        for i in range(n, padded):
            score[t * padded + i] = 0
        for i from 0 <= i < padded by LANES:
            for j in range(LANES):
                lane[j] += entropy_term(score[t * padded + i + j])
        entropy[t] = sum_lanes(lane)


cdef void add_totals(
    Py_ssize_t tokens, bint is_sigmoid, const real* largest, const real* total,
    const real* weighted, double* entropy, double* log_sum, double* totals
) noexcept nogil:
    # `log_sum` becomes the logarithm of the sum of the exponentials. `totals` has LANES values of
    # each sum.
    cdef double[LANES] whole
    cdef double[LANES] rest
    cdef double[LANES] log_total
    cdef double square
    cdef Py_ssize_t t
    for t in range(LANES):
        log_total[t] = logarithm(total[t])
    if not is_sigmoid:
        # With p = e^(x - largest) / total, the sum of -p ln p.
        for t in range(LANES):
            entropy[t] = log_total[t] - <double>weighted[t] / <double>total[t]
    for t in range(LANES):
        log_sum[t] = <double>largest[t] + log_total[t]
    for t in range(LANES):
        square = log_sum[t]
        square *= square
        whole[t] = (square + 6755399441055744.0) - 6755399441055744.0
        rest[t] = round_to_32(square - whole[t])
        rest[t] = rest[t] if square <= 4294967296.0 else 0.0
        whole[t] = whole[t] if square <= 4294967296.0 else INFINITY
    for t in range(tokens, LANES):
        entropy[t] = whole[t] = rest[t] = 0
    for t in range(LANES):
        entropy[t] = (entropy[t] + <double>ROUND_TO_24) - <double>ROUND_TO_24
    add_to(totals, entropy)
    add_to(totals + LANES, whole)
    add_to(totals + 2 * LANES, rest)


def add_statistics(
    const uint8_t[:, :] logits not None, int encoding, Py_ssize_t num_experts, bint is_sigmoid,
    double[::1] probability not None, double[::1] totals not None,
    real[:, ::1] probabilities, double[::1] log_sums, Py_ssize_t start, Py_ssize_t stop
):
    """Add up probabilities by expert, and over tokens the entropy and the squared log-sum-exp.

    `totals` takes the entropy in units of 2^-24, the squares' nearest integers, and what the
    squares exceed them by in units of 2^-32; a square above 2^32 counts as infinite. What a token
    adds is kept in its row of `probabilities` and in `log_sums`, or both are None. At most 2^20
    tokens a call. Returns the first token with a NaN, or -1.
    """
    cdef Py_ssize_t padded = round_up_to_lanes(num_experts)
    cdef bint as_columns = fit_in_columns(num_experts)
    # Each expert has one sum, or a column of them; each token, or block, adds to it once.
    cdef Py_ssize_t width = LANES if as_columns else 1
    cdef Py_ssize_t added = 0
    cdef Py_ssize_t bad = -1
    cdef Py_ssize_t token, tokens, ahead, e, t
    cdef const uint8_t* at
    cdef real* x
    cdef real* score
    cdef uint64_t* sums
    cdef const real* row[LANES]
    cdef real[LANES * LANES] folded
    cdef real[LANES] largest
    cdef real[LANES] total
    cdef real[LANES] weighted
    cdef double[LANES] entropy
    cdef double[LANES] log_sum
    cdef double[3 * LANES] lane_totals
    x = <real*>allocate(
        2 * LANES * padded * sizeof(real) + padded * width * sizeof(uint64_t), num_experts
    )
    score = x + LANES * padded
    sums = <uint64_t*>(score + LANES * padded)
    with nogil:
        memset(sums, 0, padded * width * sizeof(uint64_t))
        memset(lane_totals, 0, 3 * LANES * sizeof(double))
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            at = &logits[token, 0]
            for t in range(LANES):
                largest[t] = 0
                total[t] = 1
                weighted[t] = 0
                entropy[t] = 0
            if as_columns:
                bad = load_columns(
                    at, logits.strides[0], encoding, tokens, num_experts, x, score
                )
                if bad >= 0:
                    break
                add_columns(
                    x, tokens, num_experts, is_sigmoid, score,
                    sums, largest, total, weighted, entropy
                )
                added += 1
                if probabilities is not None:
                    to_rows(score, tokens, num_experts, &probabilities[token, 0])
            else:
                bad = load_rows(
                    at, logits.strides[0], encoding, tokens, num_experts, row, x, folded
                )
                if bad >= 0:
                    break
                ahead = prefetch_distance(row[0], x, logits.strides[0])
                add_rows(
                    row, folded, tokens, num_experts, ahead, is_sigmoid, score,
                    sums, largest, total, weighted, entropy
                )
                added += tokens
                if probabilities is not None:
                    for t in range(tokens):
                        memcpy(
                            &probabilities[token + t, 0], score + t * padded,
                            num_experts * sizeof(real)
                        )
            add_totals(
                tokens, is_sigmoid, largest, total, weighted, entropy, log_sum, lane_totals
            )
            if log_sums is not None:
                memcpy(&log_sums[token], log_sum, tokens * sizeof(double))
        for t in range(3 * LANES):
            totals[t // LANES] += lane_totals[t]
        for e in range(num_experts):
            for t in range(width):
                probability[e] += <double>2.3283064365386963e-10 * <double><int64_t>(
                    sums[e * width + t]
                    - <uint64_t>added * bits_of_double(UNITS_BASE)
                )
    release(x)
    return token + bad if bad >= 0 else -1


def add_weights(
    const int32_t[::1] expert_indices not None, const real[::1] weights not None,
    double scale, double[::1] importance not None
):
    """Add each weight, divided by `scale` and rounded to a multiple of 2^-32, to its expert's."""
    cdef Py_ssize_t pairs = expert_indices.shape[0]
    cdef Py_ssize_t i, j
    cdef int32_t expert
    cdef double inverse = 1.0 / scale
    cdef double[LANES] units
    with nogil:
        for i from 0 <= i < pairs by LANES:
            if i + LANES <= pairs:
                for j in range(LANES):
                    units[j] = round_to_32(<double>weights[i + j] * inverse)
            else:
                for j in range(pairs - i):
                    units[j] = round_to_32(<double>weights[i + j] * inverse)
            for j in range(tokens_in_block(i, pairs)):
                expert = expert_indices[i + j]
                if expert >= 0:
                    importance[expert] += units[j]
