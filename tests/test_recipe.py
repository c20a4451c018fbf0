"""Recipe files: what they mean, and what is wrong with those that mean nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "typer", "yaml"):
    pytest.importorskip(extra)

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from moe_fast import (
    ExpertSource,
    MoeConfig,
    RecipeError,
    build_moe,
    build_recipe,
    read_recipe,
)
from moe_fast.checkpoint.check import check_moe
from moe_fast.checkpoint.noise import noise_stream
from moe_fast.demo import make_dense_model
from moe_fast.kernels import reference


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """Three models beside the recipe, which runs where it stands."""
    for seed, name in enumerate("abc"):
        make_dense_model(tmp_path / name, seed=seed)
    monkeypatch.chdir(tmp_path)


def write(text: str) -> Path:
    Path("recipe.yml").write_text(text, encoding="utf-8")
    return Path("recipe.yml")


def request(text: str):
    return read_recipe(write(text)).request


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(RecipeError, match=r"^(\d+ problems:\n  - )?recipe\.yml:") as error:
        read_recipe(write(text))
    return error.value.problems


TWO = """\
base_model: a
gate_mode: random
experts:
  - source_model: b
  - source_model: c
"""


def test_everything_of_mergekits_that_is_about_experts():
    asked = request(
        """\
base_model: a
gate_mode: cheap_embed
experts_per_token: 1
experts:
  - source_model: b
    noise_scale: 0.5
    residual_scale: 1e-3  # YAML takes this for a string, mergekit-moe for a number
    positive_prompts:
      - "hello"
      - '5'
    negative_prompts: [bye]
  - source_model: {model: c}
    positive_prompts: &more ["x"]
    negative_prompts: null
  - source_model:
      model:
        path: a
    positive_prompts: *more
    residual_scale: 2
"""
    )
    folder = Path.cwd()
    assert asked.base == str(folder / "a")
    assert asked.config == MoeConfig(3, 1)
    assert asked.gate_mode == "cheap_embed"
    assert asked.models == (
        ExpertSource(
            str(folder / "b"),
            noise_scale=0.5,
            residual_scale=0.001,
            positive_prompts=("hello", "5"),
            negative_prompts=("bye",),
        ),
        ExpertSource(str(folder / "c"), positive_prompts=("x",)),
        ExpertSource(str(folder / "a"), residual_scale=2, positive_prompts=("x",)),
    )


def test_our_own_keys():
    asked = request(
        """\
models: [a, {model: b}, {source_model: c, source_layers: [1, 0]}]
num_experts: 6
router_init: random
seed: 3
"""
    )
    folder = Path.cwd()
    assert [m.model for m in asked.models] == [str(folder / name) for name in "abc"]
    assert asked.models[2].source_layers == (1, 0)
    assert asked.base == str(folder / "a")
    assert asked.config == MoeConfig(6, 2)
    assert (asked.router_init, asked.gate_mode, asked.seed) == ("random", None, 3)


def test_merge_keys():
    asked = request(
        """\
base_model: a
gate_mode: random
experts:
  - &first {source_model: b, noise_scale: 0.5, residual_scale: 0.25}
  - <<: *first
    noise_scale: 0.75
"""
    )
    second = asked.models[1]
    assert (Path(second.model).name, second.noise_scale, second.residual_scale) == ("b", 0.75, 0.25)


def test_experts_without_a_gate_mode_are_routed_by_hidden_states_as_in_mergekit():
    text = TWO.replace("gate_mode: random\n", "").replace("b\n", "b\n    positive_prompts: [x]\n")
    text += "    positive_prompts: [y]\n"
    assert request(text).gate_mode == "hidden"
    assert request(text + "router_init: random\n").gate_mode is None


def test_a_recipe_gives_what_build_moe_gives():
    options = "    noise_scale: 0.125\n    residual_scale: 0.5\n    source_layers: [1, 1]\n"
    recipe = write(TWO.replace("gate_mode", "router_init") + options + "seed: 5\n")
    build_recipe(recipe, "from-recipe", max_shard_size=100_000)
    c = ExpertSource("c", noise_scale=0.125, residual_scale=0.5, source_layers=(1, 1))
    config = MoeConfig(2, 2)
    build_moe(
        ["b", c],
        "from-call",
        config,
        base="a",
        router_init="random",
        seed=5,
        max_shard_size=100_000,
    )
    ours, theirs = (sorted(Path(name).iterdir()) for name in ("from-recipe", "from-call"))
    assert [f.name for f in ours] == [f.name for f in theirs]
    assert len(ours) > 6
    for left, right in zip(ours, theirs, strict=True):
        assert left.read_bytes() == right.read_bytes()
    assert check_moe("from-recipe").passed


def routers(folder: str) -> np.ndarray:
    tensors = load_file(Path(folder) / "model.safetensors")
    return np.stack([tensors[f"model.layers.{n}.block_sparse_moe.gate.weight"] for n in range(2)])


def test_random_gates_are_standard_normal():
    build_recipe(write(TWO + "seed: 9\n"), "moe")
    for layer, router in enumerate(routers("moe")):
        stream = noise_stream(9, f"{layer} router")
        draws = [reference.normal(stream, i) for i in range(router.size)]
        assert router.tobytes() == np.array(draws, np.float32).tobytes()
    assert check_moe("moe").passed


def test_uniform_random_gates_fill_the_range_of_a_linear_layer():
    for seed in (0, 1):
        text = TWO.replace("random", "uniform_random") + f"seed: {seed}\n"
        build_recipe(write(text), f"moe-{seed}")
    values = np.concatenate([routers("moe-0").ravel(), routers("moe-1").ravel()])
    bound = 1 / np.sqrt(64)
    assert np.abs(values).max() <= bound
    # Three standard errors of the mean and of the variance of a uniform distribution.
    assert abs(values.mean()) < 3 * bound / np.sqrt(3 * values.size)
    assert values.var() == pytest.approx(bound**2 / 3, rel=3 * np.sqrt(0.8 / values.size))
    assert len(np.unique(values)) == values.size
    assert check_moe("moe-1").passed


def test_prompts_without_effect_are_noted():
    recipe = read_recipe(write(TWO + "    positive_prompts: [x]\n"))
    assert recipe.notes == (
        "recipe.yml:6: experts[1].positive_prompts: prompts have no effect with gate_mode random",
    )
    report = build_recipe("recipe.yml", "moe")
    assert report.warnings[: len(recipe.notes)] == recipe.notes


PROMPTS = """\
base_model: a
gate_mode: cheap_embed
experts:
  - source_model: b
    positive_prompts: [x]
  - source_model: c
