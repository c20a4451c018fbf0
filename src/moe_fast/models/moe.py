"""A Mixture-of-Experts checkpoint on disk, whoever made it: experts and routers by role.

`families` says by name which tensors count experts. Those of a family that it does not know are
read by the names that families share, and what was assumed is said.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from moe_fast.checks import as_path
from moe_fast.config import Layout
from moe_fast.errors import CheckpointError, Problem
from moe_fast.families.config import NUM_EXPERTS_KEYS, TOP_K_KEYS, first_size
from moe_fast.families.experts import GATE_UP_DOWN, GRANITE_STACKED, STACKED, W1_W3_W2, ExpertAxis
from moe_fast.families.registry import expert_axes, moe_families
from moe_fast.models.folder import read_checkpoint, read_config
from moe_fast.models.unknown_experts import UnknownExperts, find_unknown_experts
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.wording import format_count

LAYER = re.compile(
    r"(?P<layer>(?P<model>(?:.+?\.)?)(?:layers|blocks|mtp\w*)\.(?P<number>\d{1,6}))\.(?P<rest>.+)",
    re.ASCII,
)
# What belongs to layers for multi-token prediction, where its name says so.
MTP = re.compile(r"(?:^|\.)mtp")
OF_EXPERT = re.compile(r"experts\.(?P<expert>\d{1,6})\.(?P<suffix>.+)", re.ASCII)
BLOCK_OF_EXPERTS = re.compile(r"(?P<block>(?:[a-z_]\w*\.)*?)experts\.(?:\d|gate_up_proj|down_proj)")
BLOCK_OF_STACKS = re.compile(r"(?P<block>(?:[a-z_]\w*\.)*?)input_linear\.weight")
# What a tensor is called that might count experts; shared ones are none of them.
SUSPECTS = re.compile(r"expert|router|gate\b|gate_bias|moe")
SHARED = re.compile(r"shared|dense")
EXPERT_NAME = re.compile(
    r"(?:^|\.)(?:experts|switch_mlp|switch_glu)\.|(?:^|\.)(?:in|out)put_linear\.weight$"
)
ROUTER_ENDING = re.compile(
    r"(?:^|\.)(?:gate|router)\.(?:wg\.|gate\.|layer\.|proj\.|classifier\.)?(?:weight|bias)$"
    r"|(?:e_score_correction_bias|expert_bias|per_expert_scale)$"
)
MOST_STACKED = 2**19  # experts in all layers; the largest known model has some 50,000
# The parts of a checkpoint that come from different places.
PARTS = ("experts", "routers", "other weights")
# Where the configuration of a multimodal model keeps that of its language model.
LANGUAGE_KEYS = ("text_config", "llm_config", "language_config")
# Where language models keep their layers.
STACKS = (
    *("", "model.", "backbone.", "transformer.", "language_model.", "language_model.model."),
    "model.language_model.",
)
Expert = dict[str, Tensor]


@dataclass
class MoeLayer:
    """The experts of one layer and its router."""

    number: int
    key: str
    """What files of experts call the layer: its number, or `mtp.0`, ... for those that predict
    several tokens ahead."""
    block: str
    """The name that all tensors of the layer's MoE block begin with."""
    fused: bool
    experts: dict[int, Expert] = field(default_factory=dict)
    """The weights of each expert by role; of a stacked tensor, the expert's slice."""
    own: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    """The tensors that an expert has to itself, by what follows its number in their names."""
    counted: dict[str, Tensor] = field(default_factory=dict)
    """The tensors with a slice for each expert, by their names inside the block: stacked experts,
    routers, biases."""
    router: Tensor | None = None
    router_name: str = ""
    """The router's name inside the block."""

    @property
    def layout(self) -> Layout:
        return Layout.FUSED if self.fused else Layout.PER_EXPERT

    def full_name(self, name: str) -> str:
        """The name in the file of a tensor of the block."""
        return f"{self.block}.{name}"


