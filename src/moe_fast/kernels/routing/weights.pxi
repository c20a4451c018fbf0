# Weights of the chosen experts, LANES tokens at once: chosen[s * LANES + t] is slot s of token t.

cdef void compute_weights(
    real* chosen, const real* largest, const real* total, const Rule* rule
) noexcept nogil:
    # From logits to weights, in place. `largest` and `total` are the maximum and the sum of
    # exponentials of each whole row. Only softmax without renormalisation needs them; `largest`
    # only if the first chosen logit need not be the largest.
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef Py_ssize_t first = 0
    cdef Py_ssize_t s, t
    cdef real scale = <real>rule.routed_scaling_factor
    cdef real[LANES] top
    cdef real[LANES] divisor
    if rule.is_sigmoid:
        for s in range(k):
            for t in range(LANES):
                chosen[s * LANES + t] = sigmoid(chosen[s * LANES + t])
    else:
        if not rule.by_score:
            # The first is the largest, and its exponential 1.
            first = 1
            for t in range(LANES):
                top[t] = chosen[t]
                chosen[t] = 1
        elif rule.norm_topk_prob:
            fold_max(chosen, k * LANES, LANES, top)
        else:
            for t in range(LANES):
                top[t] = largest[t]
        for s in range(first, k):
            exponentials_below(chosen + s * LANES, top, chosen + s * LANES)
    if rule.norm_topk_prob:
        for t in range(LANES):
            divisor[t] = chosen[t]
        for s in range(1, k):
            for t in range(LANES):
                divisor[t] += chosen[s * LANES + t]
        if rule.is_sigmoid:
            for t in range(LANES):
                divisor[t] += <real>1e-20
    elif rule.is_sigmoid:
        for t in range(LANES):
            divisor[t] = 1
    else:
        for t in range(LANES):
            divisor[t] = total[t]
    for s in range(k):
        for t in range(LANES):
            chosen[s * LANES + t] = chosen[s * LANES + t] / divisor[t] * scale
