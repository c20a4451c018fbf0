"""What a build is asked for: its arguments, checked, and its models, found."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast, get_args

from moe_fast.checkpoint.card import model_name
from moe_fast.checkpoint.construction import Split
from moe_fast.checks import (
    as_choice,
    as_flag,
    as_fraction,
    as_index,
    as_member,
    as_number,
    as_path_text,
    as_size,
    collect,
)
from moe_fast.config import Dtype, Layout, LayoutName, MoeConfig, choose_config
from moe_fast.dtypes import as_weight_dtype
from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError, Problem
from moe_fast.families.choice import as_target_name
from moe_fast.models.adapters import is_adapter, named_base
from moe_fast.models.folder import read_config
from moe_fast.plan import as_granularity
from moe_fast.records import dataclass
from moe_fast.request import (
    DEFAULT_SHARD_SIZE,
    TEXT_FILES,
    ExpertSource,
    ModelPath,
    Request,
    RouterMethod,
    RouterStart,
    as_texts,
    choose_start,
)
from moe_fast.storage.hub import ADAPTER_CONFIG, REPOSITORY, find_model

if TYPE_CHECKING:
    from moe_fast.calibration.texts import TokenArrays
    from moe_fast.dtypes import DtypeLike

ReinitSets = Literal["shared", "separate"]
Backbone = Literal["base", "mean"]

__all__ = ["BuildRequest"]


@dataclass(frozen=True)
class BuildRequest(Request):
    """One MoE to build, in plain values: strings, numbers, tuples, enumerations, dataclasses.

    Expert `e` is made as `models[e % len(models)]` says; `base` is a folder. `seed` is that of
    noise and of drawn routers. `dense_layers` have the base's FFN in place of experts. A new field
    needs no code here to be kept and read back.
    """

    operation: ClassVar[str] = "build"

    models: tuple[ExpertSource, ...]
    base: str
    config: MoeConfig = field(default_factory=MoeConfig)
    target: str = "auto"
    layout: Layout | None = None
    dtype: Dtype | None = None
    shared_experts: tuple[ExpertSource, ...] = ()
    dense_layers: tuple[int, ...] = ()
    routers: RouterStart = field(default_factory=RouterStart)
    seed: int = 0
    granularity: int = 1
    mix_copies: bool = False
    shuffle: bool = False
    reinit: float = 0.0
    reinit_sets: ReinitSets = "shared"
    split: Split | None = None
    backbone: Backbone = "base"
    backbone_weights: tuple[float, ...] = ()
    """Of the models in their mean, one each; none: all count the same."""
    max_shard_size: int = DEFAULT_SHARD_SIZE

    @property
    def num_experts(self) -> int:
        return self.config.num_experts

    def folders(self) -> list[str]:
        experts = (*self.models, *self.shared_experts)
        return list(dict.fromkeys([*(f for expert in experts for f in expert.folders), self.base]))

    def moved(self, now: Mapping[str, str]) -> BuildRequest:
        return replace(
            self,
            models=tuple(expert.moved(now) for expert in self.models),
            shared_experts=tuple(expert.moved(now) for expert in self.shared_experts),
            base=now[self.base],
        )

    @property
    def shards(self) -> int:
        """In how many experts each FFN is split."""
        return self.config.num_experts if self.split else self.granularity

    @property
    def row_repeats(self) -> int:
        """How many experts start with the same row of the router.

        The shards of a copy do, to be chosen together. So do the parts of one FFN where a token
        goes through all: equal weights are what makes their sum the whole.
        """
        if self.split and self.config.num_experts_per_tok < self.config.num_experts:
            return 1
        return self.shards

    def validate(self) -> None:
        self.config.validate()
        as_granularity(self.granularity, self.config.num_experts)
        as_fraction(self.reinit, "reinit")
        check_split(self)


def as_request(
    models: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource],
    config: MoeConfig | None,
    target: str,
    layout: Layout | LayoutName | None,
    dtype: DtypeLike | None,
    base: ModelPath | None,
    shared_experts: ModelPath | ExpertSource | Sequence[ModelPath | ExpertSource],
    dense_layers: Iterable[int],
    routers: RouterMethod | RouterStart,
    said: Mapping[str, Any],
    seed: int,
    granularity: int,
    mix_copies: bool,
    shuffle: bool,
    reinit: float,
    reinit_sets: ReinitSets,
    split: Split | None,
    backbone: Backbone | Sequence[float],
    max_shard_size: int | str,
) -> BuildRequest:
    """The arguments of a build, each checked."""
    granularity = as_index(granularity, "granularity", minimum=1)
    if config is None:
        config = choose_config(None, None, granularity)
    if not isinstance(config, MoeConfig):
        raise ArgumentTypeError(f"must be a MoeConfig, got {config!r}", argument="config")
    config = config.with_granularity(granularity)
    config.validate()
    experts = as_expert_sources(models, "models")
    if not experts:
        raise MoeConfigError("must name at least one model", argument="models")
    backbone, backbone_weights = as_backbone(backbone, len(experts))
    request = BuildRequest(
        models=experts,
        base=experts[0].model if base is None else as_path_text(base, "base"),
        config=config,
        target=as_target_name(target),
        layout=None if layout is None else as_member(layout, Layout, "layout"),
        dtype=None if dtype is None else as_weight_dtype(dtype, "dtype"),
        shared_experts=as_expert_sources(shared_experts, "shared_experts"),
        dense_layers=as_layers(dense_layers),
        routers=choose_start(
            routers,
            said,
            experts,
            num_rows=config.num_experts // granularity,
            parts=split is not None,
        ),
        seed=as_index(seed, "seed"),
        granularity=as_granularity(granularity, config.num_experts),
        mix_copies=as_flag(mix_copies, "mix_copies"),
        shuffle=as_flag(shuffle, "shuffle"),
        reinit=as_fraction(reinit, "reinit"),
        reinit_sets=cast(ReinitSets, as_choice(reinit_sets, get_args(ReinitSets), "reinit_sets")),
        split=None if split is None else cast(Split, as_choice(split, get_args(Split), "split")),
        backbone=backbone,
        backbone_weights=backbone_weights,
        max_shard_size=as_size(max_shard_size, "max_shard_size"),
    )
    check_split(request)
    return request


def check_split(request: BuildRequest) -> None:
    """Raise `MoeConfigError` for what does not go with `split`."""
    if request.split is None:
        return
    problems = []
    if request.granularity > 1:
        what = f"splits one FFN into all experts; leave out granularity {request.granularity}"
        problems.append(Problem(what, argument="split"))
    if request.shuffle:
        what = "says by itself which neurons go where; leave out shuffle"
        problems.append(Problem(what, argument="split"))
    if len(request.models) != 1:
        what = f"splits the FFNs of one model, got {len(request.models)} models"
        problems.append(Problem(what, argument="split"))
    if request.routers.from_prompts:
        what = f"{request.routers.method!r} makes one row of a model's prompts, and split has one"
        problems.append(Problem(f"{what} model for all experts", argument="routers"))
    if problems:
        raise MoeConfigError(*problems)


def as_expert_sources(models: Any, name: str) -> tuple[ExpertSource, ...]:
    """The argument `models` or `shared_experts`."""
    if isinstance(models, (str, os.PathLike, ExpertSource)):
        models = [models]
    if not isinstance(models, Iterable):
        raise ArgumentTypeError(
            f"must be a model or a list of models, got {models!r}", argument=name
        )
    return tuple(
        model if isinstance(model, ExpertSource) else as_expert_source(as_path_text(model, name))
        for model in models
    )


def as_expert_source(text: str) -> ExpertSource:
    """A model, or what mergekit writes as `MODEL+ADAPTER`; a folder of that name wins."""
    model, plus, lora = text.rpartition("+")
    is_named = is_folder(model) or REPOSITORY.fullmatch(lora) is not None
    if plus and model and is_named and not os.path.lexists(text):
        return ExpertSource(model, lora=lora)
    return ExpertSource(text)


def located(request: BuildRequest) -> BuildRequest:
    """The request for the folders of its models, fetched where need be, adapters with theirs.

    Raises
    ------
    CheckpointError
        For every model that is nowhere, and every adapter that is for another base.
    """
    request = request.moved(collect(find_model, request.folders()))
    base = request.base
    if is_adapter(Path(base)):
        base = collect(find_named_base, [base])[base]
    problems: list[str] = []

    def with_base(source: ExpertSource) -> ExpertSource:
        if source.lora is not None:
            problems.extend(foreign_adapter(source.lora, source.model))
        elif is_adapter(Path(source.model)):
            problems.extend(foreign_adapter(source.model, base, by_name=True))
            return replace(source, model=base, lora=source.model)
        return source

    models, shared = (
        tuple(map(with_base, sources)) for sources in (request.models, request.shared_experts)
    )
    if problems:
        raise CheckpointError(*dict.fromkeys(problems))
    return replace(request, models=models, shared_experts=shared, base=base)


def find_named_base(adapter: str) -> str:
    """The folder of the model that an adapter says it was trained on."""
    name = named_base(Path(adapter))
    file = Path(adapter) / ADAPTER_CONFIG
    advice = "name the base, or write BASE+ADAPTER"
    if not name:
        raise CheckpointError(f"names no base_model_name_or_path; {advice}", file=file)
    if is_share(name):
        raise CheckpointError(f"its base {name!r} is on a network share; {advice}", file=file)
    try:
        folder = find_model(name)
    except CheckpointError as error:
        raise CheckpointError(f"its base is not here: {error}; {advice}", file=file) from None
    if not is_folder(folder):
        raise CheckpointError(f"its base {name!r} is not here; {advice}", file=file)
    return folder


def foreign_adapter(adapter: str, base: str, by_name: bool = False) -> Iterator[Problem]:
    """That an adapter was trained on another model than `base`, if it says so.

    What it names may have been a folder of another machine: `by_name`, the last part must then be
    that of `base`.
    """
    name = named_base(Path(adapter))
    is_here = not is_share(name) and is_folder(name)
    if is_here:
        same = Path(base).exists() and Path(name).samefile(base)
    else:
        ends = {Path(each).name.casefold() for each in (base, model_name(base), stated_name(base))}
        same = not by_name or not name or Path(name).name.casefold() in ends
    if not same:
        may_be = by_name and not is_here
        advice = f"; if that is the same model, write {base}+{adapter}" if may_be else ""
        what = f"is an adapter for {name!r}, not for {base}{advice}"
        yield Problem(what, file=Path(adapter) / ADAPTER_CONFIG)


def is_folder(name: str) -> bool:
    return os.path.isdir(name)  # noqa: PTH112  pathlib raises OSError for a long name


def is_share(name: str) -> bool:
    """Whether a name is that of a network share: a look would send it the user's credentials."""
    return name.startswith(("//", "\\\\"))


