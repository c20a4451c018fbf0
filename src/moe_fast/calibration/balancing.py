"""Rows of a router that send real tokens evenly over the experts.

Trained models have a direction that all tokens share. It adds a number to every expert's logit, the
same for all tokens, and these numbers decide. Rows without it, and small offsets found by counting,
spread the tokens. `inputs`, `(T, H)`, are what the router reads of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moe_fast.config import MoeConfig
from moe_fast.matmul import matmul
from moe_fast.routing.router import Router
from moe_fast.routing.sharpness import measure_logit_std

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
ROUNDS = 80
STEP, DECAY = 0.3, 0.97  # of the offsets, in standard deviations of the logits
PIECE = 256  # tokens that are of one text, or mostly
MOST_TOPICS = 8  # at most one of so many directions is a topic
LEAST_LOAD = 0.01  # of an even one, below which a logarithm would leap


def mean_input(inputs: Floats) -> Doubles:
    """The direction that all tokens share, `(H,)`."""
    mean: Doubles = inputs.mean(axis=0, dtype=np.float64)
    return mean


def remove_direction(rows: Floats, direction: Doubles) -> Floats:
    """The rows without their part along `direction`: `r - (r u) u`, u of unit length."""
    length = np.linalg.norm(direction)
    if not length > 0:
        return rows
    unit = direction / length
    wide = rows.astype(np.float64)
    return (wide - np.outer(matmul(wide, unit), unit)).astype(np.float32)


def topic_directions(inputs: Floats) -> Doubles:
    """The directions in which pieces of `PIECE` tokens differ as wholes, `(n, H)`, orthonormal.

    Rows that do not read them send each text evenly to all experts, and so other texts, too. They
    are those of the pieces' means, greatest first, at right angles to the mean of all; at most an
    eighth of all directions.
    """
    number, width = len(inputs) // PIECE, inputs.shape[1]
    means = inputs[: number * PIECE].reshape(number, PIECE, width).mean(axis=1, dtype=np.float64)
    if number < 2:
        return np.zeros((0, width))
    centred = (means - means.mean(axis=0)).astype(np.float32)
    beside = remove_direction(centred, mean_input(inputs)).astype(np.float64)
    _, sizes, directions = np.linalg.svd(beside, full_matrices=False)
    real = sizes > 1e-6 * max(sizes[0], 1e-30)
    found: Doubles = directions[real][: width // MOST_TOPICS]
    return found


def remove_span(rows: Floats, directions: Doubles) -> Floats:
    """The rows without their parts along orthonormal `directions`, `(n, H)`."""
    wide = rows.astype(np.float64)
    kept: Floats = (wide - matmul(matmul(wide, directions.T), directions)).astype(np.float32)
    return kept


def balance(
    rows: Floats, inputs: Floats, top_k: int, groups: Sequence[Sequence[int]] = ()
) -> Floats:
    """The rows with offsets along the mean input that even out the load.

    `x m / |m|^2`, m being the mean input, is about 1 for every token, so that `c m / |m|^2` moves a
    row's logits by about c. `find_offsets` finds the c; the rows come back scaled to logits of unit
    spread. With `groups`, loads are evened within each group of experts alone.
    """
    spread = measure_logit_std(rows, inputs)
    mean = mean_input(inputs)
    square = float(matmul(mean, mean))
    if not (spread > 0 and square > 0):
        return rows
    scaled = rows / np.float32(spread)
    along = (mean / square).astype(np.float32)
    offsets = find_offsets(matmul(inputs, scaled.T), matmul(inputs, along), top_k, groups)
    return (scaled + np.outer(offsets, along)).astype(np.float32)


def find_offsets(
    logits: Floats,
    factors: Floats,
    top_k: int,
    groups: Sequence[Sequence[int]] = (),
    rounds: int = ROUNDS,
) -> Doubles:
    """One number an expert that, times each token's factor, added to its logits, evens the load.

    Each round takes `STEP * DECAY^i * log(load / even load)` from it. The offsets of the most even
    round are returned, `(E,)`. `logits` are `(T, E)`, of unit spread, `factors` are `(T,)`.
    """
    num_experts = logits.shape[1]
    choose = Router(MoeConfig(num_experts, min(top_k, num_experts)))
    offsets = np.zeros(num_experts)
    best, least = offsets, np.inf
    for i in range(rounds):
        moved = logits + np.outer(factors, offsets).astype(np.float32)
        load = choose(moved).tokens_per_expert.astype(np.float64)
        even = np.full(num_experts, load.mean())
        for group in groups:
            even[list(group)] = max(load[list(group)].mean(), 1e-9)
        relative = load / even
        unevenness = float(np.square(relative - 1).sum())
        if unevenness < least:
            best, least = offsets, unevenness
        offsets = offsets - STEP * DECAY**i * np.log(np.maximum(relative, LEAST_LOAD))
        for group in groups or (range(num_experts),):
            offsets[list(group)] -= offsets[list(group)].mean()
    return best
