"""Plans and how evenly they use their models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.measure import Row
from benchmarks.reference import Reference
from moe_fast import MoeConfig, compute_expert_load_balance, plan_moe_construction

NUM_MODELS, NUM_LAYERS, NUM_EXPERTS = 7, 1000, 1000


def rows(reference: Reference | None) -> Iterator[Row]:
    config = MoeConfig(num_experts=NUM_EXPERTS)
    plan = plan_moe_construction(NUM_MODELS, NUM_LAYERS, config)
    models = np.ascontiguousarray(plan.source_model)
    size = (NUM_MODELS, NUM_LAYERS, NUM_EXPERTS)
    if reference is not None:
        peer = "the compiled reference"
        balancing = reference.balancing(*size)
        assert compute_expert_load_balance(plan) == balancing(), "the reference gives other bits"
        yield Row(
            "plan of 1000 × 1000",
            lambda: plan_moe_construction(NUM_MODELS, NUM_LAYERS, config),
            peer,
            reference.making_plan(*size),
            10.0,
        )
        yield Row(
            "load balance of that plan",
            lambda: compute_expert_load_balance(plan),
            peer,
            balancing,
            8.0,
        )
        yield Row(
            "load balance of 1000 × 1000 in an array",
            lambda: compute_expert_load_balance(models),
            peer,
            balancing,
        )

    def bincount() -> float:
        counts = np.bincount(models.reshape(-1))
        return float(counts.std() / counts.mean())

    yield Row(
        "load balance of 1000 × 1000 in an array",
        lambda: compute_expert_load_balance(models),
        "`numpy.bincount`",
        bincount,
    )
