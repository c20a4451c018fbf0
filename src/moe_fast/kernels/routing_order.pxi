# Pairs (token, slot) in the order of their experts, and which of them overflow.

cdef inline uint64_t bits_of(real x) noexcept nogil:
    return bits_of_float(x) if real is float else bits_of_double(x)


cdef inline void set_bits(real* x, uint64_t bits) noexcept nogil:
    x[0] = float_of_bits(<uint32_t>bits) if real is float else double_of_bits(bits)


cdef real smallest_kept(
    const real* weight, Py_ssize_t n, Py_ssize_t keep, real least, int lowest
) noexcept nogil:
    # The keep-th largest, 1 <= keep <= n, or a bound that exactly `keep` reach: bit by bit from the
    # top, since floats that are not negative are ordered as their bits are. At least `keep` reach
    # `least`, so the bits it shares with the largest are known. Stopping at a higher bit than 0
    # gives a lower bound. n is a multiple of LANES; what pads the weights is negative.
    cdef int i = 30 if real is float else 62
    cdef uint64_t known = bits_of(least)
    cdef uint64_t bits = bits_of(largest_of_row(weight, n))
    cdef real bound
    cdef Py_ssize_t count
    while i >= lowest and bits >> i == known >> i:
        i -= 1
    bits = bits >> (i + 1) << (i + 1)
    while i >= lowest:
        set_bits(&bound, bits | <uint64_t>1 << i)
        count = count_at_least(weight, n, bound)
        if count >= keep:
            bits |= <uint64_t>1 << i
            if count == keep:
                break
        i -= 1
    set_bits(&bound, bits)
    return bound


cdef inline void place_pair(
    int64_t* of_expert, int32_t expert, Py_ssize_t pair, int32_t* permutation
) noexcept nogil:
    # Without a branch: whether a pair was dropped cannot be foreseen.
    cdef int32_t nowhere
    cdef int64_t place = of_expert[expert]
    cdef int32_t* to = &permutation[place] if expert >= 0 else &nowhere
    of_expert[expert] = place + 1
    to[0] = <int32_t>pair


cdef enum:
    # Of an expert, while pairs are sorted: with one, each step waits for what the last one wrote.
    COUNTERS = 4


def sort_by_expert(
    const int32_t[::1] expert_indices not None, const int64_t[::1] offsets not None,
    int32_t[::1] permutation not None, int64_t[:, ::1] work not None
):
    """Fill the stable permutation. `work` is zeros, one more than experts for each of COUNTERS."""
    cdef Py_ssize_t num_experts = work.shape[1] - 1
    cdef Py_ssize_t pairs = expert_indices.shape[0]
    cdef Py_ssize_t quarter = pairs // COUNTERS
    cdef Py_ssize_t i, q, e
    cdef int64_t place, count
    cdef int64_t* of_expert[COUNTERS]
    with nogil:
        for q in range(COUNTERS):
            # At -1 it counts what was dropped.
            of_expert[q] = &work[q, 1]
        if not in_columns(num_experts):
            # The same expert seldom comes twice within a few pairs.
            quarter = 0
            memcpy(of_expert[COUNTERS - 1], &offsets[0], num_experts * sizeof(int64_t))
        else:
            # Each quarter of the pairs has its own places, so that all are sorted side by side.
            for i in range(quarter):
                for q in range(COUNTERS):
                    of_expert[q][expert_indices[q * quarter + i]] += 1
            for e in range(num_experts):
                place = offsets[e]
                for q in range(COUNTERS):
                    count = of_expert[q][e]
                    of_expert[q][e] = place
                    place += count
            for i in range(quarter):
                for q in range(COUNTERS):
                    e = q * quarter + i
                    place_pair(of_expert[q], expert_indices[e], e, &permutation[0])
        for i in range(COUNTERS * quarter, pairs):
            place_pair(of_expert[COUNTERS - 1], expert_indices[i], i, &permutation[0])


def drop_late(
    int32_t[::1] expert_indices not None, real[::1] weights not None,
    Py_ssize_t capacity, int64_t[::1] kept not None
):
    """Drop each expert's pairs after its first `capacity`; `kept` counts those before them."""
    cdef Py_ssize_t i
    cdef int32_t expert
    with nogil:
        for i in range(expert_indices.shape[0]):
            expert = expert_indices[i]
            if kept[expert] < capacity:
                kept[expert] += 1
            else:
                expert_indices[i] = -1
                weights[i] = 0


def drop_improbable(
    int32_t[::1] expert_indices not None, real[::1] weights not None,
    Py_ssize_t capacity, const int64_t[::1] offsets not None,
    const int32_t[::1] permutation not None, real[::1] work not None
):
    """Drop all but each expert's `capacity` largest weights; among equals the earlier stay.

    `work` holds as many values as the fullest expert has pairs, and LANES more.
    """
    cdef Py_ssize_t e, i, n, room
    cdef const int32_t* pair
    cdef real bound
    with nogil:
        for e in range(offsets.shape[0] - 1):
            n = offsets[e + 1] - offsets[e]
            if n <= capacity:
                continue
            pair = &permutation[offsets[e]]
            bound = INFINITY
            room = 0
            if capacity > 0:
                for i in range(n):
                    work[i] = weights[pair[i]]
                for i in range(n, padded_to_lanes(n)):
                    work[i] = -1
                bound = smallest_kept(&work[0], padded_to_lanes(n), capacity, <real>0.0, 0)
                room = capacity
                for i in range(n):
                    room -= work[i] > bound
            for i in range(n):
                if weights[pair[i]] > bound:
                    continue
                if weights[pair[i]] == bound and room > 0:
                    room -= 1
                    continue
                expert_indices[pair[i]] = -1
                weights[pair[i]] = 0
