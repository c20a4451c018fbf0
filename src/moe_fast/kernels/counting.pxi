# How often each source model is used, and how evenly.


def count(const int64_t[::1] values not None, uint64_t[::1] counts not None):
    """Add to `counts[v]` one for every `v` in `values`."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(values.shape[0]):
            counts[values[i]] += 1


def coefficient_of_variation(const uint64_t[::1] counts not None):
    """Population standard deviation over mean; 0.0 where nothing was counted."""
    cdef Py_ssize_t i
    cdef Py_ssize_t n = counts.shape[0]
    cdef uint64_t total = 0
    cdef double mean, difference, variance = 0.0
    with nogil:
        for i in range(n):
            total += counts[i]
        mean = <double>total / <double>n
        for i in range(n):
            difference = <double>counts[i] - mean
            variance += difference * difference
        variance /= <double>n
    return sqrt(variance) / mean if total else 0.0
