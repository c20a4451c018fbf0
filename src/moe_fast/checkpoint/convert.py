"""`convert_moe`: an MoE checkpoint in another layout or dtype."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moe_fast.checkpoint.arrangement import is_weight
from moe_fast.checkpoint.card import CARD, updated_card
from moe_fast.checkpoint.design import Design, Facts, design_of, find_rounding, make_design
from moe_fast.checkpoint.manifest import Manifest
from moe_fast.checkpoint.output import Writing, warn_of_overflow
from moe_fast.checks import as_member, as_path, as_size
from moe_fast.config import Dtype, Layout, LayoutName
from moe_fast.dtypes import DTYPE_CODES, WEIGHT_DTYPES, as_weight_dtype
from moe_fast.errors import CheckpointError, Problem
from moe_fast.families.choice import check_layout
from moe_fast.families.config import read_rope
from moe_fast.families.key_types import with_floats
from moe_fast.families.moe import ExpertTensor, MoeFamily, joined
from moe_fast.families.readers import find_readers
from moe_fast.families.registry import moe_families
from moe_fast.families.rules import Reader
from moe_fast.models.folder import find_second_weights
from moe_fast.models.inspection import read_floats
from moe_fast.models.moe import MoeLayer, MoeModel, open_moe_model, require_layers
from moe_fast.models.quantisation import block_of, find_scales
from moe_fast.models.readers import contents_of, warn_of_readers
from moe_fast.models.structure import structure_problems
from moe_fast.progress import Progress
from moe_fast.records import dataclass
from moe_fast.reports import Report, frame_of
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request
from moe_fast.routing.health import complaint_on_random_tokens
from moe_fast.storage.companions import find_companions, find_missing_code
from moe_fast.storage.files import OpenFiles
from moe_fast.storage.floats import decode_any
from moe_fast.storage.fp8 import dequantised
from moe_fast.storage.safetensors_header import Tensor, read_header_and_metadata
from moe_fast.storage.tensors import FORMAT, OutputTensor, Weight
from moe_fast.wording import format_numbers

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from pandas import DataFrame

    from moe_fast.dtypes import DtypeLike

__all__ = ["ConvertReport", "convert_moe"]


@dataclass(frozen=True)
class ConvertReport(Report):
    """What `convert_moe` wrote.

    Attributes
    ----------
    output : Path
        The folder.
    model_type : str
        The family, as `config.json` names it.
    layout_before, layout : str
        `"per-expert"`, `"fused"` or `"mixed"`, of the model and of the output.
    dtypes_before, dtypes : tuple of str
        The dtypes of the weights as safetensors names them, such as `"BF16"`, of the model and of
        the output.
    num_tensors : int
        Tensors in the output.
    num_bytes, num_files : int
        Size of the weights in bytes, and number of files of weights.
    seconds : float
        Time that the conversion took.
    readers : tuple of Reader
        The programs that load checkpoints, and whether they load the output.
    dry_run : bool
        Whether nothing was written.
    warnings : tuple of str
        What to know before using the output.
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
        """Return the readers as a pandas data frame, one row per program.

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
    layout: Layout | LayoutName | None = None,
    dtype: DtypeLike | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
    threads: int | None = None,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert an MoE checkpoint, made by any tool, to another layout or dtype.

    The layouts are one tensor per expert and projection, or fused tensors that hold all experts of
    a layer. Weights keep their bytes unless `dtype` is given. The new `config.json` has the
    spellings of both transformers 4 and 5.

    Parameters
    ----------
    model : path
        A folder with an MoE.
    output : path
        The folder to create.
    layout : str or Layout, optional
        `"per-expert"` or `"fused"`; by default that of the model.
    dtype : str or dtype, optional
        As in `build_moe`; by default weights keep theirs. FP8 weights with a scale for each block
        (`weight_scale_inv`) are multiplied by their scales and rounded once. The report warns of
        weights beyond the range of float16, and of experts whose router rows become equal by
        rounding.
    max_shard_size, overwrite, threads, executor, checksum, fsync, dry_run, progress
        As in `build_moe`.

    Returns
    -------
    ConvertReport

    Raises
    ------
    CheckpointError
        If the model has no experts or is inconsistent, with every reason.
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, convert_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = convert_moe(f"{folder}/moe", f"{folder}/fused", layout="fused")
    >>> report.layout_before, report.layout, report.num_tensors
    ('per-expert', 'fused', 20)
    """
    request = ConvertRequest(
        model=str(as_path(model, "model").absolute()),
        layout=None if layout is None else as_member(layout, Layout, "layout"),
        dtype=None if dtype is None else as_weight_dtype(dtype, "dtype"),
        max_shard_size=as_size(max_shard_size, "max_shard_size"),
    )
    output = as_path(output, "output")
    writing = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    started = time.perf_counter()
    design = make_design(request, output, writing)
    assert isinstance(design, ConvertDesign)
    records = design.write(output, writing)
    return ConvertReport(
        output=output,
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
    """From headers and routers, and from the head if it should be the embedding."""
    model = open_moe_model(request.model)
    require_layers(model)
    family = None if model.assumed else moe_families().get(model.model_type)
    problems = model.surgery_problems()
    if family is not None:
        problems = problems or structure_problems(model)
    if problems:
        raise CheckpointError(*problems)
    layout = choose_layout(model, family, request.layout)
    weights = dict(converted_tensors(model, family, layout, request.dtype))
    config = converted_config(model, family, request.dtype)
    contents = contents_of(
        config, weights, model.path, layout=layout, num_experts=model.num_experts
    )
    readers = find_readers(config, contents)
    companions = find_companions(model.path, model.config)
    card = updated_card(model.path / CARD, readers)
    if card is None and (model.path / CARD).is_file():
        companions[CARD] = model.path / CARD
    return ConvertDesign(
        weights=weights,
        config=config,
        companions=companions,
        sources=[model.tensors],
        family=model.model_type,
        num_experts=model.num_experts * len(model.layers),
        manifest=Manifest(request=request, family=model.model_type),
        reference=model.path,
        reason_to_differ=find_rounding(request.dtype, model.tensors),
        card=card,
        warnings=(
            *([] if model.assumed is None else [f"{model.path}: {model.assumed}"]),
            *find_second_weights(model.path),
            *find_missing_code(model.path, model.config),
            *warn_of_readers(config, contents, model.path),
            *warn_of_rounding(model, family, layout, weights, request.dtype),
        ),
        metadata=metadata_of(model.tensors.values()),
        max_shard_size=request.max_shard_size,
        model=model,
        layout=layout,
        readers=readers,
    )


def choose_layout(model: MoeModel, family: MoeFamily | None, wanted: Layout | None) -> Layout:
    """The layout of the output, one that the family has."""
    if model.layout not in list(Layout):
        raise CheckpointError(
            "some layers hold their experts in one layout, some in the other", file=model.path
        )
    before = Layout(model.layout)
    layouts = model.axis.layouts if family is None else family.layouts
    if model.assumed is not None:
        layouts = (before,)
    layout = wanted or before
    check_layout(layout, (*layouts, before), model.model_type if family is None else family.title)
    return layout


def converted_tensors(
    model: MoeModel, family: MoeFamily | None, layout: Layout, dtype: Dtype | None
) -> Iterator[OutputTensor]:
    """The model's tensors in their order, each layer's experts where its first one stood."""
    to = None if dtype is None else DTYPE_CODES[dtype]
    before = Layout(model.layout)
    scales = {} if dtype is None else find_scales(model)
    if dtype is not None:
        refuse_other_dtypes(model, scales)

    def keep(tensor: Tensor) -> Weight:
        if to is None:
            return Weight.of(tensor)
        if tensor.name in scales:
            return dequantised(tensor, scales[tensor.name], block_of(model), to)
        return Weight.of(tensor).converted(to)

    dropped = {scale.name for scale in scales.values()}
    done = set()
    for name, tensor in model.tensors.items():
        if name in dropped:
            continue
        place = model.places.get(name)
        if place is None or not is_expert(place[2], place[1]):
            yield OutputTensor(renamed(model, name, layout), keep(tensor))
        elif layout is before:
            yield OutputTensor(name, keep(tensor))
        elif place[0].key not in done:
            layer = place[0]
            done.add(layer.key)
            refuse_extras(layer, dropped)
            for new in expert_tensors(model, family, layer, layout):
                parts = [layer.experts[expert][role] for expert, role in new.slices]
                if to is None:
                    check_dtypes(parts)
                weights = [keep(part) for part in parts]
                yield OutputTensor(new.name, joined(weights, new, model.num_experts))


def is_expert(inner: str, expert: int | None) -> bool:
    """Whether a tensor that counts experts holds them, and does not route to them."""
    return expert is not None or is_weight(inner)


def renamed(model: MoeModel, name: str, layout: Layout) -> str:
    """The name of a tensor that is no expert's, in a layout."""
    if name in model.places:
        layer, _, inner = model.places[name]
        return f"{block_name(model, layer, layout)}.{model.axis.renamed(inner, layout)}"
    for layer in model.layers:
        if name.startswith(f"{layer.block}.") and model.axis.block:
            return block_name(model, layer, layout) + name.removeprefix(layer.block)
    return name


def block_name(model: MoeModel, layer: MoeLayer, layout: Layout) -> str:
    """The beginning of the names of a layer's MoE block in a layout."""
    axis = model.axis
    if axis.block_in(Layout.FUSED) == axis.block:
        return layer.block
    present = next(b for b in axis.blocks if layer.block.endswith(f".{b}"))
    return layer.block.removesuffix(present) + axis.block_in(layout)


def expert_tensors(
    model: MoeModel, family: MoeFamily | None, layer: MoeLayer, layout: Layout
) -> list[ExpertTensor]:
    """The tensors that hold a layer's experts in a layout, in order."""
    if family is not None:
        tensors = family.expert_tensors(layer.number, model.num_experts, layout)
        return [tensor._replace(name=family.name_in_files(tensor.name)) for tensor in tensors]
    block, experts = block_name(model, layer, layout), range(model.num_experts)
    if layout is Layout.PER_EXPERT:
        return [
            ExpertTensor(f"{block}.experts.{expert}.{part}.weight", ((expert, role),))
            for expert in experts
            for part, role in model.axis.parts.items()
        ]
    return [
        ExpertTensor(
            f"{block}.{inner}", tuple((e, r) for e in experts for r in roles), stacked=True
        )
        for inner, roles in model.axis.stacked.items()
    ]


def refuse_extras(layer: MoeLayer, dropped: set[str]) -> None:
    """Raise `CheckpointError` for tensors of experts that the other layout has no place for."""
    used = {
        (tensor.file, tensor.offset)
        for expert in layer.experts.values()
        for tensor in expert.values()
    }
    for tensor in (
        *(tensor for own in layer.own.values() for tensor in own.values()),
        *(t for name, t in layer.counted.items() if is_weight(name)),
    ):
        if (tensor.file, tensor.offset) not in used and tensor.name not in dropped:
            raise CheckpointError(
                f"{tensor.file.path}: tensor {tensor.name!r} has no place in the other layout"
            )


def check_dtypes(parts: Sequence[Tensor]) -> None:
    """Raise `CheckpointError` for tensors of different dtypes, which one tensor cannot hold."""
    for part in parts:
        if part.dtype != parts[0].dtype:
            raise CheckpointError(
                f"is {part.dtype}, "
                f"others of its layer are {parts[0].dtype}; one tensor holds one dtype: "
                "name one to convert all to",
                file=part.file.path,
                tensor=part.name,
            )


def refuse_other_dtypes(model: MoeModel, scales: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for every tensor of a dtype that cannot be converted."""
    problems = [
        Problem(
            f"is {tensor.dtype}; {', '.join(WEIGHT_DTYPES)} can be converted",
            file=tensor.file.path,
            tensor=name,
        )
        for name, tensor in model.tensors.items()
        if tensor.dtype not in WEIGHT_DTYPES and name not in scales
    ]
    if problems:
        raise CheckpointError(*problems)


def warn_of_rounding(
    model: MoeModel,
    family: MoeFamily | None,
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
            weight = weights[renamed(model, layer.router.name, layout)]
            if weight.dtype == layer.router.dtype:
                continue
            data = b"".join(weight.read(0, weight.nbytes))
            before = read_floats(layer.router, files)
            after = decode_any(data, weight.dtype, weight.shape)
            if after is None or before is None or not np.isfinite(after).all():
                continue  # what became infinite is a warning of its own
            text = complaint_on_random_tokens(after, top_k)
            if text is not None and complaint_on_random_tokens(before, top_k) is None:
                found.setdefault(text, []).append(layer.number)
    return [
        f"{format_numbers('layer', layers)}: rounded to {dtype}, {text}; "
        f"build the MoE in {dtype} instead, or convert it after training"
        for text, layers in found.items()
    ]


def distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def converted_config(model: MoeModel, family: MoeFamily | None, to: Dtype | None) -> dict[str, Any]:
    """The model's config.json; each key that readers spell differently in both spellings."""
    config = with_floats(model.config)
    file = model.path / "config.json"
    if family is not None and ("num_experts" in config or "num_local_experts" in config):
        config |= {"num_local_experts": model.num_experts, "num_experts": model.num_experts}
    plain = family is not None and family.blocks is None and not family.rope_by_kind
    if plain and (
        config.get("rope_parameters") is not None or config.get("rope_theta") is not None
    ):
        partial = family is not None and family.partial_rotary
        rope = read_rope({"rope_theta": None, **config}, file, partial=partial)
        before = config.get("rope_parameters") or {}
        config |= rope.in_every_spelling()
        if "partial_rotary_factor" in before:
            factor = {"partial_rotary_factor": before["partial_rotary_factor"]}
            config["rope_parameters"] = {**config["rope_parameters"], **factor}
    inner = [config]
    if model.language_key is not None:
        config[model.language_key] = with_floats(model.language_config)
        inner.append(config[model.language_key])
    for each in inner:
        dtype = to or each.get("dtype") or each.get("torch_dtype")
        if isinstance(dtype, str):
            each |= {"dtype": str(dtype), "torch_dtype": str(dtype)}
        if to is not None:
            each.pop("quantization_config", None)
    return config


def metadata_of(tensors: Iterable[Tensor]) -> dict[str, str]:
    """The metadata of the model's first file, which every new file gets."""
    first = min(map(Path, {tensor.file.path for tensor in tensors}))
    return FORMAT | read_header_and_metadata(first)[1]
