"""Files that say which experts: to keep, to join, and what each is worth.

Layers have the model's own numbers; those that predict several tokens ahead are `mtp.0`, `mtp.1`.
Every problem names the file and the layer.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.arrangement import Group
from moe_fast.checks import as_path
from moe_fast.errors import CheckpointError
from moe_fast.models.inspection import read_floats
from moe_fast.models.moe import MoeModel, is_mtp
from moe_fast.models.scores import digest_routers
from moe_fast.reports import Report
from moe_fast.storage.files import OpenFiles, open_regular
from moe_fast.storage.safetensors_header import Tensor, read_header
from moe_fast.storage.strict_json import LONGEST_INDEX, brief, parse_json
from moe_fast.wording import format_runs

Keep = dict[str, tuple[int, ...]]
Doubles = npt.NDArray[np.float64]
Scores = dict[str, Doubles]
# What the lines of a file call a layer and its experts, where each line is one layer.
LINE_KEYS = (("layer", "layer_idx", "layer_id"), ("experts", "keep", "expert_ids"))


def read_keep(keep: Any, model: MoeModel) -> tuple[Keep, str, list[str]]:
    """The experts to keep in each layer, in the model's order; what to call the list; warnings.

    `keep` is a file, or what one holds: `{"layers": {"3": [0, 2, 5]}}`, or a plain list for every
    layer.

    Raises
    ------
    CheckpointError
        With every problem of it.
    """
    value, where = value_of(keep, "keep")
    layers, warnings = by_layer(value, where, model)
    return check_keep(layers, model, where), where, warnings


def check_keep(keep: Mapping[str, Any], model: MoeModel, where: str) -> Keep:
    """The lists in the model's order; raise `CheckpointError` for all that cannot be."""
    problems = []
    checked: Keep = {}
    for layer in model.layers:
        experts, count, here = (
            keep.get(layer.key),
            len(layer.experts),
            f"{where}: layer {layer.key}",
        )
        if experts is None:
            problems.append(f"{here} is missing")
            continue
        found = list(list_problems(experts, count, here))
        if not found and not len(experts):
            found = [f"{here} keeps no expert"]
        if found:
            problems += found
        else:
            checked[layer.key] = tuple(sorted(experts))
    problems += unknown_layers(keep, model, where)
    counts = {key: len(experts) for key, experts in checked.items()}
    if not problems and len(set(counts.values())) > 1:
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        problems.append(
            f"{where}: layer {fewest} keeps {counts[fewest]} experts, layer {most} {counts[most]}; "
            f"config.json of a {model.model_type} holds one number for all layers"
        )
    if problems:
        raise CheckpointError(*problems)
    return checked


def list_problems(experts: Any, count: int, here: str) -> Iterator[str]:
    """What is wrong in a list of experts."""
    if isinstance(experts, str) or not isinstance(experts, Sequence):
        yield f"{here} must list experts, got {brief(experts)}"
        return
    seen = set()
    for expert in experts:
        if type(expert) is not int:
            yield f"{here}: {brief(expert)} is not the number of an expert"
        elif not 0 <= expert < count:
            yield f"{here}: expert {expert} is none of the {count}, which are 0 to {count - 1}"
        elif expert in seen:
            yield f"{here}: expert {expert} stands twice"
        seen.add(expert) if type(expert) is int else None


def unknown_layers(layers: Mapping[str, Any], model: MoeModel, where: str) -> Iterator[str]:
    known = [layer.key for layer in model.layers]
    for key in layers:
        if key not in known:
            yield f"{where}: layer {brief(key)} has no experts; these have: {listed(known)}"


def listed(keys: Sequence[str]) -> str:
    numbers = [int(key) for key in keys if key.isdecimal()]
    others = [key for key in keys if not key.isdecimal()]
    return ", ".join(filter(None, (format_runs(numbers), *others)))


