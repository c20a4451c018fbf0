# Reproducible summation over tokens, in any order: each term is first rounded to a multiple of a
# power of two, and a double adds up to 2^20 of those exactly.

cdef enum:
    # 2^-32 for probabilities, 2^-24 for entropies: adding and subtracting 1.5 * 2^(52 - n) rounds.
    ROUND_TO_32 = 1572864
    ROUND_TO_24 = 402653184


cdef inline double round_to_32(double x) noexcept nogil:
    return (x + <double>ROUND_TO_32) - <double>ROUND_TO_32


cdef inline double entropy_term(double p) noexcept nogil:
    # -p ln p, and 0 for p = 0: 1e-300 changes no p whose term is not negligible.
    return -p * logarithm(p + 1e-300)


cdef void sum_scores(
    const real* x, Py_ssize_t size, bint is_sigmoid, const real* largest,
    real* score, real* total, real* weighted, real* divisor
) noexcept nogil:
    # In each lane of x: `total`, the sum of e^(x - largest); `weighted`, that of the same times
    # x - largest; and scores before they are divided by their sum, `divisor`.
    cdef real[LANES] top
    cdef real[LANES] products
    cdef real[LANES] difference
    cdef Py_ssize_t i, j
    sum_exponentials(x, size, largest, score, total)
    for j in range(LANES):
        top[j] = largest[j]
        products[j] = 0
    for i from 0 <= i < size by LANES:
        subtract_largest(x + i, top, difference)
        # Finite, for a product of 0 where the exponential is 0.
        raise_to(difference, <real>-1000)
        add_product_to(products, score + i, difference)
    for j in range(LANES):
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


cdef void add_columns(
    const real* x, Py_ssize_t tokens, Py_ssize_t n, bint is_sigmoid, real* score,
    double* probability, real* largest, real* total, real* weighted, double* entropy
) noexcept nogil:
    # Adds a block of tokens in columns.
    cdef real[LANES] divisor
    cdef double[LANES] rounded
    cdef Py_ssize_t e, t
    fold_max(x, n * LANES, LANES, largest)
    sum_scores(x, n * LANES, is_sigmoid, largest, score, total, weighted, divisor)
    for t in range(tokens, LANES):
        divisor[t] = INFINITY
    for e in range(n):
        for t in range(LANES):
            score[e * LANES + t] /= divisor[t]
        for t in range(LANES):
            rounded[t] = round_to_32(score[e * LANES + t])
        probability[e] += sum_lanes(rounded)
    if is_sigmoid:
        for e in range(n):
            for t in range(LANES):
                entropy[t] += entropy_term(score[e * LANES + t])


cdef void add_row(
    const real* x, Py_ssize_t n, bint is_sigmoid, real* score,
    double* probability, real* largest, real* total, real* weighted, double* entropy
) noexcept nogil:
    # Adds one token; x ends with -inf up to a multiple of LANES.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef real[LANES] top
    cdef real[LANES] totals
    cdef real[LANES] weights
    cdef real[LANES] divisors
    cdef double[LANES] lane
    cdef real divisor
    cdef Py_ssize_t i, j
    largest[0] = max_of_row(x, padded)
    for j in range(LANES):
        top[j] = largest[0]
    sum_scores(x, padded, is_sigmoid, top, score, totals, weights, divisors)
    # If all logits are -inf they count as equal, and so did the padding of the row.
    total[0] = sum_lanes(totals) if largest[0] > -INFINITY else <real>n
    weighted[0] = sum_lanes(weights)
    divisor = sum_lanes(divisors) if is_sigmoid else total[0]
    for i in range(padded):
        score[i] /= divisor
    for i in range(n, padded):
        score[i] = 0
    for i in range(n):
        probability[i] += round_to_32(score[i])
    if is_sigmoid:
        for j in range(LANES):
            lane[j] = 0
        for i from 0 <= i < padded by LANES:
            for j in range(LANES):
                lane[j] += entropy_term(score[i + j])
        entropy[0] = sum_lanes(lane)


cdef void add_totals(
    Py_ssize_t tokens, bint is_sigmoid, const real* largest, const real* total,
    const real* weighted, double* entropy, double* totals
) noexcept nogil:
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
        square = <double>largest[t] + log_total[t]
        square *= square
        whole[t] = (square + 6755399441055744.0) - 6755399441055744.0
        rest[t] = round_to_32(square - whole[t])
        rest[t] = rest[t] if square <= 4294967296.0 else 0.0
        whole[t] = whole[t] if square <= 4294967296.0 else INFINITY
    for t in range(tokens):
        totals[0] += (entropy[t] + <double>ROUND_TO_24) - <double>ROUND_TO_24
        totals[1] += whole[t]
        totals[2] += rest[t]


def add_statistics(
    const uint8_t[:, :] logits not None, int encoding, Py_ssize_t num_experts, bint is_sigmoid,
    real[:, ::1] work not None, double[::1] probability not None, double[::1] totals not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """Add up probabilities by expert, and over tokens the entropy and the squared log-sum-exp.

    `totals` takes the entropy in units of 2^-24, the squares' nearest integers, and what the
    squares exceed them by in units of 2^-32; a square above 2^32 counts as infinite. `work` is two
    rows of LANES values for each expert. At most 2^20 tokens a call. Returns the first token with
    a NaN, or -1.
    """
    cdef Py_ssize_t padded = round_up_to_lanes(num_experts)
    cdef Py_ssize_t bad = -1
    cdef Py_ssize_t token, tokens, t
    cdef const uint8_t* at
    cdef real* x = &work[0, 0]
    cdef real* score = &work[1, 0]
    cdef const real* row
    cdef real[LANES] largest
    cdef real[LANES] total
    cdef real[LANES] weighted
    cdef double[LANES] entropy
    with nogil:
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            at = &logits[token, 0]
            for t in range(LANES):
                largest[t] = 0
                total[t] = 1
                weighted[t] = 0
                entropy[t] = 0
            if fit_in_columns(num_experts):
                bad = load_columns(
                    at, logits.strides[0], encoding, tokens, num_experts, x, score
                )
                if bad >= 0:
                    break
                add_columns(
                    x, tokens, num_experts, is_sigmoid, score,
                    &probability[0], largest, total, weighted, entropy
                )
            else:
                for t in range(tokens):
                    row = view_or_load_row(at + t * logits.strides[0], encoding, num_experts, x)
                    if has_nan(row, padded):
                        bad = t
                        break
                    add_row(
                        row, num_experts, is_sigmoid, score,
                        &probability[0], largest + t, total + t, weighted + t, entropy + t
                    )
                if bad >= 0:
                    break
            add_totals(tokens, is_sigmoid, largest, total, weighted, entropy, &totals[0])
    return token + bad if bad >= 0 else -1


def add_weights(
    const int32_t[::1] expert_indices not None, const real[::1] weights not None,
    double scale, double[::1] importance not None
):
    """Add each weight, divided by `scale` and rounded to a multiple of 2^-32, to its expert's."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(expert_indices.shape[0]):
            if expert_indices[i] >= 0:
                importance[expert_indices[i]] += round_to_32(<double>weights[i] / scale)
