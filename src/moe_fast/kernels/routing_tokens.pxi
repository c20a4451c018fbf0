# Tokens choose experts: top-k, Switch, group-limited.

cdef struct Rule:
    Py_ssize_t num_experts
    Py_ssize_t num_experts_per_tok
    bint is_sigmoid
    bint norm_topk_prob
    bint by_score           # choose by scores plus bias, rather than by logits
    Py_ssize_t n_group
    Py_ssize_t topk_group
    Py_ssize_t experts_per_group_score
    double routed_scaling_factor


cdef inline Py_ssize_t padded_to_lanes(Py_ssize_t n) noexcept nogil:
    return (n + LANES - 1) // LANES * LANES


cdef struct Work:
    # What a block needs besides its input and output; one allocation.
    void* rows       # padded values a token, or num_experts * LANES as columns
    void* scores     # padded values: one row of choice scores, or all columns of them
    void* kept       # padded values: scores of the groups kept
    void* value      # padded values, twice: what is being sorted
    void* chosen     # k * LANES
    int32_t* index   # k * LANES
    int32_t* found   # padded
    int32_t* order   # padded
    int32_t* expert  # padded


cdef inline bint few_enough_for_columns(const Rule* rule) noexcept nogil:
    return rule.n_group == 1 and rule.num_experts * rule.num_experts_per_tok <= 128


cdef Py_ssize_t route_columns(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    const real* bias, const Rule* rule, Work* work
) noexcept nogil:
    # One block of up to LANES tokens, each in its lane. Returns the first with a NaN, or -1.
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef real* column = <real*>work.rows
    cdef real* score = <real*>work.scores
    cdef real* row = <real*>work.value
    cdef real* chosen = <real*>work.chosen
    cdef int32_t* index = work.index
    cdef real[LANES] largest
    cdef real[LANES] total
    cdef Py_ssize_t e, s, t
    for t in range(tokens):
        load_row(logits + t * stride, encoding, n, row)
        if holds_nan(row, n):
            return t
        for e in range(n):
            column[e * LANES + t] = row[e]
    for t in range(tokens, LANES):
        for e in range(n):
            column[e * LANES + t] = 0
    if not rule.is_sigmoid and (rule.by_score or not rule.norm_topk_prob):
        for t in range(LANES):
            largest[t] = column[t]
            total[t] = 0
        for e in range(1, n):
            for t in range(LANES):
                if column[e * LANES + t] > largest[t]:
                    largest[t] = column[e * LANES + t]
        for e in range(n):
            for t in range(LANES):
                total[t] += exponential_below(column[e * LANES + t], largest[t])
    if not rule.by_score:
        choose_in_columns(column, n, k, index, chosen)
    else:
        for e in range(n):
            for t in range(LANES):
                if rule.is_sigmoid:
                    score[e * LANES + t] = sigmoid(column[e * LANES + t]) + bias[e]
                else:
                    score[e * LANES + t] = (
                        exponential_below(column[e * LANES + t], largest[t]) / total[t] + bias[e]
                    )
        choose_in_columns(score, n, k, index, chosen)
        for s in range(k):
            for t in range(LANES):
                chosen[s * LANES + t] = column[index[s * LANES + t] * LANES + t]
    weigh(chosen, largest, total, rule)
    return -1