def by_layer(value: Any, where: str, model: MoeModel) -> tuple[dict[str, Any], list[str]]:
    """What a file says of each layer; what it leaves out of those that predict ahead is filled."""
    if isinstance(value, Mapping) and isinstance(value.get("layers"), Mapping):
        layers = {str(key): item for key, item in value["layers"].items()}
    elif is_plain_list(value):
        return {layer.key: value for layer in model.layers}, []
    elif isinstance(value, Mapping):
        raise CheckpointError(
            f"{where}: must have the key 'layers', an object of layers by number, such as "
            '{"layers": {"0": [0, 2]}}'
        )
    else:
        raise CheckpointError(
            f"{where}: must be an object or a list of experts, got {brief(value)}"
        )
    ordinary = [layer.key for layer in model.layers if not is_mtp(layer)]
    missing = [layer.key for layer in model.layers if is_mtp(layer) and layer.key not in layers]
    if not missing or not ordinary or ordinary[-1] not in layers:
        return layers, []
    last = ordinary[-1]
    layers |= dict.fromkeys(missing, layers[last])
    warning = f"{where}: leaves out {', '.join(missing)}: the list of layer {last} serves for it"
    return layers, [warning]


def is_plain_list(value: Any) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    return not any(isinstance(item, (dict, list, tuple)) for item in value)


def value_of(given: Any, name: str) -> tuple[Any, str]:
    """What a file holds, or what stands for one, and what messages call it."""
    if not isinstance(given, (str, os.PathLike)):
        return given, name
    path = as_path(given, name)
    with open_regular(path) as stream:
        text = stream.read(LONGEST_INDEX + 1)
    if len(text) > LONGEST_INDEX:
        raise CheckpointError(f"{path}: is longer than {LONGEST_INDEX} bytes")
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and is_json(lines[0]):
        wrong = next((n for n, line in enumerate(lines, 1) if not is_json(line)), None)
        if wrong is not None:
            line = lines[wrong - 1].decode("utf-8", "replace")
            raise CheckpointError(
                f"{path}: line {wrong} must be a JSON list or object, as line 1 is; "
                f"got {brief(line)}"
            )
        return of_lines([parse_json(line, path) for line in lines], path), str(path)
    return parse_json(text, path), str(path)


def is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list))
    except (ValueError, RecursionError):
        return False


def of_lines(lines: Sequence[Any], path: Path) -> dict[str, Any]:
    """A file of one line for each layer: a list, or an object with the keys of `LINE_KEYS`."""
    layers: dict[str, Any] = {}
    for number, line in enumerate(lines):
        if isinstance(line, list):
            key, experts = number, line
        else:
            found = [next((name for name in names if name in line), None) for names in LINE_KEYS]
            if None in found:
                raise CheckpointError(
                    f"{path}: line {number + 1} must be a list of experts, or an object with the "
                    "keys 'layer' and 'experts'"
                )
            key, experts = (line[name] for name in found)
        if str(key) in layers:
            raise CheckpointError(f"{path}: line {number + 1}: layer {brief(key)} stands twice")
        layers[str(key)] = experts
    return {"layers": layers}


def read_groups(
    groups: Any, model: MoeModel
) -> tuple[dict[str, tuple[Group, ...]], str, list[str]]:
    """The groups of experts that become one each in each layer; what to call them; warnings.

    A group is a list, or `{"experts": [0, 5], "weights": [0.7, 0.3]}`; a list of groups is for
    every layer.

    Raises
    ------
    CheckpointError
        With every problem: groups that overlap, leave an expert out, or do not fit the model.
    """
    value, where = value_of(groups, "groups")
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = {"layers": {layer.key: value for layer in model.layers}}
    layers, warnings = by_layer(value, where, model)
    read: dict[str, tuple[Group, ...]] = {}
    problems = []
    for key, items in layers.items():
        here = f"{where}: layer {key}"
        if isinstance(items, str) or not isinstance(items, Sequence):
            problems.append(f"{here} must list groups of experts, got {brief(items)}")
            continue
        found = [as_group(item, f"{here}, group {number}") for number, item in enumerate(items)]
        problems += [problem for problem in found if isinstance(problem, str)]
        read[key] = tuple(group for group in found if isinstance(group, Group))
    if problems:
        raise CheckpointError(*problems)
    check_groups(read, model, where)
    return read, where, warnings


