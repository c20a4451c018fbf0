"""Router weights to start from, bit for bit the reference's."""

from __future__ import annotations

import math
import reprlib
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.checks import as_index, as_member
from moe_fast.config import RouterInit, RouterInitName
from moe_fast.dtypes import as_dtype, kernel_name, wrong_dtype
from moe_fast.errors import ArgumentTypeError, MoeConfigError
from moe_fast.threads import as_threads, share

__all__ = ["compute_gate_weights", "compute_router_weights"]
LARGEST_INDEX = 2**63 - 1
# The stream repeats after this many draws, so positions in it are taken modulo this.
PERIOD = 2**64
# Waking a thread takes about as long as drawing a quarter of this.
VALUES_PER_THREAD = 2**17
# Above this a result would not stay in the caches: the size of a large last-level one.
STREAMED_BYTES = 2**25
ALIGNMENT = 64
# First state, spread of the draws, and whether they surround 1 / num_experts or 0.
DRAWS = {
    RouterInit.RANDOM: (0x5DEECE66D1A4F681, 1.0, False),
    RouterInit.BALANCED: (0xCAFEBABEDEADBEEF, 0.01, True),
    RouterInit.UNIFORM: (0, 0.0, True),
}


def compute_gate_weights(
    hidden_dim: int,
    num_experts: int,
    init: RouterInit | RouterInitName = RouterInit.BALANCED,
    *,
    dtype: npt.DTypeLike | None = None,
    layer: int = 0,
    rows: tuple[int, int] | None = None,
    out: npt.NDArray[Any] | None = None,
    threads: int | None = None,
    full_range: bool = False,
    remove_base: bool = False,
    transpose: bool = False,
) -> npt.NDArray[Any]:
    """Compute the initial router weights of one layer, shape `(hidden_dim, num_experts)`.

    They equal those of the reference library, bit for bit (`docs/router-weights.md`).

    Parameters
    ----------
    hidden_dim, num_experts : int
        Width of the router's input and number of its outputs. Where one is 0, so is the result.
    init : RouterInit or str
        `"random"`: draws in `[-scale, 0]`, `scale = 1 / sqrt(hidden_dim)`. `"balanced"`:
        `1 / num_experts` plus draws in `[-p, 0]`, `p = 0.01 / sqrt(hidden_dim)`. `"uniform"`:
        `1 / num_experts` everywhere.
    dtype : dtype, optional
        float64, float32, float16 or bfloat16 (`ml_dtypes.bfloat16` or `"bfloat16"`): the float64
        value rounded once, to nearest, ties to even. By default that of `out`, or float64.
    layer : int
        The number of the layer, from 0. Layers take consecutive parts of one stream of draws; the
        reference library has only layer 0.
    rows : (int, int), optional
        `(start, stop)`: compute only `result[start:stop]`.
    out : ndarray, optional
        The array to write to and return: C-contiguous, writable, of the result's shape and dtype.
    threads : int, optional
        By default `MOE_FAST_NUM_THREADS`, or 1. The result does not depend on it.
    full_range : bool
        Draw from `[-scale, scale]` or `[-p, p]`, of which the reference fills the lower half.
    remove_base : bool
        Leave out the constant `1 / num_experts`, which does not change a softmax over the experts.
    transpose : bool
        Return the shape `(num_experts, hidden_dim)`, as checkpoints store it.

    Returns
    -------
    ndarray of `dtype`, shape (hidden_dim, num_experts)
        With `transpose`, (num_experts, hidden_dim); with `rows`, `stop - start` rows of it.

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range, or `out` does not fit.
    ImportError
        If the dtype is `"bfloat16"` and `ml_dtypes` is not installed.
    MemoryError
        If the result does not fit into memory.

    Examples
    --------
    >>> from moe_fast import compute_gate_weights
    >>> weights = compute_gate_weights(4096, 8)
    >>> weights.shape, weights.dtype
    ((4096, 8), dtype('float64'))
    >>> shard = compute_gate_weights(4096, 8, rows=(1024, 2048))
    >>> bool((shard == weights[1024:2048]).all())
    True
    """
    return draw_routers(
        (), hidden_dim, num_experts, init, dtype, layer, rows, out, threads, full_range,
        remove_base, transpose,
    )  # fmt: skip


