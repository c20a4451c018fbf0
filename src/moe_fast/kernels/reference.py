"""A plain twin of every kernel, written like its definition: slow, and easy to read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MULTIPLIER = 6364136223846793005
SEEDS = {"random": 0x5DEECE66D1A4F681, "balanced": 0xCAFEBABEDEADBEEF}
# Bits of the significand and exponent of the smallest positive number (IEEE 754, bfloat16).
FORMATS = {
    "float64": (53, -1074),
    "float32": (24, -149),
    "float16": (11, -24),
    "bfloat16": (8, -133),
}


def state_after(seed: int, steps: int) -> int:
    """The generator's state: `steps` multiply-adds are one geometric series."""
    power = pow(MULTIPLIER, steps, (MULTIPLIER - 1) << 64)
    return (power * seed + (power - 1) // (MULTIPLIER - 1)) % 2**64


def gate_weights(
    hidden_dim: int,
    num_experts: int,
    init: str,
    *,
    layer: int = 0,
    rows: tuple[int, int] | None = None,
    full_range: bool = False,
    remove_base: bool = False,
) -> npt.NDArray[np.float64]:
    """Router weights of shape `(hidden_dim, num_experts)`, one draw at a time."""
    start, stop = rows or (0, hidden_dim)
    weights = []
    first = (layer * hidden_dim + start) * num_experts
    state = state_after(SEEDS.get(init, 0), first)
    for _ in range((stop - start) * num_experts):
        state = (state * MULTIPLIER + 1) % 2**64
        fraction = (state >> (32 if full_range else 33)) / 4294967295.0
        base = 0.0 if remove_base else 1.0 / num_experts
        if init == "random":
            weights.append((fraction * 2.0 - 1.0) * (1.0 / math.sqrt(hidden_dim)))
        elif init == "balanced":
            noise = (fraction * 2.0 - 1.0) * (0.01 / math.sqrt(hidden_dim))
            weights.append(base + noise)
        else:
            weights.append(base)
    return np.array(weights, dtype=np.float64).reshape(stop - start, num_experts)


def nearest(value: float, dtype: str) -> float:
    """The number of `dtype` nearest to `value`, of two equally near the even one."""
    precision, smallest = FORMATS[dtype]
    _, exponent = math.frexp(value)
    last_place = max(exponent - precision, smallest)
    # Rounded to an integer, what is too small to keep would lose its sign.
    return math.copysign(math.ldexp(round(math.ldexp(value, -last_place)), last_place), value)


def converted(value: float, dtype: str) -> float:
    """`value` in `dtype`: the nearest number, infinity beyond the range, NaN as it is."""
    if not math.isfinite(value):
        return value
    precision, smallest = FORMATS[dtype]
    beyond = math.ldexp(1.0, 3 - precision - smallest)  # twice the greatest power of two
    number = nearest(value, dtype)
    return number if abs(number) < beyond else math.copysign(math.inf, value)


def load_balance(source_models: Sequence[int]) -> float:
    """Population standard deviation over mean of how often each model is used."""
    counts = [0] * (max(source_models, default=-1) + 1)
    for model in source_models:
        counts[model] += 1
    return coefficient_of_variation(counts)


def coefficient_of_variation(counts: Sequence[int]) -> float:
    """Population standard deviation over mean; 0.0 where nothing was counted."""
    if sum(counts) == 0:
        return 0.0
    mean = float(sum(counts)) / float(len(counts))
    variance = 0.0
    for count in counts:
        variance += (float(count) - mean) * (float(count) - mean)
    return math.sqrt(variance / float(len(counts))) / mean


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


def natural_logarithm(x: float) -> float:
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
    r = math.sqrt(-natural_logarithm(0.5 - abs(q))) - 1.6
    return math.copysign(polynomial(TAIL[0], r) / polynomial(TAIL[1], r), q)
