"""Every family that has two layouts, from one to the other; FP8 weights to bfloat16."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import ml_dtypes
from safetensors.numpy import load_file

from moe_families import FAMILIES, NUM_EXPERTS, OPERATED_ON, write_model, write_moe
from moe_fast import CheckpointError, Layout, MoeConfigError, check_moe, compare_moe, convert_moe
from moe_fast.families.registry import expert_axes

BOTH = [family for family in OPERATED_ON if len(expert_axes()[family].layouts) == 2]


@pytest.mark.parametrize("family", BOTH)
def test_there_and_back(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    convert_moe(tmp_path / "moe", tmp_path / "fused", layout="fused")
    fused = load_file(tmp_path / "fused" / "model.safetensors")
    assert not any(re.search(r"\.experts\.\d", name) for name in fused)
    stacks = [a for n, a in fused.items() if re.search(r"\.experts\.(gate_)?(up|down)_proj$", n)]
    assert stacks
    assert all(array.shape[0] == NUM_EXPERTS for array in stacks)
    assert compare_moe(tmp_path / "moe", tmp_path / "fused").equal
    checked = check_moe(tmp_path / "fused")
    assert checked.passed, checked.problems
    convert_moe(tmp_path / "fused", tmp_path / "back", layout=Layout.PER_EXPERT)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("family", [f for f in OPERATED_ON if f not in BOTH])
def test_families_of_one_layout_keep_it(tmp_path, family):
    tensors = write_moe(tmp_path / "moe", family)
    convert_moe(tmp_path / "moe", tmp_path / "again", dtype="bfloat16")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, array in tensors.items():
        np.testing.assert_array_equal(again[name], array.astype(ml_dtypes.bfloat16))
    with pytest.raises(MoeConfigError, match=r"layout must be 'fused' for .*, got 'per-expert'"):
        convert_moe(tmp_path / "moe", tmp_path / "no", layout="per-expert")


def test_an_unknown_family_keeps_its_layout(tmp_path):
    write_moe(tmp_path / "moe", "olmoe", model_type="unheard_of")
    report = convert_moe(tmp_path / "moe", tmp_path / "half", dtype="float16")
    assert "experts are taken to be mlp.experts of 3 layers" in report.warnings[0]
    with pytest.raises(MoeConfigError, match="layout must be 'per-expert' for unheard_of"):
        convert_moe(tmp_path / "moe", tmp_path / "no", layout="fused")


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}


def quantise(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts in FP8 with a scale for each block of 16 x 16, the last ones smaller."""
    generator = np.random.default_rng(0)
    quantised: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if ".experts." not in name:
            quantised[name] = array
            continue
        shape = [-(-size // 16) for size in array.shape]
        quantised[name] = array.astype(ml_dtypes.float8_e4m3fn)
        quantised[f"{name}_scale_inv"] = generator.uniform(1e-4, 3, shape).astype(np.float32)
    return quantised


def dequantised_by_numpy(quantised: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Exact in float64, for 4 and 24 significant bits make 28; then rounded once."""
    scale = quantised[f"{name}_scale_inv"].astype(np.float64)
    rows, columns = quantised[name].shape
    full = np.repeat(np.repeat(scale, 16, axis=0)[:rows], 16, axis=1)[:, :columns]
    return quantised[name].astype(np.float64) * full


def write_fp8(folder: Path, family: str, **changes: Any) -> dict[str, np.ndarray]:
    quantised = quantise(write_moe(folder.parent / f"{folder.name}-plain", family))
    config = FAMILIES[family]["config"] | {"quantization_config": FP8} | changes
    write_model(folder, quantised, config)
    return quantised


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "minimax_m2"])
def test_fp8_is_dequantised(tmp_path, family, layout):
    quantised = write_fp8(tmp_path / "fp8", family)
    convert_moe(tmp_path / "fp8", tmp_path / "half", dtype="bfloat16", layout="per-expert")
    found = load_file(tmp_path / "half" / "model.safetensors")
    assert found.keys() == {name for name in quantised if not name.endswith("_scale_inv")}
    for name, array in found.items():
        assert array.dtype == ml_dtypes.bfloat16
        if f"{name}_scale_inv" not in quantised:
            continue
        exact = dequantised_by_numpy(quantised, name)
        near = array.astype(np.float64)
        assert (np.abs(near - exact) <= np.abs(near) * 2.0**-8).all()
        single = exact.astype(np.float32)  # rounds to where no halfway point of bfloat16 is
        inexact = single.astype(np.float64) != exact
        assert inexact.any()
        halfway = (single.view(np.uint32) & 0xFFFF) == 0x8000
        safe = ~(halfway & inexact)
        expected = single.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array[safe], expected[safe])
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    if layout == "fused":
        convert_moe(tmp_path / "fp8", tmp_path / "fused", dtype="bfloat16", layout="fused")
        assert compare_moe(tmp_path / "half", tmp_path / "fused").equal
    assert check_moe(tmp_path / "half").passed


def test_other_quantisations_are_refused_by_name(tmp_path):
    write_fp8(tmp_path / "awq", "deepseek_v3", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="quantization_config: 'awq' cannot be dequantised"):
        convert_moe(tmp_path / "awq", tmp_path / "no", dtype="bfloat16")
    quantised = quantise(write_moe(tmp_path / "plain2", "deepseek_v3"))
    name = next(name for name in quantised if name.endswith("_scale_inv"))
    quantised[name] = quantised[name][:1]
    config = FAMILIES["deepseek_v3"]["config"] | {"quantization_config": FP8}
    write_model(tmp_path / "wrong", quantised, config)
    with pytest.raises(CheckpointError, match=r"scales of blocks of \[16, 16\] are \[\d, \d\]"):
        convert_moe(tmp_path / "wrong", tmp_path / "no", dtype="bfloat16")
    write_fp8(tmp_path / "fp8", "glm4_moe", model_type="glm4_moe")
    with pytest.raises(CheckpointError, match="_scale_inv' has no place in the other layout"):
        convert_moe(tmp_path / "fp8", tmp_path / "no", layout="fused")
    assert not (tmp_path / "no").exists()


def test_a_scale_is_found_by_its_block(tmp_path):
    tensors = write_moe(tmp_path / "plain", "deepseek_v3")
    name = "model.layers.0.mlp.down_proj.weight"  # of a dense layer, which is quantised as well
    assert tensors[name].shape == (32, 40)
    weight = np.ones((32, 40), ml_dtypes.float8_e4m3fn)
    scale = np.arange(1.0, 7.0, dtype=np.float32).reshape(2, 3)
    quantised = tensors | {name: weight, f"{name}_scale_inv": scale}
    config = FAMILIES["deepseek_v3"]["config"] | {"quantization_config": FP8}
    write_model(tmp_path / "fp8", quantised, config)
    convert_moe(tmp_path / "fp8", tmp_path / "single", dtype="float32")
    found = load_file(tmp_path / "single" / "model.safetensors")
    assert f"{name}_scale_inv" not in found
    blocks = [found[name][16 * row : 16 * row + 16, 16 * c : 16 * c + 16]
              for row in range(2) for c in range(3)]  # fmt: skip
    assert [set(block.ravel().tolist()) for block in blocks] == [{n} for n in range(1, 7)]
