# Histogram of the source models, and its coefficient of variation.

cdef enum:
    TABLES = 8
    # What load_balance counts without a table from its caller: so many models and assignments.
    FEW_MODELS = 128
    FEW_ASSIGNMENTS = 4096


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


cdef double variation_of(const uint64_t* counts, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint64_t total = 0
    cdef double mean, difference, variance = 0.0
    for i in range(n):
        total += counts[i]
    if total == 0:
        return 0.0
    mean = <double>total / <double>n
    for i in range(n):
        difference = <double>counts[i] - mean
        variance += difference * difference
    variance /= <double>n
    return sqrt(variance) / mean


def coefficient_of_variation(const uint64_t[::1] counts not None):
    """Population standard deviation over mean; 0.0 where nothing was counted."""
    cdef double result = 0.0
    if counts.shape[0]:
        with nogil:
            result = variation_of(&counts[0], counts.shape[0])
    return result


def load_balance(const int64_t[:, :] models not None):
    """The coefficient of variation of how often each of a few models is in `models`.

    Rows or columns that a stride of 0 repeats are counted once and multiplied. Returns -1.0 if
    there are too many, or a model is negative: `count` takes any number and says which are not.
    """
    cdef uint64_t[FEW_MODELS] counts
    cdef Py_ssize_t rows = models.shape[0]
    cdef Py_ssize_t columns = models.shape[1]
    cdef Py_ssize_t i, j
    cdef uint64_t model, repeats = 1
    cdef Py_ssize_t length = 0
    if rows > 0 and models.strides[0] == 0:
        repeats *= <uint64_t>rows
        rows = 1
    if columns > 0 and models.strides[1] == 0:
        repeats *= <uint64_t>columns
        columns = 1
    if rows > FEW_ASSIGNMENTS or columns > FEW_ASSIGNMENTS or rows * columns > FEW_ASSIGNMENTS:
        return -1.0
    memset(counts, 0, sizeof(counts))
    for i in range(rows):
        for j in range(columns):
            model = models[i, j]
            if model >= FEW_MODELS:
                return -1.0
            counts[model] += repeats
            if <Py_ssize_t>model >= length:
                length = <Py_ssize_t>model + 1
    return variation_of(counts, length)
