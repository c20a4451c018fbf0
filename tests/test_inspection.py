"""What `inspect_model` sees in MoE and dense folders, ours and other people's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "typer"):
    pytest.importorskip(extra)

import numpy as np
from safetensors.numpy import load_file, save_file

from command import run
from folders import edit_config, rewrite
from moe_fast import CheckpointError, MoeConfig, build_moe, inspect_model, predict_load
from moe_fast.demo import make_dense_model
from moe_fast.storage import copies
from moe_fast.storage.copies import equal_groups
from moe_fast.storage.safetensors_header import read_header

HIDDEN, INTERMEDIATE = 64, 128


@pytest.fixture
def dense(tmp_path: Path) -> list[Path]:
    for seed in range(3):
        make_dense_model(tmp_path / f"dense-{seed}", seed=seed)
    return [tmp_path / f"dense-{seed}" for seed in range(3)]


@pytest.fixture
def moe(dense: list[Path], tmp_path: Path) -> Path:
    build_moe(dense, tmp_path / "moe", MoeConfig(num_experts=4))
    return tmp_path / "moe"


def fused(tensors):
    """The tensors of a per-expert Mixtral as transformers 5 holds them in memory."""
    result = {n: t for n, t in tensors.items() if "block_sparse_moe" not in n}
    for layer in range(2):
        old = f"model.layers.{layer}.block_sparse_moe"
        new = f"model.layers.{layer}.mlp"

        def stack(part, old=old):
            return np.stack([tensors[f"{old}.experts.{e}.{part}.weight"] for e in range(4)])

        result[f"{new}.gate.weight"] = tensors[f"{old}.gate.weight"]
        result[f"{new}.experts.gate_up_proj"] = np.concatenate([stack("w1"), stack("w3")], axis=1)
        result[f"{new}.experts.down_proj"] = stack("w2")
    return result


def granite(tensors):
    """The same under GraniteMoE's names."""
    names = {
        "mlp.gate.weight": "block_sparse_moe.router.layer.weight",
        "mlp.experts.gate_up_proj": "block_sparse_moe.input_linear.weight",
        "mlp.experts.down_proj": "block_sparse_moe.output_linear.weight",
    }
    result = {}
    for name, array in fused(tensors).items():
        for old, new in names.items():
            name = name.replace(old, new)
        result[name] = array
    return result


def qwen(tensors):
    parts = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    result = {}
    for name, array in tensors.items():
        name = name.replace("block_sparse_moe", "mlp")
        for old, new in parts.items():
            name = name.replace(f".{old}.", f".{new}.")
        result[name] = array
    return result


COPIES = (((0, 0), (0, 3)), ((1, 0), (1, 3)))  # of three models, the first gives two experts


def test_sizes_and_counts(moe):
    report = inspect_model(moe)
    tensors = load_file(moe / "model.safetensors")
    expert = 3 * HIDDEN * INTERMEDIATE
    assert report.num_parameters == sum(t.size for t in tensors.values())
    assert report.parameters_per_expert == expert
    assert report.active_parameters == report.num_parameters - 2 * 2 * expert
    assert report.num_bytes == sum(t.nbytes for t in tensors.values())
    assert report.bytes_by_dtype == {"F32": report.num_bytes}
    assert (report.num_experts, report.num_experts_per_tok) == (4, 2)
    assert (report.num_layers, report.num_moe_layers, report.num_files) == (2, 2, 1)
    assert (report.model_type, report.architecture) == ("mixtral", "MixtralForCausalLM")
    assert report.layout == "per-expert"
    assert report.copies == COPIES
    assert report.problems == ()


@pytest.mark.parametrize(
    ("layout", "change"),
    [("fused", fused), ("fused", granite), ("per-expert", qwen)],
    ids=["fused", "granite", "qwen"],
)
def test_other_layouts_and_names_give_the_same_report(moe, layout, change):
    expected = inspect_model(moe).to_dict()
    rewrite(moe, change)
    report = inspect_model(moe)
    assert report.layout == layout
    assert report.to_dict() == expected | {"layout": layout}


def test_a_dense_model(dense):
    report = inspect_model(dense[0])
    assert report.layout == "dense"
    assert report.num_experts == report.num_moe_layers == 0
    assert report.active_parameters == report.num_parameters
    assert (report.copies, report.routers) == (None, ())


