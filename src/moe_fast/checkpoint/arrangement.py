"""The experts of a checkpoint arranged anew: some left out, copied, or joined into one.

An arrangement says for each layer which experts each new one is made of. Whatever counts experts
follows: each expert's own tensors, its slices of stacked ones, its row of the router, its bias.
Everything else stays where it is. Nothing is computed where a new expert is made of one old one:
its bytes are a range of the source's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_fast.checkpoint.neurons import NeuronColumns, NeuronRows, Neurons
from moe_fast.checkpoint.random_pieces import Perturbed, choose_stream
from moe_fast.dtypes import ITEM_SIZES, WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.families.config import GROUP_KEYS, NUM_EXPERTS_KEYS, TOP_K_KEYS, first_size
from moe_fast.families.dense import FFN
from moe_fast.models.moe import MoeLayer, MoeModel
from moe_fast.storage.arithmetic import LinearCombination
from moe_fast.storage.pieces import FileRange, Piece
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.tensors import OutputTensor, Weight


@dataclass(frozen=True)
class Group:
    """The old experts that a new one is the weighted mean of.

    Its router row, and its bias, are those of the first.
    """

    experts: tuple[int, ...]
    weights: tuple[float, ...] = ()
    """One for each expert, of any sum; equal ones if there are none."""

    @property
    def first(self) -> int:
        return self.experts[0]


Arrangement = Mapping[str, Sequence[Group]]
"""The new experts of each layer, in order."""


def singles(layers: Mapping[str, Iterable[int]]) -> dict[str, list[Group]]:
    """The arrangement of one old expert for each new one."""
    return {key: [Group((expert,)) for expert in experts] for key, experts in layers.items()}


Orders = Mapping[str, Mapping[int, bytes]]
"""The order of the neurons of some experts of each layer: numbers of 32 bits, lowest byte first."""


@dataclass(frozen=True)
class Noise:
    """Normal noise on the matrices of copies; each weight draws from its own place of a stream."""

    scale: float
    seed: int

    def added(self, weight: Weight, layer: str, expert: int, inner: str) -> Weight:
        """A matrix of a copy, which is the new expert of this number, with its noise.

        Raises
        ------
        CheckpointError
            Weights that are not floats.
        """
        pieces = []
        for piece in weight.pieces:
            assert isinstance(piece, FileRange)
            if weight.dtype not in WEIGHT_DTYPES:
                raise CheckpointError(
                    f"layer {layer}: {inner} is {weight.dtype}; noise is added to "
                    f"{', '.join(WEIGHT_DTYPES)} (convert --dtype makes them)"
                )
            stream = choose_stream(self.seed, f"{layer} {expert} {inner}")
            pieces.append(Perturbed(piece, weight.dtype, self.scale, 1.0, stream))
        return Weight(weight.dtype, weight.shape, tuple(pieces))


def copies_in(groups: Sequence[Group]) -> set[int]:
    """The new experts that are made of an old one that stands before them already."""
    seen: set[int] = set()
    copies = set()
    for number, group in enumerate(groups):
        if group.first in seen:
            copies.add(number)
        seen.add(group.first)
    return copies


def arranged_tensors(
    model: MoeModel,
    arrangement: Arrangement,
    orders: Orders | None = None,
    noise: Noise | None = None,
) -> Iterator[OutputTensor]:
    """Every tensor of the model, in its order, those that count experts as they are arranged.

    Before they are joined, the neurons of an expert are put into its order in `orders`. Copies get
    `noise`.
    """
    copies = {key: copies_in(groups) if noise else set() for key, groups in arrangement.items()}
    made_of: dict[str, dict[int, list[int]]] = {}
    for key, groups in arrangement.items():
        numbers = made_of.setdefault(key, {})
        for number, group in enumerate(groups):
            numbers.setdefault(group.first, []).append(number)
    for name, tensor in model.tensors.items():
        if name not in model.places:
            yield OutputTensor(name, Weight.of(tensor))
            continue
        layer, expert, inner = model.places[name]
        groups = arrangement[layer.key]
        here = {} if orders is None else orders.get(layer.key, {})
        if expert is None:
            roles = model.axis.stacked.get(inner, ()) if here else ()
            weight = arranged(tensor, layer, inner, groups, roles, here)
            if noise and inner in model.axis.stacked and copies[layer.key]:
                weight = noisy_slices(tensor, layer, inner, groups, noise)
            yield OutputTensor(name, weight)
            continue
        role = model.axis.parts.get(inner.partition(".")[0])
        alone = Weight.of(tensor)
        for number in made_of[layer.key].get(expert, ()):
            group = groups[number]
            weight = alone
            if len(group.experts) > 1:
                parts = [layer.own[each][inner] for each in group.experts]
                piece = mean_of(parts, group, role, here)
                weight = Weight(tensor.dtype, tensor.shape, (piece,))
            if noise and role is not None and number in copies[layer.key] and is_matrix(inner):
                weight = noise.added(weight, layer.key, number, inner)
            yield OutputTensor(layer.full_name(f"experts.{number}.{inner}"), weight)


def arranged(
    tensor: Tensor,
    layer: MoeLayer,
    inner: str,
    groups: Sequence[Group],
    roles: Sequence[str],
    orders: Mapping[int, bytes],
) -> Weight:
    """A tensor with a slice for each expert, its slices arranged.

    `roles` are the matrices of a slice whose neurons stand in an order of their own.
    """
    count = len(layer.experts)
    axis = 0 if tensor.shape[0] == count else 1
    shape = (*tensor.shape[:axis], len(groups), *tensor.shape[axis + 1 :])
    slices = [slice_of(tensor, expert, count) for expert in range(count)]
    pieces: list[Piece] = []
    for group in groups:
        if not is_weight(inner):
            pieces.append(range_of(slices[group.first]))
        elif roles and len(group.experts) > 1:
            for role in roles:
                parts = [layer.experts[each][role] for each in group.experts]
                pieces.append(mean_of(parts, group, role, orders))
        else:
            pieces.append(mean_of([slices[each] for each in group.experts], group))
    return Weight(tensor.dtype, shape, tuple(joined_ranges(pieces)))


def noisy_slices(
    tensor: Tensor, layer: MoeLayer, inner: str, groups: Sequence[Group], noise: Noise
) -> Weight:
    """A tensor that stacks experts, its slices arranged, those of copies with noise."""
    copies = copies_in(groups)
    pieces: list[Piece] = []
    for number, group in enumerate(groups):
        part = slice_of(tensor, group.first, len(layer.experts))
        weight = Weight.of(part)
        if number in copies:
            weight = noise.added(weight, layer.key, number, inner)
        pieces += weight.pieces
    shape = (len(groups), *tensor.shape[1:])
    return Weight(tensor.dtype, shape, tuple(joined_ranges(pieces)))


def is_matrix(inner: str) -> bool:
    """Whether a tensor of an expert is a matrix, and not a bias or a scale."""
    return inner.partition(".")[2] in ("weight", "weight_packed")


def is_weight(inner: str) -> bool:
    """Whether a tensor with a slice for each expert holds experts, not what routes to them."""
    if inner.startswith("experts."):
        return not inner.endswith("correction_bias")
    return "put_linear." in inner


def slice_of(tensor: Tensor, expert: int, count: int) -> Tensor:
    nbytes = tensor.nbytes // count
    shape = (math.prod(tensor.shape) // count,)
    name = f"{tensor.name}[{expert}]"
    return Tensor(name, tensor.dtype, shape, tensor.file, tensor.offset + expert * nbytes, nbytes)


def range_of(tensor: Tensor) -> FileRange:
    return FileRange(tensor.file, tensor.offset, tensor.nbytes)


def mean_of(
    parts: Sequence[Tensor],
    group: Group,
    role: str | None = None,
    orders: Mapping[int, bytes] | None = None,
) -> Piece:
    """The bytes of a group's weight, the neurons of each expert in its order, if it has one."""
    if len(parts) == 1:
        return range_of(parts[0])
    first = parts[0]
    for part in parts:
        if part.dtype not in WEIGHT_DTYPES or part.dtype != first.dtype:
            raise CheckpointError(
                f"{part.file.path}: tensor {part.name!r} is {part.dtype}; means are taken of "
                f"{', '.join(WEIGHT_DTYPES)}, all of a group alike (convert --dtype does that)"
            )
    weights = group.weights or (1.0,) * len(parts)
    divisor = math.fsum(weights)
    orders = orders or {}
    sources = tuple(
        in_order(part, role, orders.get(expert))
        for part, expert in zip(parts, group.experts, strict=True)
    )
    return LinearCombination(sources, weights, divisor, first.dtype)


