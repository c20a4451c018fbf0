"""Code that mypy --strict must accept: how the package is used."""

from collections.abc import Sequence
from typing import assert_type

import numpy as np
import numpy.typing as npt

import moe_fast
from moe_fast import (
    ExpertAssignment,
    MoeConfig,
    MoeConstructionPlan,
    MoeReport,
    RouterInit,
    RoutingMethod,
    compute_expert_load_balance,
    compute_gate_weights,
    plan_moe_construction,
)

config = MoeConfig(num_experts=4, num_experts_per_tok=2, routing_method="top_k")
MoeConfig(np.int64(4), np.int32(2), RoutingMethod.EXPERT_CHOICE, gate_hidden_dim=None)
assert_type(config.num_experts, int)
assert_type(config.routing_method, RoutingMethod)
assert_type(config.gate_hidden_dim, int | None)
assert_type(config.validate(), None)

plan = plan_moe_construction(2, np.int64(3), config)
assert_type(plan, MoeConstructionPlan)
assert_type(plan.assignments[0][1], ExpertAssignment)
assert_type(plan.assignments[0][1].source_model, int)
assert_type(plan.source_model, npt.NDArray[np.int64])
assert_type(plan.router_init, RouterInit)
nested: Sequence[Sequence[ExpertAssignment]] = plan.assignments
part: Sequence[ExpertAssignment] = plan.assignments[1:][0][::-1]
assert_type([a.source_layer for layer in plan.assignments for a in layer], list[int])
MoeConstructionPlan([[0, 1]], np.zeros((1, 2), np.int8), num_models=2, router_init="random")

report = plan.report(4096, 11008, num_experts=4)
assert_type(report, MoeReport)
assert_type(report.total_params_estimate, int)
assert_type(report.load_balance, float)
unused: Sequence[int] = report.unused_models

compute_expert_load_balance(plan)
compute_expert_load_balance(plan.assignments)
compute_expert_load_balance([[ExpertAssignment(0, 0, 0)], [ExpertAssignment(0, 1, 1)]])
compute_expert_load_balance(np.array([[0, 1], [1, 0]]))
assert_type(compute_expert_load_balance([[0, 1], [0, 1]]), float)

weights: npt.NDArray[np.float64] = compute_gate_weights(16, 4)
compute_gate_weights(16, 4, "uniform")
compute_gate_weights(16, 4, init=RouterInit.RANDOM)

moe_fast.build_moe(["a", "b"], "moe", config, base="a", routers="balanced")
try:
    config.validate()
except moe_fast.MoeConfigError as error:
    problem: ValueError = error
