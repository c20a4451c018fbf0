"""Neurons of experts in the order in which they are most like those of another.

A feed-forward network computes the same in any order of its neurons. Before experts are averaged,
those of each are matched to those of the group's first expert (weight matching, as in M-SMoE,
2310.01334): the order maximises the sum of the products of matched rows of `gate_proj` and
`up_proj` and columns of `down_proj`, a linear assignment problem.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.arrangement import Group
from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.families.dense import FFN
from moe_fast.matmul import matmul
from moe_fast.models.moe import Expert, MoeLayer, MoeModel
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief

Orders = dict[str, dict[int, bytes]]


def find_orders(model: MoeModel, groups: Mapping[str, Sequence[Group]]) -> Orders:
    """The order of the neurons of each expert that is not the first of its group.

    Takes memory for two matrices of an expert, and for as many products as it has neurons, squared.

    Raises
    ------
    CheckpointError
        A family whose experts are stored transposed, or weights that are not floats.
    ModuleNotFoundError
        Without scipy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "aligning neurons needs scipy: pip install 'moe-fast[align]'", name=error.name
        ) from None
    found: Orders = {}
    with OpenFiles() as files:
        for layer in model.layers:
            check_layer(model, layer)
            orders = found.setdefault(layer.key, {})
            for group in groups[layer.key]:
                for other in group.experts[1:]:
                    first, second = layer.experts[group.first], layer.experts[other]
                    _, order = linear_sum_assignment(products(first, second, files), maximize=True)
                    orders[other] = np.asarray(order, "<u4").tobytes()
    return found


def check_layer(model: MoeModel, layer: MoeLayer) -> None:
    expert = layer.experts[0]
    for tensor in expert.values():
        if not set(expert) <= set(FFN):
            raise CheckpointError(
                f"holds matrices that are not gate_proj, up_proj and down_proj by rows, whose "
                f"neurons align does not find in a {model.model_type}",
                file=tensor.file.path,
                tensor=tensor.name,
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"is {tensor.dtype}; {', '.join(WEIGHT_DTYPES)} can be aligned (convert --dtype "
                "makes them)",
                file=tensor.file.path,
                tensor=tensor.name,
            )


def products(first: Expert, second: Expert, files: OpenFiles) -> npt.NDArray[np.float32]:
    """How alike each two neurons of two experts are, `(I, I)`."""
    total: Any = 0
    for role in first:
        left, right = (read_matrix(expert[role], files) for expert in (first, second))
        total = total + (matmul(left.T, right) if role == "down_proj" else matmul(left, right.T))
    matrix: npt.NDArray[np.float32] = total
    return np.nan_to_num(matrix, copy=False)


def read_matrix(tensor: Tensor, files: OpenFiles) -> npt.NDArray[np.float32]:
    data = files.read(tensor.file, tensor.offset, tensor.nbytes)
    return decode(data, tensor.dtype).reshape(tensor.shape)


def stored_orders(orders: Orders) -> dict[str, dict[str, str]]:
    """Orders as a manifest keeps them: base64 of numbers of 32 bits, the lowest byte first."""
    return {
        layer: {str(e): base64.b64encode(order).decode() for e, order in experts.items()}
        for layer, experts in orders.items()
    }


def read_orders(stored: Any, model: MoeModel, groups: Mapping[str, Sequence[Group]]) -> Orders:
    """The orders that a manifest keeps; whoever wrote it may have written anything.

    Raises
    ------
    CheckpointError
        What is no order of an expert's neurons.
    """
    found: Orders = {}
    for layer in model.layers:
        check_layer(model, layer)
        width = layer.experts[0]["down_proj"].shape[1]
        kept = stored.get(layer.key) if isinstance(stored, Mapping) else None
        orders = found.setdefault(layer.key, {})
        for group in groups[layer.key]:
            for expert in group.experts[1:]:
                text = kept.get(str(expert)) if isinstance(kept, Mapping) else None
                order = as_order(text, width)
                if order is None:
                    raise CheckpointError(
                        f"decisions.orders: layer {layer.key}, expert {expert}: must be an order "
                        f"of {width} neurons, got {brief(text)}"
                    )
                orders[expert] = order
    return found


def as_order(text: Any, width: int) -> bytes | None:
    """The bytes of an order, or `None` for what is none."""
    if not isinstance(text, str):
        return None
    try:
        order = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if len(order) != 4 * width:
        return None
    numbers = np.frombuffer(order, "<u4")
    return order if np.array_equal(np.sort(numbers), np.arange(width)) else None