def test_router_statistics_are_numpys(moe):
    def change(tensors):
        router = np.random.default_rng(0).normal(size=(4, HIDDEN)).astype(np.float32)
        router[3] = router[1]
        other = router.copy()
        other[0, 0] = np.nan
        return tensors | {
            "model.layers.0.block_sparse_moe.gate.weight": router,
            "model.layers.1.block_sparse_moe.gate.weight": other,
        }

    rewrite(moe, change)
    router = load_file(moe / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    first, second = inspect_model(moe, copies=False).routers
    norms = np.linalg.norm(router.astype(np.float64), axis=1)
    assert first.smallest_norm == pytest.approx(norms.min(), rel=1e-12)
    assert first.greatest_norm == pytest.approx(norms.max(), rel=1e-12)
    assert first.most_alike == pytest.approx(1.0, rel=1e-12)
    assert first.tied_experts == 2
    assert (second.finite, second.smallest_norm) == (False, None)
    stats = predict_load(router[None])
    assert first.coefficient_of_variation == stats.coefficient_of_variation[0]
    assert first.mean_entropy == pytest.approx(stats.mean_entropy[0], abs=1e-6)
    assert (second.coefficient_of_variation, second.mean_entropy) == (None, None)


@pytest.mark.parametrize("top_k", ["absent", 0, 5], ids=str)
def test_without_experts_per_token_no_load_is_predicted(moe, top_k):
    edit_config(moe, num_experts_per_tok=top_k)
    (router, _) = inspect_model(moe, copies=False).routers
    assert (router.finite, router.coefficient_of_variation) == (True, None)


def test_logits_beyond_float32_predict_nothing(moe):
    name = "model.layers.0.block_sparse_moe.gate.weight"
    rewrite(moe, lambda tensors: tensors | {name: tensors[name] * np.float32(1e38)})
    (router, _) = inspect_model(moe, copies=False).routers
    assert (router.finite, router.coefficient_of_variation) == (True, None)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_router_statistics_in_every_dtype(moe, dtype):
    import ml_dtypes

    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rewrite(moe, lambda tensors: {n: t.astype(dtype) for n, t in tensors.items()})
    router = load_file(moe / "model.safetensors")["model.layers.0.block_sparse_moe.gate.weight"]
    found = inspect_model(moe, copies=False).routers[0]
    norms = np.linalg.norm(router.astype(np.float64), axis=1)
    assert found.greatest_norm == pytest.approx(norms.max(), rel=1e-12)


def without(*names):
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


BLOCK = "model.layers.1.block_sparse_moe"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            without(*(f"{BLOCK}.experts.2.{w}.weight" for w in ("w1", "w2", "w3"))),
            "block_sparse_moe: expert 2 of 3 is missing",
        ),
        (without(f"{BLOCK}.experts.2.w3.weight"), "expert 2 has no up_proj"),
        (without(f"{BLOCK}.gate.weight"), "block_sparse_moe has no router"),
        (
            lambda tensors: tensors | {f"{BLOCK}.gate.weight": np.zeros((5, HIDDEN), "f4")},
            f"tensor '{BLOCK}.gate.weight' has the shape [5, 64] for 4 experts",
        ),
        (
            lambda tensors: tensors | {f"{BLOCK}.experts.0.w1.weight": np.zeros((64, 64), "f4")},
            "gate_proj has several shapes: (64, 64), (128, 64)",
        ),
    ],
    ids=["expert", "projection", "router", "router shape", "expert shape"],
)
def test_what_does_not_hold_is_named(moe, change, problem):
    rewrite(moe, change)
    assert any(problem in found for found in inspect_model(moe).problems)


def test_config_disagreeing_with_the_experts_is_named(moe):
    edit_config(moe, num_local_experts=5)
    problems = inspect_model(moe).problems
    assert len(problems) == 2
    assert all("holds 4 experts, config.json has 5" in problem for problem in problems)


def test_configurations_of_any_kind(moe):
    edit_config(moe, num_experts_per_tok="many", architectures=7, model_type=None)
    report = inspect_model(moe)
    assert report.active_parameters is None
    assert report.architecture is None
    (moe / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: must be a JSON object"):
        inspect_model(moe)
    with pytest.raises(CheckpointError, match="absent: is not a folder with a model"):
        inspect_model(moe / "absent")


def test_copies_are_found_whatever_the_size_of_a_chunk(moe, monkeypatch):
    monkeypatch.setattr(copies, "MEMORY", 1)
    assert inspect_model(moe).copies == COPIES


def write_tensors(file: Path, arrays) -> list[list]:
    save_file({f"{i:03d}": array for i, array in enumerate(arrays)}, file)
    tensors = read_header(file)
    return [[tensors[name]] for name in sorted(tensors)]


@pytest.mark.parametrize("position", [0, 100_000, 250_001, 499_999])
def test_one_byte_makes_a_difference(tmp_path, position):
    array = np.random.default_rng(0).integers(0, 256, 500_000, np.uint8)
    other = array.copy()
    other[position] ^= 1
    candidates = write_tensors(tmp_path / "t", [array, other, array, other, array, array + 1])
    assert equal_groups(candidates) == [[0, 2, 4], [1, 3]]


def test_equal_bytes_of_another_shape_or_dtype_are_no_copies(tmp_path):
    zeros = [np.zeros(8, "f4"), np.zeros((2, 4), "f4"), np.zeros(4, "f8"), np.zeros(8, "f4")]
    assert equal_groups(write_tensors(tmp_path / "t", zeros)) == [[0, 3]]
    assert equal_groups([]) == []


def test_command(moe, dense):
    done = run("inspect", moe)
    assert (done.returncode, done.stderr) == (0, "")
    for expected in ("4 per layer, 2 per token", "per-expert", "experts 0, 3 in layers 0-1"):
        assert expected in done.stdout
    assert "a dense model" in run("inspect", dense[0]).stdout
    done = run("inspect", moe, "--json", "--no-copies")
    expected = inspect_model(moe, copies=False).to_dict()
    assert json.loads(done.stdout) == {"version": 1, **expected}
    done = run("inspect", moe / "absent")
    assert done.returncode == 1
    assert "is not a folder with a model" in done.stderr
