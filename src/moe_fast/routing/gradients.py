"""Routing backwards, on arrays: what a framework's automatic differentiation asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.routing.router import (
    LOGITS_PER_THREAD,
    Floats,
    Indices,
    Rule,
    readable,
    specialisation,
)
from moe_fast.threads import share


def pull_back_weights(
    logits: npt.NDArray[Any], rule: Rule, chosen: Indices, of_weights: Floats, threads: int
) -> Floats:
    """The gradient by the logits of tokens, `[T, E]`, given that by their weights, `[T, k]`.

    `chosen` are their experts before any was dropped; what was dropped has the gradient 0.
    """
    rows, encoding, dtype = readable(logits, rule.num_experts)
    gradient: Floats = np.empty(logits.shape, dtype)
    kernel = kernels.compiled.pull_back_weights[specialisation(dtype)]

    def pull_back(start: int, stop: int) -> None:
        kernel(
            rows, encoding, rule.is_sigmoid, rule.norm_topk_prob, rule.routed_scaling_factor,
            chosen, of_weights, gradient, start, stop,
        )  # fmt: skip

    share(pull_back, len(rows), threads, grain=grain(gradient))
    return gradient


def pull_back_choice(
    logits: npt.NDArray[Any], rule: Rule, chosen: Indices, of_weights: Floats, threads: int
) -> Floats:
    """The same for expert choice: `chosen` and `of_weights` are `[E, C]`."""
    gradient = np.zeros(logits.shape, of_weights.dtype)
    experts = np.arange(rule.num_experts)[:, np.newaxis]
    gradient[chosen, experts] = of_weights * rule.routed_scaling_factor
    return pull_back_scores(logits, gradient, threads, is_sigmoid=rule.is_sigmoid)


def pull_back_probabilities(
    logits: npt.NDArray[Any], rule: Rule, of_means: npt.NDArray[Any], threads: int
) -> Floats:
    """The same for the mean probability of each expert, `[E]`."""
    gradient = np.empty(logits.shape, readable(logits, rule.num_experts)[2])
    gradient[:] = (of_means / max(1, len(logits))).astype(gradient.dtype)
    return pull_back_scores(logits, gradient, threads, is_sigmoid=rule.is_sigmoid, normalised=True)


def pull_back_squares(logits: npt.NDArray[Any], of_mean: float, threads: int) -> Floats:
    """The same for the mean of the squared log-sum-exp."""
    gradient = np.zeros(logits.shape, readable(logits, logits.shape[1])[2])
    of_square = 2 * of_mean / max(1, len(logits))
    return pull_back_scores(logits, gradient, threads, of_square=of_square)


def pull_back_scores(
    logits: npt.NDArray[Any],
    gradient: Floats,
    threads: int,
    *,
    is_sigmoid: bool = False,
    normalised: bool = False,
    of_square: float = 0.0,
) -> Floats:
    """Make of the gradient by the scores, in place, that by the logits."""
    rows, encoding, dtype = readable(logits, logits.shape[1])
    kernel = kernels.compiled.pull_back_scores[specialisation(dtype)]

    def pull_back(start: int, stop: int) -> None:
        kernel(rows, encoding, is_sigmoid, normalised, of_square, gradient, start, stop)

    share(pull_back, len(rows), threads, grain=grain(gradient))
    return gradient


def grain(gradient: Floats) -> int:
    num_experts: int = gradient.shape[1]
    return LOGITS_PER_THREAD // num_experts + 1
