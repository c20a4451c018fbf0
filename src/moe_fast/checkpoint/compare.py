"""`compare_moe`: whether two checkpoints hold the same model, however they store it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_fast.checks import as_number
from moe_fast.dtypes import ITEM_SIZES
from moe_fast.errors import MoeConfigError
from moe_fast.families.config import NUM_EXPERTS_KEYS
from moe_fast.models.folder import find_second_weights
from moe_fast.models.moe import MoeLayer, MoeModel, open_moe_model, role_of, slices_of
from moe_fast.progress import Progress, as_progress
from moe_fast.records import dataclass
from moe_fast.reports import Report, frame_of
from moe_fast.request import ModelPath
from moe_fast.storage.arithmetic import E4M3
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode_any
from moe_fast.storage.safetensors_header import Tensor

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["CompareReport", "WeightDifference", "compare_moe"]
CHUNK = 1024 * 1024
# Keys of config.json that say how a model is stored or was saved, or that have several spellings.
NOT_OF_THE_MODEL = frozenset(
    (
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"),
        *("transformers_version", "tie_word_embeddings", "rope_scaling", "rope_parameters"),
        *("quantization_config", "rope_theta", *NUM_EXPERTS_KEYS),
    )
)
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class WeightDifference:
    """One difference between two models.

    Attributes
    ----------
    layer : str or None
        The layer: `"3"`, or `"mtp.0"` for multi-token prediction. `None` outside the layers.
    expert : int or None
        The expert; `None` for what belongs to no expert.
    role : str
        What differs in it, such as `"gate_proj"`, `"router"` or `"config.json"`.
    difference : str
        How it differs.
    greatest : float or None
        The greatest absolute difference of two numbers; `None` if there are none to compare.
    """

    layer: str | None
    expert: int | None
    role: str
    difference: str
    greatest: float | None = None

    def __str__(self) -> str:
        places = (
            None if self.layer is None else f"layer {self.layer}",
            None if self.expert is None else f"expert {self.expert}",
        )
        return f"{', '.join(filter(None, (*places, self.role)))}: {self.difference}"


@dataclass(frozen=True)
class CompareReport(Report):
    """How two models differ.

    Attributes
    ----------
    first, second : Path
        The folders.
    equal : bool
        Whether no weight differs by more than `tolerance`, and nothing else differs.
    tolerance : float
        The absolute difference of two numbers that was allowed.
    num_weights : int
        Matrices and vectors that are in one model or both.
    num_bytes : int
        Bytes of the first model that were compared.
    greatest : float
        The greatest absolute difference of two numbers, within the tolerance or not.
    layouts : (str, str)
        How each model stores its experts.
    differences : tuple of WeightDifference
        Every difference beyond the tolerance.
    warnings : tuple of str
        Folders that hold two sets of weights, and which of them was read.
    """

    first: Path
    second: Path
    equal: bool
    tolerance: float
    num_weights: int
    num_bytes: int
    greatest: float
    layouts: tuple[str, str]
    differences: tuple[WeightDifference, ...] = field(repr=False)
    warnings: tuple[str, ...] = ()

    def to_frame(self) -> DataFrame:
        """Return the differences as a pandas data frame, one row per difference.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return frame_of(self.differences, WeightDifference)


class Part(NamedTuple):
    """What a weight is in a model, however it is stored."""

    layer: str | None
    expert: int | None
    role: str


def compare_moe(
    first: ModelPath,
    second: ModelPath,
    *,
    tolerance: float = 0.0,
    progress: Progress | None = None,
) -> CompareReport:
    """Compare two checkpoints, MoE or dense, made by any tool.

    The layout, the number of files, the order of tensors, whether a tied head is stored, and the
    dtype of equal numbers are ignored. Keys of `config.json` that both have are compared too,
    except those that say how weights are stored. Both models are streamed, a few megabytes at a
    time.

    Parameters
    ----------
    first, second : path
        The model folders.
    tolerance : float
        The largest absolute difference of two numbers that counts as equal.
    progress : bool or callable, optional
        `True` shows a bar; a function is called repeatedly with the number of bytes of the first
        model compared so far and in total.

    Returns
    -------
    CompareReport

    Raises
    ------
    CheckpointError
        If a folder contains no model, or a header is invalid.
    TypeError, MoeConfigError
        If the tolerance is not a number of at least 0.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, compare_moe, convert_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> _ = convert_moe(f"{folder}/moe", f"{folder}/fused", layout="fused")
    >>> compare_moe(f"{folder}/moe", f"{folder}/fused").equal
    True
    """
    shows = as_progress(progress, "comparing")
    allowed = as_number(tolerance, "tolerance")
    if not 0 <= allowed < math.inf:
        raise MoeConfigError(f"tolerance must be a finite number of at least 0, got {allowed}")
    models = open_moe_model(first), open_moe_model(second)
    parts, others = (dict(parts_of(model)) for model in models)
    differences = list(config_differences(*models))
    total = sum(tensor.nbytes for part, tensor in parts.items() if part in others)
    done, greatest = 0, 0.0
    with OpenFiles() as files:
        for part, tensor in parts.items():
            if part not in others:
                differences.append(WeightDifference(*part, f"is only in {models[0].path}"))
                continue
            other = others[part]
            if tensor.shape != other.shape:
                shapes = f"{list(tensor.shape)} and {list(other.shape)}"
                differences.append(WeightDifference(*part, f"has the shapes {shapes}"))
                continue
            furthest = furthest_apart(tensor, other, files)
            if furthest is None:
                differences.append(WeightDifference(*part, "has different bytes"))
            else:
                greatest = max(greatest, furthest)
                if furthest > allowed:
                    text = f"differs by up to {furthest:.6g}"
                    differences.append(WeightDifference(*part, text, furthest))
            done += tensor.nbytes
            if shows is not None:
                shows(done, total)
    differences += [
        WeightDifference(*part, f"is only in {models[1].path}")
        for part in others
        if part not in parts
    ]
    return CompareReport(
        first=models[0].path,
        second=models[1].path,
        equal=not differences,
        tolerance=allowed,
        num_weights=len(parts.keys() | others.keys()),
        num_bytes=total,
        greatest=greatest,
        layouts=(models[0].layout, models[1].layout),
        differences=tuple(sorted(differences, key=place_of)),
        warnings=tuple(dict.fromkeys(w for m in models for w in find_second_weights(m.path))),
    )


