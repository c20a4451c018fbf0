"""Routing: tokens to experts, and the statistics of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

import numpy as np

from benchmarks import routing_peers as peers
from benchmarks.measure import Row, Work, at_level, calls_a_sample, timed
from benchmarks.reference import Reference
from moe_fast import MoeConfig, Router, Routing, RoutingStats, route
from moe_fast.kernels.level import levels_available

TOKENS = 4096
# Where a batch is small, a processor learns its branches if it comes again soon.
BATCHES, SMALL_BATCHES = 8, 256
# (experts, experts a token): the goals of the rows below, of the last at the baseline level.
SIZES = {
    (8, 2): {"all": 30, "choice": 15, "baseline": 3, "switch": 20, "expert choice": 15},
    (64, 8): {"all": 12, "choice": 6, "baseline": 2, "switch": 6, "expert choice": 4},
    (128, 8): {"all": 14, "choice": 8, "baseline": 2.5, "switch": 6, "expert choice": 5},
    (256, 8): {"all": 16, "choice": 8, "baseline": 3, "switch": 5, "expert choice": 5},
}
# More than 8 experts a token, as Qwen3-Next has them, and what fine-grained builds make: the goal
# against torch.
FURTHER_SIZES = {(512, 10): 8, (232, 8): 8}


def rows(reference: Reference | None) -> Iterator[Row]:
    yield from one_token()
    for (num_experts, k), goals in SIZES.items():
        batches = logits(BATCHES, TOKENS, num_experts)
        distinct = distinct_logits(TOKENS, num_experts)
        size = f"{num_experts} experts, top {k}"

        config = MoeConfig(num_experts, k)
        for peer, call in peers.transformers_router(num_experts, k):
            same_routing(everything(distinct, config), call(distinct))
            yield Row(
                f"{size}: choice, counts, permutation",
                rotating(batches, lambda z, config=config: everything(z, config)),
                peer,
                rotating(batches, call),
                goals["all"],
            )

        fastest = []
        for peer, call in peers.top_k(num_experts, k):
            same_choice(route(distinct, config), call(distinct))
            fastest.append((peer, rotating(batches, call)))
        peer, theirs = quickest(fastest)
        ours = rotating(batches, lambda z, config=config: route(z, config))
        goal_of = {levels_available()[-1]: goals["choice"], "baseline": goals["baseline"]}
        for level in levels_available()[::-1]:
            work = f"{size}: choice, level {level}"
            yield Row(work, at_level(level, ours), peer, theirs, goal_of.get(level))

        config = MoeConfig(num_experts, 1, "switch_transformer")
        for peer, call in peers.switch(num_experts, 1.25):
            result = everything(distinct, config)
            weights, indices, permutation = call(distinct)
            same_choice(result, (weights[:, None], indices[:, None]))
            assert (result.permutation == permutation.numpy()).all()
            yield Row(
                f"{num_experts} experts, Switch: choice, drop, permutation",
                rotating(batches, lambda z, config=config: everything(z, config)),
                peer,
                rotating(batches, call),
                goals["switch"],
            )

        config = MoeConfig(num_experts, k, "expert_choice")
        for peer, call in peers.expert_choice(num_experts, math.ceil(TOKENS * k / num_experts)):
            weights = np.sort(np.asarray(call(distinct)[0]), axis=1)
            ours_sorted = np.sort(route(distinct, config).weights, axis=1)
            np.testing.assert_allclose(ours_sorted, weights, rtol=1e-5)
            yield Row(
                f"{num_experts} experts, expert choice, {k} a token on average",
                rotating(batches, lambda z, config=config: route(z, config)),
                peer,
                rotating(batches, call),
                goals["expert choice"],
            )
    for (num_experts, k), goal in FURTHER_SIZES.items():
        batches = logits(BATCHES, TOKENS, num_experts)
        config = MoeConfig(num_experts, k)
        for peer, call in peers.top_k(num_experts, k):
            if peer == "torch":
                ours = rotating(batches, lambda z, config=config: route(z, config))
                work = f"{num_experts} experts, top {k}: choice"
                yield Row(work, ours, peer, rotating(batches, call), goal)
    yield from without_a_peer()
    yield statistics()


def one_token() -> Iterator[Row]:
    config = MoeConfig(64, 8)
    router = Router(config)
    batches = logits(SMALL_BATCHES, 1, 64)
    out, other = router(batches[0]), router(batches[0])
    yield Row(
        "64 experts, top 8: one token, `out=`",
        rotating(batches, lambda z: route(z, config, out=out)),
        at_least=1 / 3e-6,
    )
    yield Row(
        "64 experts, top 8: one token, `Router`, `out=`",
        rotating(batches, lambda z: router(z, out=other)),
        at_least=1 / 3e-6,
    )


def without_a_peer() -> Iterator[Row]:
    config = MoeConfig(64, 8)
    try:
        import ml_dtypes

        sixteen = [z.astype(ml_dtypes.bfloat16) for z in logits(BATCHES, TOKENS, 64)]
        yield Row(
            "64 experts, top 8: choice, bfloat16 logits",
            rotating(sixteen, lambda z: route(z, config)),
        )
    except ImportError:
        pass


def statistics() -> Row:
    config = MoeConfig(64, 8)
    batches = logits(BATCHES, TOKENS, 64)
    stats = RoutingStats(config)

    def update(z: Any) -> None:
        stats.__init__(config)  # type: ignore[misc]  # a layer takes 2^31 tokens at most
        stats.update(z)

    return Row(
        "64 experts, top 8: `RoutingStats.update`",
        rotating(batches, update),
        "`route` alone",
        rotating(batches, lambda z: route(z, config)),
        1 / 1.5,
    )


def logits(batches: int, tokens: int, num_experts: int) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((tokens, num_experts), dtype=np.float32) for _ in range(batches)]


def distinct_logits(tokens: int, num_experts: int) -> Any:
    """Logits that differ by more than a probability rounds, within a token."""
    rng = np.random.default_rng(1)
    rows = np.tile(np.linspace(-4, 4, num_experts, dtype=np.float32), (tokens, 1))
    return rng.permuted(rows, axis=1) * rng.uniform(0.5, 1, (tokens, 1)).astype(np.float32)


def rotating(batches: Iterable[Any], call: Callable[[Any], object]) -> Work:
    """A call with the next batch each time."""
    turn = cycle(batches)
    return lambda: call(next(turn))


def everything(z: Any, config: MoeConfig) -> Routing:
    result = route(z, config)
    _ = result.permutation
    return result


def quickest(works: list[tuple[str, Work]]) -> tuple[str, Work]:
    """The peer that takes least time."""

    def seconds(work: Work) -> float:
        calls = calls_a_sample(work)
        return min(timed(work, calls) for _ in range(5)) / calls

    times = {peer: seconds(work) for peer, work in works}
    peer = min(times, key=times.__getitem__)
    others = ", ".join(name for name in times if name != peer)
    return f"{peer}, faster than {others}" if others else peer, dict(works)[peer]


def same_routing(ours: Routing, theirs: Any) -> None:
    weights, indices, counts, offsets, permutation = theirs
    same_choice(ours, (weights, indices))
    for mine, other in (
        (ours.tokens_per_expert, counts),
        (ours.offsets, offsets),
        (ours.permutation, permutation),
    ):
        np.testing.assert_array_equal(mine, np.asarray(other))


def same_choice(ours: Routing, theirs: Any) -> None:
    weights, indices = theirs
    np.testing.assert_array_equal(ours.expert_indices, np.asarray(indices))
    np.testing.assert_allclose(ours.weights, np.asarray(weights), rtol=1e-5)
