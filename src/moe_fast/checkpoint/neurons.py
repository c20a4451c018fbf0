"""Some neurons of a feed-forward network: a shard of it, in another order, or drawn anew.

A neuron is a row of `gate_proj` and of `up_proj`, and a column of `down_proj`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.dtypes import DTYPE_NAMES, ITEM_SIZES
from moe_fast.records import dataclass
from moe_fast.storage.floats import UNSIGNED, decode
from moe_fast.storage.pieces import (
    CHUNK,
    OVERFLOW,
    Overflow,
    Piece,
    read_in_blocks,
    read_range,
    rounded_to,
)

Indices = npt.NDArray[np.intp]
Bits = npt.NDArray[Any]
Blocks = Callable[[], Iterable[bytearray | memoryview]]
WORDS = {2: "uint16_t", 4: "uint32_t"}
# Of rows in another order, so much of the result is collected in one pass over the source.
WINDOW = 16 * CHUNK
# A matrix up to so many bytes is read once where others are read again for each pass.
HELD = 8 * CHUNK


@dataclass(frozen=True, slots=True)
class Neurons:
    """The neurons `start` to `stop` of `width`, in the order that `stream` shuffles all into.

    Or those that are `chosen`, which are as many.
    """

    width: int
    start: int
    stop: int
    stream: int | None = None
    chosen: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def in_place(self) -> bool:
        """Whether they stand beside each other, in this order, in the whole network."""
        return self.stream is None and self.chosen is None

    def indices(self) -> Indices:
        """Their numbers in the whole network."""
        if self.chosen is not None:
            return np.array(self.chosen, np.intp)
        if self.stream is None:
            return np.arange(self.start, self.stop)
        return shuffle(self.width, self.stream)[self.start : self.stop]


def shuffle(count: int, stream: int) -> Indices:
    """The numbers below `count` in the order of random keys, the same on every machine.

    The keys are those of SplitMix64 (Steele, Lea and Flood 2014) with the seed `stream`.
    """
    keys = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    keys += np.uint64(stream)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys ^= keys >> np.uint64(31)
    return np.argsort(keys, kind="stable")


@dataclass(frozen=True, slots=True)
class NeuronRows:
    """The rows of some neurons, of the `gate_proj` or `up_proj` that `source` holds."""

    source: Piece
    neurons: Neurons

    @property
    def nbytes(self) -> int:
        return self.neurons.count * self.row_nbytes

    @property
    def row_nbytes(self) -> int:
        return self.source.nbytes // self.neurons.width

    def chunks(self) -> Iterator[memoryview]:
        size = self.row_nbytes
        if self.neurons.in_place:
            start, stop = self.neurons.start * size, self.neurons.stop * size
            yield from read_range(self.source, start, stop)
            return
        indices = self.neurons.indices()
        step = max(1, WINDOW // size)
        for first in range(0, len(indices), step):
            yield self.collect(indices[first : first + step])

    def collect(self, indices: Indices) -> memoryview:
        """These rows, in this order, from one pass over the source."""
        size = self.row_nbytes
        found = np.empty((len(indices), size), np.uint8)
        order = np.argsort(indices)
        in_order = indices[order]
        first = 0
        for block in read_in_blocks((self.source,), max(1, CHUNK // size) * size):
            rows = np.frombuffer(block, np.uint8).reshape(-1, size)
            begin, end = np.searchsorted(in_order, (first, first + len(rows)))
            found[order[begin:end]] = rows[in_order[begin:end] - first]
            first += len(rows)
        return found.reshape(-1).data


@dataclass(frozen=True, slots=True)
class NeuronColumns:
    """The columns of some neurons, of the `down_proj` that `source` holds in this dtype."""

    source: Piece
    dtype: str
    neurons: Neurons

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // self.neurons.width * self.neurons.count

    def chunks(self) -> Iterator[memoryview]:
        neurons, size = self.neurons, ITEM_SIZES[self.dtype]
        indices = None if neurons.in_place else neurons.indices()
        row = neurons.width * size
        for block in read_in_blocks((self.source,), max(1, CHUNK // row) * row):
            matrix = np.frombuffer(block, UNSIGNED[size]).reshape(-1, neurons.width)
            if indices is None:
                columns = np.ascontiguousarray(matrix[:, neurons.start : neurons.stop])
            else:
                columns = take_columns(matrix, indices)
            yield columns.view(np.uint8).reshape(-1).data


@dataclass(frozen=True, slots=True)
class Scaled:
    """The weights of a piece times a factor, rounded once, to `to`; exact for powers of two."""

    source: Piece
    dtype: str
    factor: float
    to: str

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // ITEM_SIZES[self.dtype] * ITEM_SIZES[self.to]

    def chunks(self) -> Iterator[memoryview]:
        overflow = OVERFLOW.get() or Overflow()
        kernel = getattr(kernels.compiled, f"scale_{DTYPE_NAMES[self.dtype]}", None)
        for chunk in self.source.chunks():
            if kernel is not None and self.to == self.dtype:
                bits = np.frombuffer(chunk, np.uint16)
                scaled = np.empty_like(bits)
                overflow.count += kernel(bits, self.factor, scaled)
                yield scaled.view(np.uint8).data
                continue
            with np.errstate(over="ignore", invalid="ignore"):
                values = decode(chunk, self.dtype)
                values *= np.float32(self.factor)
            yield rounded_to(self.to, values)


@dataclass(frozen=True, slots=True)
class RepeatedRows:
    """Each row of a matrix `times` times, one after the other."""

    source: Piece
    row_nbytes: int
    times: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes * self.times

    def chunks(self) -> Iterator[memoryview]:
        for block in read_in_blocks((self.source,), self.row_nbytes):
            yield memoryview(bytes(block) * self.times)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """A matrix of an expert with some of its neurons drawn anew (Drop-Upcycling, arXiv 2502.19261).

    The weights of the neurons are replaced by draws from the normal distribution that has the mean
    and the standard deviation of exactly these weights. `number` neurons of `count` are chosen by
    `chosen_by`; a neuron is a row, or where `columns`, a column.
    """

    source: Piece
    dtype: str
    count: int
    number: int
    columns: bool
    chosen_by: int
    """The stream that chooses the neurons; the same for the three matrices of an expert."""
    stream: int
    """The stream of the draws."""

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def chunks(self) -> Iterator[memoryview]:
        chosen = np.sort(shuffle(self.count, self.chosen_by)[: self.number])
        blocks = self.held().copy if 0 < self.nbytes <= HELD else self.blocks
        mean, deviation = self.measure(chosen, blocks)
        drawn = 0
        for matrix, neurons in self.matrices(chosen, blocks):
            part = self.take(matrix, neurons)
            values = np.empty(part.shape, np.float32)
            kernels.compiled.fill_normal(
                values.reshape(-1), 0, values.size, self.stream, drawn, deviation
            )
            drawn += values.size
            values += np.float32(mean)
            bits = np.frombuffer(rounded_to(self.dtype, values), part.dtype).reshape(part.shape)
            self.put(bits, neurons, matrix)
            yield matrix.view(np.uint8).reshape(-1).data

    @property
    def width(self) -> int:
        """Of a row of the matrix."""
        return self.count if self.columns else self.nbytes // ITEM_SIZES[self.dtype] // self.count

    @property
    def block_nbytes(self) -> int:
        """As many rows as fit into a chunk."""
        row = self.width * ITEM_SIZES[self.dtype]
        return max(1, CHUNK // row) * row

    def blocks(self) -> Iterator[bytearray | memoryview]:
        """The source in blocks of rows, which may be changed until the next is asked for."""
        return read_in_blocks((self.source,), self.block_nbytes)

    def held(self) -> list[memoryview]:
        """The same blocks, read at once."""
        (block,) = read_in_blocks((self.source,), self.nbytes)
        whole, size = memoryview(block), self.block_nbytes
        return [whole[start : start + size] for start in range(0, self.nbytes, size)]

    def matrices(self, chosen: Indices, blocks: Blocks) -> Iterator[tuple[Bits, Indices]]:
        """Each block as bits, and which of its rows or columns are among the chosen neurons."""
        first = 0
        for block in blocks():
            matrix = np.frombuffer(block, UNSIGNED[ITEM_SIZES[self.dtype]]).reshape(-1, self.width)
            if self.columns:
                yield matrix, chosen
                continue
            begin, end = np.searchsorted(chosen, (first, first + len(matrix)))
            yield matrix, chosen[begin:end] - first
            first += len(matrix)

    def measure(self, chosen: Indices, blocks: Blocks) -> tuple[float, float]:
        """The mean and the standard deviation of the weights to be replaced, in float64."""
        count, total = 0, 0.0
        for values in self.chosen_values(chosen, blocks):
            count += values.size
            total += kernels.compiled.sum_deviations(values, 0.0, False)
        mean = total / max(count, 1)
        squares = 0.0
        for values in self.chosen_values(chosen, blocks):
            squares += kernels.compiled.sum_deviations(values, mean, True)
        return mean, math.sqrt(squares / max(count, 1))

    def chosen_values(self, chosen: Indices, blocks: Blocks) -> Iterator[npt.NDArray[np.float32]]:
        for matrix, neurons in self.matrices(chosen, blocks):
            yield decode(self.take(matrix, neurons).reshape(-1).view(np.uint8).data, self.dtype)

    def take(self, matrix: Bits, neurons: Indices) -> Bits:
        return take_columns(matrix, neurons) if self.columns else matrix[neurons]

    def put(self, bits: Bits, neurons: Indices, matrix: Bits) -> None:
        if self.columns:
            kernels.compiled.put_columns[WORDS[bits.itemsize]](bits, neurons, matrix)
        else:
            matrix[neurons] = bits


def take_columns(matrix: Bits, columns: Indices) -> Bits:
    """`matrix[:, columns]`, of numbers of 16 or 32 bits."""
    out = np.empty((len(matrix), len(columns)), matrix.dtype)
    kernels.compiled.take_columns[WORDS[matrix.itemsize]](matrix, columns, out)
    return out
