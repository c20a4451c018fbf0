"""Plans, configurations and reports as plain values, JSON and data frames, and back."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_fast import (
    MoeConfig,
    MoeConfigError,
    MoeConstructionPlan,
    RouterInit,
    RoutingMethod,
    plan_moe_construction,
)

configs = st.builds(
    MoeConfig, st.integers(1, 64), st.integers(1, 4), st.sampled_from(RoutingMethod),
    st.none() | st.integers(1, 99),
)  # fmt: skip


@st.composite
def plans(draw):
    shape = draw(st.tuples(st.integers(1, 4), st.integers(0, 5)))
    models, layers = (
        np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), int).reshape(shape)
        for n in (shape[0] * shape[1],) * 2
    )
    more = draw(st.integers(10, 12) | st.none())
    return MoeConstructionPlan(
        models, layers, num_models=more, router_init=draw(st.sampled_from(RouterInit))
    )


@given(plans())
def test_plans_survive_json_and_pickle(plan):
    again = MoeConstructionPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.source_model.shape == plan.source_model.shape
    assert pickle.loads(pickle.dumps(plan)) == plan


@given(configs)
def test_configurations_survive_json_and_pickle(config):
    assert MoeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(("values", "error", "message"), [
    ({"source_model": [[0]]}, TypeError, "source_layer"),
    ({"source_model": [[0]], "source_layer": [[0]], "extra": 1}, TypeError, "extra"),
    ({"source_model": [[0, 1]], "source_layer": [[0]]}, MoeConfigError, r"\(1, 2\) and \(1, 1\)"),
    ({"source_model": [[2]], "source_layer": [[0]], "num_models": 2}, MoeConfigError, "holds 2"),
])  # fmt: skip
def test_what_makes_no_plan(values, error, message):
    with pytest.raises(error, match=message):
        MoeConstructionPlan.from_dict(values)


def test_a_configuration_with_an_unknown_key():
    with pytest.raises(TypeError, match="num_expert"):
        MoeConfig.from_dict({"num_expert": 4})


def test_a_report_as_json():
    report = plan_moe_construction(5, 3, MoeConfig(num_experts=4)).report(64, 128, 4)
    assert json.loads(report.to_json()) == {
        "num_experts": 4,
        "num_layers": 3,
        "load_balance": 0.0,
        "total_params_estimate": 3 * (4 * 3 * 64 * 128 + 64 * 4),
        "unused_models": [4],
    }


def test_a_plan_as_a_data_frame():
    pytest.importorskip("pandas")
    plan = MoeConstructionPlan([[0, 1], [2, 0]], [[0, 0], [1, 0]])
    frame = plan.to_frame()
    assert list(frame.columns) == ["layer", "expert", "source_model", "source_layer"]
    assert frame.to_numpy().tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 0, 2, 1], [1, 1, 0, 0]]
    assert frame.groupby("source_model").size().tolist() == [2, 1, 1]


@pytest.mark.parametrize(("call", "message"), [
    ("to_frame()", "to_frame needs pandas: pip install pandas"),
    ("plot()", "pictures need matplotlib: pip install 'moe-fast[plot]'"),
])  # fmt: skip
def test_without_the_package_the_error_says_what_to_install(call, message):
    code = (
        "import sys; sys.modules['pandas'] = sys.modules['matplotlib'] = None\n"
        "from moe_fast import plan_moe_construction\n"
        f"try:\n    plan_moe_construction(1, 1).{call}\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == message + "\n"


def test_a_plan_plots_itself():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    plan = plan_moe_construction(2, 3)
    assert plan.plot(ax, labels=["a", "b"]) is ax
    np.testing.assert_array_equal(ax.images[0].get_array(), plan.source_model)
    pyplot.close("all")
