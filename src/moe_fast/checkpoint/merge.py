"""`merge_experts`: an MoE checkpoint in which groups of experts became one each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from moe_fast.checkpoint.arrangement import Group, arranged_config, arranged_tensors, groups_of
from moe_fast.checkpoint.design import Facts, design_of
from moe_fast.checkpoint.expert_lists import check_groups, read_groups
from moe_fast.checkpoint.operation import (
    OperationDesign,
    OperationReport,
    design_operation,
    files_given,
    perform,
)
from moe_fast.checkpoint.output import Progress, Writing
from moe_fast.checks import as_path, as_size
from moe_fast.errors import CheckpointError
from moe_fast.models.moe import MoeModel, open_moe_model, require_experts
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request

__all__ = ["merge_experts"]


@dataclass(frozen=True)
class MergeRequest(Request):
    """The groups of experts that become one each in each layer; `model` is a folder."""

    operation: ClassVar[str] = "merge"

    model: str
    groups: Mapping[str, tuple[Group, ...]]
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> MergeRequest:
        return replace(self, model=now[self.model])


def merge_experts(
    model: ModelPath,
    output: ModelPath,
    groups: ModelPath | Mapping[str, Any],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> OperationReport:
    """Write an MoE checkpoint in which each group of experts is one: their mean.

    The checkpoint shrinks: a new expert has one place, with the router's row and the bias of its
    group's first expert, as in REAM (2604.04356). Means are added up in float64 in the order of
    the group and rounded once, so that every machine writes the same bytes.

    Parameters
    ----------
    model : path
        A folder with an MoE in float32, bfloat16 or float16.
    output : path
        The folder to create.
    groups : path or mapping
        A JSON file, or what it holds: `{"layers": {"0": [[0, 5], [1, 2], [3], [4]], ...}}`. A group
        may have weights: `{"experts": [0, 5], "weights": [0.7, 0.3]}`. Every expert of a layer is
        in one group.
    max_shard_size : int or str
        Bytes of weights per file, at most, unless a single tensor is larger.
    overwrite, threads, executor, checksum, fsync, dry_run, progress
        As in `build_moe`.

    Returns
    -------
    OperationReport

    Raises
    ------
    CheckpointError
        For a model without experts, and for groups that do not fit it, with every reason.
    TypeError, MoeConfigError
        An argument of the wrong kind or out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, merge_experts
    >>> from moe_fast.demo import make_dense_model
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
    opened = open_moe_model(model)
    require_experts(opened)
    read, where, warnings = read_groups(groups, opened)
    check_merging(opened, read, where)
    request = MergeRequest(
        model=str(as_path(model, "model").absolute()), groups=read, max_shard_size=shard_size
    )
    return perform(request, output, writing, files_given(groups), warnings)


@design_of.register
def design_merged(request: MergeRequest, decisions: Facts | None = None) -> OperationDesign:
    """From headers alone."""
    model = open_moe_model(request.model)
    require_experts(model)
    check_groups(request.groups, model, "groups")
    check_merging(model, request.groups, "groups")
    number = len(next(iter(request.groups.values())))
    before = model.num_experts
    return design_operation(
        request,
        model,
        dict(arranged_tensors(model, request.groups)),
        arranged_config(model, number),
        experts_per_layer=number,
        experts_per_tok=model.num_experts_per_tok,
        reason_to_differ=f"{before} experts of each layer were merged into {number}",
        max_shard_size=request.max_shard_size,
        facts={"num_experts_before": before},
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
            problems.append(f"{here} has {len(listed)} groups; num_experts_per_tok is {top_k}")
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
