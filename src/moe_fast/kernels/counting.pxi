# Histogram of the source models, and its coefficient of variation.

cdef enum:
    TABLES = 8


def count(const int64_t[::1] values not None, uint64_t[:, ::1] tables not None):
    """Count each value in one of `TABLES` tables, or in a single one; return how many fit in none.

    With several, equal values in a row do not wait for each other's sum. Every value is checked
    here, where it is read once: the array may be another thread's to change.
    """
    cdef Py_ssize_t size = values.shape[0]
    cdef uint64_t length = tables.shape[1]
    cdef Py_ssize_t i, j, rounds
    cdef uint64_t value
    cdef Py_ssize_t outside = 0
    with nogil:
        rounds = size // TABLES if tables.shape[0] == TABLES else 0
        for i in range(rounds):
            for j in range(TABLES):
                value = values[i * TABLES + j]
                if value < length:
                    tables[j, value] += 1
                else:
                    outside += 1
        for i in range(rounds * TABLES, size):
            value = values[i]
            if value < length:
                tables[0, value] += 1
            else:
                outside += 1
    return outside


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
