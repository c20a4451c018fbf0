"""Layers without experts: their FFN is the base's, and config.json says which they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from command import run
from families import make_model
from folders import config_of, edit_config
from forward import Model
from moe_fast import (
    CheckpointError,
    ExpertSource,
    MoeConfig,
    MoeConfigError,
    build_moe,
    check_moe,
    convert_moe,
    inspect_model,
    write_report,
)
from moe_fast.families.registry import moe_families

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)
TOKENS = np.random.default_rng(0).integers(96, size=30)
LAYERS = 6
ROLES = ("gate_proj", "up_proj", "down_proj")
# Source family, target, dense layers, what config.json says of them.
CASES = {
    "qwen2": ("qwen2", "qwen2_moe", (0, 5), {"mlp_only_layers": [0, 5], "decoder_sparse_step": 1}),
    "llama": ("llama", "qwen2_moe", (2,), {"mlp_only_layers": [2]}),
    "qwen3": ("qwen3", "qwen3_moe", (1, 2, 3, 4, 5), {"mlp_only_layers": [1, 2, 3, 4, 5]}),
    "first": ("llama", "deepseek", (0, 1), {"first_k_dense_replace": 2, "moe_layer_freq": 1}),
    "every second": ("llama", "deepseek", (1, 3, 5), {"moe_layer_freq": 2}),
    "both": ("llama", "deepseek", (0, 1, 2, 4, 5), {"first_k_dense_replace": 3}),
    "last": ("llama", "deepseek", (0, 1, 2, 3, 4), {"first_k_dense_replace": 5}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for family in ("llama", "qwen2", "qwen3"):
        for seed, name in enumerate((family, f"{family}-other")):
            make_model(folder / name, family, seed=seed, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(params=CASES)
def case(request, sources):
    family, target, layers, keys = CASES[request.param]
    return sources / family, target, layers, keys


def test_the_function_is_kept(case, tmp_path):
    dense, target, layers, keys = case
    report = build_moe(dense, tmp_path / "moe", CONFIG, target=target, dense_layers=layers)
    assert report.dense_layers == layers
    expected = Model(dense).logits(TOKENS)
    logits = Model(tmp_path / "moe").logits(TOKENS)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    config = config_of(tmp_path / "moe")
    assert keys.items() <= config.items()


def test_their_ffn_is_the_base_models_and_nothing_else_is_there(case, tmp_path):
    dense, target, layers, _ = case
    other = dense.with_name(dense.name + "-other")
    build_moe(other, tmp_path / "moe", CONFIG, base=dense, target=target, dense_layers=layers)
    built = load_file(tmp_path / "moe" / "model.safetensors")
    base, source = (load_file(folder / "model.safetensors") for folder in (dense, other))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp."
        names = {name.removeprefix(prefix) for name in built if name.startswith(prefix)}
        if layer in layers:
            assert names == {f"{role}.weight" for role in ROLES}
            for role in ROLES:
                assert (built[f"{prefix}{role}.weight"] == base[f"{prefix}{role}.weight"]).all()
        else:
            assert "gate.weight" in names
            expert = built[f"{prefix}experts.3.up_proj.weight"]
            assert (expert == source[f"{prefix}up_proj.weight"]).all()


def test_what_reads_checkpoints_knows_them(case, tmp_path):
    dense, target, layers, _ = case
    build_moe(dense, tmp_path / "moe", CONFIG, target=target, dense_layers=layers)
    number = LAYERS - len(layers)
    checked = check_moe(tmp_path / "moe")
    assert checked.passed, checked.problems
    assert checked["experts"].summary == (
        f"{4 * number} experts equal their sources, byte for byte"
    )
    found = inspect_model(tmp_path / "moe")
    assert (found.num_layers, found.num_moe_layers) == (LAYERS, number)
    assert not found.problems
    assert [router.layer for router in found.routers] == [
        layer for layer in range(LAYERS) if layer not in layers
    ]
    page = write_report(tmp_path / "moe", tmp_path / "page.html").read_text()
    assert f"{LAYERS}, {number} with experts" in page
    card = (tmp_path / "moe" / "README.md").read_text()
    assert f"4 experts in each of {number} layers" in card
    assert "| 0-3 | " in card
    assert " | the same | none |" in card


@pytest.mark.parametrize("name", ["qwen2", "llama", "qwen3"])  # DeepSeek-MoE has one layout
def test_they_are_converted(sources, name, tmp_path):
    family, target, layers, _ = CASES[name]
    dense = sources / family
    build_moe(dense, tmp_path / "moe", CONFIG, target=target, dense_layers=layers)
    convert_moe(tmp_path / "moe", tmp_path / "fused", layout="fused")
    direct = {"target": target, "dense_layers": layers, "layout": "fused"}
    build_moe(dense, tmp_path / "direct", CONFIG, **direct)
    left, right = (load_file(tmp_path / n / "model.safetensors") for n in ("fused", "direct"))
    assert left.keys() == right.keys()
    assert all(left[name].tobytes() == right[name].tobytes() for name in left)
    assert check_moe(tmp_path / "fused").passed


def test_source_layers_and_gates_are_those_of_the_layers_with_experts(sources, tmp_path):
    turned = ExpertSource(sources / "qwen2", source_layers=range(LAYERS)[::-1])
    report = build_moe(
        [turned, sources / "qwen2"], tmp_path / "moe", CONFIG, dense_layers=(0, 3), seed=4,
        routers="normal",
    )  # fmt: skip
    assert len(report.routers.mean_entropy) == LAYERS - 2
    assert check_moe(tmp_path / "moe").passed
    built = load_file(tmp_path / "moe" / "model.safetensors")
    base = load_file(sources / "qwen2" / "model.safetensors")
    for layer, source in ((1, 4), (5, 0)):
        expert = built[f"model.layers.{layer}.mlp.experts.0.down_proj.weight"]
        assert (expert == base[f"model.layers.{source}.mlp.down_proj.weight"]).all()
    assert "| 0, 2 | qwen2 | 4, 3, 1, 0 | none |" in (tmp_path / "moe" / "README.md").read_text()
    build_moe(
        sources / "qwen2", tmp_path / "all", CONFIG, seed=4, routers="normal", dense_layers=[]
    )
    everywhere = load_file(tmp_path / "all" / "model.safetensors")
    for layer in (1, 2, 4, 5):  # whether others are dense does not matter to a router
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert (built[name] == everywhere[name]).all()


def test_warnings_name_the_layers_by_their_numbers(sources, tmp_path):
    report = build_moe(
        sources / "qwen2", tmp_path / "moe", CONFIG, dense_layers=(0, 3), routers="uniform"
    )
    assert [w.split(":")[0] for w in report.routers.warnings] == ["layers 1-2, 4-5"]


def test_auto_takes_a_target_that_can_say_it(sources, tmp_path):
    report = build_moe(sources / "llama", tmp_path / "moe", CONFIG, dense_layers=(4, 0, 4))
    assert report.target == "qwen2_moe"
    assert report.dense_layers == (0, 4)
    assert report.rejected_targets["mixtral"] == (
        "dense_layers 0, 4: Mixtral has experts in every layer",
    )
    assert report.rejected_targets["deepseek"] == (
        "dense_layers 0, 4: DeepSeek-MoE can leave the first layers dense, and of those after them "
        "all but every n-th, not these",
    )


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ([6], MoeConfigError, r"^dense_layers lists layer 6; the base model has 6, from 0 on$"),
        ([1, 6, 7, 8, 11], MoeConfigError, r"^dense_layers lists layers 6-8, 11; the base"),
        (range(6), MoeConfigError, r"^dense_layers lists every layer; an MoE has experts in"),
        ([-1], MoeConfigError, r"^dense_layers must be at least 0, got -1$"),
        (["0"], TypeError, r"^dense_layers must be an integer, got '0'"),
        ("0", TypeError, r"^dense_layers must list layers, got '0'$"),
        (3, TypeError, r"^dense_layers must list layers, got 3$"),
    ],
)
def test_what_cannot_be(sources, tmp_path, layers, error, message):
    with pytest.raises(error, match=message):
        build_moe(sources / "qwen2", tmp_path / "moe", CONFIG, dense_layers=layers)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("target", ["mixtral", "granitemoe", "granitemoeshared"])
def test_targets_without_a_place_for_them(sources, tmp_path, target):
    message = rf"^dense_layers 1: {moe_families()[target].title} has experts in every layer$"
    with pytest.raises(CheckpointError, match=message):
        build_moe(sources / "llama", tmp_path / "moe", CONFIG, target=target, dense_layers=[1])


layer_sets = st.integers(1, 12).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=n - 1))
)


@given(layer_sets)
def test_deepseeks_keys_mean_what_they_are_made_for(numbers):
    num_layers, layers = numbers
    keys = moe_families()["deepseek"].dense_keys(frozenset(layers), num_layers)
    # As DeepSeek's own code reads them.
    means = [
        {n for n in range(num_layers) if not (n >= first and n % step == 0)}
        for first in range(num_layers + 1)
        for step in range(1, num_layers + 1)
    ]
    if keys is None:
        assert layers not in means
    else:
        first, step = keys["first_k_dense_replace"], keys["moe_layer_freq"]
        assert {n for n in range(num_layers) if not (n >= first and n % step == 0)} == layers


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"mlp_only_layers": [0]}, "'model.layers.5.mlp.gate.weight' is missing"),
        ({"mlp_only_layers": [0, 1, 5]}, "'model.layers.1.mlp.gate.weight' is not part of a"),
        ({"decoder_sparse_step": 2}, "'model.layers.2.mlp.gate.weight' is not part of a"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be an integer of at least"),
        ({"mlp_only_layers": 5}, "mlp_only_layers is 5; it must list layers"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers is ['0']; it must list layers"),
    ],
)
def test_the_check_sees_another_layer_in_config_json(sources, tmp_path, keys, problem):
    build_moe(sources / "qwen2", tmp_path / "moe", CONFIG, dense_layers=(0, 5))
    edit_config(tmp_path / "moe", **keys)
    assert any(problem in found for found in check_moe(tmp_path / "moe")["structure"].problems)


def test_llama_cpp_wants_experts_everywhere(case, tmp_path):
    source, target, layers, _ = case
    dense = shutil.copytree(source, tmp_path / "dense")
    (dense / "tokenizer.json").write_text("{}")
    build_moe(dense, tmp_path / "moe", CONFIG, target=target, dense_layers=layers)
    readers = {reader.name: reader for reader in check_moe(tmp_path / "moe").readers}
    only_first = target == "deepseek" and layers in ((0, 1), (0, 1, 2, 3, 4))
    llama_cpp = readers["llama.cpp"]  # it may have other reasons: how it weighs experts
    assert any("dense" in reason for reason in llama_cpp.reasons) != only_first
    assert only_first or not llama_cpp.loads
    assert readers["vLLM"].loads


@pytest.mark.parametrize(("text", "layers"), [("0,5", (0, 5)), ("0-2, 4", (0, 1, 2, 4)), ("", ())])
def test_the_command(sources, tmp_path, text, layers):
    pytest.importorskip("typer")
    done = run("build", sources / "qwen2", "-o", tmp_path / "moe", "--dense-layers", text)
    assert done.returncode == 0, done.stderr
    assert config_of(tmp_path / "moe")["mlp_only_layers"] == list(layers)
    assert ("dense: " in done.stdout) == bool(layers)


@pytest.mark.parametrize("text", ["a", "0;1", "1-", "-1", "1-2-3"])
def test_the_command_says_how_layers_are_written(sources, tmp_path, text):
    pytest.importorskip("typer")
    done = run("build", sources / "qwen2", "-o", tmp_path / "moe", f"--dense-layers={text}")
    assert done.returncode == 2
    assert "must be a list of layers, such as 0,5 or 0-3" in done.stderr
    assert not (tmp_path / "moe").exists()
