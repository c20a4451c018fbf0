# Capacity: which pairs of a token and an expert are dropped where an expert has too many.

def drop_by_position(
    int32_t[::1] expert_indices not None, real[::1] weights not None,
    Py_ssize_t capacity, int64_t[::1] kept not None
):
    """Drop each expert's pairs after its first `capacity`; `kept` counts those that stay.

    Returns how many were dropped.
    """
    cdef Py_ssize_t dropped = 0
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
                dropped += 1
    return dropped


def drop_by_probability(
    int32_t[::1] expert_indices not None, real[::1] weights not None,
    Py_ssize_t capacity, const int64_t[::1] offsets not None,
    const int32_t[::1] permutation not None, Py_ssize_t fullest, int64_t[::1] kept not None
):
    """Drop all but each expert's `capacity` largest weights; of equal weights the earlier stay.

    `fullest` is the most pairs that an expert has; `kept` counts those that stay. Returns how many
    were dropped.
    """
    cdef Py_ssize_t dropped = 0
    cdef Py_ssize_t num_experts = kept.shape[0]
    cdef Py_ssize_t e, i, n, room
    cdef const int32_t* pair
    cdef real bound, least
    cdef real* work = <real*>allocate(round_up_to_lanes(fullest) * sizeof(real), num_experts)
    with nogil:
        for e in range(num_experts):
            n = offsets[e + 1] - offsets[e]
            kept[e] = n if n < capacity else capacity
            if n <= capacity:
                continue
            dropped += n - capacity
            pair = &permutation[offsets[e]]
            bound = INFINITY
            room = 0
            if capacity > 0:
                least = INFINITY
                for i in range(n):
                    work[i] = weights[pair[i]]
                    least = work[i] if work[i] < least else least
                for i in range(n, round_up_to_lanes(n)):
                    work[i] = -1
                bound = kth_largest(work, n, capacity, least, 1)
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
    release(work)
    return dropped
