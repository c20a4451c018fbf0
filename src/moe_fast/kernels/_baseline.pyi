"""The kernels as mypy sees them, the same at every SIMD level."""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result", covariant=True)

_Bytes = npt.NDArray[np.uint8]
_Index32 = npt.NDArray[np.int32]
_Index64 = npt.NDArray[np.int64]
_Half = npt.NDArray[np.uint16]  # the bits of a float16 or a bfloat16
_Words = npt.NDArray[np.uint32]  # the bits of a float32
_Bits = npt.NDArray[Any]  # `_Half` or `_Words`
_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]
_Real = npt.NDArray[np.float32] | npt.NDArray[np.float64]

class _Fused(Generic[_Arguments, _Result]):
    """A kernel of several dtypes: `kernel["float"]` is that of one."""

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result: ...
    def __getitem__(self, dtype: str, /) -> Callable[_Arguments, _Result]: ...

def _fused(kernel: Callable[_Arguments, _Result]) -> _Fused[_Arguments, _Result]: ...

# counting.pxi
def count(values: _Index64, tables: npt.NDArray[np.uint64]) -> int: ...
def coefficient_of_variation(counts: npt.NDArray[np.uint64]) -> float: ...
def load_balance(models: _Index64) -> float: ...

# low_rank.pxi
def add_product(left: _Float32, right: _Float32, scale: float, out: _Float32) -> None: ...

# moments.pxi
def sum_deviations(values: _Float32, mean: float, squared: bool) -> float: ...

# columns.pxi
@_fused
def take_columns(matrix: _Bits, columns: npt.NDArray[np.intp], out: _Bits) -> None: ...
@_fused
def put_columns(values: _Bits, columns: npt.NDArray[np.intp], matrix: _Bits) -> None: ...

# generator.pxi
def fill_float64(
    out: _Float64,
    begin: int,
    end: int,
    num_rows: int,
    row_length: int,
    seed: int,
    first: int,
    to_layer: int,
    to_row: int,
    to_column: int,
    full_range: bool,
    base: float,
    scale: float,
    stream: bool,
) -> None: ...
def fill_float32(
    out: _Float32,
    begin: int,
    end: int,
    num_rows: int,
    row_length: int,
    seed: int,
    first: int,
    to_layer: int,
    to_row: int,
    to_column: int,
    full_range: bool,
    base: float,
    scale: float,
    stream: bool,
) -> None: ...
def fill_float16(
    out: _Half,
    begin: int,
    end: int,
    num_rows: int,
    row_length: int,
    seed: int,
    first: int,
    to_layer: int,
    to_row: int,
    to_column: int,
    full_range: bool,
    base: float,
    scale: float,
    stream: bool,
) -> None: ...
def fill_bfloat16(
    out: _Half,
    begin: int,
    end: int,
    num_rows: int,
    row_length: int,
    seed: int,
    first: int,
    to_layer: int,
    to_row: int,
    to_column: int,
    full_range: bool,
    base: float,
    scale: float,
    stream: bool,
) -> None: ...

# normal.pxi
def fill_normal(
    out: _Float32, begin: int, end: int, seed: int, first: int, scale: float
) -> None: ...

# Kernels that read logits return the first row with a NaN, or -1.
# routing/token_choice.pxi
@_fused
def route_tokens(
    logits: _Bytes,
    encoding: int,
    bias: _Real | None,
    is_sigmoid: bool,
    norm_topk_prob: bool,
    by_score: bool,
    n_group: int,
    topk_group: int,
    experts_per_group_score: int,
    routed_scaling_factor: float,
    expert_indices: _Index32,
    weights: _Real,
    tokens_per_expert: _Index64,
    start: int,
    stop: int,
) -> int: ...

# routing/next_token.pxi
def route_next_token(
    logits: npt.ArrayLike,
    expert_indices: _Index32,
    weights: _Real,
    tokens_per_expert: _Index64,
    asked: tuple[object, ...],
    asked_before: tuple[object, ...],
    is_sigmoid: bool,
    norm_topk_prob: bool,
    by_score: bool,
    n_group: int,
    topk_group: int,
    experts_per_group_score: int,
    routed_scaling_factor: float,
    num_experts: int,
    num_experts_per_tok: int,
) -> int | None: ...

# routing/counting_sort.pxi
def sort_by_expert(
    expert_indices: _Index32, tokens_per_expert: _Index64, offsets: _Index64, permutation: _Index32
) -> None: ...

# routing/capacity.pxi
@_fused
def drop_by_position(
    expert_indices: _Index32, weights: _Real, capacity: int, kept: _Index64
) -> int: ...
@_fused
def drop_by_probability(
    expert_indices: _Index32,
    weights: _Real,
    capacity: int,
    offsets: _Index64,
    permutation: _Index32,
    fullest: int,
    kept: _Index64,
) -> int: ...

# routing/expert_choice.pxi
@_fused
def sample_thresholds(
    logits: _Bytes,
    encoding: int,
    is_sigmoid: bool,
    sample_size: int,
    rank: int,
    bounds: _Real,
) -> None: ...
@_fused
def collect_candidates(
    logits: _Bytes,
    encoding: int,
    num_experts: int,
    is_sigmoid: bool,
    first: int,
    bounds: _Real,
    found: _Index32,
    value: _Real,
    count: _Index64,
    start: int,
    stop: int,
) -> int: ...
@_fused
def select_candidates(
    bounds: _Real,
    found: _Index32,
    value: _Real,
    count: _Index64,
    token_indices: _Index32,
    weights: _Real,
    start: int,
    stop: int,
) -> None: ...

# routing/statistics.pxi
@_fused
def add_statistics(
    logits: _Bytes,
    encoding: int,
    num_experts: int,
    is_sigmoid: bool,
    probability: _Float64,
    totals: _Float64,
    probabilities: _Real | None,
    log_sums: _Float64 | None,
    start: int,
    stop: int,
) -> int: ...
@_fused
def add_weights(
    expert_indices: _Index32, weights: _Real, scale: float, importance: _Float64
) -> None: ...

# routing/gradients.pxi
@_fused
def pull_back_sigmoid(
    logits: _Bytes, encoding: int, normalised: bool, gradient: _Real, start: int, stop: int
) -> None: ...
@_fused
def pull_back_weights(
    logits: _Bytes,
    encoding: int,
    is_sigmoid: bool,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    expert_indices: _Index32,
    of_weights: _Real,
    add: bool,
    gradient: _Real,
    start: int,
    stop: int,
) -> None: ...
@_fused
def pull_back_softmax(
    logits: _Bytes,
    encoding: int,
    probabilities: _Real | None,
    log_sums: _Float64 | None,
    of_mean: _Real | None,
    of_square: float,
    expert_indices: _Index32 | None,
    of_weights: _Real | None,
    routed_scaling_factor: float,
    gradient: _Real,
    start: int,
    stop: int,
) -> None: ...

# conversion.pxi
def float32_to_bfloat16(values: _Words, out: _Half) -> int: ...
def float32_to_float16(values: _Words, out: _Half) -> int: ...
def bfloat16_to_float16(values: _Half, out: _Half) -> int: ...
def float16_to_bfloat16(values: _Half, out: _Half) -> int: ...
def float16_to_float32(values: _Half, out: _Words) -> int: ...
def scale_bfloat16(values: _Half, factor: float, out: _Half) -> int: ...
def scale_float16(values: _Half, factor: float, out: _Half) -> int: ...
def bfloat16_to_float32(values: _Half, out: _Words) -> int: ...
