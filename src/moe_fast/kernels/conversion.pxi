# Rounding one float format to another: to nearest, ties to even; a NaN stays one, with its sign and
# the upper bits of its payload. By integer operations, except for subnormals of float16, so that
# every level and every floating-point mode of the processor gives the same bits.
#
# A conversion to a narrower format counts the finite numbers that overflowed to infinity, in 32
# bits: it takes fewer than 2^32 numbers at a time.

cdef enum:
    # Magnitudes of float32: infinity, and the smallest that round to infinity.
    INFINITE = 0x7F800000
    INFINITE_AS_BFLOAT16 = 0x7F7F8000
    INFINITE_AS_FLOAT16 = 0x477FF000


cdef inline float widen_bfloat16(uint16_t h) noexcept nogil:
    return float_of_bits(<uint32_t>h << 16)


cdef inline float widen_float16(uint16_t h) noexcept nogil:
    # By integers: a processor that flushes subnormals to zero must read the same number.
    cdef uint32_t magnitude = h & 0x7FFF
    cdef uint32_t sign = <uint32_t>(h & 0x8000) << 16
    cdef uint32_t rebias = 224 if magnitude >= 0x7C00 else 112
    cdef float normal = float_of_bits(((magnitude << 13) + (rebias << 23)) | sign)
    cdef float small = <float><int32_t>magnitude * <float>5.9604644775390625e-8
    small = -small if sign else small
    return small if magnitude < 0x400 else normal


cdef inline uint32_t overflows(uint32_t bits, int32_t least) noexcept nogil:
    cdef int32_t magnitude = bits & <uint32_t>0x7FFFFFFF
    return (magnitude >= least) & (magnitude < INFINITE)


cdef inline uint32_t became_infinite(uint32_t bits, int32_t least) noexcept nogil:
    # As `overflows`, of a product, which may be infinite before it is rounded.
    cdef int32_t magnitude = bits & <uint32_t>0x7FFFFFFF
    return (magnitude >= least) & (magnitude <= INFINITE)


cdef inline uint32_t select(bint condition, uint32_t yes, uint32_t no) noexcept nogil:
    # By masks: GCC vectorises them, and does not vectorise a conditional.
    cdef uint32_t mask = -<uint32_t>condition
    return (yes & mask) | (no & ~mask)


cdef inline uint16_t round_to_bfloat16(uint32_t bits) noexcept nogil:
    cdef int32_t magnitude = bits & <uint32_t>0x7FFFFFFF
    cdef uint32_t rounded = (bits + <uint32_t>0x7FFF + ((bits >> 16) & 1)) >> 16
    cdef uint32_t quiet = (bits >> 16) | <uint32_t>0x40
    return <uint16_t>select(magnitude > INFINITE, quiet, rounded)


cdef inline uint16_t round_to_float16(uint32_t bits) noexcept nogil:
    cdef int32_t magnitude = bits & <uint32_t>0x7FFFFFFF
    cdef uint32_t odd = (bits >> 13) & 1
    cdef uint32_t normal = (magnitude + <uint32_t>0xFFF + odd - (<uint32_t>112 << 23)) >> 13
    # At 1/2 the last place of a float32 is 2^-24, as that of a subnormal float16: the sum rounds.
    cdef float sum = float_of_bits(magnitude) + <float>0.5
    cdef uint32_t small = bits_of_float(sum) - <uint32_t>0x3F000000
    cdef uint32_t quiet = <uint32_t>0x7E00 | ((bits >> 13) & <uint32_t>0x3FF)
    cdef uint32_t result = select(magnitude < 0x38800000, small, normal)
    result = select(magnitude >= INFINITE_AS_FLOAT16, 0x7C00, result)
    result = select(magnitude > INFINITE, quiet, result)
    return <uint16_t>(result | ((bits >> 16) & <uint32_t>0x8000))


def float32_to_bfloat16(const uint32_t[::1] values not None, uint16_t[::1] out not None):
    """Write the bits of `values` as bfloat16; return how many finite ones became infinite."""
    cdef Py_ssize_t i
    cdef uint32_t infinite = 0
    with nogil:
        for i in range(values.shape[0]):
            out[i] = round_to_bfloat16(values[i])
            infinite += overflows(values[i], INFINITE_AS_BFLOAT16)
    return infinite


def float32_to_float16(const uint32_t[::1] values not None, uint16_t[::1] out not None):
    """Write the bits of `values` as float16; return how many finite ones became infinite."""
    cdef Py_ssize_t i
    cdef uint32_t infinite = 0
    with nogil:
        for i in range(values.shape[0]):
            out[i] = round_to_float16(values[i])
            infinite += overflows(values[i], INFINITE_AS_FLOAT16)
    return infinite


def bfloat16_to_float16(const uint16_t[::1] values not None, uint16_t[::1] out not None):
    """As `float32_to_float16`, of the bits of bfloat16."""
    cdef Py_ssize_t i
    cdef uint32_t bits, infinite = 0
    with nogil:
        for i in range(values.shape[0]):
            bits = <uint32_t>values[i] << 16
            out[i] = round_to_float16(bits)
            infinite += overflows(bits, INFINITE_AS_FLOAT16)
    return infinite


def float16_to_bfloat16(const uint16_t[::1] values not None, uint16_t[::1] out not None):
    """Write the bits of float16 as bfloat16, which holds all of its range: returns 0."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(values.shape[0]):
            out[i] = round_to_bfloat16(bits_of_float(widen_float16(values[i])))
    return 0


def float16_to_float32(const uint16_t[::1] values not None, uint32_t[::1] out not None):
    """Write the bits of float16 as float32, which holds every number of it: returns 0."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(values.shape[0]):
            out[i] = bits_of_float(widen_float16(values[i]))
    return 0


def bfloat16_to_float32(const uint16_t[::1] values not None, uint32_t[::1] out not None):
    """Write the bits of bfloat16 as float32, which holds every number of it: returns 0."""
    cdef Py_ssize_t i
    with nogil:
        for i in range(values.shape[0]):
            out[i] = <uint32_t>values[i] << 16
    return 0


def scale_bfloat16(
    const uint16_t[::1] values not None, float factor, uint16_t[::1] out not None,
):
    """Write `values * factor`, rounded once; return how many finite ones became infinite."""
    cdef Py_ssize_t i
    cdef uint32_t bits, finite, infinite = 0
    with nogil:
        for i in range(values.shape[0]):
            bits = bits_of_float(widen_bfloat16(values[i]) * factor)
            out[i] = round_to_bfloat16(bits)
            finite = (values[i] & 0x7FFF) < 0x7F80
            infinite += became_infinite(bits, INFINITE_AS_BFLOAT16) & finite
    return infinite


def scale_float16(
    const uint16_t[::1] values not None, float factor, uint16_t[::1] out not None,
):
    """As `scale_bfloat16`, of float16."""
    cdef Py_ssize_t i
    cdef uint32_t bits, finite, infinite = 0
    with nogil:
        for i in range(values.shape[0]):
            bits = bits_of_float(widen_float16(values[i]) * factor)
            out[i] = round_to_float16(bits)
            finite = (values[i] & 0x7FFF) < 0x7C00
            infinite += became_infinite(bits, INFINITE_AS_FLOAT16) & finite
    return infinite
