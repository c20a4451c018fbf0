# Experts choose tokens.

def softmax_sums(
    const uint8_t[:, :] logits not None, int encoding, Py_ssize_t num_experts,
    real[::1] largest not None, real[::1] total not None, real[::1] row not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """The largest logit of each token and the sum of all exponentials below it.

    `row` is room for one row, a multiple of LANES. Returns the first token with a NaN, or -1.
    """
    cdef Py_ssize_t padded = row.shape[0]
    cdef Py_ssize_t token, e
    cdef real* x = &row[0]
    with nogil:
        for e in range(num_experts, padded):
            x[e] = -INFINITY
        for token in range(start, stop):
            load_row(&logits[token, 0], encoding, num_experts, x)
            if holds_nan(x, num_experts):
                with gil:
                    return token
            largest[token] = largest_of_row(x, padded)
            total[token] = sum_of_exponentials(x, num_experts, padded, largest[token])
    return -1


def choose_tokens(
    const uint8_t[:, :] logits not None, int encoding, bint is_sigmoid,
    const real[::1] largest not None, const real[::1] total not None,
    int32_t[:, ::1] token_indices not None, real[:, ::1] weights not None,
    real[:, ::1] scores not None, Py_ssize_t start, Py_ssize_t stop
):
    """Choose for the experts from start to stop, LANES of them at a time.

    `scores` is room for LANES rows of one score a token. Chosen tokens stand in token order.
    """
    cdef Py_ssize_t tokens = scores.shape[1]
    cdef Py_ssize_t capacity = token_indices.shape[1]
    cdef Py_ssize_t width = logits.shape[1] // token_indices.shape[0]
    cdef Py_ssize_t expert, experts, token, e, count, room
    cdef real[LANES] x
    cdef real* score
    cdef real bound
    with nogil:
        for e in range(LANES):
            x[e] = 0
        for expert in range(start, stop, 16):
            experts = LANES if expert + LANES < stop else stop - expert
            for token in range(tokens):
                load_row(&logits[token, expert * width], encoding, experts, x)
                for e in range(LANES):
                    if is_sigmoid:
                        x[e] = sigmoid(x[e])
                    else:
                        x[e] = exponential_below(x[e], largest[token]) / total[token]
                for e in range(experts):
                    scores[e, token] = x[e]
            for e in range(experts):
                score = &scores[e, 0]
                bound = smallest_kept(score, tokens, capacity)
                room = capacity
                for token in range(tokens):
                    room -= score[token] > bound
                count = 0
                for token in range(tokens):
                    if score[token] < bound:
                        continue
                    if score[token] == bound:
                        if room == 0:
                            continue
                        room -= 1
                    token_indices[expert + e, count] = <int32_t>token
                    weights[expert + e, count] = score[token]
                    count += 1
