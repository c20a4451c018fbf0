# Some columns of a matrix of 16 or 32 bits, taken and put back, row after row. NumPy's indexing
# does the same a number at a time.

ctypedef fused word:
    uint16_t
    uint32_t


def take_columns(
    const word[:, ::1] matrix not None, const Py_ssize_t[::1] columns not None,
    word[:, ::1] out not None,
):
    """Write `matrix[:, columns]` into `out`."""
    cdef Py_ssize_t i, j
    with nogil:
        for i in range(matrix.shape[0]):
            for j in range(columns.shape[0]):
                out[i, j] = matrix[i, columns[j]]


def put_columns(
    const word[:, ::1] values not None, const Py_ssize_t[::1] columns not None,
    word[:, ::1] matrix not None,
):
    """Write `values` into `matrix[:, columns]`; no column twice."""
    cdef Py_ssize_t i, j
    with nogil:
        for i in range(values.shape[0]):
            for j in range(columns.shape[0]):
                matrix[i, columns[j]] = values[i, j]
