"""Safetensors headers and indexes, trusted only after checking every number in them.

The format: 8 bytes of little-endian header length, a JSON header that names each tensor's dtype,
shape and byte range, then the tensors' bytes, without holes.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from moe_fast.checkpoint.files import SourceFile, is_absent, is_plain_name, open_regular
from moe_fast.errors import CheckpointError

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
# Of numbers that are computed with: what NumPy and torch call them, and the other way round.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}
WEIGHT_DTYPES = ("F32", "F16", "BF16")  # what can be built from, and converted to
LONGEST_HEADER = 100_000_000  # the limit of the format's own library
LONGEST_INDEX = 100_000_000
LONGEST_CONFIG = 10_000_000
# JSON takes up to thirty times its size as Python objects. What follows bounds that, far above what
# models have: the largest known has some 200,000 tensors, in dozens of files.
MOST_MARKS = 4_000_000  # commas and opening brackets; a tensor of a header has about ten
MOST_DIMENSIONS = 64
MOST_PROBLEMS = 100  # of one folder, before looking for more ends
MOST_NAMED = 8
LARGEST_SIZE = 2**63 - 1
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
BRIEFLY = reprlib.Repr()
BRIEFLY.maxstring = BRIEFLY.maxother = 200


class Tensor(NamedTuple):
    """Where one tensor's bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: SourceFile
    offset: int
    nbytes: int

    def first_rows(self, number: int) -> Tensor:
        """The first `number` rows, as a tensor of its own."""
        shape = (number, *self.shape[1:])
        return self._replace(shape=shape, nbytes=math.prod(shape) * ITEM_SIZES[self.dtype])


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face model folder, by name.

    Raises
    ------
    CheckpointError
        For a folder without safetensors, and for every header or index that does not hold.
    """
    names = names_in(folder)
    if SINGLE_FILE in names:
        return read_header(folder / SINGLE_FILE)
    if INDEX_FILE in names:
        return read_shards(folder)
    pickles = [name for name in names if PurePath(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    if pickles:
        raise CheckpointError(
            f"{folder}: holds {pickles[0]}, a pickle file, which can run code when opened and is "
            "never read; save the model as safetensors (save_pretrained does)"
        )
    raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def names_in(folder: Path) -> list[str]:
    """The names in a folder, in order."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from None


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of every shard that the folder's index names, index and shards agreeing."""
    path = folder / INDEX_FILE
    index = read_json(path, limit=LONGEST_INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must map tensor names to file names")
    named: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not (isinstance(file, str) and file.endswith(".safetensors") and is_plain_name(file)):
            raise CheckpointError(
                f"{path}: tensor {shown(name)}: {shown(file)} must be the name of a .safetensors "
                "file in the same folder"
            )
        named.setdefault(file, []).append(name)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for file, names in sorted(named.items()):
        try:
            shard = read_header(folder / file)
        except CheckpointError as error:
            problems += error.problems
        else:
            problems += disagreements(folder / file, shard, names, weight_map)
            tensors |= shard
        if len(problems) >= MOST_PROBLEMS:
            break
    if problems:
        raise CheckpointError(*problems)
    return tensors


def disagreements(
    file: Path, shard: dict[str, Tensor], names: list[str], weight_map: dict[str, str]
) -> Iterator[str]:
    """Where a shard holds other tensors than the `names` that the index gives it."""
    for name in names:
        if name not in shard:
            yield f"{file}: tensor {shown(name)}: named by the index, missing in the file"
    for name in shard.keys() - set(names):
        place = shown(weight_map[name]) if name in weight_map else "no file"
        yield f"{file}: tensor {shown(name)}: the index places it in {place}"


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
                f"{path}: the header's length is {length} bytes in a file of {status.st_size} "
                "bytes; the file is truncated or no safetensors file"
            )
        if length > LONGEST_HEADER:
            raise CheckpointError(
                f"{path}: the header's length is {length} bytes, more than {LONGEST_HEADER}"
            )
        text = stream.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path}: ended while its header was being read")
    file = SourceFile(
        str(path), status.st_size, status.st_mtime_ns, sha256(prefix + text).hexdigest()
    )
    header = parse_json(text, path)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header must be a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    data_start = 8 + length
    tensors = [checked_entry(name, e, file, data_start) for name, e in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.offset + t.nbytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            fault = "overlaps the one before" if tensor.offset < position else "leaves a hole"
            raise CheckpointError(
                f"{path}: tensor {shown(tensor.name)}: starts at byte "
                f"{tensor.offset - data_start} of the data, {fault}, which ends at "
                f"{position - data_start}"
            )
        position += tensor.nbytes
    if position != status.st_size:
        raise CheckpointError(
            f"{path}: the tensors end at byte {position}, the file at {status.st_size}"
        )
    return {t.name: t for t in tensors}, metadata


def checked_entry(name: str, entry: Any, file: SourceFile, data_start: int) -> Tensor:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tensor {shown(name)}: {what}")

    if not is_unicode(name):
        raise wrong("the name is not Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise wrong(f"unknown dtype {shown(dtype)}; known are {', '.join(ITEM_SIZES)}")
    if isinstance(shape, list) and len(shape) > MOST_DIMENSIONS:
        raise wrong(f"shape has {len(shape)} dimensions")
    if not isinstance(shape, list) or not all(is_size(n) for n in shape):
        raise wrong(f"shape must list sizes of at least 0, got {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(n) for n in offsets):
        raise wrong(f"data_offsets must be [begin, end], got {shown(offsets)}")
    begin, end = offsets
    if not begin <= end <= file.size - data_start:
        raise wrong(
            f"data_offsets {offsets} do not lie in the file's "
            f"{file.size - data_start} bytes of data"
        )
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if nbytes != end - begin:
        raise wrong(
            f"shape {shown(shape)} of {dtype} takes {shown(nbytes)} bytes, "
            f"data_offsets hold {end - begin}"
        )
    return Tensor(name, dtype, tuple(shape), file, data_start + begin, nbytes)


def is_unicode(text: str) -> bool:
    """Whether `text` is free of halves of surrogate pairs, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_SIZE


def read_json(path: Path, limit: int = LONGEST_CONFIG) -> Any:
    """The JSON of a file of at most `limit` bytes, as `parse_json` reads it."""
    with open_regular(path) as stream:
        text = stream.read(limit + 1)
    if len(text) > limit:
        raise CheckpointError(f"{path}: is longer than {limit} bytes")
    return parse_json(text, path)


def json_text(value: Any) -> str:
    """A value as the text of one of the output's JSON files."""
    return json.dumps(value, indent=2) + "\n"


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises
    ------
    CheckpointError
        For what is no model folder, saying what it might be instead.
    """
    check_is_folder(folder)
    path = folder / "config.json"
    if is_absent(path):
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        models = sorted(file.parent.name for file in folder.glob("*/config.json"))
        if gguf:
            advice = f"; it holds {gguf[0]}, and {without_gguf(gguf[0])}"
        elif models:
            advice = f"; its folders with models are {', '.join(models[:MOST_NAMED])}"
            advice += ", ..." if len(models) > MOST_NAMED else ""
        else:
            advice = ""
        raise CheckpointError(f"{folder}: is no model folder, it has no config.json{advice}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return config


def check_is_folder(folder: Path) -> None:
    """Raise `CheckpointError` for what is no folder, with what to give in its place."""
    if folder.is_dir():
        return
    advice = ""
    if folder.suffix == ".gguf":
        advice = f"; {without_gguf(folder.name)}"
    elif folder.is_file():
        advice = f"; it is a file, and a model is the folder with config.json: {folder.parent}"
    elif is_absent(folder):
        advice = "; there is nothing of that name"
    raise CheckpointError(f"{folder}: is not a folder with a model{advice}")


def without_gguf(name: str) -> str:
    return (
        "GGUF is not read: load it with transformers "
        f"(from_pretrained with gguf_file={name!r}) and save it with save_pretrained"
    )


def parse_json(text: bytes, path: Path) -> Any:
    """Strict JSON: UTF-8, no key twice, no NaN, no number that is infinite, and not too much of it.

    Raises `CheckpointError` with `path` where `text` is none, or where it has more than
    `MOST_MARKS` commas and opening brackets, each of which can become an object of Python's.
    """
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MOST_MARKS:
        raise CheckpointError(f"{path}: holds more JSON than any model's")
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=refuse_duplicates,
            parse_constant=refuse_constant,
            parse_float=finite,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = next(key for key, number in Counter(key for key, _ in pairs).items() if number > 1)
        raise ValueError(f"the key {shown(twice)} stands twice")
    return keys


def refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {shown(text)} is too large")
    return number


def shown(value: Any) -> str:
    """`value` for a message, however long it is and whatever is in it."""
    return BRIEFLY.repr(value)


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
