"""How evenly source models are used."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
