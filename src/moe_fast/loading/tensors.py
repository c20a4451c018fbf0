"""Weights of a design as tensors, and read into tensors that are there already."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_fast.checkpoint.design import Design
from moe_fast.dtypes import DTYPE_NAMES, ML_DTYPES_NAMES, NUMPY_NAMES
from moe_fast.loading.ranges import Ranges, read_ranges
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.pieces import overflow_counted
from moe_fast.storage.tensors import Weight

TORCH_NAMES = {**NUMPY_NAMES, **ML_DTYPES_NAMES, **DTYPE_NAMES}
STAGE = 64 * 1024 * 1024  # bytes on their way to another device or dtype


def read(design: Design, name: str, rows: slice | None = None) -> Tensor:
    """Read a tensor of a design, or some of its rows, to the CPU.

    Like `Design.read`, but with torch's dtypes: bfloat16 and float8 do not need `ml_dtypes`. No
    other bytes are read or computed.

    Parameters
    ----------
    design : Design
        What `design_moe` returns.
    name : str
        One of `design.names()`.
    rows : slice, optional
        Rows along the first axis, with a step of 1.

    Returns
    -------
    Tensor
        On the CPU, in the dtype of the design.

    Raises
    ------
    TypeError, MoeConfigError
        If there is no such tensor, or `rows` is not a slice of its first axis.
    CheckpointError
        If a source has changed since the design was made.

    Examples
    --------
    >>> import moe_fast.torch
    >>> from moe_fast import MoeConfig, design_moe, make_dense_model
    >>> make_dense_model("dense", seed=0)
    >>> design = design_moe("dense", MoeConfig(num_experts=4), dtype="bfloat16")
    >>> name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    >>> rows = moe_fast.torch.read(design, name, slice(0, 2))
    >>> rows.shape, rows.dtype
    (torch.Size([2, 64]), torch.bfloat16)
    """
    weight = design.weight(name)
    shape = design.shape_of_rows(weight, rows)
    tensor = torch.empty(shape, dtype=torch_dtype(weight), device="cpu")
    with OpenFiles() as files:
        fill(tensor, weight, Ranges.one(*design.row_range(weight, rows)), files)
        files.check_unchanged()
    return tensor


def fill(tensor: Tensor, weight: Weight, ranges: Ranges, files: OpenFiles) -> int:
    """Read ranges of a weight's bytes into a tensor, converted to its dtype, on its device.

    Returns how many finite numbers became infinite.
    """
    if not tensor.numel():
        return 0
    dtype = torch_dtype(weight)
    with overflow_counted() as overflow:
        flat = (tensor if tensor.is_contiguous() else torch.empty_like(tensor.contiguous())).view(
            -1
        )
        if flat.device.type == "cpu" and flat.dtype is dtype:
            read_ranges(weight, ranges, bytes_of(flat), files)
        else:
            stage = torch.empty(min(STAGE, ranges.nbytes) // dtype.itemsize, dtype=dtype)
            position = 0
            for batch in ranges.batches(STAGE):
                numbers = stage[: batch.nbytes // dtype.itemsize]
                read_ranges(weight, batch, bytes_of(numbers), files)
                part = flat[position : position + len(numbers)]
                part.copy_(numbers)
                if tensor.dtype is torch.float16:
                    overflow.count += int(part.isinf().sum()) - int(numbers.isinf().sum())
                position += len(numbers)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))
    return overflow.count


def bytes_of(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())


def torch_dtype(weight: Weight) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[weight.dtype])
    return dtype
