"""What of an MoE is in FP8 with a scale for each block of numbers, as DeepSeek-V3 has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fast.models.moe import MoeModel
from moe_fast.storage import fp8
from moe_fast.storage.safetensors_header import Tensor


def find_scales(model: MoeModel) -> dict[str, Tensor]:
    """The scales of each tensor in FP8, by its name.

    Raises
    ------
    CheckpointError
        For a model that is quantised in another way.
    """
    block = fp8.read_block(quantisation_of(model), str(model.path / "config.json"))
    return fp8.find_scales(model.tensors, block)


def quantisation_of(model: MoeModel) -> Mapping[str, Any] | None:
    for config in (model.config, model.language_config):
        if isinstance(config.get("quantization_config"), dict):
            found: Mapping[str, Any] = config["quantization_config"]
            return found
    return None


def block_of(model: MoeModel) -> fp8.Block:
    """The rows and columns that share a scale."""
    quantised = quantisation_of(model)
    assert quantised is not None
    rows, columns = quantised["weight_block_size"]
    return rows, columns
