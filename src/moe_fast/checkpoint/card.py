"""Where an output came from, for people: a model card, and a line in each file's metadata.

Models are named by their folder or their name on the Hub, never by a path: who reads a card has no
business with somebody else's home directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_fast.checkpoint.construction import Construction
from moe_fast.errors import CheckpointError
from moe_fast.families.moe import MoeFamily
from moe_fast.families.rules import Reader
from moe_fast.records import dataclass
from moe_fast.request import ExpertSource
from moe_fast.storage.companions import named_code
from moe_fast.storage.files import open_regular
from moe_fast.storage.hub import SNAPSHOT
from moe_fast.storage.tensors import FORMAT
from moe_fast.version import __version__
from moe_fast.wording import format_runs

CARD = "README.md"
LONGEST_CARD = 1_000_000
LONGEST_METADATA = 1000
LONGEST_RECIPE = 20_000
MOST_IN_TITLE = 4
# What the Hub takes for the name of a model; other folder names stay out of its metadata.
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
LICENSE_KEYS = ("license", "license_name", "license_link")
SIMPLE_VALUE = re.compile(r"""(['"]?)(?P<value>[\w.+:/-]+)\1""", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """Experts that were made alike: their numbers, and what they were made of."""

    experts: tuple[int, ...]
    models: str
    layers: str
    changes: str


def origins(construction: Construction) -> list[Origin]:
    """Which experts come from where, alike ones together."""
    names = names_of(construction)
    plan, rows = construction.plan, list(construction.moe_layers)
    groups: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for expert in range(plan.num_experts):
        models = tuple(plan.source_model[rows, expert].tolist())
        layers = tuple(plan.source_layer[rows, expert].tolist())
        groups.setdefault((models, layers), []).append(expert)
    found = []
    for (models, layers), experts in groups.items():
        used = [construction.models[model] for model in dict.fromkeys(models)]
        found.append(
            Origin(
                tuple(experts),
                ", ".join(dict.fromkeys(names[source.model] for source in used)),
                "the same" if list(layers) == rows else format_runs(layers),
                ", ".join(dict.fromkeys(changes(source, names) for source in used)),
            )
        )
    return found


def changes(source: ExpertSource, names: Mapping[str, str]) -> str:
    """What happened to the weights of a source on their way."""
    lora = "" if source.lora is None else f"LoRA {names[source.lora]} folded in"
    noise = f"noise of {source.noise_scale:g}" if source.noise_scale else ""
    scale = f"output times {source.residual_scale:g}" if source.residual_scale != 1 else ""
    return " and ".join(filter(None, (lora, noise, scale))) or "none"


def names_of(construction: Construction) -> dict[str, str]:
    """A name for each source folder."""
    experts = (*construction.models, *construction.shared_experts)
    sources = [folder for source in experts for folder in source.folders]
    return distinct_names([*sources, str(construction.base.path)])


def distinct_names(paths: Iterable[str]) -> dict[str, str]:
    """A name for each folder; equal names of different folders are numbered."""
    names: dict[str, str] = {}
    for path in dict.fromkeys(paths):
        name = model_name(path)
        taken = sum(model_name(other) == name for other in names)
        names[path] = f"{name} ({taken + 1})" if taken else name
    return names


def model_name(path: str) -> str:
    """The name on the Hub where the folder is of its cache, else the folder's own."""
    cached = SNAPSHOT.search(path)
    if cached:
        return cached["name"].replace("--", "/", 1)
    return Path(path).name or "model"


def file_metadata(construction: Construction) -> dict[str, str]:
    """What every safetensors file of the output says of itself; short, and strings alone."""
    experts = "; ".join(f"{format_runs(o.experts)}: {o.models}" for o in origins(construction))
    if len(experts) > LONGEST_METADATA:
        experts = experts[:LONGEST_METADATA] + " ..."
    return FORMAT | {"moe_fast": __version__, "experts": printable(experts)}


def model_card(
    recipe: Mapping[str, Any],
    family: MoeFamily,
    construction: Construction,
    config_json: Mapping[str, Any],
    readers: Sequence[Reader],
) -> str:
    """The README.md of an output, with the metadata that the Hub shows.

    `recipe` holds the keys of the recipe that builds the same.
    """
    names = names_of(construction)
    base = names[str(construction.base.path)]
    plan, config = construction.plan, construction.config
    sources = list(dict.fromkeys(names[source.model] for source in construction.models))
    listed = ", ".join(sources[:MOST_IN_TITLE]) + ", ..." * (len(sources) > MOST_IN_TITLE)
    moe_layers = len(construction.moe_layers)
    parts = "one dense model" if len(sources) == 1 else f"{len(sources)} dense models"
    lines = [
        *front_matter(family, [base, *sources], license_of(construction.base.path)),
        "",
        f"# {family.title} of {plan.num_experts} experts from {escaped(listed)}",
        "",
        f"A Mixture-of-Experts model with {plan.num_experts} experts in each of {moe_layers} "
        f"layers, {config.num_experts_per_tok} of them at work on each token. moe_fast "
        f"{__version__} made it from {parts}; nothing in it has been trained "
        f"since. Its routers start by the method `{construction.routers.start.method}`.",
        "",
        "## Experts",
        "",
        "| experts | from | layers | changes |",
        "|---|---|---|---|",
    ]
    for origin in origins(construction):
        changed = escaped(origin.changes)
        cells = (format_runs(origin.experts), escaped(origin.models), origin.layers, changed)
        lines.append(f"| {' | '.join(cells)} |")
    said = describe_experts(recipe)
    if said:
        lines += ["", " ".join(said)]
    lines += ["", f"Everything else {describe_backbone(recipe, escaped(base))}."]
    with_ffn = construction.base.ffn_layers
    dense = [layer for layer in construction.dense_layers if layer in with_ffn]
    if dense:
        listed = format_runs(dense)
        lines[-1] += f" So do the FFNs of the layers that have no experts: {listed}."
    shared = [names[source.model] for source in construction.shared_experts]
    if shared:
        lines[-1] += f" Every token also goes through the FFN of {escaped(', '.join(shared))}."
    remote = ", trust_remote_code=True"
    for_model = remote if "auto_map" in config_json else ""
    for_tokenizer = remote if named_code(construction.base.path) else ""
    lines += [
        *recipe_lines(recipe, names),
        "",
        "## Loading it",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'path = "."  # the folder of this file, or the name on the Hub',
        f'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto"{for_model})',
        f"tokenizer = AutoTokenizer.from_pretrained(path{for_tokenizer})",
        "```",
        "",
    ]
    return "\n".join(lines) + reader_lines(readers)


def describe_experts(recipe: Mapping[str, Any]) -> list[str]:
    """What a build did to all experts, in sentences, by the recipe that asks for the same."""
    said = []
    if recipe.get("split"):
        ways = {"contiguous": "in their order", "random": "in a random order"}
        way = ways.get(recipe["split"], "by clusters of what their gates read")
        said.append(
            f"The experts of a layer are the {recipe['num_experts']} equal parts of one FFN, whose "
            f"neurons were divided {way}."
        )
    shards = recipe.get("granularity", 1)
    if shards > 1:
        said.append(
            f"Each FFN is split into {shards} experts: expert e is shard e % {shards} of copy "
            f"e // {shards}, and the shards of a copy start with the same row of the router."
        )
    if recipe.get("shuffle"):
        said.append("The neurons of each copy were put into an order of their own before.")
    if recipe.get("reinit"):
        separate = recipe.get("reinit_sets") == "separate"
        whose = "others in gate, up and down projection" if separate else "the same in all matrices"
        said.append(
            f"Of each expert's neurons {100 * recipe['reinit']:g} % were drawn anew ({whose}), "
            "from the normal distribution of the weights replaced, as in Drop-Upcycling."
        )
    return said


def describe_backbone(recipe: Mapping[str, Any], base: str) -> str:
    """Where everything but the experts comes from, as the end of a sentence."""
    backbone = recipe.get("backbone", "base")
    if backbone == "base":
        return f"comes from {base}"
    mean = "the mean of the models" if isinstance(backbone, str) else "their weighted mean"
    return f"is {mean}; tokenizer and config.json are those of {base}"


def recipe_lines(recipe: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[str]:
    """The recipe that builds the same again, from models of these names."""
    keys = {
        **recipe,
        "base_model": names[recipe["base_model"]],
        "models": [source_keys(source, names) for source in recipe["models"]],
        "shared_experts": [source_keys(source, names) for source in recipe["shared_experts"]],
    }
    lines = []
    for key, value in keys.items():
        if key in ("models", "shared_experts") and value:
            lines += [f"{key}:", *(f"- {as_yaml(item)}" for item in value)]
        elif value not in (None, [], 0):
            lines.append(f"{key}: {as_yaml(value)}")
    yield from ("", "## Recipe", "")
    if sum(map(len, lines)) > LONGEST_RECIPE:
        yield "It is in the manifest, `moe_fast.json`."
    else:
        yield f"`moe-fast build recipe.yml -o OUTPUT` {AGAIN}, with models of these names:"
        yield from ("", "```yaml", *lines, "```")


def source_keys(source: ExpertSource, names: Mapping[str, str]) -> dict[str, Any]:
    """An entry of a recipe's models: what is not the default."""
    given = {"source_model": names[source.model]}
    if source.lora is not None:
        given["lora"] = names[source.lora]
    for each in fields(source):
        value = getattr(source, each.name)
        if each.name not in ("model", "lora") and value != each.default:
            given[each.name] = value
    return given


def as_yaml(value: Any) -> str:
    """A value in one line of YAML."""
    if isinstance(value, str):
        return quoted(value) if type(value) is str else str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {as_yaml(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(as_yaml, value))}]"
    return repr(value)


# What a recipe does: before and after its output is converted.
AGAIN, BEFORE_CONVERSION = "makes it again", "made what this was converted from"
READERS = "\nReaders: "


def reader_lines(readers: Sequence[Reader]) -> str:
    """The end of a card: who loads the checkpoint, and why others do not."""
    able = ", ".join(reader.name for reader in readers if reader.loads)
    lines = [f"{READERS}{able or 'none known'}."]
    for reader in readers:
        if not reader.loads:
            lines.append(f"{reader.name} does not load it: {'; '.join(reader.reasons)}.")
    return "\n".join(lines) + "\n"


def updated_card(card: Path, readers: Sequence[Reader]) -> str | None:
    """The text of a card that `model_card` wrote, for a conversion; `None` for other cards."""
    text = read_card(card)
    if text is None or "\n- moe_fast\n" not in text or READERS not in text:
        return None
    kept = text[: text.index(READERS)].replace(AGAIN, BEFORE_CONVERSION, 1)
    return kept + reader_lines(readers)


def operation_card(card: Path, sentence: str, readers: Sequence[Reader]) -> str:
    """The card of a model after an operation: its own if it has one, and what was done."""
    text = updated_card(card, readers) or read_card(card) or f"# {model_name(str(card.parent))}\n"
    body, found, end = text.rpartition(READERS)
    if not found:
        body, end = text, ""
    done = f"\nmoe_fast {__version__} {sentence}.\n"
    return body.rstrip("\n") + "\n" + done + found + end


def front_matter(
    family: MoeFamily, models: Iterable[str], license_values: Mapping[str, str]
) -> list[str]:
    """The YAML block that the Hub reads; every value is a quoted string."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"{key}: {quoted(value)}" for key, value in license_values.items()]
    named = [model for model in dict.fromkeys(models) if HUB_NAME.fullmatch(model)]
    if named:
        lines += ["base_model:", *(f"- {quoted(model)}" for model in named)]
    tags = ("moe", "merge", "moe_fast", family.name)
    return [*lines, "tags:", *(f"- {tag}" for tag in tags), "---"]


def license_of(model: Path) -> dict[str, str]:
    """The license that a model's own card names, where it has a card that names one plainly."""
    lines = (read_card(model / CARD) or "").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        key, _, value = line.partition(":")
        match = SIMPLE_VALUE.fullmatch(value.strip())
        if key in LICENSE_KEYS and match:
            found[key] = match["value"]
    return {}


def read_card(card: Path) -> str | None:
    """The text of a card; `None` where there is none that can be read."""
    try:
        with open_regular(card) as stream:
            return bytes(stream.read(LONGEST_CARD)).decode()
    except (CheckpointError, UnicodeDecodeError):
        return None


def quoted(text: str) -> str:
    """`text` as a YAML string in double quotes."""
    return '"' + "".join(map(escape, text)) + '"'


def escape(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    if character.isprintable():
        return character
    surrogate = 0xD800 <= ord(character) <= 0xDFFF  # no character, in no encoding
    return "?" if surrogate else f"\\U{ord(character):08x}"


def escaped(text: str) -> str:
    """`text` as Markdown shows it, whatever is in it."""
    return re.sub(r"([\\`*_{}\[\]<>()#!|~&])", r"\\\1", printable(text))


def printable(text: str) -> str:
    """`text` with a question mark for each character that is none to look at."""
    return "".join(c if c.isprintable() else "?" for c in text)
