"""Byte ranges of a design's weights: what is read is what was chosen, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from families import make_model
from moe_fast import CheckpointError, ExpertSource, MoeConfig, design_moe
from moe_fast.loading import ranges as loading
from moe_fast.loading.ranges import Ranges, read_ranges
from moe_fast.storage.files import OpenFiles, fill

# Pieces of every kind: as they are, converted, perturbed, drawn, side by side.
DESIGNS = {
    "as they are": ("llama", {}),
    "converted": ("llama", {"dtype": "bfloat16"}),
    "stacked": ("qwen3", {"layout": "fused"}),
    "side by side": ("qwen2", {"target": "qwen2_moe", "shared_experts": True}),
}


def make_design(folder, case):
    family, options = DESIGNS[case]
    make_model(folder / "dense", family)
    models = [ExpertSource(folder / "dense"), ExpertSource(folder / "dense", noise_scale=0.1)]
    if "shared_experts" in options:
        options = options | {"shared_experts": models}
    return design_moe(models, MoeConfig(4), **options)


def read(design, name, ranges):
    out = bytearray(ranges.nbytes)
    with OpenFiles() as files:
        read_ranges(design.weights[name], ranges, memoryview(out), files)
    return bytes(out)


@st.composite
def shapes_and_indices(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    indices = [
        draw(st.none() | st.sets(st.integers(0, size - 1)).map(sorted).map(np.int64))
        for size in shape
    ]
    return shape, indices


@given(shapes_and_indices(), st.sampled_from([1, 2, 4]))
def test_ranges_are_those_of_numpys_indexing(drawn, item_size):
    shape, indices = drawn
    positions = np.arange(np.prod(shape) * item_size).reshape(*shape, item_size)
    for dimension, chosen in enumerate(indices):
        if chosen is not None:
            positions = positions.take(chosen, axis=dimension)
    ranges = Ranges.of_indices(shape, indices, item_size)
    assert ranges.nbytes == positions.size
    found = [np.arange(start, stop) for start, stop in ranges]
    assert np.array_equal(np.concatenate([*found, np.array([], int)]), positions.ravel())
    assert (ranges.starts < ranges.stops).all()


@st.composite
def some_ranges(draw):
    ends = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
    ends = np.array(ends[: len(ends) // 2 * 2], np.int64)
    return Ranges(ends[::2], ends[1::2])


def covered(ranges):
    return [position for start, stop in ranges for position in range(start, stop)]


@given(some_ranges(), st.integers(1, 30))
def test_batches_are_the_ranges_in_pieces(ranges, size):
    batches = list(ranges.batches(size))
    assert [p for batch in batches for p in covered(batch)] == covered(ranges)
    assert all(batch.nbytes == size for batch in batches[:-1])
    assert all(0 < batch.nbytes <= size for batch in batches)


@given(some_ranges(), st.integers(0, 60), st.integers(0, 60))
def test_within_is_what_lies_there(ranges, start, stop):
    start, stop = min(start, stop), max(start, stop)
    assert covered(ranges.within(start, stop)) == [
        position - start for position in covered(ranges) if start <= position < stop
    ]


@pytest.mark.parametrize("case", DESIGNS)
def test_rows_and_columns_are_those_of_the_whole(case, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "CHUNK", 4096)  # so that a piece takes several batches
    design = make_design(tmp_path, case)
    generator = np.random.default_rng(0)
    for name in design.names():
        shape, whole = design.shape(name), design.read_bytes(name)
        item_size = len(whole) // int(np.prod(shape))
        array = np.frombuffer(whole, np.uint8).reshape(*shape, item_size)
        for _ in range(4):
            chosen = [np.flatnonzero(generator.random(size) < 0.6) for size in shape]
            chosen = [None if generator.random() < 0.4 else c for c in chosen]
            expected = array
            for dimension, indices in enumerate(chosen):
                if indices is not None:
                    expected = expected.take(indices, axis=dimension)
            ranges = Ranges.of_indices(shape, chosen, item_size)
            assert read(design, name, ranges) == expected.tobytes(), (name, chosen)


@pytest.mark.parametrize(("dtype", "item"), [(None, 4), ("bfloat16", 4)])
def test_no_more_is_read_than_chosen(dtype, item, tmp_path, monkeypatch):
    counted = []

    def fill_counting(buffer, stream, path):
        counted.append(len(buffer))
        return fill(buffer, stream, path)

    make_model(tmp_path / "dense", "llama")
    design = design_moe(tmp_path / "dense", MoeConfig(4), dtype=dtype)
    monkeypatch.setattr(loading, "fill", fill_counting)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    shape = design.shape(name)
    columns = [None, np.arange(5, 12)]
    read(design, name, Ranges.of_indices(shape, columns, 2 if dtype else 4))
    assert sum(counted) == shape[0] * 7 * item


def test_a_source_that_is_another_file_is_named(tmp_path):
    make_model(tmp_path / "dense", "llama")
    design = design_moe(tmp_path / "dense", MoeConfig(4))
    file = tmp_path / "dense" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{file}: changed while it was being read"):
        read(design, "model.norm.weight", Ranges.one(0, 16))
