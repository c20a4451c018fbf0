"""Two checkpoints hold the same model, or each difference is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

for extra in ("ml_dtypes", "safetensors", "typer"):
    pytest.importorskip(extra)

import ml_dtypes
from safetensors.numpy import load_file, save_file

from command import run
from families import make_model
from folders import edit_config, rewrite
from moe_families import FAMILIES, OPERATED_ON, write_model, write_moe
from moe_fast import (
    MoeConfig,
    MoeConfigError,
    WeightDifference,
    build_moe,
    compare_moe,
    convert_moe,
)


def fused_by_hand(family: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model of experts in `mlp.experts.0.gate_proj` and so on, stacked."""
    stacked = {n: t for n, t in tensors.items() if ".experts." not in n}
    for name in tensors:
        if match := re.fullmatch(r"(.+\.experts)\.0\.gate_proj\.weight", name):
            block = match[1]

            def stack(role: str, block: str = block) -> np.ndarray:
                return np.stack([tensors[f"{block}.{e}.{role}.weight"] for e in range(6)])

            gate_up = [stack("gate_proj"), stack("up_proj")]
            stacked[f"{block}.gate_up_proj"] = np.concatenate(gate_up, axis=1)
            stacked[f"{block}.down_proj"] = stack("down_proj")
    return stacked


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe", "deepseek_v2", "hunyuan_v1_moe"])
def test_layout_files_and_order_make_no_difference(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    config = FAMILIES[family]["config"]
    fused = fused_by_hand(family, tensors)
    write_model(tmp_path / "fused", fused, config | {"torch_dtype": "float32"})
    report = compare_moe(tmp_path / "moe", tmp_path / "fused")
    assert report.equal, report.differences
    assert report.layouts == ("per-expert", "fused")
    assert report.num_bytes == sum(array.nbytes for array in tensors.values())
    names = sorted(tensors, reverse=True)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    (tmp_path / "shards").mkdir()
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, tmp_path / "shards" / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config))
    assert compare_moe(tmp_path / "fused", tmp_path / "shards").equal


@pytest.mark.parametrize("family", OPERATED_ON)
def test_one_number_makes_a_difference(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    assert compare_moe(tmp_path / "moe", tmp_path / "moe").equal
    inside = re.compile(r"\.experts\.|moe\.output_linear")
    name = next(n for n in reversed(tensors) if inside.search(n))
    changed = tensors | {name: tensors[name].copy()}
    changed[name].flat[-1] += 0.25
    write_model(tmp_path / "changed", changed, FAMILIES[family]["config"])
    report = compare_moe(tmp_path / "moe", tmp_path / "changed")
    (difference,) = report.differences
    assert difference.layer == re.search(r"layers\.(\d+)", name)[1]
    assert difference.greatest == report.greatest == pytest.approx(0.25, abs=1e-6)
    assert compare_moe(tmp_path / "moe", tmp_path / "changed", tolerance=0.3).equal


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    make_model(tmp_path / "dense", "llama")
    build_moe(tmp_path / "dense", tmp_path / "moe", MoeConfig(num_experts=4))
    return tmp_path / "moe"


def test_the_difference_is_named(moe, tmp_path):
    convert_moe(moe, tmp_path / "fused", layout="fused")
    assert compare_moe(moe, tmp_path / "fused").equal

    def change(tensors):
        tensors["model.layers.1.mlp.experts.gate_up_proj"][2, -1, 3] += 0.5  # up, the lower half
        tensors["model.layers.0.mlp.gate.weight"][1, 0] = np.nan
        tensors["extra.weight"] = np.ones(2, np.float32)
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:4]
        del tensors["lm_head.weight"]
        return tensors

    rewrite(tmp_path / "fused", change)
    edit_config(tmp_path / "fused", num_experts_per_tok=1, rope_theta=7.0)
    report = compare_moe(moe, tmp_path / "fused", tolerance=0.1)
    assert not report.equal
    found = {(d.layer, d.expert, d.role): d for d in report.differences}
    assert str(found["1", 2, "up_proj"]) == "layer 1, expert 2, up_proj: differs by up to 0.5"
    assert found["0", None, "router"].greatest == np.inf
    assert found[None, None, "extra.weight"].difference == f"is only in {tmp_path / 'fused'}"
    assert found[None, None, "model.norm.weight"].difference == "has the shapes [48] and [4]"
    texts = [d.difference for d in report.differences if d.role == "config.json"]
    assert texts[0] == "num_experts_per_tok is 2 and 1"
    assert len(found) - 1 + len(texts) == len(report.differences)


