"""`moe-fast plan` and `moe-fast gates`: plans and routers without a model."""

from __future__ import annotations

import json

import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

from command import run
from moe_fast import (
    CheckpointError,
    MoeConfig,
    MoeConfigError,
    MoeConstructionPlan,
    MoeReport,
    compute_gate_weights,
    compute_router_weights,
    plan_moe_construction,
)
from moe_fast.routing.weights_file import write_router_weights


def test_plan():
    done = run("plan", 3, 32, "--hidden-size", 4096, "--intermediate-size", 11008)
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("model 0: 0, 3, 6", "model 2: 2, 5", "34,629,222,400 in experts and routers"):
        assert line in done.stdout
    done = run("plan", 9, 2, "--experts", 4, "--experts-per-token", 1, "--json")
    value = json.loads(done.stdout)
    plan = plan_moe_construction(9, 2, MoeConfig(4, 1))
    assert MoeConstructionPlan.from_dict(value["plan"]) == plan
    assert MoeReport.from_dict(value["report"]).unused_models == (4, 5, 6, 7, 8)
    assert "5 models, without an expert" in run("plan", 9, 2, "--experts", 4).stdout
    done = run("plan", 0, 2)
    assert done.returncode == 2
    assert "MODELS must be at least 1, got 0" in done.stderr


def test_gates_in_a_numpy_file(tmp_path):
    done = run("gates", 64, 8, "-o", tmp_path / "g.npy", "--layers", 3, "--no-transpose",
               "--dtype", "float64", "--init", "random")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    weights = np.load(tmp_path / "g.npy", allow_pickle=False)
    assert weights.tobytes() == compute_router_weights(3, 64, 8, "random").tobytes()
    assert weights.shape == (3, 64, 8)


def test_gates_in_a_safetensors_file(tmp_path):
    done = run("gates", 64, 8, "-o", tmp_path / "g.safetensors", "--layers", 2,
               "--dtype", "bfloat16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    tensors = load_file(tmp_path / "g.safetensors")
    assert sorted(tensors) == ["layers.0.gate.weight", "layers.1.gate.weight"]
    for layer in range(2):
        expected = compute_gate_weights(
            64, 8, dtype="bfloat16", layer=layer, transpose=True, remove_base=True
        )
        found = tensors[f"layers.{layer}.gate.weight"]
        assert found.dtype == ml_dtypes.bfloat16
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--dtype", "float16"), {"dtype": "float16", "remove_base": True}),
        (("--dtype", "float16", "--keep-base"), {"dtype": "float16"}),
        (("--dtype", "float16", "--init", "uniform"), {"dtype": "float16", "init": "uniform"}),
        (("--remove-base",), {"dtype": "float32", "remove_base": True}),
        (("--full-range",), {"dtype": "float32", "full_range": True}),
    ],
    ids=str,
)
def test_the_base_and_the_range_of_gates(tmp_path, options, expected):
    assert run("gates", 2048, 8, "-o", tmp_path / "g.npy", *options).returncode == 0
    weights = compute_router_weights(1, 2048, 8, transpose=True, **expected)
    assert np.load(tmp_path / "g.npy").tobytes() == weights.tobytes()


def test_what_is_refused(tmp_path):
    weights = compute_router_weights(1, 8, 2, dtype="bfloat16")
    with pytest.raises(MoeConfigError, match=r"^path must end in \.npy or \..*, got .*g\.pt"):
        write_router_weights(tmp_path / "g.pt", weights)
    with pytest.raises(MoeConfigError, match=r"^path must end in \.safetensors for bfloat16, got "):
        write_router_weights(tmp_path / "g.npy", weights)
    with pytest.raises(TypeError, match=r"^weights must be an array of floats, got int64"):
        write_router_weights(tmp_path / "g.npy", np.zeros((1, 2, 2), np.int64))
    with pytest.raises(MoeConfigError, match=r"^weights must have the shape .*, got \(2, 2\)"):
        write_router_weights(tmp_path / "g.npy", np.zeros((2, 2)))
    file = tmp_path / "g.safetensors"
    assert write_router_weights(file, weights) == file.stat().st_size
    with pytest.raises(CheckpointError, match="exists already"):
        write_router_weights(file, weights)
    write_router_weights(file, weights[:, :4], overwrite=True)
    assert load_file(file)["layers.0.gate.weight"].shape == (4, 2)
    with pytest.raises(CheckpointError, match=r"g\.safetensors is not a folder"):
        write_router_weights(file / "g.npy", np.zeros((1, 2, 2)))
    assert [f.name for f in tmp_path.iterdir()] == ["g.safetensors"]
    done = run("gates", 64, 8, "-o", file)
    assert done.returncode == 1
    assert "exists already" in done.stderr