def place_of(difference: WeightDifference) -> tuple[list[str | int], int]:
    """The key that puts differences in the order of layers and experts, all others first."""
    layer = re.split(r"(\d+)", difference.layer or "")
    expert = -1 if difference.expert is None else difference.expert
    return [int(part) if part.isdecimal() else part for part in layer], expert


def parts_of(model: MoeModel) -> Iterator[tuple[Part, Tensor]]:
    """Every weight by what it is, in the order of the files."""
    blocks = {layer.block: layer for layer in model.layers}
    for name, tensor in sorted(
        model.tensors.items(), key=lambda item: (item[1].file.path, item[1].offset)
    ):
        if name.endswith("rotary_emb.inv_freq"):  # readers compute it
            continue
        if name in model.places:
            layer, expert, inner = model.places[name]
            yield from parts_of_layer(model, layer, expert, inner, tensor)
            continue
        block = next((b for b in blocks_around(name) if b in blocks), None)
        if block is not None and model.axis.block:
            yield Part(blocks[block].key, None, name.removeprefix(f"{block}.")), tensor
        else:
            yield Part(None, None, name), tensor
    heads = [name for name in model.tensors if name.endswith(HEAD)]
    tied = [name for name in model.tensors if name.endswith(EMBEDDING)]
    if not heads and len(tied) == 1:
        yield Part(None, None, HEAD), model.tensors[tied[0]]


def blocks_around(name: str) -> Iterator[str]:
    """The beginnings of a name at its dots, the longest first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def parts_of_layer(
    model: MoeModel, layer: MoeLayer, expert: int | None, inner: str, tensor: Tensor
) -> Iterator[tuple[Part, Tensor]]:
    """What a tensor that counts experts holds."""
    if expert is not None:
        yield Part(layer.key, expert, role_of(inner, model.axis) or inner), tensor
    elif inner == layer.router_name:
        yield Part(layer.key, None, "router"), tensor
    elif len(tensor.shape) > 1 and (inner.startswith("experts.") or inner in model.axis.stacked):
        roles = model.axis.stacked.get(inner, (inner.removeprefix("experts."),))
        for number, slices in enumerate(slices_of(tensor, roles)):
            for role, part in slices.items():
                yield Part(layer.key, number, role), part
    else:
        yield Part(layer.key, None, inner), tensor


def config_differences(first: MoeModel, second: MoeModel) -> Iterator[WeightDifference]:
    """Keys that both models' language models have, with other values."""
    other = second.language_config
    for key, value in first.language_config.items():
        if key not in NOT_OF_THE_MODEL and key in other and value != other[key]:
            text = f"{key} is {value!r} and {other[key]!r}"
            yield WeightDifference(None, None, "config.json", text)
    ropes = [rope_of(model.language_config) for model in (first, second)]
    if all(ropes) and ropes[0] != ropes[1]:
        text = f"the rope is {ropes[0]!r} and {ropes[1]!r}"
        yield WeightDifference(None, None, "config.json", text)


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding from whichever keys say it; empty if none does."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            rope |= config[key]
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    if rope:
        kind = rope.pop("type", "default")
        rope.setdefault("rope_type", kind)
    return rope


def furthest_apart(first: Tensor, second: Tensor, files: OpenFiles) -> float | None:
    """The greatest difference of two tensors' numbers; `None` where their bytes are none."""
    sizes = ITEM_SIZES[first.dtype], ITEM_SIZES[second.dtype]
    count = math.prod(first.shape)
    furthest = 0.0
    for start in range(0, count, CHUNK // max(sizes)):
        number = min(CHUNK // max(sizes), count - start)
        one, other = (
            files.read(tensor.file, tensor.offset + start * size, number * size)
            for tensor, size in zip((first, second), sizes, strict=True)
        )
        if first.dtype == second.dtype and one == other:
            continue
        values, others = values_of(one, first.dtype), values_of(other, second.dtype)
        if values is None or others is None:
            return None
        furthest = max(furthest, greatest_difference(values, others))
    return furthest


def values_of(data: bytearray, dtype: str) -> npt.NDArray[np.float64] | None:
    if dtype == "F8_E4M3":
        return E4M3[np.frombuffer(data, np.uint8)]
    return decode_any(data, dtype, (-1,))


def greatest_difference(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> float:
    """Infinite where one is NaN alone; two NaN are equal, and so are two infinities of a sign."""
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        apart = np.abs(first[~same] - second[~same])
    return float(np.where(np.isnan(apart), np.inf, apart).max())
