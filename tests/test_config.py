"""The configuration: what it takes, what it refuses, that nothing changes it."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import (
    MoeConfig,
    MoeConfigError,
    MoeFastError,
    RouterInit,
    RoutingMethod,
    plan_moe_construction,
)

SIZES = ["num_experts", "num_experts_per_tok", "gate_hidden_dim"]
NOT_INTEGERS = [
    pytest.param(2.0, r"must be an integer, got 2\.0 of type float", id="float"),
    pytest.param("2", r"must be an integer, got '2' of type str", id="string"),
    pytest.param(True, r"must be an integer, got True of type bool", id="bool"),
    pytest.param(np.True_, r"must be an integer, got .*True.* of type bool", id="numpy bool"),
    pytest.param(np.float64(2), r"must be an integer, got .*2\.0.* of type float64", id="float64"),
    pytest.param([2], r"must be an integer, got \[2\] of type list", id="list"),
    pytest.param(np.ones(2, int), r"must be an integer, got array.* of type ndarray", id="array"),
    pytest.param(2j, r"must be an integer, got 2j of type complex", id="complex"),
]


def test_defaults():
    config = MoeConfig()
    assert config.num_experts == 8
    assert config.num_experts_per_tok == 2
    assert config.routing_method is RoutingMethod.TOP_K
    assert config.gate_hidden_dim is None
    config.validate()


def test_members_are_their_strings():
    assert [*map(str, RoutingMethod)] == ["top_k", "switch_transformer", "expert_choice"]
    assert [*map(str, RouterInit)] == ["random", "uniform", "balanced"]
    assert RoutingMethod.TOP_K == "top_k"


@pytest.mark.parametrize("method", RoutingMethod)
def test_a_method_or_its_string(method):
    assert MoeConfig(routing_method=str(method)) == MoeConfig(routing_method=method)
    assert MoeConfig(routing_method=str(method)).routing_method is method


@pytest.mark.parametrize("kind", [np.int8, np.uint64, lambda n: np.array(n)])
def test_numpy_integers_become_ints(kind):
    config = MoeConfig(kind(4), kind(2), gate_hidden_dim=kind(16))
    assert config == MoeConfig(4, 2, gate_hidden_dim=16)
    assert {type(getattr(config, name)) for name in SIZES} == {int}


def test_immutable_and_hashable():
    config = MoeConfig()
    with pytest.raises(dataclasses.FrozenInstanceError, match="num_experts"):
        config.num_experts = 4
    with pytest.raises(dataclasses.FrozenInstanceError, match="experts"):
        config.experts = 4
    assert {MoeConfig(4): 1}[MoeConfig(4)] == 1
    assert MoeConfig(4) != MoeConfig(5)


def test_copied_pickled_replaced():
    config = MoeConfig(4, 1, "expert_choice", 16)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert dataclasses.replace(config, num_experts=6) == MoeConfig(6, 1, "expert_choice", 16)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("value", "message"), NOT_INTEGERS)
def test_not_an_integer(name, value, message):
    with pytest.raises(TypeError, match=f"^{name} {message}$"):
        MoeConfig(**{name: value})


def test_none_is_no_size():
    with pytest.raises(TypeError, match=r"^num_experts must be an integer, got None of type "):
        MoeConfig(num_experts=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, r"num_experts must be at least 1, got 0"),
        ({"num_experts": -3}, r"num_experts must be at least 1, got -3"),
        ({"num_experts": -(10**5000)}, r"num_experts must be at least 1, got -2\*\*16609 or more"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok must be at least 1, got 0"),
        ({"num_experts_per_tok": -1}, r"num_experts_per_tok must be at least 1, got -1"),
        (
            {"num_experts_per_tok": 9},
            r"num_experts_per_tok must be at most 8, the number of experts",
        ),
        ({"num_experts": 1}, r"num_experts_per_tok must be at most 1, the number of experts"),
        ({"gate_hidden_dim": 0}, r"gate_hidden_dim must be at least 1, got 0"),
        ({"gate_hidden_dim": -5}, r"gate_hidden_dim must be at least 1, got -5"),
        ({"num_experts": 0, "gate_hidden_dim": 0}, r"num_experts must be at least 1, got 0"),
    ],
)
def test_out_of_range(arguments, message):
    config = MoeConfig(**arguments)
    with pytest.raises(MoeConfigError, match=f"^{message}"):
        config.validate()
    with pytest.raises(MoeConfigError, match=f"^{message}"):
        plan_moe_construction(1, 1, config)


def test_the_error_is_a_value_error():
    assert issubclass(MoeConfigError, ValueError)
    assert issubclass(MoeConfigError, MoeFastError)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (
            "topk",
            MoeConfigError,
            r"one of .*, got 'topk'; did you mean 'top_k'\?",
        ),
        ("", MoeConfigError, "one of 'top_k', 'switch_transformer', 'expert_choice', got ''"),
        (
            RouterInit.RANDOM,
            MoeConfigError,
            "one of 'top_k', .*, got <RouterInit.RANDOM: 'random'>",
        ),
        (0, TypeError, "a RoutingMethod or its string, got 0"),
        (None, TypeError, "a RoutingMethod or its string, got None"),
        (b"top_k", TypeError, "a RoutingMethod or its string, got b'top_k'"),
    ],
)
def test_unknown_methods(method, error, message):
    with pytest.raises(error, match=f"^routing_method must be {message}$"):
        MoeConfig(routing_method=method)


@given(st.integers(-3, 40), st.integers(-3, 40), st.none() | st.integers(-3, 40))
def test_validates_exactly_when_the_definition_holds(experts, per_token, gate_dim):
    config = MoeConfig(experts, per_token, gate_hidden_dim=gate_dim)
    if experts >= 1 and 1 <= per_token <= experts and (gate_dim is None or gate_dim >= 1):
        config.validate()
        assert len(plan_moe_construction(1, 1, config).assignments[0]) == experts
    else:
        with pytest.raises(MoeConfigError, match=r"must"):
            config.validate()


def test_the_defaults_of_fields_and_arguments_are_the_same():
    assert MoeConfig() == MoeConfig(
        **{each.name: each.default for each in dataclasses.fields(MoeConfig)}
    )
