"""LoRA adapters as PEFT saves them, checked against the model that they change.

Nothing is merged here: each changed tensor becomes a sum that is taken when it is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from moe_fast.dtypes import WEIGHT_DTYPES
from moe_fast.errors import CheckpointError, Problem
from moe_fast.families.dense import DenseModel
from moe_fast.models.folder import check_is_folder
from moe_fast.records import dataclass
from moe_fast.storage.files import is_absent
from moe_fast.storage.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moe_fast.storage.low_rank import LowRankSum
from moe_fast.storage.pieces import FileRange
from moe_fast.storage.safetensors_header import Tensor, read_header
from moe_fast.storage.strict_json import brief, read_json
from moe_fast.storage.tensors import Weight

PICKLED_WEIGHTS = "adapter_model.bin"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight", re.ASCII)
# What a tensor of another method, or of another part of LoRA, is told by.
TOLD_BY = {
    "lora_magnitude_vector": "a magnitude of DoRA",
    "lora_embedding_": "a change of an embedding",
    "lora_bias": "a bias of the adapter",
    "lora_ranknum": "AdaLoRA's",
}
# Keys that make the sum another one, with what they ask for.
DORA = (
    "DoRA divides each row of the sum by its length and multiplies it with a trained one, which is "
    "another sum than LoRA's; merge it with PEFT (merge_and_unload) and name the result"
)
OTHER_SUMS = {
    "use_dora": DORA,
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "kasa_config": "KaSA changes the model's own weights",
    "monteclora_config": "MonteCLoRA draws its weights",
    "arrow_config": "Arrow chooses among several adapters for each token",
    "alora_invocation_tokens": "aLoRA acts on the tokens after its invocation alone",
    "trainable_token_indices": "trained embeddings of single tokens have no place in experts",
    "target_parameters": "only changes of linear layers are folded in",
    "layer_replication": "the layers it was trained on are not those of the model",
    "lora_bias": "a bias of the adapter has no place in experts",
}
# Starts of an adapter that leave the model's own weights as they are.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
LARGEST_NUMBER = 2.0**64
# Patterns are other people's regular expressions: these parts can take forever.
LONGEST_PATTERN = 200
MOST_REPETITIONS = 4
REPEATED_GROUP = re.compile(r"\)[*+{]|\\[1-9]|\(\?P=")
REPETITION = re.compile(r"[*+{]")


@dataclass(frozen=True)
class LowRank:
    """The change of a tensor, `scale * (B @ A)`."""

    a: Tensor
    b: Tensor
    scale: float

    def added_to(self, weight: Weight) -> Weight:
        (w,) = weight.pieces
        a, b = (FileRange(t.file, t.offset, t.nbytes) for t in (self.a, self.b))
        rank, columns = self.a.shape
        piece = LowRankSum(
            w, weight.dtype, b, self.b.dtype, a, self.a.dtype, rank, columns, self.scale
        )
        return Weight(weight.dtype, weight.shape, (piece,))


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(DenseModel):
    """A dense model with the changes of an adapter, none of them computed."""

    adapter: Path
    changes: Mapping[str, LowRank | Tensor]
    """What is added to a tensor, or stands in its place, by the tensor's canonical name."""

    @property
    def identity(self) -> str:
        return f"{self.path}+{self.adapter}"

    def changed(self, name: str, dtype: str | None = None) -> Weight:
        own, change = super().changed(name, dtype), self.changes.get(name)
        if change is None:
            return own
        if isinstance(change, LowRank):
            return change.added_to(own)
        return Weight.of(change).converted(own.dtype)

    def sources(self) -> Iterator[Mapping[str, Tensor]]:
        yield from super().sources()
        found: dict[str, Tensor] = {}
        for change in self.changes.values():
            tensors = (change.a, change.b) if isinstance(change, LowRank) else (change,)
            found |= {tensor.name: tensor for tensor in tensors}
        yield found

    def changes_beside_ffns(self) -> list[Tensor]:
        """The adapter's tensors, one a change, that change something else than an FFN."""
        return [
            change.a if isinstance(change, LowRank) else change
            for name, change in self.changes.items()
            if ".mlp." not in name
        ]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return not is_absent(folder / ADAPTER_CONFIG) and is_absent(folder / "config.json")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a folder.

    Raises
    ------
    CheckpointError
        For a folder without one.
    """
    check_is_folder(folder)
    file = folder / ADAPTER_CONFIG
    if is_absent(file):
        raise CheckpointError(f"is not a LoRA adapter, it has no {ADAPTER_CONFIG}", file=folder)
    config = read_json(file)
    if not isinstance(config, dict):
        raise CheckpointError("must be a JSON object", file=file)
    return config


def named_base(folder: Path) -> str:
    """What an adapter says it was trained on: a folder or a name on the Hub; may be empty."""
    base = read_adapter_config(folder).get("base_model_name_or_path")
    return base if isinstance(base, str) else ""


def open_adapted_model(folder: Path, model: DenseModel) -> AdaptedModel:
    """A model with an adapter's changes; no weight is read.

    Raises
    ------
    CheckpointError
        With every problem of the adapter, each naming its file and tensor.
    """
    config = read_adapter_config(folder)
    problems = list(config_problems(folder / ADAPTER_CONFIG, config))
    if model.block is not None:
        what = f"changes {model.path}, which is in FP8; dequantise that before"
        problems.append(Problem(what, file=folder))
    weights = folder / ADAPTER_WEIGHTS
    if is_absent(weights):
        what = f"has no {ADAPTER_WEIGHTS}"
        if not is_absent(folder / PICKLED_WEIGHTS):
            what += (
                f"; {PICKLED_WEIGHTS} is a pickle, which is never opened: load it with PEFT and "
                "save it with safe_serialization=True"
            )
        raise CheckpointError(*problems, Problem(what, file=folder))
    try:
        tensors = read_header(weights)
    except CheckpointError as error:
        raise CheckpointError(*problems, *error.problems) from None
    sides, replaced, unknown = sort_tensors(tensors, model)
    problems += unknown
    changes: dict[str, LowRank | Tensor] = {}
    scales = None if problems else Scales.of(config)
    for name, tensor in replaced.items():
        found = list(replacement_problems(tensor, name, model))
        problems += found
        if not found:
            changes |= by_part(name, tensor, model)
    for module, pair in sides.items():
        rank = None if scales is None else scales.rank(module)
        found = list(pair_problems(pair, module, model, rank))
        problems += found
        if not found and scales is not None:
            change = LowRank(pair["A"], pair["B"], scales.scale(module))
            changes |= by_part(f"{module}.weight", change, model)
    if not tensors:
        problems.append(Problem("holds no tensor", file=weights))
    if problems:
        raise CheckpointError(*problems)
    given = {each.name: getattr(model, each.name) for each in fields(DenseModel)}
    return AdaptedModel(**given, adapter=folder, changes=changes)


def by_part(name: str, change: LowRank | Tensor, model: DenseModel) -> dict[str, LowRank | Tensor]:
    """The change of a tensor of the model's files, for each part of it that has a name here."""
    here = model.family.name_here(name)
    for whole, parts in model.family.fused:
        before, fused, kind = here.partition(f"{whole}.")
        if not fused:
            continue
        found: dict[str, LowRank | Tensor] = {}
        start = 0
        for part in parts:
            own = f"{before}{part}.{kind}"
            rows = model.tensors[own].shape[0]
            if isinstance(change, LowRank):
                found[own] = replace(change, b=change.b.rows(start, rows))
            else:
                found[own] = change.rows(start, rows)
            start += rows
        return found
    return {here: change}


