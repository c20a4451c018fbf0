"""`expand_moe`: an MoE checkpoint with copies of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from moe_fast.calibration.score import ScoreReport
from moe_fast.checkpoint.arrangement import (
    Noise,
    arranged_config,
    arranged_tensors,
    groups_of,
    singles,
)
from moe_fast.checkpoint.design import Facts, design_of
from moe_fast.checkpoint.expert_lists import (
    Keep,
    best_experts,
    by_layer,
    list_problems,
    read_scores,
    unknown_layers,
)
from moe_fast.checkpoint.operation import (
    OperationDesign,
    OperationReport,
    design_operation,
    files_given,
    perform,
)
from moe_fast.checkpoint.output import Writing
from moe_fast.checks import as_index, as_number, as_path, as_size
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.models.moe import MoeModel, open_moe_model, require_experts
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["expand_moe"]
MOST_EXPERTS = 2**16  # of a layer, far above what models have


@dataclass(frozen=True)
class ExpandRequest(Request):
    """The old expert that each new one of a layer is a copy of; `model` is a folder."""

    operation: ClassVar[str] = "expand"

    model: str
    copies: Mapping[str, tuple[int, ...]]
    num_experts_per_tok: int | None = None
    by: str | None = None
    """What they were chosen by; nothing follows from it."""
    noise_scale: float = 0.0
    """Standard deviation of the noise on the matrices of copies."""
    seed: int = 0
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> ExpandRequest:
        return replace(self, model=now[self.model])

    def validate(self) -> None:
        as_noise_scale(self.noise_scale)


def as_noise_scale(value: Any) -> float:
    """A standard deviation: a finite number, at least 0."""
    number = as_number(value, "noise_scale")
    if not 0 <= number < math.inf:
        raise MoeConfigError(
            f"must be a finite number, at least 0, got {number}", argument="noise_scale"
        )
    return number


def expand_moe(
    model: ModelPath,
    output: ModelPath,
    num_experts: int,
    *,
    keep_k: bool = False,
    scores: ModelPath | Mapping[str, Any] | ScoreReport | None = None,
    by: str = "reap",
    noise_scale: float = 0.0,
    seed: int = 0,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> OperationReport:
    """Add copies of experts to an MoE checkpoint, made by any tool.

    If every expert gets the same number of copies, and the number of experts per token grows by the
    same factor, the output computes what the model computes: the logits of the copies of an expert
    tie, so they are chosen together and share its weight. Expert Upcycling (arXiv 2604.19835)
    begins like this, with copies of the most useful experts and the same number of experts per
    token.

    Parameters
    ----------
    model : path
        A folder with an MoE.
    output : path
        The folder to create.
    num_experts : int
        The number of experts per layer of the output, at least that of the model.
    keep_k : bool
        Whether to keep the number of experts per token. The output then computes something else,
        and the report warns of it.
    scores : path, mapping or ScoreReport, optional
        If `num_experts` is not a multiple of the model's: the experts with the best scores get one
        more copy. As in `prune_moe`.
    by : str
        The score to use.
    noise_scale : float
        Standard deviation of the normal noise added to the matrices of copies; the original experts
        are not changed. The output then computes something else, and the report warns of it.
    seed : int
        Seed of the noise.
    max_shard_size : int or str
        Largest number of bytes of weights per file, unless a single tensor is larger.
    overwrite, threads, executor, checksum, fsync, dry_run, progress
        As in `build_moe`.

    Returns
    -------
    OperationReport

    Raises
    ------
    CheckpointError
        If the model has no experts, or the scores do not match it, with every reason.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, expand_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = expand_moe(f"{folder}/moe", f"{folder}/expanded", 8)
    >>> report.num_experts, report.num_experts_per_tok
    (8, 4)
    """
    shard_size = as_size(max_shard_size, "max_shard_size")
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    folder = as_path(model, "model").absolute()
    opened = open_moe_model(folder)
    require_experts(opened)
    before, top_k = opened.num_experts, opened.num_experts_per_tok
    number = as_index(num_experts, "num_experts", minimum=before, maximum=MOST_EXPERTS)
    groups, _ = groups_of(opened)
    if number % groups:
        raise MoeConfigError(
            f"must be a multiple of the {groups} groups of experts, got {number}",
            argument="num_experts",
        )
    copies, warnings = choose_copies(opened, number, scores, by, groups)
    times, rest = divmod(number, before)
    grows = not keep_k and not rest and top_k is not None
    request = ExpandRequest(
        model=str(folder),
        copies=copies,
        num_experts_per_tok=times * top_k if grows and top_k is not None else top_k,
        by=by if rest else None,
        noise_scale=as_noise_scale(noise_scale),
        seed=as_index(seed, "seed"),
        max_shard_size=shard_size,
    )
    return perform(request, output, writing, files_given(scores), warnings)


def choose_copies(
    model: MoeModel, number: int, scores: Any, by: str, groups: int
) -> tuple[Keep, list[str]]:
    """For each layer the old expert of each new one: the old ones, then their copies.

    Groups of experts keep their own copies.
    """
    before = model.num_experts
    times, rest = divmod(number, before)
    extra: dict[str, Any] = {layer.key: [] for layer in model.layers}
    warnings: list[str] = []
    if rest:
        if scores is None:
            raise MoeConfigError(
                f"must be a multiple of the {before} experts, got {number}; for another number, "
                "scores say which experts get one copy more",
                argument="num_experts",
            )
        best = best_experts(read_scores(scores, by, model), rest, groups)
        extra, warnings = by_layer({"layers": best}, "scores", model)
    elif scores is not None:
        raise MoeConfigError(
            f"are for a number of experts that is not a multiple of {before}", argument="scores"
        )
    size = before // groups
    copies: Keep = {}
    for key, more in extra.items():
        experts: list[int] = []
        for group in range(groups):
            own = range(group * size, (group + 1) * size)
            experts += [*own] * times + [expert for expert in more if expert in own]
        copies[key] = tuple(experts)
    return copies, warnings


@design_of.register
def design_expanded(request: ExpandRequest, decisions: Facts | None = None) -> OperationDesign:
    """From headers alone."""
    model = open_moe_model(request.model)
    require_experts(model)
    check_copies(request.copies, model)
    before, top_k = model.num_experts, model.num_experts_per_tok
    number = len(next(iter(request.copies.values())))
    reason = reason_to_differ(model, request)
    noise = Noise(request.noise_scale, request.seed) if request.noise_scale else None
    return design_operation(
        request,
        model,
        dict(arranged_tensors(model, singles(request.copies), noise=noise)),
        arranged_config(model, number, request.num_experts_per_tok),
        experts_per_layer=number,
        experts_per_tok=request.num_experts_per_tok,
        reason_to_differ=reason,
        max_shard_size=request.max_shard_size,
        facts={"num_experts_before": before, "num_experts_per_tok_before": top_k},
        sentence=f"expanded it: copies make {number} of its {before} experts in each layer",
        warnings=[]
        if reason is None
        else [f"{reason}: the output does not compute what the model computes"],
    )


def check_copies(copies: Mapping[str, tuple[int, ...]], model: MoeModel) -> None:
    """Raise `CheckpointError` for what a manifest cannot have had."""
    problems = list(unknown_layers(copies, model, "copies"))
    for layer in model.layers:
        here = f"copies: layer {layer.key}"
        if layer.key not in copies:
            problems.append(f"{here} is missing")
            continue
        distinct = tuple(dict.fromkeys(copies[layer.key]))
        problems += list_problems(distinct, len(layer.experts), here)
        if len(copies[layer.key]) < len(layer.experts):
            problems.append(f"{here} has fewer experts than the model")
    if not problems and len({len(experts) for experts in copies.values()}) > 1:
        problems.append("copies: layers have different numbers of experts")
    if problems:
        raise CheckpointError(*problems)


def reason_to_differ(model: MoeModel, request: ExpandRequest) -> str | None:
    """Why an expanded model need not compute what it was made from; `None` if it must."""
    before, top_k = model.num_experts, model.num_experts_per_tok
    numbers = {len(experts) for experts in request.copies.values()}
    (number,) = numbers
    if number == before:
        return None
    if request.noise_scale:
        return f"copies have noise of {request.noise_scale:g}"
    if number % before:
        return f"{number} experts are not a multiple of {before}, so that some have more copies"
    if top_k is None or request.num_experts_per_tok != top_k * (number // before):
        return f"a token still goes to {top_k} experts, and copies of one take several places"
    if groups_of(model)[0] > 1:
        return "the router compares groups of experts by their best ones, which are now copies"
    if not model.axis.shares_weight(model.language_config):
        return f"copies of an expert do not share its weight in a {model.model_type} like this"
    return None
