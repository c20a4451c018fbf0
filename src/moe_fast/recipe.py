"""Recipe files, ours and mergekit-moe's, as one build request."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from moe_fast.checkpoint.build import BuildReport, build_checkpoint
from moe_fast.checkpoint.output import Writing
from moe_fast.checkpoint.request import BuildRequest, ExpertSource
from moe_fast.config import PROMPT_MODES, GateMode, MoeConfig, RouterInit
from moe_fast.errors import MoeConfigError, RecipeError
from moe_fast.nodes import (
    Entries,
    Entry,
    Node,
    Read,
    Reader,
    Wrong,
    compose,
    integer,
    member,
    number,
    pairs,
    plain,
    text,
)

__all__ = ["Recipe", "build_recipe", "read_recipe"]

RENAMED = {"source_model": "model"}
# Keys of mergekit-yaml that people leave in, and mergekit-moe passes over.
OF_MERGEKIT_YAML = (
    "chat_template", "merge_method", "modules", "name", "out_dtype", "parameters", "slices",
    "tokenizer", "tokenizer_source",
)  # fmt: skip
PROMPTS = ("positive_prompts", "negative_prompts")


@dataclass(frozen=True)
class Recipe:
    """What a recipe asks for; each of `notes` is something in it that has no effect, or another."""

    request: BuildRequest
    notes: tuple[str, ...] = ()


def build_recipe(
    recipe: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    hidden_states: npt.ArrayLike | None = None,
    max_shard_size: int = 5_000_000_000,
    **how: Any,
) -> BuildReport:
    """Build the checkpoint that a recipe file asks for.

    `hidden_states` is that of `build_moe`, and `how` takes those of its arguments that say how to
    write: `overwrite`, `threads`, `executor`, `checksum`, `fsync`, `dry_run`, `progress`.

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
    read = read_recipe(recipe)
    request = replace(read.request, max_shard_size=max_shard_size)
    return build_checkpoint(request, output, Writing(**how), read.notes, hidden_states)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file, ours or mergekit-moe's. No model is opened.

    Raises
    ------
    RecipeError
        With every problem, each with its line, its key and what would be right.
    ModuleNotFoundError
        Without PyYAML: `pip install "moe-fast[recipes]"`.
    """
    return RecipeReader(Path(path)).recipe(compose(Path(path)))


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
        if self.problems:
            raise RecipeError(*self.problems)
        return Recipe(as_request(plain(keys)), tuple(self.notes))

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
            "gate_mode": partial(member, GateMode),
            "router_init": partial(member, RouterInit),
            "seed": integer,
        }
        return self.mapping(reads, (), node, where)

    def expert(self, node: Node, where: str) -> Entries:
        reads: dict[str, Read] = {
            "source_model": model,
            "positive_prompts": partial(self.listed, text),
            "negative_prompts": partial(self.listed, text),
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
        if "gate_mode" in keys and "router_init" in keys:
            self.problem(keys["router_init"], "stands beside gate_mode; give one of them")
        for expert in listed.value:
            try:
                as_source(plain(expert))
            except MoeConfigError as error:
                self.problem(expert, str(error))
        asked = plain(keys)
        try:
            as_config(asked).validate()
        except MoeConfigError as error:
            self.problem(keys.get("experts_per_token", listed), str(error))
        self.check_prompts(listed.value, as_gate_mode(asked))

    def check_prompts(self, experts: Sequence[Entry], mode: GateMode | None) -> None:
        """Where routers are made from prompts, every expert has some, and not all the same."""
        if mode not in PROMPT_MODES:
            unused = [e.value[key] for e in experts for key in PROMPTS if key in e.value]
            if unused:
                why = "router_init" if mode is None else f"gate_mode {mode}"
                self.notes.append(self.at(unused[0], f"prompts have no effect with {why}"))
            return
        for expert in experts:
            if "positive_prompts" not in expert.value:
                self.problem(expert, f"positive_prompts is missing, which gate_mode {mode} needs")
        prompts = [tuple(plain(expert).get(key) for key in PROMPTS) for expert in experts]
        if len(experts) > 1 and len(set(prompts)) == 1:
            self.problem(
                experts[1], "all experts have the same prompts; no router can tell them apart"
            )


def as_request(asked: dict[str, Any]) -> BuildRequest:
    models = tuple(as_source(each) for each in asked.get("experts") or asked["models"])
    return BuildRequest(
        models=models,
        base=asked.get("base_model", models[0].model),
        config=as_config(asked),
        router_init=asked.get("router_init", RouterInit.BALANCED),
        gate_mode=as_gate_mode(asked),
        seed=asked.get("seed", 0),
    )


def as_source(asked: dict[str, Any]) -> ExpertSource:
    return ExpertSource(**{RENAMED.get(key, key): value for key, value in asked.items()})


def as_config(asked: dict[str, Any]) -> MoeConfig:
    experts = len(asked["experts"]) if "experts" in asked else asked.get("num_experts", 8)
    return MoeConfig(experts, asked.get("experts_per_token", 2))


def as_gate_mode(asked: dict[str, Any]) -> GateMode | None:
    """What the recipe says; with experts and nothing said, mergekit-moe's default."""
    default = GateMode.HIDDEN if "experts" in asked and "router_init" not in asked else None
    return asked.get("gate_mode", default)


def model(node: Node, where: str) -> str:
    """The folder of a model, named by a string or, as in mergekit, a mapping."""
    if node.id == "mapping":
        parts = {text(key, where): value for key, value in pairs(node)}
        for key, value in parts.items():
            if key not in ("model", "path"):
                raise Wrong(value, f"{key} is not supported; name a folder with a finished model")
        if len(parts) != 1:
            raise Wrong(node, "must name one model")
        return model(next(iter(parts.values())), where)
    name = text(node, where)
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        lora = "; merge a LoRA into its model first, and name the result" if "+" in name else ""
        raise Wrong(node, f"{name!r} is not a folder with a model{lora}")
    return str(folder)
