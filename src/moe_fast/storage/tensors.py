"""The output checkpoint as a table of tensors, and how the table falls into files."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from moe_fast.dtypes import count_bytes
from moe_fast.errors import CheckpointError
from moe_fast.storage.floats import encode
from moe_fast.storage.pieces import Converted, FileRange, Given, Piece, Zeros, read_range
from moe_fast.storage.safetensors_header import INDEX_FILE, SINGLE_FILE, Tensor, header_bytes
from moe_fast.storage.strict_json import json_text

MOST_TENSORS_IN_FILE = 250_000  # so that readers, ours too, do not refuse the header's length
BLOCK = 4096  # bytes: the page of most processors and the block of most file systems
FORMAT = {"format": "pt"}  # what transformers asks of every file's metadata


@dataclass(frozen=True, slots=True)
class Weight:
    """The dtype, the shape and the bytes of a tensor: its pieces, one after the other."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    nbytes: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        nbytes = whole_bytes(self.dtype, self.shape)
        object.__setattr__(self, "nbytes", nbytes)
        if sum(piece.nbytes for piece in self.pieces) != nbytes:
            raise AssertionError(f"the pieces do not fill the shape {self.shape} of {self.dtype}")

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> Weight:
        """A tensor of a source file, as it is."""
        piece = FileRange(tensor.file, tensor.offset, tensor.nbytes)
        return cls(tensor.dtype, tensor.shape, (piece,))

    def converted(self, dtype: str) -> Weight:
        """The same numbers in `dtype`."""
        if dtype == self.dtype:
            return self
        pieces = tuple(Converted(piece, self.dtype, dtype) for piece in self.pieces)
        return Weight(dtype, self.shape, pieces)

    def read(self, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """The bytes from `start` to `stop`, a chunk at a time; pieces outside are not touched."""
        position = 0
        for piece in self.pieces:
            first, last = max(start - position, 0), min(stop - position, piece.nbytes)
            if first < last:
                yield from read_range(piece, first, last)
            position += piece.nbytes

    @classmethod
    def zeros(cls, dtype: str, shape: tuple[int, ...]) -> Weight:
        return cls(dtype, shape, (Zeros(whole_bytes(dtype, shape)),))

    @classmethod
    def filled(cls, dtype: str, shape: tuple[int, ...], value: float) -> Weight:
        """The same number everywhere; for small tensors."""
        numbers = np.full(math.prod(shape), value, np.float32)
        return cls(dtype, shape, (Given(encode(numbers, dtype).tobytes()),))

    @classmethod
    def stacked(cls, parts: Sequence[Weight], shape: tuple[int, ...]) -> Weight:
        """The bytes of `parts`, one after the other, as one tensor of `shape`."""
        return cls(parts[0].dtype, shape, tuple(p for part in parts for p in part.pieces))


def whole_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    nbytes = count_bytes(dtype, shape)
    if nbytes is None:
        raise CheckpointError(f"the shape {list(shape)} of {dtype} does not end at a whole byte")
    return nbytes


class OutputTensor(NamedTuple):
    """One tensor to write."""

    name: str
    weight: Weight


@dataclass(frozen=True)
class Shard:
    """One file of the output."""

    file_name: str
    tensors: tuple[OutputTensor, ...]
    metadata: tuple[tuple[str, str], ...] = tuple(FORMAT.items())

    @property
    def header(self) -> bytes:
        """Made anew each time: together those of a large model are tens of megabytes."""
        entries = [(name, w.dtype, w.shape, w.nbytes) for name, w in self.tensors]
        return header_bytes(
            entries, dict(self.metadata), alignment=BLOCK, remainder=self.best_start()
        )

    def best_start(self) -> int:
        """Where in a block the data best begins: so that most bytes lie in it as in their source.

        Only those can be moved by whole pages, and shared by file systems that share blocks. For
        sizes that are multiples of a block (rows of 2048 numbers in 16 bits), that is all of them.
        """
        votes: Counter[int] = Counter()
        position = 0
        for tensor in self.tensors:
            for piece in tensor.weight.pieces:
                if isinstance(piece, FileRange):
                    votes[(piece.offset - position) % BLOCK] += piece.nbytes
                position += piece.nbytes
        aligned = {start: nbytes for start, nbytes in votes.items() if start % 8 == 0}
        return max(aligned, key=lambda start: aligned[start], default=0)

    @cached_property
    def nbytes(self) -> int:
        return len(self.header) + sum(t.weight.nbytes for t in self.tensors)


def plan_shards(
    tensors: Iterable[tuple[str, Weight]], max_shard_size: int, metadata: Mapping[str, str] = FORMAT
) -> list[Shard]:
    """The tensors in order, in files of at most `max_shard_size` bytes of data.

    A tensor larger than that gets a file to itself.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in itertools.starmap(OutputTensor, tensors):
        full = size + tensor.weight.nbytes > max_shard_size
        if groups[-1] and (full or len(groups[-1]) == MOST_TENSORS_IN_FILE):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.weight.nbytes
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, tuple(groups[0]), tuple(metadata.items()))]
    return [
        Shard(
            f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group), tuple(metadata.items())
        )
        for i, group in enumerate(groups, start=1)
    ]


def index_json(shards: Sequence[Shard]) -> dict[str, str]:
    """The index file beside the shards, by name; nothing where one file holds everything."""
    if len(shards) == 1:
        return {}
    total = sum(tensor.weight.nbytes for shard in shards for tensor in shard.tensors)
    # By hand: for the largest models, indented JSON takes Python's json a second and 50 MB.
    head = json_text({"metadata": {"total_size": total}}).removesuffix("\n}\n")
    blocks = [
        ",\n".join(
            f"    {json.dumps(name)}: {json.dumps(shard.file_name)}" for name, _ in shard.tensors
        )
        for shard in shards
    ]
    blocks[0] = f'{head},\n  "weight_map": {{\n{blocks[0]}'
    blocks[-1] += "\n  }\n}\n"
    return {INDEX_FILE: ",\n".join(blocks)}
