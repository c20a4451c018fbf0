"""Router logits in files, mapped into memory, and the statistics of what they route."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from moe_fast.checks import as_path
from moe_fast.config import MoeConfig, RoutingMethod, RoutingMethodName
from moe_fast.dtypes import DTYPE_NAMES
from moe_fast.errors import CheckpointError, MoeConfigError, RoutingError
from moe_fast.routing.arrays import BFLOAT16_BITS, FLOATS, find_encoding
from moe_fast.routing.options import RoutingOptions
from moe_fast.routing.statistics import RoutingStats
from moe_fast.storage.files import open_regular
from moe_fast.storage.npy import map_npy
from moe_fast.storage.safetensors_header import Tensor, read_header

__all__ = ["LayerLogits", "read_logits", "statistics_of_file"]
# Far above what models have; each takes a few kilobytes of statistics.
MOST_LAYERS = 2**16


class LayerLogits(NamedTuple):
    """The logits of one layer's router, `[T, E]`, and where they stand, for messages."""

    path: Path
    tensor: str | None
    layer: int | None
    logits: npt.NDArray[Any]


def read_logits(path: str | os.PathLike[str]) -> list[LayerLogits]:
    """Router logits of a `.npy` or `.safetensors` file, a layer each, mapped into memory.

    An array of shape `[T, E]` is a layer, one of `[L, T, E]` is L layers. Tensors of a safetensors
    file come in the order of their names, numbers in them counting as numbers.

    Raises
    ------
    MoeConfigError
        For a path of another ending.
    CheckpointError
        For a file that holds anything else: the message names the tensor. Nothing is unpickled.
    """
    path = as_path(path, "path")
    if path.suffix == ".npy":
        open_regular(path).close()
        arrays: list[tuple[str | None, npt.NDArray[Any]]] = [(None, map_npy(path))]
    elif path.suffix == ".safetensors":
        tensors = sorted(read_header(path).values(), key=lambda tensor: split_numbers(tensor.name))
        arrays = [(tensor.name, map_tensor(path, tensor)) for tensor in tensors]
    else:
        raise MoeConfigError(
            f"must end in .npy or .safetensors, got {str(path)!r}", argument="path"
        )
    if not arrays:
        raise CheckpointError("holds no tensor", file=path)
    layers = sum(len(array) if array.ndim == 3 else 1 for _, array in arrays)
    for name, array in arrays:
        check_logits(path, name, array, arrays[0][1])
    if layers > MOST_LAYERS:
        raise CheckpointError(f"holds {layers} layers, at most {MOST_LAYERS} are read", file=path)
    return [layer for name, array in arrays for layer in split_layers(path, name, array)]


def split_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    parts = re.split(r"([0-9]+)", name)
    return [(len(part.lstrip("0")), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def map_tensor(path: Path, tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"is {tensor.dtype}; logits are {', '.join(DTYPE_NAMES)}", file=path, tensor=tensor.name
        )
    if tensor.nbytes == 0:
        raise CheckpointError(
            f"is empty, its shape is {list(tensor.shape)}", file=path, tensor=tensor.name
        )
    name = DTYPE_NAMES[tensor.dtype]
    dtype = BFLOAT16_BITS if name == "bfloat16" else np.dtype(name)
    with open_regular(path) as stream:
        tensor.file.check_unchanged(stream)
        return np.memmap(stream, dtype, "r", tensor.offset, tensor.shape)


def check_logits(
    path: Path, name: str | None, array: npt.NDArray[Any], first: npt.NDArray[Any]
) -> None:
    """Raise `CheckpointError` for an array that holds no logits, or has another number of experts.

    `name` is that of its tensor, if the file has any. The number of experts is that of `first`.
    """
    if find_encoding(array.dtype)[1] is None:
        what = f"is {array.dtype}; logits are {FLOATS}"
    elif array.ndim not in (2, 3):
        what = f"must have the shape [T, E] or [L, T, E], got {list(array.shape)}"
    elif not array.size:
        what = f"is empty, its shape is {list(array.shape)}"
    elif array.shape[-1] != first.shape[-1]:
        what = f"has {array.shape[-1]} experts, the first tensor {first.shape[-1]}"
    else:
        return
    raise CheckpointError(what, file=path, tensor=name)


def split_layers(path: Path, name: str | None, array: npt.NDArray[Any]) -> Iterator[LayerLogits]:
    if array.ndim == 2:
        yield LayerLogits(path, name, None, array)
    else:
        for layer, logits in enumerate(array):
            yield LayerLogits(path, name, layer, logits)


def statistics_of_file(
    path: str | os.PathLike[str],
    routing_method: RoutingMethod | RoutingMethodName = RoutingMethod.TOP_K,
    num_experts_per_tok: int | None = None,
    *,
    capacity_factors: Sequence[float] = (),
    tokens_per_batch: int | None = None,
    threads: int | None = None,
    **options: Unpack[RoutingOptions],
) -> RoutingStats:
    """Route all logits of a file and return the statistics of each layer.

    For top-k and Switch, a few megabytes are in memory at a time, whatever the size of the file;
    for expert choice, one batch.

    Parameters
    ----------
    path : path
        A `.npy` file of shape (T, E) or (L, T, E), or a `.safetensors` file with one tensor of
        shape (T, E) per layer.
    routing_method : RoutingMethod or str
        `"top_k"`, `"switch_transformer"` or `"expert_choice"`.
    num_experts_per_tok : int, optional
        By default 1 for Switch and 2 for the others.
    capacity_factors, tokens_per_batch, threads, **options
        As for `RoutingStats` and its `update`.

    Returns
    -------
    RoutingStats

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type, is out of range, or has no meaning for the method.
    CheckpointError
        If the file cannot be read, or does not hold logits.
    RoutingError
        If there is a NaN; the message names the file, the tensor and the token.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from moe_fast import statistics_of_file
    >>> file = tempfile.mkdtemp() + "/logits.npy"
    >>> np.save(file, np.random.default_rng(0).standard_normal((3, 1000, 8)))
    >>> statistics_of_file(file).coefficient_of_variation.round(2)
    array([0.05, 0.04, 0.05])
    """
    layers = read_logits(path)
    if num_experts_per_tok is None:
        num_experts_per_tok = 1 if routing_method == RoutingMethod.SWITCH_TRANSFORMER else 2
    config = MoeConfig(layers[0].logits.shape[-1], num_experts_per_tok, routing_method)
    stats = RoutingStats(config, len(layers), capacity_factors=capacity_factors, **options)
    for number, (file, tensor, layer, logits) in enumerate(layers):
        try:
            stats.update(logits, number, tokens_per_batch=tokens_per_batch, threads=threads)
        except RoutingError as error:
            where = "" if layer is None else f"layer {layer}: "
            raise RoutingError(
                f"cannot be routed: {where}{error}", file=file, tensor=tensor
            ) from None
    return stats
