# Backward pass (vector-Jacobian products): from the gradient by weights or scores to that by
# logits.

cdef inline real sigmoid_derivative(real x) noexcept nogil:
    # s (1 - s), without the cancellation where s is nearly 1.
    cdef real magnitude = x if x < <real>0.0 else -x
    cdef real e = exponential(magnitude)
    return e / ((<real>1.0 + e) * (<real>1.0 + e))


cdef void pull_back(
    const real* x, Py_ssize_t n, bint is_row, bint is_sigmoid, bint normalised, real of_square,
    real* score, real* gradient
) noexcept nogil:
    # In place: the gradient by scores becomes that by logits x. Either LANES tokens in columns, or
    # one token as a row, padded with -inf and gradients of 0 up to a multiple of LANES. Softmax
    # adds of_square times half the gradient of the squared log-sum-exp.
    cdef Py_ssize_t size = round_up_to_lanes(n) if is_row else n * LANES
    cdef Py_ssize_t lanes = 1 if is_row else LANES
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
        if is_row:
            top[0] = max_of_row(x, size)
            for j in range(1, LANES):
                top[j] = top[0]
        sum_exponentials(x, size, top, score, total)
    for i from 0 <= i < size by LANES:
        add_product_to(shift, score + i, gradient + i)
    if is_sigmoid:
        for i in range(size):
            score[i] = sigmoid_derivative(x[i])
    if is_row:
        total[0] = sum_lanes(total)
        shift[0] = sum_lanes(shift)
    if is_sigmoid:
        for j in range(LANES):
            total[j] += <real>1e-20
    else:
        for j in range(LANES):
            # Logits that are all -inf count as equal, and so did the padding of a row.
            total[j] = total[j] if top[j] > -INFINITY else <real>n
    divide_by(shift, total)
    if of_square != 0:
        for j in range(lanes):
            shift[j] -= of_square * (top[j] + <real>logarithm(total[j]))
    if is_row:
        for j in range(1, LANES):
            total[j] = total[0]
            shift[j] = shift[0]
    for i from 0 <= i < size by LANES:
        divide_by(score + i, total)
        times_difference(score + i, gradient + i, shift, gradient + i)


cdef void pull_back_block(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens, Py_ssize_t n,
    bint is_sigmoid, bint normalised, real of_square, real* work, real* gradient
) noexcept nogil:
    # A block of up to LANES tokens; `gradient` has a row for each. `work` is three times LANES
    # values for each expert.
    cdef real* x = work
    cdef real* score = x + LANES * n
    cdef real* g = score + LANES * n
    cdef Py_ssize_t e, t
    if fit_in_columns(n):
        load_columns(logits, stride, encoding, tokens, n, x, score)
        to_columns(<const uint8_t*>gradient, n * sizeof(real), tokens, n, g)
        pull_back(x, n, False, is_sigmoid, normalised, of_square, score, g)
        to_rows(g, tokens, n, gradient)
        return
    for t in range(tokens):
        load_row(logits + t * stride, encoding, n, x)
        memcpy(g, gradient + t * n, n * sizeof(real))
        for e in range(n, round_up_to_lanes(n)):
            g[e] = 0
        pull_back(x, n, True, is_sigmoid, normalised, of_square, score, g)
        memcpy(gradient + t * n, g, n * sizeof(real))


cdef void pull_back_chosen(
    const uint8_t* logits, Py_ssize_t stride, int encoding, Py_ssize_t tokens,
    const int32_t* expert, const real* of_weights, Py_ssize_t k, real scale,
    bint is_sigmoid, bint normalised, real* work, real* gradient, Py_ssize_t n
) noexcept nogil:
    # The same for scores over the chosen experts alone, times `scale`. `gradient` holds 0.
    cdef real* x = work
    cdef real* score = x + LANES * n
    cdef real* g = score + LANES * n
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
    pull_back(x, k, False, is_sigmoid, normalised, <real>0.0, score, g)
    for t in range(tokens):
        for s in range(k):
            gradient[t * n + expert[t * k + s]] = g[s * LANES + t]


def pull_back_scores(
    const uint8_t[:, :] logits not None, int encoding, bint is_sigmoid, bint normalised,
    double of_square, real[:, ::1] gradient not None, Py_ssize_t start, Py_ssize_t stop
):
    """Turn gradients by the scores of tokens from start to stop into those by their logits.

    For softmax, adds `of_square` times half the gradient of the squared log-sum-exp.
    """
    cdef Py_ssize_t n = gradient.shape[1]
    cdef Py_ssize_t token
    cdef real* work = <real*>allocate(3 * LANES * n * sizeof(real), n)
    with nogil:
        memset(work, 0, 3 * LANES * n * sizeof(real))
        for token from start <= token < stop by LANES:
            pull_back_block(
                &logits[0, 0] + token * logits.strides[0], logits.strides[0], encoding,
                tokens_in_block(token, stop), n, is_sigmoid, normalised, <real>of_square,
                work, &gradient[token, 0]
            )
    release(work)


