"""The commands that plan and build an MoE.

Each parses, calls one function of the package and shows what it returns; it decides nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

import moe_fast
from moe_fast.command.application import (
    GROW,
    Command,
    app,
)
from moe_fast.command.arguments import (
    CONVERT_TO,
    AsJson,
    Checksum,
    Device,
    DryRun,
    Experts,
    ExpertsPerToken,
    Fsync,
    Granularity,
    HiddenStates,
    LogitStd,
    MaxShardSize,
    OutputFolder,
    Overwrite,
    Quiet,
    RouterStart,
    TextFiles,
    Threads,
    TokensFile,
    TokensUsed,
    open_states,
    parse_backbone,
    parse_layers,
    text_files,
)
from moe_fast.command.console import (
    progress_bar,
    say,
    show_build,
    show_check,
    show_families,
    show_plan,
)
from moe_fast.command.examples import copy_examples
from moe_fast.command.outcome import (
    print_json,
    reported_errors,
    show,
)
from moe_fast.config import Dtype, Layout, RouterInit, choose_config
from moe_fast.families.choice import UNFIT, targets_of
from moe_fast.families.readers import readers_of
from moe_fast.families.registry import dense_families, moe_families
from moe_fast.request import ROUTER_METHODS, RouterMethod

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


@app.command(
    cls=Command,
    rich_help_panel=GROW,
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
    ] = "auto",
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
    rich_help_panel=GROW,
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
    rich_help_panel=GROW,
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


def rounds_base(init: RouterInit, dtype: str) -> bool:
    """Whether the noise of a start is lost beside its base: in 16 bits, as in builds."""
    return init is RouterInit.BALANCED and dtype.endswith("16")


@app.command(
    cls=Command,
    rich_help_panel=GROW,
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
    cls=Command,
    rich_help_panel=GROW,
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


@app.command(
    cls=Command,
    rich_help_panel=GROW,
    help="Copy the example scripts: train an upcycled model, prune by scores, route by kind.",
    epilog="Example: `moe-fast examples && python examples/train_upcycled.py`",
)
def examples(
    context: typer.Context,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="The folder to copy them into.")
    ] = Path("examples"),
) -> None:
    with reported_errors(context):
        for file in copy_examples(folder):
            say(f"{file}")