def in_order(part: Tensor, role: str | None, order: bytes | None) -> Piece:
    """A matrix of an expert, or the bias of one, with its neurons in an order."""
    piece = range_of(part)
    if order is None or role not in FFN:
        return piece
    numbers = np.frombuffer(order, "<u4")
    neurons = Neurons(len(numbers), 0, len(numbers), chosen=tuple(numbers.tolist()))
    if role != "down_proj":
        return NeuronRows(piece, neurons)
    return NeuronColumns(piece, part.dtype, neurons) if len(part.shape) == 2 else piece


def joined_ranges(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, those that follow each other in one file as one."""
    last: FileRange | None = None
    for piece in pieces:
        if not isinstance(piece, FileRange):
            if last is not None:
                yield last
                last = None
            yield piece
        elif last is None:
            last = piece
        elif last.file == piece.file and last.offset + last.nbytes == piece.offset:
            last = FileRange(last.file, last.offset, last.nbytes + piece.nbytes)
        else:
            yield last
            last = piece
    if last is not None:
        yield last


def arranged_config(
    model: MoeModel, num_experts: int, top_k: int | None = None, *, ungroup: bool = False
) -> dict[str, Any]:
    """The model's config.json with another number of experts, in whichever keys it has it."""
    config = dict(model.config)
    inner = dict(model.language_config)
    before = first_size(inner, NUM_EXPERTS_KEYS)
    for key in NUM_EXPERTS_KEYS:
        if key in inner:
            inner[key] = replaced(inner[key], before, num_experts)
    if top_k is not None:
        for key in TOP_K_KEYS:
            if key in inner:
                inner[key] = replaced(inner[key], model.num_experts_per_tok, top_k)
    if ungroup:
        inner |= {key: 1 for pair in GROUP_KEYS for key in pair if key in inner}
    if model.language_key is None:
        return inner
    return config | {model.language_key: inner}


def replaced(value: Any, before: int | None, after: int) -> Any:
    """A number of config.json, or the list of one for each layer, as another."""
    if isinstance(value, list):
        return [after if item == before else item for item in value]
    return value if value is None else after


def groups_of(model: MoeModel) -> tuple[int, int]:
    """The groups of experts that the router chooses from first, and how many it chooses."""
    config = model.language_config
    for groups_key, chosen_key in GROUP_KEYS:
        groups = first_size(config, (groups_key,))
        if groups is not None and groups > 1:
            return groups, first_size(config, (chosen_key,)) or groups
    return 1, 1


def num_parameters(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes // ITEM_SIZES[tensor.dtype] for tensor in tensors)
