# One token by the same rule as the token before, in a loop that decodes. Checking the options and
# taking typed views of the arrays would take several times as long as the routing itself.

cdef enum:
    # An array has another shape or dtype than expected.
    UNEXPECTED = -3


cdef inline bint is_row(
    const Py_buffer* array, Py_ssize_t length, Py_ssize_t itemsize, char kind
) noexcept nogil:
    # Whether the array is one row, of shape [length] or [1, length], of aligned numbers in native
    # byte order; kind 0 is any dtype.
    cdef int last = array.ndim - 1
    return (
        0 <= last <= 1
        and array.itemsize == itemsize
        and array.len == length * itemsize
        and array.shape[last] == length
        and array.strides[last] == itemsize
        and <size_t>array.buf % <size_t>itemsize == 0
        and (kind == 0 or (array.format[0] == kind and array.format[1] == 0))
    )


cdef Py_ssize_t route_buffers(
    const Py_buffer* logits, const Py_buffer* expert_indices, const Py_buffer* weights,
    const Py_buffer* tokens_per_expert, const Rule* rule
) except -2 nogil:
    cdef Py_ssize_t n = rule.num_experts
    cdef Py_ssize_t k = rule.num_experts_per_tok
    cdef const uint8_t* row = <const uint8_t*>logits.buf
    cdef int32_t* index = <int32_t*>expert_indices.buf
    cdef int64_t* count = <int64_t*>tokens_per_expert.buf
    cdef int encoding = NATIVE
    if logits.ndim != 2 or not (
        is_row(expert_indices, k, sizeof(int32_t), 0)
        and is_row(tokens_per_expert, n, sizeof(int64_t), 0)
    ):
        return UNEXPECTED
    if is_row(weights, k, sizeof(double), c"d") and is_row(logits, n, sizeof(double), c"d"):
        memset(count, 0, n * sizeof(int64_t))
        return route_blocks[double](
            row, 0, NATIVE, NULL, rule, index, <double*>weights.buf, count, 0, 1
        )
    if not is_row(weights, k, sizeof(float), c"f"):
        return UNEXPECTED
    if is_row(logits, n, sizeof(uint16_t), c"e"):
        encoding = FLOAT16
    elif not is_row(logits, n, sizeof(float), c"f"):
        return UNEXPECTED
    memset(count, 0, n * sizeof(int64_t))
    return route_blocks[float](
        row, 0, encoding, NULL, rule, index, <float*>weights.buf, count, 0, 1
    )


def route_next_token(
    logits, expert_indices, weights, tokens_per_expert, tuple asked, tuple asked_before,
    bint is_sigmoid, bint norm_topk_prob, bint by_score,
    Py_ssize_t n_group, Py_ssize_t topk_group, Py_ssize_t experts_per_group_score,
    double routed_scaling_factor, Py_ssize_t num_experts, Py_ssize_t num_experts_per_tok
):
    """Choose for one token, without a bias, and set the counts.

    Does nothing and returns None if an object in `asked` is not the same as in `asked_before`, or
    an array does not have the expected shape and dtype. Otherwise returns 0 if a logit is NaN, and
    -1 if not.
    """
    cdef Py_buffer[4] array
    cdef Rule rule
    cdef Py_ssize_t i, bad
    cdef int held = 0
    for i in range(len(asked)):
        if asked[i] is not asked_before[i]:
            return None
    rule.num_experts = num_experts
    rule.num_experts_per_tok = num_experts_per_tok
    rule.is_sigmoid = is_sigmoid
    rule.norm_topk_prob = norm_topk_prob
    rule.by_score = by_score
    rule.n_group = n_group
    rule.topk_group = topk_group
    rule.experts_per_group_score = experts_per_group_score
    rule.routed_scaling_factor = routed_scaling_factor
    try:
        PyObject_GetBuffer(logits, &array[0], PyBUF_RECORDS_RO)
        held = 1
        PyObject_GetBuffer(expert_indices, &array[1], PyBUF_RECORDS)
        held = 2
        PyObject_GetBuffer(weights, &array[2], PyBUF_RECORDS)
        held = 3
        PyObject_GetBuffer(tokens_per_expert, &array[3], PyBUF_RECORDS)
        held = 4
        bad = route_buffers(&array[0], &array[1], &array[2], &array[3], &rule)
    except (BufferError, TypeError, ValueError):
        # Not a buffer, or one without a format (bfloat16), or a read-only one.
        return None
    finally:
        for i in range(held):
            PyBuffer_Release(&array[i])
    return None if bad == UNEXPECTED else bad
