"""The arguments and options that several commands have, and what their text stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_fast.command.console import (
    be_quiet,
)
from moe_fast.config import RouterInit, RoutingMethod

CONVERT_TO = "Convert every weight to float32, bfloat16 or float16."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="The folder to create.")]
MaxShardSize = Annotated[
    str, typer.Option(metavar="SIZE", help="Weights per file, such as 500MB, 5GB or 5GiB.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Threads = Annotated[
    int | None,
    typer.Option(help="Files written at a time.", show_default="MOE_FAST_NUM_THREADS, or 1"),
]
Checksum = Annotated[
    bool,
    typer.Option("--checksum", help="Record the SHA-256 of every file in the manifest."),
]
Fsync = Annotated[
    bool,
    typer.Option("--fsync", help="Wait until the output would last through a power cut."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Find every problem, show the plan, write nothing."),
]
Granularity = Annotated[
    int, typer.Option(help="Experts that each FFN is split into; --experts counts the split ones.")
]
Experts = Annotated[
    int | None, typer.Option(help="Experts per layer.", show_default="8, or 8 copies split")
]
ExpertsPerToken = Annotated[
    int | None,
    typer.Option(help="Experts per token.", show_default="2, or those of one split copy"),
]
RouterStart = Annotated[
    RouterInit,
    typer.Option(metavar="START", help="How routers start: balanced, random or uniform."),
]
LogitStd = Annotated[
    float | None,
    typer.Option(
        metavar="NUMBER",
        help="How sharp they start: the standard deviation over the experts of a token's logits.",
        show_default="as the start draws them",
    ),
]
TokensUsed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="How many of the tokens are used.",
        show_default="256 an expert, 8192 to 32768",
    ),
]
HiddenStates = Annotated[
    Path | None,
    typer.Option(
        "--hidden-states",
        metavar="FILE.npy",
        help="What the routers read, [T, H] or [L, T, H], to predict the load from.",
        show_default="random tokens",
    ),
]
MoeFolder = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A folder with an MoE, whoever made it.")
]
Scores = Annotated[
    Path | None, typer.Option(metavar="SCORES.json", help="What each expert is worth.")
]
ScoredBy = Annotated[
    str, typer.Option(metavar="MEASURE", help="Which of the scores: reap, frequency, ...")
]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE", help="A text; repeat for each: .txt, .md, .jsonl (text or messages)."
    ),
]
TokensFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.npy", help="In place of text: tokens, [sequences, length]."),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where torch computes: cpu, cuda, ...")]


def ask_for_quiet(asked: bool) -> None:
    if asked:
        be_quiet()


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        callback=ask_for_quiet,
        expose_value=False,
        help="Print warnings and errors alone.",
    ),
]


def text_files(files: Sequence[Path] | None) -> list[Path]:
    """The files of text, whose names never stand for texts here."""
    return list(files or ())


def open_states(file: Path | None) -> Any:
    from moe_fast.storage.npy import map_npy

    return None if file is None else map_npy(file)


def parse_factors(text: str, method: RoutingMethod) -> list[float]:
    """The numbers between commas; no numbers for expert choice, which drops nothing."""
    if method is RoutingMethod.EXPERT_CHOICE:
        return []
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers; write 1,1.25,2", param_hint="--capacity-factors"
        ) from None


def parse_backbone(text: str) -> Any:
    """`base`, `mean`, or the weights between commas."""
    if text in ("base", "mean"):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not base, mean or a list of numbers; write 2,1,1", param_hint="--backbone"
        ) from None


def parse_layers(text: str) -> list[int]:
    """The layers that `0,5` or `0-3,7` names."""
    layers: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        first, last = match.groups(match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise typer.BadParameter(
                f"{text!r} is not a list of layers; write 0,5 or 0-3", param_hint="--dense-layers"
            )
        layers += range(int(first), int(last) + 1)
    return layers