@dataclass(frozen=True)
class MoeModel:
    """A model folder, its headers read. Without MoE layers and unknown experts it is dense."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    layers: tuple[MoeLayer, ...]
    axis: ExpertAxis
    """Where its family counts experts."""
    depth: int
    """The model's own layers, those for multi-token prediction left out."""
    assumed: str | None = None
    """For a family that is not known: what its names were taken for."""
    unknown: UnknownExperts | None = None
    """Experts that no known layout explains, in a model that has no others."""

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", "unknown"))

    @property
    def language_key(self) -> str | None:
        """The key of config.json under which the language model's own configuration stands."""
        return language_key(self.config)

    @property
    def language_config(self) -> Mapping[str, Any]:
        """The configuration of the language model: all of it, unless the model has other parts."""
        key = self.language_key
        return self.config if key is None else self.config[key]

    @property
    def architecture(self) -> str | None:
        """The class that `config.json` names, where it names one."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None

    @property
    def layout(self) -> str:
        """`"per-expert"`, `"fused"`, `"mixed"`, `"unknown"` or, without experts, `"dense"`."""
        layouts = {str(layer.layout) for layer in self.layers}
        if not layouts:
            return "dense" if self.unknown is None else "unknown"
        return layouts.pop() if len(layouts) == 1 else "mixed"

    @property
    def num_experts(self) -> int:
        """Experts of each MoE layer; 0 in a dense model."""
        return max((len(layer.experts) for layer in self.layers), default=0)

    @property
    def num_experts_per_tok(self) -> int | None:
        """Experts per token as `config.json` has it, `None` where it has none."""
        return first_size(self.language_config, TOP_K_KEYS)

    @property
    def quantization(self) -> str | None:
        """The method by which `config.json` says that weights are packed; `None` without one."""
        for config in (self.config, self.language_config):
            for key in ("quantization_config", "compression_config", "quantization"):
                found = config.get(key)
                if isinstance(found, dict):
                    method = found.get("quant_method", found.get("quant_algo", found.get("mode")))
                    return str(method) if isinstance(method, (str, int)) else "of some kind"
        return None

    @cached_property
    def mtp_tensors(self) -> Mapping[str, Tensor]:
        """The tensors of layers for multi-token prediction.

        Their names say `mtp`, or they stand in layers beyond `num_hidden_layers`: of the stack
        that has the experts, because towers for images have numbers of their own.
        """
        stacks = {m["model"] for layer in self.layers if (m := LAYER.match(f"{layer.block}."))}
        stacks = stacks or set(STACKS)
        found = {}
        for name, tensor in self.tensors.items():
            match = LAYER.fullmatch(name)
            beyond = match is not None and int(match["number"]) >= self.depth
            if MTP.search(name) or (beyond and match and match["model"] in stacks):
                found[name] = tensor
        return found

    @property
    def num_mtp_layers(self) -> int:
        """Layers for multi-token prediction whose tensors are there."""
        matches = (LAYER.fullmatch(name) for name in self.mtp_tensors)
        return len({match["number"] for match in matches if match is not None})

    @cached_property
    def places(self) -> Mapping[str, tuple[MoeLayer, int | None, str]]:
        """Of each tensor that counts experts: its layer, its expert if it has but one, its name
        after the expert's number, or inside the block."""
        names = dict(zip(self.tensors, self.tensors, strict=True))  # so that no name is kept twice
        found: dict[str, tuple[MoeLayer, int | None, str]] = {}
        for layer in self.layers:
            for expert, tensors in layer.own.items():
                for suffix in tensors:
                    name = layer.full_name(f"experts.{expert}.{suffix}")
                    found[names[name]] = (layer, expert, suffix)
            for inner in layer.counted:
                found[names[layer.full_name(inner)]] = (layer, None, inner)
        return found

    def problems(self) -> list[Problem]:
        """Where the MoE layers do not hold together; empty where they do."""
        problems: list[Problem] = []
        family = moe_families().get(self.model_type)
        keys = NUM_EXPERTS_KEYS if family is None else family.count_keys
        expected = first_size(self.language_config, keys)
        for layer in self.layers:
            block = layer.block
            count = len(layer.experts)
            if set(layer.experts) != set(range(count)):
                missing = min(set(range(count)) - set(layer.experts))
                found = f"{block}: expert {missing} of {count} is missing"
                problems.append(Problem(found, file=self.path))
            if expected is not None and count != expected:
                found = f"{block} holds {count} experts, config.json has {expected}"
                problems.append(Problem(found, file=self.path))
            shapes: dict[str, set[tuple[int, ...]]] = {}
            roles = roles_of(layer, self.axis)
            for number, expert in sorted(layer.experts.items()):
                absent = [role for role in roles if role not in expert]
                if absent:
                    found = f"{block}: expert {number} has no {' and no '.join(absent)}"
                    problems.append(Problem(found, file=self.path))
                for role, tensor in expert.items():
                    shapes.setdefault(role, set()).add(tensor.shape)
            problems += [
                Problem(
                    f"{block}: {role} has several shapes: {', '.join(map(str, sorted(several)))}",
                    file=self.path,
                )
                for role, several in shapes.items()
                if len(several) > 1
            ]
            problems += self.router_problems(layer)
        return problems

    def router_problems(self, layer: MoeLayer) -> Iterator[Problem]:
        count = len(layer.experts)
        if layer.router is None:
            yield Problem(f"{layer.block} has no router", file=self.path)
        elif self.axis.obstacle is None and (
            len(layer.router.shape) != 2 or layer.router.shape[0] != count
        ):
            yield Problem(
                f"has the shape {list(layer.router.shape)} for {count} experts",
                file=layer.router.file.path,
                tensor=layer.router.name,
            )

    def surgery_problems(self) -> list[Problem]:
        """Why experts of this model cannot be taken out, copied or moved; empty where they can."""
        problems = self.problems()
        if self.axis.obstacle is not None:
            obstacle = f"{self.model_type}: {self.axis.obstacle}"
            problems.append(Problem(obstacle, file=self.path))
        for layer in self.layers:
            count = len(layer.experts)
            for tensor in layer.counted.values():
                if not is_counted(tensor, count) and tensor is not layer.router:
                    shape = f"has the shape {list(tensor.shape)} for {count} experts"
                    problems.append(Problem(shape, file=tensor.file.path, tensor=tensor.name))
            suffixes = {suffix for tensors in layer.own.values() for suffix in tensors}
            for expert, tensors in sorted(layer.own.items()):
                problems += [
                    Problem(
                        f"{layer.block}.experts.{expert}.{suffix} is missing; other experts of "
                        "the layer have it",
                        file=self.path,
                    )
                    for suffix in sorted(suffixes - tensors.keys())
                ]
            problems += self.unplaced(layer)
        return problems

    def unplaced(self, layer: MoeLayer) -> Iterator[Problem]:
        """Tensors of a layer that seem to count experts, and that nothing is known of."""
        count = len(layer.experts)
        beginning = LAYER.match(f"{layer.block}.")
        prefix = "" if beginning is None else f"{beginning['layer']}."
        for name, tensor in self.others_by_layer.get(prefix, ()):
            rest = name.removeprefix(prefix)
            if SHARED.search(rest) or not SUSPECTS.search(rest):
                continue
            if count in tensor.shape[:1] or tensor.shape == (1, count):
                yield Problem(
                    f"of shape {list(tensor.shape)} may count the {count} experts, and "
                    f"{self.model_type} is not known to have it",
                    file=tensor.file.path,
                    tensor=tensor.name,
                )

    @cached_property
    def others_by_layer(self) -> Mapping[str, list[tuple[str, Tensor]]]:
        """The tensors that are not known to count experts, by what their layer's names begin
        with."""
        found: dict[str, list[tuple[str, Tensor]]] = {}
        for name, tensor in self.tensors.items():
            match = None if name in self.places else LAYER.fullmatch(name)
            if match is not None:
                found.setdefault(f"{match['layer']}.", []).append((name, tensor))
        return found


