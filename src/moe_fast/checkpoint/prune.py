"""`prune_moe`: an MoE checkpoint with fewer experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from moe_fast.calibration.score import ScoreReport
from moe_fast.checkpoint.arrangement import arranged_config, arranged_tensors, groups_of, singles
from moe_fast.checkpoint.design import Facts, design_of
from moe_fast.checkpoint.expert_lists import (
    Keep,
    best_experts,
    by_layer,
    check_keep,
    read_keep,
    read_scores,
)
from moe_fast.checkpoint.operation import (
    OperationDesign,
    OperationReport,
    design_operation,
    files_given,
    perform,
)
from moe_fast.checkpoint.output import Writing
from moe_fast.checks import as_index, as_path, as_size
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.models.moe import MoeModel, open_moe_model, require_experts
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request
from moe_fast.wording import format_count

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["prune_moe"]


@dataclass(frozen=True)
class PruneRequest(Request):
    """The experts to keep in each layer of one MoE; `model` is a folder."""

    operation: ClassVar[str] = "prune"

    model: str
    keep: Mapping[str, tuple[int, ...]]
    by: str | None = None
    """What they were chosen by; nothing follows from it."""
    ungroup: bool = False
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> PruneRequest:
        return replace(self, model=now[self.model])


def prune_moe(
    model: ModelPath,
    output: ModelPath,
    *,
    keep: ModelPath | Mapping[str, Any] | Sequence[int] | None = None,
    num_experts: int | None = None,
    scores: ModelPath | Mapping[str, Any] | ScoreReport | None = None,
    by: str = "reap",
    ungroup: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> OperationReport:
    """Remove experts from an MoE checkpoint, made by any tool.

    Router rows, biases, scales, the experts of multi-token prediction layers and `config.json` are
    changed accordingly. Weights are not changed: the output computes what the model would compute
    if its router never chose the removed experts, as in REAP (arXiv 2510.13999).

    Parameters
    ----------
    model : path
        A folder with an MoE.
    output : path
        The folder to create.
    keep : path, mapping or sequence of int, optional
        The experts to keep: a JSON file, or its content, `{"layers": {"0": [0, 2], ...}}`, or one
        list for all layers. They stay in the model's order.
    num_experts : int, optional
        Instead of `keep`: how many to keep in each layer, those with the greatest `scores`.
    scores : path, mapping or ScoreReport, optional
        `{"layers": {"0": {"reap": [E numbers]}, ...}}`, or a file that holds it.
    by : str
        The score to use.
    ungroup : bool
        Whether to put all experts in one group, if the router chooses groups first; otherwise all
        groups keep the same number of experts. This changes the routing, and the report warns of
        it.
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
        If the model has no experts, or lists or scores do not match it, with every reason.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, make_dense_model, prune_moe
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = prune_moe(f"{folder}/moe", f"{folder}/pruned", keep=[0, 1, 3])
    >>> report.num_experts_before, report.num_experts, report.num_experts_per_tok
    (4, 3, 2)
    """
    shard_size = as_size(max_shard_size, "max_shard_size")
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    folder = as_path(model, "model").absolute()
    opened = open_moe_model(folder)
    require_experts(opened)
    if (keep is None) == (num_experts is None):
        raise MoeConfigError(
            "must list the experts to keep, or a number of experts be given, with their scores",
            argument="keep",
        )
    warnings: list[str] = []
    if keep is not None:
        if scores is not None:
            raise MoeConfigError(
                "are for a number of experts; keep says itself which experts stay",
                argument="scores",
            )
        kept, where, warnings = read_keep(keep, opened)
        check_pruning(opened, kept, where, ungroup=ungroup)
    else:
        number = as_index(num_experts, "num_experts", minimum=1, maximum=opened.num_experts)
        kept, warnings = choose_by_scores(opened, number, scores, by, ungroup=ungroup)
    request = PruneRequest(
        model=str(folder),
        keep=kept,
        by=by if keep is None else None,
        ungroup=ungroup,
        max_shard_size=shard_size,
    )
    return perform(request, output, writing, files_given(keep, scores), warnings)


def choose_by_scores(
    model: MoeModel, number: int, scores: Any, by: str, *, ungroup: bool
) -> tuple[Keep, list[str]]:
    """The experts of the greatest scores in each layer, as many from each group."""
    if scores is None:
        raise MoeConfigError(
            "needs scores, which say what each expert is worth", argument="num_experts"
        )
    groups = 1 if ungroup else groups_of(model)[0]
    if number % groups:
        raise MoeConfigError(
            f"must be a multiple of the {groups} groups of experts, got {number}; ungroup makes "
            "them one",
            argument="num_experts",
        )
    best = best_experts(read_scores(scores, by, model), number, groups)
    layers, warnings = by_layer({"layers": best}, "scores", model)
    return check_keep(layers, model, "scores"), warnings


@design_of.register
def design_pruned(request: PruneRequest, decisions: Facts | None = None) -> OperationDesign:
    """From headers alone."""
    model = open_moe_model(request.model)
    require_experts(model)
    keep = check_keep(request.keep, model, "keep")
    check_pruning(model, keep, "keep", ungroup=request.ungroup)
    number = len(next(iter(keep.values())))
    groups, _ = groups_of(model)
    warnings = []
    if request.ungroup and groups > 1:
        warnings.append(
            f"the {groups} groups of experts became one: tokens are routed differently from the "
            "model also where no expert was dropped"
        )
    dropped = model.num_experts - number
    return design_operation(
        request,
        model,
        dict(arranged_tensors(model, singles(keep))),
        arranged_config(model, number, ungroup=request.ungroup),
        experts_per_layer=number,
        experts_per_tok=model.num_experts_per_tok,
        reason_to_differ=f"{dropped} of {model.num_experts} experts were dropped in each layer"
        if dropped or warnings
        else None,
        max_shard_size=request.max_shard_size,
        facts={
            "num_experts_before": model.num_experts,
            "dropped": {
                layer.key: sorted(set(layer.experts) - set(keep[layer.key]))
                for layer in model.layers
            },
        },
        sentence=f"pruned it: {number} of {model.num_experts} experts are left in each layer",
        warnings=warnings,
    )


def check_pruning(model: MoeModel, keep: Keep, where: str, *, ungroup: bool) -> None:
    """Raise `CheckpointError` for lists that leave a router too few experts to choose from."""
    problems = []
    groups, chosen = (1, 1) if ungroup else groups_of(model)
    top_k = model.num_experts_per_tok or 1
    size = model.num_experts // groups
    for key, experts in keep.items():
        left = [sum(expert // size == group for expert in experts) for group in range(groups)]
        here = f"{where}: layer {key}"
        if len(experts) < top_k:
            count = format_count(len(experts), "expert")
            problems.append(f"{here} keeps {count}; num_experts_per_tok is {top_k}")
        elif len(set(left)) > 1:
            problems.append(
                f"{here} keeps {', '.join(map(str, left))} experts of the {groups} groups that the "
                "router chooses from; keep as many of each, or ungroup"
            )
        elif groups > 1 and left[0] < 2:
            problems.append(
                f"{here} keeps 1 expert of each of {groups} groups; a router compares groups by "
                "their two best experts: keep at least 2, or ungroup"
            )
        elif chosen * left[0] < top_k:
            problems.append(
                f"{here}: a token chooses {chosen} groups, of {left[0]} experts each; "
                f"num_experts_per_tok is {top_k}"
            )
    if problems:
        raise CheckpointError(*problems)
