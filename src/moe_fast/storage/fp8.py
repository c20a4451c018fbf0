"""Weights in FP8 with a scale for each block, as checkpoints store them: found and dequantised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.storage.arithmetic import Dequantised
from moe_fast.storage.pieces import FileRange
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief, is_size
from moe_fast.storage.tensors import Weight

Block = tuple[int, int]
SCALE = "_scale_inv"  # after the name of the weight


def read_block(quantised: Mapping[str, Any] | None, file: str) -> Block | None:
    """The rows and columns that share a scale, by `quantization_config`; `None` without one.

    Raises
    ------
    CheckpointError
        For a model that is quantised in another way.
    """
    if quantised is None:
        return None
    method, block = quantised.get("quant_method"), quantised.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or not is_block(block):
        kind = brief(method) if method != "fp8" else "'fp8' without weight_block_size"
        raise CheckpointError(
            f"quantization_config: {kind} cannot be dequantised; 'fp8' with scales for blocks "
            "(weight_block_size) can",
            file=file,
        )
    return block[0], block[1]


def is_block(value: list[Any]) -> bool:
    return len(value) == 2 and all(is_size(size) and size > 0 for size in value)


def find_scales(tensors: Mapping[str, Tensor], block: Block | None) -> dict[str, Tensor]:
    """The scales of each tensor in FP8, by its name.

    Raises
    ------
    CheckpointError
        For scales of another shape or dtype.
    """
    found: dict[str, Tensor] = {}
    if block is None:
        return found
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}{SCALE}")
        if tensor.dtype != "F8_E4M3" or scale is None or len(tensor.shape) != 2:
            continue
        expected = tuple(-(-size // part) for size, part in zip(tensor.shape, block, strict=True))
        if scale.shape != expected or scale.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"is {scale.dtype} of shape {list(scale.shape)}; scales of blocks of "
                f"{brief(list(block))} are {list(expected)}, in {', '.join(WEIGHT_DTYPES)}",
                file=scale.file.path,
                tensor=scale.name,
            )
        found[name] = scale
    return found


def dequantised(tensor: Tensor, scale: Tensor, block: Block, to: str) -> Weight:
    """A tensor in FP8 times its scales, rounded once."""
    rows, columns = tensor.shape
    piece = Dequantised(
        FileRange(tensor.file, tensor.offset, tensor.nbytes),
        (rows, columns),
        FileRange(scale.file, scale.offset, scale.nbytes),
        scale.dtype,
        block,
        to,
    )
    return Weight(to, tensor.shape, (piece,))
