"""What is in a model folder: sizes, dtypes, experts, routers, copies."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast.errors import CheckpointError, RoutingError
from moe_fast.matmul import matmul
from moe_fast.models.folder import find_second_weights
from moe_fast.models.moe import MoeModel, is_mtp, open_moe_model
from moe_fast.models.unknown_experts import layer_of
from moe_fast.records import dataclass
from moe_fast.reports import Report, frame_of
from moe_fast.routing.health import as_hidden_states, predict_load
from moe_fast.storage.copies import equal_groups
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode_any
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["ModelReport", "RouterReport", "look_into"]
ReadInputs = Callable[[MoeModel], Iterator[npt.NDArray[np.float32]]]
"""What the routers of a model's own layers of experts read of some tokens, one after the other."""
Place = tuple[int, int]


"""Layer and expert."""


LARGEST_ROUTER = 2**24  # numbers: 1024 experts of a hidden size of 16384
# Dtypes whose items hold several parameters of an expert, by some method or other.
PACKED = frozenset({"U8", "U16", "I16", "U32", "I32", "U64", "I64"})
MOST_EXPERTS = 2**12  # beyond, a load is not predicted: that takes the square of it in memory


@dataclass(frozen=True)
class RouterReport:
    """The router of one layer. Each of its rows belongs to one expert.

    If the router is absent or contains a number that is not finite, all values are `None` or 0.

    Attributes
    ----------
    layer : int
        The number of the layer. Layers for multi-token prediction follow the model's own.
    finite : bool
        Whether every number of the router is finite.
    smallest_norm, greatest_norm : float or None
        Of the rows.
    most_alike : float or None
        The greatest cosine between two rows; at 1, their logits are proportional.
    tied_experts : int
        The number of experts whose row equals another's.
    row_repeats : int or None
        The number of consecutive experts that share each row, as the shards of a copy do, which
        are chosen together. 1 if every expert has its own row, and `None` if the number differs.
    coefficient_of_variation : float or None
        Of the experts' load, predicted on hidden states; 0 is even. `None` also if `config.json`
        does not give the number of experts per token.
    mean_entropy : float or None
        Of a token's probabilities, in nats; `None` as above.
    mtp : bool
        Whether the layer is one for multi-token prediction.
    """

    layer: int
    finite: bool
    smallest_norm: float | None
    greatest_norm: float | None
    most_alike: float | None
    tied_experts: int
    row_repeats: int | None = None
    coefficient_of_variation: float | None = None
    mean_entropy: float | None = None
    mtp: bool = False


@dataclass(frozen=True)
class ModelReport(Report):
    """What `inspect_model` found.

    Attributes
    ----------
    path : Path
        The folder.
    model_type, architecture : str
        The family and the class that `config.json` names; the class may be `None`.
    layout : str
        `"per-expert"`, `"fused"`, `"mixed"`, `"unknown"` or `"dense"`.
    quantization : str or None
        The method that `config.json` names, `"unknown"` if it names none; `None` if the weights
        are not quantised.
    num_layers, num_moe_layers : int
        The model's own layers, and those of them with experts.
    num_mtp_layers : int
        Layers for multi-token prediction, which the two do not count.
    num_experts, num_experts_per_tok : int or None
        Experts per layer, and experts per token.
    num_parameters, num_mtp_parameters : int
        All numbers as they are stored, and those of layers for multi-token prediction. A stored
        number of a quantised model may pack several weights, or be a scale.
    active_parameters : int or None
        The parameters of the model's own layers that work on one token; `None` for packed weights.
    parameters_per_expert : int or None
        Of the largest expert.
    num_bytes, num_files : int
        Size of the weights in bytes, and number of files of weights.
    bytes_by_dtype : dict of str to int
        Bytes of the weights of each dtype.
    hidden_states : str
        What the load of the experts is predicted on.
    routers : tuple of RouterReport
        One per layer with experts.
    copies : tuple or None
        Groups of experts with equal bytes, each expert as `(layer, expert)`; `None` if they were
        not looked for.
    unknown_experts : str or None
        The tensors that seem to be experts, if their layout is unknown.
    problems : tuple of str
        Where experts, routers and `config.json` do not fit each other.
    """

    path: Path
    model_type: str
    architecture: str | None
    layout: str
    quantization: str | None
    num_layers: int
    num_moe_layers: int
    num_mtp_layers: int
    num_experts: int | None
    num_experts_per_tok: int | None
    num_parameters: int
    num_mtp_parameters: int
    active_parameters: int | None
    parameters_per_expert: int | None
    num_bytes: int
    num_files: int
    bytes_by_dtype: dict[str, int]
    hidden_states: str
    routers: tuple[RouterReport, ...] = field(repr=False)
    copies: tuple[tuple[Place, ...], ...] | None = field(repr=False)
    unknown_experts: str | None
    problems: tuple[str, ...]

    def to_frame(self) -> DataFrame:
        """Return the routers as a pandas data frame, one row per layer with experts.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return frame_of(self.routers, RouterReport)


def look_into(
    path: str | os.PathLike[str],
    *,
    copies: bool = True,
    hidden_states: npt.ArrayLike | None = None,
    read_inputs: ReadInputs | None = None,
) -> ModelReport:
    """As `inspect_model`, whose text is read by `read_inputs`."""
    model = open_moe_model(path)
    sizes = Counter[str]()
    for tensor in model.tensors.values():
        sizes[tensor.dtype] += tensor.nbytes
    experts = [expert for layer in model.layers for expert in layer.experts.values()]
    per_expert = max((count_parameters(e.values()) for e in experts), default=0)
    unknown = model.unknown
    num_moe_layers = sum(not is_mtp(layer) for layer in model.layers)
    return ModelReport(
        path=model.path,
        model_type=model.model_type,
        architecture=model.architecture,
        layout=model.layout,
        quantization=model.quantization or ("unknown" if are_packed(model) else None),
        num_layers=model.depth,
        num_moe_layers=num_moe_layers or len(own_layers(model)),
        num_mtp_layers=model.num_mtp_layers,
        num_experts=model.num_experts if unknown is None else unknown.num_experts,
        num_experts_per_tok=per_token_of(model),
        num_parameters=count_parameters(model.tensors.values()),
        num_mtp_parameters=count_parameters(model.mtp_tensors.values()),
        active_parameters=active_parameters(model),
        parameters_per_expert=per_expert if unknown is None else None,
        num_bytes=sum(sizes.values()),
        num_files=len({tensor.file for tensor in model.tensors.values()}),
        bytes_by_dtype=dict(sizes.most_common()),
        hidden_states=name_tokens(hidden_states, read_inputs),
        routers=router_reports(model, hidden_states, read_inputs),
        copies=expert_copies(model) if copies and model.layers else None,
        unknown_experts=None if unknown is None else unknown.describe(),
        problems=(*model.problems(), *find_second_weights(model.path)),
    )


def name_tokens(hidden_states: npt.ArrayLike | None, read_inputs: ReadInputs | None) -> str:
    if read_inputs is not None:
        return "tokens of the texts"
    return "random tokens" if hidden_states is None else "given tokens"


def count_parameters(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors)


def are_packed(model: MoeModel) -> bool:
    """Whether experts are kept in numbers that are no weights."""
    experts = [expert for layer in model.layers for expert in layer.experts.values()]
    return any(tensor.dtype in PACKED for expert in experts for tensor in expert.values())


def active_parameters(model: MoeModel) -> int | None:
    """All parameters but those of the experts a token is not sent to, and of layers that predict
    further tokens; `None` where config.json or the tensors do not tell."""
    if model.unknown is not None or are_packed(model):
        return None
    ahead = model.mtp_tensors
    active = count_parameters(t for name, t in model.tensors.items() if name not in ahead)
    for layer in model.layers:
        top_k = model.num_experts_per_tok
        if top_k is None:
            return None
        if not is_mtp(layer):
            sizes = sorted(count_parameters(expert.values()) for expert in layer.experts.values())
            active -= sum(sizes[: max(len(sizes) - top_k, 0)])
    return active


def per_token_of(model: MoeModel) -> int | None:
    if model.unknown is not None:
        return model.unknown.num_experts_per_tok
    return model.num_experts_per_tok if model.layers else None


def own_layers(model: MoeModel) -> list[str]:
    """The layers of experts in an unknown layout that are the model's own."""
    ahead = {layer_of(name.split(".")) for name in model.mtp_tensors}
    layers = () if model.unknown is None else model.unknown.layers
    return [layer for layer in layers if layer not in ahead]


