"""A matrix with a product of two narrow ones added on its way: an adapter folded in."""

from __future__ import annotations

from collections.abc import Iterator

from moe_fast import kernels
from moe_fast.dtypes import ITEM_SIZES
from moe_fast.records import dataclass
from moe_fast.storage.floats import decode
from moe_fast.storage.pieces import CHUNK, Piece, read_in_blocks, rounded_to


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """The bytes of `W + scale * (B @ A)`, in the dtype of W: LoRA (Hu et al. 2021, 2106.09685).

    W is `(rows, columns)`, B is `(rows, rank)`, A is `(rank, columns)`. The arithmetic is float32:
    the products of an element are added up in the order of the rank, times `scale`, plus W, and
    rounded once. A is held whole, of W and B some rows at a time.
    """

    w: Piece
    dtype: str
    b: Piece
    b_dtype: str
    a: Piece
    a_dtype: str
    rank: int
    columns: int
    scale: float

    @property
    def nbytes(self) -> int:
        return self.w.nbytes

    def chunks(self) -> Iterator[memoryview]:
        a = decode(b"".join(self.a.chunks()), self.a_dtype).reshape(self.rank, self.columns)
        row = self.columns * ITEM_SIZES[self.dtype]
        at_once = max(1, CHUNK // row)
        b_row = self.rank * ITEM_SIZES[self.b_dtype]
        blocks = zip(
            read_in_blocks((self.w,), at_once * row),
            read_in_blocks((self.b,), at_once * b_row),
            strict=True,
        )
        for block, b_block in blocks:
            values = decode(block, self.dtype).reshape(-1, self.columns)
            b = decode(b_block, self.b_dtype).reshape(-1, self.rank)
            kernels.compiled.add_product(b, a, self.scale, values)
            yield rounded_to(self.dtype, values)
