"""Buffers that no checkpoint holds, such as the frequencies of rotary embeddings."""

from __future__ import annotations

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


def check_buffers(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` where there are such buffers and nothing to compute them with."""
    names = [name for name, _, _ in find_empty_buffers(model, state)]
    if names and not hasattr(model, "initialize_weights"):
        raise CheckpointError(
            *(
                f"buffer {name!r} is on the meta device and in no checkpoint, and "
                f"{type(model).__name__} has no initialize_weights, as models of transformers 5 "
                "have, to compute it; make the model with buffers on a device that has memory"
                for name in names
            )
        )


def initialize_buffers(
    model: nn.Module, state: Mapping[str, Tensor], device: torch.device | str | None
) -> None:
    """Compute these buffers as transformers does after loading; all else stays as it is."""
    empty = list(find_empty_buffers(model, state))
    if not empty:
        return
    # transformers initialises what does not bear this mark.
    for value in model.state_dict(keep_vars=True).values():
        if isinstance(value, Tensor):
            value._is_hf_initialized = True
    for _, module, name in empty:
        memory = torch.empty_like(module.get_buffer(name), device=device)
        module.register_buffer(name, memory, persistent=False)
        module._is_hf_initialized = False
    model.initialize_weights()
