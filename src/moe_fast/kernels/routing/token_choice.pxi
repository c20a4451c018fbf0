# Token choice: each token chooses its experts (top-k, Switch, group-limited).

cdef enum:
    # Tokens in columns go through each step in this many blocks, so that the processor works on one
    # while it waits for the results of another.
    BLOCKS_AT_ONCE = 4


cdef struct Workspace:
    # Memory of one call, in floats of the weights' type. `padded` is the experts, rounded up, times
    # BLOCKS_AT_ONCE if they stand in columns.
    void* rows       # LANES * padded: copies of rows, or num_experts * LANES as columns
    void* scores     # LANES * padded: what rows, or columns, are chosen by
    void* value      # 3 * padded + 2 * LANES + LANES * LANES: what is sorted; in columns, sums
    void* chosen     # BLOCKS_AT_ONCE * k * LANES
    int32_t* found   # padded + LANES + LANES * LANES
    int32_t* order   # padded
    int32_t* expert  # LANES * padded: the experts of the groups kept; in columns, those chosen


cdef inline bint use_columns(const Rule* rule) noexcept nogil:
    return rule.n_group == 1 and fit_in_columns(rule.num_experts) and (
        rule.num_experts * rule.num_experts_per_tok <= 128
    )


cdef void choose_block(
    real* column, real* score, const real* bias, const Rule* rule,
    int32_t* expert, real* chosen, real* largest, real* total
) noexcept nogil:
    # Experts and their logits for LANES tokens; all arrays stand in columns.
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef Py_ssize_t e, s, t
    cdef real added
    if not rule.by_score:
        select_in_columns(column, n, k, expert, chosen)
        if not rule.norm_topk_prob:
            sum_exponentials(column, n * LANES, chosen, score, total)
        return
    score_columns(column, n, rule.is_sigmoid, largest, total, score)
    for e in range(n):
        added = bias[e]
        for t in range(LANES):
            score[e * LANES + t] += added
    select_in_columns(score, n, k, expert, chosen)
    for s in range(k):
        for t in range(LANES):
            chosen[s * LANES + t] = column[expert[s * LANES + t] * LANES + t]


cdef Py_ssize_t route_columns(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    const real* bias, const Rule* rule, Workspace* work, int32_t* index, real* weight
) noexcept nogil:
    # Up to BLOCKS_AT_ONCE times LANES tokens. Returns the first with a NaN, or -1.
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef real* column = <real*>work.rows
    cdef real* score = <real*>work.scores
    cdef real* chosen = <real*>work.chosen
    cdef int32_t* expert = work.expert
    cdef real* largest = <real*>work.value
    cdef real* total = largest + BLOCKS_AT_ONCE * LANES
    cdef Py_ssize_t first, bad
    for first from 0 <= first < tokens by LANES:
        bad = load_columns(
            logits + first * stride, stride, encoding, tokens_in_block(first, tokens), n,
            column + first * n, <real*>work.value
        )
        if bad >= 0:
            return first + bad
    for first from 0 <= first < tokens by LANES:
        choose_block(
            column + first * n, score + first * n, bias, rule,
            expert + first * k, chosen + first * k, largest + first, total + first
        )
    for first from 0 <= first < tokens by LANES:
        compute_weights(chosen + first * k, largest + first, total + first, rule)
    for first from 0 <= first < tokens by LANES:
        to_rows(
            <const float*>(expert + first * k), tokens_in_block(first, tokens), k,
            <float*>(index + first * k)
        )
        to_rows(chosen + first * k, tokens_in_block(first, tokens), k, weight + first * k)
    return -1


cdef Py_ssize_t route_rows(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    const real* bias, const Rule* rule, Workspace* work, int32_t* index, real* weight
) noexcept nogil:
    # One block of up to LANES tokens in rows. Returns the first with a NaN, or -1.
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef real* value = <real*>work.value
    cdef real* chosen = <real*>work.chosen
    cdef int32_t* expert
    cdef const real* row[LANES]
    cdef real* choice[LANES]
    cdef real[LANES] largest
    cdef real[LANES] total
    cdef real[LANES * LANES] folded
    cdef Py_ssize_t e, s, t, ahead
    t = load_rows(logits, stride, encoding, tokens, n, row, <real*>work.rows, folded)
    if t >= 0:
        return t
    for t in range(LANES):
        largest[t] = 0
        total[t] = 1
    ahead = prefetch_distance(row[0], <real*>work.rows, stride)
    if not rule.by_score:
        if k == 1 or not rule.norm_topk_prob:
            max_of_rows(folded, chosen)
        if not rule.norm_topk_prob:
            sum_exponentials_of_rows(
                row, chosen, tokens, n, ahead, <real*>work.scores, total
            )
            ahead = 0
        select_in_rows(
            row, folded, tokens, n, padded, ahead, k,
            index, chosen, value, work.found, work.order,
        )
    else:
        score_rows(
            row, folded, tokens, n, ahead, rule.is_sigmoid, <real*>work.scores, largest, total
        )
        for t in range(tokens):
            choice[t] = <real*>work.scores + t * padded
            for e in range(n):
                choice[t][e] += bias[e]
            for e in range(n, padded):
                choice[t][e] = -INFINITY
            if rule.n_group > 1:
                keep_top_groups(
                    choice[t], rule, work.expert + t * padded, work.order, value
                )
        n = n // rule.n_group * rule.topk_group
        padded = round_up_to_lanes(n)
        for t in range(tokens):
            fold_max(choice[t], padded, LANES, folded + t * LANES)
        if k == 1:
            max_of_rows(folded, chosen)
        select_in_rows(
            <const real**>choice, folded, tokens, n, padded, 0, k,
            index, chosen, value, work.found, work.order,
        )
        if rule.n_group > 1:
            for t in range(tokens):
                expert = work.expert + t * round_up_to_lanes(rule.num_experts)
                for s in range(k):
                    index[t * k + s] = expert[index[t * k + s]]
        for t in range(tokens):
            for s in range(k):
                chosen[s * LANES + t] = row[t][index[t * k + s]]
    for t in range(tokens, LANES):
        for s in range(k):
            chosen[s * LANES + t] = 0
    compute_weights(chosen, largest, total, rule)
    to_rows(chosen, tokens, k, weight)
    return -1


