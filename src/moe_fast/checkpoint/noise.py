"""Weights that are drawn: noise and scale on those of a source, routers from nothing.

Each value is drawn from its own place in a stream that the seed and the weight's name choose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from moe_fast import kernels
from moe_fast.checkpoint.header import DTYPE_NAMES, ITEM_SIZES
from moe_fast.checkpoint.pieces import FileRange
from moe_fast.config import GateMode
from moe_fast.gates import as_dtype


@dataclass(frozen=True, slots=True)
class Perturbed:
    """The bytes of `(weights + noise_scale * z) * scale`, in the dtype of the source's weights.

    The arithmetic is float32; the sum and the product are each rounded to the dtype. `z` is normal
    noise, drawn for each weight from its own place in `stream`.
    """

    source: FileRange
    dtype: str
    noise_scale: float
    scale: float
    stream: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def chunks(self) -> Iterator[memoryview]:
        dtype = as_dtype(DTYPE_NAMES[self.dtype])
        first = 0
        for chunk in self.source.chunks():
            values = np.frombuffer(chunk, dtype).astype(np.float32)
            # Infinite weights, and those that a scale makes so, are what was asked for.
            with np.errstate(over="ignore", invalid="ignore"):
                if self.noise_scale:
                    noise = np.empty_like(values)
                    kernels.compiled.fill_normal(
                        noise, 0, noise.size, self.stream, first, self.noise_scale
                    )
                    values += noise
                    values = values.astype(dtype).astype(np.float32)
                if self.scale != 1:
                    values *= np.float32(self.scale)
                weights = values.astype(dtype)
            first += weights.size
            yield weights.view(np.uint8).data


@dataclass(frozen=True, slots=True)
class RandomRouter:
    """A router of one layer, `(num_experts, hidden_dim)`, drawn as `GateMode` says."""

    num_experts: int
    hidden_dim: int
    dtype: str
    mode: GateMode
    stream: int

    @property
    def nbytes(self) -> int:
        return self.num_experts * self.hidden_dim * ITEM_SIZES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        values = np.empty(self.num_experts * self.hidden_dim, np.float32)
        if self.mode is GateMode.RANDOM:
            kernels.compiled.fill_normal(values, 0, values.size, self.stream, 0, 1.0)
        else:
            scale = 1.0 / math.sqrt(self.hidden_dim)
            kernels.compiled.fill_float32(
                values, begin=0, end=values.size, num_rows=1, row_length=values.size,
                seed=self.stream, first=0, to_layer=0, to_row=0, to_column=1, full_range=True,
                base=0.0, scale=scale, stream=False,
            )  # fmt: skip
        yield values.astype(as_dtype(DTYPE_NAMES[self.dtype])).view(np.uint8).data


def noise_stream(seed: int, weight: str) -> int:
    """Where the noise of a weight is drawn from: the first 64 bits of SHA-256 of `SEED WEIGHT`."""
    return int.from_bytes(sha256(f"{seed} {weight}".encode()).digest()[:8], "little")
