"""Which neurons are drawn anew, and as what: Drop-Upcycling by its definition."""

from __future__ import annotations

import math
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from reference.normal import normal, splitmix64


def stream(seed: int, weight: str) -> int:
    return int.from_bytes(sha256(f"{seed} {weight}".encode()).digest()[:8], "little")


def shuffled(count: int, seed: int) -> list[int]:
    """The numbers below `count`, sorted by the draws of a stream."""
    return sorted(range(count), key=lambda index: splitmix64(seed, index))


def redrawn(
    rows: npt.NDArray[np.float32],
    seed: int,
    layer: int,
    expert: int,
    role: str,
    part: float,
    separate: bool = False,
) -> npt.NDArray[np.float64]:
    """A matrix of an expert, one row a neuron, in float64 before it is rounded.

    The draws follow each other as the weights lie in the file, where a neuron of `down_proj` is a
    column.
    """  # fmt: skip
    count = len(rows)
    name = f"{layer} {expert} redrawn"
    chosen = shuffled(count, stream(seed, f"{name} {role} neurons" if separate else name))
    chosen = sorted(chosen[: int(part * count)])
    old = rows[chosen].astype(np.float64)
    mean = math.fsum(old.flat) / old.size
    deviation = math.sqrt(math.fsum(((old - mean) ** 2).flat) / old.size)
    draws = [normal(stream(seed, f"{name} {role}"), i) * deviation for i in range(old.size)]
    new = np.array(draws, np.float64)
    new = new.reshape(old.shape[::-1]).T if role == "down_proj" else new.reshape(old.shape)
    result = rows.astype(np.float64)
    result[chosen] = new + mean
    return result
