"""Routing, its statistics and its gradients, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]


def softmax(logits: npt.ArrayLike) -> Matrix:
    """Over the last axis; an infinite logit counts as the limit of a large finite one."""
    z = np.asarray(logits, np.float64)
    top = z.max(axis=-1, keepdims=True)
    below = np.where(z == top, 0.0, z - np.where(np.isfinite(top), top, 0.0))
    below = np.where(np.isfinite(top) | (z == top), below, -np.inf)
    # Contiguous, since along strides NumPy adds up one after another, which rounds more often than
    # what is compared with it.
    e: Matrix = np.ascontiguousarray(np.exp(below))
    p: Matrix = e / e.sum(axis=-1, keepdims=True)
    return p


def sigmoid(logits: npt.ArrayLike) -> Matrix:
    z = np.asarray(logits, np.float64)
    e = np.exp(-np.abs(z))
    return np.where(z < 0, e, 1.0) / (1.0 + e)


def score(logits: npt.ArrayLike, scores: str) -> Matrix:
    return softmax(logits) if scores == "softmax" else sigmoid(logits)


def largest(values: Sequence[float], k: int) -> list[int]:
    """Where the k largest are, largest first, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def kept_experts(
    choice: Sequence[float], n_group: int, topk_group: int, experts_per_group_score: int
) -> list[int]:
    """The experts of the `topk_group` best groups."""
    size = len(choice) // n_group
    groups = [choice[g * size : (g + 1) * size] for g in range(n_group)]
    of_group = [sum(sorted(g, reverse=True)[:experts_per_group_score]) for g in groups]
    best = largest(of_group, topk_group)
    return [e for e in range(len(choice)) if e // size in best]


def choice_scores(
    logits: npt.ArrayLike, scores: str, bias: npt.ArrayLike | None, n_group: int = 1
) -> Matrix:
    """What tokens choose their experts by."""
    if scores == "softmax" and bias is None and n_group == 1:
        return np.asarray(logits, np.float64)
    return score(logits, scores) + (0.0 if bias is None else np.asarray(bias, np.float64))


def choose_experts(
    choice: Matrix, k: int, n_group: int = 1, topk_group: int = 1, experts_per_group_score: int = 1
) -> Indices:
    """`[T, k]`, best first."""
    chosen = np.empty((len(choice), k), np.int32)
    for t, row in enumerate(choice.tolist()):
        experts = kept_experts(row, n_group, topk_group, experts_per_group_score)
        chosen[t] = [experts[i] for i in largest([row[e] for e in experts], k)]
    return chosen


def weigh_experts(
    logits: npt.ArrayLike, chosen: Indices, scores: str, norm_topk_prob: bool, scale: float
) -> Matrix:
    """The weights of the chosen experts, before any is dropped."""
    z = np.asarray(logits, np.float64)
    if scores == "sigmoid":
        s = np.take_along_axis(sigmoid(z), chosen, axis=1)
        return s / (s.sum(axis=1, keepdims=True) + 1e-20) * scale if norm_topk_prob else s * scale
    if norm_topk_prob:
        return softmax(np.take_along_axis(z, chosen, axis=1)) * scale
    return np.take_along_axis(softmax(z), chosen, axis=1) * scale


def expert_capacity(num_tokens: int, k: int, num_experts: int, capacity_factor: float) -> int:
    return math.ceil(num_tokens * k / num_experts * capacity_factor)


def drop(
    chosen: Indices, weights: npt.NDArray[Any], num_experts: int, capacity: int, policy: str
) -> tuple[Indices, npt.NDArray[Any]]:
    """Indices -1 and weights 0.0 where an expert is full."""
    chosen, weights = chosen.copy(), weights.copy()
    for expert in range(num_experts):
        pairs = np.argwhere(chosen == expert).tolist()
        if policy == "probs":
            order = largest([weights[t, s] for t, s in pairs], capacity)
        else:
            order = list(range(len(pairs)))[:capacity]
        for i, (t, s) in enumerate(pairs):
            if i not in order:
                chosen[t, s], weights[t, s] = -1, 0.0
    return chosen, weights


def choose_tokens(probabilities: npt.NDArray[Any], capacity: int, in_order: bool) -> Indices:
    """`[E, C]` from scores `[T, E]`: tokens ascending, or best first."""
    columns = [largest(column, capacity) for column in probabilities.T.tolist()]
    return np.array(
        [column if in_order else sorted(column) for column in columns], np.int32
    ).reshape(probabilities.shape[1], capacity)


def sort_by_expert(
    chosen: Indices, num_experts: int
) -> tuple[npt.NDArray[np.int64], Indices, Indices]:
    """Offsets, the stable permutation by expert, and its inverse."""
    flat = chosen.reshape(-1).tolist()
    pairs = sorted((i for i in range(len(flat)) if flat[i] >= 0), key=lambda i: flat[i])
    inverse = np.full(len(flat), -1, np.int32)
    for place, pair in enumerate(pairs):
        inverse[pair] = place
    offsets = [sum(0 <= e < expert for e in flat) for expert in range(num_experts + 1)]
    return np.array(offsets, np.int64), np.array(pairs, np.int32), inverse


def probabilities(logits: npt.ArrayLike, scores: str) -> Matrix:
    """What losses take as a token's probabilities: they sum to 1 for sigmoid too."""
    p = score(logits, scores)
    total: Matrix = p.sum(axis=1, keepdims=True) + 1e-20
    return p if scores == "softmax" else p / total


def entropy(p: Matrix) -> npt.NDArray[np.float64]:
    result: Matrix = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)
    return result


