# Products of float32 matrices with few terms to a sum: low-rank changes, distances to centroids.
#
# Each element is summed in the order of its terms, each product rounded before it is added, so that
# every level gives the same bits: lanes are elements of one row, which compilers vectorise.

cdef enum:
    COLUMNS = 64


cdef inline void add_products(
    const float* left, const float* right, float* out, float scale,
    Py_ssize_t rank, Py_ssize_t width,
) noexcept nogil:
    cdef float total[COLUMNS]
    cdef Py_ssize_t j, q
    cdef float factor
    for j in range(COLUMNS):
        total[j] = 0
    for q in range(rank):
        factor = left[q]
        for j in range(COLUMNS):
            total[j] += factor * right[q * width + j]
    for j in range(COLUMNS):
        out[j] += scale * total[j]


def add_product(
    const float[:, ::1] left not None, const float[:, ::1] right not None, float scale,
    float[:, ::1] out not None,
):
    """Add `scale * (left @ right)` to `out`, each sum over `q` of `left[i, q] * right[q, j]`."""
    cdef Py_ssize_t rows = out.shape[0], width = out.shape[1], rank = right.shape[0]
    cdef Py_ssize_t whole = width - width % COLUMNS
    cdef Py_ssize_t i, j, q
    cdef float total
    if rows == 0 or width == 0 or rank == 0:
        return
    with nogil:
        for j from 0 <= j < whole by COLUMNS:
            for i in range(rows):
                add_products(&left[i, 0], &right[0, j], &out[i, j], scale, rank, width)
        for i in range(rows):
            for j in range(whole, width):
                total = 0
                for q in range(rank):
                    total += left[i, q] * right[q, j]
                out[i, j] += scale * total