def test_a_head_that_is_tied_or_stored(tmp_path):
    tied = make_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    tensors = load_file(tied / "model.safetensors")
    assert "lm_head.weight" not in tensors
    stored = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    config = json.loads((tied / "config.json").read_text())
    write_model(tmp_path / "stored", stored, config | {"tie_word_embeddings": False})
    assert compare_moe(tied, tmp_path / "stored").equal
    stored["lm_head.weight"] = stored["lm_head.weight"] * 2
    write_model(tmp_path / "other", stored, config | {"tie_word_embeddings": False})
    (difference,) = compare_moe(tied, tmp_path / "other").differences
    assert difference.role == "lm_head.weight"


def test_dtypes_that_hold_the_same_numbers(tmp_path):
    half = write_moe(tmp_path / "half", "mixtral", ml_dtypes.bfloat16)
    config = FAMILIES["mixtral"]["config"]
    single = {name: array.astype(np.float32) for name, array in half.items()}
    write_model(tmp_path / "single", single, config)
    assert compare_moe(tmp_path / "half", tmp_path / "single").equal
    eight = {name: array.astype(ml_dtypes.float8_e4m3fn) for name, array in half.items()}
    write_model(tmp_path / "eight", eight, config)
    report = compare_moe(tmp_path / "half", tmp_path / "eight")
    expected = max(np.abs(half[n].astype(float) - eight[n].astype(float)).max() for n in half)
    assert report.greatest == expected


def test_bytes_without_numbers(tmp_path):
    tensors = write_moe(tmp_path / "moe", "gpt_oss")
    packed = {n: t for n, t in tensors.items() if "experts" not in n}
    blocks = np.arange(6 * 8 * 2 * 16, dtype=np.uint8).reshape(6, 8, 2, 16)
    for number in (0, 1, 2):
        packed[f"model.layers.{number}.mlp.experts.down_proj_blocks"] = blocks
        packed[f"model.layers.{number}.mlp.experts.down_proj_scales"] = blocks[..., 0]
    config = FAMILIES["gpt_oss"]["config"]
    write_model(tmp_path / "a", packed, config)
    other = blocks.copy()
    other[4, 0, 0, 0] ^= 1
    write_model(
        tmp_path / "b", packed | {"model.layers.1.mlp.experts.down_proj_blocks": other}, config
    )
    (difference,) = compare_moe(tmp_path / "a", tmp_path / "b").differences
    assert difference == WeightDifference("1", 4, "down_proj_blocks", "has different bytes")


def test_two_sets_of_weights_in_one_folder(moe, tmp_path):
    shutil.copytree(moe, tmp_path / "both")
    other = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / "both" / "model.safetensors.index.json").write_text(json.dumps(other))
    report = compare_moe(moe, tmp_path / "both")
    assert report.equal
    (warning,) = report.warnings
    assert "both/model.safetensors: is read, model.safetensors.index.json beside it" in warning
    done = run("compare", moe, tmp_path / "both")
    assert (done.returncode, done.stderr.startswith("warning: ")) == (0, True)


def test_the_command(moe, tmp_path):
    convert_moe(moe, tmp_path / "fused", layout="fused")
    done = run("compare", moe, tmp_path / "fused")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("the same model: ")
    convert_moe(moe, tmp_path / "half", dtype="float16")
    done = run("compare", moe, tmp_path / "half", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["differences"][0]["greatest"] <= report["greatest"] < 1e-2
    done = run("compare", moe, tmp_path / "half", "--tolerance", "0.01")
    assert done.returncode == 0
    assert "none apart by more than" in done.stdout
    with pytest.raises(MoeConfigError, match="tolerance must be a finite number of at least 0"):
        compare_moe(moe, moe, tolerance=-1)


def test_differences_are_in_the_order_of_layers_and_experts(tmp_path):
    dense = make_model(tmp_path / "dense", "llama", num_hidden_layers=11)
    build_moe(dense, tmp_path / "a", MoeConfig(12, 2))
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def change(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        chosen = re.compile(r"layers\.(2|10)\.\D*(2|10)\.w1|^model\.norm")
        return {n: t + t.dtype.type(bool(chosen.search(n))) for n, t in tensors.items()}

    rewrite(tmp_path / "b", change)
    report = compare_moe(tmp_path / "a", tmp_path / "b")
    found = [(each.layer, each.expert) for each in report.differences]
    assert found == [(None, None), ("2", 2), ("2", 10), ("10", 2), ("10", 10)]