cdef Py_ssize_t route_rows(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    const real* bias, const Rule* rule, Work* work
) noexcept nogil:
    # One block of up to LANES tokens, row by row. Returns the first with a NaN, or -1.
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef Py_ssize_t padded = padded_to_lanes(n)
    cdef real* chosen = <real*>work.chosen
    cdef real* score = <real*>work.scores
    cdef real* x
    cdef real[LANES] largest
    cdef real[LANES] total
    cdef Py_ssize_t e, s, t, count
    cdef int32_t expert
    for t in range(tokens):
        x = <real*>work.rows + t * padded
        load_row(logits + t * stride, encoding, n, x)
        if holds_nan(x, n):
            return t
        for e in range(n, padded):
            x[e] = -INFINITY
        if not rule.is_sigmoid and (rule.by_score or not rule.norm_topk_prob):
            largest[t] = largest_of_row(x, padded)
            total[t] = sum_of_exponentials(x, n, padded, largest[t])
        if not rule.by_score:
            choose_in_row(x, n, padded, k, work.found, work.order, <real*>work.value)
        else:
            for e in range(n, padded):
                score[e] = -INFINITY
            if rule.is_sigmoid:
                for e in range(n):
                    score[e] = sigmoid(x[e]) + bias[e]
            else:
                for e in range(n):
                    score[e] = exponential_below(x[e], largest[t]) / total[t] + bias[e]
            if rule.n_group == 1:
                choose_in_row(score, n, padded, k, work.found, work.order, <real*>work.value)
            else:
                count = keep_best_groups(
                    score, rule, <real*>work.kept, work.expert, work.order, <real*>work.value
                )
                choose_in_row(
                    <real*>work.kept, count, padded_to_lanes(count), k,
                    work.found, work.order, <real*>work.value
                )
        for s in range(k):
            expert = work.found[work.order[s]]
            if rule.n_group > 1:
                expert = work.expert[expert]
            work.index[s * LANES + t] = expert
            chosen[s * LANES + t] = x[expert]
    for t in range(tokens, LANES):
        largest[t] = 0
        total[t] = 1
        for s in range(k):
            chosen[s * LANES + t] = 0
    weigh(chosen, largest, total, rule)
    return -1


def route_tokens(
    const uint8_t[:, :] logits not None, int encoding, const real[::1] bias not None,
    bint is_sigmoid, bint norm_topk_prob, bint by_score,
    Py_ssize_t n_group, Py_ssize_t topk_group, Py_ssize_t experts_per_group_score,
    double routed_scaling_factor,
    int32_t[:, ::1] expert_indices not None, real[:, ::1] weights not None,
    int64_t[::1] tokens_per_expert not None, Py_ssize_t start, Py_ssize_t stop
):
    """Choose for the tokens from start to stop, and add to the counts of their experts.

    `logits` holds the bytes of each row, `bias` one value an expert.

    Returns the first token with a NaN, or -1.
    """
    cdef Rule rule
    cdef Work work
    cdef Py_ssize_t n = bias.shape[0]
    cdef Py_ssize_t k = expert_indices.shape[1]
    cdef Py_ssize_t padded = padded_to_lanes(n)
    cdef Py_ssize_t stride = logits.strides[0]
    cdef Py_ssize_t token, tokens, t, s
    cdef Py_ssize_t bad = -1
    cdef int32_t expert
    cdef const uint8_t* row
    cdef char* memory
    rule.num_experts = n
    rule.num_experts_per_tok = k
    rule.is_sigmoid = is_sigmoid
    rule.norm_topk_prob = norm_topk_prob
    rule.by_score = by_score
    rule.n_group = n_group
    rule.topk_group = topk_group
    rule.experts_per_group_score = experts_per_group_score
    rule.routed_scaling_factor = routed_scaling_factor
    memory = <char*>malloc(
        (2 * LANES * padded + 3 * padded + LANES + LANES * k) * sizeof(real)
        + (LANES * k + 3 * padded) * sizeof(int32_t)
    )
    if memory == NULL:
        raise MemoryError(f"no memory to route among num_experts={n}")
    work.rows = memory
    work.scores = <real*>work.rows + LANES * padded
    work.kept = <real*>work.scores + LANES * padded
    work.value = <real*>work.kept + padded
    work.chosen = <real*>work.value + 2 * padded + LANES
    work.index = <int32_t*>(<real*>work.chosen + LANES * k)
    work.found = work.index + LANES * k
    work.order = work.found + padded
    work.expert = work.order + padded
    with nogil:
        for token in range(start, stop, 16):
            tokens = LANES if token + LANES < stop else stop - token
            row = &logits[0, 0] + token * stride
            if few_enough_for_columns(&rule):
                bad = route_columns(
                    row, stride, encoding, tokens, &bias[0], &rule, &work
                )
            else:
                bad = route_rows(
                    row, stride, encoding, tokens, &bias[0], &rule, &work
                )
            if bad >= 0:
                bad += token
                break
            for t in range(tokens):
                for s in range(k):
                    expert = work.index[s * LANES + t]
                    expert_indices[token + t, s] = expert
                    weights[token + t, s] = (<real*>work.chosen)[s * LANES + t]
                    tokens_per_expert[expert] += 1
    free(memory)
    return bad
