# The reference's linear congruential generator and what it makes of each state.

ctypedef fused Value:
    double
    float
    uint16_t  # the bits of a float16 or a bfloat16

cdef struct Jump:
    uint64_t multiplier
    uint64_t increment


cdef enum:
    BLOCK = 256


cdef inline uint64_t jumped(uint64_t state, Jump jump) noexcept nogil:
    return state * jump.multiplier + jump.increment


cdef Jump jump_of(uint64_t steps) noexcept nogil:
    """`steps` steps of the generator as one multiply-add (Brown 1994)."""
    cdef Jump jump = Jump(1, 0)
    cdef Jump power = Jump(6364136223846793005, 1)
    while steps:
        if steps & 1:
            jump.increment = jumped(jump.increment, power)
            jump.multiplier *= power.multiplier
        power.increment = jumped(power.increment, power)
        power.multiplier *= power.multiplier
        steps >>= 1
    return jump


cdef uint16_t float16_bits(double value) noexcept nogil:
    cdef double magnitude = fabs(value)
    cdef int exponent
    cdef uint64_t significand
    frexp(magnitude, &exponent)
    exponent = max(exponent - 1, -14) if magnitude else -14
    # At 2^52 the last place of a double is 1: the sum rounds to an integer, ties to even.
    significand = <uint64_t>(ldexp(magnitude, 10 - exponent) + 4503599627370496.0
                             - 4503599627370496.0)
    return <uint16_t>((<uint64_t>signbit(value) << 15) + ((exponent + 14) << 10) + significand)


cdef uint16_t bfloat16_bits(double value) noexcept nogil:
    cdef uint64_t bits
    cdef float rounded
    cdef uint32_t rounded_bits
    memcpy(&bits, &value, 8)
    bits += 0xFFFFFFFFFFFULL + ((bits >> 45) & 1)
    bits &= ~0x1FFFFFFFFFFFULL
    memcpy(&value, &bits, 8)
    rounded = <float>value
    memcpy(&rounded_bits, &rounded, 4)
    return rounded_bits >> 16


cdef void fill_row(
    Value *out, Py_ssize_t size, bint brain, uint64_t state, Jump step, int shift,
    double base, double scale,
) noexcept nogil:
    cdef Py_ssize_t i
    cdef double f
    for i in range(size):
        f = <double>(state >> shift) / 4294967295.0
        f = base + (f * 2.0 - 1.0) * scale
        if Value is uint16_t:
            out[i] = bfloat16_bits(f) if brain else float16_bits(f)
        else:
            out[i] = <Value>f
        state = jumped(state, step)


cdef void fill(
    Value[::1] out, bint brain, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t row_length,
    uint64_t seed, uint64_t first, uint64_t row_step, uint64_t column_step, bint full_range,
    double base, double scale,
) noexcept nogil:
    cdef Jump step = jump_of(column_step)
    cdef Py_ssize_t row, column, size
    cdef uint64_t draw
    while begin < end:
        row = begin // row_length
        column = begin - row * row_length
        size = min(row_length - column, end - begin)
        draw = first + <uint64_t>row * row_step + <uint64_t>column * column_step
        fill_row(
            &out[begin], size, brain, jumped(seed, jump_of(draw + 1)), step,
            32 if full_range else 33, base, scale,
        )
        begin += size


def fill_float64(
    double[::1] out not None, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t row_length,
    uint64_t seed, uint64_t first, uint64_t row_step, uint64_t column_step, bint full_range,
    double base, double scale,
):
    """Write `out[begin:end]` of a matrix with rows of `row_length`, rounded once to its dtype.

    The value in row `i`, column `j` is `base + (f * 2 - 1) * scale` with `f` the top 31 bits (32
    with `full_range`), over 2^32 - 1, of the generator's state. That started from `seed`, and made
    `first + i * row_step + j * column_step` draws before this one.
    """
    with nogil:
        fill(
            out, False, begin, end, row_length, seed, first, row_step, column_step, full_range,
            base, scale,
        )


def fill_float32(
    float[::1] out not None, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t row_length,
    uint64_t seed, uint64_t first, uint64_t row_step, uint64_t column_step, bint full_range,
    double base, double scale,
):
    """As `fill_float64`."""
    with nogil:
        fill(
            out, False, begin, end, row_length, seed, first, row_step, column_step, full_range,
            base, scale,
        )


def fill_float16(
    uint16_t[::1] out not None, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t row_length,
    uint64_t seed, uint64_t first, uint64_t row_step, uint64_t column_step, bint full_range,
    double base, double scale,
):
    """As `fill_float64`, as the bits of float16."""
    with nogil:
        fill(
            out, False, begin, end, row_length, seed, first, row_step, column_step, full_range,
            base, scale,
        )


def fill_bfloat16(
    uint16_t[::1] out not None, Py_ssize_t begin, Py_ssize_t end, Py_ssize_t row_length,
    uint64_t seed, uint64_t first, uint64_t row_step, uint64_t column_step, bint full_range,
    double base, double scale,
):
    """As `fill_float64`, as the bits of bfloat16."""
    with nogil:
        fill(
            out, True, begin, end, row_length, seed, first, row_step, column_step, full_range,
            base, scale,
        )
