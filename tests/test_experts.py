"""Experts one by one: each with a source, layers, noise and scale of its own."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from folders import convert, edit_config, rewrite
from moe_fast import CheckpointError, ExpertSource, MoeConfig, MoeConfigError, build_moe
from moe_fast.checkpoint.check import check_moe
from moe_fast.checkpoint.random_pieces import Perturbed, choose_stream
from moe_fast.demo import make_dense_model
from moe_fast.storage.pieces import FileRange
from moe_fast.storage.safetensors_header import read_header
from reference import normal as reference

PAIR = MoeConfig(num_experts=2, num_experts_per_tok=1)
FFN = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0, num_hidden_layers=3)
    return tmp_path / "dense"


def source_weight(folder: Path, layer: int, role: str) -> np.ndarray:
    return load_file(folder / "model.safetensors")[f"model.layers.{layer}.mlp.{role}.weight"]


def expert_weights(folder: Path, layer: int, expert: int) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "model.safetensors")
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
    return {role: tensors[f"{prefix}.{name}.weight"] for name, role in FFN.items()}


def bits(folder: Path) -> dict[str, bytes]:
    return {
        name: array.tobytes()
        for file in folder.glob("*.safetensors")
        for name, array in load_file(file).items()
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_residual_scale_multiplies_down_proj_alone(dense, tmp_path, dtype):
    convert(dense, dtype)
    build_moe([dense, ExpertSource(dense, residual_scale=0.3)], tmp_path / "moe", PAIR)
    for layer in range(3):
        plain = expert_weights(tmp_path / "moe", layer, 0)
        scaled = expert_weights(tmp_path / "moe", layer, 1)
        expected = (plain["down_proj"].astype(np.float32) * np.float32(0.3)).astype(dtype)
        assert scaled["down_proj"].tobytes() == expected.tobytes()
        assert scaled["gate_proj"].tobytes() == plain["gate_proj"].tobytes()
        assert scaled["up_proj"].tobytes() == plain["up_proj"].tobytes()
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_noise_is_that_of_the_plain_twin(dense, tmp_path, dtype):
    convert(dense, dtype)
    noisy = ExpertSource(dense, noise_scale=0.02, residual_scale=0.5)
    build_moe([dense, noisy], tmp_path / "moe", PAIR, seed=7)
    for role, weight in expert_weights(tmp_path / "moe", 2, 1).items():
        stream = choose_stream(7, f"2 1 {role}")
        noise = [reference.normal(stream, i) * 0.02 for i in range(weight.size)]
        noise = np.array(noise, np.float32).reshape(weight.shape)
        expected = (source_weight(dense, 2, role).astype(np.float32) + noise).astype(dtype)
        if role == "down_proj":
            expected = (expected.astype(np.float32) * np.float32(0.5)).astype(dtype)
        assert weight.tobytes() == expected.tobytes()
    assert check_moe(tmp_path / "moe").passed


def test_every_expert_layer_role_and_seed_has_noise_of_its_own(dense, tmp_path):
    models = ExpertSource(dense, noise_scale=0.02)
    for seed in (0, 1):
        build_moe(models, tmp_path / f"seed-{seed}", PAIR, seed=seed)
    noises = [
        (weight - source_weight(dense, layer, role)).ravel()
        for seed in (0, 1)
        for layer in range(3)
        for expert in range(2)
        for role, weight in expert_weights(tmp_path / f"seed-{seed}", layer, expert).items()
    ]
    # All of one size, so any two that shared a stream would correlate.
    correlation = np.corrcoef(noises) - np.eye(len(noises))
    assert np.abs(correlation).max() < 6 / np.sqrt(noises[0].size)
    assert np.std(noises) == pytest.approx(0.02, rel=0.01)


def test_noise_does_not_depend_on_shards_or_chunks(dense, tmp_path, monkeypatch):
    noisy = ExpertSource(dense, noise_scale=0.02, residual_scale=1.5)
    build_moe([dense, noisy], tmp_path / "one", PAIR)
    monkeypatch.setattr("moe_fast.storage.pieces.CHUNK", 1028)
    build_moe([dense, noisy], tmp_path / "many", PAIR, max_shard_size="100kB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    assert bits(tmp_path / "one") == bits(tmp_path / "many")


@pytest.mark.usefixtures("level")
def test_a_piece_survives_the_way_to_another_process(dense):
    tensor = read_header(dense / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    source = FileRange(tensor.file, tensor.offset, tensor.nbytes)
    piece = Perturbed(source, "F32", noise_scale=0.1, scale=2.0, stream=choose_stream(0, "name"))
    copy = pickle.loads(pickle.dumps(piece))
    assert b"".join(copy.chunks()) == b"".join(piece.chunks())
    assert len(b"".join(piece.chunks())) == piece.nbytes


def test_source_layers(dense, tmp_path):
    other = tmp_path / "deeper"
    make_dense_model(other, seed=1, num_hidden_layers=5)
    models = [
        ExpertSource(dense, source_layers=[2, 2, 0]),
        ExpertSource(other, source_layers=[0, 3, 4]),
    ]
    build_moe(models, tmp_path / "moe", PAIR, base=dense)
    for expert, (folder, layers) in enumerate([(dense, [2, 2, 0]), (other, [0, 3, 4])]):
        for layer, source_layer in enumerate(layers):
            for role, weight in expert_weights(tmp_path / "moe", layer, expert).items():
                assert weight.tobytes() == source_weight(folder, source_layer, role).tobytes()
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [0, 1],
            r"^source_layers lists 2 layers for .*dense, the output has 3; list one for each$",
        ),
        ([0, 1, 3], r"dense/config.json: has 3 layers, source_layers names 3$"),
    ],
)
def test_source_layers_that_cannot_be(dense, tmp_path, layers, message):
    with pytest.raises((CheckpointError, MoeConfigError), match=message):
        build_moe(ExpertSource(dense, source_layers=layers), tmp_path / "moe", PAIR)
    assert not (tmp_path / "moe").exists()


def test_a_deeper_model_needs_source_layers(dense, tmp_path):
    make_dense_model(tmp_path / "deeper", seed=1, num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 5, the base model has 3"):
        build_moe([dense, tmp_path / "deeper"], tmp_path / "moe", PAIR)


def test_another_vocabulary_is_a_warning(dense, tmp_path):
    other = tmp_path / "other"
    make_dense_model(other, seed=1, num_hidden_layers=3)
    name = "model.embed_tokens.weight"
    rewrite(other, lambda t: t | {name: np.concatenate([t[name], t[name][:2]])})
    edit_config(other, vocab_size=258)
    report = build_moe([dense, other], tmp_path / "moe", PAIR)
    (warning,) = report.warnings
    assert warning.startswith(f"{other / 'config.json'}: vocab_size is 258, the base model has 256")
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise_scale": -0.1}, MoeConfigError, r"^noise_scale must be at least 0, got -0\.1$"),
        ({"noise_scale": float("nan")}, MoeConfigError, r"^noise_scale must be finite, got nan$"),
        ({"residual_scale": float("inf")}, MoeConfigError, r"^residual_scale must be finite"),
        ({"residual_scale": "0.1"}, TypeError, r"^residual_scale must be a number, got '0\.1'$"),
        ({"noise_scale": True}, TypeError, r"^noise_scale must be a number, got True$"),
        ({"noise_scale": 10**400}, MoeConfigError, "^noise_scale is larger than any float$"),
        ({"source_layers": 3}, TypeError, r"^source_layers must list layers, got 3$"),
        ({"source_layers": [-1]}, MoeConfigError, r"^source_layers must be at least 0, got -1$"),
        ({"model": 3}, TypeError, r"^model must be a path, got 3$"),
    ],
)  # fmt: skip
def test_an_expert_source_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        ExpertSource(**{"model": "folder", **options})
