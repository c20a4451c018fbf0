"""The bytes of weights as float arrays, and floats as bytes, with NumPy alone.

NumPy has no bfloat16 of its own: the kernels convert it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.dtypes import DTYPE_NAMES, ITEM_SIZES

UNSIGNED = {2: np.uint16, 4: np.uint32}
Buffer = bytes | bytearray | memoryview


def decode(data: Buffer, dtype: str) -> npt.NDArray[np.float32]:
    """The values of F32, F16 or BF16 weights as a new float32 array."""
    if dtype == "F32":
        return np.frombuffer(data, np.float32).copy()
    return convert(data, dtype, "F32")[0].view(np.float32)


def encode(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes of float32 values in F32, F16 or BF16: rounded to nearest, ties to even."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if dtype == "F32":
        return flat.view(np.uint8)
    return convert(flat.view(np.uint8).data, "F32", dtype)[0].view(np.uint8)


def convert(
    data: Buffer, dtype: str, to: str, out: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[Any], int]:
    """The bits of weights in another dtype, and how many finite ones became infinite."""
    kernel = getattr(kernels.compiled, f"{DTYPE_NAMES[dtype]}_to_{DTYPE_NAMES[to]}")
    values = np.frombuffer(data, UNSIGNED[ITEM_SIZES[dtype]])
    if out is None or out.size < values.size:
        out = np.empty(values.size, UNSIGNED[ITEM_SIZES[to]])
    bits = out[: values.size]
    return bits, kernel(values, bits)


def decode_any(data: Buffer, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64] | None:
    """The values of a tensor's bytes as float64; `None` for a dtype that is not a float."""
    if dtype == "BF16":  # the upper half of a float32
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(shape)
    if dtype not in DTYPE_NAMES:
        return None
    stored = np.dtype(DTYPE_NAMES[dtype]).newbyteorder("<")
    return np.frombuffer(data, stored).astype(np.float64).reshape(shape)