def roles_of(layer: MoeLayer, axis: ExpertAxis) -> tuple[str, ...]:
    """What each expert of a layer must have."""
    plain = {role for expert in layer.experts.values() for role in expert}
    known: Iterable[str] = axis.parts.values()
    if layer.fused:
        known = (role for roles in axis.stacked.values() for role in roles)
    known = tuple(dict.fromkeys(known))
    return known if plain & set(known) or not plain else tuple(sorted(plain))


def is_counted(tensor: Tensor, num_experts: int) -> bool:
    """Whether a tensor has as many equal slices, one after the other, as there are experts."""
    return tensor.shape[:1] == (num_experts,) or tensor.shape == (1, num_experts)


def language_key(config: Mapping[str, Any]) -> str | None:
    for key in LANGUAGE_KEYS:
        inner = config.get(key)
        if isinstance(inner, dict) and first_size(config, NUM_EXPERTS_KEYS) is None:
            return key
    return None


# Models that someone holds, by their folder and the state of its files: an operation opens its
# model to check what is asked for, and again for the design.
opened_models: WeakValueDictionary[object, MoeModel] = WeakValueDictionary()


def open_moe_model(path: str | os.PathLike[str]) -> MoeModel:
    """Read the configuration and the headers of a model folder; no weight is read.

    Raises
    ------
    CheckpointError
        For a folder that holds no model, and for headers that do not hold.
    """
    folder = as_path(path, "path")
    state = folder, files_in(folder)
    model = opened_models.get(state)
    if model is None:
        model = read_moe_model(folder)
        opened_models[state] = model
    return model


