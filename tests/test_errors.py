"""Errors say what they are about: an argument, or a file and a tensor."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

pytest.importorskip("ml_dtypes")

from moe_fast import (
    ArgumentTypeError,
    CheckpointError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    MoeFastError,
    Problem,
    RecipeError,
    RoutingError,
    build_moe,
    check_moe,
    compute_gate_weights,
    convert_moe,
    design_moe,
    inspect_model,
    plan_capacity,
    plan_moe_construction,
    read_recipe,
    route,
)
from moe_fast.demo import make_dense_model
from moe_fast.storage.safetensors_header import read_header


def test_a_problem_is_its_sentence():
    assert Problem("is empty") == "is empty"
    assert Problem("must be 1", argument="threads") == "threads must be 1"
    assert Problem("is empty", file=Path("a") / "b") == f"{Path('a/b')}: is empty"
    assert Problem("is empty", file="a.yml", line=3) == "a.yml:3: is empty"
    assert Problem("is F64", file="m.safetensors", tensor="w") == "m.safetensors: tensor 'w' is F64"
    long = Problem("is F64", file="m", tensor="w" * 10_000)
    assert len(long) < 300
    assert long.tensor == "w" * 10_000


@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
@pytest.mark.parametrize("kind", [MoeFastError, CheckpointError, MoeConfigError, ArgumentTypeError])
def test_errors_cross_processes_whole(kind, again):
    for error in (
        kind("must be 1", argument="threads"),
        kind("is F64", file="m.safetensors", tensor="w"),
        kind(Problem("is F64", file="m"), "free text"),
    ):
        error.add_note("a note")
        found = again(error)
        assert type(found) is kind
        assert str(found) == str(error)
        for name in ("argument", "file", "tensor"):
            assert getattr(found, name) == getattr(error, name)
        for left, right in zip(found.problems, error.problems, strict=True):
            assert vars(left) == vars(right)
        assert found.__notes__ == ["a note"]


def test_several_problems_are_a_list():
    error = CheckpointError(Problem("is F64", file="m", tensor="w"), Problem("is gone", file="n"))
    assert str(error) == "2 problems:\n  - m: tensor 'w' is F64\n  - n: is gone"
    assert (error.argument, error.file, error.tensor) == (None, None, None)
    assert [problem.file for problem in error.problems] == [Path("m"), Path("n")]
    many = CheckpointError(*(f"problem {i}" for i in range(103)))
    assert str(many).endswith("  - problem 99\n  - and 3 more")


def test_errors_are_of_pythons_kinds_too():
    assert issubclass(ArgumentTypeError, TypeError)
    for kind in (CheckpointError, MoeConfigError, RecipeError, RoutingError):
        assert issubclass(kind, ValueError)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    dense = tmp_path_factory.mktemp("errors") / "dense"
    make_dense_model(dense, seed=0)
    return dense


# One mistake of each kind in each argument: a wrong type, and a value that is out of range or that
# is no known choice.
WRONG = {
    "models": (5, []),
    "output": (5, None),
    "config": (8, None),
    "target": (3, "foo"),
    "layout": (3, "stacked"),
    "dtype": (3, "int8"),
    "base": (5, None),
    "shared_experts": (5, None),
    "dense_layers": ("0", [7]),
    "routers": (3, "kaiming"),
    "seed": ("0", -1),
    "max_shard_size": (None, "5XB"),
    "threads": ("1", 0),
    "executor": (3, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_a_build(dense, tmp_path, name):
    wrong_type, wrong_value = WRONG[name]
    for kind, value in ((ArgumentTypeError, wrong_type), (MoeConfigError, wrong_value)):
        if value is None and kind is MoeConfigError:
            continue
        how = {"models": dense, "output": tmp_path / "moe", name: value}
        with pytest.raises(kind) as caught:
            build_moe(**how)
        assert type(caught.value) is kind
        assert caught.value.argument == name
        assert str(caught.value).startswith(f"{name} ")
        assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(("call", "kind", "argument"), [
    (lambda d: convert_moe(d, d.parent / "x", layout="x"), MoeConfigError, "layout"),
    (lambda d: convert_moe(5, d.parent / "x"), ArgumentTypeError, "model"),
    (lambda d: check_moe(5), ArgumentTypeError, "output"),
    (lambda d: check_moe(d, against=[5]), ArgumentTypeError, "against"),
    (lambda d: inspect_model(b"x"), ArgumentTypeError, "path"),
    (lambda d: read_recipe(5), ArgumentTypeError, "path"),
    (lambda d: design_moe(d).read("x"), MoeConfigError, "name"),
    (lambda d: ExpertSource(d, noise_scale="1"), ArgumentTypeError, "noise_scale"),
    (lambda d: ExpertSource(d, noise_scale=-1), MoeConfigError, "noise_scale"),
    (lambda d: MoeConfig(num_experts="8"), ArgumentTypeError, "num_experts"),
    (lambda d: MoeConfig(routing_method="x"), MoeConfigError, "routing_method"),
    (lambda d: MoeConfig(1).validate(), MoeConfigError, "num_experts_per_tok"),
    (lambda d: plan_moe_construction(1, 2**40), MoeConfigError, "num_layers"),
    (lambda d: compute_gate_weights(8, 2, "x"), MoeConfigError, "init"),
    (lambda d: compute_gate_weights(8, 2, dtype="int8"), MoeConfigError, "dtype"),
    (lambda d: route([[1.0]], MoeConfig(1, 1), scores="x"), MoeConfigError, "scores"),
    (lambda d: route([[1.0]], 5), ArgumentTypeError, "config"),
    (lambda d: route([[float("nan")]], MoeConfig(1, 1)), RoutingError, "logits"),
    (lambda d: plan_capacity([[1.0]], [-1], MoeConfig(1, 1)), MoeConfigError, "capacity_factors"),
])  # fmt: skip
def test_arguments_of_other_functions(dense, call, kind, argument):
    with pytest.raises(kind) as caught:
        call(dense)
    assert type(caught.value) is kind
    assert caught.value.argument == argument


def test_files_and_tensors(dense, tmp_path):
    with pytest.raises(CheckpointError, match="there is no file or folder of that name") as caught:
        inspect_model(tmp_path / "absent")
    assert (caught.value.file, caught.value.tensor) == (tmp_path / "absent", None)
    make_dense_model(tmp_path / "wide", seed=0, intermediate_size=256)
    with pytest.raises(CheckpointError, match="intermediate_size is 256") as caught:
        build_moe([dense, tmp_path / "wide"], tmp_path / "moe")
    assert caught.value.file == tmp_path / "wide" / "model.safetensors"
    assert caught.value.tensor == "model.layers.0.mlp.up_proj.weight"
    file = tmp_path / "wide" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"X32"', 1))
    with pytest.raises(CheckpointError, match="unknown dtype 'X32'") as caught:
        read_header(file)
    assert (caught.value.file, caught.value.tensor) == (file, "model.embed_tokens.weight")


def test_lines_of_a_recipe(tmp_path):
    pytest.importorskip("yaml")
    (tmp_path / "r.yml").write_text("models: [absent, other]\nseed: x\n")
    with pytest.raises(RecipeError, match="3 problems") as caught:
        read_recipe(tmp_path / "r.yml")
    assert [(p.file, p.line) for p in caught.value.problems] == [
        (tmp_path / "r.yml", 1), (tmp_path / "r.yml", 1), (tmp_path / "r.yml", 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 12}, "hidden_size must be a multiple of 8, got 12"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
    ],
)
def test_a_small_model_that_could_not_run_is_not_written(tmp_path, values, message):
    with pytest.raises(MoeFastError, match=message):
        make_dense_model(tmp_path / "dense", **{"seed": 0, **values})
    assert not (tmp_path / "dense").exists()