"""


def wrong_recipes() -> list[list[str]]:
    """Recipes, each with what is said of it."""
    cases = (Path(__file__).parent / "wrong_recipes.txt").read_text().split("\n\n")
    return [case.rstrip("\n").split("\n=> recipe.yml") for case in cases]


@pytest.mark.parametrize(("text", "expected"), wrong_recipes(), ids=lambda text: text[-40:])
def test_what_is_wrong_is_named_with_its_line(text, expected):
    assert problems(text) == (f"recipe.yml{expected}",)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff"])
def test_an_empty_recipe(text):
    assert problems(text) == ("recipe.yml: is empty",)


def test_all_problems_at_once():
    text = TWO + "    noise_scale: lots\nseed: x\nsed: 1\n"
    assert [line.split(": ")[:2] for line in problems(text)] == [
        ["recipe.yml:6", "experts[1].noise_scale"],
        ["recipe.yml:7", "seed"],
        ["recipe.yml:8", "sed"],
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            BOMB,
            r"^recipe\.yml: its aliases stand for more than 200000 values, or for what holds them$",
        ),
        (
            "&a [*a]",
            r"^recipe\.yml: its aliases stand for more than 200000 values, or for what hol",
        ),
        ("&a {? *a : 1}", r"^recipe\.yml: (is not YAML: found unhashable|its aliases stand for)"),
        ("[" * 100_000, r"^recipe\.yml:1: nested deeper than 16 levels$"),
        ("{a: " * 100_000, r"^recipe\.yml:1: nested deeper than 16 levels$"),
        ("- " * 100_000, r"^recipe\.yml:1: nested deeper than 16 levels$"),
        ("a: " + "x" * 1_000_000, r"^recipe\.yml: is longer than 1000000 bytes; a recipe is"),
    ],
    ids=["bomb", "itself", "its own key", "lists", "mappings", "items", "long"],
)
def test_what_would_eat_time_or_memory_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        read_recipe(write(text))


def test_what_is_no_text_is_refused():
    Path("recipe.yml").write_bytes(b"base_model: \xff\xfe")
    with pytest.raises(
        RecipeError, match=r"^recipe\.yml: is not UTF-8: 'utf-8' codec can't decode"
    ):
        read_recipe("recipe.yml")
    with pytest.raises(RecipeError, match=r"^nothing\.yml: is no file$"):
        read_recipe("nothing.yml")
    Path("folder.yml").mkdir()
    with pytest.raises(RecipeError, match=r"^folder\.yml: is no file$"):
        read_recipe("folder.yml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are a thing of POSIX")
def test_a_fifo_does_not_hang():
    os.mkfifo("fifo.yml")
    with pytest.raises(RecipeError, match=r"^fifo\.yml: is no file$"):
        read_recipe("fifo.yml")


words = ["base_model", "experts", "models", "source_model", "gate_mode", "random", "a", "1", "~"]
signs = [*"[]{}'\"|>#%@?", "&a", "*a", "!!str", "!x", "<<", "---"]
pieces_of_recipes = st.sampled_from([*words, *signs, ": ", "- ", "\n", "  "])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(pieces_of_recipes).map("".join) | st.text())
@example("<<: 1")
@example("<<: [1]")
@example("? {a: b}\n: c")
@example("? <<\n: [[a]]")
@example("models: [{model: {model: {model: a}}}]")
@example("models: !!seq a")
@example("!!map [a]")
@example("models: [!!str [a]]")
def test_any_text_is_a_recipe_or_an_error(text):
    try:
        read_recipe(write(text))
    except RecipeError as error:
        named = [problem.startswith("recipe.yml:") for problem in error.problems]
    else:
        named = [True]
    assert all(named)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_fast", *arguments]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_command():
    pytest.importorskip("typer")
    write(TWO + "    positive_prompts: [x]\n")
    done = run("build", "recipe.yml", "-o", "moe")
    assert done.returncode == 0
    assert done.stderr == (
        "warning: recipe.yml:6: experts[1].positive_prompts: "
        "prompts have no effect with gate_mode random\n"
    )
    assert check_moe("moe").passed
    write(TWO + "sed: 1\n")
    done = run("build", "recipe.yml", "-o", "other")
    assert done.returncode == 1
    assert done.stderr == "error: recipe.yml:6: sed: unknown key; did you mean seed?\n"
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "8"], "--experts is for models; write it into the recipe"),
        (["--router-init", "balanced"], "--router-init is for models; write it into the recipe"),
        (["a"], "a recipe stands alone, without models or other recipes"),
    ],
)
def test_the_command_says_what_a_recipe_overrides(arguments, message):
    pytest.importorskip("typer")
    write(TWO)
    done = run("build", "recipe.yml", *arguments, "-o", "moe")
    assert done.returncode == 2
    assert message in done.stderr
    assert not Path("moe").exists()
