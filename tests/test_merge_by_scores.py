"""Experts grouped by scores as REAM does, weighted by them, and aligned before they are joined."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors.numpy import load_file, save_file

from command import run
from moe_families import FAMILIES, NUM_EXPERTS, write_model, write_moe
from moe_fast import CheckpointError, MoeConfigError, check_moe, convert_moe, merge_experts
from moe_fast.checkpoint.grouping import distances, group_experts

LAYERS = ("1", "2")
RNG = np.random.default_rng(5)


def ream(scores: np.ndarray, apart: np.ndarray, number: int, most: int) -> list[list[int]]:
    """The same in the words of the paper, one step after the other."""
    order = sorted(range(len(scores)), key=lambda e: -scores[e])
    centroids, taken = order[:number], set(order[:number])
    members = {c: [c] for c in centroids}
    for centroid in centroids:
        for _ in range(most):
            rest = [e for e in range(len(scores)) if e not in taken]
            if rest:
                nearest = min(rest, key=lambda e: apart[centroid][e])
                members[centroid].append(nearest)
                taken.add(nearest)
    for expert in range(len(scores)):
        if expert not in taken:
            members[min(centroids, key=lambda c: apart[c][expert])].append(expert)
    return [[c, *sorted(members[c][1:])] for c in sorted(centroids)]


@pytest.mark.parametrize(
    ("count", "number", "most"), [(6, 3, 16), (40, 4, 3), (64, 2, 16), (5, 5, 1)]
)
def test_groups_are_those_of_the_paper(count, number, most):
    scores = RNG.random(count)
    apart = distances(RNG.normal(size=(count, 7)), np.corrcoef(RNG.normal(size=(count, 30))))
    centroids = np.argsort(-scores)[:number].tolist()
    groups = group_experts(scores, apart, centroids, most)
    assert [list(group.experts) for group in groups] == ream(scores, apart, number, most)
    for group in groups:
        assert group.weights == tuple(scores[list(group.experts)])


def test_distances():
    means = np.array([[1.0, 0], [2, 0], [-1, 0], [0, 0]])
    gates = np.array([[1, -1, 0, 0.5]] * 4)
    found = distances(means, gates)[0]
    # The same direction, another sign of logits; the opposite; none.
    np.testing.assert_allclose(found, [0, 0.5, 0.75, 1 - (0.5 + 0.75) / 2])


def scores_of(**changes: Any) -> dict[str, Any]:
    layers = {
        key: {
            "reap": [0.1, 0.9, 0.2, 0.8, 0.3, 0.4],
            "mean_outputs": RNG.normal(size=(NUM_EXPERTS, 5)).tolist(),
            "gate_similarity": np.corrcoef(RNG.normal(size=(NUM_EXPERTS, 9))).tolist(),
            **changes,
        }
        for key in LAYERS
    }
    return {"model": "m", "num_tokens": 9, "layers": layers}


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    write_moe(tmp_path / "moe", "deepseek_v3")
    return tmp_path / "moe"


def request_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "moe_fast.json").read_text())["request"]
    return value


@pytest.mark.parametrize("stored", ["inline", "beside"])
def test_merged_by_scores(moe, tmp_path, stored):
    given: Any = scores_of()
    scores = json.loads(json.dumps(given))
    if stored == "beside":
        arrays = {
            f"layers.{key}.{kind}": np.array(layer.pop(kind), np.float32)
            for key, layer in scores["layers"].items()
            for kind in ("mean_outputs", "gate_similarity")
        }
        save_file(arrays, tmp_path / "s.safetensors")
        (tmp_path / "s.json").write_text(json.dumps(scores | {"arrays": "s.safetensors"}))
        scores = tmp_path / "s.json"
    report = merge_experts(moe, tmp_path / "merged", num_experts=3, scores=scores)
    assert report.num_experts == 3
    for key, layer in given["layers"].items():
        apart = distances(np.array(layer["mean_outputs"]), np.array(layer["gate_similarity"]))
        expected = ream(np.array(layer["reap"]), apart, 3, 16)
        groups = request_of(tmp_path / "merged")["groups"][key]
        assert [group["experts"] for group in groups] == expected
        assert groups[0]["weights"] == [layer["reap"][e] for e in expected[0]]
    assert check_moe(tmp_path / "merged").passed


def test_groups_without_weights_get_those_of_scores(moe, tmp_path):
    groups = [[0, 1], [3, 2], {"experts": [4, 5], "weights": [1, 2]}]
    merge_experts(
        moe,
        tmp_path / "merged",
        {"layers": dict.fromkeys(LAYERS, groups)},
        scores=scores_of(),
    )
    found = request_of(tmp_path / "merged")["groups"]["1"]
    assert [group["weights"] for group in found] == [[0.1, 0.9], [0.8, 0.2], [1.0, 2.0]]


def shuffled(tensors: dict[str, np.ndarray], first: int, second: int, layer: int) -> np.ndarray:
    """Make an expert the first one with its neurons in another order; the order."""
    name = f"model.layers.{layer}.mlp.experts.{{}}.{{}}_proj.weight"
    width = tensors[name.format(first, "gate")].shape[0]
    order = RNG.permutation(width)
    for role in ("gate", "up"):
        tensors[name.format(second, role)] = tensors[name.format(first, role)][order].copy()
    tensors[name.format(second, "down")] = tensors[name.format(first, "down")][:, order].copy()
    return order


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_aligned_neurons_of_the_same_expert_are_that_expert(moe, tmp_path, layout):
    pytest.importorskip("scipy")
    tensors = load_file(moe / "model.safetensors")
    for layer in (1, 2):
        shuffled(tensors, 0, 4, layer)
    write_model(tmp_path / "twice", tensors, FAMILIES["deepseek_v3"]["config"])
    source = tmp_path / "twice"
    if layout == "fused":
        convert_moe(source, tmp_path / "fused", layout="fused")
        source = tmp_path / "fused"
    groups = {"layers": {key: [[0, 4], [1], [2], [3], [5]] for key in LAYERS}}
    merge_experts(source, tmp_path / "merged", groups, align=True)
    merged = tmp_path / "merged"
    if layout == "fused":
        convert_moe(merged, tmp_path / "apart", layout="per-expert")
        merged = tmp_path / "apart"
    found = load_file(merged / "model.safetensors")
    for name in (n for n in tensors if ".experts.0." in n):
        np.testing.assert_array_equal(found[name], tensors[name])
    merge_experts(source, tmp_path / "unaligned", groups)
    assert (tmp_path / "unaligned" / "model.safetensors").read_bytes() != (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_a_mean_of_aligned_experts_is_checked_without_scipy(moe, tmp_path, monkeypatch):
    """Against the definition in NumPy, with the order that the manifest keeps."""
    pytest.importorskip("scipy")
    groups = {"layers": {key: [[2, 0, 5], [1], [3, 4]] for key in LAYERS}}
    merge_experts(moe, tmp_path / "merged", groups, align=True)
    manifest = json.loads((tmp_path / "merged" / "moe_fast.json").read_text())
    orders = {
        int(expert): np.frombuffer(base64.b64decode(text), "<u4")
        for expert, text in manifest["decisions"]["orders"]["1"].items()
    }
    assert orders.keys() == {0, 5, 4}
    tensors, found = (load_file(f / "model.safetensors") for f in (moe, tmp_path / "merged"))
    name = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    parts = [tensors[name.format(e, "up")].astype(np.float64) for e in (2, 0, 5)]
    parts = [part if e == 2 else part[orders[e]] for e, part in zip((2, 0, 5), parts, strict=True)]
    expected = ((parts[0] + parts[1]) + parts[2]) / 3
    np.testing.assert_array_equal(found[name.format(0, "up")], expected.astype(np.float32))
    parts = [tensors[name.format(e, "down")].astype(np.float64) for e in (3, 4)]
    expected = (parts[0] + parts[1][:, orders[4]]) / 2
    np.testing.assert_array_equal(found[name.format(2, "down")], expected.astype(np.float32))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert check_moe(tmp_path / "merged").passed
    for wrong in ("AAAA", 3, base64.b64encode(b"\0" * 4 * len(orders[0])).decode()):
        manifest["decisions"]["orders"]["1"]["0"] = wrong
        (tmp_path / "merged" / "moe_fast.json").write_text(json.dumps(manifest))
        checked = check_moe(tmp_path / "merged")
        assert "layer 1, expert 0: must be an order of" in checked["experts"].summary
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moe-fast\[align\]'"):
        merge_experts(moe, tmp_path / "other", groups, align=True)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, MoeConfigError, "groups must say which experts"),
        ({"num_experts": 3}, MoeConfigError, "num_experts needs scores"),
        ({"num_experts": 7, "scores": {}}, MoeConfigError, "num_experts must be at most 6"),
        ({"num_experts": 1, "scores": scores_of()}, CheckpointError, "has 1 group; num_experts_p"),
        ({"num_experts": 3, "scores": scores_of(reap=[1] * 5 + [-1])}, CheckpointError,
         "layer 1: reap holds -1; weights of a mean are at least 0"),
        ({"num_experts": 3, "scores": scores_of(reap=[1] * 5 + [float("nan")])}, CheckpointError,
         "layer 1: reap holds nan; scores must be finite numbers"),
        ({"num_experts": 3, "scores": scores_of(mean_outputs=None)}, CheckpointError,
         "layer 1: mean_outputs is missing; score --mean-outputs --gate-similarity stores them"),
        ({"num_experts": 3, "scores": scores_of(gate_similarity=[[1]])}, CheckpointError,
         "layer 1: gate_similarity must be 6 rows of finite numbers"),
        ({"num_experts": 3, "scores": scores_of(mean_outputs="a")}, CheckpointError,
         "layer 1: mean_outputs must be 6 rows of finite numbers"),
        ({"num_experts": 3, "scores": scores_of(), "align": 1}, TypeError, "align must be True"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged(moe, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        merge_experts(moe, tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_transposed_experts_are_not_aligned(tmp_path):
    pytest.importorskip("scipy")
    write_moe(tmp_path / "moe", "gpt_oss")
    groups = {"layers": {str(n): [[0, 1], [2], [3], [4], [5]] for n in range(3)}}
    with pytest.raises(CheckpointError, match="whose neurons align does not find in a gpt_oss"):
        merge_experts(tmp_path / "moe", tmp_path / "merged", groups, align=True)


def test_the_command(moe, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(scores_of()))
    done = run("merge", moe, "-o", tmp_path / "m", "--experts", 3, "--scores", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert "experts     6 to 3 per layer" in done.stdout
    assert run("merge", moe, "-o", tmp_path / "n", "--experts", 3).returncode == 2
