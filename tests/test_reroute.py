"""Routers of finished models that start anew: they alone change, and the check makes them again."""

from __future__ import annotations

import json

import pytest

for extra in ("ml_dtypes", "safetensors", "typer"):
    pytest.importorskip(extra)

import numpy as np
from safetensors.numpy import load_file, save_file

from command import run
from moe_fast import (
    CheckpointError,
    MoeConfig,
    MoeConfigError,
    build_moe,
    check_moe,
    expand_moe,
    reroute_moe,
)
from moe_fast.demo import make_dense_model

GATE = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reroute")
    make_dense_model(folder / "dense", seed=0)
    build_moe(folder / "dense", folder / "moe", MoeConfig(4), dtype="bfloat16")
    build_moe(folder / "dense", folder / "fine", MoeConfig(8, 2), granularity=2, routers="normal")
    return folder


def tensors(folder) -> dict[str, bytes]:
    return {n: t.tobytes() for n, t in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("method", ["balanced", "random", "normal", "linear"])
def test_routers_are_those_of_a_build_and_the_rest_stays(moe, tmp_path, method):
    report = reroute_moe(moe / "moe", tmp_path / "new", method, logit_std=2, seed=5)
    assert (report.operation, report.num_experts) == ("reroute", 4)
    build_moe(
        moe / "dense", tmp_path / "built", MoeConfig(4), routers=method, logit_std=2, seed=5,
        dtype="bfloat16",
    )  # fmt: skip
    before, new, built = (tensors(f) for f in (moe / "moe", tmp_path / "new", tmp_path / "built"))
    assert new == built
    changed = {name for name in new if new[name] != before[name]}
    assert changed == {GATE.format(layer) for layer in range(2)}
    assert check_moe(tmp_path / "new").passed


def test_shards_of_a_copy_still_share_their_row(moe, tmp_path):
    reroute_moe(moe / "fine", tmp_path / "new", "normal", seed=3)
    rows = load_file(tmp_path / "new" / "model.safetensors")[GATE.format(0)]
    assert (rows[::2] == rows[1::2]).all()
    assert len({row.tobytes() for row in rows}) == 4
    assert check_moe(tmp_path / "new").passed


def test_copies_of_experts_get_rows_of_their_own(moe, tmp_path):
    expand_moe(moe / "moe", tmp_path / "expanded", 8)
    reroute_moe(tmp_path / "expanded", tmp_path / "new", "normal")
    rows = load_file(tmp_path / "new" / "model.safetensors")[GATE.format(1)]
    assert len({row.tobytes() for row in rows}) == 8
    assert check_moe(tmp_path / "new").passed


def test_another_router_fails_the_check(moe, tmp_path):
    reroute_moe(moe / "moe", tmp_path / "new", "normal")
    file = tmp_path / "new" / "model.safetensors"
    changed = load_file(file)
    changed[GATE.format(0)] = changed[GATE.format(0)][::-1].copy()
    save_file(changed, file, metadata={"format": "pt"})
    assert check_moe(tmp_path / "new")["routers"].status == "failed"


def test_the_command(moe, tmp_path):
    done = run("reroute", moe / "moe", "-o", tmp_path / "new", "--routers", "normal", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operation"] == "reroute"
    manifest = json.loads((tmp_path / "new" / "moe_fast.json").read_text())
    assert manifest["request"]["routers"]["method"] == "normal"
    done = run("reroute", moe / "moe", "-o", tmp_path / "new", "--routers", "zero")
    assert (done.returncode, "--routers must be one of" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("cheap_embed", MoeConfigError, r"^routers 'cheap_embed' is made from the sources of a"),
        ("ridge", MoeConfigError, r"^routers 'ridge' is made from the sources of a build"),
        ("calibrated", MoeConfigError, r"^texts are missing, which routers='calibrated' are made"),
    ],
)
def test_starts_that_need_something_else(moe, tmp_path, method, error, message):
    with pytest.raises(error, match=message):
        reroute_moe(moe / "moe", tmp_path / "new", method)
    assert not (tmp_path / "new").exists()


def test_a_dense_model_has_no_routers(moe, tmp_path):
    with pytest.raises(CheckpointError, match="holds no experts"):
        reroute_moe(moe / "dense", tmp_path / "new", "normal")


def test_a_bias_of_the_choice_becomes_zero(moe, tmp_path):
    build_moe(moe / "dense", tmp_path / "glm", MoeConfig(8, 4), granularity=4, target="glm4_moe")
    file = tmp_path / "glm" / "model.safetensors"
    changed = load_file(file)
    biases = [name for name in changed if name.endswith("e_score_correction_bias")]
    assert biases
    for name in biases:
        changed[name] = np.arange(8).astype(changed[name].dtype)
    save_file(changed, file, metadata={"format": "pt"})
    reroute_moe(tmp_path / "glm", tmp_path / "new", "normal")
    new = load_file(tmp_path / "new" / "model.safetensors")
    assert all((new[name] == 0).all() for name in biases)
    kept = [n for n in new if "experts.0." in n]
    assert kept
    assert all(new[n].tobytes() == changed[n].tobytes() for n in kept)
