"""Recipe files, ours and mergekit-moe's, as one build request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from moe_fast.checkpoint.build import BuildReport, build
from moe_fast.checkpoint.build_request import Backbone, BuildRequest, located
from moe_fast.checkpoint.output import Writing
from moe_fast.checks import as_path, as_size
from moe_fast.config import Dtype, MoeConfig, choose_config
from moe_fast.errors import CheckpointError, MoeConfigError, RecipeError
from moe_fast.models.folder import read_config
from moe_fast.plain import Mistakes, decode
from moe_fast.progress import Progress
from moe_fast.recipes.document import Document
from moe_fast.recipes.keys import GATE_MODES, ExpertKeys, RecipeKeys
from moe_fast.records import dataclass
from moe_fast.reports import Report
from moe_fast.request import (
    DEFAULT_SHARD_SIZE,
    FROM_TEXT,
    ExpertSource,
    RouterMethod,
    RouterStart,
    choose_start,
)
from moe_fast.storage.hub import find_model

if TYPE_CHECKING:
    from concurrent.futures import Executor

__all__ = ["Recipe", "build_recipe", "read_recipe"]
OF_MERGEKIT_YAML = (
    "chat_template", "merge_method", "modules", "name", "out_dtype", "parameters", "slices",
    "tokenizer", "tokenizer_source",
)  # fmt: skip
# Keys that people leave in, and what to say of them.
REFUSED = {
    **dict.fromkeys(
        OF_MERGEKIT_YAML, "is a key of mergekit-yaml, which mergekit-moe passes over; leave it out"
    ),
    "router_init": "is now called routers",
}


# Keys that mean what the request's fields of these names mean.
OPTIONS = ("granularity", "mix_copies", "shuffle", "reinit", "reinit_sets", "split")
OF_ROUTERS = ("logit_std", "texts", "tokens", "tokens_used", "device")


@dataclass(frozen=True)
class Recipe(Report):
    """What a recipe asks for.

    Attributes
    ----------
    request : BuildRequest
        The arguments of the build, as attributes.
    notes : tuple of str
        The keys of the recipe that have no effect, and why.
    """

    request: BuildRequest
    notes: tuple[str, ...] = ()


def build_recipe(
    recipe: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    hidden_states: npt.ArrayLike | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> BuildReport:
    """Build the checkpoint that a recipe file asks for.

    `recipe` is a YAML file of any name. The other arguments are those of `build_moe`.

    Returns
    -------
    BuildReport

    Raises
    ------
    RecipeError
        With every problem of the recipe, each with its line; nothing has been written then.
    CheckpointError
        If the models cannot be combined.
    ModuleNotFoundError
        Without PyYAML: `pip install "moe-fast[recipes]"`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from moe_fast import build_recipe, make_dense_model
    >>> folder = Path(tempfile.mkdtemp())
    >>> make_dense_model(folder / "dense", seed=0)
    >>> text = f"models: [{folder.as_posix()}/dense]\\nnum_experts: 4\\n"
    >>> _ = (folder / "recipe.yml").write_text(text)
    >>> build_recipe(folder / "recipe.yml", folder / "moe").num_experts
    4
    """
    file = as_path(recipe, "recipe")
    read = read_recipe(file)
    size = as_size(max_shard_size, "max_shard_size")
    request = replace(read.request, max_shard_size=size)
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    return build(request, output, writing, read.notes, hidden_states, file)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file of moe-fast or mergekit-moe. No weight is read.

    Models that are named as on the Hugging Face Hub are downloaded into its cache, if nothing else
    in the recipe is wrong.

    Returns
    -------
    Recipe

    Raises
    ------
    RecipeError
        With every problem, each with its line, its key and what would be right.
    ModuleNotFoundError
        Without PyYAML: `pip install "moe-fast[recipes]"`.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from moe_fast import make_dense_model, read_recipe
    >>> folder = Path(tempfile.mkdtemp())
    >>> make_dense_model(folder / "dense", seed=0)
    >>> text = f"models: [{folder.as_posix()}/dense]\\nseed: 7\\n"
    >>> _ = (folder / "recipe.yml").write_text(text)
    >>> read_recipe(folder / "recipe.yml").request.seed
    7
    """
    document = Document(as_path(path, "path"))
    keys = read_keys(document)
    request = located(as_request(keys, find_folders(keys, document)))
    return Recipe(request, tuple(document.locate(find_unused(keys))))


