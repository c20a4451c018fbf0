"""The arguments and options that several commands have, and what their text stands for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from moe_fast.command.declaration import Argument, Option, Options
from moe_fast.config import RouterInit, RoutingMethod
from moe_fast.errors import MoeConfigError

CONVERT_TO = "Convert every weight to float32, bfloat16 or float16."
AsJson = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
OutputFolder = Annotated[Path, Option("--output", "-o", help="The folder to create.")]
MaxShardSize = Annotated[
    str, Option(metavar="SIZE", help="Weights per file, such as 500MB, 5GB or 5GiB.")
]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing output.")]
Threads = Annotated[
    int | None,
    Option(help="Files written at a time.", show_default="MOE_FAST_NUM_THREADS, or 1"),
]
Checksum = Annotated[
    bool,
    Option("--checksum", help="Record the SHA-256 of every file in the manifest."),
]
Fsync = Annotated[
    bool,
    Option("--fsync", help="Wait until the output would survive a power failure."),
]
DryRun = Annotated[
    bool,
    Option("--dry-run", help="Report every problem and show the plan, but write nothing."),
]
Granularity = Annotated[
    int, Option(help="Split each FFN into this many experts; --experts counts the parts.")
]
Experts = Annotated[
    int | None, Option(help="Experts per layer.", show_default="8, times the granularity")
]
ExpertsPerToken = Annotated[
    int | None,
    Option(help="Experts per token.", show_default="2, or the granularity"),
]
RouterStart = Annotated[
    RouterInit,
    Option(metavar="START", help="Initial router weights: balanced, random or uniform."),
]
LogitStd = Annotated[
    float | None,
    Option(
        metavar="NUMBER",
        help="Standard deviation of a token's router logits over the experts.",
        show_default="as the method gives",
    ),
]
TokensUsed = Annotated[
    int | None,
    Option(
        metavar="N",
        help="Number of tokens to use.",
        show_default="256 per expert, from 8192 to 32768",
    ),
]
HiddenStates = Annotated[
    Path | None,
    Option(
        "--hidden-states",
        metavar="FILE.npy",
        help="Router inputs, [T, H] or [L, T, H], on which the load is predicted.",
        show_default="random tokens",
    ),
]
MoeFolder = Annotated[
    Path, Argument(metavar="MODEL", help="A folder with an MoE, made by any tool.")
]
Scores = Annotated[
    Path | None,
    Option(metavar="SCORES.json", help="The scores of the experts, as written by moe-fast score."),
]
ScoredBy = Annotated[
    str, Option(metavar="MEASURE", help="The score to use, such as reap, frequency or ean_sum.")
]
TextFiles = Annotated[
    list[Path] | None,
    Option(
        metavar="FILE",
        help="A file of text: .txt, .md or .jsonl (text or messages). May be repeated.",
    ),
]
TokensFile = Annotated[
    Path | None,
    Option(metavar="FILE.npy", help="Instead of --text: token ids of shape (sequences, length)."),
]
Device = Annotated[
    str, Option(metavar="DEVICE", help="Device on which torch runs the model: cpu, cuda, ...")
]


Quiet = Annotated[bool, Option("--quiet", "-q", help="Print only warnings and errors.")]


class Writing(Options):
    """How an output is written, for all commands that write a checkpoint."""

    max_shard_size: MaxShardSize = "5GB"
    overwrite: Overwrite = False
    threads: Threads = None
    checksum: Checksum = False
    fsync: Fsync = False
    dry_run: DryRun = False
    as_json: AsJson = False
    quiet: Quiet = False

    def of_functions(self) -> dict[str, Any]:
        """What the functions of the package take of it."""
        return {n: value for n, value in vars(self).items() if n not in ("as_json", "quiet")}


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
        raise MoeConfigError(
            f"must be numbers with commas between, such as 1,1.25,2, got {text!r}",
            argument="capacity_factors",
        ) from None


def parse_backbone(text: str) -> Any:
    """`base`, `mean`, or the weights between commas."""
    if text in ("base", "mean"):
        return text
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise MoeConfigError(
            f"must be base, mean or numbers with commas between, such as 2,1,1, got {text!r}",
            argument="backbone",
        ) from None


def parse_layers(text: str) -> list[int]:
    """The layers that `0,5` or `0-3,7` names."""
    layers: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        first, last = match.groups(match[1]) if match else ("1", "0")
        if int(first) > int(last):
            raise MoeConfigError(
                f"must be a list of layers, such as 0,5 or 0-3, got {text!r}",
                argument="dense_layers",
            )
        layers += range(int(first), int(last) + 1)
    return layers
