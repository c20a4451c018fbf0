"""Which dense model and layer every expert comes from, and how evenly the models are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.config import MoeConfig, RouterInit, as_member
from moe_fast.errors import MoeConfigError, as_index

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
# One counter of 8 bytes a model: above this the table alone would take more than 1 GiB.
MOST_MODELS = 2**27


class ExpertAssignment(NamedTuple):
    """Where the weights of one expert come from."""

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
        expert_index: range | None = None,
    ) -> None:
        self._source_model = source_model
        self._source_layer = source_layer
        self._expert_index = range(len(source_model)) if expert_index is None else expert_index

    def __len__(self) -> int:
        return len(self._source_model)

    @overload
    def __getitem__(self, key: SupportsIndex) -> ExpertAssignment: ...
    @overload
    def __getitem__(self, key: slice) -> LayerAssignments: ...
    def __getitem__(self, key: SupportsIndex | slice) -> ExpertAssignment | LayerAssignments:
        if isinstance(key, slice):
            return LayerAssignments(
                self._source_model[key], self._source_layer[key], self._expert_index[key]
            )
        expert = self._expert_index[key]
        return ExpertAssignment(expert, int(self._source_model[key]), int(self._source_layer[key]))

    def __iter__(self) -> Iterator[ExpertAssignment]:
        models, layers = self._source_model.tolist(), self._source_layer.tolist()
        return map(ExpertAssignment, self._expert_index, models, layers)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LayerAssignments):
            return (
                self._expert_index == other._expert_index
                and np.array_equal(self._source_model, other._source_model)
                and np.array_equal(self._source_layer, other._source_layer)
            )
        return sequences_equal(self, other)

    def __repr__(self) -> str:
        return shortened(self)


class Assignments(Sequence[LayerAssignments]):
    """`assignments[layer][expert]` over two arrays of shape `(num_layers, num_experts)`."""

    __slots__ = ("source_layer", "source_model")
    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have no hash

    def __init__(
        self, source_model: npt.NDArray[np.int64], source_layer: npt.NDArray[np.int64]
    ) -> None:
        self.source_model = source_model
        self.source_layer = source_layer

    def __len__(self) -> int:
        return len(self.source_model)

    @overload
    def __getitem__(self, key: SupportsIndex) -> LayerAssignments: ...
    @overload
    def __getitem__(self, key: slice) -> Assignments: ...
    def __getitem__(self, key: SupportsIndex | slice) -> LayerAssignments | Assignments:
        if isinstance(key, slice):
            return Assignments(self.source_model[key], self.source_layer[key])
        layer = range(len(self))[key]
        return LayerAssignments(self.source_model[layer], self.source_layer[layer])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Assignments):
            return np.array_equal(self.source_model, other.source_model) and np.array_equal(
                self.source_layer, other.source_layer
            )
        return sequences_equal(self, other)

    def __repr__(self) -> str:
        return shortened(self)


def sequences_equal(left: Sequence[Any], right: object) -> bool:
    if not isinstance(right, Sequence) or isinstance(right, str):
        return NotImplemented
    return len(left) == len(right) and all(a == b for a, b in zip(left, right, strict=True))


def shortened(items: Sequence[Any]) -> str:
    if len(items) <= 3:
        return "[" + ", ".join(map(repr, items)) + "]"
    return f"[{items[0]!r}, {items[1]!r}, ... {len(items)} in all]"


@dataclass(frozen=True)
class MoeReport:
    """What a plan amounts to.

    `load_balance` is the coefficient of variation of the source models' use (0.0: even);
    `total_params_estimate` counts experts and routers, an exact integer of any size;
    `unused_models` lists the source models that no expert comes from.
    """

    num_experts: int
    num_layers: int
    load_balance: float
    total_params_estimate: int
    unused_models: Sequence[int] = ()


class MoeConstructionPlan:
    """Which model and layer each expert of each layer is taken from.

    Parameters
    ----------
    source_model, source_layer : array_like of int, shape (num_layers, num_experts)
        Kept as read-only int64 arrays of these names.
    num_models : int, optional
        Number of source models; by default the largest index used plus one.
    router_init : RouterInit or str
        How the routers start.

    Attributes
    ----------
    assignments : Assignments
        `assignments[layer][expert]` is an `ExpertAssignment`; the objects are made when asked for.

    Raises
    ------
    TypeError, MoeConfigError
        Arrays that are not integers, not two-dimensional, of different shapes or negative.

    Examples
    --------
    >>> from moe_fast import MoeConstructionPlan
    >>> plan = MoeConstructionPlan([[0, 1, 1]], [[0, 0, 0]])
    >>> plan.assignments[0][2]
    ExpertAssignment(expert_index=2, source_model=1, source_layer=0)
    """

    __slots__ = ("_source_layer", "_source_model", "num_models", "router_init")
    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    num_models: int
    router_init: RouterInit

    def __init__(
        self,
        source_model: npt.ArrayLike,
        source_layer: npt.ArrayLike,
        *,
        num_models: int | None = None,
        router_init: RouterInit | str = RouterInit.BALANCED,
    ) -> None:
        models = index_array(source_model, "source_model")
        layers = index_array(source_layer, "source_layer")
        if models.ndim != 2 or models.shape != layers.shape:
            raise MoeConfigError(
                "source_model and source_layer must both have the shape (num_layers, num_experts),"
                f" got {models.shape} and {layers.shape}"
            )
        used = int(models.max(initial=-1)) + 1
        if num_models is None:
            num_models = used
        self.num_models = as_index(num_models, "num_models")
        if used > self.num_models:
            raise MoeConfigError(
                f"source_model holds {used - 1}, but num_models is {self.num_models}"
            )
        self.router_init = as_member(router_init, RouterInit, "router_init")
        self._source_model = models
        self._source_layer = layers

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
        return self._source_model.shape[1]

    @property
    def assignments(self) -> Assignments:
        """`assignments[layer][expert]`, like nested sequences of `ExpertAssignment`."""
        return Assignments(self._source_model, self._source_layer)

    def report(self, hidden_dim: int, intermediate_dim: int, num_experts: int) -> MoeReport:
        """Summarise the plan for experts of the given sizes.

        Each expert counts `3 * hidden_dim * intermediate_dim` parameters (gate, up and down
        projections), each router `hidden_dim * num_experts`, in every layer.

        Raises
        ------
        TypeError, MoeConfigError
            An argument that is not an integer, or negative.

        Examples
        --------
        >>> from moe_fast import plan_moe_construction
        >>> plan_moe_construction(4, 32).report(4096, 11008, 8).total_params_estimate
        34629222400
        """
        hidden_dim = as_index(hidden_dim, "hidden_dim")
        intermediate_dim = as_index(intermediate_dim, "intermediate_dim")
        num_experts = as_index(num_experts, "num_experts")
        per_layer = num_experts * 3 * hidden_dim * intermediate_dim + hidden_dim * num_experts
        return MoeReport(
            num_experts=num_experts,
            num_layers=self.num_layers,
            load_balance=compute_expert_load_balance(self),
            total_params_estimate=per_layer * self.num_layers,
            unused_models=self._unused_models(),
        )

    def _unused_models(self) -> Sequence[int]:
        one_row = self._source_model.strides[0] == 0
        used = np.unique(self._source_model[:1] if one_row else self._source_model)
        gaps = np.setdiff1d(np.arange(used.max(initial=-1) + 1), used, assume_unique=True)
        # Round robin leaves a tail, and a range holds a tail of any length.
        tail = range(len(used) + len(gaps), self.num_models)
        return (*gaps.tolist(), *tail) if len(gaps) else tail

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MoeConstructionPlan):
            return NotImplemented
        return (
            self.num_models == other.num_models
            and self.router_init == other.router_init
            and self.assignments == other.assignments
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            restore_plan,
            (self._source_model, self._source_layer, self.num_models, self.router_init),
        )

    def __repr__(self) -> str:
        return (
            f"MoeConstructionPlan(num_models={self.num_models}, num_layers={self.num_layers}, "
            f"num_experts={self.num_experts}, router_init={str(self.router_init)!r})"
        )


def restore_plan(
    source_model: npt.ArrayLike,
    source_layer: npt.ArrayLike,
    num_models: int,
    router_init: RouterInit,
) -> MoeConstructionPlan:
    return MoeConstructionPlan(
        source_model, source_layer, num_models=num_models, router_init=router_init
    )


def index_array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.int64]:
    """`values` as a read-only int64 array of indices; a view where they already are one."""
    array = np.asarray(values)
    if array.size == 0 and array.dtype.kind == "f":  # what NumPy makes of an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got an array of {array.dtype}")
    if array.size and array.min() < 0:
        raise MoeConfigError(f"{name} must not be negative, got {array.min()}")
    if array.size and array.max() > LARGEST_INDEX:
        raise MoeConfigError(f"{name} must be at most {LARGEST_INDEX}, got {array.max()}")
    indices = array.astype(np.int64, copy=array.flags.writeable)
    indices.flags.writeable = False
    return indices


def plan_moe_construction(
    num_models: int, num_layers: int, config: MoeConfig | None = None
) -> MoeConstructionPlan:
    """Assign source models to experts, round robin.

    Expert `e` of layer `l` comes from layer `l` of model `e % num_models`; every layer is alike.

    Parameters
    ----------
    num_models, num_layers : int
        At least 1.
    config : MoeConfig, optional
        By default `MoeConfig()`: 8 experts, 2 per token.

    Raises
    ------
    TypeError
        A number that is not an integer, or a `config` that is no `MoeConfig`.
    MoeConfigError
        A number below 1, a configuration that does not validate, or more experts times layers
        than an array can index.

    Examples
    --------
    >>> from moe_fast import plan_moe_construction
    >>> plan = plan_moe_construction(num_models=3, num_layers=2)
    >>> [a.source_model for a in plan.assignments[0]]
    [0, 1, 2, 0, 1, 2, 0, 1]
    """
    num_models = as_index(num_models, "num_models", minimum=1)
    num_layers = as_index(num_layers, "num_layers", minimum=1)
    if config is None:
        config = MoeConfig()
    if not isinstance(config, MoeConfig):
        raise TypeError(f"config must be a MoeConfig, got {config!r}")
    config.validate()
    if num_layers * config.num_experts * 8 > LARGEST_INDEX:
        raise MoeConfigError(
            f"num_layers ({num_layers}) times num_experts ({config.num_experts}) "
            "is more than an array can index"
        )
    plan = MoeConstructionPlan.__new__(MoeConstructionPlan)
    plan.num_models = num_models
    plan.router_init = RouterInit.BALANCED
    # Layers repeat one row and experts one column: views with a stride of 0 cost no memory.
    shape = (num_layers, config.num_experts)
    try:
        row = np.arange(config.num_experts)
        if num_models < config.num_experts:
            row %= num_models
        column = np.arange(num_layers)[:, np.newaxis]
    except MemoryError:
        raise MemoryError(
            f"no memory for num_experts={config.num_experts}, num_layers={num_layers}"
        ) from None
    plan._source_model = np.broadcast_to(row, shape)
    plan._source_layer = np.broadcast_to(column, shape)
    return plan


def compute_expert_load_balance(assignments: Any) -> float:
    """How evenly the source models are used: standard deviation over mean of their counts.

    The coefficient of variation (population form) of the number of experts taken from each
    model, over all layers, in float64, summed in the models' order. Models are counted up to the
    largest index seen.

    Parameters
    ----------
    assignments : MoeConstructionPlan, Assignments, nested sequences of ExpertAssignment, or array
        An array holds the source models as integers, of any shape.

    Returns
    -------
    float
        0.0 for even use and for no assignments at all.

    Raises
    ------
    TypeError, MoeConfigError
        Anything else, or negative indices.
    MemoryError
        An index so large that one counter per model does not fit.

    Examples
    --------
    >>> from moe_fast import compute_expert_load_balance
    >>> compute_expert_load_balance([[0, 1], [0, 1]])
    0.0
    >>> compute_expert_load_balance([[0, 0], [0, 1]])
    0.5
    """
    models = source_models(assignments)
    if models.size == 0:
        return 0.0
    repeats = 1
    if models.ndim == 2 and models.strides[0] == 0:
        repeats, models = len(models), models[0]
    num_models = int(models.max()) + 1
    if num_models > MOST_MODELS:
        raise MemoryError(
            f"source_model {num_models - 1} would need {num_models} counters; "
            f"at most {MOST_MODELS} models can be counted"
        )
    counts = np.zeros(num_models, dtype=np.uint64)
    kernels.compiled.count(np.ascontiguousarray(models).reshape(-1), counts)
    counts *= np.uint64(repeats)
    return float(kernels.compiled.coefficient_of_variation(counts))


def source_models(assignments: Any) -> npt.NDArray[np.int64]:
    """The source model of every assignment, as an array."""
    if isinstance(assignments, (MoeConstructionPlan, Assignments)):
        return assignments.source_model
    if isinstance(assignments, LayerAssignments):
        return assignments._source_model
    if isinstance(assignments, np.ndarray):
        return index_array(assignments, "assignments")
    if not isinstance(assignments, Sequence) or isinstance(assignments, (str, bytes)):
        raise TypeError(
            "assignments must be a plan, its assignments, nested sequences of ExpertAssignment, "
            f"or an array of source models, got {type(assignments).__name__}"
        )
    return index_array(list(flattened(assignments)), "assignments")


def flattened(assignments: Sequence[Any]) -> Iterator[int]:
    for item in assignments:
        if isinstance(item, ExpertAssignment):
            yield as_index(item.source_model, "source_model")
        elif isinstance(item, Sequence) and not isinstance(item, (str, bytes)):
            yield from flattened(item)
        else:
            yield as_index(item, "source_model")
