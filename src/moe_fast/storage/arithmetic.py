"""Pieces that are computed: sums of several weights, and weights times their scales.

Sums are taken in float64 in a fixed order, one operation after the other, and rounded once to
nearest and even, so that every processor and every version of NumPy gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.dtypes import ITEM_SIZES
from moe_fast.records import dataclass
from moe_fast.storage.floats import decode, encode
from moe_fast.storage.pieces import (
    CHUNK,
    OVERFLOW,
    FileRange,
    Overflow,
    Piece,
    read_in_blocks,
    read_range,
)

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinearCombination:
    """Weights of one dtype added up, `(w_1 x_1 + w_2 x_2 + ...) / divisor`."""

    sources: tuple[Piece, ...]
    weights: tuple[float, ...]
    divisor: float
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.sources[0].nbytes

    def chunks(self) -> Iterator[memoryview]:
        overflow = OVERFLOW.get() or Overflow()
        blocks = (read_in_blocks((source,), CHUNK) for source in self.sources)
        for parts in zip(*blocks, strict=True):
            total: Doubles | None = None
            for part, weight in zip(parts, self.weights, strict=True):
                term = decode(part, self.dtype).astype(np.float64)
                term *= weight
                total = term if total is None else total + term
            assert total is not None
            total /= self.divisor
            yield rounded(total, self.dtype, overflow).data


@dataclass(frozen=True, slots=True)
class Dequantised:
    """FP8 weights (E4M3) times the scale of their block, `W[i, j] * scale[i // m, j // n]`.

    DeepSeek-V3 (2412.19437, section 3.3) stores weights so, in blocks of 128 x 128.
    """

    source: FileRange
    shape: tuple[int, int]
    scale: FileRange
    scale_dtype: str
    block: tuple[int, int]
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * ITEM_SIZES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        rows, columns = self.shape
        height, width = self.block
        overflow = OVERFLOW.get() or Overflow()
        scales = whole(self.scale, self.scale_dtype).reshape(-1, -(-columns // width))
        at_once = max(1, CHUNK // max(1, columns))
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            data = b"".join(read_range(self.source, start * columns, stop * columns))
            values = E4M3[np.frombuffer(data, np.uint8)].reshape(stop - start, columns)
            factors = scales[np.arange(start, stop) // height]
            values *= np.repeat(factors, width, axis=1)[:, :columns]
            yield rounded(values, self.dtype, overflow).data


def whole(piece: Piece, dtype: str) -> Doubles:
    return decode(b"".join(piece.chunks()), dtype).astype(np.float64)


def values_of_e4m3() -> Doubles:
    """The number that each byte is in E4M3 without infinities (OCP 8-bit floating point, 2023)."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values: Doubles = sign * np.where(exponent > 0, normal, np.ldexp(mantissa / 8, -6))
    values[(codes & 0x7F) == 0x7F] = np.nan
    return values


E4M3 = values_of_e4m3()


def rounded(values: Doubles, dtype: str, overflow: Overflow) -> npt.NDArray[np.uint8]:
    """The bytes of float64 values in F32, F16 or BF16, rounded once, to nearest and to even.

    Values on their way to 16 bits become float32 rounded to odd, which is still told apart from
    every halfway point (Boldo and Melquiond 2008, double rounding).
    """
    flat = values.reshape(-1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        single: npt.NDArray[Any] = flat.astype(np.float32)
    if dtype != "F32":
        back = single.astype(np.float64)
        inexact = (back != flat) & ~np.isnan(flat)
        beyond = inexact & (np.abs(back) > np.abs(flat))
        bits = single.view(np.uint32)
        bits[beyond] -= 1  # towards zero; sign and magnitude, so for both signs
        bits[inexact] |= 1
    result = encode(single, dtype)
    stored = decode(result.data, dtype)
    overflow.count += int(np.count_nonzero(np.isinf(stored) & np.isfinite(flat)))
    return result
