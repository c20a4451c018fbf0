"""What the operations on a finished MoE share: their design, their report, and how they end."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fast.checkpoint.card import CARD, operation_card
from moe_fast.checkpoint.convert import metadata_of
from moe_fast.checkpoint.design import Design, make_design
from moe_fast.checkpoint.manifest import Manifest
from moe_fast.checkpoint.output import Writing, warn_of_overflow
from moe_fast.checks import as_path
from moe_fast.families.key_types import with_floats
from moe_fast.families.readers import find_readers
from moe_fast.families.rules import Reader
from moe_fast.models.folder import find_second_weights
from moe_fast.models.moe import MoeModel, language_key
from moe_fast.models.readers import contents_of, warn_of_readers
from moe_fast.records import dataclass
from moe_fast.reports import Report, frame_of
from moe_fast.request import ModelPath, Request
from moe_fast.routing.health import RouterHealth
from moe_fast.storage.companions import find_companions, find_missing_code
from moe_fast.storage.tensors import Weight

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["OperationReport"]


@dataclass(frozen=True)
class OperationReport(Report):
    """What `prune_moe`, `expand_moe`, `merge_experts`, `extract_dense` or `reroute_moe` wrote.

    Attributes
    ----------
    output : Path
        The folder.
    operation : str
        `"prune"`, `"expand"`, `"merge"`, `"extract"` or `"reroute"`.
    model_type : str
        The family of the output, as `config.json` names it.
    num_experts_before, num_experts : int
        Experts per layer of the model and of the output; 0 in a dense model.
    num_experts_per_tok_before, num_experts_per_tok : int or None
        Experts per token of the model and of the output; `None` in a dense model, or if
        `config.json` does not say.
    num_parameters_before, num_parameters : int
        Parameters of the model and of the output.
    num_bytes, num_files : int
        Size of the weights in bytes, and number of files of weights.
    seconds : float
        Time that the operation took.
    readers : tuple of Reader
        The programs that load MoEs, and whether they load the output; empty for a dense model.
    dry_run : bool
        Whether nothing was written.
    warnings : tuple of str
        What to know before using the output.
    routers : RouterHealth or None
        For `reroute_moe` with text, the load of the experts on it; otherwise `None`.
    """

    output: Path
    operation: str
    model_type: str
    num_experts_before: int
    num_experts: int
    num_experts_per_tok_before: int | None
    num_experts_per_tok: int | None
    num_parameters_before: int
    num_parameters: int
    num_bytes: int
    num_files: int
    seconds: float
    readers: tuple[Reader, ...] = field(repr=False)
    dry_run: bool = False
    warnings: tuple[str, ...] = ()
    routers: RouterHealth | None = None

    def to_frame(self) -> DataFrame:
        """Return the readers as a pandas data frame, one row per program.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return frame_of(self.readers, Reader)


@dataclass(frozen=True)
class OperationDesign(Design):
    """A design with what the report of an operation tells."""

    model: MoeModel = field(kw_only=True, repr=False)
    experts_per_layer: int = field(kw_only=True)
    experts_per_tok: int | None = field(kw_only=True)
    readers: tuple[Reader, ...] = field(kw_only=True, repr=False)
    health: RouterHealth | None = field(default=None, kw_only=True, repr=False)


def design_operation(
    request: Request,
    model: MoeModel,
    weights: Mapping[str, Weight],
    config: Mapping[str, Any],
    *,
    experts_per_layer: int,
    experts_per_tok: int | None,
    reason_to_differ: str | None,
    max_shard_size: int,
    facts: Mapping[str, Any],
    sentence: str,
    decisions: Mapping[str, Any] | None = None,
    warnings: Sequence[str] = (),
) -> OperationDesign:
    """The design of an operation that made these weights and this config.json of a model.

    `sentence` tells people what was done, in the model card.
    """
    family = str(config.get("model_type", "unknown"))
    config = with_floats(config)
    key = language_key(config)
    if key is not None:
        config[key] = with_floats(config[key])
    contents = contents_of(
        config, weights, model.path, layout=model.layout, num_experts=experts_per_layer
    )
    readers = find_readers(config, contents)
    assumed = (
        [] if model.assumed is None else [f"{model.path}: {model.model_type}: {model.assumed}"]
    )
    return OperationDesign(
        weights=weights,
        config=config,
        companions=find_companions(model.path, config),
        sources=[model.tensors],
        family=family,
        num_experts=experts_per_layer * len(model.layers),
        manifest=Manifest(request=request, family=family, facts=facts, decisions=decisions or {}),
        reference=model.path,
        reason_to_differ=reason_to_differ,
        card=operation_card(model.path / CARD, sentence, readers),
        warnings=(
            *assumed,
            *find_second_weights(model.path),
            *find_missing_code(model.path, config),
            *warn_of_readers(config, contents, model.path),
            *warnings,
        ),
        metadata=metadata_of(model.tensors.values()),
        max_shard_size=max_shard_size,
        model=model,
        experts_per_layer=experts_per_layer,
        experts_per_tok=experts_per_tok,
        readers=readers,
    )


def perform(
    request: Request,
    output: ModelPath,
    writing: Writing,
    also_read: Sequence[Path] = (),
    warnings: Sequence[str] = (),
) -> OperationReport:
    """Make the design of a request and write it.

    Raises
    ------
    CheckpointError
        With everything that is in the way.
    """
    output = as_path(output, "output")
    started = time.perf_counter()
    design = make_design(request, output, writing)
    assert isinstance(design, OperationDesign)
    design = replace(design, also_read=also_read)
    records = design.write(output, writing)
    model = design.model
    return OperationReport(
        output=output,
        operation=request.operation,
        model_type=design.family,
        num_experts_before=model.num_experts,
        num_experts=design.experts_per_layer,
        num_experts_per_tok_before=model.num_experts_per_tok,
        num_experts_per_tok=design.experts_per_tok,
        num_parameters_before=sum(Weight.of(t).num_parameters for t in model.tensors.values()),
        num_parameters=design.num_parameters,
        num_bytes=design.num_bytes,
        num_files=len(design.shards),
        seconds=time.perf_counter() - started,
        readers=design.readers,
        dry_run=writing.dry_run,
        warnings=(*warnings, *design.warnings, *warn_of_overflow(records)),
        routers=design.health,
    )


def files_given(*values: Any) -> list[Path]:
    """Those of the arguments that are files, which no output may replace."""
    return [as_path(value, "file") for value in values if isinstance(value, (str, os.PathLike))]
