"""Weights in FP8 with a scale for each block of numbers, as DeepSeek-V3 has them, as plain ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.families.config import is_count
from moe_fast.models.moe import MoeModel
from moe_fast.storage.arithmetic import Dequantised
from moe_fast.storage.pieces import FileRange
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight


def find_scales(model: MoeModel) -> dict[str, Tensor]:
    """The scales of each tensor in FP8, by its name.

    Raises
    ------
    CheckpointError
        For a model that is quantised in another way.
    """
    file = model.path / "config.json"
    quantised = quantisation_of(model)
    if quantised is None:
        return {}
    method, block = quantised.get("quant_method"), quantised.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or not is_block(block):
        kind = brief(method) if method != "fp8" else "'fp8' without weight_block_size"
        raise CheckpointError(
            f"{file}: quantization_config: {kind} cannot be dequantised; 'fp8' with scales for "
            "blocks (weight_block_size) can"
        )
    found = {}
    for name, tensor in model.tensors.items():
        scale = model.tensors.get(f"{name}_scale_inv")
        if tensor.dtype != "F8_E4M3" or scale is None or len(tensor.shape) != 2:
            continue
        expected = tuple(-(-size // part) for size, part in zip(tensor.shape, block, strict=True))
        if scale.shape != expected or scale.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{scale.file.path}: tensor {scale.name!r} is {scale.dtype} of shape "
                f"{list(scale.shape)}; scales of blocks of {brief(block)} are {list(expected)}, "
                f"in {', '.join(WEIGHT_DTYPES)}"
            )
        found[name] = scale
    return found


def quantisation_of(model: MoeModel) -> Mapping[str, Any] | None:
    for config in (model.config, model.language_config):
        if isinstance(config.get("quantization_config"), dict):
            found: Mapping[str, Any] = config["quantization_config"]
            return found
    return None


def is_block(value: list[Any]) -> bool:
    return len(value) == 2 and all(map(is_count, value))


def block_of(model: MoeModel) -> tuple[int, int]:
    """The rows and columns that share a scale."""
    quantised = quantisation_of(model)
    assert quantised is not None
    rows, columns = quantised["weight_block_size"]
    return rows, columns


def dequantised(tensor: Tensor, scale: Tensor, block: tuple[int, int], to: str) -> Weight:
    rows, columns = tensor.shape
    values = FileRange(tensor.file, tensor.offset, tensor.nbytes)
    scales = FileRange(scale.file, scale.offset, scale.nbytes)
    piece = Dequantised(values, (rows, columns), scales, scale.dtype, block, to)
    return Weight(to, tensor.shape, (piece,))
