"""Which dense model and layer every expert comes from, and how evenly the models are used."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.checks import as_index, as_member
from moe_fast.config import MoeConfig, RouterInit, RouterInitName
from moe_fast.errors import ArgumentTypeError, MoeConfigError
from moe_fast.plain import check_keys
from moe_fast.records import dataclass
from moe_fast.reports import Report, pandas_frame
from moe_fast.wording import brief_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = [
    "Assignments",
    "ExpertAssignment",
    "LayerAssignments",
    "MoeConstructionPlan",
    "MoeReport",
    "compute_expert_load_balance",
    "plan_moe_construction",
]

LARGEST_INDEX = 2**63 - 1
# A table of more than 2**27 numbers of 8 bytes, 1 GiB, is refused before it is asked for: where
# memory is overcommitted, asking succeeds and filling ends the process.
LARGEST_TABLE = 2**27
# Beyond this many, `MoeReport.unused_models` stays a `range` and costs nothing.
LONGEST_TUPLE = 2**20
# What the counting kernel takes, where values are many more than models.
TABLES = 8


class ExpertAssignment(NamedTuple):
    """The origin of the weights of one expert: a tuple of three numbers, counted from 0.

    Attributes
    ----------
    expert_index : int
        The expert in its layer.
    source_model : int
        The model that it comes from.
    source_layer : int
        The layer of that model.
    """

    expert_index: int
    source_model: int
    source_layer: int


class LayerAssignments(Sequence[ExpertAssignment]):
    """The assignments of one layer, made from the plan's arrays when asked for."""

    __slots__ = ("_expert_index", "_source_layer", "_source_model")
    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have no hash

    def __init__(
        self,
        source_model: npt.NDArray[np.int64],
        source_layer: npt.NDArray[np.int64],
        expert_index: range,
    ) -> None:
        self._source_model = source_model
        self._source_layer = source_layer
        self._expert_index = expert_index

    @property
    def source_model(self) -> npt.NDArray[np.int64]:
        """Read-only int64 array of shape `(num_experts,)`."""
        return self._source_model

    @property
    def source_layer(self) -> npt.NDArray[np.int64]:
        """Read-only int64 array of shape `(num_experts,)`."""
        return self._source_layer

    def __len__(self) -> int:
        return len(self._expert_index)

    @overload
    def __getitem__(self, key: SupportsIndex) -> ExpertAssignment: ...
    @overload
    def __getitem__(self, key: slice) -> LayerAssignments: ...
    def __getitem__(self, key: SupportsIndex | slice) -> ExpertAssignment | LayerAssignments:
        if isinstance(key, slice):
            return LayerAssignments(
                self._source_model[key], self._source_layer[key], self._expert_index[key]
            )
        place = position(key, len(self), "expert")
        return ExpertAssignment(
            self._expert_index[place],
            int(self._source_model[place]),
            int(self._source_layer[place]),
        )

    def __iter__(self) -> Iterator[ExpertAssignment]:
        models, layers = self._source_model.tolist(), self._source_layer.tolist()
        return map(ExpertAssignment, self._expert_index, models, layers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LayerAssignments):
            return (
                self._expert_index == other._expert_index
                and arrays_equal(self._source_model, other._source_model)
                and arrays_equal(self._source_layer, other._source_layer)
            )
        if not isinstance(other, Sequence):
            return NotImplemented
        return items_equal(self, other)

    def __reduce__(self) -> tuple[Any, ...]:
        packed = *pack(self._source_model), *pack(self._source_layer)
        return restore_layer, (*packed, self._expert_index)

    def __repr__(self) -> str:
        return shortened(self)