def as_group(item: Any, here: str) -> Group | str:
    """A group of a file, or what is wrong with it."""
    weights: Any = ()
    if isinstance(item, Mapping):
        if item.keys() - {"experts", "weights"} or "experts" not in item:
            return f"{here} must have the keys 'experts' and 'weights', got {brief(sorted(item))}"
        weights = item.get("weights", ())
        item = item["experts"]
    if isinstance(item, str) or not isinstance(item, Sequence) or not item:
        return f"{here} must list experts, got {brief(item)}"
    if not all(type(expert) is int for expert in item):
        return f"{here} must list numbers of experts, got {brief(item)}"
    if isinstance(weights, str) or not isinstance(weights, Sequence):
        return f"{here}: weights must be a list, got {brief(weights)}"
    if weights and not all(
        type(w) in (int, float) and math.isfinite(w) and w >= 0 for w in weights
    ):
        return f"{here}: weights must be finite and at least 0, got {brief(weights)}"
    if weights and (len(weights) != len(item) or not sum(weights) > 0):
        return f"{here}: {len(item)} experts need as many weights, not all 0, got {brief(weights)}"
    return Group(tuple(item), tuple(map(float, weights)))


def check_groups(groups: Mapping[str, Sequence[Group]], model: MoeModel, where: str) -> None:
    """Raise `CheckpointError` unless the groups of each layer share out its experts."""
    problems = []
    for layer in model.layers:
        count, here = len(layer.experts), f"{where}: layer {layer.key}"
        if layer.key not in groups:
            problems.append(f"{here} is missing")
            continue
        members = [expert for group in groups[layer.key] for expert in group.experts]
        problems += list_problems(members, count, here)
        absent = sorted(set(range(count)) - set(members))
        if absent:
            problems.append(f"{here}: no group has expert {format_runs(absent)}")
    problems += unknown_layers(groups, model, where)
    counts = {key: len(found) for key, found in groups.items()}
    if not problems and len(set(counts.values())) > 1:
        problems.append(
            f"{where}: layers have {format_runs(sorted(set(counts.values())))} groups; config.json "
            f"of a {model.model_type} holds one number for all layers"
        )
    if problems:
        raise CheckpointError(*problems)


def read_scores(scores: Any, by: str, model: MoeModel, *, least: float | None = None) -> Scores:
    """What each expert is worth by one measure, at least `least`, `(E,)` for each layer.

    Those of layers that predict ahead may be left out.

    Raises
    ------
    CheckpointError
        With every problem of them: another model's, a NaN, an unknown measure.
    """
    value, where = scores_of(scores)
    if not isinstance(value, Mapping) or not isinstance(value.get("layers"), Mapping):
        raise CheckpointError(
            f"{where}: must have the key 'layers', such as "
            '{"layers": {"0": {"reap": [0.5, 0.1]}}}'
        )
    layers = {str(key): item for key, item in value["layers"].items()}
    problems = [*other_model(value, model, where), *unknown_layers(layers, model, where)]
    read: Scores = {}
    for layer in model.layers:
        here, count = f"{where}: layer {layer.key}", len(layer.experts)
        if layer.key not in layers:
            if not is_mtp(layer):
                problems.append(f"{here} is missing")
            continue
        measures = layers[layer.key]
        if not isinstance(measures, Mapping) or by not in measures:
            has = ", ".join(measures) if isinstance(measures, Mapping) else brief(measures)
            problems.append(f"{here} has no {by!r}; it has {has or 'nothing'}")
            continue
        numbers = measures[by]
        if not isinstance(numbers, list) or len(numbers) != count:
            size = len(numbers) if isinstance(numbers, list) else brief(numbers)
            problems.append(f"{here}: {by} must list {count} numbers, one an expert, got {size}")
        elif not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
            bad = next(n for n in numbers if type(n) not in (int, float) or not math.isfinite(n))
            problems.append(f"{here}: {by} holds {brief(bad)}; scores must be finite numbers")
        elif least is not None and min(numbers) < least:
            problems.append(
                f"{here}: {by} holds {min(numbers)}; weights of a mean are at least {least}"
            )
        else:
            read[layer.key] = np.array(numbers, np.float64)
    if problems:
        raise CheckpointError(*problems)
    return read