def files_in(folder: Path) -> object:
    """The names, sizes and times of a folder's files; nothing else is equal to that of others."""
    try:
        return tuple(
            (entry.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)
            for status in (entry.stat(),)
        )
    except OSError:
        return object()


def read_moe_model(folder: Path) -> MoeModel:
    config = read_config(folder)
    tensors = read_checkpoint(folder)
    key = language_key(config)
    language = config if key is None else config[key]
    kinds = (language.get("model_type"), config.get("model_type"))
    known = (expert_axes().get(kind) for kind in kinds if isinstance(kind, str))
    axis = next((axis for axis in known if axis is not None), None)
    depth = first_size(language, ("num_hidden_layers", "num_layers", "n_layers"))
    if depth is None:
        depth = count_layers(tensors)
    if axis is not None:
        layers = find_layers(tensors, axis, depth)
        if layers and all(any(layer.experts.values()) for layer in layers):
            return MoeModel(folder, config, tensors, layers, axis, depth)
    guess = guess_axis(tensors)
    layers = find_layers(tensors, guess, depth)
    assumed = assumption(guess, layers)
    unknown = None if layers else find_unknown_experts({**config, **language}, tensors)
    return MoeModel(folder, config, tensors, layers, guess, depth, assumed, unknown)


def count_layers(tensors: Mapping[str, Tensor]) -> int:
    """The layers of a model whose config.json does not count them, by names."""
    matches = (LAYER.fullmatch(name) for name in tensors if not MTP.search(name))
    return 1 + max((int(m["number"]) for m in matches if m and m["model"] in STACKS), default=-1)


def require_layers(model: MoeModel) -> None:
    """Raise `CheckpointError` for a model without experts in a known layout."""
    if model.unknown is not None:
        raise CheckpointError(
            f"holds experts in a layout that is not known here: {model.unknown.describe()}; "
            "moe-fast inspect tells what can be told",
            file=model.path,
        )
    if not model.layers:
        raise CheckpointError("holds no experts; it is not an MoE", file=model.path)


def require_experts(model: MoeModel) -> None:
    """Raise `CheckpointError` for a model without experts that can be operated on."""
    require_layers(model)
    problems = model.surgery_problems()
    if problems:
        raise CheckpointError(*problems)


def guess_axis(tensors: Mapping[str, Tensor]) -> ExpertAxis:
    """What the names of an unknown family may mean, by those that families share."""
    blocks: Counter[str] = Counter()
    inside_layers = set()
    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        if match is not None:
            inside_layers.add(match["rest"])
            for pattern in (BLOCK_OF_EXPERTS, BLOCK_OF_STACKS):
                found = pattern.match(match["rest"])
                if found is not None and (pattern is BLOCK_OF_EXPERTS or len(tensor.shape) > 2):
                    blocks[found["block"].removesuffix(".")] += 1
    block = blocks.most_common(1)[0][0] if blocks else "mlp"
    axes = expert_axes().values()
    routers = [name for axis in axes for name in axis.routers]
    inside = f"{block}." if block else ""
    return ExpertAxis(
        (),
        block=block,
        router=next((r for r in routers if f"{inside}{r}" in inside_layers), "gate.weight"),
        counted=tuple(dict.fromkeys(name for axis in axes for name in axis.counted)),
        parts={**W1_W3_W2, **GATE_UP_DOWN},
        stacked={**STACKED, **GRANITE_STACKED},
    )


def assumption(axis: ExpertAxis, layers: tuple[MoeLayer, ...]) -> str:
    names = sorted({name for layer in layers for name in layer.counted})
    block = f"{axis.block}." if axis.block else ""
    return (
        f"experts are taken to be {block}experts of {format_count(len(layers), 'layer')}, and what "
        f"counts them besides: {', '.join(names) or 'nothing'}"
    )


