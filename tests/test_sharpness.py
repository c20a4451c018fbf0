"""How sharp routers start, counted on tokens, for every start, and what cannot be made sharp."""

from __future__ import annotations

import json

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import load_file

from command import run
from moe_fast import (
    ArgumentTypeError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    RouterStart,
    build_moe,
    check_moe,
)
from moe_fast.demo import make_dense_model
from moe_fast.request import choose_start
from moe_fast.routing.sharpness import measure_logit_std, sharpen

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharpness") / "dense"
    make_dense_model(folder, seed=0)
    return folder


def logit_std(rows: np.ndarray, inputs: np.ndarray) -> float:
    """The definition: over the experts, then root mean square over tokens."""
    logits = inputs.astype(np.float64) @ rows.astype(np.float64).T
    return float(np.sqrt((logits.std(axis=1) ** 2).mean()))


def router(folder, layer: int = 0, name: str = "block_sparse_moe") -> np.ndarray:
    tensors = load_file(folder / "model.safetensors")
    return tensors[f"model.layers.{layer}.{name}.gate.weight"].astype(np.float32)


def test_the_default_start_is_normal_and_sharp(dense, tmp_path):
    build_moe(dense, tmp_path / "default", MoeConfig(8), seed=5)
    build_moe(dense, tmp_path / "named", MoeConfig(8), routers="normal", logit_std=3, seed=5)
    for layer in range(2):
        rows = router(tmp_path / "default", layer)
        assert rows.tobytes() == router(tmp_path / "named", layer).tobytes()
        assert np.abs(rows.mean(axis=0)).max() < 1e-6
    assert check_moe(tmp_path / "default").passed
    request = json.loads((tmp_path / "default" / "moe_fast.json").read_text())["request"]
    assert (request["routers"]["method"], request["routers"]["logit_std"]) == ("normal", 3)
    build_moe(dense, tmp_path / "sharper", MoeConfig(8), logit_std=6, seed=5)
    np.testing.assert_allclose(router(tmp_path / "sharper"), 2 * router(tmp_path / "default"))


@pytest.mark.parametrize("options", [{}, {"granularity": 4, "config": MoeConfig(4, 4)}])
def test_by_default_a_single_row_is_not_sharpened(dense, tmp_path, options):
    options = {"config": MoeConfig(1, 1)} | options
    build_moe(dense, tmp_path / "moe", **options)
    build_moe(dense, tmp_path / "named", routers="balanced", **options)
    assert router(tmp_path / "moe").tobytes() == router(tmp_path / "named").tobytes()
    assert check_moe(tmp_path / "moe").passed


def test_texts_make_the_default_start_calibrated():
    assert RouterStart() == RouterStart("normal", logit_std=3)
    assert RouterStart(texts="a text") == RouterStart("calibrated", texts="a text")
    assert RouterStart(tokens="t.npy", logit_std=1).method == "calibrated"
    kinds = [ExpertSource("a", texts=("one",)), ExpertSource("b", texts=("two",))]
    assert choose_start("auto", {}, kinds).method == "calibrated"
    assert choose_start("auto", {}, [ExpertSource("a")]) == RouterStart()
    assert choose_start("auto", {}, kinds, parts=True) == RouterStart("balanced")
    assert choose_start("balanced", {}, kinds) == RouterStart("balanced")
    assert choose_start(RouterStart("means"), {"logit_std": 1.0}).logit_std == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["balanced", "random", "normal", "linear"])
@pytest.mark.parametrize("wanted", [0.1, 3.0])
def test_every_start_is_as_sharp_as_asked(dense, tmp_path, method, dtype, wanted):
    output = tmp_path / "moe"
    start = RouterStart(method, logit_std=wanted)
    build_moe(dense, output, MoeConfig(8), routers=start, dtype=dtype, seed=3)
    tokens = RNG.standard_normal((20_000, 64))
    layers = [router(output, layer) for layer in range(2)]
    for rows in layers:
        assert logit_std(rows, tokens) == pytest.approx(wanted, rel=0.02)
        assert len({row.tobytes() for row in rows}) == 8
    assert (layers[0] != layers[1]).any()
    assert check_moe(output).passed


def test_experts_keep_their_order(dense, tmp_path):
    """Only the scale changes: who is chosen does not."""
    for name, wanted in (("as drawn", None), ("sharp", 5.0)):
        build_moe(dense, tmp_path / name, MoeConfig(8), routers="normal", logit_std=wanted)
    tokens = RNG.standard_normal((500, 64)).astype(np.float32)
    drawn, sharp = (np.argsort(tokens @ router(tmp_path / n).T) for n in ("as drawn", "sharp"))
    assert (drawn == sharp).mean() > 0.999


def test_shards_of_a_copy_share_a_sharp_row(dense, tmp_path):
    build_moe(dense, tmp_path / "moe", granularity=2, routers="normal", logit_std=2)
    rows = router(tmp_path / "moe")
    assert (rows[::2] == rows[1::2]).all()
    assert logit_std(rows, RNG.standard_normal((20_000, 64))) == pytest.approx(2, rel=0.02)


