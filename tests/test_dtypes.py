"""Weights in another dtype: the kernels between float32, bfloat16 and float16, and builds."""

from __future__ import annotations

import json
import pickle

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from families import make_model
from folders import config_of, rewrite
from moe_fast import CheckpointError, ExpertSource, MoeConfig, MoeConfigError, build_moe, kernels
from moe_fast.checkpoint.check import check_moe
from moe_fast.storage.pieces import Converted, FileRange, overflow_counted
from moe_fast.storage.safetensors_header import read_header
from moe_fast.storage.tensors import Weight
from reference import conversion as reference

CONFIG = MoeConfig(num_experts=2, num_experts_per_tok=1)
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
INFINITY = {"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}
UNSIGNED = {2: np.uint16, 4: np.uint32}
PAIRS = [(source, to) for source in DTYPES for to in DTYPES if source != to]
FROM_16_BITS = [pair for pair in PAIRS if pair[0] != "float32"]


def converted(values: np.ndarray, to: str) -> tuple[np.ndarray, int]:
    """What the kernel makes of `values`, and how many it says became infinite."""
    name = values.dtype.name
    bits = np.ascontiguousarray(values).view(UNSIGNED[values.itemsize])
    out = np.full(values.size, 0x5A5A, UNSIGNED[DTYPES[to].itemsize])
    count = getattr(kernels.compiled, f"{name}_to_{to}")(bits, out)
    return out.view(DTYPES[to]), count


def magnitude(values: np.ndarray) -> np.ndarray:
    """The bits without the sign. ml_dtypes warns when it is asked about some NaN."""
    bits = values.view(UNSIGNED[values.itemsize])
    return bits & (2 ** (8 * values.itemsize - 1) - 1)


def is_nan(values: np.ndarray) -> np.ndarray:
    return magnitude(values) > INFINITY[values.dtype.name]


def assert_converted(values: np.ndarray, to: str) -> None:
    """The kernel does what ml_dtypes and NumPy do, and keeps the sign of NaN."""
    found, count = converted(values, to)
    with np.errstate(all="ignore"):
        expected = values.astype(DTYPES[to])
    nan = is_nan(values)
    assert is_nan(found[nan]).all()
    assert np.array_equal(np.signbit(found[nan]), np.signbit(values[nan]))
    width = UNSIGNED[found.itemsize]
    assert np.array_equal(found[~nan].view(width), expected[~nan].view(width))
    finite = magnitude(values) < INFINITY[values.dtype.name]
    assert count == np.count_nonzero(finite & (magnitude(expected) == INFINITY[to]))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("source", "to"), FROM_16_BITS)
def test_every_pattern_of_16_bits(source, to):
    values = np.arange(2**16, dtype=np.uint16).view(DTYPES[source])
    assert_converted(values, to)
    found, _ = converted(values, to)
    if to == "float32":  # which holds them all: they come back as they were
        back, count = converted(found, source)
        nan = is_nan(values)
        assert np.array_equal(back[~nan].view(np.uint16), values[~nan].view(np.uint16))
        assert is_nan(back[nan]).all()
        assert count == 0


def boundaries(to: str) -> np.ndarray:
    """Every number of a 16-bit format as float32, every middle of two neighbours, and the float32
    next to each of those on either side."""
    numbers = np.arange(INFINITY[to], dtype=np.uint16).view(DTYPES[to]).astype(np.float64)
    beyond = numbers[-1] + (numbers[-1] - numbers[-2])  # where the next number would be
    middles = (numbers + np.append(numbers[1:], beyond)) / 2
    exact = np.concatenate([numbers, middles]).astype(np.float32)
    up = np.nextafter(exact, np.float32(np.inf))
    down = np.nextafter(exact, np.float32(-np.inf))
    values = np.concatenate([exact, up, down])
    return np.concatenate([values, -values, np.float32([np.inf, -np.inf, np.nan, -np.nan])])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_every_boundary_of_rounding(to):
    assert_converted(boundaries(to), to)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_a_sample_of_every_exponent_of_float32(to):
    generator = np.random.default_rng(0)
    bits = generator.integers(2**32, size=2**21, dtype=np.uint32)  # 4096 to each exponent and sign
    assert_converted(bits.view(np.float32), to)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("to", ["bfloat16", "float16"])
@given(bits=st.lists(st.integers(0, 2**32 - 1), max_size=70))
def test_any_number_of_any_bits_of_float32(to, bits):
    assert_converted(np.array(bits, np.uint32).view(np.float32), to)


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_the_plain_twin_is_the_definition(to):
    values = boundaries(to)[::37]
    values = np.append(values[~np.isnan(values)], np.float32(np.inf))
    found, _ = converted(values, to)
    expected = [reference.converted(value, to) for value in values.tolist()]
    assert found.astype(np.float64).tobytes() == np.array(expected).tobytes()
    assert np.isnan(reference.converted(np.nan, to))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize(("source", "to"), PAIRS)
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_a_build_in_another_dtype(tmp_path, monkeypatch, source, to, layout):
    dense = make_model(tmp_path / "dense", "llama", dtype=DTYPES[source])
    build_moe(dense, tmp_path / "kept", CONFIG, layout=layout)
    monkeypatch.setattr("moe_fast.storage.pieces.CHUNK", 4 * 500)
    report = build_moe(dense, tmp_path / "moe", CONFIG, layout=layout, dtype=to)
    assert report.warnings == ()
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    assert moe.keys() == kept.keys()
    for name, tensor in moe.items():
        assert tensor.dtype == DTYPES[to]
        if "gate.weight" not in name:  # routers are made in the dtype, not converted to it
            assert tensor.tobytes() == kept[name].astype(DTYPES[to]).tobytes()
    config = config_of(tmp_path / "moe")
    assert config["dtype"] == config["torch_dtype"] == to
    assert check_moe(tmp_path / "moe").passed


