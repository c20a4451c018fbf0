# Backward pass (vector-Jacobian products): from the gradient by weights or scores to that by
# logits.

cdef inline real sigmoid_derivative(real x) noexcept nogil:
    # s (1 - s), without the cancellation where s is nearly 1.
    cdef real magnitude = x if x < <real>0.0 else -x
    cdef real e = exponential(magnitude)
    return e / ((<real>1.0 + e) * (<real>1.0 + e))


cdef void pull_back(
    const real* x, Py_ssize_t n, bint is_row, bint is_sigmoid, bint normalised,
    real* score, real* gradient
) noexcept nogil:
    # In place: the gradient by scores becomes that by logits x, of LANES tokens in columns. For
    # sigmoid also of one token as a row, padded with -inf and gradients of 0 up to a multiple of
    # LANES.
    cdef Py_ssize_t size = round_up_to_lanes(n) if is_row else n * LANES
    cdef Py_ssize_t i, j
    cdef real[LANES] top
    cdef real[LANES] total
    cdef real[LANES] shift
    if is_sigmoid and not normalised:
        for i in range(size):
            gradient[i] *= sigmoid_derivative(x[i])
        return
    for j in range(LANES):
        total[j] = 0
        shift[j] = 0
    if is_sigmoid:
        for i from 0 <= i < size by LANES:
            for j in range(LANES):
                score[i + j] = sigmoid(x[i + j])
            add_to(total, score + i)
    else:
        fold_max(x, size, LANES, top)
        sum_exponentials(x, size, top, score, total)
    for i from 0 <= i < size by LANES:
        add_product_to(shift, score + i, gradient + i)
    if is_sigmoid:
        for i in range(size):
            score[i] = sigmoid_derivative(x[i])
    if is_row:
        total[0] = sum_lanes(total)
        shift[0] = sum_lanes(shift)
        for j in range(1, LANES):
            total[j] = total[0]
            shift[j] = shift[0]
    if is_sigmoid:
        for j in range(LANES):
            total[j] += <real>1e-20
    divide_by(shift, total)
    for i from 0 <= i < size by LANES:
        divide_by(score + i, total)
        times_difference(score + i, gradient + i, shift, gradient + i)


cdef void pull_back_block(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens, Py_ssize_t n,
    bint normalised, real* work, real* gradient
) noexcept nogil:
    # Of sigmoid; a block of up to LANES tokens. `gradient` has a row for each; `work` is three
    # times LANES values for each expert.
    cdef real* x = work
    cdef real* score = x + LANES * n
    cdef real* g = score + LANES * n
    cdef Py_ssize_t e, t
    if fit_in_columns(n):
        load_columns(logits, stride, encoding, tokens, n, x, score)
        to_columns(<const uint8_t*>gradient, n * sizeof(real), tokens, n, g)
        pull_back(x, n, False, True, normalised, score, g)
        to_rows(g, tokens, n, gradient)
        return
    for t in range(tokens):
        load_row(logits + t * stride, encoding, n, x)
        memcpy(g, gradient + t * n, n * sizeof(real))
        for e in range(n, round_up_to_lanes(n)):
            g[e] = 0
        pull_back(x, n, True, True, normalised, score, g)
        memcpy(gradient + t * n, g, n * sizeof(real))


cdef void pull_back_chosen(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    const int32_t* expert, const real* of_weights, Py_ssize_t k, real scale,
    bint is_sigmoid, bint normalised, real* work, real* gradient, Py_ssize_t n
) noexcept nogil:
    # Of scores over the chosen experts alone, times `scale`; added to `gradient`.
    cdef real* x = work
    cdef real* score = x + LANES * k
    cdef real* g = score + LANES * k
    cdef const uint8_t* row
    cdef Py_ssize_t s, t, place
    to_columns(<const uint8_t*>of_weights, k * sizeof(real), tokens, k, g)
    for t in range(k * LANES):
        g[t] *= scale
    for t in range(tokens):
        row = logits + t * stride
        for s in range(k):
            place = expert[t * k + s]
            if encoding == BFLOAT16:
                x[s * LANES + t] = widen_bfloat16((<const uint16_t*>row)[place])
            elif encoding == FLOAT16:
                x[s * LANES + t] = widen_float16((<const uint16_t*>row)[place])
            else:
                x[s * LANES + t] = (<const real*>row)[place]
    pull_back(x, k, False, is_sigmoid, normalised, score, g)
    for t in range(tokens):
        for s in range(k):
            gradient[t * n + expert[t * k + s]] += g[s * LANES + t]


