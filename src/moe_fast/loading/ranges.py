"""Chosen byte ranges of a weight, read into memory that is there already."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moe_fast.dtypes import ITEM_SIZES
from moe_fast.records import dataclass
from moe_fast.storage.files import OpenFiles, fill
from moe_fast.storage.floats import UNSIGNED, convert
from moe_fast.storage.pieces import (
    CHUNK,
    OVERFLOW,
    Converted,
    FileRange,
    Overflow,
    Piece,
    read_range,
)
from moe_fast.storage.tensors import Weight

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranges:
    """Byte ranges in ascending order, none of them empty, none overlapping."""

    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]

    @classmethod
    def one(cls, start: int, stop: int) -> Ranges:
        """`[start, stop)`, or no range where that is empty."""
        ends = np.array([[start], [stop]] if start < stop else [[], []], np.int64)
        return cls(*ends)

    @classmethod
    def of_indices(
        cls, shape: Sequence[int], indices: Sequence[Indices | None], item_size: int
    ) -> Ranges:
        """The bytes of chosen indices of each dimension, `None` for all, of a contiguous tensor.

        Indices ascend; so do the ranges, in the order of a contiguous tensor of what is chosen.
        """
        sizes = [
            size if held is None else len(held) for size, held in zip(shape, indices, strict=True)
        ]
        sharded = [dimension for dimension, held in enumerate(indices) if held is not None]
        if 0 in sizes or not sharded:
            return cls.one(0, math.prod(sizes) * item_size)
        last = sharded[-1]
        held = indices[last]
        assert held is not None
        breaks = np.flatnonzero(np.diff(held) != 1) + 1
        block = math.prod(shape[last + 1 :]) * item_size
        starts = held[np.concatenate([[0], breaks])] * block
        stops = (held[np.concatenate([breaks - 1, [-1]])] + 1) * block
        for dimension in reversed(range(last)):
            block *= shape[dimension + 1]
            outer = indices[dimension]
            offsets = (np.arange(shape[dimension]) if outer is None else outer)[:, None] * block
            starts, stops = (offsets + starts).ravel(), (offsets + stops).ravel()
        return cls(starts, stops)

    @property
    def nbytes(self) -> int:
        return int((self.stops - self.starts).sum())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts.tolist(), self.stops.tolist(), strict=True)

    def within(self, start: int, stop: int) -> Ranges:
        """What lies in `[start, stop)`, counted from `start`."""
        first = np.searchsorted(self.stops, start, "right")
        last = np.searchsorted(self.starts, stop, "left")
        starts, stops = self.starts[first:last], self.stops[first:last]
        return Ranges(np.maximum(starts, start) - start, np.minimum(stops, stop) - start)

    def batches(self, size: int) -> Iterator[Ranges]:
        """The same bytes in order, in batches of `size` bytes and a last one of what is left."""
        ends = np.cumsum(self.stops - self.starts)
        for begin in range(0, int(ends[-1]) if ends.size else 0, size):
            end = min(begin + size, int(ends[-1]))
            first = np.searchsorted(ends, begin, "right")
            last = np.searchsorted(ends, end, "left")
            chosen = slice(first, last + 1)
            starts, stops = self.starts[chosen].copy(), self.stops[chosen].copy()
            starts[0] = self.stops[first] - (ends[first] - begin)
            stops[-1] = self.stops[last] - (ends[last] - end)
            yield Ranges(starts, stops)


def read_ranges(weight: Weight, ranges: Ranges, out: memoryview, files: OpenFiles) -> None:
    """Fill `out` with the bytes of `ranges`, one range after the other; no others are read.

    The exception are pieces that are drawn or put side by side: those begin at their beginning.
    """
    first = position = 0
    for piece in weight.pieces:
        part = ranges.within(first, first + piece.nbytes)
        if nbytes := part.nbytes:
            read_piece(piece, part, out[position : position + nbytes], files)
            position += nbytes
        first += piece.nbytes


def read_piece(piece: Piece, ranges: Ranges, out: memoryview, files: OpenFiles) -> None:
    position = 0
    if isinstance(piece, FileRange):
        stream = files[piece.file]
        for start, stop in ranges:
            stream.seek(piece.offset + start)
            fill(out[position : position + stop - start], stream, piece.file.path)
            position += stop - start
    elif isinstance(piece, Converted) and isinstance(piece.source, FileRange):
        overflow = OVERFLOW.get() or Overflow()
        size, source_size = ITEM_SIZES[piece.to], ITEM_SIZES[piece.dtype]
        source = memoryview(bytearray(CHUNK // size * source_size))
        for batch in ranges.batches(CHUNK):
            nbytes = batch.nbytes
            data = source[: nbytes // size * source_size]
            numbers = Ranges(batch.starts // size, batch.stops // size)
            read_piece(
                piece.source,
                Ranges(numbers.starts * source_size, numbers.stops * source_size),
                data,
                files,
            )
            bits = np.frombuffer(out[position : position + nbytes], UNSIGNED[size])
            overflow.count += convert(data, piece.dtype, piece.to, bits)[1]
            position += nbytes
    else:
        first = int(ranges.starts[0])
        for chunk in read_range(piece, first, int(ranges.stops[-1])):
            for start, stop in ranges.within(first, first + len(chunk)):
                out[position : position + stop - start] = chunk[start:stop]
                position += stop - start
            first += len(chunk)
