"""Vector-Jacobian products of routing, on arrays: what automatic differentiation asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.config import RoutingMethod
from moe_fast.routing.arrays import Rows, get_c_type, view_rows
from moe_fast.routing.choose import get_tokens_per_thread
from moe_fast.routing.options import Rule
from moe_fast.routing.result import Floats, Indices, Softmax
from moe_fast.threads import share


class Choice(NamedTuple):
    """Who was chosen, before any was dropped, and the gradient by the weights, 0 where dropped.

    Both have the shape `[T, k]`, of experts, or for expert choice `[E, C]`, of tokens.
    """

    indices: Indices
    weight_gradient: Floats


def pull_back(
    logits: npt.NDArray[Any],
    rule: Rule,
    threads: int,
    *,
    choice: Choice | None = None,
    mean_gradient: npt.NDArray[np.float64] | None = None,
    square_gradient: float = 0.0,
    softmax: Softmax | None = None,
) -> Floats:
    """From the gradients by weights, mean probabilities and so on to that by the logits, `[T, E]`.

    `mean_gradient`, `[E]`, is that by the mean probability of each expert; `square_gradient` that
    by the mean squared log-sum-exp. What is not given counts as 0, and `softmax` is computed.
    """
    rows = view_rows(logits, rule.num_experts)
    num_tokens = max(1, len(logits))
    of_square = 2 * square_gradient / num_tokens
    of_mean = None
    if mean_gradient is not None:
        of_mean = (mean_gradient / num_tokens).astype(rows.dtype)
    by_expert = rule.method is RoutingMethod.EXPERT_CHOICE
    over_all = not (by_expert or rule.is_sigmoid or rule.norm_topk_prob)
    parts = []
    if of_mean is not None and rule.is_sigmoid:
        each = np.tile(of_mean, (len(logits), 1))
        parts.append(pull_back_sigmoid(rows, threads, each, normalised=True))
        of_mean = None
    # Weights over all experts are probabilities themselves: one pass has their gradient, too.
    if of_mean is not None or of_square != 0 or (choice and over_all):
        if of_mean is None:
            of_mean = np.zeros(rule.num_experts, rows.dtype)
        parts.append(
            pull_back_softmax(
                rows, threads, np.empty(logits.shape, rows.dtype), of_mean, of_square,
                choice if over_all else None, rule.routed_scaling_factor, softmax,
            )
        )  # fmt: skip
    if choice and by_expert:
        parts.append(pull_back_tokens(rows, rule, threads, choice))
    gradient = reduce(np.add, parts) if parts else None
    if choice and not (by_expert or over_all):
        return pull_back_chosen(rows, rule, threads, choice, gradient)
    return np.zeros(logits.shape, rows.dtype) if gradient is None else gradient


def pull_back_chosen(
    rows: Rows, rule: Rule, threads: int, choice: Choice, gradient: Floats | None
) -> Floats:
    """Of weights that depend on the chosen logits alone: renormalised ones, and those of sigmoid.

    Added to `gradient`, if that is given.
    """
    add = gradient is not None
    if gradient is None:
        gradient = np.empty((len(rows.bytes), rule.num_experts), rows.dtype)
    arguments = (
        rows.bytes, rows.encoding,
        rule.is_sigmoid, rule.norm_topk_prob, rule.routed_scaling_factor, *choice, add, gradient,
    )  # fmt: skip
    run(kernels.compiled.pull_back_weights[get_c_type(rows.dtype)], arguments, gradient, threads)
    return gradient


def pull_back_tokens(rows: Rows, rule: Rule, threads: int, choice: Choice) -> Floats:
    """Of the weights of expert choice."""
    gradient = np.zeros((len(rows.bytes), rule.num_experts), rows.dtype)
    experts = np.arange(rule.num_experts)[:, np.newaxis]
    gradient[choice.indices, experts] = choice.weight_gradient * rule.routed_scaling_factor
    if rule.is_sigmoid:
        return pull_back_sigmoid(rows, threads, gradient, normalised=False)
    return pull_back_softmax(rows, threads, gradient)


def pull_back_sigmoid(rows: Rows, threads: int, gradient: Floats, *, normalised: bool) -> Floats:
    """From the gradient by sigmoid scores, `[T, E]`, which is written over and returned."""
    arguments = rows.bytes, rows.encoding, normalised, gradient
    run(kernels.compiled.pull_back_sigmoid[get_c_type(rows.dtype)], arguments, gradient, threads)
    return gradient


def pull_back_softmax(
    rows: Rows,
    threads: int,
    gradient: Floats,
    of_mean: Floats | None = None,
    of_square: float = 0.0,
    choice: Choice | None = None,
    scale: float = 1.0,
    softmax: Softmax | None = None,
) -> Floats:
    """From the gradient by softmax probabilities, `[T, E]`, which is written over and returned.

    In its place, `of_mean`, `[E]`, may hold that of every token, to which the gradient by weights,
    times `scale`, is added for those chosen. Adds `of_square` times half that of the squared
    log-sum-exp.
    """
    arguments = (
        rows.bytes, rows.encoding, *(softmax or (None, None)),
        of_mean, of_square, *(choice or (None, None)), scale, gradient,
    )  # fmt: skip
    run(kernels.compiled.pull_back_softmax[get_c_type(rows.dtype)], arguments, gradient, threads)
    return gradient


def run(
    kernel: Callable[..., None], arguments: tuple[object, ...], gradient: Floats, threads: int
) -> None:
    """Call a kernel for the tokens, shared among threads."""
    num_tokens, num_experts = gradient.shape
    grain = get_tokens_per_thread(num_experts)
    share(partial(kernel, *arguments), num_tokens, threads, grain=grain)