def pull_back_sigmoid(
    const uint8_t[:, :] logits not None, int encoding, bint normalised,
    real[:, ::1] gradient not None, Py_ssize_t start, Py_ssize_t stop
):
    """Turn gradients by the scores of tokens from start to stop into those by their logits."""
    cdef Py_ssize_t n = gradient.shape[1]
    cdef Py_ssize_t token
    cdef real* work = <real*>allocate(3 * LANES * n * sizeof(real), n)
    with nogil:
        memset(work, 0, 3 * LANES * n * sizeof(real))
        for token from start <= token < stop by LANES:
            pull_back_block(
                &logits[0, 0] + token * logits.strides[0], logits.strides[0], encoding,
                tokens_in_block(token, stop), n, normalised, work, &gradient[token, 0]
            )
    release(work)


def pull_back_weights(
    const uint8_t[:, :] logits not None, int encoding, bint is_sigmoid, bint norm_topk_prob,
    double routed_scaling_factor, const int32_t[:, ::1] expert_indices not None,
    const real[:, ::1] of_weights not None, bint add, real[:, ::1] gradient not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """Write or add the gradient by the logits of tokens from start to stop, given that by weights.

    Of weights that depend on the chosen logits alone: renormalised ones, and those of sigmoid.
    """
    cdef Py_ssize_t n = gradient.shape[1]
    cdef Py_ssize_t k = expert_indices.shape[1]
    cdef Py_ssize_t stride = logits.strides[0]
    cdef Py_ssize_t token, tokens
    cdef real* work = <real*>allocate(3 * LANES * k * sizeof(real), k)
    with nogil:
        memset(work, 0, 3 * LANES * k * sizeof(real))
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            if not add:
                memset(&gradient[token, 0], 0, tokens * n * sizeof(real))
            pull_back_chosen(
                &logits[0, 0] + token * stride, stride, encoding, tokens,
                &expert_indices[token, 0], &of_weights[token, 0], k,
                <real>routed_scaling_factor, is_sigmoid, norm_topk_prob, work,
                &gradient[token, 0], n
            )
    release(work)


cdef void pull_back_rows(
    const real* p, Py_ssize_t step, Py_ssize_t tokens, Py_ssize_t n,
    const real* given, Py_ssize_t given_step, real* shift, real* gradient
) noexcept nogil:
    # p * (given - shift - the sum of p * given), for a block of up to LANES tokens. Row t of p
    # begins at t * step, that of the gradient by p at t * given_step; it may be `gradient`, whose
    # rows end where the next begin.
    cdef Py_ssize_t whole = n // LANES * LANES
    cdef real[LANES * LANES] sums
    cdef real[LANES] total
    cdef Py_ssize_t t, i, j
    cdef const real* row
    cdef const real* g
    for t in range(tokens):
        row = p + t * step
        g = given + t * given_step
        for j in range(LANES):
            sums[t * LANES + j] = 0
        for i from 0 <= i < whole by LANES:
            add_product_to(sums + t * LANES, row + i, g + i)
        for i in range(whole, n):
            sums[t * LANES + i - whole] += row[i] * g[i]
    sum_rows(sums, tokens, total)
    add_to(shift, total)
    for t in range(tokens):
        row = p + t * step
        g = given + t * given_step
        for j in range(LANES):
            total[j] = shift[t]
        for i from 0 <= i < whole by LANES:
            times_difference(row + i, g + i, total, gradient + t * n + i)
        for i in range(whole, n):
            gradient[t * n + i] = row[i] * (g[i] - shift[t])


cdef void pull_back_columns(
    real* p, Py_ssize_t n, const real* given, real* shift
) noexcept nogil:
    # The same for few experts, in place. `p` and `given` stand in columns.
    cdef Py_ssize_t e
    for e from 0 <= e < n * LANES by LANES:
        add_product_to(shift, p + e, given + e)
    for e from 0 <= e < n * LANES by LANES:
        times_difference(p + e, given + e, shift, p + e)


cdef void softmax_block(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens, Py_ssize_t n,
    real* room, real* p, real* largest, real* total
) noexcept nogil:
    # Probabilities of a block, in columns if they fit, or else in rows that are padded; and of each
    # token the largest logit and the sum of exponentials.
    cdef const real* row[LANES]
    cdef real[LANES * LANES] folded
    cdef Py_ssize_t ahead
    if fit_in_columns(n):
        load_columns(logits, stride, encoding, tokens, n, p, room)
        score_columns(p, n, False, largest, total, p)
    else:
        load_rows(logits, stride, encoding, tokens, n, row, room, folded)
        ahead = prefetch_distance(row[0], room, stride)
        score_rows(row, folded, tokens, n, ahead, False, p, largest, total)


cdef void weigh_chosen(
    const real* p, Py_ssize_t to_token, Py_ssize_t to_expert, Py_ssize_t tokens,
    const int32_t* expert, const real* of_weights, Py_ssize_t k, real scale,
    real* product, real* shift
) noexcept nogil:
    # product[t * k + s] = the probability of token t's choice s times the gradient by its weight;
    # their sums are added to `shift`.
    cdef Py_ssize_t t, s
    for t in range(tokens):
        for s in range(k):
            product[t * k + s] = (
                p[t * to_token + expert[t * k + s] * to_expert] * (of_weights[t * k + s] * scale)
            )
            shift[t] += product[t * k + s]


def pull_back_softmax(
    const uint8_t[:, :] logits not None, int encoding,
    const real[:, ::1] probabilities, const double[::1] log_sums,
    const real[::1] of_mean, double of_square,
    const int32_t[:, ::1] expert_indices, const real[:, ::1] of_weights,
    double routed_scaling_factor,
    real[:, ::1] gradient not None, Py_ssize_t start, Py_ssize_t stop
):
    """Write the gradient by the logits of tokens from start to stop, given that by probabilities.

    The latter is `of_mean` for every token, or, if that is None, what `gradient` holds; with
    `expert_indices`, `of_weights` is added for the experts chosen. Adds `of_square` times half the
    gradient of the squared log-sum-exp. If `probabilities` and `log_sums` are None, they are
    computed.
    """
    cdef Py_ssize_t n = gradient.shape[1]
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef Py_ssize_t k = 0 if expert_indices is None else expert_indices.shape[1]
    cdef bint as_columns = fit_in_columns(n)
    cdef Py_ssize_t to_token = 1 if as_columns else padded if probabilities is None else n
    cdef Py_ssize_t to_expert = LANES if as_columns else 1
    cdef Py_ssize_t token, tokens, e, t, s
    cdef const int32_t* expert = NULL
    cdef const real* p
    cdef const real* given
    cdef real* column
    cdef real* room
    cdef real* of_columns
    cdef real* product
    cdef real* to
    cdef real[LANES] shift
    cdef real[LANES] largest
    cdef real[LANES] total
    cdef double log_sum
    column = <real*>allocate((3 * LANES * padded + LANES * k) * sizeof(real), n)
    room = column + LANES * padded
    of_columns = room + LANES * padded
    product = of_columns + LANES * padded
    with nogil:
        memset(column, 0, 3 * LANES * padded * sizeof(real))
        if of_mean is not None and as_columns:
            for e in range(n):
                for t in range(LANES):
                    of_columns[e * LANES + t] = of_mean[e]
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            to = &gradient[token, 0]
            p = column
            if probabilities is None:
                softmax_block(
                    &logits[0, 0] + token * logits.strides[0], logits.strides[0], encoding,
                    tokens, n, room, column, largest, total
                )
            elif as_columns:
                to_columns(
                    <const uint8_t*>&probabilities[token, 0], n * sizeof(real), tokens, n, column
                )
            else:
                p = &probabilities[token, 0]
            for t in range(LANES):
                shift[t] = 0
            if of_square != 0:
                for t in range(tokens):
                    if log_sums is None:
                        log_sum = <double>largest[t] + logarithm(total[t])
                    else:
                        log_sum = log_sums[token + t]
                    shift[t] = -<real>(of_square * log_sum)
            if k:
                expert = &expert_indices[token, 0]
                weigh_chosen(
                    p, to_token, to_expert, tokens, expert, &of_weights[token, 0], k,
                    <real>routed_scaling_factor, product, shift
                )
            if as_columns:
                if of_mean is None:
                    to_columns(<const uint8_t*>to, n * sizeof(real), tokens, n, of_columns)
                pull_back_columns(column, n, of_columns, shift)
                to_rows(column, tokens, n, to)
            else:
                given = to
                if of_mean is not None:
                    given = &of_mean[0]
                pull_back_rows(
                    p, to_token, tokens, n, given, n if of_mean is None else 0, shift, to
                )
            for t in range(tokens):
                for s in range(k):
                    to[t * n + expert[t * k + s]] += product[t * k + s]
    release(column)
