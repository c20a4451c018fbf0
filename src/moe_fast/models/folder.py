"""A model folder: its config.json, and the headers of all its safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from moe_fast.errors import CheckpointError, Problem
from moe_fast.storage.files import is_absent, is_plain_name
from moe_fast.storage.safetensors_header import INDEX_FILE, SINGLE_FILE, Tensor, read_header
from moe_fast.storage.strict_json import LONGEST_INDEX, brief, read_json

MOST_PROBLEMS = 100  # of one folder, before looking for more ends
MOST_NAMED = 8


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a Hugging Face model folder, by name.

    Raises
    ------
    CheckpointError
        For a folder without safetensors, and for every header or index that does not hold.
    """
    names = names_in(folder)
    if SINGLE_FILE in names:
        return read_header(folder / SINGLE_FILE)
    if INDEX_FILE in names:
        return read_shards(folder)
    pickles = [name for name in names if PurePath(name).suffix in (".bin", ".pt", ".pth", ".pkl")]
    if pickles:
        raise CheckpointError(
            f"holds {pickles[0]}, a pickle file, which can run code when opened and is "
            "never read; save the model as safetensors (save_pretrained does)",
            file=folder,
        )
    raise CheckpointError(f"holds neither {SINGLE_FILE} nor {INDEX_FILE}", file=folder)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, in order."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{error.strerror}", file=folder) from None


def read_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of every shard that the folder's index names, index and shards agreeing."""
    path = folder / INDEX_FILE
    index = read_json(path, limit=LONGEST_INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("weight_map must map tensor names to file names", file=path)
    named: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not (isinstance(file, str) and file.endswith(".safetensors") and is_plain_name(file)):
            raise CheckpointError(
                f"is placed in {brief(file)}; that must be the name of a .safetensors file in the "
                "same folder",
                file=path,
                tensor=name,
            )
        named.setdefault(file, []).append(name)
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
        For what is no model folder, saying what it might be instead.
    """
    check_is_folder(folder)
    path = folder / "config.json"
    if is_absent(path):
        gguf = sorted(file.name for file in folder.glob("*.gguf"))
        models = sorted(file.parent.name for file in folder.glob("*/config.json"))
        if gguf:
            advice = f"; it holds {gguf[0]}, and {without_gguf(gguf[0])}"
        elif models:
            advice = f"; its folders with models are {', '.join(models[:MOST_NAMED])}"
            advice += ", ..." if len(models) > MOST_NAMED else ""
        else:
            advice = ""
        raise CheckpointError(f"is no model folder, it has no config.json{advice}", file=folder)
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError("must be a JSON object", file=path)
    return config


def check_is_folder(folder: Path) -> None:
    """Raise `CheckpointError` for what is no folder, with what to give in its place."""
    if folder.is_dir():
        return
    advice = ""
    if folder.suffix == ".gguf":
        advice = f"; {without_gguf(folder.name)}"
    elif folder.is_file():
        advice = f"; it is a file, and a model is the folder with config.json: {folder.parent}"
    elif is_absent(folder):
        advice = "; there is nothing of that name"
    raise CheckpointError(f"is not a folder with a model{advice}", file=folder)


def without_gguf(name: str) -> str:
    return (
        "GGUF is not read: load it with transformers "
        f"(from_pretrained with gguf_file={name!r}) and save it with save_pretrained"
    )