def test_prompts_make_sharp_rows_and_shared_gates_stay(dense, tmp_path):
    models = [ExpertSource(dense, positive_prompts=(text,)) for text in ("Hello", "def f(x)")]
    shared = [ExpertSource(dense, residual_scale=0.5, positive_prompts=("Hi",))]
    for name, wanted in (("plain", None), ("sharp", 2.0)):
        build_moe(
            models, tmp_path / name, MoeConfig(2, 1), routers="cheap_embed", logit_std=wanted,
            shared_experts=shared, target="qwen2_moe", dtype="bfloat16",
        )  # fmt: skip
    assert check_moe(tmp_path / "sharp").passed
    rows = router(tmp_path / "sharp", name="mlp")
    assert logit_std(rows, RNG.standard_normal((20_000, 64))) == pytest.approx(2, rel=0.02)
    gate = "model.layers.0.mlp.shared_expert_gate.weight"
    plain, sharp = (
        load_file(tmp_path / name / "model.safetensors")[gate] for name in ("plain", "sharp")
    )
    assert plain.tobytes() == sharp.tobytes()


@given(
    arrays(np.float32, (5, 7), elements=st.floats(-4, 4, width=32)),
    st.floats(1e-3, 1e3),
    st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_sharpen_is_its_definition(rows, wanted, given_tokens):
    tokens = np.random.default_rng(1).standard_normal((50_000, 7)).astype(np.float32)
    inputs = tokens[:40] * 3 + 1 if given_tokens else None
    if np.abs(rows - rows.mean(axis=0)).max() < 1e-3:
        return
    sharp = sharpen(rows, wanted, inputs)
    assert measure_logit_std(sharp, inputs) == pytest.approx(wanted, rel=1e-4)
    tolerance = 1e-4 if given_tokens else 0.03
    found = logit_std(sharp, tokens if inputs is None else inputs)
    assert found == pytest.approx(wanted, rel=tolerance)
    np.testing.assert_allclose(sharp.sum(axis=0), 0, atol=1e-4 * np.abs(sharp).max())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, MoeConfigError, r"^logit_std must be above 0 and finite, got 0\.0$"),
        (-1, MoeConfigError, r"^logit_std must be above 0 and finite, got -1\.0$"),
        (float("nan"), MoeConfigError, r"^logit_std must be above 0 and finite, got nan$"),
        (float("inf"), MoeConfigError, r"^logit_std must be above 0 and finite, got inf$"),
        ("3", ArgumentTypeError, r"^logit_std must be a number, got '3'$"),
        (True, ArgumentTypeError, r"^logit_std must be a number, got True$"),
    ],
)
def test_a_sharpness_that_is_none(dense, tmp_path, value, error, message):
    with pytest.raises(error, match=message):
        build_moe(dense, tmp_path / "moe", MoeConfig(4), routers="normal", logit_std=value)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("experts", "start", "message"),
    [
        (4, "uniform", r"^logit_std cannot be given to uniform routers, whose rows are all alike"),
        (1, "normal", r"^logit_std is a standard deviation over experts, of which there is only 1"),
        (4, "cheap_embed", r"^logit_std cannot be given to routers whose 4 rows are all alike$"),
    ],
)
def test_routers_that_cannot_be_sharp(dense, tmp_path, experts, start, message):
    models = ExpertSource(dense, positive_prompts=("Hello",))
    with pytest.raises(MoeConfigError, match=message):
        build_moe(models, tmp_path / "moe", MoeConfig(experts, 1), routers=start, logit_std=1)
    assert not (tmp_path / "moe").exists()


def test_command_and_recipe_say_the_same(dense, tmp_path):
    pytest.importorskip("yaml")
    build_moe(dense, tmp_path / "python", MoeConfig(4), routers="normal", logit_std=2.5)
    options = ("--experts", "4", "--routers", "normal", "--logit-std", "2.5")
    assert run("build", dense, "-o", tmp_path / "command", *options).returncode == 0
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"models: [{dense}]\nnum_experts: 4\nrouters: normal\nlogit_std: 2.5\n")
    assert run("build", recipe, "-o", tmp_path / "recipe").returncode == 0
    rows = [router(tmp_path / name).tobytes() for name in ("python", "command", "recipe")]
    assert rows[0] == rows[1] == rows[2]
    manifest = json.loads((tmp_path / "command" / "moe_fast.json").read_text())
    assert manifest["request"]["routers"]["logit_std"] == 2.5
    assert "logit_std: 2.5" in (tmp_path / "command" / "README.md").read_text()


def test_wrong_values_are_named_as_users_write_them(dense, tmp_path):
    pytest.importorskip("yaml")
    done = run("build", dense, "-o", tmp_path / "moe", "--logit-std", "-1")
    assert (done.returncode, "--logit-std must be above 0" in done.stderr) == (2, True)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"models: [{dense}]\nrouters: uniform\nlogit_std: 1\n")
    done = run("build", recipe, "-o", tmp_path / "moe")
    assert done.returncode == 1
    assert "recipe.yml:3: logit_std: cannot be given to uniform routers" in done.stderr
    done = run("build", recipe, "-o", tmp_path / "moe", "--logit-std", "1")
    assert "--logit-std is for models; write it into the recipe" in done.stderr