def log_sum_exp(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    result: Matrix = np.logaddexp.reduce(np.asarray(logits, np.float64), axis=1)
    return result


def switch_loss(counts: npt.ArrayLike, p: Matrix, k: int, alpha: float) -> float:
    """Fedus et al. 2022, equation 4, with f over all T * k choices."""
    f = np.asarray(counts) / (len(p) * k)
    return float(alpha * p.shape[1] * np.sum(f * p.mean(axis=0)))


def pull_back_scores(
    logits: npt.ArrayLike,
    of_scores: npt.ArrayLike,
    scores: str,
    normalised: bool,
    of_square: float = 0.0,
) -> Matrix:
    """The gradient by logits, given that by scores: a product with the Jacobian of each row."""
    z, g = np.asarray(logits, np.float64), np.asarray(of_scores, np.float64)
    if scores == "softmax":
        p = softmax(z)
        result: Matrix = p * (g - np.sum(p * g, axis=1, keepdims=True))
        if of_square:
            result += of_square * log_sum_exp(z)[:, np.newaxis] * p
        return result
    s = sigmoid(z)
    slope: Matrix = s * sigmoid(-z)
    if not normalised:
        return slope * g
    total: Matrix = s.sum(axis=1, keepdims=True) + 1e-20
    shift: Matrix = np.sum(s / total * g, axis=1, keepdims=True)
    return slope / total * (g - shift)


def pull_back_weights(
    logits: npt.ArrayLike,
    chosen: Indices,
    of_weights: npt.ArrayLike,
    scores: str,
    norm_topk_prob: bool,
    scale: float,
) -> Matrix:
    """The gradient by logits, given that by the weights of the experts chosen."""
    z, g = np.asarray(logits, np.float64), np.asarray(of_weights, np.float64) * scale
    result = np.zeros(z.shape)
    if scores == "softmax" and not norm_topk_prob:
        np.put_along_axis(result, chosen, g, axis=1)
        return pull_back_scores(z, result, scores, True)
    of_chosen = pull_back_scores(np.take_along_axis(z, chosen, axis=1), g, scores, norm_topk_prob)
    np.put_along_axis(result, chosen, of_chosen, axis=1)
    return result


def dropped_by_capacity(
    chosen: Indices, num_experts: int, capacity_factors: Sequence[float]
) -> list[int]:
    """How many pairs of one batch each capacity factor drops."""
    num_tokens, k = chosen.shape
    counts = [(chosen == e).sum() for e in range(num_experts)]
    capacities = [expert_capacity(num_tokens, k, num_experts, f) for f in capacity_factors]
    return [int(sum(max(0, n - c) for n in counts)) for c in capacities]
