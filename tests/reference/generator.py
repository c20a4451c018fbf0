"""Router weights, one draw at a time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

MULTIPLIER = 6364136223846793005
SEEDS = {"random": 0x5DEECE66D1A4F681, "balanced": 0xCAFEBABEDEADBEEF}


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