def test_models_of_several_dtypes_need_one_named(tmp_path):
    models = [
        make_model(tmp_path / name, "llama", seed=seed, dtype=dtype)
        for seed, (name, dtype) in enumerate(DTYPES.items())
    ]
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        build_moe(models, tmp_path / "moe", CONFIG)
    for dtype in ("BF16", "F16"):
        expected = f"is {dtype}, as are 5 others; the base model's FFN is F32: name a dtype"
        assert expected in str(caught.value)
    build_moe(models, tmp_path / "moe", MoeConfig(3), dtype="bfloat16")
    moe = load_file(tmp_path / "moe" / "model.safetensors")
    for expert, model in enumerate(models):
        weight = load_file(model / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        found = moe[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"]
        assert found.tobytes() == weight.astype(ml_dtypes.bfloat16).tobytes()


def test_noise_and_scale_come_before_the_conversion(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    source = ExpertSource(dense, noise_scale=0.01, residual_scale=0.3)
    build_moe(source, tmp_path / "kept", CONFIG)
    build_moe(source, tmp_path / "moe", CONFIG, dtype="float16")
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    kept = load_file(tmp_path / "kept" / "model.safetensors")[name]
    found = load_file(tmp_path / "moe" / "model.safetensors")[name]
    assert found.tobytes() == kept.astype(np.float16).tobytes()


def large(tensors):
    """Weights that float16 does not hold: 3 in one tensor, 1 in another, and an infinite one."""
    tensors["model.layers.0.mlp.up_proj.weight"][2, :3] = [7e4, -65520.0, 1e38]
    tensors["model.layers.1.input_layernorm.weight"][:3] = [65519.0, 3e38, np.inf]
    return tensors


def test_weights_beyond_float16_are_counted_and_reported(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    rewrite(dense, large)
    report = build_moe(dense, tmp_path / "moe", CONFIG, dtype="float16")
    (warning,) = report.warnings
    assert warning.startswith(
        "model.safetensors: 7 weights of 3 tensors are beyond the dtype and became infinite, the "
        "first of them in 'model.layers.0.block_sparse_moe.experts.0.w3.weight'"
    )
    manifest = json.loads((tmp_path / "moe" / "moe_fast.json").read_text())
    assert manifest["files"]["model.safetensors"]["overflow"] == {
        "model.layers.0.block_sparse_moe.experts.0.w3.weight": 3,
        "model.layers.0.block_sparse_moe.experts.1.w3.weight": 3,
        "model.layers.1.input_layernorm.weight": 1,
    }
    assert check_moe(tmp_path / "moe").passed
    assert build_moe(dense, tmp_path / "brain", CONFIG, dtype="bfloat16").warnings == ()


def test_what_an_interrupted_build_counted_is_not_lost(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    rewrite(dense, large)
    options = {"dtype": "float16", "max_shard_size": "20kB"}
    whole = build_moe(dense, tmp_path / "whole", CONFIG, **options)

    def interrupt(written, total):
        if written > total * 0.9:
            raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        build_moe(dense, tmp_path / "moe", CONFIG, progress=interrupt, **options)
    resumed = build_moe(dense, tmp_path / "moe", CONFIG, **options)
    assert resumed.warnings == whole.warnings
    assert len(whole.warnings) > 1


def test_overflow_is_counted_by_threads_and_processes_alike(tmp_path):
    from concurrent.futures import ProcessPoolExecutor

    dense = make_model(tmp_path / "dense", "llama")
    rewrite(dense, large)
    options = {"dtype": "float16", "max_shard_size": "20kB"}
    inline = build_moe(dense, tmp_path / "inline", CONFIG, **options)
    threads = build_moe(dense, tmp_path / "threads", CONFIG, threads=3, **options)
    with ProcessPoolExecutor(1) as executor:
        processes = build_moe(dense, tmp_path / "moe", CONFIG, executor=executor, **options)
    assert threads.warnings == processes.warnings == inline.warnings


def test_a_converted_piece_survives_the_way_to_another_process(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    tensor = read_header(dense / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    (piece,) = Weight.of(tensor).converted("F16").pieces
    copy = pickle.loads(pickle.dumps(piece))
    assert b"".join(copy.chunks()) == b"".join(piece.chunks())
    assert piece.nbytes == len(b"".join(piece.chunks())) == tensor.nbytes // 2


def test_a_source_that_changes_while_it_is_converted(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    file = dense / "model.safetensors"
    tensor = read_header(file)["model.layers.0.mlp.up_proj.weight"]
    piece = Converted(FileRange(tensor.file, tensor.offset, tensor.nbytes), "F32", "BF16")
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was being"):
        b"".join(piece.chunks())


def test_counting_ends_with_its_block(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    rewrite(dense, large)
    tensor = read_header(dense / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    (piece,) = Weight.of(tensor).converted("F16").pieces
    with overflow_counted() as outer:
        with overflow_counted() as inner:
            b"".join(piece.chunks())
        assert (inner.count, outer.count) == (3, 0)
        b"".join(piece.chunks())
    b"".join(piece.chunks())
    assert (inner.count, outer.count) == (3, 3)


def test_a_dtype_that_is_none(tmp_path):
    dense = make_model(tmp_path / "dense", "llama")
    with pytest.raises(MoeConfigError, match="dtype must be one of 'float32', 'bfloat16', 'float"):
        build_moe(dense, tmp_path / "moe", CONFIG, dtype="int8")
    with pytest.raises(TypeError, match=r"dtype must be .*, got 3"):
        build_moe(dense, tmp_path / "moe", CONFIG, dtype=3)
