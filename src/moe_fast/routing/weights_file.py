"""Router weights in a file of their own, for scripts that put them into a model themselves."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.checks import as_path
from moe_fast.dtypes import DTYPE_CODES
from moe_fast.errors import MoeConfigError
from moe_fast.single_file import check_place, whole_file
from moe_fast.storage.safetensors_header import header_bytes
from moe_fast.storage.tensors import FORMAT

__all__ = ["write_router_weights"]


def write_router_weights(
    path: str | os.PathLike[str], weights: npt.NDArray[Any], *, overwrite: bool = False
) -> int:
    """Write router weights of shape `(num_layers, rows, columns)`; return the bytes of the file.

    A `.npy` file holds the array, a `.safetensors` file one tensor a layer, `layers.N.gate.weight`.

    Raises
    ------
    MoeConfigError
        For a path of another ending, or bfloat16 in a `.npy` file, which NumPy could not read back.
    CheckpointError
        For a file that exists, or a place that cannot be written.

    Examples
    --------
    >>> from moe_fast import compute_router_weights
    >>> from moe_fast.routing.weights_file import write_router_weights
    >>> import tempfile
    >>> weights = compute_router_weights(2, 64, 8, dtype="float32", transpose=True)
    >>> write_router_weights(tempfile.mkdtemp() + "/routers.npy", weights)
    4224
    """
    path = as_path(path, "path")
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
