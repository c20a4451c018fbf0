"""Arrays and torch tensors as the kernels read them: rows of bytes, and how floats are encoded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_fast.errors import ArgumentTypeError, MoeConfigError, RoutingError

# How the kernels read a row: as it is, or as these 16-bit floats.
ENCODINGS = {"float32": 0, "float64": 0, "bfloat16": 1, "float16": 2}
# NumPy has no bfloat16. The kernels read its bits, so that routing a tensor needs no ml_dtypes.
BFLOAT16_BITS = np.dtype({"names": ["bfloat16"], "formats": [np.uint16]}, align=True)
FLOATS = "float32, float64, bfloat16 or float16"


class Rows(NamedTuple):
    """The bytes of each row, the encoding of their floats, and the dtype to compute in."""

    bytes: npt.NDArray[np.uint8]
    encoding: int
    dtype: np.dtype[Any]


def as_array(values: npt.ArrayLike | Sequence[npt.ArrayLike], name: str) -> npt.NDArray[Any]:
    """The argument `name` as an array.

    A torch tensor on the CPU gives an array of the same memory, whether it requires gradients or
    not; one of bfloat16 gives `BFLOAT16_BITS`. A list of tensors gives a copy, in which bfloat16
    has become float32. torch is not imported.

    Raises
    ------
    RoutingError
        A tensor on another device: the message says how to copy it.
    TypeError
        A tensor that is not dense, or of a dtype that NumPy does not have.
    MoeConfigError
        A list of tensors of different shapes.
    """
    if is_tensor(values):
        return view_tensor(values, name)
    if isinstance(values, (list, tuple)) and any(map(is_tensor, values)):
        arrays = [widen_bfloat16(as_array(value, name)) for value in values]
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1:
            raise MoeConfigError(
                f"must be tensors of one shape, got the shapes {shapes}", argument=name
            )
        return np.stack(arrays)
    return np.asarray(values)


def is_tensor(values: object) -> bool:
    """Whether `values` is a tensor of torch, which whoever made one has imported."""
    return isinstance(values, getattr(sys.modules.get("torch"), "Tensor", ()))


def view_tensor(tensor: Any, name: str) -> npt.NDArray[Any]:
    """A torch tensor's memory as an array."""
    torch: Any = sys.modules["torch"]
    if tensor.layout is not torch.strided:
        raise ArgumentTypeError(
            f"must be dense, got {tensor.layout}; {name}.to_dense() is", argument=name
        )
    if tensor.device.type != "cpu":
        raise RoutingError(
            f"must be on the CPU, got a tensor on {tensor.device}; use {name}.cpu()", argument=name
        )
    tensor = tensor.detach().resolve_neg()
    if tensor.dtype is torch.bfloat16:
        bits: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(BFLOAT16_BITS)
        return bits
    try:
        array: npt.NDArray[Any] = tensor.numpy()
    except TypeError:
        raise ArgumentTypeError(f"must be {FLOATS}, got {tensor.dtype}", argument=name) from None
    return array


def widen_bfloat16(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`BFLOAT16_BITS` as float32, which holds them exactly; other arrays as they are."""
    if array.dtype != BFLOAT16_BITS:
        return array
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


def view_rows(logits: npt.NDArray[Any], num_experts: int) -> Rows:
    """Logits `[T, E]` as the kernels read them; copied only if they cannot be read in place.

    Raises
    ------
    TypeError, RoutingError
        Another dtype or shape.
    """
    encoding, dtype = find_encoding(logits.dtype)
    if dtype is None:
        raise TypeError(f"logits must be {FLOATS}, got {logits.dtype}")
    if logits.ndim != 2 or logits.shape[1] != num_experts:
        raise RoutingError(
            f"must have the shape (num_tokens, num_experts = {num_experts}), got {logits.shape}",
            argument="logits",
        )
    if not logits.dtype.isnative:
        logits = logits.astype(logits.dtype.newbyteorder("="))
    if logits.strides[1] != logits.itemsize or not logits.flags.aligned:
        logits = logits.copy()
    return Rows(logits.view(np.uint8), encoding, dtype)


@lru_cache(maxsize=64)  # NumPy works out the name of a dtype each time it is asked for.
def find_encoding(dtype: np.dtype[Any]) -> tuple[int, np.dtype[Any] | None]:
    """How the kernels read a dtype, and the dtype they compute in: None if they do not read it."""
    encoding = ENCODINGS.get("bfloat16" if dtype == BFLOAT16_BITS else dtype.name)
    if encoding is None:
        return 0, None
    return encoding, np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def get_c_type(dtype: np.dtype[Any]) -> str:
    """The form of a kernel that computes in `dtype`, as in `kernel["float"]`."""
    return "double" if dtype == np.float64 else "float"
