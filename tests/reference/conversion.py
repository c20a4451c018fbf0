"""Rounding to a float format."""

from __future__ import annotations

import math

# Bits of the significand and exponent of the smallest positive number (IEEE 754, bfloat16).
FORMATS = {
    "float64": (53, -1074),
    "float32": (24, -149),
    "float16": (11, -24),
    "bfloat16": (8, -133),
}


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
