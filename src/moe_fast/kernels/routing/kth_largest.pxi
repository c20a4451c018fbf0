# The k-th largest value by interpolation search over the bits of floats, bisection as fallback.

cdef inline uint64_t bits_of(real x) noexcept nogil:
    return bits_of_float(x) if real is float else bits_of_double(x)


cdef inline void set_bits(real* x, uint64_t bits) noexcept nogil:
    x[0] = float_of_bits(<uint32_t>bits) if real is float else double_of_bits(bits)


cdef real kth_largest(
    const real* value, Py_ssize_t n, Py_ssize_t k, real least, uint64_t apart
) noexcept nogil:
    # The k-th largest of n values, 1 <= k <= n, or a smaller bound that exactly k of them reach. No
    # value is negative or below `least`; what pads them up to a multiple of LANES is negative.
    # Floats that are not negative are ordered as their bits, which is what the search goes by. It
    # ends when the answer is known to within `apart`; above 1, the result may be too low.
    cdef Py_ssize_t padded = round_up_to_lanes(n)
    cdef uint64_t low = bits_of(least)
    cdef uint64_t high = bits_of(max_of_row(value, padded)) + 1
    cdef Py_ssize_t reach_low = n
    cdef Py_ssize_t reach_high = 0
    cdef Py_ssize_t count
    cdef uint64_t width, step
    cdef bint halve = False
    cdef double share
    cdef real bound
    set_bits(&bound, low)
    while reach_low > k and high - low > apart:
        width = high - low
        step = width // 2
        if not halve:
            # Interpolate, as if the values were spread evenly.
            share = (<double>(reach_low - k) - 0.5) / <double>(reach_low - reach_high)
            step = <uint64_t>(<double>width * share)
            step = 1 if step < 1 else width - 1 if step >= width else step
        set_bits(&bound, low + step)
        count = count_at_least(value, padded, bound)
        if count >= k:
            low += step
            reach_low = count
        else:
            high = low + step
            reach_high = count
        # If that did not even halve the interval they are not: bisect once.
        halve = not halve and high - low > width // 2
    set_bits(&bound, low)
    return bound
