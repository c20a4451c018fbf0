# Pairs (token, slot) in the order of their experts, and which of them overflow.

cdef inline uint64_t bits_of(real x) noexcept nogil:
    return bits_of_float(x) if real is float else bits_of_double(x)


cdef inline void set_bits(real* x, uint64_t bits) noexcept nogil:
    x[0] = float_of_bits(<uint32_t>bits) if real is float else double_of_bits(bits)


cdef real smallest_kept(
    const real* weight, Py_ssize_t n, Py_ssize_t keep, real least, uint64_t apart
) noexcept nogil:
    # The keep-th largest of n, 1 <= keep <= n, or a bound that exactly `keep` reach; all reach
    # `least`. The search is by bits, in the order of which floats are that are not negative, and
    # ends where it is known to so many: more than 1 apart, the bound may be too low. What pads the
    # weights up to a multiple of LANES is negative.
    cdef Py_ssize_t padded = padded_to_lanes(n)
    cdef uint64_t low = bits_of(least)
    cdef uint64_t high = bits_of(largest_of_row(weight, padded)) + 1
    cdef Py_ssize_t reach_low = n
    cdef Py_ssize_t reach_high = 0
    cdef Py_ssize_t count
    cdef uint64_t width, step
    cdef bint halve = False
    cdef double share
    cdef real bound
    set_bits(&bound, low)
    while reach_low > keep and high - low > apart:
        width = high - low
        step = width // 2
        if not halve:
            # Where it would be if they were spread evenly.
            share = (<double>(reach_low - keep) - 0.5) / <double>(reach_low - reach_high)
            step = <uint64_t>(<double>width * share)
            step = 1 if step < 1 else width - 1 if step >= width else step
        set_bits(&bound, low + step)
        count = count_at_least(weight, padded, bound)
        if count >= keep:
            low += step
            reach_low = count
        else:
            high = low + step
            reach_high = count
        # They are not, where that did not even halve the distance.
        halve = not halve and high - low > width // 2
    set_bits(&bound, low)
    return bound


cdef inline Py_ssize_t slot_of(int32_t expert, Py_ssize_t num_experts) noexcept nogil:
    # -1 for what was dropped, and for what somebody wrote into the indices since.
    return expert if <uint32_t>expert < <uint32_t>num_experts else -1


cdef inline void place_pair(
    int64_t* of_slot, Py_ssize_t slot, Py_ssize_t pair, int32_t* permutation, Py_ssize_t kept
) noexcept nogil:
    # Without a branch: whether a pair was dropped cannot be foreseen. The places of slot -1 begin
    # with `kept`, which is none; nor is one below 0, by counts that somebody wrote.
    cdef int32_t nowhere
    cdef int64_t place = of_slot[slot]
    cdef int32_t* to = &permutation[place] if <uint64_t>place < <uint64_t>kept else &nowhere
    of_slot[slot] = place + 1
    to[0] = <int32_t>pair


cdef enum:
    # Of an expert, while pairs are sorted: with one, each step waits for what the last one wrote.
    COUNTERS = 4


cdef void sort_among_few(
    const int32_t* expert, Py_ssize_t pairs, const int64_t* offsets, Py_ssize_t num_experts,
    int64_t* work, int32_t* permutation, Py_ssize_t kept
) noexcept nogil:
    # Each quarter of the pairs has its own places, so that all are sorted side by side.
    cdef Py_ssize_t quarter = pairs // COUNTERS
    cdef Py_ssize_t i, q, e
    cdef int64_t place, count
    cdef int64_t* of_slot[COUNTERS]
    for q in range(COUNTERS):
        of_slot[q] = work + q * (num_experts + 1) + 1
    for i in range(quarter):
        for q in range(COUNTERS):
            of_slot[q][slot_of(expert[q * quarter + i], num_experts)] += 1
    for e in range(num_experts):
        place = offsets[e]
        for q in range(COUNTERS):
            count = of_slot[q][e]
            of_slot[q][e] = place
            place += count
    for q in range(COUNTERS):
        of_slot[q][slot_of(-1, num_experts)] = kept
    for i in range(quarter):
        for q in range(COUNTERS):
            e = q * quarter + i
            place_pair(of_slot[q], slot_of(expert[e], num_experts), e, permutation, kept)
    for i in range(COUNTERS * quarter, pairs):
        place_pair(
            of_slot[COUNTERS - 1], slot_of(expert[i], num_experts), i, permutation, kept
        )


def sort_by_expert(
    const int32_t[::1] expert_indices not None, const int64_t[::1] tokens_per_expert not None,
    int64_t[::1] offsets not None, int32_t[::1] permutation not None
):
    """Fill the offsets, one more than experts, and the stable permutation of what was not dropped.
    """
    cdef Py_ssize_t num_experts = tokens_per_expert.shape[0]
    cdef Py_ssize_t pairs = expert_indices.shape[0]
    cdef Py_ssize_t kept = permutation.shape[0]
    cdef Py_ssize_t e, i
    cdef const int32_t* expert
    cdef int64_t* work
    offsets[0] = 0
    for e in range(num_experts):
        offsets[e + 1] = offsets[e] + tokens_per_expert[e]
    if kept == 0:
        return
    expert = &expert_indices[0]
    if num_experts <= FEW_TO_COMPARE:
        with nogil:
            for e in range(num_experts):
                if offsets[e] >= 0:
                    collect_equal(
                        expert, pairs, <int32_t>e, &permutation[0] + offsets[e], kept - offsets[e]
                    )
        return
    work = <int64_t*>calloc(COUNTERS * (num_experts + 1), sizeof(int64_t))
    if work == NULL:
        raise MemoryError(f"no memory to sort by num_experts={num_experts}")
    with nogil:
        if in_columns(num_experts):
            sort_among_few(
                expert, pairs, &offsets[0], num_experts, work, &permutation[0], kept
            )
        else:
            # The same expert seldom comes twice within a few pairs.
            work[0] = kept
            memcpy(work + 1, &offsets[0], num_experts * sizeof(int64_t))
            for i in range(pairs):
                place_pair(
                    work + 1, slot_of(expert[i], num_experts), i, &permutation[0], kept
                )
    free(work)


def drop_late(
    int32_t[::1] expert_indices not None, real[::1] weights not None,
    Py_ssize_t capacity, int64_t[::1] kept not None
):
    """Drop each expert's pairs after its first `capacity`; `kept` counts those before them.

    Returns how many it dropped.
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


def drop_improbable(
    int32_t[::1] expert_indices not None, real[::1] weights not None,
    Py_ssize_t capacity, const int64_t[::1] offsets not None,
    const int32_t[::1] permutation not None, Py_ssize_t fullest, int64_t[::1] kept not None
):
    """Drop all but each expert's `capacity` largest weights; among equals the earlier stay.

    `fullest` is the most pairs that an expert has; `kept` counts those that stay. Returns how many
    it dropped.
    """
    cdef Py_ssize_t dropped = 0
    cdef Py_ssize_t num_experts = kept.shape[0]
    cdef Py_ssize_t e, i, n, room
    cdef const int32_t* pair
    cdef real bound, least
    cdef void* memory = room_for(padded_to_lanes(fullest), sizeof(real), num_experts)
    cdef real* work = <real*>from_cache_line(memory)
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
                for i in range(n, padded_to_lanes(n)):
                    work[i] = -1
                bound = smallest_kept(work, n, capacity, least, 1)
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
    free(memory)
    return dropped
