"""One FFN as all experts: which neurons go where, and what the experts add up to."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("ml_dtypes")

import ml_dtypes
from hypothesis import given
from hypothesis import strategies as st

from adapters import make_adapter, merged
from families import make_model
from forward import Model
from moe_fast import (
    CheckpointError,
    MoeConfig,
    MoeConfigError,
    RecipeError,
    build_moe,
    check_moe,
    read_recipe,
)
from moe_fast.checkpoint.clusters import assign_evenly
from moe_fast.checkpoint.neurons import shuffle
from moe_fast.checkpoint.random_pieces import choose_stream

TOKENS = np.arange(24) * 37 % 96
WAYS = ["contiguous", "random", "clustered"]
FFN = ("gate_proj", "up_proj", "down_proj")


def parts_of(moe, source, layer, num_experts):
    """The neurons of the source in each expert of a GLM-4.5-MoE, whose weights keep their bytes."""
    found, whole = load_file(moe / "model.safetensors"), load_file(source / "model.safetensors")
    parts = []
    for expert in range(num_experts):
        prefix = f"model.layers.{layer}.mlp"
        gate = found[f"{prefix}.experts.{expert}.gate_proj.weight"]
        rows = whole[f"{prefix}.gate_proj.weight"]
        part = [int(np.flatnonzero((rows == row).all(axis=1))[0]) for row in gate]
        for role in FFN:
            weight = whole[f"{prefix}.{role}.weight"]
            expected = weight[:, part] if role == "down_proj" else weight[part]
            assert (found[f"{prefix}.experts.{expert}.{role}.weight"] == expected).all()
        parts.append(part)
    assert sorted(itertools.chain(*parts)) == list(range(len(rows)))
    return parts


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("target", "experts"), [("mixtral", 5), ("glm4_moe", 4), ("mixtral", 8)])
def test_all_parts_are_the_whole(tmp_path, way, target, experts):
    make_model(tmp_path / "dense", "llama")
    report = build_moe(
        tmp_path / "dense", tmp_path / "moe", MoeConfig(experts, experts), split=way,
        target=target, routers="random",
    )  # fmt: skip
    expected, found = (Model(tmp_path / name).logits(TOKENS) for name in ("dense", "moe"))
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    assert not [warning for warning in report.warnings if "approximation" in warning]
    assert check_moe(tmp_path / "moe").passed


def test_rows_of_the_router(tmp_path):
    """Of their own where a token takes some parts; the same where it takes all."""
    make_model(tmp_path / "dense", "llama")
    for chosen, rows in ((2, 5), (5, 1)):
        moe = tmp_path / f"moe{chosen}"
        build_moe(tmp_path / "dense", moe, MoeConfig(5, chosen), split="random", routers="linear")
        router = load_file(moe / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
        assert len(np.unique(router, axis=0)) == rows


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_are_scaled_by_the_number_of_parts(tmp_path, dtype):
    make_model(tmp_path / "dense", "llama", dtype=dtype)
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(8), split="contiguous")
    whole = load_file(tmp_path / "dense" / "model.safetensors")
    found = load_file(tmp_path / "moe" / "model.safetensors")
    for expert in range(8):
        rows = slice(expert * 10, expert * 10 + 10)
        for name, role, factor in (("w1", "gate", 1), ("w3", "up", 2), ("w2", "down", 4)):
            weight = whole[f"model.layers.1.mlp.{role}_proj.weight"].astype(np.float32) * factor
            expected = weight[:, rows] if role == "down" else weight[rows]
            written = found[f"model.layers.1.block_sparse_moe.experts.{expert}.{name}.weight"]
            assert written.tobytes() == expected.astype(dtype).tobytes()


def test_which_neurons_go_where(tmp_path):
    make_model(tmp_path / "dense", "llama")
    for way in WAYS:
        options = {"split": way, "target": "glm4_moe", "seed": 7}
        build_moe(tmp_path / "dense", tmp_path / way, MoeConfig(4), **options)
    parts = {way: parts_of(tmp_path / way, tmp_path / "dense", 1, 4) for way in WAYS}
    assert parts["contiguous"] == np.arange(80).reshape(4, 20).tolist()
    order = shuffle(80, choose_stream(7, "1 0 neurons"))
    assert parts["random"] == order.reshape(4, 20).tolist()
    other = parts_of(tmp_path / "random", tmp_path / "dense", 0, 4)
    assert other != parts["random"]

    gate = load_file(tmp_path / "dense" / "model.safetensors")[
        "model.layers.1.mlp.gate_proj.weight"
    ]
    rows = gate / np.linalg.norm(gate, axis=1, keepdims=True)

    def distance(parts):
        return sum(((rows[part] - rows[part].mean(axis=0)) ** 2).sum() for part in parts)

    assert distance(parts["clustered"]) < 0.98 * distance(parts["random"])


def test_clusters_that_are_there_are_found(tmp_path):
    """Rows around four directions, each as often, in any order and of any length."""
    dense = make_model(tmp_path / "dense", "llama", intermediate_size=64)
    random = np.random.default_rng(0)
    kinds = random.permutation(np.repeat(np.arange(4), 16))
    rows = random.normal(size=(4, 48))[kinds] + 0.02 * random.normal(size=(64, 48))
    rows *= random.uniform(0.1, 10, size=(64, 1))
    tensors = load_file(dense / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate_proj.weight"] = rows.astype(np.float32)
    save_file(tensors, dense / "model.safetensors")
    build_moe(dense, tmp_path / "moe", MoeConfig(4), split="clustered", target="glm4_moe", seed=2)
    for part in parts_of(tmp_path / "moe", dense, 0, 4):
        assert len({*kinds[part].tolist()}) == 1


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_the_assignment_costs_least(columns, size, seed):
    costs = np.random.default_rng(seed).normal(size=(columns * size, columns)).astype(np.float32)
    labels = assign_evenly(costs)
    assert (np.bincount(labels, minlength=columns) == size).all()
    if len(labels) <= 6:
        best = min(
            sum(float(costs[row, column]) for row, column in enumerate(order))
            for order in {*itertools.permutations(labels.tolist())}
        )
        found = sum(float(costs[row, column]) for row, column in enumerate(labels))
        assert found <= best + 1e-6
    for one, other in itertools.combinations(range(len(labels)), 2):  # no exchange is better
        a, b = labels[one], labels[other]
        change = costs[one, b] + costs[other, a] - costs[one, a] - costs[other, b]
        assert change >= -1e-6


def test_an_assignment_of_equal_costs_ends():
    labels = assign_evenly(np.zeros((64, 8), np.float32))
    assert (np.bincount(labels) == 8).all()


def test_the_manifest_remembers_the_clusters(tmp_path):
    make_model(tmp_path / "dense", "llama")
    options = {"split": "clustered", "target": "glm4_moe", "dense_layers": [0]}
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(4), **options)
    file = tmp_path / "moe" / "moe_fast.json"
    manifest = json.loads(file.read_text())
    kept = manifest["decisions"]["clusters"]
    assert list(kept) == ["1"]
    labels = kept["1"].split()
    assert sorted(labels) == sorted("0123" * 20)
    parts = parts_of(tmp_path / "moe", tmp_path / "dense", 1, 4)
    assert [labels[neuron] for neuron in parts[2]] == ["2"] * 20

    first, second = labels.index("0"), labels.index("1")
    labels[first], labels[second] = "1", "0"
    for wrong, status in (
        (" ".join(labels), "failed"),
        ("0 1", "not possible"),
        (kept["1"].replace("3", "4"), "not possible"),
        (kept["1"].replace("3", "2"), "not possible"),
        ("x", "not possible"),
        (3, "not possible"),
    ):
        manifest["decisions"]["clusters"] = {"1": wrong}
        file.write_text(json.dumps(manifest))
        assert check_moe(tmp_path / "moe")["experts"].status == status
    for wrong in ({}, [], {"0": kept["1"]}, "x"):
        manifest["decisions"]["clusters"] = wrong
        file.write_text(json.dumps(manifest))
        assert check_moe(tmp_path / "moe")["experts"].status == "not possible"


@pytest.mark.parametrize("way", WAYS)
def test_a_part_drawn_anew_and_an_adapter(tmp_path, way):
    base = make_model(tmp_path / "base", "llama")
    adapter = make_adapter(tmp_path / "adapter", base)
    merged(base, adapter, tmp_path / "merged")
    for name, model in (("one", adapter), ("two", tmp_path / "merged")):
        build_moe(model, tmp_path / name, MoeConfig(5), split=way, reinit=0.5, base=base)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((one[name] == two[name]).all() for name in one)
    assert check_moe(tmp_path / "one").passed


def test_what_is_lost_is_said(tmp_path):
    make_model(tmp_path / "dense", "llama")
    report = build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(8, 4), split="random")
    assert any("4 of 8 parts of one FFN: an approximation" in w for w in report.warnings)
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "the 8 equal parts of one FFN, whose neurons were divided in a random order" in card
    assert 'split: "random"' in card


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"split": "some"}, MoeConfigError, r"split must be one of 'contiguous', 'random', 'clu"),
        ({"granularity": 2}, MoeConfigError, r"split splits one FFN into all experts; leave out g"),
        ({"shuffle": True}, MoeConfigError, r"split says by itself which neurons go where; leave"),
        ({"models": 2}, MoeConfigError, r"split splits the FFNs of one model, got 2 models"),
        ({"routers": "hidden"}, MoeConfigError, r"routers 'hidden' makes one row of a model's pro"),
        ({"granularity": 2, "shuffle": True, "models": 2}, MoeConfigError, r"(?s)3 problems.*shuf"),
        ({"config": MoeConfig(3)}, CheckpointError, r"intermediate_size 80 is not a multiple of "
         r"the number of experts, 3"),
        ({"config": MoeConfig(3), "split": "clustered"}, CheckpointError, r"size 80 is not a mult"),
    ],
)  # fmt: skip
def test_wrong_input(tmp_path, options, error, message):
    make_model(tmp_path / "dense", "llama")
    options = {"split": "random", "config": MoeConfig(8), **options}
    models = [tmp_path / "dense"] * options.pop("models", 1)
    with pytest.raises(error, match=message):
        build_moe(models, tmp_path / "moe", **options)
    assert not (tmp_path / "moe").exists()


def test_recipes(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    make_model(tmp_path / "dense", "llama")
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("models: [dense]\nnum_experts: 4\nsplit: clustered\n")
    assert read_recipe(recipe).request.split == "clustered"
    for text, message in (
        ("models: [dense]\nsplit: x\n", r":2: split: must be one of contiguous, random, clustered"),
        ("models: [dense]\nsplit: random\nshuffle: true\n", r":2: split: splits one FFN into all"),
        ("models: [dense, dense]\nsplit: random\n", r":2: split: splits the FFNs of one model;"),
    ):
        recipe.write_text(text)
        with pytest.raises(RecipeError, match=message):
            read_recipe(recipe)
