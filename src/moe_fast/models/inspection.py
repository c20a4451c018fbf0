"""What is in a model folder: sizes, dtypes, experts, routers, copies."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.errors import CheckpointError, RoutingError
from moe_fast.models.folder import find_second_weights
from moe_fast.models.moe import MoeModel, open_moe_model
from moe_fast.reports import Report, frame_of
from moe_fast.routing.health import as_hidden_states, predict_load
from moe_fast.storage.copies import equal_groups
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode_any
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["ModelReport", "RouterReport", "inspect_model"]
Place = tuple[int, int]


"""Layer and expert."""


LARGEST_ROUTER = 2**24  # numbers: 1024 experts of a hidden size of 16384
MOST_EXPERTS = 2**12  # beyond, a load is not predicted: that takes the square of it in memory


@dataclass(frozen=True)
class RouterReport:
    """The router of one layer, its rows being the experts' vectors.

    `most_alike` is the greatest cosine between two rows: at 1 their logits tie in proportion.
    `tied_experts` counts the experts whose row equals another's. How tokens would spread is
    predicted on hidden states: the coefficient of variation is that of the experts' load, 0 where
    it is even, and the entropy that of a token's probabilities, in nats. All are `None` or 0 where
    the router holds a number that is not finite, or is absent; the prediction also where
    `config.json` does not say how many experts a token gets.
    """

    layer: int
    finite: bool
    smallest_norm: float | None
    greatest_norm: float | None
    most_alike: float | None
    tied_experts: int
    coefficient_of_variation: float | None = None
    mean_entropy: float | None = None


@dataclass(frozen=True)
class ModelReport(Report):
    """What `inspect_model` found.

    `active_parameters` are those that work on one token. `copies` groups experts with equal bytes,
    each as `(layer, expert)`; `None` where this was not looked for. `problems` says where experts,
    routers and `config.json` do not fit each other.
    """

    path: Path
    model_type: str
    architecture: str | None
    layout: str
    num_layers: int
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int | None
    num_parameters: int
    active_parameters: int | None
    parameters_per_expert: int
    num_bytes: int
    num_files: int
    bytes_by_dtype: dict[str, int]
    hidden_states: str
    """What the routers' load is predicted on."""
    routers: tuple[RouterReport, ...] = field(repr=False)
    copies: tuple[tuple[Place, ...], ...] | None = field(repr=False)
    problems: tuple[str, ...]

    def to_frame(self) -> DataFrame:
        """The routers as a pandas data frame, one row a layer that has experts.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return frame_of(self.routers, RouterReport)


def inspect_model(
    path: str | os.PathLike[str],
    *,
    copies: bool = True,
    hidden_states: npt.ArrayLike | None = None,
) -> ModelReport:
    """Look into a model folder, MoE or dense, whoever wrote it.

    Headers tell nearly everything; routers are read whole. Experts are read only where `copies`
    asks which of them are equal, and only as far as they are alike. `hidden_states`, `(T, H)` or
    `(L, T, H)` with L the layers that have experts, are what the routers read, to predict their
    load from; by default 1024 random tokens.

    Raises
    ------
    CheckpointError
        For a folder that holds no model, and for headers that do not hold.
    MoeConfigError
        For `hidden_states` of another shape than the routers read.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe
    >>> from moe_fast.models.inspection import inspect_model
    >>> from moe_fast.demo import make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = inspect_model(f"{folder}/moe")
    >>> report.model_type, report.num_experts, report.num_moe_layers
    ('mixtral', 4, 2)
    >>> report.copies[0]
    ((0, 0), (0, 1), (0, 2), (0, 3))
    """
    model = open_moe_model(path)
    sizes = Counter[str]()
    for tensor in model.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    num_parameters = sum(math.prod(t.shape) for t in model.tensors.values())
    experts = [expert for layer in model.layers for expert in layer.experts.values()]
    per_expert = max((sum(math.prod(t.shape) for t in e.values()) for e in experts), default=0)
    return ModelReport(
        path=model.path,
        model_type=model.model_type,
        architecture=model.architecture,
        layout=model.layout,
        num_layers=count_layers(model),
        num_moe_layers=len(model.layers),
        num_experts=model.num_experts,
        num_experts_per_tok=model.num_experts_per_tok if model.layers else None,
        num_parameters=num_parameters,
        active_parameters=active_parameters(model, num_parameters),
        parameters_per_expert=per_expert,
        num_bytes=sum(sizes.values()),
        num_files=len({tensor.file for tensor in model.tensors.values()}),
        bytes_by_dtype=dict(sizes.most_common()),
        hidden_states="random tokens" if hidden_states is None else "given tokens",
        routers=router_reports(model, hidden_states),
        copies=expert_copies(model) if copies and model.layers else None,
        problems=(*model.problems(), *find_second_weights(model.path)),
    )


def count_layers(model: MoeModel) -> int:
    layers = model.config.get("num_hidden_layers")
    return layers if type(layers) is int else len(model.layers)


def active_parameters(model: MoeModel, num_parameters: int) -> int | None:
    """All parameters but those of the experts a token is not sent to."""
    top_k = model.num_experts_per_tok
    if not model.layers:
        return num_parameters
    if top_k is None:
        return None
    for layer in model.layers:
        sizes = sorted(sum(math.prod(t.shape) for t in e.values()) for e in layer.experts.values())
        num_parameters -= sum(sizes[: max(len(sizes) - top_k, 0)])
    return num_parameters


def router_reports(
    model: MoeModel, hidden_states: npt.ArrayLike | None = None
) -> tuple[RouterReport, ...]:
    routers = [
        (number, layer.number, layer.router)
        for number, layer in enumerate(model.layers)
        if layer.router is not None and len(layer.router.shape) == 2
    ]
    states: npt.NDArray[Any] | None = None
    if hidden_states is not None and routers:
        width = max(router.shape[1] for _, _, router in routers)
        states = as_hidden_states(hidden_states, len(model.layers), width)
    reports = []
    with OpenFiles() as files:
        for number, layer, router in routers:
            weights = read_floats(router, files)
            read = states if states is None or states.ndim == 2 else states[number]
            reports.append(router_report(layer, weights, read, model.num_experts_per_tok))
    return tuple(reports)


def router_report(
    layer: int,
    weights: npt.NDArray[np.float64] | None,
    hidden_states: npt.NDArray[Any] | None,
    top_k: int | None,
) -> RouterReport:
    if weights is None or not np.isfinite(weights).all():
        return RouterReport(layer, False, None, None, None, 0)
    norms = np.linalg.norm(weights, axis=1)
    _, counts = np.unique(weights, axis=0, return_counts=True)
    most_alike = None
    if len(weights) > 1 and norms.min() > 0:
        cosines = (weights / norms[:, np.newaxis]) @ (weights / norms[:, np.newaxis]).T
        most_alike = float(cosines[~np.eye(len(weights), dtype=bool)].max())
    report = RouterReport(
        layer,
        True,
        float(norms.min(initial=np.inf)),
        float(norms.max(initial=0)),
        most_alike,
        int(counts[counts > 1].sum()),
    )
    if top_k is None or not 0 < top_k <= len(weights) <= MOST_EXPERTS:
        return report
    with np.errstate(over="ignore"):
        single = weights.astype(np.float32)
    if not np.isfinite(single).all():
        return report
    try:
        stats = predict_load(single[np.newaxis], hidden_states, num_experts_per_tok=top_k)
    except RoutingError:  # logits beyond float32
        return report
    return replace(
        report,
        coefficient_of_variation=float(stats.coefficient_of_variation[0]),
        mean_entropy=float(stats.mean_entropy[0]),
    )


def read_floats(tensor: Tensor, files: OpenFiles) -> npt.NDArray[np.float64] | None:
    """A router's values; `None` where its dtype is not one of floats.

    Raises
    ------
    CheckpointError
        For one far larger than any model's: it is read whole.
    """
    if math.prod(tensor.shape) > LARGEST_ROUTER:
        raise CheckpointError(
            f"{tensor.file.path}: tensor {brief(tensor.name)} has the shape {list(tensor.shape)}; "
            f"no router has more than {LARGEST_ROUTER:,} numbers"
        )
    data = files.read(tensor.file, tensor.offset, tensor.nbytes)
    return decode_any(data, tensor.dtype, tensor.shape)


def expert_copies(model: MoeModel) -> tuple[tuple[Place, ...], ...]:
    places: list[Place] = []
    weights: list[Sequence[Tensor]] = []
    for layer in model.layers:
        for number, expert in sorted(layer.experts.items()):
            places.append((layer.number, number))
            weights.append([expert[role] for role in sorted(expert)])
    return tuple(tuple(places[index] for index in group) for group in equal_groups(weights))
