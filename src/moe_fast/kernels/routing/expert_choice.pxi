# Expert choice: threshold by sampling, exact selection as fallback.
#
# Most tokens are far from being chosen. A threshold for each expert, estimated from a sample of the
# tokens, leaves a short list of candidates, and the best of these are selected exactly. If a list
# is too short, or too long for its room, the caller repeats that expert without a threshold.

cdef inline Py_ssize_t block_size(Py_ssize_t n) noexcept nogil:
    # What score_block needs for columns and rows.
    return LANES * (n + round_up_to_lanes(n))


cdef Py_ssize_t score_block(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    Py_ssize_t n, bint is_sigmoid, real* column, real* room
) noexcept nogil:
    # column[e * LANES + t]: score of expert e for token t of a block; -1 in lanes without a token.
    # There is room for LANES rows. Returns the first token with a NaN, or -1.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef Py_ssize_t bad
    cdef Py_ssize_t e, t
    cdef const real* row[LANES]
    cdef real[LANES * LANES] folded
    cdef real[LANES] largest
    cdef real[LANES] total
    if fit_in_columns(n):
        bad = load_columns(logits, stride, encoding, tokens, n, column, room)
        if bad >= 0:
            return bad
        score_columns(column, n, is_sigmoid, largest, total, column)
    else:
        bad = load_rows(logits, stride, encoding, tokens, n, row, room, folded)
        if bad >= 0:
            return bad
        score_rows(
            row, folded, tokens, n, prefetch_distance(row[0], room, stride),
            is_sigmoid, room, largest, total
        )
        to_columns(<const uint8_t*>room, padded * sizeof(real), tokens, n, column)
    for t in range(tokens, LANES):
        for e in range(n):
            column[e * LANES + t] = -1
    return -1


def sample_thresholds(
    const uint8_t[:, :] logits not None, int encoding, bint is_sigmoid,
    Py_ssize_t sample_size, Py_ssize_t rank, real[::1] bounds not None
):
    """Estimate for each expert a score that `rank` of a sample of the tokens reach.

    `sample_size` is a multiple of LANES.
    """
    cdef Py_ssize_t n = bounds.shape[0]
    cdef Py_ssize_t blocks = sample_size // LANES
    cdef Py_ssize_t all_blocks = logits.shape[0] // LANES
    cdef Py_ssize_t e, i, token
    cdef real* column = <real*>allocate((n * sample_size + block_size(n)) * sizeof(real), n)
    cdef real* sample = column + block_size(n)
    with nogil:
        for i in range(blocks):
            token = all_blocks * i // blocks * LANES
            score_block(
                &logits[token, 0], logits.strides[0], encoding, LANES, n, is_sigmoid,
                column, column + n * LANES
            )
            for e in range(n):
                memcpy(
                    sample + e * sample_size + i * LANES, column + e * LANES, LANES * sizeof(real)
                )
        for e in range(n):
            # Only the first four bits of the significand: it is an estimate.
            bounds[e] = kth_largest(
                sample + e * sample_size, sample_size, rank, <real>0.0,
                <uint64_t>1 << (19 if real is float else 48)
            )
    release(column)


def collect_candidates(
    const uint8_t[:, :] logits not None, int encoding, Py_ssize_t num_experts, bint is_sigmoid,
    Py_ssize_t first, const real[::1] bounds not None, int32_t[:, ::1] found not None,
    real[:, ::1] value not None, int64_t[::1] count not None, Py_ssize_t start, Py_ssize_t stop
):
    """List for each expert, from `first` on, the tokens whose scores reach its bound, ascending.

    `found` and `value` have room for a number of tokens and LANES more; `count` may exceed it, and
    then the list is not complete. Returns the first token with a NaN, or -1.
    """
    cdef Py_ssize_t experts = bounds.shape[0]
    cdef Py_ssize_t room = found.shape[1] - LANES
    cdef Py_ssize_t e, token, tokens, at
    cdef Py_ssize_t bad = -1
    cdef real* column = <real*>allocate(block_size(num_experts) * sizeof(real), num_experts)
    with nogil:
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            bad = score_block(
                &logits[token, 0], logits.strides[0], encoding, tokens, num_experts, is_sigmoid,
                column, column + num_experts * LANES
            )
            if bad >= 0:
                bad += token
                break
            for e in range(experts):
                # A list longer than its room is overwritten at its end; the caller repeats it.
                at = count[e] if count[e] < room else room
                count[e] += collect_at_least(
                    column + (first + e) * LANES, LANES, bounds[e], <int32_t>token,
                    &found[e, at], &value[e, at]
                )
    release(column)
    return bad


cdef void select_largest(
    int32_t* found, real* value, Py_ssize_t n, real least, int32_t* token, real* weight,
    Py_ssize_t capacity
) noexcept nogil:
    # Of n >= capacity tokens those with the largest scores, ties to the lower token. All scores
    # reach `least`. Both lists have room for LANES more than n, and are overwritten.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef Py_ssize_t i
    cdef Py_ssize_t count = 0
    cdef Py_ssize_t room = capacity
    cdef real bound
    for i in range(n, padded):
        value[i] = -1
    bound = kth_largest(value, n, capacity, least, 1)
    if count_at_least(value, padded, bound) == capacity:
        compact_at_least(found, value, padded, bound)
        memcpy(token, found, capacity * sizeof(int32_t))
        memcpy(weight, value, capacity * sizeof(real))
        return
    for i from 0 <= i < padded by LANES:
        room -= number_of_bits(mask_above(value + i, bound))
    for i in range(n):
        if value[i] == bound:
            if room == 0:
                continue
            room -= 1
        if value[i] >= bound:
            token[count] = found[i]
            weight[count] = value[i]
            count += 1


def select_candidates(
    const real[::1] bounds not None, const int32_t[:, :, ::1] found not None,
    const real[:, :, ::1] value not None, int64_t[:, ::1] count not None,
    int32_t[:, ::1] token_indices not None, real[:, ::1] weights not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """Select for the experts from start to stop from their lists, one for each range of tokens.

    Lists hold the tokens that reach the expert's bound. If one was longer than its room, or all
    together are too short, `count[0]` of the expert becomes -1.
    """
    cdef Py_ssize_t capacity = token_indices.shape[1]
    cdef Py_ssize_t lists = found.shape[0]
    cdef Py_ssize_t room = found.shape[2] - LANES
    cdef Py_ssize_t e, i, n
    cdef Py_ssize_t most = round_up_to_lanes(lists * room) + LANES
    cdef real* joined_value = <real*>allocate(
        most * (sizeof(real) + sizeof(int32_t)), bounds.shape[0]
    )
    cdef int32_t* joined = <int32_t*>(joined_value + most)
    with nogil:
        for e in range(start, stop):
            n = 0
            for i in range(lists):
                if count[i, e] > room:
                    n = -1
                    break
                memcpy(joined + n, &found[i, e, 0], count[i, e] * sizeof(int32_t))
                memcpy(joined_value + n, &value[i, e, 0], count[i, e] * sizeof(real))
                n += count[i, e]
            if n < capacity:
                count[0, e] = -1
                continue
            select_largest(
                joined, joined_value, n, bounds[e],
                &token_indices[e, 0], &weights[e, 0], capacity
            )
    release(joined_value)
