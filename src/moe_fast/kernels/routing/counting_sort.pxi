# Counting sort: pairs of a token and a slot in the order of their experts. Stable.

cdef inline Py_ssize_t slot_of(int32_t expert, Py_ssize_t num_experts) noexcept nogil:
    # -1 for a pair that was dropped, and for an index that a user overwrote with nonsense.
    return expert if <uint32_t>expert < <uint32_t>num_experts else -1


cdef inline void place_pair(
    int64_t* of_slot, Py_ssize_t slot, Py_ssize_t pair, int32_t* permutation, Py_ssize_t kept
) noexcept nogil:
    # Without a branch: whether a pair was dropped cannot be predicted. The places of slot -1 begin
    # with `kept`, past the end, and write nowhere; so do negative ones, of counts that a user
    # overwrote.
    cdef int32_t nowhere
    cdef int64_t place = of_slot[slot]
    cdef int32_t* to = &permutation[place] if <uint64_t>place < <uint64_t>kept else &nowhere
    of_slot[slot] = place + 1
    to[0] = <int32_t>pair


cdef enum:
    # With one histogram, each step would wait for the count that the last one wrote.
    HISTOGRAMS = 4


cdef void sort_interleaved(
    const int32_t* expert, Py_ssize_t pairs, const int64_t* offsets, Py_ssize_t num_experts,
    int64_t* work, int32_t* permutation, Py_ssize_t kept
) noexcept nogil:
    # Each quarter of the pairs has its own histogram, so that all are sorted side by side.
    cdef Py_ssize_t quarter = pairs // HISTOGRAMS
    cdef Py_ssize_t i, q, e
    cdef int64_t place, count
    cdef int64_t* of_slot[HISTOGRAMS]
    for q in range(HISTOGRAMS):
        of_slot[q] = work + q * (num_experts + 1) + 1
    for i in range(quarter):
        for q in range(HISTOGRAMS):
            of_slot[q][slot_of(expert[q * quarter + i], num_experts)] += 1
    for e in range(num_experts):
        place = offsets[e]
        for q in range(HISTOGRAMS):
            count = of_slot[q][e]
            of_slot[q][e] = place
            place += count
    for q in range(HISTOGRAMS):
        of_slot[q][slot_of(-1, num_experts)] = kept
    for i in range(quarter):
        for q in range(HISTOGRAMS):
            e = q * quarter + i
            place_pair(of_slot[q], slot_of(expert[e], num_experts), e, permutation, kept)
    for i in range(HISTOGRAMS * quarter, pairs):
        place_pair(
            of_slot[HISTOGRAMS - 1], slot_of(expert[i], num_experts), i, permutation, kept
        )


def sort_by_expert(
    const int32_t[::1] expert_indices not None, const int64_t[::1] tokens_per_expert not None,
    int64_t[::1] offsets not None, int32_t[::1] permutation not None
):
    """Fill the offsets, one more than experts, and the stable permutation of the pairs not dropped.
    """
    cdef Py_ssize_t num_experts = tokens_per_expert.shape[0]
    cdef Py_ssize_t pairs = expert_indices.shape[0]
    cdef Py_ssize_t kept = permutation.shape[0]
    cdef Py_ssize_t e, i
    cdef const int32_t* expert
    cdef int64_t* work
    cdef size_t size
    offsets[0] = 0
    for e in range(num_experts):
        offsets[e + 1] = offsets[e] + tokens_per_expert[e]
    if kept == 0:
        return
    expert = &expert_indices[0]
    if num_experts <= MAX_EXPERTS_TO_COMPARE:
        with nogil:
            for e in range(num_experts):
                if offsets[e] >= 0:
                    collect_equal(
                        expert, pairs, <int32_t>e, &permutation[0] + offsets[e], kept - offsets[e]
                    )
        return
    size = HISTOGRAMS * (num_experts + 1) * sizeof(int64_t)
    work = <int64_t*>allocate(size, num_experts)
    with nogil:
        memset(work, 0, size)
        if fit_in_columns(num_experts):
            sort_interleaved(
                expert, pairs, &offsets[0], num_experts, work, &permutation[0], kept
            )
        else:
            # Among many experts the same one seldom comes twice within a few pairs.
            work[0] = kept
            memcpy(work + 1, &offsets[0], num_experts * sizeof(int64_t))
            for i in range(pairs):
                place_pair(
                    work + 1, slot_of(expert[i], num_experts), i, &permutation[0], kept
                )
    release(work)