def routers_of(model: MoeModel) -> list[tuple[int, int | None, Tensor]]:
    """Each router: its layer's number, and its place among the model's own layers of experts."""
    if model.unknown is None:
        places = {layer.key: n for n, layer in enumerate(model.layers) if not is_mtp(layer)}
        return [
            (layer.number, places.get(layer.key), layer.router)
            for layer in model.layers
            if layer.router is not None
        ]
    places = {name: place for place, name in enumerate(own_layers(model))}
    found = []
    for name, router in model.unknown.routers.items():
        match = re.search(r"\d+$", name, re.ASCII)
        number = 0 if match is None else int(match[0])
        beyond = name not in places and number < model.depth
        found.append((number + model.depth * beyond, places.get(name), router))
    return found


def router_reports(
    model: MoeModel,
    hidden_states: npt.ArrayLike | None = None,
    read_inputs: ReadInputs | None = None,
) -> tuple[RouterReport, ...]:
    routers = [each for each in routers_of(model) if len(each[2].shape) == 2]
    per_token = per_token_of(model)
    num_layers = len(own_layers(model)) or sum(not is_mtp(layer) for layer in model.layers)
    states: npt.NDArray[Any] | None = None
    if hidden_states is not None and routers:
        width = max(router.shape[1] for _, _, router in routers)
        states = as_hidden_states(hidden_states, num_layers, width)
    streamed = None if read_inputs is None else read_inputs(model)
    reports = []
    with OpenFiles() as files:
        for layer, place, router in routers:
            weights = read_floats(router, files)
            read, known = states, per_token
            if states is not None and states.ndim == 3:
                if place is None:  # the given states are those of the model's own layers
                    known = None
                else:
                    read = states[place]
            elif streamed is not None:
                known = None if place is None else per_token
                read = None if place is None else next(streamed)
            report = router_report(layer, weights, read, known)
            reports.append(replace(report, mtp=place is None))
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
        unit = weights / norms[:, np.newaxis]
        cosines = matmul(unit, unit.T)
        most_alike = float(cosines[~np.eye(len(weights), dtype=bool)].max())
    report = RouterReport(
        layer,
        True,
        float(norms.min(initial=np.inf)),
        float(norms.max(initial=0)),
        most_alike,
        int(counts[counts > 1].sum()),
        find_repeats(weights, len(counts)),
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


def find_repeats(rows: npt.NDArray[Any], distinct: int) -> int | None:
    """How often each row stands, one after the other; `None` where that differs."""
    repeats, rest = divmod(len(rows), max(distinct, 1))
    if rest:
        return None
    runs = rows.reshape(-1, repeats, rows.shape[1])
    return repeats if (runs == runs[:, :1]).all() else None
