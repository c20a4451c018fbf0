# Normal draws by inversion: SplitMix64 (Steele, Lea, Flood 2014), then algorithm AS 241 (Wichura
# 1988).
#
# The state of SplitMix64 grows by a constant, so any draw can be computed without the ones before
# it. The upper 32 bits u of a draw give the probability (u + 1/2) / 2^32, and the value is the
# normal quantile there. The third region of AS 241, below 1.4e-11, is never reached. Only + - * /
# and the square root are used, which IEEE 754 rounds the same everywhere.

cdef enum:
    BLOCK = 256


cdef inline uint64_t splitmix64(uint64_t state) noexcept nogil:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ULL
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBULL
    return state ^ (state >> 31)


cdef inline double central_quantile(double q) noexcept nogil:
    # The quantile of 1/2 + q for |q| at most 0.425.
    cdef double r = 0.180625 - q * q
    cdef double over = (
        ((((((2509.0809287301226727 * r + 33430.575583588128105) * r + 67265.770927008700853) * r
            + 45921.953931549871457) * r + 13731.693765509461125) * r
          + 1971.5909503065514427) * r + 133.14166789178437745) * r + 3.387132872796366608
    )
    cdef double under = (
        ((((((5226.495278852854561 * r + 28729.085735721942674) * r + 39307.89580009271061) * r
            + 21213.794301586595867) * r + 5394.1960214247511077) * r
          + 687.1870074920579083) * r + 42.313330701600911252) * r + 1.0
    )
    return q * over / under


cdef inline double tail_quantile(double q) noexcept nogil:
    # The quantile of 1/2 + q for |q| above 0.425.
    cdef double r = sqrt(-logarithm(0.5 - fabs(q))) - 1.6
    cdef double over = (
        ((((((7.7454501427834140764e-4 * r + 0.0227238449892691845833) * r
             + 0.24178072517745061177) * r + 1.27045825245236838258) * r
           + 3.64784832476320460504) * r + 5.7694972214606914055) * r
         + 4.6303378461565452959) * r + 1.42343711074968357734
    )
    cdef double under = (
        ((((((1.05075007164441684324e-9 * r + 5.475938084995344946e-4) * r
             + 0.0151986665636164571966) * r + 0.14810397642748007459) * r
           + 0.68976733498510000455) * r + 1.6763848301838038494) * r
         + 2.05319162663775882187) * r + 1.0
    )
    return -over / under if q < 0.0 else over / under


def fill_normal(
    float[::1] out not None, Py_ssize_t begin, Py_ssize_t end, uint64_t seed, uint64_t first,
    double scale,
):
    """Write `out[i]`, `i` from `begin` to `end`: draw `first + i`, times `scale`, as float32.

    The few values in the tails are computed separately: both formulas for all would take longer.
    """
    cdef uint64_t draw[BLOCK]
    cdef double q[BLOCK]
    cdef double tail[BLOCK]
    cdef float beyond[BLOCK]
    cdef float beyond_there[BLOCK + LANES]
    cdef int32_t far[BLOCK + LANES]
    cdef Py_ssize_t i, size, count
    with nogil:
        while begin < end:
            size = min(<Py_ssize_t>BLOCK, end - begin)
            # Apart, for where no vector multiplies 64 bits, this loop has none.
            for i in range(size):
                draw[i] = seed + (first + <uint64_t>(begin + i) + 1) * 0x9E3779B97F4A7C15ULL
                draw[i] = splitmix64(draw[i])
            for i in range(size):
                q[i] = (double_of_integer(draw[i] >> 32) - 2147483647.5) * (1.0 / 4294967296.0)
                out[begin + i] = <float>(central_quantile(q[i]) * scale)
                beyond[i] = <float>(fabs(q[i]) - 0.425)  # rounding does not change its sign
            for i in range(size, BLOCK):
                beyond[i] = 0
            count = collect_at_least(beyond, BLOCK, <float>1e-30, 0, far, beyond_there)
            for i in range(count):
                tail[i] = q[far[i]]
            for i in range(count):
                tail[i] = tail_quantile(tail[i]) * scale
            for i in range(count):
                out[begin + far[i]] = <float>tail[i]
            begin += size
