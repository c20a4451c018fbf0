"""The commands that plan and build an MoE.

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
    Experts,
    ExpertsPerToken,
    Granularity,
    HiddenStates,
    LogitStd,
    OutputFolder,
    Overwrite,
    Quiet,
    RouterStart,
    TextFiles,
    TokensFile,
    TokensUsed,
    Writing,
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
from moe_fast.command.declaration import (
    GROW,
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
from moe_fast.config import Dtype, Layout, RouterInit, choose_config
from moe_fast.errors import MoeConfigError
from moe_fast.families.registry import moe_families
from moe_fast.recipes.document import is_recipe
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


@command(
    GROW,
    help="Build a Mixture-of-Experts checkpoint from dense models or from a recipe.",
    epilog="Example: `moe-fast build Qwen/Qwen3-0.6B -o moe --experts 8`",
)
def build(
    call: Call,
    *,
    models: Annotated[
        list[Path],
        Argument(
            metavar="MODEL",
            help="Dense models or LoRA adapters: folders, names on the Hub, or "
            "MODEL+ADAPTER. Or one recipe, a YAML file.",
        ),
    ],
    output: OutputFolder,
    experts: Experts = None,
    experts_per_token: ExpertsPerToken = None,
    target: Annotated[
        str,
        Option(
            metavar="FAMILY",
            help=lambda: f"auto, {', '.join(moe_families())}.",
            autocompletion=lambda: ["auto", *moe_families()],
        ),
    ] = "auto",
    layout: Annotated[
        Layout | None,
        Option(help="How experts are stored.", show_default="per-expert, if the family has it"),
    ] = None,
    dtype: Annotated[
        str | None,
        Option(
            metavar="DTYPE",
            help=CONVERT_TO,
            autocompletion=lambda: list(Dtype),
            show_default="the sources'",
        ),
    ] = None,
    base: Annotated[
        Path | None,
        Option(
            help="The model to take attention, embeddings, norms and tokenizer from.",
            show_default="the first model",
        ),
    ] = None,
    dense_layers: Annotated[
        str,
        Option(metavar="LAYERS", help="Layers without experts, such as 0,5 or 0-3."),
    ] = "",
    routers: Annotated[
        str,
        Option(
            metavar="START",
            help=lambda: f"How routers are initialised: {', '.join(ROUTER_METHODS)}.",
            autocompletion=lambda: list(ROUTER_METHODS),
        ),
    ] = "auto",
    seed: Annotated[int, Option(help="Seed of all random numbers.")] = 0,
    granularity: Granularity = 1,
    mix_copies: Annotated[
        bool,
        Option(
            "--mix-copies",
            help="Put all experts in one group, so that tokens can mix parts of copies.",
        ),
    ] = False,
    shuffle: Annotated[
        bool,
        Option("--shuffle", help="Shuffle the neurons of each copy before they are split."),
    ] = False,
    reinit: Annotated[
        float,
        Option(
            metavar="FRACTION",
            help="Fraction of each expert's neurons to reinitialise, such as 0.5.",
        ),
    ] = 0.0,
    reinit_sets: Annotated[
        str,
        Option(
            metavar="SETS",
            help="shared: the same neurons in gate, up and down; separate: different ones in each.",
            autocompletion=lambda: ["shared", "separate"],
        ),
    ] = "shared",
    split: Annotated[
        str | None,
        Option(
            metavar="WAY",
            help="Make all experts from one FFN, without copies: contiguous, random or clustered.",
            autocompletion=lambda: ["contiguous", "random", "clustered"],
            show_default="copies",
        ),
    ] = None,
    backbone: Annotated[
        str,
        Option(
            metavar="MEAN",
            help="The weights outside the experts: those of the base (base), the mean of"
            " the models (mean), or a weighted mean, such as 2,1,1.",
            autocompletion=lambda: ["base", "mean"],
        ),
    ] = "base",
    logit_std: LogitStd = None,
    text: TextFiles = None,
    tokens: TokensFile = None,
    tokens_used: TokensUsed = None,
    device: Device = "cpu",
    hidden_states: HiddenStates = None,
    writing: Writing,
) -> None:
    from_recipe = any(is_recipe(model) for model in models)
    if from_recipe:
        with reported_errors(call):
            refuse_beside_a_recipe(call, models)
    in_recipe = OPTIONS_OF_MODELS if from_recipe else ()
    with reported_errors(call, in_recipe), progress_bar() as progress:
        how = {
            **writing.of_functions(),
            "hidden_states": open_states(hidden_states),
            "progress": progress,
        }
        if from_recipe:
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
    show(report, show_build, writing.as_json)


def refuse_beside_a_recipe(call: Call, models: list[Path]) -> None:
    """Raise for models and their options beside a recipe, which says all that itself."""
    if len(models) > 1:
        raise MoeConfigError(
            "must be the recipe alone: it names its models itself", argument="models"
        )
    for name in OPTIONS_OF_MODELS:
        if name in call.given:
            raise MoeConfigError("is for models; write it into the recipe", argument=name)


@command(
    GROW,
    help="Show which model each expert would come from, without reading any model.",
    epilog="Example: `moe-fast plan 2 32 --experts 8`",
)
def plan(
    call: Call,
    *,
    models: Annotated[int, Argument(metavar="MODELS", help="Number of dense models.")],
    layers: Annotated[int, Argument(metavar="LAYERS", help="Number of layers of each.")],
    experts: Experts = None,
    experts_per_token: ExpertsPerToken = None,
    granularity: Granularity = 1,
    hidden_size: Annotated[int, Option(help="To estimate the parameters.")] = 0,
    intermediate_size: Annotated[int, Option(help="To estimate the parameters.")] = 0,
    as_json: AsJson = False,
) -> None:
    with reported_errors(call):
        config = choose_config(experts, experts_per_token, granularity)
        made = moe_fast.plan_moe_construction(models, layers, config, granularity=granularity)
        report = made.report(
            hidden_size, intermediate_size, config.num_experts, granularity=granularity
        )
    if as_json:
        print_json({"plan": made.to_dict(), "report": report.to_dict()})
    else:
        show_plan(made, report)


@command(
    GROW,
    help="Write initial router weights to a file.",
    epilog="Example: `moe-fast gates 2048 8 -o gates.safetensors --layers 24`",
)
def gates(
    call: Call,
    *,
    hidden_size: Annotated[
        int, Argument(metavar="HIDDEN_SIZE", min=1, help="Width of the router's input.")
    ],
    experts: Annotated[int, Argument(metavar="EXPERTS", min=1, help="Experts per layer.")],
    output: Annotated[
        Path, Option("--output", "-o", help="The file to create: .npy or .safetensors.")
    ],
    layers: Annotated[int, Option(min=1, help="Number of routers.")] = 1,
    init: RouterStart = RouterInit.BALANCED,
    dtype: Annotated[
        str,
        Option(
            metavar="DTYPE",
            help="float64, float32, float16 or bfloat16.",
            autocompletion=lambda: ["float64", "float32", "float16", "bfloat16"],
        ),
    ] = "float32",
    transpose: Annotated[bool, Option(help="Write one row per expert, as checkpoints do.")] = True,
    remove_base: Annotated[
        bool | None,
        Option(
            "--remove-base/--keep-base",
            help="Leave out the constant 1 / EXPERTS, beside which the noise is lost in 16 bits.",
            show_default="removed if balanced and in 16 bits",
        ),
    ] = None,
    full_range: Annotated[
        bool,
        Option("--full-range", help="Draw from [-s, s]; the reference fills [-s, 0]."),
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    with reported_errors(call):
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
    with reported_errors(call, path="output"):
        nbytes = moe_fast.write_router_weights(output, weights, overwrite=overwrite)
    say(f"{output}: {layers} x {weights.shape[1]} x {weights.shape[2]} {dtype}, {nbytes:,} bytes")


def rounds_base(init: RouterInit, dtype: str) -> bool:
    """Whether the noise of a start is lost beside its base: in 16 bits, as in builds."""
    return init is RouterInit.BALANCED and dtype.endswith("16")


@command(
    GROW,
    help="Show which dense models become which MoEs, and which programs load them.",
)
def families(call: Call, *, as_json: AsJson = False) -> None:
    from moe_fast.families.choice import UNFIT, targets_of
    from moe_fast.families.readers import readers_of
    from moe_fast.families.registry import dense_families

    becomes = {
        name: [target.name for target in targets_of(dense)]
        for name, dense in dense_families().items()
    }
    readers = {name: list(readers_of(moe)) for name, moe in moe_families().items()}
    if as_json:
        print_json({"becomes": becomes, "readers": readers, "fit_nothing": UNFIT})
    else:
        show_families(becomes, readers, UNFIT)


@command(
    GROW,
    help="Make two small dense models, build an MoE from them, and check it.",
)
def demo(
    call: Call,
    *,
    folder: Annotated[Path, Argument(metavar="FOLDER", help="The folder to make them in.")] = Path(
        "demo"
    ),
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace an earlier demo in FOLDER.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    from moe_fast.demo import make_demo  # loads builder and check, which other commands do without

    with reported_errors(call):
        built, checked = make_demo(folder, overwrite=overwrite)
    if as_json:
        print_json({"build": built.to_dict(), "check": checked.to_dict()})
    else:
        show_build(built)
        show_check(checked)
    if not checked.passed:
        raise SystemExit(1)


@command(
    GROW,
    help="Copy the example scripts: train an upcycled model, prune by scores, route by kind.",
    epilog="Example: `moe-fast examples && python examples/train_upcycled.py`",
)
def examples(
    call: Call,
    *,
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="The folder to copy them into.")
    ] = Path("examples"),
) -> None:
    from moe_fast.command.examples import copy_examples

    with reported_errors(call):
        for file in copy_examples(folder):
            say(f"{file}")
