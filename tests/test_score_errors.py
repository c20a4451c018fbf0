"""What `score` says before it runs a model: without torch, without experts, over another file."""

from __future__ import annotations

import sys

import pytest

for extra in ("safetensors", "ml_dtypes"):
    pytest.importorskip(extra)

from moe_families import write_moe
from moe_fast import CheckpointError, make_dense_model, score_experts


def test_the_extra_is_named(tmp_path, monkeypatch):
    write_moe(tmp_path / "moe", "mixtral")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = r"score runs the model, which needs torch: pip install 'moe-fast\[calibration\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        score_experts(tmp_path / "moe", tmp_path / "scores.json", tokens=[[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_model_without_experts(tmp_path):
    make_dense_model(tmp_path / "dense", seed=0)
    with pytest.raises(CheckpointError, match="holds no experts"):
        score_experts(tmp_path / "dense", tokens=[[1]])


@pytest.mark.parametrize("name", ["scores.json", "scores.safetensors"])
def test_no_file_is_replaced(tmp_path, name):
    write_moe(tmp_path / "moe", "mixtral")
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name}: exists already"):
        score_experts(tmp_path / "moe", tmp_path / "scores.json", tokens=[[1]], mean_outputs=True)