def stated_name(model: str) -> str:
    """What a model's config.json says that it is called; empty where it says nothing."""
    try:
        name = read_config(Path(model)).get("_name_or_path")
    except CheckpointError:  # whoever opens it says so
        return ""
    return name if isinstance(name, str) else ""


def said_of_routers(
    logit_std: float | None = None,
    texts: ModelPath | Sequence[ModelPath] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """What arguments say of a start, by the names that `RouterStart` has for it."""
    if not (tokens is None or isinstance(tokens, (str, os.PathLike))):
        from moe_fast.calibration.texts import TokensInMemory

        tokens = TokensInMemory.of(tokens)
    said: dict[str, Any] = {
        "logit_std": logit_std,
        "texts": as_texts(texts) or None,
        "tokens": tokens,
        "tokens_used": tokens_used,
        "device": device,
    }
    return {name: value for name, value in said.items() if value is not None}


def as_layers(layers: Any) -> tuple[int, ...]:
    """The argument `dense_layers`: each layer once, in order."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ArgumentTypeError(f"must list layers, got {layers!r}", argument="dense_layers")
    return tuple(sorted({as_index(layer, "dense_layers") for layer in layers}))


def as_backbone(backbone: Any, num_models: int) -> tuple[Backbone, tuple[float, ...]]:
    """The argument `backbone`: whose it is, and the weights of the models if they have some."""
    if isinstance(backbone, str) or not isinstance(backbone, Iterable):
        return cast(Backbone, as_choice(backbone, get_args(Backbone), "backbone")), ()
    weights = tuple(as_number(weight, "backbone") for weight in backbone)
    if (
        len(weights) != num_models
        or not all(0 <= w < math.inf for w in weights)
        or not any(weights)
    ):
        raise MoeConfigError(
            f"must be 'base', 'mean' or a weight of at least 0 for each of the {num_models} "
            f"models, got {list(weights)}",
            argument="backbone",
        )
    return "mean", weights


def request_values(request: BuildRequest) -> dict[str, Any]:
    """The keys of the recipe that asks for the same."""
    special = {
        "granularity": request.granularity,
        "mix_copies": request.mix_copies,
        "shuffle": request.shuffle,
        "reinit": request.reinit,
        "reinit_sets": request.reinit_sets,
        "split": request.split,
        "backbone": list(request.backbone_weights) or request.backbone,
    }
    return {
        "base_model": request.base,
        "models": [replace(each, texts=names_of(each.texts)) for each in request.models],
        "num_experts": request.config.num_experts,
        "experts_per_token": request.config.num_experts_per_tok,
        "shared_experts": request.shared_experts,
        "dense_layers": list(request.dense_layers),
        "target": request.target,
        "layout": request.layout,
        "dtype": request.dtype,
        "routers": request.routers.method,
        **{
            name: value
            for name, value in name_files(request.routers).items()
            if value not in (getattr(RouterStart, name), [])
        },
        "seed": request.seed,
        **{name: value for name, value in special.items() if value != getattr(BuildRequest, name)},
    }


def name_files(start: RouterStart) -> dict[str, Any]:
    """What a recipe says of a start besides its method, files without their folders."""
    values = {name: value for name, value in vars(start).items() if name != "method"}
    tokens = None if start.tokens is None else Path(start.tokens).name
    return values | {"texts": list(names_of(start.texts)), "tokens": tokens}


def names_of(texts: Iterable[str]) -> tuple[str, ...]:
    """Files of text without their folders, which are nobody else's; texts as they are."""
    return tuple(Path(text).name if text.endswith(TEXT_FILES) else text for text in texts)
