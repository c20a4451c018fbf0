"""Buffers that no checkpoint holds, such as the frequencies of rotary embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moe_fast.errors import CheckpointError


def find_empty_buffers(
    model: nn.Module, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, nn.Module, str]]:
    """The buffers on the meta device that are not part of the state: name, module, name in it."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            full_name = f"{prefix}.{name}" if prefix else name
            if buffer.is_meta and full_name not in state:
                yield full_name, module, name


def initialize_buffers(model: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Compute these buffers as transformers does after loading; all else stays as it is.

    Raises
    ------
    CheckpointError
        With every buffer that the model's class does not compute.
    """
    empty = list(find_empty_buffers(model, state))
    for _, module, name in empty:
        memory = torch.full_like(module.get_buffer(name), unlikely(module, name), device=device)
        module.register_buffer(name, memory, persistent=False)
    if empty and hasattr(model, "initialize_weights"):
        # transformers initialises what does not bear this mark.
        for value in state.values():
            value._is_hf_initialized = True
        for _, module, _ in empty:
            module._is_hf_initialized = False
        model.initialize_weights()
    problems = []
    for full_name, module, name in empty:
        buffer = module.get_buffer(name)
        if buffer.numel() and is_unlikely(buffer, unlikely(module, name)):
            module.register_buffer(name, torch.empty_like(buffer, device="meta"), persistent=False)
            problems.append(
                f"buffer {full_name!r} is in no checkpoint, and {type(model).__name__} does not "
                "compute it after loading, as models of transformers 5 do; make the model with its "
                "buffers on a device that has memory (accelerate's init_empty_weights does)"
            )
    if problems:
        raise CheckpointError(*problems)


def unlikely(module: nn.Module, name: str) -> float:
    """What a buffer is filled with until it is computed."""
    dtype = module.get_buffer(name).dtype
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return 0 if dtype is torch.bool else torch.iinfo(dtype).min


def is_unlikely(buffer: Tensor, value: float) -> bool:
    return bool((buffer.isnan() if math.isnan(value) else buffer == value).all())
