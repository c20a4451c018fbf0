"""Arrays in `.npy` files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.errors import CheckpointError

__all__ = ["map_npy"]


def map_npy(path: Path) -> npt.NDArray[Any]:
    """The array of a `.npy` file, mapped into memory: what is not needed is not read.

    Raises
    ------
    CheckpointError
        For a file that is none, and for one that holds Python objects, which are never unpickled.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(6) != b"\x93NUMPY":
                raise ValueError("it does not begin as one")
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot be read as a .npy file: {reason}", file=path) from None
    return array
