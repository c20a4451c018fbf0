# Sums of many numbers in float64, for means and deviations: in 64 lanes, number i in lane i % 64,
# and then lane after lane. The order is the same at every level, and compilers vectorise it.

cdef enum:
    SUM_LANES = 64


def sum_deviations(const float[::1] values not None, double mean, bint squared):
    """The sum of `values - mean`, or of its squares, in float64."""
    cdef double lanes[SUM_LANES]
    cdef double total = 0, deviation
    cdef Py_ssize_t i, j, size = values.shape[0], whole = size - size % SUM_LANES
    with nogil:
        for j in range(SUM_LANES):
            lanes[j] = 0
        if squared:
            for i from 0 <= i < whole by SUM_LANES:
                for j in range(SUM_LANES):
                    deviation = <double>values[i + j] - mean
                    lanes[j] += deviation * deviation
        else:
            for i from 0 <= i < whole by SUM_LANES:
                for j in range(SUM_LANES):
                    lanes[j] += <double>values[i + j] - mean
        for i in range(whole, size):
            deviation = <double>values[i] - mean
            lanes[i - whole] += deviation * deviation if squared else deviation
        for j in range(SUM_LANES):
            total += lanes[j]
    return total
