"""The command: it parses, calls a function of the package and prints; it decides nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

import typer
from typer.core import TyperCommand, TyperGroup

import moe_fast
from moe_fast.command.console import (
    be_quiet,
    complain,
    progress_bar,
    say,
    show_build,
    show_check,
    show_comparison,
    show_conversion,
    show_diagnosis,
    show_families,
    show_model,
    show_operation,
    show_plan,
    show_routing,
    show_scores,
)
from moe_fast.command.options import in_options, is_about_option, option_names
from moe_fast.config import Dtype, Layout, RouterInit, RoutingMethod, choose_config
from moe_fast.errors import CheckpointError, MoeFastError, list_problems
from moe_fast.families.choice import UNFIT, targets_of
from moe_fast.families.readers import readers_of
from moe_fast.families.registry import dense_families, moe_families
from moe_fast.reports import Report, json_document
from moe_fast.request import ROUTER_METHODS, RouterMethod


class PlainFlags:
    """Shows flags without the `<bool>` that reads as if a value were needed."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class Group(PlainFlags, TyperGroup):
    """All commands."""


class Command(PlainFlags, TyperCommand):
    """One command. If its output is missing, it may stand where mergekit has it: last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            if getattr(error.param, "name", None) == "output" and len(given) > 1:
                error.message = f"Did you mean -o {given[-1]}?"
            raise


app = typer.Typer(
    name="moe-fast",
    cls=Group,
    context_settings={"help_option_names": ["--help", "-h"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Grow a Mixture-of-Experts model out of dense models on disk: plan it, build it, check "
    "it, look into it. Start with `moe-fast demo`, which makes two small models to play with; then "
    "`moe-fast build MODEL... -o OUTPUT`, and `moe-fast COMMAND --help` for the rest.",
)
LIKE_A_FILE = re.compile(r"\S+\.[A-Za-z]{2,4}")
OPTIONS_OF_MODELS = (
    "experts",
    "experts_per_token",
    "target",
    "layout",
    "dtype",
    "base",
    "dense_layers",
    "routers",
    "seed",
    "granularity",
    "mix_copies",
    "shuffle",
    "reinit",
    "reinit_sets",
    "split",
    "backbone",
    "logit_std",
    "text",
    "tokens",
    "tokens_used",
    "device",
)
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
    typer.Option(
        "--checksum", metavar="", help="Record the SHA-256 of every file in the manifest."
    ),
]
Fsync = Annotated[
    bool,
    typer.Option(
        "--fsync", metavar="", help="Wait until the output would last through a power cut."
    ),
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
        show_default="8192, or 40 an expert",
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
AnyReport = TypeVar("AnyReport", bound=Report)


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


def command_for(arguments: Sequence[str]) -> typer.Typer:
    """The command with the parser of the subcommand that `arguments` begin with, or with all.

    To make the others' takes a fifth of the start.
    """
    named = [
        each
        for each in app.registered_commands
        if each.callback is not None and [each.name or each.callback.__name__] == arguments[:1]
    ]
    if not named:
        return app
    one = copy(app)
    one.registered_commands = named
    return one


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"moe-fast {moe_fast.__version__}")
        raise typer.Exit


@app.callback()
def commands(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=print_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command(
    cls=Command,
    help="Build one Mixture-of-Experts checkpoint from dense models, or what a recipe asks for.",
    epilog="Example: `moe-fast build Qwen/Qwen3-0.6B -o moe --experts 8`",
)
def build(
    context: typer.Context,
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL",
            help="Dense models or LoRA adapters, folders or names on the Hub, also MODEL+ADAPTER; "
            "or one recipe, a YAML file.",
        ),
    ],
    output: OutputFolder,
    experts: Experts = None,
    experts_per_token: ExpertsPerToken = None,
    target: Annotated[
        str,
        typer.Option(
            metavar="FAMILY",
            help=f"auto, {', '.join(moe_families())}.",
            autocompletion=lambda: ["auto", *moe_families()],
        ),
    ] = "auto",
    layout: Annotated[
        Layout | None,
        typer.Option(help="How experts are stored.", show_default="per-expert where there is one"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=CONVERT_TO,
            autocompletion=lambda: list(Dtype),
            show_default="the sources'",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Gives attention, embeddings, norms and tokenizer.", show_default="the first model"
        ),
    ] = None,
    dense_layers: Annotated[
        str,
        typer.Option(metavar="LAYERS", help="Layers without experts, such as 0,5 or 0-3."),
    ] = "",
    routers: Annotated[
        str,
        typer.Option(
            metavar="START",
            help=f"How routers start: {', '.join(ROUTER_METHODS)}.",
            autocompletion=lambda: list(ROUTER_METHODS),
        ),
    ] = "balanced",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    granularity: Granularity = 1,
    mix_copies: Annotated[
        bool,
        typer.Option(
            "--mix-copies", help="Let tokens take parts of several copies, where groups keep apart."
        ),
    ] = False,
    shuffle: Annotated[
        bool,
        typer.Option("--shuffle", help="Put each copy's neurons in another order before a split."),
    ] = False,
    reinit: Annotated[
        float,
        typer.Option(
            metavar="PART", help="Of each expert's neurons, draw so many anew: 0 to 1; 0.5 is good."
        ),
    ] = 0.0,
    reinit_sets: Annotated[
        str,
        typer.Option(
            metavar="SETS",
            help="shared: the same neurons in gate, up and down; separate: others in each.",
            autocompletion=lambda: ["shared", "separate"],
        ),
    ] = "shared",
    split: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="Make all experts from one FFN, without copies: contiguous, random or clustered.",
            autocompletion=lambda: ["contiguous", "random", "clustered"],
            show_default="copies",
        ),
    ] = None,
    backbone: Annotated[
        str,
        typer.Option(
            metavar="MEAN",
            help="Where all but the experts comes from: base, mean of the models, or their weights "
            "in it, such as 2,1,1.",
            autocompletion=lambda: ["base", "mean"],
        ),
    ] = "base",
    logit_std: LogitStd = None,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    hidden_states: HiddenStates = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    from moe_fast.recipes.recipe import is_recipe  # loads the builder, as `make_demo` does

    from_recipe = any(is_recipe(model) for model in models)
    in_recipe = OPTIONS_OF_MODELS if from_recipe else ()
    with reported_errors(context, in_recipe), progress_bar() as progress:
        how: dict[str, Any] = {
            "hidden_states": open_states(hidden_states),
            "max_shard_size": max_shard_size,
            "overwrite": overwrite,
            "threads": threads,
            "checksum": checksum,
            "fsync": fsync,
            "dry_run": dry_run,
            "progress": progress,
        }
        if from_recipe:
            refuse_beside_a_recipe(context, models)
            report = moe_fast.build_recipe(models[0], output, **how)
        else:
            report = moe_fast.build_moe(
                models,
                output,
                choose_config(experts, experts_per_token, granularity),
                target=target,
                layout=layout,
                dtype=cast(Any, dtype),
                base=base,
                dense_layers=parse_layers(dense_layers),
                routers=cast(RouterMethod, routers),
                seed=seed,
                granularity=granularity,
                mix_copies=mix_copies,
                shuffle=shuffle,
                reinit=reinit,
                reinit_sets=cast(Any, reinit_sets),
                split=cast(Any, split),
                backbone=parse_backbone(backbone),
                logit_std=logit_std,
                texts=text_files(text),
                tokens=tokens,
                tokens_used=tokens_used,
                device=device,
                **how,
            )
    show(report, show_build, as_json)


def refuse_beside_a_recipe(context: typer.Context, models: list[Path]) -> None:
    """Raise for models and their options beside a recipe, which says all that itself."""
    if len(models) > 1:
        raise typer.BadParameter("give a recipe alone, without models or other recipes")
    for name in OPTIONS_OF_MODELS:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{option} is for models; write it into the recipe")


@app.command(
    cls=Command,
    help="Check an MoE: its files, each expert byte for byte, its configuration, who can load it.",
    epilog="Examples: `moe-fast check moe`; `moe-fast check moe --text letter.txt`",
)
def check(
    context: typer.Context,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="A folder with an MoE, whoever made it.")
    ],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="A source model; repeat for each. Needed if it moved or the manifest is gone."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE or TEXT",
            help="Run it through the MoE and its dense model, and compare their logits.",
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar("comparing") as progress:
        report = moe_fast.check_moe(
            output, against=against or (), text=read_text(text), progress=progress
        )
    show(report, show_check, as_json)
    if not report.passed:
        raise typer.Exit(1)


@app.command(
    cls=Command,
    help="Say whether two checkpoints hold the same model, however stored; exit 1 if not.",
    epilog="Example: `moe-fast compare moe moe-fused`",
)
def compare(
    context: typer.Context,
    first: Annotated[Path, typer.Argument(metavar="A", help="A folder with a model.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    tolerance: Annotated[float, typer.Option(help="By how much numbers may differ.")] = 0.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar("comparing") as progress:
        report = moe_fast.compare_moe(first, second, tolerance=tolerance, progress=progress)
    show(report, show_comparison, as_json)
    if not report.equal:
        raise typer.Exit(1)


@app.command(
    cls=Command,
    help="Write an MoE in another layout or dtype; without a dtype, weights keep their bytes.",
    epilog="Example: `moe-fast convert moe -o moe-fused --layout fused`",
)
def convert(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder with an MoE, whoever made it.")
    ],
    output: OutputFolder,
    layout: Annotated[
        Layout | None,
        typer.Option(help="How experts are stored.", show_default="as they are"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help=CONVERT_TO,
            autocompletion=lambda: list(Dtype),
            show_default="as they are",
        ),
    ] = None,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar() as progress:
        report = moe_fast.convert_moe(
            model,
            output,
            layout=layout,
            dtype=cast(Any, dtype),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            threads=threads,
            checksum=checksum,
            fsync=fsync,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, show_conversion, as_json)


@app.command(
    cls=Command,
    help="Run an MoE over texts and write what each of its experts is worth.",
    epilog="Example: `moe-fast score moe -o scores.json --text book.txt`",
)
def score(
    context: typer.Context,
    model: MoeFolder,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="SCORES.json", help="The file to create."),
    ],
    text: TextFiles = None,
    tokens: TokensFile = None,
    length: Annotated[
        int | None,
        typer.Option(help="Cut texts after so many tokens.", show_default="what it reads, or 2048"),
    ] = None,
    mean_outputs: Annotated[
        bool, typer.Option("--mean-outputs", help="Store mean outputs; merge --scores needs them.")
    ] = False,
    gate_similarity: Annotated[
        bool,
        typer.Option("--gate-similarity", help="Store how alike routers' rows act; so does this."),
    ] = False,
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar("reading") as progress:
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


@app.command(
    cls=Command,
    help="Write an MoE with fewer experts: those of a list, or the best by their scores.",
    epilog="Example: `moe-fast prune moe -o pruned --experts 4 --scores scores.json`",
)
def prune(
    context: typer.Context,
    model: MoeFolder,
    output: OutputFolder,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="KEEP.json", help="The experts to keep in each layer."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="How many to keep in each layer, the best by --scores.")
    ] = None,
    scores: Scores = None,
    by: ScoredBy = "reap",
    ungroup: Annotated[
        bool,
        typer.Option(
            "--ungroup", metavar="", help="Make the groups of experts one; routing changes."
        ),
    ] = False,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar() as progress:
        report = moe_fast.prune_moe(
            model,
            output,
            keep=keep,
            num_experts=experts,
            scores=scores,
            by=by,
            ungroup=ungroup,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            threads=threads,
            checksum=checksum,
            fsync=fsync,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, show_operation, as_json)


@app.command(
    cls=Command,
    help="Write an MoE with copies of its experts; exact where all get as many.",
    epilog="Example: `moe-fast expand moe -o wider --experts 16`",
)
def expand(
    context: typer.Context,
    model: MoeFolder,
    output: OutputFolder,
    experts: Annotated[int, typer.Option(help="Experts of each layer of the output.")],
    keep_k: Annotated[
        bool,
        typer.Option("--keep-k", help="Leave a token's number of experts as it is."),
    ] = False,
    scores: Scores = None,
    by: ScoredBy = "reap",
    noise_scale: Annotated[
        float, typer.Option(help="Standard deviation of the noise on copies.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar() as progress:
        report = moe_fast.expand_moe(
            model,
            output,
            experts,
            keep_k=keep_k,
            scores=scores,
            by=by,
            noise_scale=noise_scale,
            seed=seed,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            threads=threads,
            checksum=checksum,
            fsync=fsync,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, show_operation, as_json)


@app.command(
    cls=Command,
    help="Write an MoE whose routers start anew, made from text or drawn.",
    epilog="Example: `moe-fast reroute moe -o even --text text.txt`",
)
def reroute(
    context: typer.Context,
    model: MoeFolder,
    output: OutputFolder,
    routers: Annotated[
        str,
        typer.Option(
            metavar="START",
            help="How they start: calibrated, clustered, normal, balanced, random, linear.",
        ),
    ] = "calibrated",
    logit_std: LogitStd = None,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar() as progress:
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
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            threads=threads,
            checksum=checksum,
            fsync=fsync,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, show_operation, as_json)


@app.command(
    cls=Command,
    help="Write the dense model that some experts of an MoE make.",
    epilog="Example: `moe-fast extract moe -o dense --expert 0`",
)
def extract(
    context: typer.Context,
    model: MoeFolder,
    output: OutputFolder,
    expert: Annotated[
        int | None, typer.Option(help="The expert that becomes the FFN of every layer.")
    ] = None,
    mean: Annotated[bool, typer.Option("--mean", help="The mean of all experts does.")] = False,
    best: Annotated[
        int | None, typer.Option(help="So many of the best by --scores do, side by side.")
    ] = None,
    copy: Annotated[
        int | None, typer.Option(help="The copy of a fine-grained model whose shards do.")
    ] = None,
    granularity: Annotated[
        int | None, typer.Option(help="Shards of a copy.", show_default="what the model says")
    ] = None,
    scores: Scores = None,
    by: ScoredBy = "reap",
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar() as progress:
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
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            threads=threads,
            checksum=checksum,
            fsync=fsync,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, show_operation, as_json)


@app.command(
    cls=Command,
    help="Write an MoE in which each group of experts is one, their mean.",
    epilog="Example: `moe-fast merge moe -o merged --groups groups.json`",
)
def merge(
    context: typer.Context,
    model: MoeFolder,
    output: OutputFolder,
    groups: Annotated[
        Path | None,
        typer.Option(metavar="GROUPS.json", help="The experts of each layer that become one."),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="How many are left in each layer, grouped by --scores.")
    ] = None,
    scores: Scores = None,
    by: ScoredBy = "reap",
    align: Annotated[
        bool, typer.Option("--align", help="Match neurons to those of each group's first expert.")
    ] = False,
    max_shard_size: MaxShardSize = "5GB",
    overwrite: Overwrite = False,
    threads: Threads = None,
    checksum: Checksum = False,
    fsync: Fsync = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context), progress_bar() as progress:
        report = moe_fast.merge_experts(
            model,
            output,
            groups,
            num_experts=experts,
            scores=scores,
            by=by,
            align=align,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            threads=threads,
            checksum=checksum,
            fsync=fsync,
            dry_run=dry_run,
            progress=progress,
        )
    show(report, show_operation, as_json)


@app.command(
    cls=Command,
    help="Write one HTML page about a model: experts, sources, sizes, routers, readers.",
    epilog="Example: `moe-fast report moe -o moe.html`",
)
def report(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder with an MoE, whoever made it.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write.", show_default="MODEL-report.html"),
    ] = None,
    with_check: Annotated[
        bool,
        typer.Option(
            "--check", metavar="", help="Check the model first; reads it and its sources."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context):
        checked = None
        if with_check:
            with progress_bar("comparing") as progress:
                checked = moe_fast.check_moe(model, progress=progress)
        file = moe_fast.write_report(model, output, check=checked)
    say(f"{file}")


@app.command(
    cls=Command,
    help="Show what is in a model: experts, sizes, dtypes, routers, copies.",
    epilog="Example: `moe-fast inspect moe`",
)
def inspect(
    context: typer.Context,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder with any model, MoE or dense.")
    ],
    copies: Annotated[
        bool,
        typer.Option(help="Find experts that are copies of each other; reads them where alike."),
    ] = True,
    hidden_states: HiddenStates = None,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    with reported_errors(context):
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


@app.command(
    cls=Command,
    help="Show which model every expert would come from, by numbers alone.",
    epilog="Example: `moe-fast plan 2 32 --experts 8`",
)
def plan(
    context: typer.Context,
    models: Annotated[int, typer.Argument(metavar="MODELS", help="Number of dense models.")],
    layers: Annotated[int, typer.Argument(metavar="LAYERS", help="Layers of each.")],
    experts: Experts = None,
    experts_per_token: ExpertsPerToken = None,
    granularity: Granularity = 1,
    hidden_size: Annotated[int, typer.Option(help="For counting parameters.")] = 0,
    intermediate_size: Annotated[int, typer.Option(help="For counting parameters.")] = 0,
    as_json: AsJson = False,
) -> None:
    with reported_errors(context):
        config = choose_config(experts, experts_per_token, granularity)
        made = moe_fast.plan_moe_construction(models, layers, config, granularity=granularity)
        report = made.report(
            hidden_size, intermediate_size, config.num_experts, granularity=granularity
        )
    if as_json:
        print_json({"plan": made.to_dict(), "report": report.to_dict()})
    else:
        show_plan(made, report)


@app.command(
    cls=Command,
    help="Write the weights of new routers to a file.",
    epilog="Example: `moe-fast gates 2048 8 -o gates.safetensors --layers 24`",
)
def gates(
    context: typer.Context,
    hidden_size: Annotated[
        int, typer.Argument(metavar="HIDDEN_SIZE", min=1, help="Width of the router's input.")
    ],
    experts: Annotated[int, typer.Argument(metavar="EXPERTS", min=1, help="Experts per layer.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to create: .npy or .safetensors.")
    ],
    layers: Annotated[int, typer.Option(min=1, help="Number of routers.")] = 1,
    init: RouterStart = RouterInit.BALANCED,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="DTYPE",
            help="float64, float32, float16 or bfloat16.",
            autocompletion=lambda: ["float64", "float32", "float16", "bfloat16"],
        ),
    ] = "float32",
    transpose: Annotated[
        bool, typer.Option(help="One row an expert, as checkpoints have it.")
    ] = True,
    remove_base: Annotated[
        bool | None,
        typer.Option(
            "--remove-base/--keep-base",
            help="Leave out the 1 / EXPERTS that all experts share, which 16 bits leave no room "
            "beside.",
            show_default="removed from balanced rows of 16 bits",
        ),
    ] = None,
    full_range: Annotated[
        bool,
        typer.Option("--full-range", help="Draw from [-s, s]; the reference fills [-s, 0]."),
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(context):
        weights = moe_fast.compute_router_weights(
            layers,
            hidden_size,
            experts,
            init,
            dtype=dtype,
            transpose=transpose,
            full_range=full_range,
            remove_base=rounds_base(init, dtype) if remove_base is None else remove_base,
        )
    with reported_errors(context, path="output"):
        nbytes = moe_fast.write_router_weights(output, weights, overwrite=overwrite)
    say(f"{output}: {layers} x {weights.shape[1]} x {weights.shape[2]} {dtype}, {nbytes:,} bytes")


@app.command(
    cls=Command,
    help="Show what routers do with saved logits: load, losses, collapse, drops.",
    epilog="Example: `moe-fast route logits.npy --experts-per-token 2 --plot load.png`",
)
def route(
    context: typer.Context,
    logits: Annotated[
        Path,
        typer.Argument(
            metavar="LOGITS",
            help="Router logits: .npy of shape [T, E] or [L, T, E], or .safetensors, a tensor a "
            "layer.",
        ),
    ],
    method: Annotated[
        RoutingMethod,
        typer.Option(
            metavar="METHOD", help="Who chooses: top_k, switch_transformer or expert_choice."
        ),
    ] = RoutingMethod.TOP_K,
    experts_per_token: Annotated[
        int | None, typer.Option(help="Experts per token.", show_default="2, for Switch 1")
    ] = None,
    scores: Annotated[
        str,
        typer.Option(
            help="What a logit becomes: softmax or sigmoid.",
            autocompletion=lambda: ["softmax", "sigmoid"],
        ),
    ] = "softmax",
    norm: Annotated[
        bool | None,
        typer.Option(help="Weights of a token sum to 1.", show_default="for top-k"),
    ] = None,
    groups: Annotated[int, typer.Option(help="Groups of experts.")] = 1,
    groups_per_token: Annotated[
        int | None, typer.Option(help="Groups that a token chooses from.", show_default="all")
    ] = None,
    capacity_factor: Annotated[
        float | None,
        typer.Option(
            help="Limits the tokens of an expert.",
            show_default="no limit for top-k, 1.25 for Switch, 1 for expert choice",
        ),
    ] = None,
    drop_policy: Annotated[
        str | None,
        typer.Option(
            help="Who stays in a full expert: position or probs.",
            autocompletion=lambda: ["position", "probs"],
            show_default="probs, for Switch position",
        ),
    ] = None,
    capacity_factors: Annotated[
        str, typer.Option(help="Show what each of these factors would drop.")
    ] = "1,1.25,1.5,2",
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(help="Tokens that share a capacity.", show_default="all of a layer"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that route.", show_default="MOE_FAST_NUM_THREADS, or 1"),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the load per layer and expert into this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    with reported_errors(context, path="logits"):
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
        with reported_errors(context, path="plot"):
            from moe_fast.drawing.plotting import save_load_picture

            save_load_picture(stats.counts, plot)
    if as_json:
        print_json(stats.to_dict() | {"layers": stats.summary()})
    else:
        show_routing(stats)


@app.command(
    cls=Command,
    help="Show which dense models become which MoEs, and which programs load those.",
)
def families(as_json: AsJson = False) -> None:
    becomes = {
        name: [target.name for target in targets_of(dense)]
        for name, dense in dense_families().items()
    }
    readers = {name: list(readers_of(moe)) for name, moe in moe_families().items()}
    if as_json:
        print_json({"becomes": becomes, "readers": readers, "fit_nothing": UNFIT})
    else:
        show_families(becomes, readers, UNFIT)


@app.command(
    cls=Command, help="Show what is installed, which kernels run, and what is missing for what."
)
def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    with reported_errors(context):
        diagnosis = moe_fast.diagnose()
    show(diagnosis, show_diagnosis, as_json)


@app.command(
    cls=Command,
    help="Make two small dense models, dense-a and dense-b, build moe from them, check it.",
)
def demo(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder to make them in.")
    ] = Path("demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo in FOLDER.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    from moe_fast.demo import make_demo  # loads builder and check, which other commands do without

    with reported_errors(context):
        built, checked = make_demo(folder, overwrite=overwrite)
    if as_json:
        print_json({"build": built.to_dict(), "check": checked.to_dict()})
    else:
        show_build(built)
        show_check(checked)
    if not checked.passed:
        raise typer.Exit(1)


def rounds_base(init: RouterInit, dtype: str) -> bool:
    """Whether the noise of a start is lost beside its base: in 16 bits, as in builds."""
    return init is RouterInit.BALANCED and dtype.endswith("16")


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


def text_files(files: Sequence[Path] | None) -> list[Path]:
    """The files of text, whose names never stand for texts here."""
    return list(files or ())


def open_states(file: Path | None) -> Any:
    from moe_fast.storage.npy import map_npy

    return None if file is None else map_npy(file)


def show(report: AnyReport, as_table: Callable[[AnyReport], None], as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict())
    else:
        as_table(report)


def print_json(values: Mapping[str, Any]) -> None:
    typer.echo(json_document(values))


@contextmanager
def reported_errors(
    context: typer.Context, in_recipe: Sequence[str] = (), **called: str
) -> Iterator[None]:
    """Turn an error of this package or of the system into a message and an exit code.

    The code is 2 if the value of an option is wrong, and 1 otherwise. The message names the option,
    unless a recipe says its value; `called` has the options of arguments with other names.
    """
    try:
        yield
    except MoeFastError as error:
        parameters = [each for each in context.command.params if each.name not in in_recipe]
        options = option_names(parameters, called)
        problems = [in_options(problem, options) for problem in error.problems]
        complain(f"error: {list_problems(problems)}")
        fail(error, 2 if any(is_about_option(each, options) for each in error.problems) else 1)
    except (ImportError, MemoryError, OSError) as error:
        complain(f"error: {error}")
        fail(error, 1)
    except KeyboardInterrupt as error:
        complain("interrupted")
        fail(error, 130)  # as shells do: 128 and the number of the signal


def fail(error: BaseException, code: int) -> NoReturn:
    for note in getattr(error, "__notes__", ()):
        complain(note)
    raise typer.Exit(code) from None


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
