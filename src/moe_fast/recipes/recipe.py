"""Recipe files, ours and mergekit-moe's, as one build request."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moe_fast.checkpoint.build import BuildReport, BuildRequest, build
from moe_fast.checkpoint.output import Progress, Writing
from moe_fast.checks import as_path, as_size
from moe_fast.config import Dtype, Layout, MoeConfig
from moe_fast.errors import CheckpointError, MoeConfigError, RecipeError
from moe_fast.families.choice import as_target_name
from moe_fast.families.registry import moe_families
from moe_fast.models.folder import read_config
from moe_fast.recipes.nodes import (
    LARGEST_FILE,
    Entries,
    Entry,
    Node,
    Read,
    Reader,
    Wrong,
    chosen,
    compose,
    integer,
    is_nothing,
    kind,
    member,
    number,
    pairs,
    plain,
    text,
)
from moe_fast.reports import Report
from moe_fast.request import (
    DEFAULT_SHARD_SIZE,
    ROUTER_METHODS,
    ExpertSource,
    RouterMethod,
    RouterStart,
)
from moe_fast.storage.hub import REPOSITORY, find_model, repository_name

__all__ = ["Recipe", "build_recipe", "read_recipe"]
# What mergekit-moe calls the starts of routers.
GATE_MODES: dict[str, RouterMethod] = {
    "random": "normal",
    "uniform_random": "linear",
    "cheap_embed": "cheap_embed",
    "hidden": "hidden",
}
RENAMED = {"source_model": "model"}
# Keys of mergekit-yaml that people leave in, and mergekit-moe passes over.
OF_MERGEKIT_YAML = (
    "chat_template", "merge_method", "modules", "name", "out_dtype", "parameters", "slices",
    "tokenizer", "tokenizer_source",
)  # fmt: skip
FIRST_KEYS = re.compile(
    rb"^(base_model|experts|models|merge_method|slices)[ \t]*:", re.MULTILINE | re.ASCII
)
PROMPTS = ("positive_prompts", "negative_prompts")
LISTS = ("experts", "models", "shared_experts")


@dataclass(frozen=True)
class Recipe(Report):
    """What a recipe asks for; each of `notes` is something in it that has no effect, or another."""

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

    The other arguments are those of `build_moe`.

    Raises
    ------
    RecipeError
        With every problem of the recipe, each with its line; nothing has been written then.
    CheckpointError
        Models that cannot be combined.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from moe_fast import build_recipe
    >>> from moe_fast.demo import make_dense_model
    >>> folder = Path(tempfile.mkdtemp())
    >>> make_dense_model(folder / "dense", seed=0)
    >>> text = f"models: [{folder.as_posix()}/dense]\\nnum_experts: 4\\n"
    >>> _ = (folder / "recipe.yml").write_text(text)
    >>> build_recipe(folder / "recipe.yml", folder / "moe").num_experts
    4
    """
    path = as_path(recipe, "recipe")
    read = read_recipe(path)
    size = as_size(max_shard_size, "max_shard_size")
    request = replace(read.request, max_shard_size=size)
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    return build(request, output, writing, read.notes, hidden_states, path)


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe, by its ending or by the keys in it."""
    if path.suffix.lower() in (".yml", ".yaml"):
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return FIRST_KEYS.search(stream.read(LARGEST_FILE)) is not None
    except OSError:
        return False


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file, ours or mergekit-moe's. No weight is read.

    Models that are named as on the Hugging Face Hub are fetched into its cache, once nothing else
    in the recipe is wrong.

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
    >>> from moe_fast import read_recipe
    >>> from moe_fast.demo import make_dense_model
    >>> folder = Path(tempfile.mkdtemp())
    >>> make_dense_model(folder / "dense", seed=0)
    >>> text = f"models: [{folder.as_posix()}/dense]\\nseed: 7\\n"
    >>> _ = (folder / "recipe.yml").write_text(text)
    >>> read_recipe(folder / "recipe.yml").request.seed
    7
    """
    file = as_path(path, "path")
    return RecipeReader(file).recipe(compose(file))


