"""Safetensors headers: whatever is accepted is what the format's own library reads."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

for extra in ("ml_dtypes", "safetensors", "hypothesis"):
    pytest.importorskip(extra)

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.version import Version
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from moe_fast import CheckpointError
from moe_fast.dtypes import ITEM_BITS, ITEM_SIZES, as_stored_dtype
from moe_fast.models.folder import read_checkpoint
from moe_fast.storage.safetensors_header import header_bytes, read_header, read_header_and_metadata
from moe_fast.storage.strict_json import parse_json

FILE = "model.safetensors"
names = st.text(st.characters(codec="utf-8"), max_size=8)
anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | names
    | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=10,
)
sizes = st.sampled_from([0, 1, 2, 3, 4, 8, 2**31, 2**32, 2**62, 2**63 - 1, 2**64]) | st.integers()


def dtypes_of_the_library() -> list[str]:
    """Those it names when it meets another."""
    header = json.dumps({"a": {"dtype": "X", "shape": [], "data_offsets": [0, 0]}}).encode()
    with pytest.raises(SafetensorError, match="expected one of") as caught:
        deserialize(len(header).to_bytes(8, "little") + header)
    known = str(caught.value).partition("expected one of")[2].partition(" at line")[0]
    return re.findall(r"`(\w+)`", known)


LIBRARY_DTYPES = dtypes_of_the_library()


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that holds, and how many bytes of data it is for."""
    entries: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype = draw(st.sampled_from(sorted(LIBRARY_DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        if ITEM_BITS[dtype] < 8:  # a tensor ends at a whole byte
            shape.append(8)
        end = position + int(np.prod(shape, dtype=int)) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    shuffled = draw(st.permutations(list(entries.items())))
    return dict(shuffled), position


@st.composite
def broken_headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header that holds, with up to three faults."""
    entries, nbytes = draw(headers())
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*entries, "new"]))
        entry = entries.setdefault(name, {})
        if not isinstance(entry, dict) or draw(st.booleans()):
            entries[name] = draw(anything)
            continue
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]) | names)
        entry[key] = draw(anything | st.lists(sizes, max_size=3))
    text = json.dumps(entries).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=4)) + text[at + draw(st.integers(0, 4)) :]
    return text, max(0, nbytes + draw(st.sampled_from([0, 0, 0, 1, -1, 8])))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("headers")


def attempt(read: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a reader returns, or the message of its error."""
    try:
        return read(*arguments), ""
    except CheckpointError as error:
        return None, str(error)


def agrees_with_the_library(data: bytes, folder: Path) -> bool:
    """Whether a file of these bytes is accepted; then the library reads the same in it."""
    (folder / FILE).write_bytes(data)
    tensors, error = attempt(read_header, folder / FILE)
    if error:
        assert len(error) < 2000
        assert error.startswith(str(folder / FILE))
        return False
    try:
        theirs = dict(deserialize(data))
    except SafetensorError as refusal:
        if "`-0.0`" in str(refusal):  # an integer for JSON, none for the library
            return True
        raise
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert theirs[name]["dtype"] == tensor.dtype
        assert theirs[name]["shape"] == list(tensor.shape)
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == theirs[name]["data"]
    return True


@given(data=st.binary(max_size=200))
def test_any_bytes(folder, data):
    agrees_with_the_library(data, folder)


@given(text=st.binary(max_size=200))
def test_any_bytes_as_a_header(folder, text):
    agrees_with_the_library(len(text).to_bytes(8, "little") + text, folder)


@given(broken=broken_headers())
@example((b'{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0))
@example((b'{"":{"dtype":"U8","shape":[0],"data_offsets":[-0,-0]}}', 0))
@example((b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0))
@example((b'{"a":{"dtype":"U8","shape":[4611686018427387904,0],"data_offsets":[0,0]}}', 0))
def test_headers_with_faults(folder, broken):
    text, nbytes = broken
    agrees_with_the_library(len(text).to_bytes(8, "little") + text + bytes(nbytes), folder)


def test_the_dtypes_are_those_of_the_library():
    """A new release of it with another dtype fails this test; an older one has fewer."""
    assert set(LIBRARY_DTYPES) <= set(ITEM_BITS)
    if Version(version("safetensors")) >= Version("0.8"):
        assert set(LIBRARY_DTYPES) == set(ITEM_BITS)


@pytest.mark.parametrize("dtype", LIBRARY_DTYPES)
def test_every_dtype_is_read(folder, dtype):
    nbytes = ITEM_BITS[dtype]
    header = {"a": {"dtype": dtype, "shape": [2, 4], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    assert agrees_with_the_library(len(text).to_bytes(8, "little") + text + bytes(nbytes), folder)
    if dtype in ITEM_SIZES:
        assert as_stored_dtype(dtype).itemsize == ITEM_SIZES[dtype]
    else:
        with pytest.raises(CheckpointError, match=f"NumPy has no dtype for {dtype}"):
            as_stored_dtype(dtype)


@pytest.mark.parametrize(("dtype", "size"), [("F4", 3), ("F6_E2M3", 2), ("F6_E3M2", 1)])
def test_a_tensor_that_ends_inside_a_byte(folder, dtype, size):
    header = {"a": {"dtype": dtype, "shape": [size], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(2)
    assert not agrees_with_the_library(data, folder)
    with pytest.raises(CheckpointError, match=rf"shape \[{size}\] of {dtype} does not end at a w"):
        read_header(folder / FILE)
    with pytest.raises(SafetensorError, match="byte boundary"):
        deserialize(data)


ENTRY = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


@pytest.mark.parametrize(
    "header",
    [
        {"__metadata__": None, "a": ENTRY},
        {"__metadata__": {}, "a": ENTRY},
        {"a": ENTRY | {"strides": [1], "quantisation": None}},
    ],
)
def test_what_the_library_lets_pass(folder, header):
    text = json.dumps(header).encode()
    assert agrees_with_the_library(len(text).to_bytes(8, "little") + text + b"x", folder)
    assert read_header_and_metadata(folder / FILE)[1] == {}


@given(header=headers(), padding=st.integers(0, 20))
def test_headers_that_hold_are_accepted(folder, header, padding):
    entries, nbytes = header
    text = json.dumps(entries).encode() + b" " * padding
    data = len(text).to_bytes(8, "little") + text + bytes(nbytes)
    try:
        deserialize(data)
    except SafetensorError:  # the library refuses what it cannot multiply; we may, too
        return
    assert agrees_with_the_library(data, folder)


@given(
    arrays=st.dictionaries(
        # The library writes a tensor of this name, and does not read it.
        st.text(string.printable, max_size=20).filter(lambda name: name != "__metadata__"),
        st.sampled_from([np.float32, np.int8, np.uint64]).map(
            lambda dtype: np.arange(6, dtype=dtype)
        ),
        min_size=1,  # of nothing but empty metadata, the library writes what is no JSON
        max_size=5,
    ),
    metadata=st.none() | st.dictionaries(names, names, max_size=3),
)
def test_files_of_the_library_are_accepted(folder, arrays, metadata):
    data = save(arrays, metadata)
    assert agrees_with_the_library(data, folder)
    assert read_header_and_metadata(folder / FILE)[1] == (metadata or {})


@given(
    header=headers(),
    metadata=st.dictionaries(names, names, max_size=3),
    alignment=st.sampled_from([8, 64, 4096]),
    remainder=st.sampled_from([0, 8, 56]),
)
def test_headers_we_write_are_read_as_they_were_meant(
    folder, header, metadata, alignment, remainder
):
    entries = sorted(header[0].items(), key=lambda item: item[1]["data_offsets"])
    listed = [
        (name, e["dtype"], tuple(e["shape"]), e["data_offsets"][1] - e["data_offsets"][0])
        for name, e in entries
    ]
    text = header_bytes(listed, metadata, alignment=alignment, remainder=remainder)
    assert len(text) % alignment == remainder % alignment
    (folder / FILE).write_bytes(text + bytes(header[1]))
    tensors, found = read_header_and_metadata(folder / FILE)
    assert found == metadata
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in tensors.values()] == listed


@given(value=anything)
def test_strict_json_reads_what_json_is(value):
    text = json.dumps(value).encode()
    read, error = attempt(parse_json, text, Path("x.json"))
    if error:
        assert "NaN" in error or "Infinity" in error
    else:
        assert read == value


index_values = st.dictionaries(
    st.sampled_from(["a", "b", "c", "d"]) | names,
    st.sampled_from(["one.safetensors", "two.safetensors", "../x", "no.safetensors"]) | anything,
    max_size=5,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for file, held in (("one", "ab"), ("two", "c")):
        arrays = {name: np.zeros(2, np.float32) for name in held}
        (folder / f"{file}.safetensors").write_bytes(save(arrays))
    return folder


RIGHT = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}


@given(index=st.fixed_dictionaries({"weight_map": index_values}) | anything)
@example({"weight_map": RIGHT})
@example({"weight_map": RIGHT, "metadata": None})
def test_any_index(shards, index):
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors, error = attempt(read_checkpoint, shards)
    if error:
        assert index != {"weight_map": RIGHT}
        assert len(error) < 5000
    else:
        assert index["weight_map"].items() <= RIGHT.items()
        assert {n: Path(t.file.path).name for n, t in tensors.items()} == index["weight_map"]


@given(text=st.binary(max_size=200))
def test_any_bytes_as_an_index(shards, text):
    (shards / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_checkpoint(shards)