cdef Py_ssize_t route_blocks(
    const uint8_t* logits, Py_ssize_t stride, int encoding, const real* bias, const Rule* rule,
    int32_t* expert_indices, real* weights, int64_t* tokens_per_expert,
    Py_ssize_t start, Py_ssize_t stop
) except -2 nogil:
    # The tokens from start to stop; NULL is a bias of zeros. Returns the first with a NaN, or -1.
    cdef Workspace work
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef bint as_columns = use_columns(rule)
    cdef Py_ssize_t step = BLOCKS_AT_ONCE * LANES if as_columns else LANES
    cdef Py_ssize_t padded = round_up_to_lanes(n) * (BLOCKS_AT_ONCE if as_columns else 1)
    cdef Py_ssize_t bad = -1
    cdef Py_ssize_t token = start
    cdef Py_ssize_t tokens, i
    cdef int32_t* index
    cdef real* weight
    cdef real* zeros
    cdef const uint8_t* row
    work.rows = allocate(
        (
            2 * LANES * padded + 4 * padded + 2 * LANES + LANES * LANES + BLOCKS_AT_ONCE * LANES * k
        ) * sizeof(real)
        + (2 * padded + LANES + LANES * LANES + LANES * padded) * sizeof(int32_t),
        n,
    )
    work.scores = <real*>work.rows + LANES * padded
    work.value = <real*>work.scores + LANES * padded
    work.chosen = <real*>work.value + 3 * padded + 2 * LANES + LANES * LANES
    zeros = <real*>work.chosen + BLOCKS_AT_ONCE * LANES * k
    work.found = <int32_t*>(zeros + padded)
    work.order = work.found + padded + LANES + LANES * LANES
    work.expert = work.order + padded
    if bias == NULL:
        memset(zeros, 0, n * sizeof(real))
        bias = zeros
    while token < stop:
        tokens = step if token + step < stop else stop - token
        row = logits + token * stride
        index = expert_indices + token * k
        weight = weights + token * k
        if as_columns:
            bad = route_columns(row, stride, encoding, tokens, bias, rule, &work, index, weight)
        else:
            bad = route_rows(row, stride, encoding, tokens, bias, rule, &work, index, weight)
        if bad >= 0:
            bad += token
            break
        for i in range(tokens * k):
            tokens_per_expert[index[i]] += 1
        token += step
    release(work.rows)
    return bad


def route_tokens(
    const uint8_t[:, :] logits not None, int encoding, const real[::1] bias,
    bint is_sigmoid, bint norm_topk_prob, bint by_score,
    Py_ssize_t n_group, Py_ssize_t topk_group, Py_ssize_t experts_per_group_score,
    double routed_scaling_factor,
    int32_t[:, ::1] expert_indices not None, real[:, ::1] weights not None,
    int64_t[::1] tokens_per_expert not None, Py_ssize_t start, Py_ssize_t stop
):
    """Choose for the tokens from start to stop, and add to the counts of their experts.

    `logits` holds the bytes of each row, `bias` one value an expert, or is None.

    Returns the first token with a NaN, or -1.
    """
    cdef Rule rule
    cdef const real* added = NULL
    cdef Py_ssize_t bad
    rule.num_experts = tokens_per_expert.shape[0]
    rule.num_experts_per_tok = expert_indices.shape[1]
    rule.is_sigmoid = is_sigmoid
    rule.norm_topk_prob = norm_topk_prob
    rule.by_score = by_score
    rule.n_group = n_group
    rule.topk_group = topk_group
    rule.experts_per_group_score = experts_per_group_score
    rule.routed_scaling_factor = routed_scaling_factor
    if start == stop:
        return -1
    if bias is not None:
        added = &bias[0]
    with nogil:
        bad = route_blocks(
            &logits[0, 0], logits.strides[0], encoding, added, &rule,
            &expert_indices[0, 0], &weights[0, 0], &tokens_per_expert[0], start, stop
        )
    return bad
