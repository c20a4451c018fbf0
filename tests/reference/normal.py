"""Normal draws, one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence


def splitmix64(seed: int, index: int) -> int:
    """Draw `index` of the stream that starts from `seed` (Steele, Lea, Flood 2014)."""
    state = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


# Algorithm AS 241 (Wichura 1988): numerators and denominators, highest power first.
CENTRE = (
    (
        2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4,
        4.5921953931549871457e4, 1.3731693765509461125e4, 1.9715909503065514427e3,
        1.3314166789178437745e2, 3.3871328727963666080,
    ),
    (
        5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4,
        2.1213794301586595867e4, 5.3941960214247511077e3, 6.8718700749205790830e2,
        4.2313330701600911252e1, 1.0,
    ),
)  # fmt: skip
TAIL = (
    (
        7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
        1.27045825245236838258, 3.64784832476320460504, 5.76949722146069140550,
        4.63033784615654529590, 1.42343711074968357734,
    ),
    (
        1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2,
        1.48103976427480074590e-1, 6.89767334985100004550e-1, 1.67638483018380384940,
        2.05319162663775882187, 1.0,
    ),
)  # fmt: skip


def polynomial(coefficients: Sequence[float], x: float) -> float:
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def logarithm(x: float) -> float:
    """From the series of the inverse hyperbolic tangent, whose bits no library decides."""
    m, k = math.frexp(x)  # m from 1/2 to 1
    if m < math.sqrt(0.5):
        m, k = m * 2.0, k - 1
    s = (m - 1.0) / (m + 1.0)
    series = polynomial([1.0 / n for n in range(21, 0, -2)], s * s)
    return k * math.log(2.0) + 2.0 * s * series


def normal(seed: int, index: int) -> float:
    """Draw `index` of a standard normal distribution, from a stream of its own for each seed."""
    q = ((splitmix64(seed, index) >> 32) + 0.5) / 2**32 - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        return q * polynomial(CENTRE[0], r) / polynomial(CENTRE[1], r)
    r = math.sqrt(-logarithm(0.5 - abs(q))) - 1.6
    return math.copysign(polynomial(TAIL[0], r) / polynomial(TAIL[1], r), q)