class RecipeReader(Reader):
    """What each key of a recipe holds, and what all of them mean together."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.notes: list[str] = []

    def recipe(self, node: Node) -> Recipe:
        """The request of a document, or all its problems."""
        keys: Entries = next((entry.value for entry in self.read(self.keys, node, "")), {})
        if not self.problems:
            self.check(keys, Entry("", node, None))
        folders = {} if self.problems else self.folders(keys)
        if self.problems:
            raise RecipeError(*self.problems)
        return Recipe(as_request(plain(keys), folders), tuple(self.notes))

    def folders(self, keys: Entries) -> dict[str, str]:
        """The folder of each model by what the recipe calls it."""
        listed = [each for key in LISTS if key in keys for each in keys[key].value]
        entries = [each.value["source_model"] for each in listed]
        entries += [keys["base_model"]] if "base_model" in keys else []
        folders: dict[str, str] = {}
        for entry in entries:
            if entry.value not in folders:
                try:
                    folders[entry.value] = find_model(entry.value)
                except CheckpointError as error:
                    folders[entry.value] = ""
                    self.problem(entry, str(error))
        return folders

    def unknown(self, key: str, known: Collection[str]) -> str:
        if key in OF_MERGEKIT_YAML:
            return "is a key of mergekit-yaml, which mergekit-moe passes over; leave it out"
        return super().unknown(key, known)

    def keys(self, node: Node, where: str) -> Entries:
        reads: dict[str, Read] = {
            "base_model": model,
            "experts": partial(self.listed, self.expert),
            "models": partial(self.listed, self.model_or_expert),
            "num_experts": integer,
            "experts_per_token": integer,
            "shared_experts": partial(self.listed, self.expert, may_be_empty=True),
            "dense_layers": partial(self.listed, integer, may_be_empty=True),
            "gate_mode": partial(chosen, tuple(GATE_MODES)),
            "routers": partial(chosen, ROUTER_METHODS),
            "architecture": architecture,
            "target": target,
            "layout": partial(member, Layout),
            "dtype": dtype,
            "seed": integer,
        }
        return self.mapping(reads, (), node, where)

    def expert(self, node: Node, where: str) -> Entries:
        reads: dict[str, Read] = {
            "source_model": model,
            "positive_prompts": partial(self.listed, text, may_be_empty=True),
            "negative_prompts": partial(self.listed, text, may_be_empty=True),
            "noise_scale": number,
            "residual_scale": number,
            "source_layers": partial(self.listed, integer),
        }
        return self.mapping(reads, ("source_model",), node, where)

    def model_or_expert(self, node: Node, where: str) -> Entries:
        if node.id == "mapping" and any(key.value == "source_model" for key, _ in pairs(node)):
            return self.expert(node, where)
        return {"source_model": Entry(where, node, model(node, where))}

    def check(self, keys: Entries, whole: Entry) -> None:
        """What no key can say by itself."""
        listed = keys.get("experts", keys.get("models"))
        if listed is None:
            self.problem(whole, "experts is missing, or models to take in turn")
            return
        if "experts" in keys:
            if "models" in keys:
                self.problem(keys["models"], "stands beside experts; give one of them")
            if "num_experts" in keys:
                self.problem(keys["num_experts"], "experts lists them; leave this out")
            if "base_model" not in keys:
                self.problem(whole, "base_model is missing")
        for one, other in (("gate_mode", "routers"), ("architecture", "target")):
            if one in keys and other in keys:
                self.problem(keys[other], f"stands beside {one}; give one of them")
        shared = keys["shared_experts"].value if "shared_experts" in keys else []
        for expert in [*listed.value, *shared]:
            try:
                as_source(plain(expert))
            except MoeConfigError as error:
                (problem,) = error.problems
                self.problem(expert.value.get(problem.argument, expert), problem.what)
        asked = plain(keys)
        try:
            as_config(asked).validate()
        except MoeConfigError as error:
            self.problem(keys.get("experts_per_token", listed), error.problems[0].what)
        self.check_prompts(listed.value, shared, asked)

    def check_prompts(
        self, experts: Sequence[Entry], shared: Sequence[Entry], asked: dict[str, Any]
    ) -> None:
        """Where routers are made from prompts, every expert has some, and not all the same."""
        start = as_router_start(asked)
        said = (
            f"gate_mode {asked['gate_mode']}" if "gate_mode" in asked else f"routers {start.method}"
        )
        given = [
            e.value[key]
            for e in (*experts, *shared)
            for key in PROMPTS
            if key in e.value and e.value[key].value
        ]
        if not start.from_prompts:
            if given:
                self.notes.append(self.at(given[0], f"prompts have no effect with {said}"))
            return
        for expert in experts:
            prompts = expert.value.get("positive_prompts")
            if prompts is None:
                self.problem(expert, f"positive_prompts is missing, which {said} needs")
            elif not prompts.value:
                self.problem(prompts, f"is empty, and {said} makes routers of them")
        if len({"positive_prompts" in e.value for e in shared}) > 1:
            self.problem(shared[0], "some shared experts have prompts and others none; all or none")
        prompts = [tuple(plain(expert).get(key) for key in PROMPTS) for expert in experts]
        if len(experts) > 1 and len(set(prompts)) == 1:
            self.problem(
                experts[1], "all experts have the same prompts; no router can tell them apart"
            )


def as_request(asked: dict[str, Any], folders: dict[str, str]) -> BuildRequest:
    def sources(key: str) -> tuple[ExpertSource, ...]:
        found = (as_source(each) for each in asked.get(key, ()))
        return tuple(replace(source, model=folders[source.model]) for source in found)

    models = sources("experts") or sources("models")
    base = folders[asked["base_model"]] if "base_model" in asked else models[0].model
    listed = "experts" in asked
    return BuildRequest(
        models=models,
        base=base,
        config=as_config(asked),
        target=asked.get("target", asked.get("architecture", "mergekit" if listed else "auto")),
        layout=asked.get("layout"),
        dtype=asked.get("dtype", stated_dtype(Path(base)) if listed else None),
        shared_experts=sources("shared_experts"),
        dense_layers=tuple(sorted(set(asked.get("dense_layers", ())))),
        routers=as_router_start(asked),
        seed=asked.get("seed", 0),
    )


def as_source(asked: dict[str, Any]) -> ExpertSource:
    return ExpertSource(**{RENAMED.get(key, key): value for key, value in asked.items()})


def as_config(asked: dict[str, Any]) -> MoeConfig:
    experts = len(asked["experts"]) if "experts" in asked else asked.get("num_experts", 8)
    return MoeConfig(experts, asked.get("experts_per_token", 2))


def as_router_start(asked: dict[str, Any]) -> RouterStart:
    """What the recipe says; with experts and nothing said, mergekit-moe's default."""
    if "gate_mode" in asked:
        return RouterStart(GATE_MODES[asked["gate_mode"]])
    return RouterStart(asked.get("routers", "hidden" if "experts" in asked else "balanced"))


