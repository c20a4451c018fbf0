# Stream compaction of either float type; c/compress.h says what each function computes.

cdef extern from "c/compress.h":
    Py_ssize_t count_at_least_float(const float* x, Py_ssize_t n, float bound) noexcept nogil
    Py_ssize_t count_at_least_double(const double* x, Py_ssize_t n, double bound) noexcept nogil
    Py_ssize_t collect_at_least_float(
        const float* x, Py_ssize_t n, float bound, int32_t first, int32_t* index, float* value
    ) noexcept nogil
    Py_ssize_t collect_at_least_double(
        const double* x, Py_ssize_t n, double bound, int32_t first, int32_t* index, double* value
    ) noexcept nogil
    void compact_at_least_float(int32_t* index, float* x, Py_ssize_t n, float bound) noexcept nogil
    void compact_at_least_double(
        int32_t* index, double* x, Py_ssize_t n, double bound
    ) noexcept nogil
    void fill_bit_positions() noexcept nogil
    void collect_equal(
        const int32_t* x, Py_ssize_t n, int32_t y, int32_t* index, Py_ssize_t room
    ) noexcept nogil
    enum: MAX_EXPERTS_TO_COMPARE


cdef inline Py_ssize_t count_at_least(const real* x, Py_ssize_t n, real bound) noexcept nogil:
    if real is float:
        return count_at_least_float(x, n, bound)
    else:
        return count_at_least_double(x, n, bound)


cdef inline Py_ssize_t collect_at_least(
    const real* x, Py_ssize_t n, real bound, int32_t first, int32_t* index, real* value
) noexcept nogil:
    if real is float:
        return collect_at_least_float(x, n, bound, first, index, value)
    else:
        return collect_at_least_double(x, n, bound, first, index, value)


cdef inline void compact_at_least(
    int32_t* index, real* x, Py_ssize_t n, real bound
) noexcept nogil:
    if real is float:
        compact_at_least_float(index, x, n, bound)
    else:
        compact_at_least_double(index, x, n, bound)


fill_bit_positions()