def scores_of(scores: Any) -> tuple[Any, str]:
    """What a file of scores, or a report of `score_experts`, holds, and what messages call it."""
    value, where = value_of(scores, "scores")
    return (value.to_dict() if isinstance(value, Report) else value), where


def read_similarities(scores: Any, model: MoeModel) -> dict[str, tuple[Doubles, Doubles]]:
    """The mean outputs, `(E, width)`, and the similarity of logits, `(E, E)`, of each layer.

    They stand in the file that the scores name, or beside the scores of a layer.

    Raises
    ------
    CheckpointError
        Scores without them.
    """
    value, where = scores_of(scores)
    stored: Mapping[str, Tensor] = {}
    if isinstance(value.get("arrays"), str):
        name = Path(value["arrays"])
        beside = Path(scores).parent / name.name if isinstance(scores, (str, os.PathLike)) else name
        stored = read_header(beside)
    found: dict[str, tuple[Doubles, Doubles]] = {}
    problems = []
    with OpenFiles() as files:
        for layer in model.layers:
            if is_mtp(layer):
                continue
            count = len(layer.experts)
            matrices = []
            for kind in ("mean_outputs", "gate_similarity"):
                here = f"{where}: layer {layer.key}: {kind}"
                tensor = stored.get(f"layers.{layer.key}.{kind}")
                given = value["layers"][layer.key].get(kind) if tensor is None else None
                matrix = given if tensor is None else read_floats(tensor, files)
                if matrix is None:
                    problems.append(
                        f"{here} is missing; score --mean-outputs --gate-similarity stores them"
                    )
                    continue
                try:
                    array = np.asarray(matrix, np.float64)
                except (TypeError, ValueError):
                    array = np.zeros(0)
                width = count if kind == "gate_similarity" else array.shape[-1]
                if array.shape != (count, width) or not np.isfinite(array).all():
                    problems.append(
                        f"{here} must be {count} rows of finite numbers, one an expert, got shape "
                        f"{list(array.shape)}"
                    )
                matrices.append(array)
            if len(matrices) == 2:
                found[layer.key] = (matrices[0], matrices[1])
    if problems:
        raise CheckpointError(*problems)
    return found


def other_model(scores: Mapping[str, Any], model: MoeModel, where: str) -> Iterator[str]:
    """That scores are of another model, where they tell which one they are of."""
    digest = scores.get("routers_sha256")
    if digest is not None and digest != digest_routers(model):
        yield (
            f"{where}: are the scores of another model, {brief(scores.get('model'))}: its routers "
            f"are not those of {model.path}"
        )


def best_experts(scores: Scores, number: int, groups: int = 1) -> dict[str, list[int]]:
    """The experts of each layer with the greatest scores, as many from each group.

    Of equal scores the expert with the lower number comes first.
    """
    chosen = {}
    for key, values in scores.items():
        size = len(values) // groups
        kept = []
        for first in range(0, size * groups, size):
            order = np.argsort(-values[first : first + size], kind="stable")[: number // groups]
            kept += (order + first).tolist()
        chosen[key] = sorted(kept)
    return chosen
