"""The commands that make another MoE, or a dense model, of one that exists.

Each parses, calls one function of the package and shows what it returns; it decides nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import moe_fast
from moe_fast.command.arguments import (
    CONVERT_TO,
    AsJson,
    Device,
    LogitStd,
    MoeFolder,
    OutputFolder,
    Quiet,
    ScoredBy,
    Scores,
    TextFiles,
    TokensFile,
    TokensUsed,
    Writing,
    text_files,
)
from moe_fast.command.console import (
    progress_bar,
    show_conversion,
    show_operation,
    show_scores,
)
from moe_fast.command.declaration import (
    CHANGE,
    Argument,
    Call,
    Option,
    command,
)
from moe_fast.command.outcome import (
    reported_errors,
    show,
)
from moe_fast.config import Dtype, Layout
from moe_fast.request import RouterMethod


@command(
    CHANGE,
    help="Convert an MoE to another layout or dtype.",
    epilog="Example: `moe-fast convert moe -o moe-fused --layout fused`",
)
def convert(
    call: Call,
    *,
    model: Annotated[
        Path, Argument(metavar="MODEL", help="A folder with an MoE, made by any tool.")
    ],
    output: OutputFolder,
    layout: Annotated[
        Layout | None,
        Option(help="How experts are stored.", show_default="as they are"),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            metavar="DTYPE",
            help=CONVERT_TO,
            autocompletion=lambda: list(Dtype),
            show_default="as they are",
        ),
    ] = None,
    writing: Writing,
) -> None:
    with reported_errors(call), progress_bar() as progress:
        report = moe_fast.convert_moe(
            model,
            output,
            layout=layout,
            dtype=cast(Any, dtype),
            **writing.of_functions(),
            progress=progress,
        )
    show(report, show_conversion, writing.as_json)


@command(
    CHANGE,
    help="Run an MoE on texts and write how important each expert is.",
    epilog="Example: `moe-fast score moe -o scores.json --text book.txt`",
)
def score(
    call: Call,
    *,
    model: MoeFolder,
    output: Annotated[
        Path,
        Option("--output", "-o", metavar="SCORES.json", help="The file to create."),
    ],
    text: TextFiles = None,
    tokens: TokensFile = None,
    length: Annotated[
        int | None,
        Option(
            help="Truncate texts to this many tokens.",
            show_default="the model's context, at most 2048",
        ),
    ] = None,
    mean_outputs: Annotated[
        bool, Option("--mean-outputs", help="Store the experts' mean outputs, for merge --scores.")
    ] = False,
    gate_similarity: Annotated[
        bool,
        Option(
            "--gate-similarity", help="Store the similarity of router logits, for merge --scores."
        ),
    ] = False,
    device: Device = "cpu",
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing files.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(call), progress_bar("reading") as progress:
        report = moe_fast.score_experts(
            model,
            output,
            texts=text,
            tokens=tokens,
            length=length,
            mean_outputs=mean_outputs,
            gate_similarity=gate_similarity,
            device=device,
            overwrite=overwrite,
            progress=progress,
        )
    show(report, show_scores, as_json)


@command(
    CHANGE,
    help="Keep some experts of an MoE: a list of them, or those with the best scores.",
    epilog="Example: `moe-fast prune moe -o pruned --experts 4 --scores scores.json`",
)
def prune(
    call: Call,
    *,
    model: MoeFolder,
    output: OutputFolder,
    keep: Annotated[
        Path | None,
        Option(metavar="KEEP.json", help="The experts to keep in each layer."),
    ] = None,
    experts: Annotated[
        int | None, Option(help="Keep this many experts per layer, the best by --scores.")
    ] = None,
    scores: Scores = None,
    by: ScoredBy = "reap",
    ungroup: Annotated[
        bool,
        Option("--ungroup", help="Put all experts in one group, which changes the routing."),
    ] = False,
    writing: Writing,
) -> None:
    with reported_errors(call), progress_bar() as progress:
        report = moe_fast.prune_moe(
            model,
            output,
            keep=keep,
            num_experts=experts,
            scores=scores,
            by=by,
            ungroup=ungroup,
            **writing.of_functions(),
            progress=progress,
        )
    show(report, show_operation, writing.as_json)


@command(
    CHANGE,
    help="Merge each group of experts of an MoE into their mean.",
    epilog="Example: `moe-fast merge moe -o merged --groups groups.json`",
)
def merge(
    call: Call,
    *,
    model: MoeFolder,
    output: OutputFolder,
    groups: Annotated[
        Path | None,
        Option(metavar="GROUPS.json", help="The groups of experts to merge in each layer."),
    ] = None,
    experts: Annotated[
        int | None, Option(help="Merge to this many experts per layer, grouped by --scores.")
    ] = None,
    scores: Scores = None,
    by: ScoredBy = "reap",
    align: Annotated[
        bool, Option("--align", help="Reorder neurons to match those of each group's first expert.")
    ] = False,
    writing: Writing,
) -> None:
    with reported_errors(call), progress_bar() as progress:
        report = moe_fast.merge_experts(
            model,
            output,
            groups,
            num_experts=experts,
            scores=scores,
            by=by,
            align=align,
            **writing.of_functions(),
            progress=progress,
        )
    show(report, show_operation, writing.as_json)


@command(
    CHANGE,
    help="Add copies of experts to an MoE.",
    epilog="Example: `moe-fast expand moe -o wider --experts 16`",
)
def expand(
    call: Call,
    *,
    model: MoeFolder,
    output: OutputFolder,
    experts: Annotated[int, Option(help="Experts per layer of the output.")],
    keep_k: Annotated[
        bool,
        Option("--keep-k", help="Keep the number of experts per token."),
    ] = False,
    scores: Scores = None,
    by: ScoredBy = "reap",
    noise_scale: Annotated[
        float, Option(help="Standard deviation of the noise added to copies.")
    ] = 0.0,
    seed: Annotated[int, Option(help="Seed of the noise.")] = 0,
    writing: Writing,
) -> None:
    with reported_errors(call), progress_bar() as progress:
        report = moe_fast.expand_moe(
            model,
            output,
            experts,
            keep_k=keep_k,
            scores=scores,
            by=by,
            noise_scale=noise_scale,
            seed=seed,
            **writing.of_functions(),
            progress=progress,
        )
    show(report, show_operation, writing.as_json)


@command(
    CHANGE,
    help="Write a dense model whose FFN is made of experts of an MoE.",
    epilog="Example: `moe-fast extract moe -o dense --expert 0`",
)
def extract(
    call: Call,
    *,
    model: MoeFolder,
    output: OutputFolder,
    expert: Annotated[int | None, Option(help="Use this expert of each layer.")] = None,
    mean: Annotated[bool, Option("--mean", help="Use the mean of all experts.")] = False,
    best: Annotated[
        int | None, Option(help="Use this many experts, the best by --scores, side by side.")
    ] = None,
    copy: Annotated[
        int | None, Option(help="Use the shards of this copy of a fine-grained model.")
    ] = None,
    granularity: Annotated[
        int | None, Option(help="Number of shards per copy.", show_default="from the model")
    ] = None,
    scores: Scores = None,
    by: ScoredBy = "reap",
    writing: Writing,
) -> None:
    with reported_errors(call), progress_bar() as progress:
        report = moe_fast.extract_dense(
            model,
            output,
            expert=expert,
            mean=mean,
            best=best,
            copy=copy,
            granularity=granularity,
            scores=scores,
            by=by,
            **writing.of_functions(),
            progress=progress,
        )
    show(report, show_operation, writing.as_json)


@command(
    CHANGE,
    help="Reinitialise the routers of an MoE, at random or from text.",
    epilog="Example: `moe-fast reroute moe -o even --text text.txt`",
)
def reroute(
    call: Call,
    *,
    model: MoeFolder,
    output: OutputFolder,
    routers: Annotated[
        str,
        Option(
            metavar="START",
            help="calibrated, clustered, normal, balanced, random or linear.",
        ),
    ] = "calibrated",
    logit_std: LogitStd = None,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    seed: Annotated[int, Option(help="Seed of all random numbers.")] = 0,
    writing: Writing,
) -> None:
    with reported_errors(call), progress_bar() as progress:
        report = moe_fast.reroute_moe(
            model,
            output,
            cast(RouterMethod, routers),
            logit_std=logit_std,
            texts=text_files(text),
            tokens=tokens,
            tokens_used=tokens_used,
            device=device,
            seed=seed,
            **writing.of_functions(),
            progress=progress,
        )
    show(report, show_operation, writing.as_json)