class Assignments(Sequence[LayerAssignments]):
    """`assignments[layer][expert]` over two arrays of shape `(num_layers, num_experts)`."""

    __slots__ = ("_source_layer", "_source_model")
    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have no hash

    def __init__(
        self, source_model: npt.NDArray[np.int64], source_layer: npt.NDArray[np.int64]
    ) -> None:
        self._source_model = source_model
        self._source_layer = source_layer

    @property
    def source_model(self) -> npt.NDArray[np.int64]:
        """Read-only int64 array of shape `(num_layers, num_experts)`."""
        return self._source_model

    @property
    def source_layer(self) -> npt.NDArray[np.int64]:
        """Read-only int64 array of shape `(num_layers, num_experts)`."""
        return self._source_layer

    def __len__(self) -> int:
        return len(self._source_model)

    @overload
    def __getitem__(self, key: SupportsIndex) -> LayerAssignments: ...
    @overload
    def __getitem__(self, key: slice) -> Assignments: ...
    def __getitem__(self, key: SupportsIndex | slice) -> LayerAssignments | Assignments:
        if isinstance(key, slice):
            return Assignments(self._source_model[key], self._source_layer[key])
        layer = position(key, len(self), "layer")
        models = self._source_model[layer]
        return LayerAssignments(models, self._source_layer[layer], range(len(models)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Assignments):
            return arrays_equal(self._source_model, other._source_model) and arrays_equal(
                self._source_layer, other._source_layer
            )
        if not isinstance(other, Sequence):
            return NotImplemented
        return items_equal(self, other)

    def __reduce__(self) -> tuple[Any, ...]:
        return restore_assignments, (*pack(self._source_model), *pack(self._source_layer))

    def __repr__(self) -> str:
        return shortened(self)


def position(key: SupportsIndex, length: int, what: str) -> int:
    """Where `key`, negative ones counted from the end, lies in a sequence of `length`."""
    try:
        index = operator.index(key)
    except TypeError:
        raise ArgumentTypeError(
            f"must be an integer or a slice, got {type(key).__name__}", argument=what
        ) from None
    if not -length <= index < length:
        raise IndexError(f"{what} {brief_number(index)} is out of range: there are {length}")
    return index % length


def items_equal(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(map(operator.eq, left, right))


def shortened(items: Sequence[Any]) -> str:
    if len(items) <= 3:
        return "[" + ", ".join(map(repr, items)) + "]"
    return f"[{items[0]!r}, {items[1]!r}, ... {len(items)} in all]"


@dataclass(frozen=True)
class MoeReport(Report):
    """Summary of a plan.

    Attributes
    ----------
    num_experts, num_layers : int
        Experts per layer, and layers.
    load_balance : float
        How evenly the source models are used: the coefficient of variation of the number of
        experts taken from each; 0.0 is even.
    total_params_estimate : int
        Parameters of all experts and routers, exact however large.
    unused_models : sequence of int
        The source models that no expert comes from, in order: a tuple, or a `range` if they are
        more than a million.
    """

    num_experts: int
    num_layers: int
    load_balance: float
    total_params_estimate: int
    unused_models: Sequence[int] = ()


class MoeConstructionPlan:
    """The source model and layer of each expert of each layer.

    Parameters
    ----------
    source_model, source_layer : array_like of int, shape (num_layers, num_experts)
        Kept as read-only int64 arrays of these names.
    num_models : int, optional
        Number of source models; by default the largest index used plus one.
    router_init : RouterInit or str
        How the routers are initialised.

    Attributes
    ----------
    assignments : Assignments
        `assignments[layer][expert]` is an `ExpertAssignment`, created on access.

    Raises
    ------
    TypeError, MoeConfigError
        If the arrays are not integers, not two-dimensional, of different shapes or negative, or
        `num_models` is too small for `source_model`.

    Examples
    --------
    >>> from moe_fast import MoeConstructionPlan
    >>> plan = MoeConstructionPlan([[0, 1, 1]], [[0, 0, 0]])
    >>> plan.assignments[0][2]
    ExpertAssignment(expert_index=2, source_model=1, source_layer=0)
    """

    __slots__ = ("_num_models", "_router_init", "_source_layer", "_source_model")
    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def __init__(
        self,
        source_model: npt.ArrayLike,
        source_layer: npt.ArrayLike,
        *,
        num_models: SupportsIndex | None = None,
        router_init: RouterInit | RouterInitName = RouterInit.BALANCED,
    ) -> None:
        models = index_array(source_model, "source_model")
        layers = index_array(source_layer, "source_layer")
        if models.ndim != 2 or models.shape != layers.shape:
            raise MoeConfigError(
                "source_model and source_layer must both have the shape (num_layers, num_experts),"
                f" got {models.shape} and {layers.shape}"
            )
        used = int(distinct(models).max(initial=-1)) + 1
        if num_models is None:
            num_models = used
        self._num_models = as_index(num_models, "num_models", maximum=LARGEST_INDEX)
        if used > self._num_models:
            raise MoeConfigError(
                f"holds {used - 1}, but num_models is {self._num_models}", argument="source_model"
            )
        self._router_init = as_member(router_init, RouterInit, "router_init")
        self._source_model = models
        self._source_layer = layers

    @property
    def num_models(self) -> int:
        """Number of source models."""
        return self._num_models

    @property
    def router_init(self) -> RouterInit:
        """How the routers are initialised."""
        return self._router_init

    @property
    def source_model(self) -> npt.NDArray[np.int64]:
        """Read-only int64 array of shape `(num_layers, num_experts)`."""
        return self._source_model

    @property
    def source_layer(self) -> npt.NDArray[np.int64]:
        """Read-only int64 array of shape `(num_layers, num_experts)`."""
        return self._source_layer

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self._source_model)

    @property
    def num_experts(self) -> int:
        """Number of experts in each layer."""
        return int(self._source_model.shape[1])

    @property
    def assignments(self) -> Assignments:
        """`assignments[layer][expert]`, like nested sequences of `ExpertAssignment`."""
        return Assignments(self._source_model, self._source_layer)

    def report(
        self,
        hidden_dim: SupportsIndex,
        intermediate_dim: SupportsIndex,
        num_experts: SupportsIndex,
        *,
        granularity: SupportsIndex = 1,
    ) -> MoeReport:
        """Summarise the plan for experts of the given sizes.

        Each expert counts `3 * hidden_dim * intermediate_dim / granularity` parameters (gate, up
        and down projections), each router `hidden_dim * num_experts`, in every layer.

        Raises
        ------
        TypeError, MoeConfigError
            If an argument is not an integer or is negative, or `intermediate_dim` is not a
            multiple of `granularity`.

        Examples
        --------
        >>> from moe_fast import plan_moe_construction
        >>> plan_moe_construction(4, 32).report(4096, 11008, 8).total_params_estimate
        34629222400
        """
        hidden_dim = as_index(hidden_dim, "hidden_dim")
        intermediate_dim = as_index(intermediate_dim, "intermediate_dim")
        num_experts = as_index(num_experts, "num_experts")
        granularity = as_index(granularity, "granularity", minimum=1)
        if intermediate_dim % granularity:
            raise MoeConfigError(
                f"({intermediate_dim}) must be a multiple of granularity ({granularity})",
                argument="intermediate_dim",
            )
        width = intermediate_dim // granularity
        per_layer = num_experts * 3 * hidden_dim * width + hidden_dim * num_experts
        return MoeReport(
            num_experts=num_experts,
            num_layers=self.num_layers,
            load_balance=compute_expert_load_balance(self),
            total_params_estimate=per_layer * self.num_layers,
            unused_models=self._unused_models(),
        )

    def _unused_models(self) -> Sequence[int]:
        models = np.sort(distinct(self._source_model), axis=None)
        used = models[np.diff(models, prepend=-1) > 0]  # np.unique would import numpy.ma
        end = int(used.max(initial=-1)) + 1
        gaps = np.setdiff1d(np.arange(end), used, assume_unique=True)
        # Round robin leaves a tail, and a range holds a tail of any length.
        tail = range(end, self._num_models)
        if not gaps.size and self._num_models - end > LONGEST_TUPLE:
            return tail
        return (*gaps.tolist(), *tail)

    def plot(self, ax: Axes | None = None, *, labels: Sequence[str] | None = None) -> Axes:
        """Draw the source model of each expert of each layer, as `moe_fast.plot_plan` does."""
        from moe_fast.drawing.plotting import plot_plan

        return plot_plan(self, ax, labels=labels)

    def to_frame(self) -> DataFrame:
        """Return the assignments as a pandas data frame, one row per expert of a layer.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        layer, expert = np.indices(self._source_model.shape)
        return pandas_frame(
            {
                "layer": layer.reshape(-1),
                "expert": expert.reshape(-1),
                "source_model": self._source_model.reshape(-1),
                "source_layer": self._source_layer.reshape(-1),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values that JSON can hold.

        Examples
        --------
        >>> from moe_fast import MoeConstructionPlan
        >>> plan = MoeConstructionPlan([[0, 1]], [[0, 0]])
        >>> plan.to_dict()["source_model"]
        [[0, 1]]
        >>> MoeConstructionPlan.from_dict(plan.to_dict()) == plan
        True
        """
        return {
            "num_models": self._num_models,
            "router_init": str(self._router_init),
            "source_model": self._source_model.tolist(),
            "source_layer": self._source_layer.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeConstructionPlan:
        """Create a plan from the result of `to_dict`.

        Raises
        ------
        TypeError, MoeConfigError
            If a key is missing or unknown, or the values are not those of a plan.
        """
        required = ("source_model", "source_layer")
        check_keys(values, (*required, "num_models", "router_init"), required, cls.__name__)
        return cls(**values)

    def _repr_html_(self) -> str:
        from moe_fast.drawing.html import plan_picture

        return (
            f"<p>{self.num_layers:,} layers of {self.num_experts:,} experts from "
            f"{self.num_models:,} models, routers start {self.router_init}</p>{plan_picture(self)}"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MoeConstructionPlan):
            return NotImplemented
        return (
            self.num_models == other.num_models
            and self.router_init == other.router_init
            and self.assignments == other.assignments
        )

    def __reduce__(self) -> tuple[Any, ...]:
        packed = *pack(self._source_model), *pack(self._source_layer)
        return restore_plan, (*packed, self._num_models, str(self._router_init))

    def __repr__(self) -> str:
        return (
            f"MoeConstructionPlan(num_models={self.num_models}, num_layers={self.num_layers}, "
            f"num_experts={self.num_experts}, router_init={str(self.router_init)!r})"
        )


# Layers mostly repeat one row and experts one column. Such an array is a view with a stride of 0:
# it costs the memory, the time and the pickled bytes of what differs, not of its shape.

Shape = tuple[int, ...]


def distinct(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`array` without the repetitions that its strides of 0 make."""
    return array[tuple(slice(1) if stride == 0 else slice(None) for stride in array.strides)]


def arrays_equal(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> bool:
    if left.shape != right.shape:
        return False
    fewer_left, fewer_right = distinct(left), distinct(right)
    if fewer_left.shape == fewer_right.shape:
        return np.array_equal(fewer_left, fewer_right)
    return np.array_equal(left, right)


def pack(array: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], Shape]:
    return distinct(array), array.shape


def repeated(array: npt.NDArray[np.int64], shape: Shape) -> npt.NDArray[np.int64]:
    """`array` repeated to `shape`. Both become read-only: a view could be made writable again."""
    array.flags.writeable = False
    return np.broadcast_to(array, shape)


def restore_layer(
    models: npt.NDArray[np.int64],
    models_shape: Shape,
    layers: npt.NDArray[np.int64],
    layers_shape: Shape,
    expert_index: range,
) -> LayerAssignments:
    return LayerAssignments(
        repeated(models, models_shape), repeated(layers, layers_shape), expert_index
    )


def restore_assignments(
    models: npt.NDArray[np.int64],
    models_shape: Shape,
    layers: npt.NDArray[np.int64],
    layers_shape: Shape,
) -> Assignments:
    return Assignments(repeated(models, models_shape), repeated(layers, layers_shape))


def restore_plan(
    models: npt.NDArray[np.int64],
    models_shape: Shape,
    layers: npt.NDArray[np.int64],
    layers_shape: Shape,
    num_models: int,
    router_init: RouterInitName,
) -> MoeConstructionPlan:
    return MoeConstructionPlan(
        repeated(models, models_shape),
        repeated(layers, layers_shape),
        num_models=num_models,
        router_init=router_init,
    )


def index_array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    """`values` as a read-only int64 array of indices; never a view of memory others may write."""
    try:
        array = np.asarray(values)
    except ValueError:  # what NumPy says of rows of different lengths does not say which argument
        raise MoeConfigError("must have rows of one length", argument=name) from None
    shape, array = array.shape, np.array(distinct(array))
    if array.dtype.kind == "O":  # integers beyond 64 bits, or no integers at all
        for value in array.flat:
            as_index(value, name, maximum=LARGEST_INDEX)
    elif array.size and array.dtype.kind not in "iu":  # an empty list is an array of floats
        raise ArgumentTypeError(f"must hold integers, got an array of {array.dtype}", argument=name)
    elif array.size:
        as_index(array.min(), name)
        as_index(array.max(), name, maximum=LARGEST_INDEX)
    return repeated(array.astype(np.int64, copy=False), shape)


def plan_moe_construction(
    num_models: SupportsIndex,
    num_layers: SupportsIndex,
    config: MoeConfig | None = None,
    *,
    granularity: SupportsIndex = 1,
) -> MoeConstructionPlan:
    """Assign source models to experts, round robin.

    Expert `e` of layer `l` comes from layer `l` of model `e % num_models`; all layers are alike.

    Parameters
    ----------
    num_models, num_layers : int
        At least 1.
    config : MoeConfig, optional
        By default `MoeConfig()`: 8 experts, 2 per token.
    granularity : int
        The number of experts that each feed-forward network is split into. Expert `e` is a shard
        of copy `e // granularity`, which comes from model `e // granularity % num_models`.

    Returns
    -------
    MoeConstructionPlan

    Raises
    ------
    TypeError
        If a number is not an integer, or `config` is not a `MoeConfig`.
    MoeConfigError
        If a number is below 1, `config` is invalid, its number of experts is not a multiple of
        `granularity`, or the plan would need a table of more than 1 GiB.
    MemoryError
        If memory cannot hold the table.

    Examples
    --------
    >>> from moe_fast import plan_moe_construction
    >>> plan = plan_moe_construction(num_models=3, num_layers=2)
    >>> [a.source_model for a in plan.assignments[0]]
    [0, 1, 2, 0, 1, 2, 0, 1]
    """
    num_models = as_index(num_models, "num_models", minimum=1, maximum=LARGEST_INDEX)
    num_layers = as_index(num_layers, "num_layers", minimum=1)
    if config is None:
        config = MoeConfig()
    if not isinstance(config, MoeConfig):
        raise ArgumentTypeError(
            f"must be a MoeConfig, got {reprlib.repr(config)}", argument="config"
        )
    config = config.with_granularity(as_index(granularity, "granularity", minimum=1))
    config.validate()
    granularity = as_granularity(granularity, config.num_experts)
    models = counting_up(config.num_experts, "num_experts")
    if granularity > 1:
        models //= granularity
    if num_models < len(models):
        models %= num_models
    layers = counting_up(num_layers, "num_layers")[:, np.newaxis]
    shape = (num_layers, config.num_experts)
    return MoeConstructionPlan(
        np.broadcast_to(models, shape), np.broadcast_to(layers, shape), num_models=num_models
    )


def as_granularity(granularity: SupportsIndex, num_experts: int) -> int:
    """The argument `granularity`, which divides the number of experts."""
    number = as_index(granularity, "granularity", minimum=1)
    if num_experts % number:
        raise MoeConfigError(
            f"({num_experts}) must be a multiple of granularity ({number})", argument="num_experts"
        )
    return number


def counting_up(length: int, name: str) -> npt.NDArray[np.int64]:
    """0, 1, 2, ... as an array that may be written."""
    as_index(length, name, maximum=LARGEST_TABLE)
    try:
        return np.arange(length, dtype=np.int64)
    except MemoryError:
        raise MemoryError(f"{name}={length}: no memory for a table of {8 * length} bytes") from None


def compute_expert_load_balance(
    assignments: MoeConstructionPlan
    | Sequence[Sequence[ExpertAssignment | int]]
    | Sequence[ExpertAssignment | int]
    | npt.NDArray[np.integer[Any]],
) -> float:
    """Compute how evenly the source models are used.

    This is the coefficient of variation, the standard deviation (population form) divided by the
    mean, of the number of experts taken from each model over all layers, in float64. Models are
    counted up to the largest index in `assignments`.

    Parameters
    ----------
    assignments : MoeConstructionPlan, Assignments, nested sequences of ExpertAssignment, or array
        `assignments[layer][expert]`. An array holds the source models as integers, of any shape.

    Returns
    -------
    float
        0.0 for even use and for no assignments at all.

    Raises
    ------
    TypeError, MoeConfigError
        If `assignments` is anything else, or an index is negative or so large that one counter per
        model would take more than 1 GiB.
    MemoryError
        If memory cannot hold the counters.

    Examples
    --------
    >>> import numpy as np
    >>> from moe_fast import ExpertAssignment, compute_expert_load_balance
    >>> compute_expert_load_balance([[ExpertAssignment(0, 0, 0), ExpertAssignment(1, 1, 0)]])
    0.0
    >>> compute_expert_load_balance(np.array([[0, 0], [0, 1]]))
    0.5
    """
    models = source_models(assignments)
    if models.ndim == 2:
        of_few = kernels.compiled.load_balance(models)
        if of_few >= 0.0:
            return of_few
    once = distinct(models)
    if once.size == 0:
        return 0.0
    counts = count_models(once)
    counts *= np.uint64(models.size // once.size)
    return kernels.compiled.coefficient_of_variation(counts)


def count_models(models: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """How often each model, up to the largest index, is in `models`."""
    largest = as_index(models.max(), "assignments")
    length = largest + 1
    as_index(largest, "source_model", maximum=LARGEST_TABLE - 1)
    num_tables = TABLES if models.size > TABLES * length else 1
    try:
        tables = np.zeros((num_tables, length), dtype=np.uint64)
    except MemoryError:
        raise MemoryError(f"source_model={largest}: no memory for {length} counters") from None
    if kernels.compiled.count(np.ascontiguousarray(models).reshape(-1), tables):
        as_index(models.min(), "assignments")
        raise MoeConfigError("changed while they were counted", argument="assignments")
    counts: npt.NDArray[np.uint64] = tables[0] if num_tables == 1 else tables.sum(axis=0)
    return counts


def source_models(assignments: Any) -> npt.NDArray[np.int64]:
    """The source model of every assignment, as an array."""
    if isinstance(assignments, (MoeConstructionPlan, Assignments, LayerAssignments)):
        return assignments.source_model
    if isinstance(assignments, np.ndarray):
        array = np.asarray(assignments)
        as_it_is = array.dtype == np.int64 and array.flags.aligned
        return array if as_it_is else index_array(array, "assignments")
    if not is_sequence(assignments):
        raise ArgumentTypeError(
            "must be a plan, its assignments, nested sequences of ExpertAssignment, "
            f"or an array of source models, got {type(assignments).__name__}",
            argument="assignments",
        )
    return np.array(list(each_model(assignments)), dtype=np.int64)


def is_sequence(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, ExpertAssignment))


def each_model(assignments: Sequence[Any]) -> Iterator[int]:
    for layer in assignments:
        if isinstance(layer, LayerAssignments):
            yield from layer.source_model.tolist()
            continue
        for expert in layer if is_sequence(layer) else (layer,):
            model = expert.source_model if isinstance(expert, ExpertAssignment) else expert
            yield as_index(model, "source_model", maximum=LARGEST_INDEX)
