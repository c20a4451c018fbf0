"""Safetensors headers and indexes, trusted only after checking every number in them.

The format: 8 bytes of little-endian header length, a JSON header that names each tensor's dtype,
shape and byte range, then the tensors' bytes, without holes.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from moe_fast.dtypes import ITEM_BITS, count_bytes
from moe_fast.errors import CheckpointError
from moe_fast.storage.files import SourceFile, is_plain_name, open_regular
from moe_fast.storage.strict_json import (
    LONGEST_INDEX,
    brief,
    is_size,
    parse_json,
    read_json,
)

LONGEST_HEADER = 100_000_000  # the limit of the format's own library
MOST_DIMENSIONS = 64
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Tensor(NamedTuple):
    """Where one tensor's bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    nbytes: int

    def rows(self, start: int, number: int) -> Tensor:
        """`number` rows from `start` on, as a tensor of its own."""
        shape = (number, *self.shape[1:])
        nbytes = count_bytes(self.dtype, shape)
        before = count_bytes(self.dtype, (start, *self.shape[1:]))
        assert nbytes is not None
        assert before is not None
        return self._replace(shape=shape, offset=self.offset + before, nbytes=nbytes)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name, in the order of their bytes."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of one safetensors file and the free text of its `__metadata__`."""
    with open_regular(path) as stream:
        status = os.fstat(stream.fileno())
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= status.st_size - 8:
            raise CheckpointError(
                f"the header's length is {length} bytes in a file of {status.st_size} "
                "bytes; the file is truncated or no safetensors file",
                file=path,
            )
        if length > LONGEST_HEADER:
            raise CheckpointError(
                f"the header's length is {length} bytes, more than {LONGEST_HEADER}", file=path
            )
        text = stream.read(length)
    if len(text) < length:
        raise CheckpointError("ended while its header was being read", file=path)
    file = SourceFile(
        str(path), status.st_size, status.st_mtime_ns, sha256(prefix + text).hexdigest()
    )
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise CheckpointError("the header must be a JSON object", file=path)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # null is as good as absent
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ must map strings to strings", file=path)
    data_start = 8 + length
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # tensors of a shape share one object
    tensors = [checked_entry(name, e, file, data_start, shapes) for name, e in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.offset + t.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            fault = "overlaps the one before" if tensor.offset < position else "leaves a hole"
            raise CheckpointError(
                "starts at byte "
                f"{tensor.offset - data_start} of the data, {fault}, which ends at "
                f"{position - data_start}",
                file=path,
                tensor=tensor.name,
            )
        position += tensor.nbytes
    if position != status.st_size:
        raise CheckpointError(
            f"the tensors end at byte {position}, the file at {status.st_size}", file=path
        )
    return {t.name: t for t in tensors}, metadata


def read_index(path: Path) -> dict[str, list[str]]:
    """The files that an index names, each beside it, with the names of their tensors."""
    index = read_json(path, limit=LONGEST_INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not (isinstance(file, str) and file.endswith(".safetensors") and is_plain_name(file)):
            raise CheckpointError(
                f"is placed in {brief(file)}; that must be the name of a .safetensors file in the "
                "same folder",
                file=path,
                tensor=name,
            )
        files.setdefault(file, []).append(name)
    return files


def checked_entry(
    name: str,
    entry: Any,
    file: SourceFile,
    data_start: int,
    shapes: dict[tuple[int, ...], tuple[int, ...]],
) -> Tensor:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(what, file=file.path, tensor=name)

    if not is_unicode(name):
        raise wrong("has a name that is not Unicode")
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise wrong("must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise wrong(f"has the unknown dtype {brief(dtype)}; known are {', '.join(ITEM_BITS)}")
    if isinstance(shape, list) and len(shape) > MOST_DIMENSIONS:
        raise wrong(f"has {len(shape)} dimensions, more than {MOST_DIMENSIONS}")
    if not isinstance(shape, list) or not all(is_size(n) for n in shape):
        raise wrong(f"must have a shape of sizes of at least 0, got {brief(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise wrong(f"must have data_offsets [begin, end], got {brief(offsets)}")
    begin, end = offsets
    if not begin <= end <= file.size - data_start:
        raise wrong(
            f"has data_offsets {offsets} beyond the file's {file.size - data_start} bytes of data"
        )
    nbytes = count_bytes(dtype, shape)
    if nbytes is None:
        raise wrong(f"shape {brief(shape)} of {dtype} does not end at a whole byte")
    if nbytes != end - begin:
        raise wrong(
            f"has the shape {brief(shape)} of {dtype}, which takes {brief(nbytes)} bytes; "
            f"its data_offsets hold {end - begin}"
        )
    sizes = tuple(shape)
    sizes = shapes.setdefault(sizes, sizes)
    return Tensor(name, sys.intern(dtype), sizes, file, data_start + begin, nbytes)


def is_unicode(text: str) -> bool:
    """Whether `text` is free of halves of surrogate pairs, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def header_bytes(
    entries: list[tuple[str, str, tuple[int, ...], int]],
    metadata: dict[str, str],
    *,
    alignment: int = 8,
    remainder: int = 0,
) -> bytes:
    """The header of a file that holds `(name, dtype, shape, nbytes)` in this order.

    Spaces at its end make its length, modulo `alignment`, the `remainder`, so that the data begins
    where it is wanted; both are multiples of 8, as the format asks.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((remainder - 8 - len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