def compute_router_weights(
    num_layers: int,
    hidden_size: int,
    num_experts: int,
    init: RouterInit | RouterInitName = RouterInit.BALANCED,
    *,
    dtype: npt.DTypeLike | None = None,
    layer: int = 0,
    rows: tuple[int, int] | None = None,
    out: npt.NDArray[Any] | None = None,
    threads: int | None = None,
    full_range: bool = False,
    remove_base: bool = False,
    transpose: bool = False,
) -> npt.NDArray[Any]:
    """Compute the initial router weights of several layers, stacked along a new first axis.

    `result[i]` is `compute_gate_weights(..., layer=layer + i)`, for `i` from 0 to `num_layers - 1`.
    `hidden_size` is its `hidden_dim`; the other arguments and errors are the same.

    Returns
    -------
    ndarray of `dtype`, shape (num_layers, hidden_size, num_experts)
        With `transpose`, (num_layers, num_experts, hidden_size).

    Examples
    --------
    >>> from moe_fast import compute_gate_weights, compute_router_weights
    >>> routers = compute_router_weights(32, 4096, 8, dtype="float32", transpose=True)
    >>> routers.shape
    (32, 8, 4096)
    >>> last = compute_gate_weights(4096, 8, dtype="float32", transpose=True, layer=31)
    >>> bool((routers[31] == last).all())
    True
    """
    layers = (as_index(num_layers, "num_layers"),)
    return draw_routers(
        layers, hidden_size, num_experts, init, dtype, layer, rows, out, threads, full_range,
        remove_base, transpose,
    )  # fmt: skip


def draw_routers(
    layers: tuple[int, ...],
    hidden_size: int,
    num_experts: int,
    init: RouterInit | RouterInitName,
    dtype: npt.DTypeLike | None,
    layer: int,
    rows: tuple[int, int] | None,
    out: npt.NDArray[Any] | None,
    threads: int | None,
    full_range: bool,
    remove_base: bool,
    transpose: bool,
) -> npt.NDArray[Any]:
    """Router weights of shape `layers` followed by one layer's; from `layer` on."""
    what = layers, hidden_size, num_experts, init, layer, full_range, remove_base, transpose
    threads = as_threads(threads)
    try:
        draws = plan_draws_once(*what) if rows is None else plan_draws(*what, rows)
    except TypeError:  # An argument that cannot be hashed, or that `plan_draws` finds wrong.
        draws = plan_draws(*what, rows)
    out = as_output(out, draws.shape, dtype)
    if not kernel_name(out.dtype):
        raise wrong_dtype("out.dtype", out.dtype)
    fill(out, out.dtype.name, draws, threads)
    return out


def draw_router_bits(
    hidden_size: int, num_experts: int, init: RouterInit, dtype: str, layer: int, remove_base: bool
) -> npt.NDArray[Any]:
    """The bits of one layer's router as a checkpoint stores it, `(num_experts, hidden_size)`.

    bfloat16 takes no `ml_dtypes` here: its bits come as unsigned integers.
    """
    draws = plan_draws((), hidden_size, num_experts, init, layer, False, remove_base, True)
    bits = np.empty(draws.shape, np.uint16 if dtype.endswith("16") else dtype)
    fill(bits, dtype, draws, threads=1)
    return bits


def fill(out: npt.NDArray[Any], dtype: str, draws: Draws, threads: int) -> None:
    """Write what `draws` says into `out`, numbers of this dtype."""
    if out.size == 0:
        return
    streamed = out.nbytes > STREAMED_BYTES
    flat = (out if out.itemsize > 2 else out.view(np.uint16)).reshape(-1)
    kernel = getattr(kernels.compiled, f"fill_{dtype}")
    if draws.same:
        kernel(flat, 0, 1, *draws.arguments, streamed)
        flat.fill(flat[0])
    elif threads == 1:
        kernel(flat, 0, flat.size, *draws.arguments, streamed)
    else:
        work = partial(fill_range, kernel, flat, (*draws.arguments, streamed))
        share(work, flat.size, threads, grain=VALUES_PER_THREAD)


