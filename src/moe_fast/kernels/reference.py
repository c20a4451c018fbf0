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
    return math.ldexp(round(math.ldexp(value, -last_place)), last_place)


def load_balance(source_models: Sequence[int]) -> float:
    """Population standard deviation over mean of how often each model is used."""
    if len(source_models) == 0:
        return 0.0
    counts = [0] * (max(source_models) + 1)
    for model in source_models:
        counts[model] += 1
    mean = sum(counts) / len(counts)
    variance = 0.0
    for count in counts:
        variance += (count - mean) * (count - mean)
    return math.sqrt(variance / len(counts)) / mean
