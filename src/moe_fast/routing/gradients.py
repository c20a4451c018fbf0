"""Vector-Jacobian products of routing, on arrays: what automatic differentiation asks for.

Each function takes the gradient by a result of routing and returns that by the logits, `[T, E]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.routing.arrays import get_c_type, view_rows
from moe_fast.routing.choose import get_tokens_per_thread
from moe_fast.routing.options import Rule
from moe_fast.routing.result import Floats, Indices
from moe_fast.threads import share


def pull_back_weights(
    logits: npt.NDArray[Any],
    rule: Rule,
    indices: Indices,
    weight_gradient: Floats,
    threads: int,
) -> Floats:
    """From the gradient by the weights of top-k or Switch, `[T, k]`.

    `indices` are the experts before any was dropped; what was dropped has the gradient 0.
    """
    rows = view_rows(logits, rule.num_experts)
    gradient: Floats = np.empty(logits.shape, rows.dtype)
    kernel = kernels.compiled.pull_back_weights[get_c_type(rows.dtype)]

    def pull_back(start: int, stop: int) -> None:
        kernel(
            rows.bytes, rows.encoding,
            rule.is_sigmoid, rule.norm_topk_prob, rule.routed_scaling_factor,
            indices, weight_gradient, gradient, start, stop,
        )  # fmt: skip

    share(pull_back, len(logits), threads, grain=get_tokens_per_thread(rule.num_experts))
    return gradient


def pull_back_choice(
    logits: npt.NDArray[Any],
    rule: Rule,
    indices: Indices,
    weight_gradient: Floats,
    threads: int,
) -> Floats:
    """From the gradient by the weights of expert choice, `[E, C]`; `indices` are the tokens."""
    gradient = np.zeros(logits.shape, weight_gradient.dtype)
    experts = np.arange(rule.num_experts)[:, np.newaxis]
    gradient[indices, experts] = weight_gradient * rule.routed_scaling_factor
    return pull_back_scores(logits, gradient, threads, is_sigmoid=rule.is_sigmoid)


def pull_back_means(
    probabilities: Floats,
    log_sums: npt.NDArray[np.float64],
    mean_gradient: npt.NDArray[Any],
    square_gradient: float,
    threads: int,
) -> Floats:
    """From the gradients by the mean probabilities, `[E]`, and by the mean squared log-sum-exp.

    Of softmax; `probabilities`, `[T, E]`, and `log_sums` are those of each token.
    """
    num_tokens, num_experts = probabilities.shape
    gradient = np.empty_like(probabilities)
    of_mean = (mean_gradient / max(1, num_tokens)).astype(gradient.dtype)
    of_square = 2 * square_gradient / max(1, num_tokens)
    kernel = kernels.compiled.pull_back_means[get_c_type(gradient.dtype)]

    def pull_back(start: int, stop: int) -> None:
        kernel(probabilities, log_sums, of_mean, of_square, gradient, start, stop)

    share(pull_back, num_tokens, threads, grain=get_tokens_per_thread(num_experts))
    return gradient


def pull_back_probabilities(
    logits: npt.NDArray[Any], rule: Rule, mean_gradient: npt.NDArray[Any], threads: int
) -> Floats:
    """From the gradient by the mean probability of each expert, `[E]`."""
    gradient = np.empty(logits.shape, view_rows(logits, rule.num_experts).dtype)
    gradient[:] = (mean_gradient / max(1, len(logits))).astype(gradient.dtype)
    return pull_back_scores(logits, gradient, threads, is_sigmoid=rule.is_sigmoid, normalised=True)


def pull_back_squares(logits: npt.NDArray[Any], mean_gradient: float, threads: int) -> Floats:
    """From the gradient by the mean of the squared log-sum-exp."""
    gradient = np.zeros(logits.shape, view_rows(logits, logits.shape[1]).dtype)
    square_gradient = 2 * mean_gradient / max(1, len(logits))
    return pull_back_scores(logits, gradient, threads, square_gradient=square_gradient)


def pull_back_scores(
    logits: npt.NDArray[Any],
    gradient: Floats,
    threads: int,
    *,
    is_sigmoid: bool = False,
    normalised: bool = False,
    square_gradient: float = 0.0,
) -> Floats:
    """From the gradient by the scores, `[T, E]`, which is written over and returned."""
    num_experts = logits.shape[1]
    rows = view_rows(logits, num_experts)
    kernel = kernels.compiled.pull_back_scores[get_c_type(rows.dtype)]

    def pull_back(start: int, stop: int) -> None:
        kernel(
            rows.bytes, rows.encoding, is_sigmoid, normalised, square_gradient,
            gradient, start, stop,
        )  # fmt: skip

    share(pull_back, len(logits), threads, grain=get_tokens_per_thread(num_experts))
    return gradient