def find_layers(
    tensors: Mapping[str, Tensor], axis: ExpertAxis, depth: int
) -> tuple[MoeLayer, ...]:
    """The MoE layers among the tensors, in order."""
    layers: dict[str, MoeLayer] = {}
    candidates: dict[str, list[tuple[str, Tensor]]] = {}
    num_stacked = 0

    def layer_of(match: re.Match[str], block: str, fused: bool) -> MoeLayer:
        name, number = block_name(match, block), int(match["number"])
        ahead = MTP.search(match["layer"]) is not None
        if ahead or number >= depth:
            number -= 0 if ahead else depth
            key, number = f"mtp.{number}", number + depth
        else:
            key = str(number)
        return layers.setdefault(name, MoeLayer(number, key, name, fused))

    for name, tensor in tensors.items():
        match = LAYER.fullmatch(name)
        block = None if match is None else block_of(match["rest"], axis)
        if match is None or block is None:
            continue
        inner = match["rest"].removeprefix(f"{block}." if block else "")
        if own := OF_EXPERT.fullmatch(inner):
            layer, number = layer_of(match, block, False), int(own["expert"])
            layer.own.setdefault(number, {})[sys.intern(own["suffix"])] = tensor
            expert = layer.experts.setdefault(number, {})
            role = role_of(own["suffix"], axis)
            if role is not None and len(tensor.shape) == 2:
                expert[role] = tensor
            continue
        candidates.setdefault(block_name(match, block), []).append((inner, tensor))
        roles = stacked_roles(inner, axis)
        if roles and len(tensor.shape) > 2:
            num_stacked += tensor.shape[0]
            if num_stacked > MOST_STACKED:  # before looping over a number from a file
                raise CheckpointError(
                    f"has more experts than any model: {num_stacked} in the layers so far",
                    file=tensor.file.path,
                    tensor=tensor.name,
                )
            layer = layer_of(match, block, True)
            for number, slices in enumerate(slices_of(tensor, roles)):
                layer.experts.setdefault(number, {}).update(slices)
    for layer in layers.values():
        if not any(layer.experts.values()):  # packed: whatever an expert has to itself
            layer.experts = {number: dict(own) for number, own in layer.own.items()}
    for block, found in candidates.items():
        if block not in layers:
            continue
        layer = layers[block]
        for inner, tensor in found:
            if inner in axis.routers:
                layer.router, layer.router_name = tensor, inner
            stacked = inner in axis.stacked or inner.startswith("experts.")
            if inner in (*axis.routers, *axis.counted) or (
                stacked and is_counted(tensor, len(layer.experts))
            ):
                layer.counted[inner] = tensor
    return tuple(sorted(layers.values(), key=lambda layer: (layer.number, layer.block)))


def block_name(match: re.Match[str], block: str) -> str:
    return f"{match['layer']}.{block}".removesuffix(".")


def block_of(rest: str, axis: ExpertAxis) -> str | None:
    """The MoE block that a tensor of a layer stands in."""
    inside = (block for block in axis.blocks if not block or rest.startswith(f"{block}."))
    return next(inside, None)


def role_of(suffix: str, axis: ExpertAxis) -> str | None:
    """The role of a tensor of one expert by what follows the expert's number, if it is a matrix."""
    part, _, kind = suffix.partition(".")
    return axis.parts.get(part) if kind in ("weight", "weight_packed") else None


def stacked_roles(inner: str, axis: ExpertAxis) -> tuple[str, ...]:
    """What the slices of a tensor that stacks experts hold; none for other tensors."""
    if inner.removesuffix("_blocks") in axis.stacked and inner.endswith("_blocks"):
        return (inner.removeprefix("experts."),)  # packed: a slice is neither rows nor columns
    return axis.stacked.get(inner, ())


def is_mtp(layer: MoeLayer) -> bool:
    """Whether a layer predicts several tokens ahead."""
    return layer.key.startswith("mtp.")


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor belongs to, by its name."""
    match = LAYER.fullmatch(name)
    if match is None:
        return "other weights"
    rest = match["rest"]
    if ROUTER_ENDING.search(rest) and not SHARED.search(rest):
        return "routers"
    if not SHARED.search(rest) and EXPERT_NAME.search(rest):
        return "experts"
    return "other weights"


def slices_of(tensor: Tensor, roles: tuple[str, ...]) -> list[Expert]:
    """Each expert's part of a tensor that stacks them, its matrices one over the other."""
    num_experts, rows, *rest = tensor.shape
    parts = num_experts * len(roles)
    if math.prod(tensor.shape) == 0 or rows % len(roles) or tensor.nbytes % parts:
        return []
    shape = (rows // len(roles), *rest)
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
