"""`convert_moe`: an MoE checkpoint in another layout or dtype."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moe_fast.checkpoint.card import CARD, updated_card
from moe_fast.checkpoint.design import Design, Facts, design_of, find_rounding, make_design
from moe_fast.checkpoint.manifest import Manifest
from moe_fast.checkpoint.output import Progress, Writing, warn_of_overflow
from moe_fast.checks import as_index, as_member
from moe_fast.config import Dtype, Layout
from moe_fast.dtypes import DTYPE_CODES, WEIGHT_DTYPES
from moe_fast.errors import CheckpointError
from moe_fast.families.config import NUM_EXPERTS_KEYS, first_size, read_rope
from moe_fast.families.moe import MoeFamily, joined
from moe_fast.families.readers import find_readers
from moe_fast.families.registry import moe_families
from moe_fast.families.rules import Reader
from moe_fast.models.folder import find_second_weights
from moe_fast.models.inspection import read_floats
from moe_fast.models.moe import MoeLayer, MoeModel, open_moe_model
from moe_fast.models.structure import structure_problems
from moe_fast.reports import Report, frame_of
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request
from moe_fast.routing.health import complaint_on_random_tokens
from moe_fast.storage.companions import find_companions, find_missing_code, has_tokenizer
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode_any
from moe_fast.storage.safetensors_header import Tensor, read_header_and_metadata
from moe_fast.storage.tensors import FORMAT, OutputTensor, Weight
from moe_fast.wording import numbered

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["ConvertReport", "convert_moe"]


@dataclass(frozen=True)
class ConvertReport(Report):
    """What was converted, and which readers load the result.

    The dtypes are those of the weights, as safetensors spells them.
    """

    output: Path
    model_type: str
    layout_before: str
    layout: str
    dtypes_before: tuple[str, ...]
    dtypes: tuple[str, ...]
    num_tensors: int
    num_bytes: int
    num_files: int
    seconds: float
    readers: tuple[Reader, ...] = field(repr=False)
    dry_run: bool = False
    warnings: tuple[str, ...] = ()

    def to_frame(self) -> DataFrame:
        """The readers as a pandas data frame, one row a program.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return frame_of(self.readers, Reader)


@dataclass(frozen=True)
class ConvertRequest(Request):
    """One MoE to write in another layout or dtype; `model` is a folder."""

    operation: ClassVar[str] = "convert"

    model: str
    layout: Layout | None = None
    dtype: Dtype | None = None
    max_shard_size: int = DEFAULT_SHARD_SIZE

    def folders(self) -> list[str]:
        return [self.model]

    def moved(self, now: Mapping[str, str]) -> ConvertRequest:
        return replace(self, model=now[self.model])


@dataclass(frozen=True)
class ConvertDesign(Design):
    """A design with what the report of a conversion tells."""

    model: MoeModel = field(kw_only=True, repr=False)
    layout: Layout = field(kw_only=True)
    readers: tuple[Reader, ...] = field(kw_only=True, repr=False)


