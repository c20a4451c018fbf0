# Blocks of LANES tokens, in rows or in columns.
#
# What is summed is summed in LANES lanes and then by halves, and what is rounded is rounded by the
# operations written here. So neither the width of the processor's vectors nor the number of threads
# changes a result.
#
# Few experts stand in columns: column[e * LANES + t] belongs to expert e and token t of the block,
# so that each step works on all tokens at once. Many stand in rows, one token after the other,
# which end with -inf up to a multiple of LANES.

cdef extern from "c/vector.h":
    # Not the step of a `range`, whose sign Cython must see: `for ... by LANES` instead.
    enum: LANES


cdef inline Py_ssize_t round_up_to_lanes(Py_ssize_t n) noexcept nogil:
    return (n + LANES - 1) // LANES * LANES


cdef inline Py_ssize_t tokens_in_block(Py_ssize_t first, Py_ssize_t stop) noexcept nogil:
    # Of the block that begins with token `first`; there are tokens up to `stop`.
    return LANES if first + LANES < stop else stop - first


cdef inline bint fit_in_columns(Py_ssize_t num_experts) noexcept nogil:
    return num_experts < 2 * LANES
