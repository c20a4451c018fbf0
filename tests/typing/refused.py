"""Code that mypy --strict must refuse, each line with the error it names."""

import numpy as np

from moe_fast import (
    MoeConfig,
    MoeConstructionPlan,
    compute_expert_load_balance,
    compute_gate_weights,
    plan_moe_construction,
)
from moe_fast.kernels import compiled

config = MoeConfig("8")  # type: ignore[arg-type]
MoeConfig(num_experts=2.0)  # type: ignore[arg-type]
MoeConfig(experts=8)  # type: ignore[call-arg]
config.num_experts = 4  # type: ignore[misc]
plan_moe_construction(2)  # type: ignore[call-arg]
plan = plan_moe_construction(2, 2, 8)  # type: ignore[arg-type]
plan.num_models = 3  # type: ignore[misc]
plan.assignments["0"]  # type: ignore[call-overload]
plan.report(1, 1)  # type: ignore[call-arg]
MoeConstructionPlan([[0]], [[0]], 1)  # type: ignore[call-arg]
compute_expert_load_balance(None)  # type: ignore[arg-type]
compute_expert_load_balance(np.zeros(2))  # type: ignore[arg-type]
compute_gate_weights(4)  # type: ignore[call-arg]
compiled.count(np.zeros(2), np.zeros(2))  # type: ignore[arg-type]
compiled.coefficient_of_variation()  # type: ignore[call-arg]
