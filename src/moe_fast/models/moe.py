"""A Mixture-of-Experts checkpoint on disk, whoever made it: experts and routers by role.

Names are read by pattern, so that a family without a target here can still be looked at. Families
agree on the words; two layouts are common: one tensor per expert and projection, or all experts of
a layer in two fused tensors, `[E, 2I, H]` (gate, then up) and `[E, H, I]` (down).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.config import NUM_EXPERTS_KEYS, TOP_K_KEYS, first_size
from moe_fast.families.dense import FFN
from moe_fast.models.folder import read_checkpoint, read_config
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief

BLOCK = r"(?P<block>(?:.+\.)?layers\.(?P<layer>\d{1,6})\.\w+)"
PER_EXPERT = re.compile(BLOCK + r"\.experts\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight", re.ASCII)
FUSED = re.compile(
    BLOCK + r"\.(?P<part>experts\.gate_up_proj|experts\.down_proj|(?:in|out)put_linear\.weight)",
    re.ASCII,
)
ROUTER = re.compile(BLOCK + r"\.(?:gate|router|router\.layer)\.weight", re.ASCII)
ROLE_OF_PART = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"} | {r: r for r in FFN}
MOST_FUSED_EXPERTS = 2**19  # in all layers; the largest known model has some 50,000
GATE_UP_PARTS = ("experts.gate_up_proj", "input_linear.weight")
# The parts of a checkpoint that come from different places.
PARTS = ("experts", "routers", "other weights")
Expert = dict[str, Tensor]


"""The three weights of an expert by role; of a fused tensor, the expert's slice."""


@dataclass
class MoeLayer:
    """The experts of one layer and its router."""

    number: int
    block: str
    """The name that all tensors of the layer's MoE block begin with."""
    fused: bool
    experts: dict[int, Expert] = field(default_factory=dict)
    router: Tensor | None = None


@dataclass(frozen=True)
class MoeModel:
    """A model folder, its headers read. Without MoE layers it is a dense model."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    layers: tuple[MoeLayer, ...]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def architecture(self) -> str | None:
        """The class that `config.json` names, where it names one."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None

    @property
    def layout(self) -> str:
        """`"per-expert"`, `"fused"`, `"mixed"` or, without experts, `"dense"`."""
        layouts = {"fused" if layer.fused else "per-expert" for layer in self.layers}
        return layouts.pop() if len(layouts) == 1 else "mixed" if layouts else "dense"

    @property
    def num_experts(self) -> int:
        """Experts of each MoE layer; 0 in a dense model."""
        return max((len(layer.experts) for layer in self.layers), default=0)

    @property
    def num_experts_per_tok(self) -> int | None:
        """Experts per token as `config.json` has it, `None` where it has none."""
        return first_size(self.config, TOP_K_KEYS)

    def problems(self) -> list[str]:
        """Where the MoE layers do not hold together; empty where they do."""
        problems = []
        expected = first_size(self.config, NUM_EXPERTS_KEYS)
        for layer in self.layers:
            where = f"{self.path}: {layer.block}"
            count = len(layer.experts)
            if set(layer.experts) != set(range(count)):
                missing = min(set(range(count)) - set(layer.experts))
                problems.append(f"{where}: expert {missing} of {count} is missing")
            if expected is not None and count != expected:
                problems.append(f"{where} holds {count} experts, config.json has {expected}")
            shapes: dict[str, set[tuple[int, ...]]] = {role: set() for role in FFN}
            for number, expert in sorted(layer.experts.items()):
                absent = [role for role in FFN if role not in expert]
                if absent:
                    problems.append(f"{where}: expert {number} has no {' and no '.join(absent)}")
                for role, tensor in expert.items():
                    shapes[role].add(tensor.shape)
            problems += [
                f"{where}: {role} has several shapes: {', '.join(map(str, sorted(found)))}"
                for role, found in shapes.items()
                if len(found) > 1
            ]
            if layer.router is None:
                problems.append(f"{where} has no router")
            elif len(layer.router.shape) != 2 or layer.router.shape[0] != count:
                problems.append(
                    f"{layer.router.file.path}: tensor {layer.router.name!r} has the shape "
                    f"{list(layer.router.shape)} for {count} experts"
                )
        return problems


def open_moe_model(path: str | os.PathLike[str]) -> MoeModel:
    """Read the configuration and the headers of a model folder; no weight is read.

    Raises
    ------
    CheckpointError
        For a folder that holds no model, and for headers that do not hold.
    """
    folder = Path(path)
    config = read_config(folder)
    tensors = read_checkpoint(folder)
    return MoeModel(folder, config, tensors, find_layers(tensors))


def find_layers(tensors: Mapping[str, Tensor]) -> tuple[MoeLayer, ...]:
    """The MoE layers among the tensors, in order.

    Raises
    ------
    CheckpointError
        For fused tensors of more experts than any model has.
    """
    layers: dict[str, MoeLayer] = {}
    stacked = 0

    def layer_of(match: re.Match[str], fused: bool) -> MoeLayer:
        layer = MoeLayer(int(match["layer"]), match["block"], fused)
        return layers.setdefault(layer.block, layer)

    routers = {}
    for name, tensor in tensors.items():
        if match := PER_EXPERT.fullmatch(name):
            if match["part"] in ROLE_OF_PART and len(tensor.shape) == 2:
                expert = layer_of(match, False).experts.setdefault(int(match["expert"]), {})
                expert[ROLE_OF_PART[match["part"]]] = tensor
        elif (match := FUSED.fullmatch(name)) and len(tensor.shape) == 3:
            stacked += tensor.shape[0]
            if stacked > MOST_FUSED_EXPERTS:  # before looping over a number from a file
                raise CheckpointError(
                    f"{tensor.file.path}: tensor {brief(tensor.name)}: the layers so far hold "
                    f"{stacked} experts, more than any model's"
                )
            for number, expert in enumerate(slices(tensor, match["part"] in GATE_UP_PARTS)):
                layer_of(match, True).experts.setdefault(number, {}).update(expert)
        elif match := ROUTER.fullmatch(name):
            routers[match["block"]] = tensor
    for block, layer in layers.items():
        layer.router = routers.get(block)
    return tuple(sorted(layers.values(), key=lambda layer: (layer.number, layer.block)))


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor belongs to, by its name."""
    if PER_EXPERT.fullmatch(name) or FUSED.fullmatch(name):
        return "experts"
    return "routers" if ROUTER.fullmatch(name) else "other weights"


def slices(tensor: Tensor, gate_up: bool) -> list[Expert]:
    """Each expert's part of a fused tensor, `[E, 2I, H]` or `[E, H, I]`."""
    num_experts, rows, columns = tensor.shape
    roles = ("gate_proj", "up_proj") if gate_up else ("down_proj",)
    parts = num_experts * len(roles)
    if num_experts * rows * columns == 0 or rows % len(roles) or tensor.nbytes % parts:
        return []
    shape = (rows // len(roles), columns)
    nbytes = tensor.nbytes // parts
    experts = []
    position = tensor.offset
    for number in range(num_experts):
        expert = {}
        for role in roles:
            name = f"{tensor.name}[{number}].{role}"
            expert[role] = Tensor(name, tensor.dtype, shape, tensor.file, position, nbytes)
            position += nbytes
        experts.append(expert)
    return experts
