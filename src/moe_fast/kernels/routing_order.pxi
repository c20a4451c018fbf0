# Pairs (token, slot) in the order of their experts, and which of them overflow.

cdef real smallest_kept(const real* weight, Py_ssize_t n, Py_ssize_t keep) noexcept nogil:
    # The keep-th largest, 1 <= keep <= n, or any bound that exactly `keep` reach: bit by bit from
    # the top, since floats that are not negative are ordered as their bits are.
    cdef uint64_t bits = 0
    cdef uint64_t bit = <uint64_t>1 << 30 if real is float else <uint64_t>1 << 62
    cdef real bound = 0
    cdef real trial
    cdef Py_ssize_t i, count
    while bit:
        if real is float:
            trial = float_of_bits(<uint32_t>(bits | bit))
        else:
            trial = double_of_bits(bits | bit)
        count = 0
        for i in range(n):
            count += weight[i] >= trial
        if count >= keep:
            bits |= bit
            bound = trial
            if count == keep:
                break
        bit >>= 1
    return bound


def sort_by_expert(
    const int32_t[::1] expert_indices not None, int64_t[::1] offsets not None,
    int32_t[::1] permutation not None, int32_t[::1] inverse not None
):
    """Fill the stable permutation and its inverse; offsets[e] moves to the end of expert e."""
    cdef Py_ssize_t i
    cdef int32_t expert
    cdef int64_t place
    with nogil:
        for i in range(expert_indices.shape[0]):
            expert = expert_indices[i]
            if expert < 0:
                inverse[i] = -1
            else:
                place = offsets[expert]
                offsets[expert] = place + 1
                permutation[place] = <int32_t>i
                inverse[i] = <int32_t>place


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

    `work` holds as many values as the fullest expert has pairs.
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
                bound = smallest_kept(&work[0], n, capacity)
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
