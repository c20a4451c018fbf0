# Sums over tokens that do not depend on their order: what is added is first rounded to a multiple
# of a power of two, and a double adds up to 2^20 of those without rounding.

cdef enum:
    # 2^-32 for probabilities, 2^-24 for entropies: adding and subtracting 1.5 * 2^(52 - n) rounds.
    ROUND_TO_32 = 1572864
    ROUND_TO_24 = 402653184


cdef inline double rounded_to_32(double x) noexcept nogil:
    return (x + <double>ROUND_TO_32) - <double>ROUND_TO_32


cdef inline double entropy_of(const real* p, Py_ssize_t padded) noexcept nogil:
    cdef double[LANES] lane
    cdef double x
    cdef Py_ssize_t i, j
    for j in range(LANES):
        lane[j] = 0
    for i in range(0, padded, 16):
        for j in range(LANES):
            # Below this, p ln p is below what is kept.
            x = p[i + j] if p[i + j] > <real>1e-30 else 1.0
            lane[j] -= x * logarithm(x)
    return sum_of_lanes(lane)


def add_statistics(
    const uint8_t[:, :] logits not None, int encoding, Py_ssize_t num_experts, bint is_sigmoid,
    real[:, ::1] work not None, double[::1] probability not None, double[::1] totals not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """Add up probabilities by expert, and over tokens the entropy and the squared log-sum-exp.

    `totals` takes the entropy in units of 2^-24, the squares' nearest integers, and what the
    squares exceed them by in units of 2^-32; a square above 2^32 counts as infinite. `work` is room
    for two rows. At most 2^20 tokens a call. Returns the first token with a NaN, or -1.
    """
    cdef Py_ssize_t padded = work.shape[1]
    cdef Py_ssize_t token, i, j
    cdef real* x = &work[0, 0]
    cdef real* p = &work[1, 0]
    cdef const real* rows[1]
    cdef real[LANES] lane
    cdef real[LANES] weighted
    cdef real largest, total, divisor
    cdef double log_total, entropy, square, whole
    with nogil:
        rows[0] = x
        for token in range(start, stop):
            load_row(&logits[token, 0], encoding, num_experts, x)
            if first_nan(&rows[0], 1, padded) >= 0:
                with gil:
                    return token
            largest = largest_of_row(x, padded)
            for j in range(LANES):
                lane[j] = 0
                weighted[j] = 0
            for i in range(0, padded, 16):
                for j in range(LANES):
                    p[i + j] = exponential_below(x[i + j], largest)
                    lane[j] += p[i + j]
                    # Where the exponential is 0 the difference may be infinite.
                    weighted[j] += p[i + j] * (x[i + j] - largest) if (
                        (p[i + j] > 0) & (x[i + j] < largest)
                    ) else <real>0.0
            total = sum_of_lanes(lane) if largest > -INFINITY else <real>num_experts
            log_total = logarithm(total)
            # With p = e^(x - largest) / total, the sum of -p ln p.
            entropy = log_total - <double>sum_of_lanes(weighted) / <double>total
            square = <double>largest + log_total
            square *= square
            if square <= 4294967296.0:
                whole = (square + 6755399441055744.0) - 6755399441055744.0
                totals[1] += whole
                totals[2] += rounded_to_32(square - whole)
            else:
                totals[1] = INFINITY
            divisor = total
            if is_sigmoid:
                for j in range(LANES):
                    lane[j] = 0
                for i in range(0, padded, 16):
                    for j in range(LANES):
                        p[i + j] = sigmoid(x[i + j])
                        lane[j] += p[i + j]
                divisor = sum_of_lanes(lane) + <real>1e-20
            for i in range(padded):
                p[i] /= divisor
            for i in range(num_experts, padded):
                p[i] = 0
            for i in range(num_experts):
                probability[i] += rounded_to_32(p[i])
            if is_sigmoid:
                entropy = entropy_of(p, padded)
            totals[0] += (entropy + <double>ROUND_TO_24) - <double>ROUND_TO_24
    return -1


def add_weights(
    const int32_t[::1] expert_indices not None, const real[::1] weights not None,
    double scale, double[::1] importance not None
):
    """Add each weight, divided by `scale` and rounded to a multiple of 2^-32, to its expert's."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(expert_indices.shape[0]):
            if expert_indices[i] >= 0:
                importance[expert_indices[i]] += rounded_to_32(<double>weights[i] / scale)
