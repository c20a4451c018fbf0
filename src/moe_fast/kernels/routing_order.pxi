# Pairs (token, slot) in the order of their experts, and which of them overflow.

cdef real smallest_kept(
    const real* weight, Py_ssize_t n, Py_ssize_t keep, int lowest
) noexcept nogil:
    # The keep-th largest, 1 <= keep <= n, or a bound that exactly `keep` reach: bit by bit from the
    # top, since floats that are not negative are ordered as their bits are. Stopping at a higher
    # bit than 0 gives a lower bound. n is a multiple of LANES; what pads the weights is negative.
    cdef uint64_t bits = 0
    cdef int i
    cdef real bound = 0
    cdef real trial
    cdef Py_ssize_t count
    for i in range(30 if real is float else 62, lowest - 1, -1):
        if real is float:
            trial = float_of_bits(<uint32_t>(bits | <uint64_t>1 << i))
        else:
            trial = double_of_bits(bits | <uint64_t>1 << i)
        count = count_at_least(weight, n, trial)
        if count >= keep:
            bits |= <uint64_t>1 << i
            bound = trial
            if count == keep:
                break
    return bound


def sort_by_expert(
    const int32_t[::1] expert_indices not None, int64_t[::1] offsets not None,
    int32_t[::1] permutation not None
):
    """Fill the stable permutation; offsets[e] moves to the end of expert e."""
    cdef Py_ssize_t i
    cdef int32_t expert
    cdef int64_t place
    with nogil:
        for i in range(expert_indices.shape[0]):
            expert = expert_indices[i]
            if expert >= 0:
                place = offsets[expert]
                offsets[expert] = place + 1
                permutation[place] = <int32_t>i


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
                bound = smallest_kept(&work[0], padded_to_lanes(n), capacity, 0)
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