def convert_moe(
    model: ModelPath,
    output: ModelPath,
    *,
    layout: Layout | str | None = None,
    dtype: Dtype | str | None = None,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write an MoE checkpoint, whoever made it, in another layout or dtype.

    Experts move between one tensor each and the fused tensors that hold all of a layer; weights
    keep their bytes unless another dtype is asked for. `config.json` gets the spellings of
    transformers 4 and 5, whichever it had.

    Parameters
    ----------
    model : path
        A folder with an MoE of a family that `build_moe` can build.
    output : path
        The folder to create.
    layout : Layout or str, optional
        `"per-expert"` or `"fused"`; by default the one it has, in new files.
    dtype : Dtype or str, optional
        `"float32"`, `"bfloat16"` or `"float16"`: what every weight is converted to, rounded to
        nearest and to even. By default weights keep theirs. The report warns of weights that
        float16 does not hold, and of experts whose router weights rounding makes the same.
    max_shard_size : int
        Bytes of weights per file, at most, unless a single tensor is larger.
    overwrite, threads, executor, checksum, fsync, dry_run, progress
        As in `build_moe`.

    Returns
    -------
    ConvertReport

    Raises
    ------
    CheckpointError
        For a model that is none of these families or does not hold together, with every reason.
    TypeError, MoeConfigError
        An argument of the wrong kind or out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, convert_moe
    >>> from moe_fast.demo import make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = convert_moe(f"{folder}/moe", f"{folder}/fused", layout="fused")
    >>> report.layout_before, report.layout, report.num_tensors
    ('per-expert', 'fused', 20)
    """
    request = ConvertRequest(
        model=str(Path(model).absolute()),
        layout=None if layout is None else as_member(layout, Layout, "layout"),
        dtype=None if dtype is None else as_member(dtype, Dtype, "dtype"),
        max_shard_size=as_index(max_shard_size, "max_shard_size", minimum=1),
    )
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    started = time.perf_counter()
    design = make_design(request, output, writing)
    assert isinstance(design, ConvertDesign)
    records = design.write(output, writing)
    return ConvertReport(
        output=Path(output),
        model_type=design.family,
        layout_before=design.model.layout,
        layout=str(design.layout),
        dtypes_before=distinct(tensor.dtype for tensor in design.model.tensors.values()),
        dtypes=distinct(weight.dtype for weight in design.weights.values()),
        num_tensors=len(design.weights),
        num_bytes=design.num_bytes,
        num_files=len(design.shards),
        seconds=time.perf_counter() - started,
        readers=design.readers,
        dry_run=writing.dry_run,
        warnings=(*design.warnings, *warn_of_overflow(records)),
    )


@design_of.register
def design_conversion(request: ConvertRequest, decisions: Facts | None = None) -> ConvertDesign:
    """From headers and routers alone."""
    model = open_moe_model(request.model)
    if not model.layers:
        raise CheckpointError(f"{model.path}: holds no experts; it is not an MoE")
    family = moe_families().get(model.model_type)
    if family is None:
        raise CheckpointError(
            f"{model.path / 'config.json'}: model_type {model.model_type!r} cannot be converted; "
            f"{', '.join(moe_families())} can"
        )
    problems = model.problems() or structure_problems(model)
    if problems:
        raise CheckpointError(*problems)
    layout = request.layout or Layout(model.layout)
    if layout not in family.layouts:
        raise CheckpointError(
            f"layout {str(layout)!r}: {family.title} has {str(family.layouts[0])!r} alone"
        )
    weights = dict(converted_tensors(model, family, layout, request.dtype))
    config = converted_config(model, request.dtype)
    tokenizer = has_tokenizer(model.path)
    readers = find_readers(config, layout, model.num_experts, has_tokenizer=tokenizer)
    companions = find_companions(model.path, model.config)
    card = updated_card(model.path / CARD, readers)
    if card is None and (model.path / CARD).is_file():
        companions[CARD] = model.path / CARD
    return ConvertDesign(
        weights=weights,
        config=config,
        companions=companions,
        sources=[model.tensors],
        family=family.name,
        num_experts=model.num_experts * len(model.layers),
        manifest=Manifest(request=request, family=family.name),
        reference=model.path,
        reason_to_differ=find_rounding(request.dtype, model.tensors),
        card=card,
        warnings=(
            *find_second_weights(model.path),
            *find_missing_code(model.path, model.config),
            *warn_of_rounding(model, family, layout, weights, request.dtype),
        ),
        metadata=metadata_of(model.tensors.values()),
        max_shard_size=request.max_shard_size,
        model=model,
        layout=layout,
        readers=readers,
    )


def converted_tensors(
    model: MoeModel, family: MoeFamily, layout: Layout, dtype: Dtype | None
) -> Iterator[OutputTensor]:
    """The model's tensors in their order, each layer's experts where its first one stood."""
    to = None if dtype is None else DTYPE_CODES[dtype]
    before = Layout(model.layout)
    layer_of: dict[str, MoeLayer] = {}
    routers: dict[str, str] = {}
    for layer in model.layers:
        for old in family.expert_tensors(layer.number, model.num_experts, before):
            layer_of[old.name] = layer
        routers[family.router_name(layer.number, before)] = family.router_name(layer.number, layout)

    def keep(tensor: Tensor) -> Weight:
        return Weight.of(tensor) if to is None else Weight.of(tensor).converted(to)

    if to is not None:
        refuse_other_dtypes(model)
    done = set()
    for name, tensor in model.tensors.items():
        if name not in layer_of:
            yield OutputTensor(routers.get(name, name), keep(tensor))
        elif layer_of[name].number not in done:
            layer = layer_of[name]
            done.add(layer.number)
            for new in family.expert_tensors(layer.number, model.num_experts, layout):
                parts = [layer.experts[expert][role] for expert, role in new.slices]
                if to is None:
                    check_dtypes(parts)
                weights = [keep(part) for part in parts]
                yield OutputTensor(new.name, joined(weights, new, model.num_experts))


def check_dtypes(parts: Sequence[Tensor]) -> None:
    """Raise `CheckpointError` for tensors of different dtypes, which one tensor cannot hold."""
    for part in parts:
        if part.dtype != parts[0].dtype:
            raise CheckpointError(
                f"{part.file.path}: tensor {part.name!r} is {part.dtype}, "
                f"others of its layer are {parts[0].dtype}; one tensor holds one dtype: "
                "name one to convert all to"
            )


def refuse_other_dtypes(model: MoeModel) -> None:
    """Raise `CheckpointError` for every tensor of a dtype that cannot be converted."""
    problems = [
        f"{tensor.file.path}: tensor {name!r} is {tensor.dtype}; "
        f"{', '.join(WEIGHT_DTYPES)} can be converted"
        for name, tensor in model.tensors.items()
        if tensor.dtype not in WEIGHT_DTYPES
    ]
    if problems:
        raise CheckpointError(*problems)


def warn_of_rounding(
    model: MoeModel,
    family: MoeFamily,
    layout: Layout,
    weights: Mapping[str, Weight],
    dtype: Dtype | None,
) -> list[str]:
    """Where routers tell experts apart, and no longer would once they are rounded to `dtype`."""
    if dtype is None:
        return []
    top_k = min(model.num_experts_per_tok or 2, model.num_experts)
    found: dict[str, list[int]] = {}
    with OpenFiles() as files:
        for layer in model.layers:
            assert layer.router is not None
            weight = weights[family.router_name(layer.number, layout)]
            data = b"".join(weight.read(0, weight.nbytes))
            before = read_floats(layer.router, files)
            after = decode_any(data, weight.dtype, weight.shape)
            if after is None or before is None or not np.isfinite(after).all():
                continue  # what became infinite is a warning of its own
            text = complaint_on_random_tokens(after, top_k)
            if text is not None and complaint_on_random_tokens(before, top_k) is None:
                found.setdefault(text, []).append(layer.number)
    return [
        f"{numbered('layer', layers)}: rounded to {dtype}, {text}; "
        f"build the MoE in {dtype} instead, or convert it after training"
        for text, layers in found.items()
    ]


def distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def converted_config(model: MoeModel, to: Dtype | None) -> dict[str, Any]:
    """The model's config.json with each key that readers spell differently in both spellings."""
    config = dict(model.config)
    file = model.path / "config.json"
    if "num_experts" in config or "num_local_experts" in config:
        number = first_size(config, NUM_EXPERTS_KEYS)
        config |= {"num_local_experts": number, "num_experts": number}
    if config.get("rope_parameters") is not None or config.get("rope_theta") is not None:
        config |= read_rope({"rope_theta": None, **config}, file).in_every_spelling()
    dtype = to or config.get("dtype") or config.get("torch_dtype")
    if isinstance(dtype, str):
        config |= {"dtype": str(dtype), "torch_dtype": str(dtype)}
    return config


def metadata_of(tensors: Iterable[Tensor]) -> dict[str, str]:
    """The metadata of the model's first file, which every new file gets."""
    first = min(Path(tensor.file.path) for tensor in tensors)
    return FORMAT | read_header_and_metadata(first)[1]