def pull_back_weights(
    const uint8_t[:, :] logits not None, int encoding, bint is_sigmoid, bint norm_topk_prob,
    double routed_scaling_factor, const int32_t[:, ::1] expert_indices not None,
    const real[:, ::1] of_weights not None, real[:, ::1] gradient not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """Write the gradient by the logits of tokens from start to stop, given that by their weights.
    """
    cdef Py_ssize_t n = gradient.shape[1]
    cdef Py_ssize_t k = expert_indices.shape[1]
    cdef Py_ssize_t stride = logits.strides[0]
    cdef Py_ssize_t token, tokens, t, s
    cdef real scale = <real>routed_scaling_factor
    cdef const uint8_t* row
    cdef real* work = <real*>allocate(3 * LANES * n * sizeof(real), n)
    with nogil:
        memset(work, 0, 3 * LANES * n * sizeof(real))
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            row = &logits[0, 0] + token * stride
            memset(&gradient[token, 0], 0, tokens * n * sizeof(real))
            if is_sigmoid or norm_topk_prob:
                pull_back_chosen(
                    row, stride, encoding, tokens,
                    &expert_indices[token, 0], &of_weights[token, 0], k, scale,
                    is_sigmoid, norm_topk_prob, work, &gradient[token, 0], n
                )
            else:
                for t in range(token, token + tokens):
                    for s in range(k):
                        gradient[t, expert_indices[t, s]] = of_weights[t, s] * scale
                pull_back_block(
                    row, stride, encoding, tokens, n, is_sigmoid, norm_topk_prob, <real>0.0,
                    work, &gradient[token, 0]
                )
    release(work)


cdef void pull_back_mean_rows(
    const real* p, const double* log_sum, Py_ssize_t tokens, Py_ssize_t n,
    const real* of_mean, double of_square, real* gradient
) noexcept nogil:
    # A block of up to LANES tokens in rows, which end where the next ones begin.
    cdef Py_ssize_t whole = n // LANES * LANES
    cdef real[LANES * LANES] sums
    cdef real[LANES] shift
    cdef real[LANES] less
    cdef Py_ssize_t t, i, j
    cdef const real* row
    for t in range(tokens):
        row = p + t * n
        for j in range(LANES):
            sums[t * LANES + j] = 0
        for i from 0 <= i < whole by LANES:
            add_product_to(sums + t * LANES, row + i, of_mean + i)
        for i in range(whole, n):
            sums[t * LANES + i - whole] += row[i] * of_mean[i]
    sum_rows(sums, tokens, shift)
    for t in range(tokens):
        shift[t] -= <real>(of_square * log_sum[t])
        for j in range(LANES):
            less[j] = shift[t]
        for i from 0 <= i < whole by LANES:
            times_difference(p + t * n + i, of_mean + i, less, gradient + t * n + i)
        for i in range(whole, n):
            gradient[t * n + i] = p[t * n + i] * (of_mean[i] - shift[t])


cdef void pull_back_mean_columns(
    const real* p, const double* log_sum, Py_ssize_t tokens, Py_ssize_t n,
    const real* of_mean, double of_square, real* work, real* gradient
) noexcept nogil:
    # The same for few experts; `work` has room for a column for each.
    cdef real[LANES] shift
    cdef real[LANES] one_mean
    cdef Py_ssize_t e, t
    to_columns(<const uint8_t*>p, n * sizeof(real), tokens, n, work)
    for t in range(LANES):
        shift[t] = 0
    for e in range(n):
        for t in range(LANES):
            one_mean[t] = of_mean[e]
        add_product_to(shift, work + e * LANES, one_mean)
    for t in range(tokens):
        shift[t] -= <real>(of_square * log_sum[t])
    for e in range(n):
        for t in range(LANES):
            one_mean[t] = of_mean[e]
        times_difference(work + e * LANES, one_mean, shift, work + e * LANES)
    to_rows(work, tokens, n, gradient)


def pull_back_means(
    const real[:, ::1] probabilities not None, const double[::1] log_sums not None,
    const real[::1] of_mean not None, double of_square, real[:, ::1] gradient not None,
    Py_ssize_t start, Py_ssize_t stop
):
    """Write the gradient by the logits, given that by their probabilities, the same for all tokens.

    Adds `of_square` times half the gradient of the squared log-sum-exp. Of softmax alone.
    """
    cdef Py_ssize_t n = gradient.shape[1]
    cdef Py_ssize_t token, tokens
    cdef real* work = <real*>allocate(LANES * n * sizeof(real), n)
    with nogil:
        memset(work, 0, LANES * n * sizeof(real))
        for token from start <= token < stop by LANES:
            tokens = tokens_in_block(token, stop)
            if fit_in_columns(n):
                pull_back_mean_columns(
                    &probabilities[token, 0], &log_sums[token], tokens, n,
                    &of_mean[0], of_square, work, &gradient[token, 0]
                )
            else:
                pull_back_mean_rows(
                    &probabilities[token, 0], &log_sums[token], tokens, n,
                    &of_mean[0], of_square, &gradient[token, 0]
                )
    release(work)
