"""Where the bytes of an output tensor come from.

A piece knows its size and is picklable, so that any process can write it. It gives its bytes a
bounded chunk at a time; those of a `FileRange` the writer moves without looking at them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moe_fast.dtypes import ITEM_SIZES
from moe_fast.errors import CheckpointError
from moe_fast.records import dataclass
from moe_fast.storage.files import SourceFile, fill, open_regular
from moe_fast.storage.floats import convert, decode

CHUNK = 1024 * 1024


class Piece(Protocol):
    """Some bytes of an output tensor."""

    @property
    def nbytes(self) -> int: ...

    def chunks(self) -> Iterator[memoryview]:
        """The bytes in order. A chunk is valid until the next one is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class FileRange:
    """`nbytes` bytes of `file`, from `offset`."""

    file: SourceFile
    offset: int
    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, read from a file that is the same before and after as when it was planned."""
        return self.blocks(CHUNK)

    def blocks(self, size: int) -> Iterator[memoryview]:
        """The same, `size` bytes at a time."""
        buffer = memoryview(bytearray(min(self.nbytes, size)))
        with open_regular(Path(self.file.path)) as stream:
            self.file.check_unchanged(stream)
            stream.seek(self.offset)
            for start in range(0, self.nbytes, size):
                chunk = buffer[: self.nbytes - start]
                fill(chunk, stream, self.file.path)
                yield chunk
            self.file.check_unchanged(stream)


@dataclass
class Overflow:
    """How many finite values became infinite."""

    count: int = 0


OVERFLOW: ContextVar[Overflow | None] = ContextVar("OVERFLOW", default=None)


@contextmanager
def overflow_counted() -> Iterator[Overflow]:
    """Counts, in this thread, the finite values that pieces make infinite while the block runs.

    Not by the pieces themselves: these are descriptions, and may be written by another process.
    """
    overflow = Overflow()
    token = OVERFLOW.set(overflow)
    try:
        yield overflow
    finally:
        OVERFLOW.reset(token)


def rounded_to(dtype: str, values: npt.NDArray[np.float32]) -> memoryview:
    """The bytes of values in a dtype, rounded once; those that become infinite are counted."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    if dtype == "F32":
        return bits.data
    converted, count = convert(bits.data, "F32", dtype)
    (OVERFLOW.get() or Overflow()).count += count
    return converted.view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Converted:
    """The numbers of a piece in another dtype: to nearest, ties to even."""

    source: Piece
    dtype: str
    to: str

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // ITEM_SIZES[self.dtype] * ITEM_SIZES[self.to]

    def chunks(self) -> Iterator[memoryview]:
        buffer = None
        overflow = OVERFLOW.get() or Overflow()
        for chunk in self.source.chunks():
            bits, count = convert(chunk, self.dtype, self.to, buffer)
            if buffer is None or buffer.size < bits.size:
                buffer = bits
            overflow.count += count
            yield bits.view(np.uint8).data


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zero bytes, which every dtype reads as zeros."""

    nbytes: int

    def chunks(self) -> Iterator[memoryview]:
        for start in range(0, self.nbytes, CHUNK):
            yield memoryview(bytes(min(CHUNK, self.nbytes - start)))


@dataclass(frozen=True, slots=True)
class ReorderedHeads:
    """Rows of queries or keys, those that a rotary embedding turns in another order.

    Attention is the same, since queries and keys are rearranged alike. Of each head's `head_dim`
    rows, the first `rotated` are turned; the others stay where they are.
    """

    source: Piece
    row_nbytes: int
    head_dim: int
    rotated: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def turned(self) -> npt.NDArray[np.int64]:
        """The rows of a head in the source that are turned, in the order that they get."""
        raise NotImplementedError

    def chunks(self) -> Iterator[memoryview]:
        order = np.concatenate([self.turned(), np.arange(self.rotated, self.head_dim)])
        for head in read_in_blocks((self.source,), self.head_dim * self.row_nbytes):
            rows = np.frombuffer(head, np.uint8).reshape(self.head_dim, self.row_nbytes)
            yield rows[order].reshape(-1).data


class PairsToHalves(ReorderedHeads):
    """For an embedding that turns row `i` with `i + rotated / 2`.

    In the source it turns neighbours, 0 with 1 and 2 with 3 (Su et al. 2021).
    """

    __slots__ = ()

    def turned(self) -> npt.NDArray[np.int64]:
        return np.arange(self.rotated).reshape(-1, 2).T.reshape(-1)


class HalvesToPairs(ReorderedHeads):
    """The opposite of `PairsToHalves`."""

    __slots__ = ()

    def turned(self) -> npt.NDArray[np.int64]:
        return np.arange(self.rotated).reshape(2, -1).T.reshape(-1)


@dataclass(frozen=True, slots=True)
class Shifted:
    """The numbers of a piece plus another, in float32."""

    source: Piece
    dtype: str
    shift: float

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // ITEM_SIZES[self.dtype] * 4

    def chunks(self) -> Iterator[memoryview]:
        for chunk in self.source.chunks():
            yield rounded_to("F32", decode(chunk, self.dtype) + np.float32(self.shift))


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Matrices of the same number of rows as one wider matrix, each from its own pieces."""

    rows: int
    matrices: tuple[tuple[Piece, ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for matrix in self.matrices for piece in matrix)

    def chunks(self) -> Iterator[memoryview]:
        widths = [sum(piece.nbytes for piece in matrix) // self.rows for matrix in self.matrices]
        rows = max(1, CHUNK // max(1, sum(widths)))
        blocks = [
            read_in_blocks(matrix, rows * width)
            for matrix, width in zip(self.matrices, widths, strict=True)
        ]
        for block in zip(*blocks, strict=True):
            columns = [
                np.frombuffer(part, np.uint8).reshape(-1, width)
                for part, width in zip(block, widths, strict=True)
            ]
            yield np.concatenate(columns, axis=1).reshape(-1).data


def read_in_blocks(pieces: tuple[Piece, ...], size: int) -> Iterator[bytearray | memoryview]:
    """The bytes of `pieces` in blocks of `size` bytes, the last one as long as what is left.

    A block is valid until the next one is asked for.
    """
    if len(pieces) == 1 and isinstance(pieces[0], FileRange):
        return pieces[0].blocks(size)
    return join_blocks(pieces, size)


def join_blocks(pieces: tuple[Piece, ...], size: int) -> Iterator[bytearray | memoryview]:
    block = bytearray()
    for piece in pieces:
        for chunk in piece.chunks():
            block += chunk
            while len(block) >= size:
                yield block[:size]
                del block[:size]
    if block:
        yield block


@dataclass(frozen=True, slots=True)
class Given:
    """Bytes that are known already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[memoryview]:
        yield memoryview(self.data)


@dataclass(frozen=True, slots=True)
class Remembered:
    """Bytes of which the digest is left. They can be told from others, and not written.

    The digest is that of rows of `row_nbytes`, each of which stands there `times` times.
    """

    nbytes: int
    sha256: str
    row_nbytes: int = 0
    times: int = 1

    def is_digest_of(self, data: bytes | bytearray) -> bool:
        """Whether these are the bytes."""
        if self.times == 1:
            return sha256(data).hexdigest() == self.sha256
        rows = np.frombuffer(data, np.uint8).reshape(-1, self.times, self.row_nbytes)
        alike = bool((rows == rows[:, :1]).all())
        return alike and sha256(rows[:, 0].tobytes()).hexdigest() == self.sha256

    def chunks(self) -> Iterator[memoryview]:
        raise CheckpointError("these bytes cannot be made again: only their digest is known")


def read_range(piece: Piece, start: int, stop: int) -> Iterator[memoryview]:
    """The bytes of a piece from `start` to `stop`, reading no others where that can be."""
    if isinstance(piece, FileRange):
        yield from FileRange(piece.file, piece.offset + start, stop - start).chunks()
        return
    if isinstance(piece, Zeros):
        yield from Zeros(stop - start).chunks()
        return
    if isinstance(piece, Converted) and isinstance(piece.source, FileRange):
        size, source_size = ITEM_SIZES[piece.to], ITEM_SIZES[piece.dtype]
        if start % size == 0 and stop % size == 0:
            first, count = start // size * source_size, (stop - start) // size * source_size
            source = FileRange(piece.source.file, piece.source.offset + first, count)
            yield from Converted(source, piece.dtype, piece.to).chunks()
            return
    position = 0
    for chunk in piece.chunks():
        first, last = max(start - position, 0), min(stop - position, len(chunk))
        if first < last:
            yield chunk[first:last]
        position += len(chunk)
        if position >= stop:
            return
