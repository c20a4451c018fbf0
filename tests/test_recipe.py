"""Recipe files: what they mean, and what is wrong with those that mean nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "typer", "yaml"):
    pytest.importorskip(extra)

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

from command import run
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    RecipeError,
    RouterStart,
    build_moe,
    build_recipe,
    read_recipe,
)
from moe_fast.checkpoint.check import check_moe
from moe_fast.checkpoint.random_pieces import choose_stream
from moe_fast.config import Dtype
from moe_fast.demo import make_dense_model
from moe_fast.request import ROUTER_METHODS
from reference import normal as reference


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
    assert asked.routers.method == "cheap_embed"
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


def test_nulls_are_absent_keys():
    model = "{model: {path: b, revision: null}, lora: null, override_architecture: null}"
    asked = request(f"""\
base_model: a
gate_mode: random
routers: ~
num_experts: null
dtype: null
shared_experts: null
experts:
  - source_model: {model}
    noise_scale: null
    source_layers: ~
  - {{source_model: c, positive_prompts: null, lora: null}}
""")
    folder = Path.cwd()
    assert asked.models == (ExpertSource(str(folder / "b")), ExpertSource(str(folder / "c")))
    assert asked.config.num_experts == 2


def test_a_home_folder(monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path.cwd()))
    write("base_model: ~/a\nmodels: [~/b, {model: ~/c}]\n")
    asked = read_recipe("~/recipe.yml").request
    found = [asked.base, *(source.model for source in asked.models)]
    assert found == [str(Path.cwd() / name) for name in "abc"]
    assert build_recipe("~/recipe.yml", "moe").num_experts == 8


@pytest.mark.parametrize("name", ["recipe.txt", "recipe.YAML", "recipe.yaml", "recipe", "r.json"])
def test_a_recipe_may_have_any_name(name):
    write(TWO).rename(name)
    assert build_recipe(name, "moe").num_experts == 2


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("torch.float16", "float16"),
        ("float32", "float32"),
        ("fp32", "float32"),
    ],
)
def test_dtypes_are_called_as_elsewhere(text, dtype):
    assert request(f"models: [a]\ndtype: {text}\n").dtype is Dtype(dtype)


@pytest.mark.parametrize("method", ROUTER_METHODS)
def test_routers(method):
    prompts = "positive_prompts: "
    text = f"models: [{{source_model: a, {prompts}[x]}}, {{source_model: b, {prompts}[y]}}]\n"
    expected = "normal" if method == "auto" else method
    assert request(f"{text}routers: {method}\n").routers.method == expected


def test_routers_by_default():
    assert request("models: [a]\n").routers == RouterStart("normal", logit_std=3)
    assert request("models: [a]\nlogit_std: 1\n").routers == RouterStart("normal", logit_std=1)
    assert request("models: [a]\ntexts: [t.txt]\n").routers.method == "calibrated"
    kinds = "models: [{source_model: a, texts: [a.txt]}, {source_model: b, texts: [b.txt]}]\n"
    assert request(kinds).routers == RouterStart("calibrated")
    assert request("models: [a]\nsplit: random\n").routers == RouterStart("balanced")
    assert request("models: [a]\nnum_experts: 1\nexperts_per_token: 1\n").routers == RouterStart(
        "balanced"
    )


@pytest.mark.parametrize(
    ("mode", "method"),
    [("random", "normal"), ("uniform_random", "linear"), ("cheap_embed", "cheap_embed")],
)
def test_gate_modes_are_mergekits_words(mode, method):
    prompted = TWO.replace("b\n", "b\n    positive_prompts: [x]\n") + "    positive_prompts: [y]\n"
    assert request(prompted.replace("random", mode)).routers.method == method


def test_only_a_repository_has_revisions():
    (problem,) = problems("models: [{model: a, revision: main}]\n")
    assert problem.endswith("a@main': only a repository on the Hugging Face Hub has revisions")


def test_our_own_keys():
    asked = request(
        """\
models: [a, {model: b}, {source_model: c, source_layers: [1, 0]}]
num_experts: 6
routers: random
seed: 3
"""
    )
    folder = Path.cwd()
    assert [m.model for m in asked.models] == [str(folder / name) for name in "abc"]
    assert asked.models[2].source_layers == (1, 0)
    assert asked.base == str(folder / "a")
    assert asked.config == MoeConfig(6, 2)
    assert (asked.routers.method, asked.seed) == ("random", 3)


ALL_OF_THEM = """\
base_model: a
gate_mode: cheap_embed
dtype: torch.bfloat16
architecture: Qwen
experts_per_token: 1
layout: fused
dense_layers: [1, 0, 1]
experts:
  - source_model: b
    positive_prompts: [x]
  - source_model: c
    positive_prompts: [y]
    negative_prompts: []
shared_experts:
  - source_model: a
    positive_prompts: [z, w]
    negative_prompts: [v]
    residual_scale: 0.1