def config_problems(file: Path, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Why an adapter of this configuration is not LoRA as it is folded in here."""

    def problem(what: str) -> Problem:
        return Problem(what, file=file)

    if config.get("peft_type") != "LORA":
        yield problem(f"peft_type is {brief(config.get('peft_type'))}; only 'LORA' is supported")
    if config.get("fan_in_fan_out"):
        yield problem(
            "fan_in_fan_out is true: it is for layers that store their weights transposed, which "
            "no model here does"
        )
    if config.get("bias", "none") != "none":
        yield problem(
            f"bias is {brief(config['bias'])}: it trains biases, and experts have none; 'none' "
            "alone is folded in"
        )
    for key, reason in OTHER_SUMS.items():
        if config.get(key):
            yield problem(f"{key}: {reason}")
    start = config.get("init_lora_weights")
    if not any(start is plain or start == plain for plain in PLAIN_STARTS):
        yield problem(
            f"init_lora_weights is {brief(start)}: such a start changes the model's own weights, "
            "so that the adapter is not one of this model; save it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it there"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        yield problem(f"r is {brief(rank)}; it must be an integer of at least 1")
    if not is_number(alpha):
        yield problem(f"lora_alpha is {brief(alpha)}; it must be a number")
    for key in ("rank_pattern", "alpha_pattern"):
        yield from pattern_problems(file, key, config.get(key))


def pattern_problems(file: Path, key: str, patterns: Any) -> Iterator[Problem]:
    """Why the ranks or alphas of single modules cannot be told."""
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        yield Problem(f"{key} is {brief(patterns)}; it must be a mapping", file=file)
        return
    for pattern, value in patterns.items():
        what = f"{key}: {brief(pattern)}"
        good = type(value) is int and value >= 1 if key == "rank_pattern" else is_number(value)
        if not good:
            yield Problem(f"{what} is {brief(value)}; it must be a number above 0", file=file)
        too_much = len(REPETITION.findall(pattern)) > MOST_REPETITIONS
        if len(pattern) > LONGEST_PATTERN or too_much or REPEATED_GROUP.search(pattern):
            yield Problem(f"{what} is too involved a pattern", file=file)
            continue
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            yield Problem(f"{what} is not a regular expression: {error}", file=file)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST_NUMBER


@dataclass(frozen=True)
class Scales:
    """Rank and scale of each module, as PEFT takes them from the configuration."""

    default_rank: int
    default_alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    by_root: bool
    """Whether alpha is divided by the square root of the rank (rsLoRA, 2312.03732)."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scales:
        return cls(
            config["r"],
            config["lora_alpha"],
            config.get("rank_pattern") or {},
            config.get("alpha_pattern") or {},
            bool(config.get("use_rslora")),
        )

    def rank(self, module: str) -> int:
        found = matching(self.ranks, module)
        return self.default_rank if found is None else self.ranks[found]

    def scale(self, module: str) -> float:
        found = matching(self.alphas, module)
        alpha = self.default_alpha if found is None else self.alphas[found]
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def matching(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first pattern that a module's name, or its end, is of."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return None


def name_in_family(name: str, model: DenseModel) -> str:
    """The name of an adapter's tensor without PEFT's prefix and that of a multimodal model."""
    plain = name.removeprefix(PREFIX)
    prefix = None if model.wrapper is None else model.wrapper.prefix
    if prefix and plain.startswith(prefix):
        return f"model.{plain.removeprefix(prefix)}"
    return plain


def sort_tensors(
    tensors: Mapping[str, Tensor], model: DenseModel
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[Problem]]:
    """The factors of each module, the tensors that stand for whole ones, and what is neither."""
    sides: dict[str, dict[str, Tensor]] = {}
    replaced: dict[str, Tensor] = {}
    unknown: list[Problem] = []
    for name, tensor in tensors.items():
        plain = name_in_family(name, model)
        match = FACTOR.fullmatch(plain)
        if match and match["side"] not in sides.get(match["module"], ()):
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        elif "lora_" in plain:
            kind = next(
                (what for part, what in TOLD_BY.items() if part in plain), "not a part of it"
            )
            what = f"is {kind}; LoRA has lora_A and lora_B of linear layers"
            unknown.append(Problem(what, file=tensor.file.path, tensor=tensor.name))
        else:
            replaced[plain] = tensor
    return sides, replaced, unknown


def pair_problems(
    pair: Mapping[str, Tensor], module: str, model: DenseModel, rank: int | None
) -> Iterator[Problem]:
    """Why the factors of a module are no change of the model's."""
    tensor = model.stored.get(f"{module}.weight")
    some = next(iter(pair.values()))
    if len(pair) == 1:
        (side,) = pair
        what = f"has no counterpart: lora_{'B' if side == 'A' else 'A'} is missing"
        yield Problem(what, file=some.file.path, tensor=some.name)
        return
    for factor in pair.values():
        if factor.dtype not in WEIGHT_DTYPES:
            what = f"is {factor.dtype}: a quantised adapter; F32, F16 and BF16 can be folded in"
            yield Problem(what, file=factor.file.path, tensor=factor.name)
        elif len(factor.shape) != 2:
            what = f"has the shape {list(factor.shape)}; factors are matrices"
            yield Problem(what, file=factor.file.path, tensor=factor.name)
            return
    if tensor is None or len(tensor.shape) != 2:
        what = f"changes {module}, which {model.path} does not have: it is for another base"
        yield Problem(what, file=some.file.path, tensor=some.name)
        return
    rows, columns = tensor.shape
    a, b = pair["A"], pair["B"]
    ranks = (a.shape[0], b.shape[1])
    if len({*ranks, *(() if rank is None else (rank,))}) > 1:
        says = "" if rank is None else f", {ADAPTER_CONFIG} says {rank}"
        what = f"has rank {ranks[0]}, lora_B beside it rank {ranks[1]}{says}"
        yield Problem(what, file=a.file.path, tensor=a.name)
    for factor, has, needs in ((a, a.shape[1], columns), (b, b.shape[0], rows)):
        if has != needs:
            yield Problem(
                f"has the shape {list(factor.shape)}; {tensor.name} of {model.path} is "
                f"{list(tensor.shape)}: it is for another base",
                file=factor.file.path,
                tensor=factor.name,
            )


def replacement_problems(tensor: Tensor, name: str, model: DenseModel) -> Iterator[Problem]:
    """Why a tensor of `modules_to_save` cannot stand in the place of the model's."""
    own = model.stored.get(name)
    if own is None:
        what = f"is not a change of a tensor that {model.path} has"
    elif own.shape != tensor.shape:
        what = f"has the shape {list(tensor.shape)}, that of {model.path} {list(own.shape)}"
    elif tensor.dtype not in WEIGHT_DTYPES:
        what = f"is {tensor.dtype}; F32, F16 and BF16 can be built from"
    else:
        return
    yield Problem(what, file=tensor.file.path, tensor=tensor.name)


def beside_ffn_problems(models: Sequence[DenseModel]) -> Iterator[Problem]:
    """That adapters change what no expert holds, where nothing takes it."""
    for model in models:
        found = model.changes_beside_ffns() if isinstance(model, AdaptedModel) else []
        if found:
            others = f", as do {len(found) - 1} others" if len(found) > 1 else ""
            yield Problem(
                f"changes what is not an FFN{others}: experts contain only FFNs. backbone='mean' "
                "takes the rest into the mean of the models, or merge the adapter with PEFT first",
                file=found[0].file.path,
                tensor=found[0].name,
            )
