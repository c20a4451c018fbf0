"""A design reads as the output that it would be, and writes it; reading writes nothing."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import pytest

from families import make_model
from moe_fast import (
    CheckpointError,
    ExpertSource,
    Layout,
    MoeConfig,
    MoeConfigError,
    build_moe,
    design_moe,
)
from moe_fast.checkpoint.convert import ConvertRequest
from moe_fast.checkpoint.design import Design, design_of
from moe_fast.models.folder import read_checkpoint
from moe_fast.storage import pieces
from moe_fast.storage.files import fill

CONFIG = MoeConfig(4)
CASES = {
    "as they are": ("llama", {}),
    "converted": ("llama", {"dtype": "float16"}),
    "bfloat16": ("mistral", {"dtype": "bfloat16"}),
    "fused": ("qwen3", {"layout": "fused"}),
    "shared experts side by side": ("qwen2", {"target": "qwen2_moe", "dtype": "float32"}),
    "fused by the family": ("granite", {}),
    "drawn": ("llama", {"routers": "normal", "seed": 3}),
}


@pytest.fixture
def case(request, tmp_path) -> tuple[Design, Path]:
    """A design, and what `build_moe` writes of the same."""
    family, options = CASES[request.param]
    make_model(tmp_path / "dense", family)
    models = [ExpertSource(tmp_path / "dense"), ExpertSource(tmp_path / "dense", noise_scale=0.1)]
    if options.get("target") == "qwen2_moe":
        options = {**options, "shared_experts": [tmp_path / "dense", models[1]]}
    before = sorted(tmp_path.rglob("*"))
    design = design_moe(models, CONFIG, **options)
    for name in design.names():
        design.read_bytes(name)
    assert sorted(tmp_path.rglob("*")) == before
    build_moe(models, tmp_path / "built", CONFIG, **options)
    return design, tmp_path / "built"


each_case = pytest.mark.parametrize("case", CASES, indirect=True)


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, tensor in read_checkpoint(folder).items():
        with Path(tensor.file.path).open("rb") as stream:
            stream.seek(tensor.offset)
            found[name] = tensor.dtype, tensor.shape, stream.read(tensor.nbytes)
    return found


@each_case
def test_every_tensor_reads_as_it_is_written(case):
    design, built = case
    stored = stored_bytes(built)
    assert design.names() == list(stored)
    for name, (_, shape, data) in stored.items():
        assert design.shape(name) == shape
        assert design.read_bytes(name) == data


@each_case
def test_rows_are_those_of_the_whole(case):
    design, _ = case
    for name in design.names():
        count = design.shape(name)[0]
        whole, row = design.read_bytes(name), len(design.read_bytes(name)) // count
        for rows in (slice(1, 3), slice(-1, None), slice(2, 2), slice(None, 1)):
            start, stop, _ = rows.indices(count)
            part = whole[start * row : max(stop, start) * row]
            assert design.read_bytes(name, rows) == part


@each_case
def test_a_written_design_is_the_build(case, tmp_path):
    design, built = case
    design.write(tmp_path / "written")
    assert stored_bytes(tmp_path / "written") == stored_bytes(built)
    for file in built.iterdir():
        assert (tmp_path / "written" / file.name).read_bytes() == file.read_bytes(), file.name


def test_arrays_have_the_dtype_of_the_tensor(tmp_path):
    make_model(tmp_path / "dense", "llama")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    for dtype in ("float32", "float16"):
        design = design_moe(tmp_path / "dense", CONFIG, dtype=dtype)
        array = design.read(name, slice(3, 5))
        assert design.dtype(name) == array.dtype.name == dtype
        assert array.shape == (2, design.shape(name)[1])
        assert array.tobytes() == design.read_bytes(name, slice(3, 5))


def test_bfloat16_arrays_need_ml_dtypes_and_bytes_do_not(tmp_path, monkeypatch):
    make_model(tmp_path / "dense", "llama")
    design = design_moe(tmp_path / "dense", CONFIG, dtype="bfloat16")
    name = "model.layers.0.block_sparse_moe.gate.weight"
    imported = builtins.__import__

    def without_ml_dtypes(module, *rest):
        if module == "ml_dtypes":
            raise ImportError(module)
        return imported(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without_ml_dtypes)
    assert design.dtype(name) == "bfloat16"
    with pytest.raises(ImportError, match=r"arrays of BF16 need ml_dtypes.*read_bytes"):
        design.read(name)
    bits = np.frombuffer(design.read_bytes(name), np.uint16).astype(np.uint32) << 16
    assert np.isfinite(bits.view(np.float32)).all()
    monkeypatch.undo()
    pytest.importorskip("ml_dtypes")
    assert (design.read(name).astype(np.float32).ravel() == bits.view(np.float32)).all()


def test_a_source_that_changed_is_named(tmp_path):
    make_model(tmp_path / "dense", "llama")
    design = design_moe(tmp_path / "dense", CONFIG)
    file = tmp_path / "dense" / "model.safetensors"
    os.utime(file, ns=(0, 0))
    with pytest.raises(CheckpointError, match=f"{file}: changed while it was being read"):
        design.read("model.layers.0.block_sparse_moe.experts.0.w1.weight")


def test_no_more_is_read_than_asked_for(tmp_path, monkeypatch):
    make_model(tmp_path / "dense", "llama")
    counted = []

    def fill_counting(buffer, stream, path):
        counted.append(len(buffer))
        return fill(buffer, stream, path)

    monkeypatch.setattr(pieces, "fill", fill_counting)
    for dtype, item in ((None, 4), ("bfloat16", 4)):
        design = design_moe(tmp_path / "dense", CONFIG, dtype=dtype)
        counted.clear()
        name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        design.read_bytes(name, slice(5, 7))
        assert sum(counted) == 2 * design.shape(name)[1] * item


def test_wrong_names_and_rows(tmp_path):
    make_model(tmp_path / "dense", "llama")
    design = design_moe(tmp_path / "dense", CONFIG)
    with pytest.raises(MoeConfigError, match=r"name must be that of a tensor .*'lm_hat\.weight'"):
        design.shape("lm_hat.weight")
    with pytest.raises(MoeConfigError, match=r"rows must be a slice of the first axis, step 1"):
        design.read("model.norm.weight", slice(0, 4, 2))
    with pytest.raises(TypeError, match=r"rows must be a slice, such as slice\(0, 2\), got 3"):
        design.read("model.norm.weight", 3)


def test_a_request_of_no_operation():
    with pytest.raises(TypeError, match="no operation takes a str"):
        design_of("build")


def test_a_conversion_is_a_design_too(tmp_path):
    make_model(tmp_path / "dense", "qwen3")
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG)
    design = design_of(ConvertRequest(str(tmp_path / "moe"), layout=Layout.FUSED))
    name = "model.layers.0.mlp.experts.down_proj"
    experts = [
        stored_bytes(tmp_path / "moe")[f"model.layers.0.mlp.experts.{e}.down_proj.weight"][2]
        for e in range(4)
    ]
    assert design.shape(name)[0] == 4
    assert [design.read_bytes(name, slice(e, e + 1)) for e in range(4)] == experts