def stated_dtype(base: Path) -> Dtype | None:
    """What the base's configuration names, to which mergekit-moe converts where it is not told."""
    try:
        config = read_config(base)
    except CheckpointError:  # which the build says better, with all others
        return None
    stated = config.get("dtype") or config.get("torch_dtype")
    return Dtype(stated) if stated in list(Dtype) else None


def dtype(node: Node, where: str) -> Dtype:
    if kind(node) == "a string" and node.value.removeprefix("torch.") in list(Dtype):
        return Dtype(node.value.removeprefix("torch."))
    return Dtype(member(Dtype, node, where))


def target(node: Node, where: str) -> str:
    try:
        return as_target_name(text(node, where))
    except MoeConfigError as error:
        raise Wrong(node, error.problems[0].what) from None


def architecture(node: Node, where: str) -> str:
    """The target that mergekit-moe's name for it begins with this."""
    start = text(node, where).lower()
    names = {family.mergekit_name: family.name for family in moe_families().values()}
    found = [target for name, target in names.items() if name and name.startswith(start)]
    if len(found) == 1:
        return found[0]
    if sorted(found) == ["qwen2_moe", "qwen3_moe"]:
        return "qwen"
    raise Wrong(
        node,
        f"must be mixtral, deepseek, qwen or qwen3, got {node.value!r}; "
        "the key target knows more families",
    )


def model(node: Node, where: str) -> str:
    """What a model is called, by a string or, as in mergekit, a mapping: its folder where it is."""
    if node.id == "mapping":
        return model_of_mapping(node, where)
    name = repository_name(text(node, where))
    folder = Path(name).expanduser().absolute()
    if folder.is_dir():
        return str(folder)
    if REPOSITORY.fullmatch(name):
        return name
    lora = "; merge a LoRA into its model first, and name the result" if "+" in name else ""
    raise Wrong(node, f"{name!r} is not a folder with a model{lora}")


def model_of_mapping(node: Node, where: str) -> str:
    parts = {text(key, where): value for key, value in pairs(node)}
    for key, value in parts.items():
        if key not in ("model", "path", "revision"):
            raise Wrong(value, f"{key} is not supported; name a folder with a finished model")
    revision = parts.pop("revision", None)
    if len(parts) != 1:
        raise Wrong(node, "must name one model")
    found = model(next(iter(parts.values())), where)
    if revision is None or is_nothing(revision):
        return found
    name = f"{found}@{text(revision, where)}"
    if not REPOSITORY.fullmatch(name):
        raise Wrong(revision, f"{name!r}: only a repository on the Hugging Face Hub has revisions")
    return name
