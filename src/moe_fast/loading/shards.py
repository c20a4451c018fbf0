"""The part of a parameter that this process holds, as ranges of the whole parameter's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_fast.loading.ranges import Ranges

Indices = npt.NDArray[np.int64]


def find_ranges(parameter: Tensor, item_size: int) -> Ranges:
    """The bytes of the whole that this process holds, where a number takes `item_size` bytes."""
    return byte_ranges(tuple(parameter.shape), held_indices(parameter), item_size)


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


def byte_ranges(shape: Sequence[int], indices: Sequence[Indices | None], item_size: int) -> Ranges:
    """The bytes of these indices, in the order in which a contiguous tensor of them has them."""
    sizes = [size if held is None else len(held) for size, held in zip(shape, indices, strict=True)]
    sharded = [dimension for dimension, held in enumerate(indices) if held is not None]
    if 0 in sizes or not sharded:
        return Ranges.one(0, math.prod(sizes) * item_size)
    last = sharded[-1]
    held = indices[last]
    assert held is not None
    breaks = np.flatnonzero(np.diff(held) != 1) + 1
    block = math.prod(shape[last + 1 :]) * item_size
    starts = held[np.concatenate([[0], breaks])] * block
    stops = (held[np.concatenate([breaks - 1, [-1]])] + 1) * block
    for dimension in reversed(range(last)):
        block *= shape[dimension + 1]
        outer = indices[dimension]
        offsets = (np.arange(shape[dimension]) if outer is None else outer)[:, None] * block
        starts, stops = (offsets + starts).ravel(), (offsets + stops).ravel()
    return Ranges(starts, stops)
