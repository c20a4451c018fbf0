"""The part of a parameter that this process holds, as ranges of the whole parameter's bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.loading.ranges import Indices, Ranges


def find_ranges(parameter: Tensor, item_size: int) -> Ranges:
    """The bytes of the whole that this process holds, where a number takes `item_size` bytes."""
    return Ranges.of_indices(tuple(parameter.shape), held_indices(parameter), item_size)


def held_indices(parameter: Tensor) -> list[Indices | None]:
    """For each dimension the indices that this process holds; `None` where it holds all.

    torch itself says which: it distributes the indices of the dimension as it has distributed the
    parameter, without communication. So uneven shards are right, and those of two meshes.
    """
    if not is_distributed(parameter):
        return [None] * parameter.ndim
    from torch.distributed.tensor import Replicate, distribute_tensor

    found: list[Indices | None] = []
    for dimension, size in enumerate(parameter.shape):
        placements = [
            placement
            if getattr(placement, "dim", None) in (dimension, dimension - parameter.ndim)
            else Replicate()
            for placement in parameter.placements
        ]
        if all(placement.is_replicate() for placement in placements):
            found.append(None)
            continue
        shape = [1] * parameter.ndim
        shape[dimension] = size
        indices = torch.arange(size, device="cpu").view(shape)
        mine = distribute_tensor(indices, parameter.device_mesh, placements, src_data_rank=None)
        found.append(mine.to_local().flatten().cpu().numpy())
    return found


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")
