"""`merge_experts`: an MoE checkpoint in which groups of experts became one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from moe_fast.calibration.score import ScoreReport
from moe_fast.checkpoint.alignment import find_orders, read_orders, stored_orders
from moe_fast.checkpoint.arrangement import Group, arranged_config, arranged_tensors, groups_of
from moe_fast.checkpoint.design import Facts, design_of
from moe_fast.checkpoint.expert_lists import (
    best_experts,
    by_layer,
    check_groups,
    read_groups,
    read_scores,
    read_similarities,
)
from moe_fast.checkpoint.grouping import distances, group_experts
from moe_fast.checkpoint.operation import (
    OperationDesign,
    OperationReport,
    design_operation,
    files_given,
    perform,
)
from moe_fast.checkpoint.output import Writing
from moe_fast.checks import as_flag, as_index, as_path, as_size
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.models.moe import MoeModel, open_moe_model, require_experts
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request
from moe_fast.wording import format_count

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["merge_experts"]


@dataclass(frozen=True)
class MergeRequest(Request):
    """The groups of experts that become one each in each layer; `model` is a folder."""

    operation: ClassVar[str] = "merge"

    model: str
    groups: Mapping[str, tuple[Group, ...]]
    align: bool = False
    """Whether neurons are matched to those of the group's first expert."""
    by: str | None = None
    """What groups or weights were made by; nothing follows from it."""
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> MergeRequest:
        return replace(self, model=now[self.model])


