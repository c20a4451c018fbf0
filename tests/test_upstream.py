"""What the reference library's own tests ask, asked of this one.

Where they check a property loosely (finite, not negative), so do these; the exact values are in
test_golden.py.
"""

import numpy as np
import pytest

from moe_fast import (
    ExpertAssignment,
    MoeConfig,
    MoeConfigError,
    RouterInit,
    RoutingMethod,
    compute_expert_load_balance,
    compute_gate_weights,
    plan_moe_construction,
)

INITS = [RouterInit.UNIFORM, RouterInit.BALANCED, RouterInit.RANDOM]


def test_a_configuration_keeps_what_it_is_given():
    config = MoeConfig(8, 2, RoutingMethod.TOP_K, None)
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)
    assert config == MoeConfig()


def test_a_good_configuration_validates():
    MoeConfig(num_experts=4, num_experts_per_tok=2).validate()


@pytest.mark.parametrize(
    ("num_experts", "num_experts_per_tok", "message"),
    [
        (0, 2, r"^num_experts must be at least 1, got 0$"),
        (4, 5, r"^num_experts_per_tok must be at most 4, the number of experts, got 5$"),
    ],
)
def test_a_bad_configuration_does_not(num_experts, num_experts_per_tok, message):
    config = MoeConfig(num_experts, num_experts_per_tok)
    with pytest.raises(MoeConfigError, match=message):
        config.validate()
    with pytest.raises(MoeConfigError, match=message):
        plan_moe_construction(1, 1, config)


def test_a_plan_has_every_layer_and_expert():
    plan = plan_moe_construction(4, 8, MoeConfig(4, 2))
    assert plan.num_layers == 8
    assert len(plan.assignments) == 8
    assert [len(layer) for layer in plan.assignments] == [4] * 8


def test_two_experts_of_a_layer_come_from_two_models():
    for layer in plan_moe_construction(2, 4, MoeConfig(2, 1)).assignments:
        assert len(layer) == 2
        assert layer[0].source_model != layer[1].source_model


def test_one_model_serves_all_experts():
    plan = plan_moe_construction(1, 4, MoeConfig(8, 2))
    assert len(plan.assignments) == 4
    assert {a.source_model for layer in plan.assignments for a in layer} == {0}


def test_uniform_weights_are_one_over_the_experts():
    weights = compute_gate_weights(64, 4, RouterInit.UNIFORM)
    assert weights.shape == (64, 4)
    assert (weights == 0.25).all()


def test_balanced_weights_are_finite():
    weights = compute_gate_weights(32, 8, RouterInit.BALANCED)
    assert weights.size == 32 * 8
    assert np.isfinite(weights).all()


def test_random_weights_differ():
    weights = compute_gate_weights(16, 4, RouterInit.RANDOM)
    assert weights.size == 16 * 4
    assert np.isfinite(weights).all()
    assert np.ptp(weights) > 1e-10


def test_even_use_is_perfect_balance():
    layers = [[ExpertAssignment(e, e, layer) for e in range(2)] for layer in range(2)]
    assert compute_expert_load_balance(layers) == 0.0


def test_one_model_alone_is_balanced_trivially():
    assert compute_expert_load_balance([[ExpertAssignment(e, 0, 0) for e in range(4)]]) == 0.0


def test_routing_methods_differ():
    assert len(set(RoutingMethod)) == 3


@pytest.mark.parametrize("num_models", [1, 2, 4, 8])
@pytest.mark.parametrize("num_experts", [2, 4, 8])
def test_assignments_are_valid(num_models, num_experts):
    plan = plan_moe_construction(num_models, 4, MoeConfig(num_experts, min(2, num_experts)))
    for layer in plan.assignments:
        assert len(layer) == num_experts
        for assignment in layer:
            assert 0 <= assignment.source_model < num_models
            assert 0 <= assignment.expert_index < num_experts


@pytest.mark.parametrize("hidden_dim", [32, 64, 128])
@pytest.mark.parametrize("num_experts", [2, 4, 8])
@pytest.mark.parametrize("init", INITS)
def test_gate_weights_have_their_size(hidden_dim, num_experts, init):
    weights = compute_gate_weights(hidden_dim, num_experts, init)
    assert weights.shape == (hidden_dim, num_experts)
    assert np.isfinite(weights).all()


@pytest.mark.parametrize("num_models", [1, 2, 4])
def test_balance_is_never_negative(num_models):
    plan = plan_moe_construction(num_models, 8, MoeConfig(4, 2))
    assert compute_expert_load_balance(plan.assignments) >= 0.0
