"""Where the bytes of an output tensor come from.

A piece knows its size and is picklable, so that any process can write it. Bytes of a source file
are a `FileRange`, which the writer moves without looking at them; anything else makes its bytes on
demand, a bounded chunk at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from moe_fast.checkpoint.header import ITEM_SIZES, SourceFile
from moe_fast.config import RouterInit
from moe_fast.gates import compute_gate_weights

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class FileRange:
    """`nbytes` bytes of `file`, from `offset`."""

    file: SourceFile
    offset: int
    nbytes: int


@runtime_checkable
class MadePiece(Protocol):
    """Bytes that are made when they are written."""

    @property
    def nbytes(self) -> int: ...

    def chunks(self) -> Iterator[memoryview]: ...


Piece = FileRange | MadePiece


@dataclass(frozen=True, slots=True)
class Router:
    """The starting router of one layer, `(num_experts, hidden_dim)` as checkpoints store it.

    In 16 bits the balanced base `1 / num_experts` would swallow its own noise: every weight would
    round to one value and every token would go to the same experts. A softmax does not see a
    constant added to all of a token's logits, so there the base is left out.
    """

    hidden_dim: int
    num_experts: int
    layer: int
    init: RouterInit
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.hidden_dim * self.num_experts * ITEM_SIZES[self.dtype]

    def chunks(self) -> Iterator[memoryview]:
        weights = compute_gate_weights(
            self.hidden_dim,
            self.num_experts,
            self.init,
            dtype=DTYPES[self.dtype],
            layer=self.layer,
            transpose=True,
            remove_base=self.init is RouterInit.BALANCED and ITEM_SIZES[self.dtype] == 2,
        )
        yield weights.view("uint8").reshape(-1).data
