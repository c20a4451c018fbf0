"""Weights in dtypes that nothing is computed in: they are read and looked at, and no sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from moe_fast import CheckpointError, MoeConfig, build_moe, check_moe, convert_moe, inspect_model
from moe_fast.demo import make_dense_model
from moe_fast.dtypes import ITEM_BITS, WEIGHT_DTYPES
from moe_fast.storage.safetensors_header import header_bytes, read_header

WEIGHTS = "model.safetensors"
OTHERS = [dtype for dtype in ITEM_BITS if dtype not in WEIGHT_DTYPES]


def store_as(folder: Path, dtype: str) -> None:
    """Write all tensors of a folder in `dtype`, with bytes that count up."""
    tensors = read_header(folder / WEIGHTS)
    entries = []
    for name, tensor in tensors.items():
        count = tensor.nbytes // 4  # of float32
        assert count * ITEM_BITS[dtype] % 8 == 0
        entries.append((name, dtype, tensor.shape, count * ITEM_BITS[dtype] // 8))
    header = header_bytes(entries, {"format": "pt"})
    data = bytes(range(256)) * (sum(size for *_, size in entries) // 256 + 1)
    (folder / WEIGHTS).write_bytes(header + data[: sum(size for *_, size in entries)])


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


@pytest.mark.parametrize("dtype", OTHERS)
def test_no_model_is_built_from_them(dense, dtype):
    store_as(dense, dtype)
    report = inspect_model(dense)
    assert report.bytes_by_dtype == {dtype: report.num_bytes}
    match = rf"{WEIGHTS}: tensor '.*' is {dtype}; F32, F16 and BF16 can be built from"
    with pytest.raises(CheckpointError, match=match):
        build_moe(dense, dense.parent / "moe", MoeConfig(2))


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_experts_in_them_are_looked_at_and_moved(dense, tmp_path, dtype, layout):
    moe = tmp_path / "moe"
    build_moe(dense, moe, MoeConfig(2), layout=layout)
    (moe / "moe_fast.json").unlink()
    store_as(moe, dtype)
    report = inspect_model(moe)
    assert (report.num_experts, report.bytes_by_dtype) == (2, {dtype: report.num_bytes})
    assert report.num_bytes == report.num_parameters * ITEM_BITS[dtype] // 8
    other = "fused" if layout == "per-expert" else "per-expert"
    convert_moe(moe, tmp_path / "other", layout=other)
    assert check_moe(tmp_path / "other")["experts"].status == "passed"
    convert_moe(tmp_path / "other", tmp_path / "back", layout=layout)
    before, after = (json.dumps(bytes_by_name(folder)) for folder in (moe, tmp_path / "back"))
    assert before == after
    with pytest.raises(CheckpointError, match=rf"is {dtype}; F32, F16, BF16 can be converted"):
        convert_moe(moe, tmp_path / "half", dtype="bfloat16")


def bytes_by_name(folder: Path) -> dict[str, str]:
    data = (folder / WEIGHTS).read_bytes()
    return {
        name: data[tensor.offset : tensor.offset + tensor.nbytes].hex()
        for name, tensor in sorted(read_header(folder / WEIGHTS).items())
    }
