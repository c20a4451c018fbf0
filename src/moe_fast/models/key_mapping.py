"""Which parameter of a transformers model each tensor of a checkpoint goes to.

transformers 5 keeps the experts of a layer in one parameter and says, for each family, which
tensors of a checkpoint it is made of. That mapping is followed here; files are not needed for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn


class Sources(NamedTuple):
    """What fills a parameter: names of tensors by the pattern that they match.

    Without a `converter` it is one tensor, under its own name or another.
    """

    converter: Any
    names: dict[str, list[str]]

    def __str__(self) -> str:
        names = [name for names in self.names.values() for name in names]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def find_sources(
    model: nn.Module, parameters: Container[str], names: Iterable[str]
) -> tuple[dict[str, Sources], list[str]]:
    """The tensors of these names for each parameter, and what is wrong with the others."""
    renamings, converters = read_key_mapping(model)
    found: dict[str, Sources] = {}
    problems = []
    for name in sorted(names, key=by_numbers):
        parameter, converter, pattern = rename(name, renamings, converters)
        if parameter not in parameters and name in parameters:
            parameter, converter, pattern = name, None, ""
        if parameter not in parameters:
            problems.append(f"tensor {name!r}: {type(model).__name__} has no parameter for it")
            continue
        sources = found.setdefault(parameter, Sources(converter, {}))
        sources.names.setdefault(pattern, []).append(name)
        if sources.converter is not converter or (converter is None and len(sources.names[""]) > 1):
            problems.append(f"tensor {name!r}: {parameter!r} is filled by {sources} already")
    return found, problems


def read_key_mapping(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What transformers does to a checkpoint's names, in order: renamings, and then conversions.

    Nothing before transformers 5, whose parameters have the names of the checkpoint, and nothing
    for models that are not transformers'.
    """
    if "transformers" not in sys.modules:
        return [], []
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return [], []
    if not isinstance(model, PreTrainedModel):
        return [], []
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    return [entry for entry in mapping if entry not in converters], converters


def rename(name: str, renamings: Sequence[Any], converters: Sequence[Any]) -> tuple[str, Any, str]:
    """The parameter that a tensor goes to, what makes it, and which of its patterns matched."""
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        parameter, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return parameter, converter, pattern
    return name, None, ""


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