def merge_experts(
    model: ModelPath,
    output: ModelPath,
    groups: ModelPath | Mapping[str, Any] | None = None,
    *,
    num_experts: int | None = None,
    scores: ModelPath | Mapping[str, Any] | ScoreReport | None = None,
    by: str = "reap",
    align: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> OperationReport:
    """Merge each group of experts of an MoE checkpoint into their mean.

    A merged expert has the router row and the bias of its group's first expert, as in REAM
    (arXiv 2604.04356). Means are computed in float64, in the order of the group, and rounded once,
    so that every machine writes the same bytes.

    Parameters
    ----------
    model : path
        A folder with an MoE in float32, bfloat16 or float16.
    output : path
        The folder to create.
    groups : path or mapping, optional
        A JSON file, or its content: `{"layers": {"0": [[0, 5], [1, 2], [3], [4]], ...}}`. A group
        may have weights: `{"experts": [0, 5], "weights": [0.7, 0.3]}`. Every expert of a layer is
        in one group.
    num_experts : int, optional
        Instead of `groups`: the number of experts per layer of the output. Groups are formed as in
        REAM: the experts with the greatest scores take the others nearest to them, by the mean
        outputs and the similarity of logits that `score_experts` can store.
    scores : path, mapping or ScoreReport, optional
        With `num_experts`, the scores that determine the groups and their weights. With `groups`,
        the weights of groups that have none.
    by : str
        The score to use.
    align : bool
        Whether to first reorder the neurons of each expert so that they match those of the group's
        first expert best. Needs scipy, and memory for two matrices.
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
        If the model has no experts, or the groups do not match it, with every reason.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, make_dense_model, merge_experts
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> groups = {"layers": {"0": [[0, 3], [1], [2]], "1": [[0], [2, 1], [3]]}}
    >>> merge_experts(f"{folder}/moe", f"{folder}/merged", groups).num_experts
    3
    """
    shard_size = as_size(max_shard_size, "max_shard_size")
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    folder = as_path(model, "model").absolute()
    opened = open_moe_model(folder)
    require_experts(opened)
    align = as_flag(align, "align")
    if (groups is None) == (num_experts is None):
        raise MoeConfigError(
            "must say which experts are merged, or else a number of experts with scores",
            argument="groups",
        )
    if groups is None:
        number = as_index(num_experts, "num_experts", minimum=1, maximum=opened.num_experts)
        read, where, warnings = group_by_scores(opened, number, scores, by)
    else:
        read, where, warnings = read_groups(groups, opened)
        if scores is not None:
            read = weighted(read, read_scores(scores, by, opened))
    check_merging(opened, read, where)
    request = MergeRequest(
        model=str(folder),
        groups=read,
        align=align,
        by=None if scores is None else by,
        max_shard_size=shard_size,
    )
    return perform(request, output, writing, files_given(groups, scores), warnings)


def group_by_scores(
    model: MoeModel, number: int, scores: Any, by: str
) -> tuple[dict[str, tuple[Group, ...]], str, list[str]]:
    """The groups of each layer by scores and similarities; what to call them; warnings."""
    if scores is None:
        raise MoeConfigError(
            "needs scores, which say what each expert is worth", argument="num_experts"
        )
    router_groups = groups_of(model)[0]
    if number % router_groups:
        raise MoeConfigError(
            f"must be a multiple of the {router_groups} groups of experts, got {number}",
            argument="num_experts",
        )
    values = read_scores(scores, by, model, least=0)
    found: dict[str, Any] = {}
    for key, (means, similarity) in read_similarities(scores, model).items():
        centroids = best_experts({key: values[key]}, number, router_groups)[key]
        found[key] = group_experts(values[key], distances(means, similarity), centroids)
    layers, warnings = by_layer({"layers": found}, "scores", model)
    return {key: tuple(groups) for key, groups in layers.items()}, "scores", warnings


def weighted(
    groups: Mapping[str, Sequence[Group]], scores: Mapping[str, Any]
) -> dict[str, tuple[Group, ...]]:
    """Groups without weights with those of their experts' scores."""

    def with_weights(group: Group, values: Any) -> Group:
        weights = tuple(float(values[expert]) for expert in group.experts)
        return group if group.weights or not sum(weights) > 0 else replace(group, weights=weights)

    return {
        key: tuple(with_weights(g, scores[key]) if key in scores else g for g in found)
        for key, found in groups.items()
    }


@design_of.register
def design_merged(request: MergeRequest, decisions: Facts | None = None) -> OperationDesign:
    """From headers alone; where neurons are aligned, from the experts of groups."""
    model = open_moe_model(request.model)
    require_experts(model)
    check_groups(request.groups, model, "groups")
    check_merging(model, request.groups, "groups")
    orders = None
    if request.align:
        stored = (decisions or {}).get("orders")
        orders = (
            find_orders(model, request.groups)
            if stored is None
            else read_orders(stored, model, request.groups)
        )
    number = len(next(iter(request.groups.values())))
    before = model.num_experts
    return design_operation(
        request,
        model,
        dict(arranged_tensors(model, request.groups, orders)),
        arranged_config(model, number),
        experts_per_layer=number,
        experts_per_tok=model.num_experts_per_tok,
        reason_to_differ=f"{before} experts of each layer were merged into {number}",
        max_shard_size=request.max_shard_size,
        facts={"num_experts_before": before},
        decisions={} if orders is None else {"orders": stored_orders(orders)},
        sentence=f"merged its experts: groups of {before} became {number} in each layer",
    )


def check_merging(model: MoeModel, groups: Mapping[str, Sequence[Group]], where: str) -> None:
    """Raise `CheckpointError` for groups that leave a router too few experts, or mix its groups."""
    problems = []
    router_groups, _ = groups_of(model)
    top_k = model.num_experts_per_tok or 1
    size = model.num_experts // router_groups
    for key, listed in groups.items():
        here = f"{where}: layer {key}"
        if len(listed) < top_k:
            count = format_count(len(listed), "group")
            problems.append(f"{here} has {count}; num_experts_per_tok is {top_k}")
        if router_groups == 1:
            continue
        homes = [group.first // size for group in listed]
        counts = [homes.count(number) for number in range(router_groups)]
        if homes != sorted(homes) or len(set(counts)) > 1 or counts[0] < 2:
            problems.append(
                f"{here}: the router chooses from {router_groups} groups of {size} experts first; "
                "list merged experts in their order, as many for each, at least 2, by the group "
                "that the first expert of each belongs to"
            )
    if problems:
        raise CheckpointError(*problems)
