"""Plans, configurations and reports as plain values, JSON and data frames, and back."""

from __future__ import annotations

import copy
import dataclasses
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
    build_moe,
    check_moe,
    convert_moe,
    inspect_model,
    plan_moe_construction,
    read_recipe,
    route,
)
from moe_fast.command.doctor import diagnose
from moe_fast.demo import make_dense_model

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


@pytest.mark.parametrize(("values", "message"), [
    ({"source_model": [[0]]}, r"^MoeConstructionPlan: the key 'source_layer' is missing$"),
    ({"source_model": [[0]], "source_layer": [[0]], "extra": 1}, r"\.extra: unknown key; known"),
    ({"source_model": [[0, 1]], "source_layer": [[0]]}, r"\(1, 2\) and \(1, 1\)"),
    ({"source_model": [[2]], "source_layer": [[0]], "num_models": 2}, "holds 2"),
])  # fmt: skip
def test_what_makes_no_plan(values, message):
    with pytest.raises(MoeConfigError, match=message):
        MoeConstructionPlan.from_dict(values)


def test_a_configuration_with_an_unknown_key():
    message = r"^MoeConfig\.num_expert: unknown key; did you mean num_experts\?$"
    with pytest.raises(MoeConfigError, match=message):
        MoeConfig.from_dict({"num_expert": 4})


def test_a_report_as_json():
    report = plan_moe_construction(5, 3, MoeConfig(num_experts=4)).report(64, 128, 4)
    assert json.loads(report.to_json()) == {
        "version": 1,
        "num_experts": 4,
        "num_layers": 3,
        "load_balance": 0.0,
        "total_params_estimate": 3 * (4 * 3 * 64 * 128 + 64 * 4),
        "unused_models": [4],
    }


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One report of every kind, by the name of its class."""
    for extra in ("ml_dtypes", "safetensors", "yaml"):
        pytest.importorskip(extra)
    folder = tmp_path_factory.mktemp("reports")
    make_dense_model(folder / "dense", seed=0)
    (folder / "recipe.yml").write_text(f"models: [{folder.as_posix()}/dense]\nnum_experts: 4\n")
    built = build_moe(
        folder / "dense", folder / "moe", MoeConfig(4), routers="uniform", dense_layers=[0]
    )
    found = [
        built,
        built.routers,
        check_moe(folder / "moe"),
        convert_moe(folder / "moe", folder / "half", dtype="float16"),
        inspect_model(folder / "moe"),
        read_recipe(folder / "recipe.yml"),
        plan_moe_construction(5, 3).report(64, 128, 4),
        diagnose(),
    ]
    return {type(report).__name__: report for report in found}


KINDS = [
    "BuildReport", "RouterHealth", "CheckReport", "ConvertReport", "ModelReport", "Recipe",
    "MoeReport", "Diagnosis",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_reports_survive_json_pickle_and_copies(reports, kind):
    report = reports[kind]
    assert type(report).from_dict(json.loads(report.to_json())) == report
    assert pickle.loads(pickle.dumps(report)) == report
    assert copy.deepcopy(report) == report


def test_what_comes_back_from_json_is_of_the_same_types(reports):
    built = type(reports["BuildReport"]).from_dict(json.loads(reports["BuildReport"].to_json()))
    assert built.warnings
    assert built.rejected_targets["mixtral"]
    assert repr(built) == repr(reports["BuildReport"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_report_is_refused_by_name(reports, kind):
    report = reports[kind]
    with pytest.raises(MoeConfigError, match=rf"^{kind}\.surprise: unknown key; known are "):
        type(report).from_dict(report.to_dict() | {"surprise": 1})
    name = next(iter(report.to_dict()))
    with pytest.raises(MoeConfigError, match=rf"^{kind}\.{name}: must be .*, got \[\]$"):
        type(report).from_dict(report.to_dict() | {name: []})


def test_models_that_no_expert_comes_from_may_be_more_than_memory_holds():
    report = plan_moe_construction(2**60, 2).report(64, 128, 8)
    values = json.loads(report.to_json())
    assert values["unused_models"] == {"start": 8, "stop": 2**60}
    assert type(report).from_dict(values) == report


@pytest.mark.parametrize(("kind", "columns", "first"), [
    ("BuildReport", ["expert", "models"], 0),
    ("RouterHealth", ["coefficient_of_variation", "mean_entropy"], None),
    ("CheckReport", ["check", "status", "summary", "problems"], "headers"),
    ("ConvertReport", ["name", "loads", "reasons"], "transformers 4"),
    ("ModelReport", ["layer", "finite", "smallest_norm", "greatest_norm", "most_alike",
                     "tied_experts", "row_repeats", "coefficient_of_variation", "mean_entropy",
                     "mtp"], 1),
])  # fmt: skip
def test_reports_as_data_frames(reports, kind, columns, first):
    pytest.importorskip("pandas")
    frame = reports[kind].to_frame()
    assert list(frame.columns) == columns
    assert len(frame) == {"BuildReport": 4, "CheckReport": 10, "ConvertReport": 4}.get(kind, 1)
    if first is not None:
        assert frame[columns[0]][0] == first


def test_a_report_without_rows_as_a_data_frame(reports):
    pytest.importorskip("pandas")
    nothing = dataclasses.replace(reports["CheckReport"], findings=())
    assert list(nothing.to_frame().columns) == ["check", "status", "summary", "problems"]


LOGITS = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


@pytest.mark.parametrize("method", RoutingMethod)
def test_routings_compare_by_their_arrays(method):
    config = MoeConfig(4, 2 if method is RoutingMethod.TOP_K else 1, method)
    routing = route(LOGITS, config)
    assert routing == route(LOGITS, config)
    assert pickle.loads(pickle.dumps(routing)) == routing
    assert routing != route(LOGITS[::-1], config)
    assert routing != route(LOGITS, config, capacity_factor=0.5)
    assert routing != "routing"
    with pytest.raises(TypeError, match="unhashable type: 'Routing'"):
        hash(routing)


@pytest.mark.parametrize("method", RoutingMethod)
def test_a_routing_as_a_data_frame(method):
    pytest.importorskip("pandas")
    config = MoeConfig(4, 2 if method is RoutingMethod.TOP_K else 1, method)
    routing = route(LOGITS, config, capacity_factor=0.5)
    frame = routing.to_frame()
    assert list(frame.columns) == ["token", "expert", "weight"]
    assert frame["token"].is_monotonic_increasing
    counts = frame.groupby("expert").size().reindex(range(4), fill_value=0)
    np.testing.assert_array_equal(counts, routing.tokens_per_expert)
    experts, weights = routing.by_token()
    for token, expert, weight in frame.itertuples(index=False):
        assert weights[token][experts[token] == expert] == [weight]


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
