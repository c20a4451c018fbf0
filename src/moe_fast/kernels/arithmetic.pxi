# Exponential, sigmoid and logarithm: argument reduction, then a polynomial, of minimax coefficients
# by the Remez exchange algorithm for the exponential. A library's functions differ between
# platforms; these do not, and compilers vectorise them.

ctypedef fused real:
    float
    double

cdef extern from "c/bits.h":
    float float_of_bits(uint32_t bits) noexcept nogil
    uint32_t bits_of_float(float x) noexcept nogil
    double double_of_bits(uint64_t bits) noexcept nogil
    uint64_t bits_of_double(double x) noexcept nogil
    int lowest_bit(uint64_t bits) noexcept nogil
    int number_of_bits(uint32_t bits) noexcept nogil

cdef extern from "c/arithmetic.h":
    float times_power_of_2_float(float p, float shifted) noexcept nogil
    double times_power_of_2_double(double p, double shifted) noexcept nogil
    float subtract_product_float(float x, float n, float c) noexcept nogil
    double subtract_product_double(double x, double n, double c) noexcept nogil
    double INFINITY


cdef inline real exponential(real x) noexcept nogil:
    # e^x for x <= 0, within 1.5 units of the last place; 0 where the result would be denormal.
    # x = n ln 2 + r, e^r = 1 + r + r^2 q(r); adding 1.5 * 2^23 (2^52) rounds n to an integer.
    cdef real shifted, n, r, square, q
    if real is float:
        shifted = x * <float>1.4426950408889634 + <float>12582912.0
        n = shifted - <float>12582912.0
        r = subtract_product_float(x, n, <float>0.693359375)
        r = r - n * <float>-2.1219444005469058e-4
        square = r * r
        q = <float>0.008368851117 * r + <float>0.04166840116
        q = <float>0.001381431631 * square + q
        q = q * square + (<float>0.1666651952 * r + <float>0.4999999337)
        q = times_power_of_2_float(q * square + r + <float>1.0, shifted)
        return q if x >= <float>-87.33654 else <float>0.0
    else:
        shifted = x * 1.4426950408889634 + 6755399441055744.0
        n = shifted - 6755399441055744.0
        r = subtract_product_double(x, n, 0.693147180369123816490)
        r = r - n * 1.90821492927058770002e-10
        q = 2.49998636902669393e-8 * r + 2.7630523460063995e-7
        q = q * r + 2.75575883995468472e-6
        q = q * r + 2.48014923884029701e-5
        q = q * r + 1.98412695027710073e-4
        q = q * r + 1.38888889442490056e-3
        q = q * r + 8.33333333349690707e-3
        q = q * r + 4.16666666665281046e-2
        q = q * r + 1.66666666666664077e-1
        q = q * r + 5.00000000000001083e-1
        q = times_power_of_2_double(q * r * r + r + 1.0, shifted)
        return q if x >= -708.3964185322641 else 0.0


cdef inline real sigmoid(real x) noexcept nogil:
    cdef real magnitude = x if x < <real>0.0 else -x
    cdef real e = exponential(magnitude)
    cdef real numerator = e if x < <real>0.0 else <real>1.0
    return numerator / (<real>1.0 + e)


cdef inline double double_of_integer(uint64_t value) noexcept nogil:
    # An integer below 2^52; unlike a cast, every SIMD level can do this.
    return double_of_bits(value | <uint64_t>0x4330000000000000) - 4503599627370496.0


cdef inline double logarithm(double x) noexcept nogil:
    # ln x for normal x > 0. x = 2^k m with m from sqrt(1/2) to sqrt(2), and
    # ln m = 2 artanh((m - 1) / (m + 1)), by its Taylor series.
    cdef uint64_t bits = (
        bits_of_double(x) + <uint64_t>0x3FF0000000000000 - <uint64_t>0x3FE6A09E667F3BCD
    )
    cdef double k = double_of_integer(bits >> 52) - 1023.0
    cdef double m = double_of_bits(
        (bits & <uint64_t>0xFFFFFFFFFFFFF) + <uint64_t>0x3FE6A09E667F3BCD
    )
    cdef double s = (m - 1.0) / (m + 1.0)
    cdef double z = s * s
    cdef double series = 1.0 / 21.0
    series = series * z + 1.0 / 19.0
    series = series * z + 1.0 / 17.0
    series = series * z + 1.0 / 15.0
    series = series * z + 1.0 / 13.0
    series = series * z + 1.0 / 11.0
    series = series * z + 1.0 / 9.0
    series = series * z + 1.0 / 7.0
    series = series * z + 1.0 / 5.0
    series = series * z + 1.0 / 3.0
    series = series * z + 1.0
    return k * 0.6931471805599453 + 2.0 * s * series
