"""The dtypes of weights: safetensors' names, their sizes, and what NumPy and torch call them."""

from __future__ import annotations

import reprlib
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

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
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
