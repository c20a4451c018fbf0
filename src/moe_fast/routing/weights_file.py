"""Router weights in a file of their own, for scripts that put them into a model themselves."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.checks import as_path
from moe_fast.dtypes import DTYPE_CODES
from moe_fast.errors import ArgumentTypeError, MoeConfigError
from moe_fast.single_file import check_place, whole_file
from moe_fast.storage.safetensors_header import header_bytes
from moe_fast.storage.tensors import FORMAT

__all__ = ["write_router_weights"]


def write_router_weights(
    path: str | os.PathLike[str], weights: npt.NDArray[Any], *, overwrite: bool = False
) -> int:
    """Write router weights to a file.

    A `.npy` file holds the array, a `.safetensors` file one tensor per layer, named
    `layers.0.gate.weight` and so on.

    Parameters
    ----------
    path : path
        The file to write, which ends in `.npy` or `.safetensors`.
    weights : ndarray of float64, float32, float16 or bfloat16, shape (num_layers, rows, columns)
        The weights, as `compute_router_weights` returns them.
    overwrite : bool
        Whether to replace an existing file.

    Returns
    -------
    int
        The size of the file in bytes.

    Raises
    ------
    TypeError, MoeConfigError
        If `weights` is not such an array, `path` has another ending, or bfloat16 is to be written
        to a `.npy` file, from which NumPy could not read it.
    CheckpointError
        If the file exists, or cannot be written where it is.
    OSError
        If the disk is full. An existing file is then unchanged.

    Examples
    --------
    >>> from moe_fast import compute_router_weights, write_router_weights
    >>> import tempfile
    >>> weights = compute_router_weights(2, 64, 8, dtype="float32", transpose=True)
    >>> write_router_weights(tempfile.mkdtemp() + "/routers.npy", weights)
    4224
    """
    path = as_path(path, "path")
    if not isinstance(weights, np.ndarray) or weights.dtype.name not in DTYPE_CODES:
        kind = getattr(weights, "dtype", type(weights).__name__)
        raise ArgumentTypeError(f"must be an array of floats, got {kind}", argument="weights")
    if weights.ndim != 3:
        raise MoeConfigError(
            f"must have the shape (num_layers, rows, columns), got {weights.shape}",
            argument="weights",
        )
    if path.suffix not in (".npy", ".safetensors"):
        raise MoeConfigError(
            f"must end in .npy or .safetensors, got {str(path)!r}", argument="path"
        )
    if path.suffix == ".npy" and weights.dtype.name == "bfloat16":
        raise MoeConfigError(
            f"must end in .safetensors for bfloat16, got {str(path)!r}", argument="path"
        )
    check_place(path, overwrite=overwrite)
    weights = np.ascontiguousarray(weights)
    with whole_file(path) as stream:
        if path.suffix == ".npy":
            header = np.lib.format.header_data_from_array_1_0(weights)
            np.lib.format.write_array_header_1_0(stream, header)
        else:
            stream.write(make_header(weights))
        # Not tofile, whose errors do not say that the disk is full.
        stream.write(weights.reshape(-1).view(np.uint8).data)
        return stream.tell()


def make_header(weights: npt.NDArray[Any]) -> bytes:
    """The header of a safetensors file with one tensor a layer."""
    dtype = DTYPE_CODES[weights.dtype.name]
    entries = [
        (f"layers.{layer}.gate.weight", dtype, weights.shape[1:], weights[layer].nbytes)
        for layer in range(len(weights))
    ]
    return header_bytes(entries, FORMAT)
