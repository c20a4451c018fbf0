"""The calls of the routing kernels: who goes to which expert, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.errors import RoutingError
from moe_fast.routing.arrays import Rows, get_c_type
from moe_fast.routing.options import Rule
from moe_fast.routing.result import Counts, Routing
from moe_fast.threads import share

# Waking a thread takes about as long as routing a quarter of these logits.
LOGITS_PER_THREAD = 2**16
# The kernels' rows are multiples of this, and experts choose so many at a time.
LANES = 16
# Tokens from which expert choice estimates how good a token must be.
SAMPLE = 512


def get_tokens_per_thread(num_experts: int) -> int:
    """The tokens that it takes to keep a thread busy."""
    return LOGITS_PER_THREAD // num_experts + 1


def route_again(logits: npt.NDArray[Any], call: tuple[object, ...], out: Routing) -> bool:
    """Route one token into `out`, if nothing but the logits differs from its last call.

    Says whether it did. `call` holds the arguments of this one, compared by identity: those of
    `route`, or a router and `threads`. The first of them tells the two apart.
    """
    if not isinstance(out, Routing) or out.last_call is None:
        return False
    bad = kernels.compiled.route_next_token(
        logits, out.indices, out.weights, out.tokens_per_expert_before_drop, call, *out.last_call
    )
    if bad is None:
        return False
    out.set_counts(out.tokens_per_expert_before_drop, 0)
    if bad >= 0:
        raise_for_nan([bad])
    return True


def choose_experts(
    rows: Rows, rule: Rule, bias: npt.NDArray[Any] | None, out: Routing, threads: int
) -> None:
    """Top-k, group-limited if there are groups: fill indices and weights, and count.

    Switch is top-k with k = 1. Nothing is dropped.
    """
    num_tokens = len(rows.bytes)
    kernel = kernels.compiled.route_tokens[get_c_type(out.weights.dtype)]
    arguments = rows.bytes, rows.encoding, bias, *rule.as_kernel_arguments()
    if threads == 1:
        bad = kernel(
            *arguments, out.indices, out.weights, out.tokens_per_expert_before_drop, 0, num_tokens
        )
        if bad >= 0:
            raise_for_nan([bad])
        return
    ends: list[tuple[int, Counts]] = []

    def choose(start: int, stop: int) -> None:
        counts = np.zeros(rule.num_experts, np.int64)
        bad = kernel(*arguments, out.indices, out.weights, counts, start, stop)
        ends.append((bad, counts))

    share(choose, num_tokens, threads, grain=get_tokens_per_thread(rule.num_experts))
    raise_for_nan(bad for bad, _ in ends)
    for _, counts in ends:
        out.tokens_per_expert_before_drop += counts


def drop_overflow(rule: Rule, out: Routing, capacity: int) -> None:
    """Take out the pairs that exceed the capacity of their expert."""
    fullest = int(out.tokens_per_expert_before_drop.max(initial=0))
    if fullest <= capacity:
        return
    c_type = get_c_type(out.weights.dtype)
    indices, weights = out.indices.reshape(-1), out.weights.reshape(-1)
    kept = np.zeros(rule.num_experts, np.int64)
    if rule.drop_policy == "position":
        num_dropped = kernels.compiled.drop_by_position[c_type](indices, weights, capacity, kept)
    else:
        num_dropped = kernels.compiled.drop_by_probability[c_type](
            indices, weights, capacity, out.offsets, out.permutation, fullest, kept
        )
    out.set_counts(kept, num_dropped)


def choose_tokens(rows: Rows, rule: Rule, out: Routing, threads: int) -> None:
    """Expert choice by a threshold from a sample; exact selection where the threshold fails.

    Each expert keeps the tokens above its threshold, and of those the best. A threshold that too
    few tokens exceed, or too many, fails. Few tokens need none.
    """
    num_tokens, capacity = len(rows.bytes), out.weights.shape[1]
    dtype, c_type = out.weights.dtype, get_c_type(out.weights.dtype)
    compiled = kernels.compiled
    arguments = rows.bytes, rows.encoding, rule.num_experts, rule.is_sigmoid
    grain = get_tokens_per_thread(rule.num_experts)
    parts = max(1, min(threads, num_tokens // grain))

    def select(first: int, thresholds: npt.NDArray[Any], share_above: float) -> list[int]:
        """Choose for the experts from `first` on; return those whose threshold failed."""
        most = -(-num_tokens // parts)
        room = min(most, int(most * share_above * 1.5) + 64)
        shape = parts, len(thresholds), room + LANES
        found, value = np.empty(shape, np.int32), np.empty(shape, dtype)
        count = np.zeros(shape[:2], np.int64)
        last = first + len(thresholds)
        bad: list[int] = []

        def find_above(start: int, stop: int) -> None:
            for i in range(start, stop):
                part = num_tokens * i // parts, num_tokens * (i + 1) // parts
                bad.append(
                    compiled.collect_candidates[c_type](
                        *arguments, first, thresholds, found[i], value[i], count[i], *part
                    )
                )

        def keep_best(start: int, stop: int) -> None:
            compiled.select_candidates[c_type](
                thresholds, found, value, count,
                out.indices[first:last], out.weights[first:last], start, stop,
            )  # fmt: skip

        share(find_above, parts, threads)
        raise_for_nan(bad)
        if capacity:
            share(keep_best, len(thresholds), threads)
        failed: list[int] = (count[0] < 0).nonzero()[0].tolist()
        return failed

    out.tokens_per_expert_before_drop.fill(capacity)
    thresholds = np.zeros(rule.num_experts, dtype)
    # Four standard deviations more than the sample's share.
    rank = capacity * SAMPLE // max(num_tokens, 1)
    rank += 4 * math.isqrt(rank) + 4
    if num_tokens < 4 * SAMPLE or rank > SAMPLE // 2:
        select(0, thresholds, 1.0)
    else:
        compiled.sample_thresholds[c_type](
            rows.bytes, rows.encoding, rule.is_sigmoid, SAMPLE, rank, thresholds
        )
        for expert in select(0, thresholds, rank / SAMPLE):
            select(expert, thresholds[:1] * 0, 1.0)
    if rule.routed_scaling_factor != 1.0:
        out.weights *= rule.routed_scaling_factor
    if rule.sorted:
        order = np.argsort(-out.weights, axis=1, kind="stable")
        out.indices[:] = np.take_along_axis(out.indices, order, axis=1)
        out.weights[:] = np.take_along_axis(out.weights, order, axis=1)


def raise_for_nan(first_bad: Iterable[int]) -> None:
    """Raise for the first of the tokens that have a NaN; numbers below 0 are no tokens."""
    bad = [token for token in first_bad if token >= 0]
    if bad:
        raise RoutingError(f"of token {min(bad)} hold a NaN", argument="logits")