def read_keys(document: Document) -> RecipeKeys:
    """The keys of a recipe. Raises `RecipeError` with all mistakes in them."""
    values = document.value
    mistakes: Mistakes = []
    if isinstance(values, dict):
        refuse_mergekit_yaml(values, document)
        mistakes += [(key, REFUSED[key]) for key in values if key in REFUSED]
        values = {key: value for key, value in values.items() if key not in REFUSED}
    try:
        keys: RecipeKeys = decode(values, RecipeKeys, "", mistakes)
    except RecursionError:  # models in models
        raise RecipeError("is nested too deep", file=document.file) from None
    if keys is not None:
        mistakes += find_mistakes(keys)
    if problems := document.locate(mistakes):
        raise RecipeError(*problems)
    return keys


def refuse_mergekit_yaml(values: dict[str, Any], document: Document) -> None:
    """Raise `RecipeError` for a recipe that merges models into a dense one."""
    found: list[str] = [key for key in ("merge_method", "slices", "modules") if key in values]
    models = values.get("models")
    if isinstance(models, list) and any("parameters" in m for m in models if isinstance(m, dict)):
        found.append("models")
    if found and "experts" not in values:
        reason = (
            "this is a recipe of mergekit-yaml, which merges models into one dense model; run "
            f"`mergekit-yaml {document.file} merged` first, then build from the folder merged"
        )
        raise RecipeError(*document.locate([(found[0], reason)]))


def find_mistakes(keys: RecipeKeys) -> Iterator[tuple[str, str]]:
    """What no key can say by itself."""
    experts, config = keys.experts, as_config(keys)
    listed = "models" if experts is None else "experts"
    if getattr(keys, listed) is None:
        yield "", "experts is missing, or models to take in turn"
        return
    if experts is not None and keys.base_model is None:
        yield "", "base_model is missing"
    if experts is not None and keys.num_experts is not None:
        yield "num_experts", "experts lists them; leave this out"
    for key, other in (("experts", "models"), ("gate_mode", "routers"), ("architecture", "target")):
        if getattr(keys, key) is not None and getattr(keys, other) is not None:
            yield other, f"stands beside {key}; give one of them"
    if config.num_experts_per_tok > config.num_experts:
        where = listed if keys.experts_per_token is None else "experts_per_token"
        default = " by default" if keys.experts_per_token is None else ""
        yield (
            where,
            (
                f"{config.num_experts_per_tok} experts per token{default}, but there are only "
                f"{config.num_experts}"
            ),
        )
    yield from find_wrong_options(keys, config)
    _, said = choose_routers(keys)
    try:
        start = as_router_start(keys)
    except MoeConfigError as error:
        yield error.problems[0].argument or "texts", error.problems[0].what
        return
    if start.from_prompts:
        yield from find_missing_prompts(keys, listed, said)


def find_wrong_options(keys: RecipeKeys, config: MoeConfig) -> Iterator[tuple[str, str]]:
    """Options that do not go with the number of experts or of models."""
    if keys.granularity and config.num_experts % keys.granularity:
        yield "granularity", f"must divide {config.num_experts}, the number of experts"
    models = keys.experts or keys.models or ()
    if keys.split is not None:
        if (keys.granularity or 1) > 1 or keys.shuffle:
            yield "split", "splits one FFN into all experts; leave out granularity and shuffle"
        if len(models) != 1 or keys.experts is not None:
            yield "split", "splits the FFNs of one model; give models with one, and num_experts"
    if isinstance(keys.backbone, tuple) and (
        len(keys.backbone) != len(models) or not any(keys.backbone)
    ):
        yield "backbone", f"must be base, mean or a weight for each of the {len(models)} models"


def find_missing_prompts(keys: RecipeKeys, listed: str, said: str) -> Iterator[tuple[str, str]]:
    """Why the prompts do not make routers: there are none, or they are all the same."""
    experts = list_experts(keys, listed)
    for where, expert in experts.items():
        if expert.positive_prompts is None:
            yield where, f"positive_prompts is missing, which {said} needs"
        elif not expert.positive_prompts:
            yield f"{where}.positive_prompts", f"is empty, and {said} makes routers from it"
    prompts = {(expert.positive_prompts, expert.negative_prompts) for expert in experts.values()}
    if len(experts) > 1 and len(prompts) == 1 and all(positive for positive, _ in prompts):
        yield f"{listed}[1]", "all experts have the same prompts; no router can tell them apart"
    shared = keys.shared_experts or ()
    if len({expert.positive_prompts is None for expert in shared}) > 1:
        yield "shared_experts", "some have prompts and others do not; give them to all or to none"


