"""Weights that are drawn: noise and scale on those of a source, routers from nothing.

Each value is drawn from its own place in a stream that the seed and the weight's name choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256

import numpy as np

from moe_fast import kernels
from moe_fast.config import RouterInit
from moe_fast.dtypes import DTYPE_NAMES, ITEM_SIZES
from moe_fast.records import dataclass
from moe_fast.routing.sharpness import sharpen
from moe_fast.routing.weights import draw_router_bits
from moe_fast.storage.floats import decode, encode
from moe_fast.storage.pieces import Piece


@dataclass(frozen=True, slots=True)
class Perturbed:
    """The bytes of `(weights + noise_scale * z) * scale`, in the dtype of the source's weights.

    The arithmetic is float32; the sum and the product are each rounded to the dtype. `z` is normal
    noise, drawn for each weight from its own place in `stream`.
    """

    source: Piece
    dtype: str
    noise_scale: float
    scale: float
    stream: int

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    def chunks(self) -> Iterator[memoryview]:
        first = 0
        for chunk in self.source.chunks():
            values = decode(chunk, self.dtype)
            # Infinite weights, and those that a scale makes so, are what was asked for.
            with np.errstate(over="ignore", invalid="ignore"):
                if self.noise_scale:
                    noise = np.empty_like(values)
                    kernels.compiled.fill_normal(
                        noise, 0, noise.size, self.stream, first, self.noise_scale
                    )
                    values += noise
                    values = decode(encode(values, self.dtype).data, self.dtype)
                if self.scale != 1:
                    values *= np.float32(self.scale)
            first += values.size
            yield encode(values, self.dtype).data


@dataclass(frozen=True, slots=True)
class ReferenceRouter:
    """The starting router of one layer as the reference draws it, `(num_experts, hidden_size)`.

    In 16 bits the balanced base `1 / num_experts` would swallow its own noise: every weight would
    round to one value and every token would go to the same experts. A softmax does not see a
    constant added to all of a token's logits, so there the base is left out.
    """

    hidden_size: int
    num_experts: int
    layer: int
    init: RouterInit
    dtype: str
    remove_base: bool = False

    @property
    def nbytes(self) -> int:
        return self.hidden_size * self.num_experts * ITEM_SIZES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        balanced_in_16_bits = self.init is RouterInit.BALANCED and ITEM_SIZES[self.dtype] == 2
        bits = draw_router_bits(
            self.hidden_size,
            self.num_experts,
            self.init,
            DTYPE_NAMES[self.dtype],
            self.layer,
            self.remove_base or balanced_in_16_bits,
        )
        yield bits.view(np.uint8).reshape(-1).data


@dataclass(frozen=True, slots=True)
class RandomRouter:
    """A router of one layer, `(num_experts, hidden_size)`, drawn from its own `stream`.

    From the standard normal distribution, or, where `bound` is given, evenly from
    `[-bound, bound]`.
    """

    num_experts: int
    hidden_size: int
    dtype: str
    stream: int
    bound: float | None = None

    @property
    def nbytes(self) -> int:
        return self.num_experts * self.hidden_size * ITEM_SIZES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        values = np.empty(self.num_experts * self.hidden_size, np.float32)
        if self.bound is None:
            kernels.compiled.fill_normal(values, 0, values.size, self.stream, 0, 1.0)
        else:
            kernels.compiled.fill_float32(
                values, begin=0, end=values.size, num_rows=1, row_length=values.size,
                seed=self.stream, first=0, to_layer=0, to_row=0, to_column=1, full_range=True,
                base=0.0, scale=self.bound, stream=False,
            )  # fmt: skip
        yield encode(values, self.dtype).data


@dataclass(frozen=True, slots=True)
class SharpenedRouter:
    """A router of one layer, `(num_experts, hidden_size)` in float32, with logits of another size.

    `sharpen` says what is done to it; then it is rounded to `dtype`.
    """

    source: Piece
    num_experts: int
    dtype: str
    logit_std: float

    @property
    def nbytes(self) -> int:
        return self.source.nbytes // ITEM_SIZES["F32"] * ITEM_SIZES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        rows = decode(b"".join(self.source.chunks()), "F32").reshape(self.num_experts, -1)
        yield encode(sharpen(rows, self.logit_std), self.dtype).data


def choose_stream(seed: int, weight: str) -> int:
    """Where the draws of a weight begin: the first 64 bits of SHA-256 of `SEED WEIGHT`."""
    return int.from_bytes(sha256(f"{seed} {weight}".encode()).digest()[:8], "little")
