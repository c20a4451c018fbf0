"""`convert_moe`: an MoE checkpoint in another layout or dtype."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_fast.checkpoint.files import OpenFiles, SourceFile
from moe_fast.checkpoint.header import (
    DTYPE_CODES,
    WEIGHT_DTYPES,
    Tensor,
    json_text,
    read_header_and_metadata,
)
from moe_fast.checkpoint.inspection import as_floats, read_floats
from moe_fast.checkpoint.manifest import FileRecord, Manifest, SourceRecord
from moe_fast.checkpoint.moe import NUM_EXPERTS_KEYS, MoeLayer, MoeModel, first_size, open_moe_model
from moe_fast.checkpoint.output import (
    Contents,
    Progress,
    Writing,
    companions_of,
    lack_of_space,
    obstacles,
    overflow_warnings,
    write_checkpoint,
)
from moe_fast.checkpoint.provenance import CARD, updated_card
from moe_fast.checkpoint.readers import Reader, has_tokenizer, readers_of
from moe_fast.checkpoint.request import ConvertRequest, ModelPath
from moe_fast.checkpoint.source import read_rope
from moe_fast.checkpoint.structure import structure_problems
from moe_fast.checkpoint.table import FORMAT, OutputTensor, Weight, index_json, into_shards
from moe_fast.checkpoint.targets import TARGETS, Target, joined
from moe_fast.config import Dtype, Layout, as_member
from moe_fast.errors import CheckpointError, as_index
from moe_fast.health import complaint_on_random_tokens
from moe_fast.reports import Report, frame_of
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
class Conversion:
    """What a request to convert comes to: every tensor of the output, nothing written."""

    model: MoeModel
    target: Target
    layout: Layout
    tensors: tuple[OutputTensor, ...]
    config: Mapping[str, Any]


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
    how = Writing(overwrite, threads, executor, checksum, fsync, dry_run, progress)
    started = time.perf_counter()
    output = Path(output)
    try:
        conversion = prepare_conversion(request)
    except CheckpointError as error:
        raise CheckpointError(*error.problems, *obstacles(output, (), how)) from None
    source = conversion.model
    files = sorted({tensor.file for tensor in source.tensors.values()})
    shards = into_shards(conversion.tensors, request.max_shard_size, metadata_of(files))
    readers = readers_of(
        conversion.config,
        conversion.layout,
        source.num_experts,
        has_tokenizer=has_tokenizer(source.path),
    )
    texts = {"config.json": json_text(conversion.config), **index_json(shards)}
    companions = companions_of(source.path)
    card = source.path / CARD
    if (text := updated_card(card, readers)) is not None:
        texts[CARD] = text
    elif card.is_file():
        companions.append(card)
    contents = Contents(shards, texts, companions)
    problems = [*obstacles(output, files, how), *lack_of_space(output, contents)]
    if problems:
        raise CheckpointError(*problems)
    written: Mapping[str, FileRecord] = {}
    if not how.dry_run:

        def manifest(records: dict[str, FileRecord]) -> str:
            return Manifest(
                moe_fast=version("moe-fast"),
                conversion=request,
                target=conversion.target.name,
                source_files=tuple(SourceRecord.of(file) for file in files),
                files=records,
            ).text()

        written = write_checkpoint(output, contents, manifest, how)
    return ConvertReport(
        output=output,
        model_type=source.model_type,
        layout_before=source.layout,
        layout=str(conversion.layout),
        dtypes_before=distinct(tensor.dtype for tensor in source.tensors.values()),
        dtypes=distinct(tensor.weight.dtype for tensor in conversion.tensors),
        num_tensors=len(conversion.tensors),
        num_bytes=contents.nbytes,
        num_files=len(shards),
        seconds=time.perf_counter() - started,
        readers=readers,
        dry_run=how.dry_run,
        warnings=(*rounding_warnings(conversion, request.dtype), *overflow_warnings(written)),
    )


def prepare_conversion(request: ConvertRequest) -> Conversion:
    """Open the model of a request and lay out its output, from headers alone."""
    model = open_moe_model(request.model)
    if not model.layers:
        raise CheckpointError(f"{model.path}: holds no experts; it is not an MoE")
    target = TARGETS.get(model.model_type)
    if target is None:
        raise CheckpointError(
            f"{model.path / 'config.json'}: model_type {model.model_type!r} cannot be converted; "
            f"{', '.join(TARGETS)} can"
        )
    problems = model.problems() or structure_problems(model)
    if problems:
        raise CheckpointError(*problems)
    layout = request.layout or Layout(model.layout)
    if layout not in target.layouts:
        raise CheckpointError(
            f"layout {str(layout)!r}: {target.title} has {str(target.layouts[0])!r} alone"
        )
    to = None if request.dtype is None else DTYPE_CODES[request.dtype]
    tensors = tuple(converted_tensors(model, target, layout, to))
    return Conversion(model, target, layout, tensors, converted_config(model, request.dtype))


def converted_tensors(
    model: MoeModel, target: Target, layout: Layout, to: str | None
) -> Iterator[OutputTensor]:
    """The model's tensors in their order, each layer's experts where its first one stood."""
    before = Layout(model.layout)
    layer_of: dict[str, MoeLayer] = {}
    routers: dict[str, str] = {}
    for layer in model.layers:
        for old in target.expert_tensors(layer.number, model.num_experts, before):
            layer_of[old.name] = layer
        routers[target.router_name(layer.number, before)] = target.router_name(layer.number, layout)

    def carried(tensor: Tensor) -> Weight:
        return Weight.of(tensor) if to is None else Weight.of(tensor).converted(to)

    if to is not None:
        refuse_other_dtypes(model)
    done = set()
    for name, tensor in model.tensors.items():
        if name not in layer_of:
            yield OutputTensor(routers.get(name, name), carried(tensor))
        elif layer_of[name].number not in done:
            layer = layer_of[name]
            done.add(layer.number)
            for new in target.expert_tensors(layer.number, model.num_experts, layout):
                parts = [layer.experts[expert][role] for expert, role in new.parts]
                if to is None:
                    check_dtypes(parts)
                weights = [carried(part) for part in parts]
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


def rounding_warnings(conversion: Conversion, dtype: Dtype | None) -> list[str]:
    """Where routers tell experts apart, and no longer would once they are rounded to `dtype`."""
    if dtype is None:
        return []
    model = conversion.model
    top_k = min(model.num_experts_per_tok or 2, model.num_experts)
    rounded = {tensor.name: tensor.weight for tensor in conversion.tensors}
    found: dict[str, list[int]] = {}
    with OpenFiles() as files:
        for layer in model.layers:
            assert layer.router is not None
            weight = rounded[conversion.target.router_name(layer.number, conversion.layout)]
            data = b"".join(bytes(chunk) for piece in weight.pieces for chunk in piece.chunks())
            before = read_floats(layer.router, files)
            after = as_floats(data, weight.dtype, weight.shape)
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


def metadata_of(files: list[SourceFile]) -> dict[str, str]:
    """The metadata of the model's first file, which every new file gets."""
    return FORMAT | read_header_and_metadata(Path(files[0].path))[1]