def find_unused(keys: RecipeKeys) -> Mistakes:
    """The first prompts, if no router is made from prompts, and the first texts of an expert."""
    method, said = choose_routers(keys)

    def find(what: str, *names: str) -> Mistakes:
        return [
            (f"{where}.{name}", f"{what} have no effect with {said}")
            for where, expert in list_experts(keys, "experts", "models", "shared_experts").items()
            for name in names
            if getattr(expert, name)
        ][:1]

    prompts = find("prompts", "positive_prompts", "negative_prompts")
    texts = find("texts of an expert", "texts")
    return [
        *([] if RouterStart(method).from_prompts else prompts),
        *([] if method in ("auto", *FROM_TEXT) else texts),
    ]


def find_folders(keys: RecipeKeys, document: Document) -> dict[str, str]:
    """The folder of each model by what the recipe calls it; repositories are fetched."""
    experts = list_experts(keys, "experts", "models", "shared_experts")
    places = {f"{where}.source_model": expert.source_model for where, expert in experts.items()}
    places |= {f"{where}.lora": e.lora for where, e in experts.items() if e.lora is not None}
    if keys.base_model is not None:
        places["base_model"] = keys.base_model
    folders: dict[str, str] = {}
    mistakes: Mistakes = []
    for where, model in places.items():
        if model not in folders:
            try:
                folders[model] = find_model(model)
            except CheckpointError as error:
                folders[model] = ""
                mistakes.append((where, str(error)))
    if mistakes:
        raise RecipeError(*document.locate(mistakes))
    return folders


def list_experts(keys: RecipeKeys, *lists: str) -> dict[str, ExpertKeys]:
    """The experts under these keys, by their places."""
    return {
        f"{key}[{number}]": expert
        for key in lists
        for number, expert in enumerate(getattr(keys, key) or ())
    }


def as_request(keys: RecipeKeys, folders: Mapping[str, str]) -> BuildRequest:
    def as_sources(experts: Sequence[ExpertKeys] | None) -> tuple[ExpertSource, ...]:
        return tuple(as_source(expert, folders) for expert in experts or ())

    models = as_sources(keys.experts or keys.models)
    base = models[0].model if keys.base_model is None else folders[keys.base_model]
    of_mergekit = keys.experts is not None
    return BuildRequest(
        models=models,
        base=base,
        config=as_config(keys),
        target=keys.target or keys.architecture or ("mergekit" if of_mergekit else "auto"),
        layout=keys.layout,
        dtype=keys.dtype or (read_stated_dtype(Path(base)) if of_mergekit else None),
        shared_experts=as_sources(keys.shared_experts),
        dense_layers=tuple(sorted(set(keys.dense_layers or ()))),
        routers=as_router_start(keys),
        seed=keys.seed or 0,
        **{name: value for name in OPTIONS if (value := getattr(keys, name)) is not None},
        **as_backbone(keys.backbone),
    )


def as_backbone(backbone: Backbone | tuple[float, ...] | None) -> dict[str, Any]:
    if backbone is None or isinstance(backbone, str):
        return {} if backbone is None else {"backbone": backbone}
    return {"backbone": "mean", "backbone_weights": backbone}


def as_source(expert: ExpertKeys, folders: Mapping[str, str]) -> ExpertSource:
    given = {key: value for key, value in vars(expert).items() if value is not None}
    if "lora" in given:
        given["lora"] = folders[given["lora"]]
    return ExpertSource(folders[given.pop("source_model")], **given)


def as_config(keys: RecipeKeys) -> MoeConfig:
    shards = keys.granularity or 1
    num_experts = keys.num_experts if keys.experts is None else len(keys.experts) * shards
    return choose_config(num_experts, keys.experts_per_token, shards)


def as_router_start(keys: RecipeKeys) -> RouterStart:
    said = {name: value for name in OF_ROUTERS if (value := getattr(keys, name)) is not None}
    experts = [ExpertSource(e.source_model, texts=e.texts or ()) for e in keys.models or ()]
    num_rows = as_config(keys).num_experts // (keys.granularity or 1)
    parts = keys.split is not None
    return choose_start(choose_routers(keys)[0], said, experts, num_rows=num_rows, parts=parts)


def choose_routers(keys: RecipeKeys) -> tuple[RouterMethod, str]:
    """How routers start, and the key that says so; by default with experts as in mergekit-moe."""
    if keys.gate_mode is not None:
        return GATE_MODES[keys.gate_mode], f"gate_mode {keys.gate_mode}"
    if keys.routers is not None:
        return keys.routers, f"routers {keys.routers}"
    method: RouterMethod = "auto" if keys.experts is None else "hidden"
    return method, f"routers {method} (the default)"


def read_stated_dtype(base: Path) -> Dtype | None:
    """The dtype that the base's config.json names; mergekit-moe converts to it by default."""
    try:
        config = read_config(base)
        return Dtype(str(config.get("dtype") or config.get("torch_dtype")))
    except ValueError:  # no dtype of ours, or a CheckpointError, which the build reports
        return None