"""


def test_the_keys_about_the_output():
    asked = request(ALL_OF_THEM)
    assert (asked.dtype, asked.target, asked.layout) == ("bfloat16", "qwen", "fused")
    assert asked.dense_layers == (0, 1)
    assert asked.shared_experts == (
        ExpertSource(
            str(Path.cwd() / "a"),
            residual_scale=0.1,
            positive_prompts=("z", "w"),
            negative_prompts=("v",),
        ),
    )


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("architecture: mixtral", "mixtral"),
        ("architecture: mix", "mixtral"),
        ("architecture: DeepSeek MoE", "deepseek"),
        ("architecture: qwen", "qwen"),
        ("architecture: qwen moe", "qwen2_moe"),
        ("architecture: qwen3", "qwen3_moe"),
        ("target: flex-olmo", "flex_olmo"),
        ("target: auto", "auto"),
        ("", "mergekit"),
    ],
)
def test_architecture_is_the_beginning_of_mergekits_name_for_a_target(text, target):
    assert request(f"{TWO}{text}\n").target == target


def test_what_is_ours_alone_goes_by_our_order_of_targets():
    assert request("models: [a, b]\n").target == "auto"


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, "bfloat16"),
        ({"torch_dtype": None}, None),
        ({"torch_dtype": "float8"}, None),
        ({"dtype": ["float16"]}, None),
    ],
)
def test_without_a_dtype_it_is_the_one_that_the_bases_configuration_names(config, dtype):
    file = Path("a/config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch_dtype": None} | config))
    assert request(TWO).dtype == dtype
    assert request(TWO + "dtype: float32\n").dtype == "float32"
    assert request("models: [a, b]\n").dtype is None
    file.write_text("{")
    assert request(TWO).dtype is None
    with pytest.raises(CheckpointError, match=r"a.config\.json: not valid JSON"):
        build_recipe("recipe.yml", "moe")


@pytest.mark.parametrize(
    ("base", "shared", "target"),
    [
        ("a", "", "mixtral"),
        ("a", "shared_experts: [{source_model: a}]", "deepseek"),
        ("a", "shared_experts: [{source_model: a}, {source_model: b}]", "deepseek"),
        ("a", "shared_experts: [{source_model: a, positive_prompts: [x]}]", "qwen2_moe"),
        ("a", "shared_experts: []", "mixtral"),
    ],
)
def test_the_target_is_the_one_that_mergekit_takes(base, shared, target):
    report = build_recipe(write(f"{TWO}{shared}\n"), "moe")
    assert report.target == target
    assert check_moe("moe").passed


def test_prompts_of_shared_experts_make_their_gate():
    report = build_recipe(
        write(ALL_OF_THEM.replace("layout: fused\ndense_layers: [1, 0, 1]", "")), "moe"
    )
    assert report.target == "qwen2_moe"
    assert check_moe("moe").passed
    embeddings = load_file("a/model.safetensors")["model.embed_tokens.weight"].astype(np.float64)

    def direction(text: bytes) -> np.ndarray:
        total = embeddings[list(text)].sum(axis=0)
        return total / np.linalg.norm(total)

    expected = direction(b"zw") - direction(b"v")
    expected = (expected / np.linalg.norm(expected)).astype(np.float32).astype(bfloat16)
    built = load_file("moe/model.safetensors")
    for layer in range(2):
        gate = built[f"model.layers.{layer}.mlp.shared_expert_gate.weight"]
        assert gate.tobytes() == expected.tobytes()


def test_a_target_without_a_gate_refuses_prompts_of_shared_experts():
    text = ALL_OF_THEM.replace("architecture: Qwen\nexperts_per_token: 1\nlayout: fused\n", "")
    text = text.replace("dense_layers: [1, 0, 1]", "architecture: deepseek")
    message = r"prompts of the shared expert .*a: DeepSeek-MoE has no gate for it that prompts"
    with pytest.raises(CheckpointError, match=message):
        build_recipe(write(text), "moe")
    assert not Path("moe").exists()


def test_an_empty_prompt_is_the_beginning_of_the_text():
    config = Path("a/tokenizer_config.json")
    config.write_text(json.dumps({"bos_token": "<"}))
    text = TWO.replace("random", "cheap_embed").replace("b\n", "b\n    positive_prompts: ['']\n")
    build_recipe(write(text + "    positive_prompts: [y]\n"), "moe")
    row = load_file("a/model.safetensors")["model.embed_tokens.weight"][ord("<")].astype(float)
    expected = (row / np.linalg.norm(row)).astype(np.float32)
    assert routers("moe")[0][0].tobytes() == expected.tobytes()


# The example of mergekit's documentation, whose models are names on the Hub.
UPCYCLING = "base_model: BEE-spoke-data/smol_llama-220M-GQA\ngate_mode: random\ndtype: bfloat16\n"
UPCYCLING += "experts:\n" + "  - source_model: BEE-spoke-data/smol_llama-220M-GQA\n" * 8


def test_the_upcycling_recipe_of_mergekits_documentation():
    make_dense_model("BEE-spoke-data/smol_llama-220M-GQA", seed=0)
    report = build_recipe(write(UPCYCLING), "moe")
    assert (report.target, report.num_experts, report.num_experts_per_tok) == ("mixtral", 8, 2)
    built = load_file("moe/model.safetensors")
    assert {array.dtype for array in built.values()} == {np.dtype(bfloat16)}
    assert check_moe("moe").passed


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
    assert request(text).routers.method == "hidden"
    assert request(text + "routers: random\n").routers.method == "random"


def test_a_recipe_gives_what_build_moe_gives():
    options = "    noise_scale: 0.125\n    residual_scale: 0.5\n    source_layers: [1, 1]\n"
    recipe = write(TWO.replace("gate_mode", "routers") + options + "seed: 5\n")
    build_recipe(recipe, "from-recipe", max_shard_size="100kB")
    c = ExpertSource("c", noise_scale=0.125, residual_scale=0.5, source_layers=(1, 1))
    config = MoeConfig(2, 2)
    build_moe(
        ["b", c],
        "from-call",
        config,
        base="a",
        target="mixtral",
        dtype="float32",  # what the base's configuration names
        routers="random",
        seed=5,
        max_shard_size="100kB",
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
        stream = choose_stream(9, f"{layer} router")
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


def test_texts_without_effect_are_noted():
    recipe = read_recipe(write(TWO + "    texts: [x]\n"))
    assert recipe.notes == (
        "recipe.yml:6: experts[1].texts: texts of an expert have no effect with gate_mode random",
    )


def test_the_texts_of_routers_are_read():
    models = "models:\n- {source_model: a, texts: [x.txt]}\n- {source_model: b, texts: [y.txt]}\n"
    found = request(f"{models}routers: ridge\ntokens_used: 500\ndevice: cuda\nlogit_std: 2\n")
    start = RouterStart("ridge", logit_std=2, tokens_used=500, device="cuda")
    assert found.routers == start
    assert [model.texts for model in found.models] == [("x.txt",), ("y.txt",)]
    found = request("models: [a]\nrouters: calibrated\ntokens: t.npy\n")
    assert found.routers == RouterStart("calibrated", tokens="t.npy")


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
    text = TWO + "    noise_scale: lots\nseed: x\nsed: 1\nseed: 2\nrouter_init: random\n7: 8\n"
    assert [line.split(": ")[:2] for line in problems(text)] == [
        ["recipe.yml:6", "experts[1].noise_scale"],
        ["recipe.yml:7", "seed"],
        ["recipe.yml:8", "sed"],
        ["recipe.yml:9", "seed"],
        ["recipe.yml:10", "router_init"],
        ["recipe.yml:11", "a key must be a string, got 7"],
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


MERGED_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join(['*' + before] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"^recipe\.yml: its aliases stand for more than 200000 values$"),
        (MERGED_BOMB, r"^recipe\.yml: its aliases stand for more than 200000 values$"),
        ("&a [*a]", r"^recipe\.yml: is nested too deep$"),
        ("&a {<<: *a}", r"^recipe\.yml: is nested too deep$"),
        ("&a {? *a : 1}", r"recipe\.yml:1: a key must be a string, got a mapping\n"),
        ("[" * 100_000, r"^recipe\.yml: is nested too deep$"),
        ("{a: " * 100_000, r"^recipe\.yml: is nested too deep$"),
        ("- " * 100_000, r"^recipe\.yml: is nested too deep$"),
        (f"models: [{'{model: ' * 200} a {'}' * 200}]", r"^recipe\.yml: is nested too deep$"),
        ("a: " + "x" * 1_000_000, r"^recipe\.yml: is longer than 1000000 bytes; recipes are"),
    ],
    ids=range(10),
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
    with pytest.raises(RecipeError, match=r"^nothing\.yml: No such file or directory$"):
        read_recipe("nothing.yml")
    Path("folder.yml").mkdir()
    with pytest.raises(RecipeError, match=r"^folder\.yml: is not a regular file$"):
        read_recipe("folder.yml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs are a thing of POSIX")
def test_a_fifo_does_not_hang():
    os.mkfifo("fifo.yml")
    with pytest.raises(RecipeError, match=r"^fifo\.yml: is not a regular file$"):
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
        (["--routers", "balanced"], "--routers is for models; write it into the recipe"),
        (["a"], "MODEL must be the recipe alone: it names its models itself"),
    ],
)
def test_the_command_says_what_a_recipe_overrides(arguments, message):
    pytest.importorskip("typer")
    write(TWO)
    done = run("build", "recipe.yml", *arguments, "-o", "moe")
    assert done.returncode == 2
    # typer draws a box around it, whose lines break where the terminal is narrow.
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not Path("moe").exists()
