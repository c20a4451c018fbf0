"""Weights that are means of others."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_fast.dtypes import ITEM_SIZES
from moe_fast.records import dataclass
from moe_fast.storage.floats import decode
from moe_fast.storage.pieces import CHUNK, Piece, read_in_blocks, rounded_to


@dataclass(frozen=True, slots=True)
class Averaged:
    """The weighted mean of pieces of equal size, each with a dtype of its own.

    `sum(weight * value) / sum(weights)` in float32, added up in the order of the pieces, and
    rounded once to `to`.
    """

    sources: tuple[Piece, ...]
    dtypes: tuple[str, ...]
    weights: tuple[float, ...]
    to: str

    @property
    def nbytes(self) -> int:
        return self.sources[0].nbytes // ITEM_SIZES[self.dtypes[0]] * ITEM_SIZES[self.to]

    def chunks(self) -> Iterator[memoryview]:
        numbers = CHUNK // 4
        blocks = (
            read_in_blocks((source,), numbers * ITEM_SIZES[dtype])
            for source, dtype in zip(self.sources, self.dtypes, strict=True)
        )
        divisor = np.float32(sum(self.weights))
        for parts in zip(*blocks, strict=True):
            with np.errstate(over="ignore", invalid="ignore"):
                values = decode(parts[0], self.dtypes[0]) * np.float32(self.weights[0])
                for part, dtype, weight in zip(
                    parts[1:], self.dtypes[1:], self.weights[1:], strict=True
                ):
                    values += decode(part, dtype) * np.float32(weight)
                values /= divisor
            yield rounded_to(self.to, values)
