"""A pruned MoE holds the experts that were asked for, and everything that belongs to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors.numpy import load_file

from command import run
from moe_families import FAMILIES, NUM_EXPERTS, OPERATED_ON, write_model, write_moe
from moe_fast import CheckpointError, MoeConfigError, check_moe, inspect_model, prune_moe
from moe_fast.models.moe import open_moe_model

KEPT = ((0, 2, 5), (1, 3, 4), (0, 1, 5), (2, 3, 5))


def keep_lists(folder: Path) -> dict[str, list[int]]:
    """Another list in each layer."""
    layers = open_moe_model(folder).layers
    return {layer.key: list(KEPT[i % len(KEPT)]) for i, layer in enumerate(layers)}


def pruned_by_hand(tensors: dict[str, np.ndarray], lists: dict[str, list[int]]) -> dict[str, Any]:
    """What is left of the tensors, by their shapes alone: 6 counts experts and nothing else."""
    expected = {}
    for name, array in tensors.items():
        match = re.search(r"layers\.(\d+)\.", name)
        keep = lists.get(match[1]) if match else None
        if own := re.search(r"\.experts\.(\d+)\.", name):
            number = int(own[1])
            if number in keep:
                new = name.replace(own[0], f".experts.{keep.index(number)}.")
                expected[new] = array
        elif keep is not None and NUM_EXPERTS in array.shape:
            expected[name] = np.take(array, keep, axis=array.shape.index(NUM_EXPERTS))
        else:
            expected[name] = array
    return expected


@pytest.mark.parametrize("family", OPERATED_ON)
def test_every_family_is_pruned(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    lists = keep_lists(tmp_path / "moe")
    report = prune_moe(tmp_path / "moe", tmp_path / "pruned", keep={"layers": lists})
    assert (report.num_experts_before, report.num_experts) == (NUM_EXPERTS, 3)
    found = load_file(tmp_path / "pruned" / "model.safetensors")
    expected = pruned_by_hand(tensors, lists)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    before = FAMILIES[family]["config"]
    after = json.loads((tmp_path / "pruned" / "config.json").read_text())
    changed = {key for key in before if before[key] != after[key]}
    assert after.keys() == before.keys()
    assert changed
    assert {(before[key], after[key]) for key in changed} == {(NUM_EXPERTS, 3)}
    checked = check_moe(tmp_path / "pruned")
    assert checked.passed, checked.problems
    assert "byte for byte" in checked["experts"].summary


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    write_moe(tmp_path / "moe", "deepseek_v3")
    return tmp_path / "moe"


def test_check_sees_a_changed_byte_and_another_list(moe, tmp_path):
    prune_moe(moe, tmp_path / "pruned", keep=[0, 2, 5])
    manifest = json.loads((tmp_path / "pruned" / "moe_fast.json").read_text())
    assert manifest["request"]["keep"] == {"1": [0, 2, 5], "2": [0, 2, 5]}
    assert manifest["facts"]["dropped"] == {"1": [1, 3, 4], "2": [1, 3, 4]}
    manifest["request"]["keep"]["1"] = [0, 2, 4]
    (tmp_path / "pruned" / "moe_fast.json").write_text(json.dumps(manifest))
    problems = check_moe(tmp_path / "pruned")["experts"].problems
    assert any("layers.1.mlp.experts.2.up_proj.weight' differs" in p for p in problems), problems
    assert not any("layers.2" in p for p in problems)


def test_the_card_and_the_readers_say_it(moe, tmp_path):
    (moe / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    prune_moe(moe, tmp_path / "pruned", keep=[0, 2, 5])
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# A model\n")
    assert "pruned it: 3 of 6 experts are left in each layer" in card


def test_the_list_stays_in_the_models_order(moe, tmp_path):
    prune_moe(moe, tmp_path / "a", keep=[5, 0, 2])
    prune_moe(moe, tmp_path / "b", keep={"layers": {1: [2, 5, 0], "2": [0, 2, 5]}})
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    "lines",
    [
        '{"layer": 1, "experts": [0, 2, 5]}\n{"layer": 2, "experts": [1, 2, 3]}\n',
        '{"layer_idx": 2, "keep": [1, 2, 3]}\n\n{"layer_idx": 1, "keep": [0, 2, 5]}\n',
    ],
)
def test_a_file_of_a_line_a_layer(moe, tmp_path, lines):
    (tmp_path / "keep.jsonl").write_text(lines)
    report = prune_moe(moe, tmp_path / "pruned", keep=tmp_path / "keep.jsonl", dry_run=True)
    assert report.num_experts == 3


def test_a_line_that_is_cut_off(moe, tmp_path):
    (tmp_path / "keep.jsonl").write_text('{"layer": 1, "experts": [0, 2, 5]}\n\n{"layer": 2, "exp')
    message = r"keep\.jsonl: line 2 must be a JSON list or object, as line 1 is; got '{\"layer\": 2"
    with pytest.raises(CheckpointError, match=message):
        prune_moe(moe, tmp_path / "pruned", keep=tmp_path / "keep.jsonl")


def test_scores_choose_the_best(moe, tmp_path):
    scores = {
        "model": "m",
        "num_tokens": 9,
        "layers": {
            "1": {"reap": [0.1, 0.9, 0.2, 0.9, 0.3, 0.4], "frequency": [6, 5, 4, 3, 2, 1]},
            "2": {"reap": [1, 1, 1, 1, 1, 1], "frequency": [1, 2, 3, 4, 5, 6]},
        },
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))

    def kept(**options):
        output = tmp_path / "pruned"
        prune_moe(moe, output, num_experts=3, overwrite=True, **options)
        return json.loads((output / "moe_fast.json").read_text())["request"]["keep"]

    assert kept(scores=tmp_path / "scores.json") == {"1": [1, 3, 5], "2": [0, 1, 2]}
    assert kept(scores=scores, by="frequency") == {"1": [0, 1, 2], "2": [3, 4, 5]}


def test_layers_that_predict_ahead_take_the_last_list(tmp_path):
    tensors = write_moe(tmp_path / "moe", "deepseek_v3")
    tensors |= {n.replace("layers.2.", "layers.3."): t for n, t in tensors.items() if "s.2." in n}
    moe = write_model(tmp_path / "ahead", tensors, FAMILIES["deepseek_v3"]["config"])
    lists = {"1": [0, 1], "2": [2, 3]}
    report = prune_moe(moe, tmp_path / "pruned", keep={"layers": lists})
    assert report.warnings == ("keep: leaves out mtp.0: the list of layer 2 serves for it",)
    found = load_file(tmp_path / "pruned" / "model.safetensors")
    name = "model.layers.{}.mlp.experts.1.up_proj.weight"
    np.testing.assert_array_equal(
        found[name.format(3)], tensors[name.format(3).replace(".1.", ".3.")]
    )
    assert check_moe(tmp_path / "pruned").passed
    report = prune_moe(moe, tmp_path / "other", keep={"layers": {**lists, "mtp.0": [4, 5]}})
    assert report.warnings == ()


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    write_moe(tmp_path / "grouped", "deepseek_v3", n_group=2, topk_group=1)
    return tmp_path / "grouped"


def test_groups_are_respected(grouped, tmp_path):
    prune_moe(grouped, tmp_path / "pruned", keep=[0, 2, 3, 5])
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["n_group"] == 2
    with pytest.raises(CheckpointError, match="layer 1 keeps 3, 1 experts of the 2 groups"):
        prune_moe(grouped, tmp_path / "no", keep=[0, 1, 2, 3])
    with pytest.raises(CheckpointError, match="keeps 1 expert of each of 2 groups"):
        prune_moe(grouped, tmp_path / "no", keep=[0, 3])
    edited(grouped / "config.json", num_experts_per_tok=3)
    with pytest.raises(CheckpointError, match="a token chooses 1 groups, of 2 experts each"):
        prune_moe(grouped, tmp_path / "no", keep=[0, 2, 3, 5])
    assert not (tmp_path / "no").exists()


def test_scores_choose_as_many_of_each_group(grouped, tmp_path):
    scores = {"layers": {key: {"reap": [9, 8, 7, 1, 2, 3]} for key in "12"}}
    prune_moe(grouped, tmp_path / "pruned", num_experts=4, scores=scores)
    manifest = json.loads((tmp_path / "pruned" / "moe_fast.json").read_text())
    assert manifest["request"]["keep"]["1"] == [0, 1, 4, 5]
    with pytest.raises(MoeConfigError, match="a multiple of the 2 groups of experts, got 3"):
        prune_moe(grouped, tmp_path / "no", num_experts=3, scores=scores)


def test_without_groups_routing_changes(grouped, tmp_path):
    report = prune_moe(grouped, tmp_path / "pruned", keep=[0, 1, 2], ungroup=True)
    assert "tokens are routed differently" in report.warnings[0]
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert (config["n_group"], config["topk_group"], config["n_routed_experts"]) == (1, 1, 3)
    assert check_moe(tmp_path / "pruned").passed


WRONG = [
    ({"layers": {"1": [0, 1, 2]}}, "keep.json: layer 2 is missing"),
    ({"layers": {"1": [0, 1], "2": [0, 1], "7": [0]}}, "layer '7' has no experts; these have: 1-2"),
    ([0, 0, 1], "keep.json: layer 1: expert 0 stands twice"),
    ([], "keep.json: layer 1 keeps no expert"),
    ([0, 6], "keep.json: layer 1: expert 6 is none of the 6, which are 0 to 5"),
    ([0, -1], "expert -1 is none of the 6"),
    ([3], "keep.json: layer 1 keeps 1 expert; num_experts_per_tok is 2"),
    ({"layers": {"1": [0, 1, 2], "2": [0, 1]}}, "layer 2 keeps 2 experts, layer 1 3; config.json"),
    ({"layers": {"1": "012", "2": [0, 1]}}, "layer 1 must list experts, got '012'"),
    ({"layers": {"1": [0, True], "2": [0, 1]}}, "True is not the number of an expert"),
    ({"1": [0, 1]}, "must have the key 'layers'"),
    ("all", "must be an object or a list of experts, got 'all'"),
]


@pytest.mark.parametrize(("keep", "message"), WRONG)
def test_wrong_lists_are_refused_and_nothing_is_written(moe, tmp_path, keep, message):
    (tmp_path / "keep.json").write_text(json.dumps(keep))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        prune_moe(moe, tmp_path / "pruned", keep=tmp_path / "keep.json")
    assert not (tmp_path / "pruned").exists()


SIX = [1, 2, 3, 4, 5, 6]
WRONG_SCORES = [
    ('{"layers": {"1": {"reap": [NaN]}}}', "scores.json: not valid JSON: NaN is not JSON"),
    ({"layers": {"1": {"reap": SIX}}}, "scores.json: layer 2 is missing"),
    ({"layers": {"1": {"reap": SIX}, "2": {"reap": SIX[:4]}}}, "layer 2: reap must list 6 numbers"),
    ({"layers": {"1": {"reap": SIX}, "2": {"ean": SIX}}}, "layer 2 has no 'reap'; it has ean"),
    ({"layers": {k: {"reap": SIX} for k in "0123"}}, "layer '0' has no experts"),
    ({"layers": {"1": {"reap": SIX}, "2": {"reap": [*SIX[:5], "6"]}}}, "reap holds '6'; scores"),
]


@pytest.mark.parametrize(("scores", "message"), WRONG_SCORES)
def test_wrong_scores_are_refused(moe, tmp_path, scores, message):
    file = tmp_path / "scores.json"
    file.write_text(scores if isinstance(scores, str) else json.dumps(scores))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        prune_moe(moe, tmp_path / "pruned", num_experts=3, scores=file)
    assert not (tmp_path / "pruned").exists()


def test_nan_scores_of_python_are_refused(moe, tmp_path):
    layers = {key: {"reap": [float("nan"), *SIX[1:]]} for key in "12"}
    with pytest.raises(CheckpointError, match="layer 1: reap holds nan; scores must be finite"):
        prune_moe(moe, tmp_path / "pruned", num_experts=3, scores={"layers": layers})


def test_one_way_to_say_which(moe, tmp_path):
    for options in ({}, {"keep": [0, 1], "num_experts": 2}):
        with pytest.raises(MoeConfigError, match="keep must list the experts to keep, or a number"):
            prune_moe(moe, tmp_path / "pruned", **options)
    with pytest.raises(MoeConfigError, match="num_experts needs scores"):
        prune_moe(moe, tmp_path / "pruned", num_experts=3)


def test_the_output_cannot_replace_the_list(moe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep.json").write_text("[0, 1]")
    keep = tmp_path / "out" / "keep.json"
    with pytest.raises(CheckpointError, match=r"would replace .*keep\.json"):
        prune_moe(moe, tmp_path / "out", keep=keep, overwrite=True)


def test_the_command(moe, tmp_path):
    (tmp_path / "keep.json").write_text("[0, 2, 5]")
    done = run("prune", moe, "-o", tmp_path / "pruned", "--keep", tmp_path / "keep.json")
    assert done.returncode == 0, done.stderr
    assert "experts     6 to 3 per layer, 2 per token" in done.stdout
    assert inspect_model(tmp_path / "pruned").num_experts == 3
    done = run("prune", moe, "-o", tmp_path / "no", "--experts", "3")
    assert done.returncode == 2
    assert "--experts needs scores" in done.stderr
    done = run("check", tmp_path / "pruned")
    assert done.returncode == 0, done.stdout


def test_shards_and_bfloat16_keep_their_bytes(tmp_path):
    tensors = write_moe(tmp_path / "moe", "mixtral", np.float16)
    prune_moe(tmp_path / "moe", tmp_path / "pruned", keep=[1, 4], max_shard_size="20kB")
    files = sorted((tmp_path / "pruned").glob("model-*.safetensors"))
    assert len(files) > 2
    found = {name: array for file in files for name, array in load_file(file).items()}
    expected = pruned_by_hand(tensors, {key: [1, 4] for key in "012"})
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_headers_are_read_once_and_again_after_a_change(moe, tmp_path, monkeypatch):
    from moe_fast.models import moe as models

    read, opened = models.read_moe_model, []

    def counted(folder: Path) -> Any:
        opened.append(folder)
        return read(folder)

    monkeypatch.setattr(models, "read_moe_model", counted)
    prune_moe(moe, tmp_path / "pruned", keep=[0, 2, 5], dry_run=True)
    assert len(opened) == 1
    held = open_moe_model(moe)
    edited(moe / "config.json", num_experts_per_tok=3)
    assert held.num_experts_per_tok == 2
    assert open_moe_model(moe).num_experts_per_tok == 3


def test_the_users_home_is_found(moe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert prune_moe("~/moe", "~/pruned", keep=[0, 2, 5]).num_experts == 3
    assert check_moe(tmp_path / "pruned").passed
