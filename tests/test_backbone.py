"""Everything but the experts as the mean of the models (Branch-Train-MiX)."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

pytest.importorskip("ml_dtypes")

import ml_dtypes

from families import make_model
from moe_fast import CheckpointError, MoeConfig, MoeConfigError, build_moe, check_moe

CONFIG = MoeConfig(4)


@pytest.fixture
def models(tmp_path):
    return [make_model(tmp_path / name, "qwen2", seed=i) for i, name in enumerate("abc")]


def mean(arrays, weights, dtype):
    total = arrays[0].astype(np.float32) * np.float32(weights[0])
    for array, weight in zip(arrays[1:], weights[1:], strict=True):
        total = total + array.astype(np.float32) * np.float32(weight)
    return (total / np.float32(sum(weights))).astype(dtype)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("weights", [None, (0.5, 0.25, 0.125)])
def test_every_other_weight_is_the_mean(models, tmp_path, weights, dtype):
    build_moe(models, tmp_path / "moe", CONFIG, backbone=weights or "mean", dtype=dtype)
    sources = [load_file(model / "model.safetensors") for model in models]
    found = load_file(tmp_path / "moe" / "model.safetensors")
    stored = {None: np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    compared = 0
    for name, array in found.items():
        if name in sources[0]:
            expected = mean([s[name] for s in sources], weights or (1, 1, 1), stored)
            assert array.tobytes() == expected.tobytes(), name
            compared += 1
        elif ".experts." in name:
            _, _, layer, _, _, expert, role, _ = name.split(".")
            source = sources[int(expert) % 3][f"model.layers.{layer}.mlp.{role}.weight"]
            assert array.tobytes() == source.astype(stored).tobytes()
    assert compared > 20
    checked = check_moe(tmp_path / "moe")
    assert checked.passed, checked.problems


def test_one_model_is_its_own_mean(models, tmp_path):
    for backbone in ("base", "mean"):
        build_moe(models[0], tmp_path / backbone, CONFIG, backbone=backbone, dense_layers=[1])
    base, averaged = (
        load_file(tmp_path / backbone / "model.safetensors") for backbone in ("base", "mean")
    )
    assert all((averaged[name] == base[name]).all() for name in base)


def test_dense_layers_and_silent_experts(models, tmp_path):
    build_moe(
        models, tmp_path / "moe", CONFIG, backbone="mean", dense_layers=[0], target="qwen2_moe"
    )
    found = load_file(tmp_path / "moe" / "model.safetensors")
    sources = [load_file(model / "model.safetensors") for model in models]
    name = "model.layers.0.mlp.up_proj.weight"
    assert (found[name] == mean([s[name] for s in sources], (1, 1, 1), np.float32)).all()
    silent = found["model.layers.1.mlp.shared_expert.gate_proj.weight"]
    assert (silent == sources[0]["model.layers.1.mlp.gate_proj.weight"][: len(silent)]).all()


def test_models_of_other_vocabularies_have_no_mean(tmp_path):
    make_model(tmp_path / "a", "llama")
    make_model(tmp_path / "b", "llama", vocab_size=100)
    message = (
        r"b/model\.safetensors: tensor 'model\.embed_tokens\.weight' has the shape \[100, 48\]"
    )
    with pytest.raises(CheckpointError, match=message):
        build_moe([tmp_path / "a", tmp_path / "b"], tmp_path / "moe", CONFIG, backbone="mean")
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("unigram", [False, True])
def test_tokens_that_mean_something_else_have_no_mean(models, tmp_path, unigram):
    vocabulary = ["a", "b", "c"]
    for model, order in zip(models, ((0, 1, 2), (0, 1, 2), (0, 2, 1)), strict=True):
        texts = [vocabulary[i] for i in order]
        vocab = [[t, -1.0] for t in texts] if unigram else {t: i for i, t in enumerate(texts)}
        (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    build_moe(models[:2], tmp_path / "moe", CONFIG, backbone="mean")
    build_moe(models, tmp_path / "base", CONFIG)
    message = (
        r"c/tokenizer\.json: numbers its tokens otherwise than the base model's, '[bc]' for one"
    )
    with pytest.raises(CheckpointError, match=message):
        build_moe(models, tmp_path / "refused", CONFIG, backbone="mean")


@pytest.mark.parametrize("backbone", [(1.0,), (0, 0, 0), (1, 2, -1), (1, 2, float("nan"))])
def test_wrong_weights(models, tmp_path, backbone):
    with pytest.raises(MoeConfigError, match=r"backbone must be 'base', 'mean' or a weight of at"):
        build_moe(models, tmp_path / "moe", CONFIG, backbone=backbone)


def test_an_unknown_backbone(models, tmp_path):
    with pytest.raises(MoeConfigError, match=r"backbone must be one of 'base', 'mean', got 'avg'"):
        build_moe(models, tmp_path / "moe", CONFIG, backbone="avg")