class Draws(NamedTuple):
    """What a call draws: the shape, whether every value is the same, and the kernel's arguments."""

    shape: tuple[int, ...]
    same: bool
    arguments: tuple[Any, ...]


def plan_draws(
    layers: tuple[int, ...],
    hidden_size: int,
    num_experts: int,
    init: RouterInit | RouterInitName,
    layer: int,
    full_range: bool,
    remove_base: bool,
    transpose: bool,
    rows: tuple[int, int] | None = None,
) -> Draws:
    """Check the arguments, and say what to draw."""
    # One layer is compute_gate_weights, whose arguments have the reference's names.
    name = "hidden_size" if layers else "hidden_dim"
    hidden_size = as_index(hidden_size, name, maximum=LARGEST_INDEX)
    num_experts = as_index(num_experts, "num_experts", maximum=LARGEST_INDEX)
    layer = as_index(layer, "layer")
    seed, spread, has_base = DRAWS[as_member(init, RouterInit, "init")]
    size, row_length = (num_experts, hidden_size) if transpose else (hidden_size, num_experts)
    start, stop = (0, size) if rows is None else check_rows(rows, size)
    num_rows = stop - start
    shape = (*layers, num_rows, row_length)
    if not math.prod(shape):
        return Draws(shape, False, ())

    # Draws from one layer, row and column to the next, and to the first of all.
    to_layer = hidden_size * num_experts
    to_row, to_column = (1, num_experts) if transpose else (num_experts, 1)
    first = layer * to_layer + start * to_row
    if not transpose:  # Rows follow one another in the stream: they are one long row.
        num_rows, row_length = 1, num_rows * row_length
    if row_length == to_layer:  # And so do layers.
        row_length = math.prod(shape)
    base = 1.0 / num_experts if has_base and not remove_base else 0.0
    scale = spread / math.sqrt(hidden_size)
    arguments = (
        num_rows, row_length, seed, first % PERIOD, to_layer % PERIOD, to_row % PERIOD, to_column,
        full_range, base, scale,
    )  # fmt: skip
    return Draws(shape, not spread, arguments)


# 1 and True are equal, and only one of them is an integer here.
plan_draws_once = lru_cache(maxsize=256, typed=True)(plan_draws)


def fill_range(fill: Any, flat: Any, draws: tuple[Any, ...], begin: int, end: int) -> None:
    fill(flat, begin, end, *draws)


def check_rows(rows: Any, size: int) -> tuple[int, int]:
    """The argument `rows` as `(start, stop)` within `range(size)`."""
    try:
        start, stop = rows
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"must be a pair (start, stop), got {reprlib.repr(rows)}", argument="rows"
        ) from None
    start, stop = as_index(start, "rows[0]"), as_index(stop, "rows[1]")
    if not start <= stop <= size:
        raise MoeConfigError(
            f"must be (start, stop) with start <= stop <= {size}, got {(start, stop)}",
            argument="rows",
        )
    return start, stop


def as_output(
    out: npt.NDArray[Any] | None, shape: tuple[int, ...], dtype: npt.DTypeLike | None
) -> npt.NDArray[Any]:
    """The argument `out`, checked, or a new array."""
    if out is None:
        return allocate_aligned(shape, as_dtype(dtype))
    if not isinstance(out, np.ndarray):
        raise ArgumentTypeError(f"must be a NumPy array, got {type(out).__name__}", argument="out")
    wanted = out.dtype if dtype is None else as_dtype(dtype)
    if out.shape != shape or out.dtype != wanted:
        raise MoeConfigError(
            f"must have the shape {shape} and dtype {wanted}, got {out.shape} and {out.dtype}",
            argument="out",
        )
    if not out.flags.carray:
        raise MoeConfigError("must be C-contiguous, aligned, writable", argument="out")
    return out


def allocate_aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A new array whose address JAX takes without a copy: a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    try:
        memory = np.empty(size + ALIGNMENT, np.uint8)
        begin = -memory.__array_interface__["data"][0] % ALIGNMENT
        return memory[begin : begin + size].view(dtype).reshape(shape)
    except (MemoryError, OverflowError, ValueError):
        raise MemoryError(f"no memory for weights of shape {shape} and {dtype}") from None
