"""Which tensors of a design fill which parameters of a model, by transformers' own key mapping.

transformers 5 keeps the experts of a layer in one parameter and says, for each family, which
tensors of a checkpoint it is made of. That mapping is followed here; files are not needed for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_fast.checkpoint.design import Design
from moe_fast.errors import CheckpointError
from moe_fast.storage.tensors import Weight


class Sources(NamedTuple):
    """What fills a parameter: names of tensors by the pattern that they match.

    Without a `converter` it is one tensor, under its own name or another.
    """

    converter: Any
    names: dict[str, list[str]]

    def __str__(self) -> str:
        names = [name for names in self.names.values() for name in names]
        return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def match_weights(
    model: nn.Module, parameters: Mapping[str, Tensor], design: Design
) -> dict[str, Weight]:
    """The weight of the design that each parameter of the model takes.

    Of names that share a parameter, one is in the result.

    Raises
    ------
    CheckpointError
        With every tensor that no parameter takes, every parameter that none fills, and every shape
        that differs.
    """
    found, problems = find_sources(model, parameters, design)
    weights: dict[str, Weight] = {}
    filled: dict[int, str] = {}
    for name, sources in found.items():
        parameter = parameters[name]
        if id(parameter) in filled:
            problems.append(
                f"parameter {name!r} is {filled[id(parameter)]!r} too, and the design has a tensor "
                "for each: make the model with tie_word_embeddings=False"
            )
            continue
        filled[id(parameter)] = name
        weight = combine(sources, design)
        if isinstance(weight, str):
            problems.append(f"parameter {name!r}: {weight}")
        elif weight.shape != tuple(parameter.shape):
            problems.append(
                f"parameter {name!r} has the shape {tuple(parameter.shape)}; the design has "
                f"{weight.shape} for it ({sources})"
            )
        else:
            weights[name] = weight
    problems += [
        f"parameter {name!r}: the design has no tensor for it"
        for name, parameter in parameters.items()
        if id(parameter) not in filled
    ]
    if problems:
        raise CheckpointError(*problems)
    return weights


def find_sources(
    model: nn.Module, parameters: Mapping[str, Tensor], design: Design
) -> tuple[dict[str, Sources], list[str]]:
    """The tensors for each parameter, and what is wrong with the others."""
    renamings, converters = read_key_mapping(model)
    found: dict[str, Sources] = {}
    problems = []
    for name in sorted(design.names(), key=by_numbers):
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


def combine(sources: Sources, design: Design) -> Weight | str:
    """The tensors of a parameter as one weight, or why that cannot be."""
    if sources.converter is None:
        return design.weights[sources.names[""][0]]
    steps = [
        (type(step).__name__, getattr(step, "dim", 0)) for step in sources.converter.operations
    ]
    parts = [
        [design.weights[name] for name in sources.names.get(pattern, ())]
        for pattern in sources.converter.source_patterns
    ]
    merge, join = ("MergeModulelist", 0), ("Concatenate", 1)
    if steps not in ([merge], [merge, join]) or (steps == [merge] and len(parts) > 1):
        made = ", ".join(f"{name} along {dimension}" for name, dimension in steps)
        return f"transformers makes it of {sources} by {made}, which load_into does not know"
    if len({len(part) for part in parts}) > 1:
        counts = ", ".join(
            f"{len(part)} of {pattern}"
            for pattern, part in zip(sources.converter.source_patterns, parts, strict=True)
        )
        return f"it is made of as many tensors of each kind, and the design has {counts}"
    # The experts one after the other, of each its matrices one below the other.
    rows = [weight for expert in zip(*parts, strict=True) for weight in expert]
    if len({(weight.dtype, weight.shape[1:]) for weight in rows}) > 1:
        return f"the tensors that it is made of ({sources}) differ in dtype or width"
    height = sum(part[0].shape[0] for part in parts)
    if len(rows[0].shape) != 2 or any(
        weight.shape[0] != part[0].shape[0] for part in parts for weight in part
    ):
        return f"the tensors that it is made of ({sources}) differ in shape from expert to expert"
    return Weight.stacked(rows, (len(parts[0]), height, rows[0].shape[1]))


def by_numbers(name: str) -> list[tuple[int, str]]:
    """Sorts expert 10 after expert 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
