"""The commands that look at models, routers and this installation.

Each parses, calls one function of the package and shows what it returns; it decides nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, cast

import moe_fast
from moe_fast.command.arguments import (
    AsJson,
    Device,
    HiddenStates,
    Quiet,
    TextFiles,
    TokensFile,
    TokensUsed,
    open_states,
    parse_factors,
    text_files,
)
from moe_fast.command.console import (
    progress_bar,
    say,
    show_check,
    show_comparison,
    show_diagnosis,
    show_model,
    show_routing,
)
from moe_fast.command.declaration import (
    LOOK,
    Argument,
    Call,
    Option,
    command,
)
from moe_fast.command.outcome import (
    print_json,
    reported_errors,
    show,
)
from moe_fast.config import RoutingMethod
from moe_fast.errors import CheckpointError

LIKE_A_FILE = re.compile(r"\S+\.[A-Za-z]{2,4}")


@command(
    LOOK,
    help="Check an MoE: its files, experts, configuration, and which programs can load it.",
    epilog="Examples: `moe-fast check moe`; `moe-fast check moe --text letter.txt`",
)
def check(
    call: Call,
    *,
    output: Annotated[
        Path, Argument(metavar="OUTPUT", help="A folder with an MoE, made by any tool.")
    ],
    against: Annotated[
        list[Path] | None,
        Option(help="A source model, if it was moved or there is no manifest. May be repeated."),
    ] = None,
    text: Annotated[
        str | None,
        Option(
            metavar="FILE or TEXT",
            help="Compare the logits of the MoE and of its dense model on this text.",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(call), progress_bar("comparing") as progress:
        report = moe_fast.check_moe(
            output, against=against or (), text=read_text(text), progress=progress
        )
    show(report, show_check, as_json)
    if not report.passed:
        raise SystemExit(1)


def read_text(text: str | None) -> str | None:
    """The text of the file of that name, if there is one, and else `text` itself."""
    if text is None:
        return None
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a character that none can have
        is_file = False
    if is_file:
        try:
            return Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError("is not text in UTF-8", file=text) from None
    if LIKE_A_FILE.fullmatch(text):
        raise CheckpointError("there is no such file; a text has more than one word", file=text)
    return text


@command(
    LOOK,
    help="Compare two checkpoints, whatever their layout; exit code 1 if the models differ.",
    epilog="Example: `moe-fast compare moe moe-fused`",
)
def compare(
    call: Call,
    *,
    first: Annotated[Path, Argument(metavar="A", help="A folder with a model.")],
    second: Annotated[Path, Argument(metavar="B", help="Another folder with a model.")],
    tolerance: Annotated[
        float, Option(help="Largest difference of two numbers that count as equal.")
    ] = 0.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(call), progress_bar("comparing") as progress:
        report = moe_fast.compare_moe(first, second, tolerance=tolerance, progress=progress)
    show(report, show_comparison, as_json)
    if not report.equal:
        raise SystemExit(1)


@command(
    LOOK,
    help="Show what a model contains: experts, sizes, dtypes, routers, copies.",
    epilog="Example: `moe-fast inspect moe`",
)
def inspect(
    call: Call,
    *,
    model: Annotated[
        Path, Argument(metavar="MODEL", help="A folder with any model, MoE or dense.")
    ],
    copies: Annotated[
        bool,
        Option(help="Look for experts that are copies of each other, by comparing bytes."),
    ] = True,
    hidden_states: HiddenStates = None,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    with reported_errors(call):
        report = moe_fast.inspect_model(
            model,
            copies=copies,
            hidden_states=open_states(hidden_states),
            texts=text_files(text),
            tokens=tokens,
            tokens_used=tokens_used,
            device=device,
        )
    show(report, show_model, as_json)


@command(
    LOOK,
    help="Write one HTML page about a model: experts, sources, sizes, routers, readers.",
    epilog="Example: `moe-fast report moe -o moe.html`",
)
def report(
    call: Call,
    *,
    model: Annotated[
        Path, Argument(metavar="MODEL", help="A folder with any model, MoE or dense.")
    ],
    output: Annotated[
        Path | None,
        Option("--output", "-o", help="The file to write.", show_default="MODEL-report.html"),
    ] = None,
    with_check: Annotated[
        bool,
        Option("--check", help="Also check the model, which reads it and its sources."),
    ] = False,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    with reported_errors(call):
        checked = None
        if with_check:
            with progress_bar("comparing") as progress:
                checked = moe_fast.check_moe(model, progress=progress)
        file = moe_fast.write_report(
            model,
            output,
            check=checked,
            texts=text_files(text),
            tokens=tokens,
            tokens_used=tokens_used,
            device=device,
        )
    say(f"{file}")


@command(
    LOOK,
    help="Route tokens by saved logits: load, losses, collapse, dropped tokens.",
    epilog="Example: `moe-fast route logits.npy --experts-per-token 2 --plot load.png`",
)
def route(
    call: Call,
    *,
    logits: Annotated[
        Path,
        Argument(
            metavar="LOGITS",
            help="Router logits: .npy of shape [T, E] or [L, T, E], or .safetensors with"
            " a tensor per layer.",
        ),
    ],
    method: Annotated[
        RoutingMethod,
        Option(
            metavar="METHOD", help="Routing method: top_k, switch_transformer or expert_choice."
        ),
    ] = RoutingMethod.TOP_K,
    experts_per_token: Annotated[
        int | None, Option(help="Experts per token.", show_default="2, for Switch 1")
    ] = None,
    scores: Annotated[
        str,
        Option(
            help="Function applied to the logits: softmax or sigmoid.",
            autocompletion=lambda: ["softmax", "sigmoid"],
        ),
    ] = "softmax",
    norm: Annotated[
        bool | None,
        Option(help="Divide the weights of a token by their sum.", show_default="for top-k"),
    ] = None,
    groups: Annotated[int, Option(help="Groups of experts.")] = 1,
    groups_per_token: Annotated[
        int | None, Option(help="Groups from which a token may choose.", show_default="all")
    ] = None,
    capacity_factor: Annotated[
        float | None,
        Option(
            help="Limit the tokens per expert to this multiple of the mean.",
            show_default="no limit for top-k, 1.25 for Switch, 1 for expert choice",
        ),
    ] = None,
    drop_policy: Annotated[
        str | None,
        Option(
            help="Which tokens a full expert keeps: the first (position) or the likeliest (probs).",
            autocompletion=lambda: ["position", "probs"],
            show_default="probs, for Switch position",
        ),
    ] = None,
    capacity_factors: Annotated[
        str, Option(help="Show the share of tokens that each of these factors would drop.")
    ] = "1,1.25,1.5,2",
    tokens_per_batch: Annotated[
        int | None,
        Option(help="Tokens that share a capacity.", show_default="all of a layer"),
    ] = None,
    threads: Annotated[
        int | None,
        Option(help="Number of threads.", show_default="MOE_FAST_NUM_THREADS, or 1"),
    ] = None,
    plot: Annotated[
        Path | None, Option(help="Draw the load per layer and expert into this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    with reported_errors(call, path="logits"):
        stats = moe_fast.statistics_of_file(
            logits,
            method,
            experts_per_token,
            capacity_factors=parse_factors(capacity_factors, method),
            tokens_per_batch=tokens_per_batch,
            threads=threads,
            scores=cast(Any, scores),
            norm_topk_prob=norm,
            n_group=groups,
            topk_group=groups_per_token,
            capacity_factor=capacity_factor,
            drop_policy=cast(Any, drop_policy),
        )
    if plot is not None:
        with reported_errors(call, path="plot"):
            from moe_fast.drawing.plotting import save_load_picture

            save_load_picture(stats.counts, plot)
    if as_json:
        print_json(stats.to_dict() | {"layers": stats.summary()})
    else:
        show_routing(stats)


@command(
    LOOK,
    help="Show what is installed, what is missing, and which kernels are used.",
)
def doctor(call: Call, *, as_json: AsJson = False) -> None:
    with reported_errors(call):
        diagnosis = moe_fast.diagnose()
    show(diagnosis, show_diagnosis, as_json)
