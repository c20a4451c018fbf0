"""A plain twin of every kernel, written like its definition: slow, and easy to read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MULTIPLIER = 6364136223846793005
SEEDS = {"random": 0x5DEECE66D1A4F681, "balanced": 0xCAFEBABEDEADBEEF}


def gate_weights(hidden_dim: int, num_experts: int, init: str) -> npt.NDArray[np.float64]:
    """Router weights of shape `(hidden_dim, num_experts)`, one draw at a time."""
    weights = []
    state = SEEDS.get(init, 0)
    for _ in range(hidden_dim * num_experts):
        state = (state * MULTIPLIER + 1) % 2**64
        fraction = (state >> 33) / 4294967295.0
        if init == "random":
            weights.append((fraction * 2.0 - 1.0) * (1.0 / math.sqrt(hidden_dim)))
        elif init == "balanced":
            noise = (fraction * 2.0 - 1.0) * (0.01 / math.sqrt(hidden_dim))
            weights.append(1.0 / num_experts + noise)
        else:
            weights.append(1.0 / num_experts)
    return np.array(weights, dtype=np.float64).reshape(hidden_dim, num_experts)


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
