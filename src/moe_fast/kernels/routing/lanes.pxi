# Vector operations on LANES values of either float type; c/lanes.h says what each computes.

cdef extern from "c/lanes.h":
    uint32_t mask_above_float(const float* x, float bound) noexcept nogil
    uint32_t mask_above_double(const double* x, double bound) noexcept nogil
    uint32_t mask_at_least_float(const float* x, float bound) noexcept nogil
    uint32_t mask_at_least_double(const double* x, double bound) noexcept nogil
    bint has_nan_float(const float* x, Py_ssize_t n) noexcept nogil
    bint has_nan_double(const double* x, Py_ssize_t n) noexcept nogil
    void subtract_largest_float(const float* x, const float* largest, float* to) noexcept nogil
    void subtract_largest_double(const double* x, const double* largest, double* to) noexcept nogil
    void add_to_float(float* to, const float* x) noexcept nogil
    void add_to_double(double* to, const double* x) noexcept nogil
    void add_product_to_float(float* to, const float* x, const float* y) noexcept nogil
    void add_product_to_double(double* to, const double* x, const double* y) noexcept nogil
    void multiply_by_float(float* to, const float* x) noexcept nogil
    void multiply_by_double(double* to, const double* x) noexcept nogil
    void divide_by_float(float* to, const float* x) noexcept nogil
    void divide_by_double(double* to, const double* x) noexcept nogil
    void times_difference_float(
        const float* x, const float* y, const float* z, float* to
    ) noexcept nogil
    void times_difference_double(
        const double* x, const double* y, const double* z, double* to
    ) noexcept nogil
    void fold_max_float(const float* x, Py_ssize_t n, Py_ssize_t step, float* to) noexcept nogil
    void fold_max_double(const double* x, Py_ssize_t n, Py_ssize_t step, double* to) noexcept nogil
    bint fold_max_checked_float(const float* x, Py_ssize_t n, float* to) noexcept nogil
    bint fold_max_checked_double(const double* x, Py_ssize_t n, double* to) noexcept nogil
    void raise_to_float(float* x, float least) noexcept nogil
    void raise_to_double(double* x, double least) noexcept nogil
    void max_with_min_float(float* to, const float* a, const float* b) noexcept nogil
    void max_with_min_double(double* to, const double* a, const double* b) noexcept nogil
    void top_k_of_columns_float(
        const float* column, Py_ssize_t n, int k, float* best, float* index
    ) noexcept nogil
    void top_k_of_columns_double(
        const double* column, Py_ssize_t n, int k, double* best, double* index
    ) noexcept nogil
    void prefetch_ahead(const void* x, Py_ssize_t n, Py_ssize_t ahead) noexcept nogil


cdef inline uint32_t mask_above(const real* x, real bound) noexcept nogil:
    if real is float:
        return mask_above_float(x, bound)
    else:
        return mask_above_double(x, bound)


cdef inline uint32_t mask_at_least(const real* x, real bound) noexcept nogil:
    if real is float:
        return mask_at_least_float(x, bound)
    else:
        return mask_at_least_double(x, bound)


cdef inline bint has_nan(const real* x, Py_ssize_t n) noexcept nogil:
    if real is float:
        return has_nan_float(x, n)
    else:
        return has_nan_double(x, n)


cdef inline void subtract_largest(
    const real* x, const real* largest, real* difference
) noexcept nogil:
    if real is float:
        subtract_largest_float(x, largest, difference)
    else:
        subtract_largest_double(x, largest, difference)


cdef inline void exponentials_and_differences(
    const real* x, const real* largest, real* difference, real* e
) noexcept nogil:
    # x - largest and e^(x - largest), which is 1 where both are the same infinity.
    cdef Py_ssize_t j
    subtract_largest(x, largest, difference)
    for j in range(LANES):
        e[j] = exponential(difference[j])


cdef inline void exponentials_below(const real* x, const real* largest, real* e) noexcept nogil:
    cdef real[LANES] difference
    exponentials_and_differences(x, largest, difference, e)


cdef inline void add_to(real* total, const real* x) noexcept nogil:
    if real is float:
        add_to_float(total, x)
    else:
        add_to_double(total, x)


cdef inline void add_product_to(real* total, const real* x, const real* y) noexcept nogil:
    if real is float:
        add_product_to_float(total, x, y)
    else:
        add_product_to_double(total, x, y)


cdef inline void multiply_by(real* to, const real* x) noexcept nogil:
    if real is float:
        multiply_by_float(to, x)
    else:
        multiply_by_double(to, x)


cdef inline void divide_by(real* to, const real* x) noexcept nogil:
    if real is float:
        divide_by_float(to, x)
    else:
        divide_by_double(to, x)


cdef inline void times_difference(
    const real* x, const real* y, const real* z, real* to
) noexcept nogil:
    if real is float:
        times_difference_float(x, y, z, to)
    else:
        times_difference_double(x, y, z, to)


cdef inline void fold_max(const real* x, Py_ssize_t n, Py_ssize_t step, real* to) noexcept nogil:
    if real is float:
        fold_max_float(x, n, step, to)
    else:
        fold_max_double(x, n, step, to)


cdef inline bint fold_max_checked(const real* x, Py_ssize_t n, real* to) noexcept nogil:
    if real is float:
        return fold_max_checked_float(x, n, to)
    else:
        return fold_max_checked_double(x, n, to)


cdef inline void raise_to(real* x, real least) noexcept nogil:
    if real is float:
        raise_to_float(x, least)
    else:
        raise_to_double(x, least)


cdef inline void max_with_min(real* to, const real* a, const real* b) noexcept nogil:
    if real is float:
        max_with_min_float(to, a, b)
    else:
        max_with_min_double(to, a, b)


cdef inline void top_k_of_columns(
    const real* column, Py_ssize_t n, Py_ssize_t k, real* best, real* index
) noexcept nogil:
    if real is float:
        top_k_of_columns_float(column, n, <int>k, best, index)
    else:
        top_k_of_columns_double(column, n, <int>k, best, index)
