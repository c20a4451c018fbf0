"""A model folder: its config.json, and the headers of all its safetensors files.

Tensors are known by the names of the Hugging Face layout, `model.layers.0.mlp.up_proj.weight`.
Names that training frameworks put before or into these are taken off, here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError, Problem
from moe_fast.storage.files import is_absent
from moe_fast.storage.other_formats import (
    GGUF,
    describe_loose_safetensors,
    describe_other_format,
)
from moe_fast.storage.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Tensor,
    read_header,
    read_index,
)
from moe_fast.storage.strict_json import brief, read_json

MOST_PROBLEMS = 100  # of one folder, before looking for more ends
MOST_NAMED = 8
# What torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# The embedding's name inside of the model, and what stands before it in the Hugging Face layout.
STEMS = {
    "embed_tokens.weight": "model.",
    "wte.weight": "transformer.",
    "embeddings.weight": "backbone.",
}
HEAD = "lm_head."


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face model folder, by its canonical name.

    A tensor's own `name` stays what it is in the file.

    Raises
    ------
    CheckpointError
        For a folder without safetensors, and for every header or index that does not hold.
    """
    names = names_in(folder)
    if SINGLE_FILE in names:
        return with_canonical_names(read_header(folder / SINGLE_FILE))
    if INDEX_FILE in names:
        return with_canonical_names(read_shards(folder))
    found = describe_loose_safetensors(names) or describe_other_format(names)
    what = found or f"holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    raise CheckpointError(what, file=folder)


def with_canonical_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their canonical names; as they are if two would get the same one."""
    renamed = dict(zip(canonical_names(tensors), tensors.values(), strict=True))
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def canonical_names(names: Iterable[str]) -> list[str]:
    """The names of the Hugging Face layout for the names of a model's tensors.

    Parts that wrappers put into names are left out: `_orig_mod.`. What stands before all names,
    such as `module.`, is left out as far as the embedding shows where the model begins. `model.` is
    put before the names of a model that was saved without its head, as `AutoModel` saves it.
    """
    plain = [without_wrappers(name) for name in names]
    embeddings = {
        embedding: [name for name in plain if f".{name}".endswith(f".{embedding}")]
        for embedding in STEMS
    }
    embedding = next((each for each in STEMS if embeddings[each]), None)
    if embedding is None:
        return plain
    before, stem = min(embeddings[embedding], key=len).removesuffix(embedding), STEMS[embedding]
    inner = f".{before}".endswith(f".{stem}")
    prefix = before.removesuffix(stem) if inner else before
    if not all(name.startswith(prefix) for name in plain):
        return plain
    plain = [name.removeprefix(prefix) for name in plain]
    if inner:
        return plain
    return [name if name.startswith(HEAD) else f"{stem}{name}" for name in plain]


def without_wrappers(name: str) -> str:
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_second_weights(folder: Path) -> Iterator[str]:
    """A warning if `model.safetensors` lies beside an index that names other files.

    Readers differ in which of the two they take.
    """
    if is_absent(folder / SINGLE_FILE) or is_absent(folder / INDEX_FILE):
        return
    try:
        files = set(read_index(folder / INDEX_FILE))
    except CheckpointError as error:
        yield f"{error}; {SINGLE_FILE} beside it is read"
        return
    if files != {SINGLE_FILE}:
        other = min(files - {SINGLE_FILE})
        yield (
            f"{folder / SINGLE_FILE}: is read, {INDEX_FILE} beside it names {brief(other)}; "
            "transformers reads the first, vLLM what the index names; remove one of the two"
        )


def names_in(folder: Path) -> list[str]:
    """The names in a folder, in order."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{error.strerror}", file=folder) from None


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of every shard that the folder's index names, index and shards agreeing."""
    named = read_index(folder / INDEX_FILE)
    weight_map = {name: file for file, names in named.items() for name in names}
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for file, names in sorted(named.items()):
        try:
            shard = read_header(folder / file)
        except CheckpointError as error:
            problems += error.problems
        else:
            problems += disagreements(folder / file, shard, names, weight_map)
            tensors |= shard
        if len(problems) >= MOST_PROBLEMS:
            break
    if problems:
        raise CheckpointError(*problems)
    return tensors


def disagreements(
    file: Path, shard: dict[str, Tensor], names: list[str], weight_map: dict[str, str]
) -> Iterator[str]:
    """Where a shard holds other tensors than the `names` that the index gives it."""
    for name in names:
        if name not in shard:
            yield Problem("is named by the index and missing in the file", file=file, tensor=name)
    for name in shard.keys() - set(names):
        place = brief(weight_map[name]) if name in weight_map else "no file"
        yield Problem(f"is placed by the index in {place}", file=file, tensor=name)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a model folder.

    Raises
    ------
    CheckpointError
        For what is not a model folder, saying what it might be instead.
    """
    check_is_folder(folder)
    path = folder / "config.json"
    if is_absent(path):
        other = describe_other_format(names_in(folder))
        models = sorted(file.parent.name for file in folder.glob("*/config.json"))
        advice = ""
        if other is not None:
            advice = f"; it {other}"
        elif models:
            advice = f"; its folders with models are {', '.join(models[:MOST_NAMED])}"
            advice += ", ..." if len(models) > MOST_NAMED else ""
        raise CheckpointError(f"is not a model folder: it has no config.json{advice}", file=folder)
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError("must be a JSON object", file=path)
    return config


def check_is_folder(folder: Path) -> None:
    """Raise `CheckpointError` for what is not a folder, with what to give in its place."""
    if folder.is_dir():
        return
    advice = ""
    if folder.suffix == ".gguf":
        advice = f"; {GGUF.format(name=folder.name)}"
    elif folder.is_file():
        advice = f"; it is a file, and a model is the folder with config.json: {folder.parent}"
    elif is_absent(folder):
        advice = "; there is no file or folder of that name"
    raise CheckpointError(f"is not a folder with a model{advice}", file=folder)
