"""Which weights of a design fill which parameters of a model, by transformers' own key mapping."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from moe_fast.checkpoint.design import Design
from moe_fast.errors import CheckpointError
from moe_fast.models.key_mapping import Sources, find_sources
from moe_fast.storage.tensors import Weight


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
    found, problems = find_sources(model, parameters, design.names())
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
