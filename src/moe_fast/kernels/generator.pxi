# The reference's linear congruential generator and what it makes of each state.

cdef uint64_t MULTIPLIER = 6364136223846793005


def fill(double[::1] out not None, uint64_t state, double base, double scale):
    """`out[i] = base + (f * 2 - 1) * scale`, `f` the top 31 bits of the state over 2^32 - 1."""
    cdef Py_ssize_t i
    cdef double f
    with nogil:
        for i in range(out.shape[0]):
            state = state * MULTIPLIER + 1
            f = <double>(state >> 33) / 4294967295.0
            out[i] = base + (f * 2.0 - 1.0) * scale
