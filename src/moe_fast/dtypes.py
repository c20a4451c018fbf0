"""The dtypes of weights: safetensors' names, their sizes, and what NumPy and torch call them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.checks import unknown_choice
from moe_fast.config import Dtype, DtypeName
from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError

if TYPE_CHECKING:
    import torch

    DtypeLike = Dtype | DtypeName | type[Any] | np.dtype[Any] | torch.dtype

# Every dtype that safetensors 0.8.0 reads.
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
# The bytes of an item, for dtypes whose items are whole bytes.
ITEM_SIZES = {dtype: bits // 8 for dtype, bits in ITEM_BITS.items() if bits % 8 == 0}
# Of numbers that are computed with: what NumPy and torch call them, and the other way round.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
NUMPY_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
ML_DTYPES_NAMES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}
WEIGHT_DTYPES = ("F32", "F16", "BF16")  # what can be built from, and converted to
DTYPES = ("float64", "float32", "float16", "bfloat16")
# Other names for them, those apart that NumPy has for other dtypes than torch.
ALIASES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
    "f32": "float32",
    "fp32": "float32",
    "fp64": "float64",
}
TORCH_ALIASES = {"float": "float32", "half": "float16"}


def count_bytes(dtype: str, shape: Sequence[int]) -> int | None:
    """The bytes of a tensor; `None` if it does not end at a whole byte."""
    nbytes, bits = divmod(math.prod(shape) * ITEM_BITS[dtype], 8)
    return None if bits else nbytes


@cache
def kernel_name(dtype: np.dtype[Any]) -> str:
    """The kernel that writes `dtype`; empty where there is none."""
    return f"fill_{dtype.name}" if dtype.name in DTYPES and dtype.isnative else ""


def as_dtype(dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    """The argument `dtype` as one of the dtypes that the kernels write."""
    given = dtype
    if type(dtype).__module__ == "torch":
        dtype = str(dtype).removeprefix("torch.")
    if isinstance(dtype, str):
        dtype = ALIASES.get(dtype, dtype)
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            from ml_dtypes import bfloat16
        except ImportError:
            raise ImportError(
                "dtype 'bfloat16' needs ml_dtypes: pip install 'moe-fast[checkpoint]'",
                name="ml_dtypes",
            ) from None
        dtype = bfloat16
    try:
        found: np.dtype[Any] | None = np.dtype(np.float64 if dtype is None else dtype)
    except TypeError:
        found = None
    if found is None or not kernel_name(found):
        raise wrong_dtype("dtype", given)
    return found


def as_weight_dtype(value: Any, name: str) -> Dtype:
    """`value` as one of the dtypes that weights can be converted to.

    It may be a `Dtype`, one of NumPy's or torch's dtypes, or a name: `"bfloat16"`, `"bf16"`,
    `"torch.bfloat16"`.

    Raises
    ------
    ArgumentTypeError
        Neither a dtype nor a string.
    MoeConfigError
        Another dtype.
    """
    if isinstance(value, str):
        text = value.lower().removeprefix("torch.")
        text = TORCH_ALIASES.get(text, text)
    elif isinstance(value, (type, np.dtype)):
        text = np.dtype(value).name
    elif type(value).__module__ == "torch":
        text = str(value).removeprefix("torch.")
    else:
        raise ArgumentTypeError(
            f"must be a dtype or the name of one, got {reprlib.repr(value)}", argument=name
        )
    text = ALIASES.get(text, text)
    if text not in list(Dtype):
        raise unknown_choice(value, list(Dtype), name)
    return Dtype(text)


def wrong_dtype(name: str, dtype: object) -> MoeConfigError:
    return MoeConfigError(
        f"must be one of {', '.join(DTYPES)}, got {reprlib.repr(dtype)}", argument=name
    )


def as_stored_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of tensors that safetensors calls `dtype`.

    Raises
    ------
    ImportError
        For one that `ml_dtypes` has and NumPy has not, without `ml_dtypes`.
    CheckpointError
        For one that neither has.
    """
    if dtype in NUMPY_NAMES:
        return np.dtype(NUMPY_NAMES[dtype])
    if dtype not in ML_DTYPES_NAMES:
        raise CheckpointError(f"NumPy has no dtype for {dtype}; read_bytes gives the bytes")
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError(
            f"arrays of {dtype} need ml_dtypes: pip install 'moe-fast[checkpoint]'; read_bytes "
            "gives the bytes without it",
            name="ml_dtypes",
        ) from None
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, ML_DTYPES_NAMES[dtype]))
    return found
