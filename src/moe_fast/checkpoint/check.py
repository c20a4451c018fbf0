"""Is what was written right? Reads a checkpoint back: its files, its sources, its readers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fast.calibration.parity import compare_logits, installed_transformers, tokens_of
from moe_fast.checkpoint.card import CARD
from moe_fast.checkpoint.design import Design, design_of
from moe_fast.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from moe_fast.checks import as_path
from moe_fast.errors import CheckpointError, MoeConfigError, Problem
from moe_fast.families.dense import FFN, DenseModel
from moe_fast.families.readers import find_readers
from moe_fast.families.registry import moe_families
from moe_fast.families.rules import Reader
from moe_fast.families.wrappers import wrapped_family
from moe_fast.models.dense import open_dense_model
from moe_fast.models.folder import check_is_folder, find_second_weights
from moe_fast.models.inspection import router_reports
from moe_fast.models.moe import PARTS, MoeModel, open_moe_model, part_of, require_layers
from moe_fast.models.readers import contents_of_model, find_other_names
from moe_fast.models.structure import structure_problems
from moe_fast.progress import Progress, ShowsProgress, as_progress
from moe_fast.records import dataclass
from moe_fast.reports import Report, frame_of
from moe_fast.request import ModelPath
from moe_fast.storage.companions import find_companions
from moe_fast.storage.copies import equal_groups
from moe_fast.storage.files import is_plain_path, read_exactly, same_bytes
from moe_fast.storage.pieces import FileRange, Piece, Remembered
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import brief
from moe_fast.storage.writer import FileRecord, sha256_of
from moe_fast.wording import format_count, format_range

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["CheckReport", "Finding", "Status", "check_moe"]


class Status(StrEnum):
    """How one check ended: `"passed"`, `"failed"` or `"not possible"`.

    A check is not possible if there is nothing to check against; the finding's summary says what
    would be needed.
    """

    PASSED = "passed"
    FAILED = "failed"
    NOT_POSSIBLE = "not possible"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes
    ----------
    check : str
        The name of the check, such as `"experts"`.
    status : Status
        How it ended.
    summary : str
        What was checked, or why it could not be.
    problems : tuple of str
        Every problem found.
    """

    check: str
    status: Status
    summary: str
    problems: tuple[str, ...] = ()


def finding(
    check: str, summary: str, problems: Sequence[str] = (), failed: str | None = None
) -> Finding:
    """Passed with this summary, or failed with `failed`, by default the number of problems."""
    if not problems:
        return Finding(check, Status.PASSED, summary)
    if failed is None:
        failed = format_count(len(problems), "problem")
    return Finding(check, Status.FAILED, failed, tuple(problems))


def not_possible(check: str, reason: str) -> Finding:
    return Finding(check, Status.NOT_POSSIBLE, reason)


@dataclass(frozen=True)
class CheckReport(Report):
    """What `check_moe` found. `report["experts"]` is the finding of the check of that name.

    Attributes
    ----------
    path : Path
        The folder.
    passed : bool
        Whether no check failed. Checks that were not possible do not count.
    findings : tuple of Finding
        One per check.
    readers : tuple of Reader
        The programs that load checkpoints, and whether they load this one.
    """

    path: Path
    passed: bool
    findings: tuple[Finding, ...]
    readers: tuple[Reader, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems of all findings."""
        return tuple(problem for finding in self.findings for problem in finding.problems)

    def __getitem__(self, check: str) -> Finding:
        """Return the finding of the check of that name; `KeyError` if there is none."""
        return {finding.check: finding for finding in self.findings}[check]

    def __repr__(self) -> str:
        statuses = ", ".join(f"{finding.check}: {finding.status}" for finding in self.findings)
        return f"<CheckReport of {self.path}: {statuses}>"

    def to_frame(self) -> DataFrame:
        """Return the findings as a pandas data frame, one row per check.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        return frame_of(self.findings, Finding)

    def _repr_html_(self) -> str:
        from moe_fast.drawing.html import table

        rows = [
            (finding.status, finding.check, "; ".join((finding.summary, *finding.problems)))
            for finding in self.findings
        ]
        return table(("status", "check", "what was found"), rows)


# By how much of the scale the logits of equal functions may differ: float32 over many layers gives
# around 1e-5, one wrong tensor more than a tenth.
ROUNDING = 1e-3


def check_moe(
    output: ModelPath,
    *,
    against: ModelPath | Sequence[ModelPath] = (),
    text: str | None = None,
    progress: Progress | None = None,
) -> CheckReport:
    """Check an MoE checkpoint, made by any tool.

    The output of `build_moe` is compared byte for byte with its sources: from the request in its
    manifest, the same table of tensors is made again, noise and routers included. For a checkpoint
    without a manifest, each expert is searched for among the FFNs of `against`.

    Parameters
    ----------
    output : path
        The folder to check.
    against : path or sequence of paths
        The source models, if there is no manifest or if they were moved. Moved folders are matched
        by name, or else by their order in the build.
    text : str, optional
        A text on which the logits of the output are compared with those of its reference: the base
        of the build, the model that was converted, or else the first of `against`. Needs
        transformers and torch, and 4 bytes of memory per parameter. The logits must be equal up to
        rounding if all experts are unchanged FFNs of the base; otherwise the finding says how much
        they differ.
    progress : bool or callable, optional
        `True` shows a bar; a function is called repeatedly with the number of bytes compared so far
        and in total.

    Returns
    -------
    CheckReport
        A finding per check, and which readers load the checkpoint.

    Raises
    ------
    CheckpointError
        If the folder does not contain an MoE.
    MoeConfigError
        If `against` does not fit the manifest.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, check_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = check_moe(f"{folder}/moe")
    >>> report.passed, report["experts"].summary
    (True, '8 experts equal their sources, byte for byte')
    """
    shows = as_progress(progress, "comparing")
    folder = as_path(output, "output")
    check_is_folder(folder)
    listed = [against] if isinstance(against, (str, os.PathLike)) else against
    sources = [as_path(source, "against") for source in listed]
    try:
        model = open_moe_model(folder)
    except CheckpointError as error:
        unreadable = finding("headers", "", error.problems, "the checkpoint cannot be read")
        return CheckReport(folder, False, (unreadable,))
    if not model.layers and not (folder / MANIFEST).exists():
        require_layers(model)
    files = len({tensor.file for tensor in model.tensors.values()})
    where = "one file" if files == 1 else f"{files} files"
    summary = f"{len(model.tensors)} tensors in {where}, without holes"
    headers = finding("headers", "; ".join((summary, *find_second_weights(folder))))
    manifest, manifest_finding = check_manifest(model)
    design = repeat_design(model, manifest, sources)
    findings = [
        headers,
        manifest_finding,
        *check_sources(model, design, sources, shows),
        check_structure(model) if model.layers else check_dense_structure(model),
    ]
    if model.layers:
        findings.append(check_routing(model))
    # A dense model may have the model_type of an MoE.
    readers = find_readers(model.config, contents_of_model(model)) if model.layers else ()
    findings.append(check_readers(model, readers))
    if text is not None:
        findings.append(check_logits(model, design, sources, readers, text))
    passed = not any(finding.status is Status.FAILED for finding in findings)
    return CheckReport(folder, passed, tuple(findings), readers)


def check_manifest(model: MoeModel) -> tuple[Manifest | None, Finding]:
    """The manifest, and whether the files are those it tells of."""
    folder = model.path
    if not (folder / MANIFEST).exists():
        return None, not_possible("manifest", f"there is no {MANIFEST}: not built by moe_fast")
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return None, finding("manifest", "", error.problems, "cannot be read")
    headers = {Path(t.file.path).name: t.file.header_sha256 for t in model.tensors.values()}
    problems = []
    for name, record in manifest.files.items():
        if name == CARD:  # people edit it
            continue
        if not is_plain_path(name):
            where = f"{folder / MANIFEST}: files"
            problems.append(f"{where}: {name!r} is not the name of a file in the folder")
        else:
            problems += file_problems(folder / name, record, headers.get(name))
    digests = sum(record.sha256 is not None for record in manifest.files.values())
    summary = f"{len(manifest.files)} files have the recorded sizes and headers"
    if digests:
        summary += f", {digests} of them the recorded SHA-256"
    return manifest, finding("manifest", summary, problems)


def file_problems(file: Path, record: FileRecord, header_sha256: str | None) -> Iterator[str]:
    """How a file of the output is another than the one that was written."""
    if not file.is_file():
        yield f"{file}: is missing"
        return
    size = file.stat().st_size
    if size != record.size:
        yield f"{file}: has {size} bytes, {record.size} were written"
    elif record.header_sha256 is not None and header_sha256 != record.header_sha256:
        yield f"{file}: its header is not the one that was written"
    elif record.sha256 is not None and sha256_of(file) != record.sha256:
        yield f"{file}: its SHA-256 is not {record.sha256}"


def repeat_design(
    model: MoeModel, manifest: Manifest | None, against: Sequence[ModelPath]
) -> Design | Finding | None:
    """What would be written today for the request of a manifest, or why that cannot be known.

    `None` without a manifest.

    Raises
    ------
    MoeConfigError
        If `against` does not fit the manifest.
    """
    if manifest is None:
        return None
    request = manifest.request
    num_experts = request.num_experts
    if num_experts not in (None, model.num_experts):
        # Said before planning for a number from a file.
        problem = (
            f"{model.path / MANIFEST}: request is for {num_experts} experts, "
            f"{model.num_experts} are here"
        )
        return finding(PARTS[0], "", [problem], "the manifest is another checkpoint's")
    shares = [path for path in request.folders() if path.startswith(("//", "\\\\"))]
    if shares and not against:
        # Opening one would send the user's credentials to whoever wrote the manifest.
        listed = ", ".join(shares)
        reason = f"the manifest names network shares ({listed}): name them by --against"
        return not_possible("sources", reason)
    request = request.moved(locate(request.folders(), against))
    try:
        return design_of(request, manifest.decisions)
    except (CheckpointError, MoeConfigError) as error:
        reason = "; ".join(error.problems) + " (--against names where the sources are now)"
        return not_possible("sources", reason)


def locate(recorded: Sequence[str], against: Sequence[ModelPath]) -> dict[str, str]:
    """Where each folder of a manifest is now: as it says, or among `against`.

    Raises
    ------
    MoeConfigError
        If names do not tell them apart, and their numbers differ.
    """
    given = [str(Path(path).absolute()) for path in against]
    by_name = {Path(path).name: path for path in given or recorded}
    if len(by_name) == len(given) and all(Path(path).name in by_name for path in recorded):
        return {path: by_name[Path(path).name] for path in recorded}
    if len(given) in (0, len(recorded)):
        return dict(zip(recorded, given or recorded, strict=True))
    raise MoeConfigError(
        f"must list the {len(recorded)} folders that the manifest names, {', '.join(recorded)}; "
        f"got {len(given)}",
        argument="against",
    )


def check_sources(
    model: MoeModel,
    design: Design | Finding | None,
    against: Sequence[ModelPath],
    progress: ShowsProgress | None,
) -> list[Finding]:
    """Compare with the design made again, or without a manifest with the sources given."""
    names = (*PARTS, "configuration", "tokenizer")
    if isinstance(design, Design):
        return [
            *compare_weights(model, design, progress),
            compare_config(model, design.config),
            compare_companions(model, design.companions),
        ]
    if design is None and against:
        return check_origins(model, against)
    if design is None:
        reason = "neither a manifest nor sources to compare with (--against) are there"
        return [not_possible(name, reason) for name in names]
    if design.status is Status.FAILED:
        return [design]
    return [not_possible(name, design.summary) for name in names]


def compare_weights(
    model: MoeModel, design: Design, progress: ShowsProgress | None
) -> list[Finding]:
    """Every tensor against the pieces that it should have been written from."""
    problems: dict[str, list[str]] = {part: [] for part in PARTS}
    total = sum(tensor.nbytes for tensor in model.tensors.values())
    done = 0
    for name in design.weights:
        if name not in model.tensors:
            problems[part_of(name)].append(f"{model.path}: tensor {name!r} is missing")
    for name, tensor in model.tensors.items():
        where = f"{tensor.file.path}: tensor {name!r}"
        if name not in design.weights:
            problems[part_of(name)].append(f"{where} was not asked for")
        elif (difference := first_difference(tensor, design, name)) is not None:
            problems[part_of(name)].append(f"{where} {difference}")
        done += tensor.nbytes
        if progress is not None:
            progress(done, total)
    counts = {part: sum(part_of(name) == part for name in design.weights) for part in PARTS}
    summaries = {
        "experts": f"{design.num_experts} experts equal their sources",
        "routers": f"{counts['routers']} routers equal what was asked for",
        "other weights": f"{counts['other weights']} tensors equal their sources",
    }
    return [
        finding(
            part,
            f"{summaries[part]}, byte for byte",
            problems[part],
            f"{len(problems[part])} of {counts[part]} tensors differ",
        )
        for part in PARTS
        if counts[part] or problems[part]
    ]


def origin_of(piece: Piece, sources: Sequence[Mapping[str, Tensor]]) -> str:
    """What a piece is, in words."""
    if not isinstance(piece, FileRange):
        return "what is made for it"
    for tensors in sources:
        for tensor in tensors.values():
            if tensor.file == piece.file and 0 <= piece.offset - tensor.offset < tensor.nbytes:
                part = "" if piece.nbytes == tensor.nbytes else "its part of "
                return f"{part}{tensor.name!r} of {piece.file.path}"
    return piece.file.path


def first_difference(tensor: Tensor, design: Design, name: str) -> str | None:
    """How a written tensor differs from the pieces it was made of; `None` where it does not."""
    weight = design.weights[name]
    if (tensor.dtype, tensor.shape) != (weight.dtype, weight.shape):
        return (
            f"is {tensor.dtype} of shape {list(tensor.shape)} where "
            f"{weight.dtype} of shape {list(weight.shape)} was asked for"
        )
    position = 0
    with Path(tensor.file.path).open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        for piece in weight.pieces:
            if isinstance(piece, Remembered):
                written = read_exactly(stream, piece.nbytes, tensor.file.path)
                if not piece.is_digest_of(written):
                    return f"is not the one whose SHA-256 {MANIFEST} has"
                position += piece.nbytes
                continue
            for chunk in piece.chunks():
                written = read_exactly(stream, len(chunk), tensor.file.path)
                if written != chunk:  # a bytearray on the left compares with anything by memcmp
                    pairs = enumerate(zip(written, chunk, strict=True), start=position)
                    byte = next(i for i, (left, right) in pairs if left != right)
                    origin = origin_of(piece, design.sources)
                    return f"differs from {origin} at byte {byte} of {tensor.nbytes}"
                position += len(chunk)
    return None


def compare_config(model: MoeModel, config: Mapping[str, Any]) -> Finding:
    """Every key of config.json against what the build writes."""
    file = model.path / "config.json"
    expected = json.loads(json.dumps(config))
    problems = [f"{file}: {key} is missing" for key in expected if key not in model.config]
    for key, value in model.config.items():
        if key not in expected:
            problems.append(f"{file}: {key} is none of the keys that the build writes")
        elif value != expected[key]:
            problems.append(
                f"{file}: {key} is {brief(value)}, the build writes {brief(expected[key])}"
            )
    return finding("configuration", f"{len(expected)} keys as the build writes them", problems)


def compare_companions(model: MoeModel, companions: Mapping[str, Path]) -> Finding:
    """Tokenizer, settings for generation and code against the source's."""
    companions = {name: file for name, file in companions.items() if name != CARD}
    problems = []
    for name, source in sorted(companions.items()):
        file = model.path / name
        if not file.is_file():
            problems.append(f"{file}: is missing; the source has it")
        elif not same_bytes(file, source):
            problems.append(f"{file}: differs from {source}")
    if not companions:
        return not_possible("tokenizer", "the source has none")
    return finding("tokenizer", f"{len(companions)} files equal the source's", problems)


def check_origins(model: MoeModel, against: Sequence[ModelPath]) -> list[Finding]:
    """Without a manifest: each expert, and each other weight, looked for in the sources."""
    sources = [open_dense_model(path) for path in against]
    experts = [expert for layer in model.layers for expert in layer.experts.items()]
    blocks = [layer.block for layer in model.layers for _ in layer.experts]
    ffns = [
        [source.ffn(layer, role) for role in source.family.roles]
        for source in sources
        for layer in source.ffn_layers
    ]
    weights = [[e[role] for role in FFN if role in e] for _, e in experts]
    known: set[int] = set()
    for group in equal_groups([*weights, *ffns]):
        if group[-1] >= len(weights):
            known.update(index for index in group if index < len(weights))
    problems = [
        f"{model.path}: expert {number} of {block} equals no FFN of the sources"
        for index, ((number, _), block) in enumerate(zip(experts, blocks, strict=True))
        if index not in known
    ]
    summary = f"{len(known)} of {len(experts)} experts equal an FFN of the sources, byte for byte"
    others = check_other_weights(model, sources)
    if experts and not known:
        problems = [
            f"{model.path}: no expert equals an FFN of the sources: the model was trained or "
            "changed since, or was grown from others; without --against, the rest is checked"
        ]
        if others.problems:
            others = not_possible("other weights", "no expert equals the sources'")
    reason = "a checkpoint without a manifest does not say how its {} were made"
    return [
        finding("experts", summary, problems, summary),
        not_possible("routers", reason.format("routers")),
        others,
        not_possible("configuration", reason.format("keys")),
        compare_companions(model, find_companions(sources[0].path)),
    ]


def check_other_weights(model: MoeModel, sources: Sequence[DenseModel]) -> Finding:
    others = [(name, t) for name, t in model.tensors.items() if part_of(name) == "other weights"]
    problems = []
    compared = 0
    for name, tensor in others:
        candidates = [s.tensors[name] for s in sources if name in s.tensors]
        if not candidates:
            continue  # shared experts, biases of zeros: the structure is checked elsewhere
        compared += 1
        groups = equal_groups([[tensor], *([c] for c in candidates)])
        if not any(group[0] == 0 for group in groups):
            where = f"{tensor.file.path}: tensor {tensor.name!r}"
            problems.append(f"{where} equals that of none of the sources")
    summary = f"{compared - len(problems)} of {compared} tensors equal one of the sources'"
    return finding("other weights", summary, problems, summary)


def check_structure(model: MoeModel) -> Finding:
    """Names and shapes against what config.json says and the family asks for."""
    problems = model.problems()
    families = moe_families()
    inner = wrapped_family(model.config, families)
    if model.model_type not in families and inner is None:
        known = ", ".join(families)
        reason = f"no rules for model_type {model.model_type!r}; there are some for {known}"
        if problems:
            return finding("structure", "", problems, reason)
        return not_possible("structure", f"experts and routers fit each other; {reason}")
    if not problems:
        try:
            problems = structure_problems(model)
        except CheckpointError as error:
            problems = list(error.problems)
    names = find_other_names(model)
    if names:
        found, name = names[0]
        problems.append(
            Problem(
                f"would be {brief(name)} in the layout of Hugging Face"
                f"{f', and so {len(names) - 1} more' * (len(names) > 1)}; moe-fast convert "
                "renames them",
                file=model.path,
                tensor=found,
            )
        )
    if inner is not None:
        summary = (
            f"names, shapes and config.json of the language model are those of {inner[0].title}"
        )
        return finding("structure", summary, problems)
    title = families[model.model_type].title
    return finding("structure", f"names, shapes and config.json are those of {title}", problems)


def check_dense_structure(model: MoeModel) -> Finding:
    """The same of a dense model, which an operation has made of an MoE."""
    try:
        family = open_dense_model(model.path).family
    except CheckpointError as error:
        return finding("structure", "", error.problems)
    summary = f"names, shapes and config.json are those of a dense {family.model_type}"
    return finding("structure", summary)


def check_routing(model: MoeModel) -> Finding:
    """Whether the routers can send tokens anywhere at all."""
    try:
        reports = router_reports(model)
    except CheckpointError as error:
        return finding("routing", "", error.problems, "the routers cannot be read")
    problems = [
        f"{model.path}: the router of layer {router.layer} holds numbers that are not finite"
        for router in reports
        if not router.finite
    ]
    tied = [router.layer for router in reports if router.row_repeats == model.num_experts > 1]
    shared = {router.row_repeats for router in reports} - {None, 1, model.num_experts}
    summary = f"{len(reports)} routers, all numbers finite"
    variations = [v for router in reports if (v := router.coefficient_of_variation) is not None]
    entropies = [e for router in reports if (e := router.mean_entropy) is not None]
    if variations:
        summary += (
            f"; predicted on random tokens: load cv {format_range(variations)} (0 is even), "
            f"entropy {format_range(entropies)} (at most ln {model.num_experts} = "
            f"{math.log(model.num_experts):.3f})"
        )
    if shared:
        numbers = ", ".join(str(number) for number in sorted(filter(None, shared)))
        summary += f"; every {numbers} adjacent experts share a row: the shards of a copy"
    if tied:
        summary += (
            f"; in {len(tied)} of them all logits tie, "
            "so that every token goes to the same experts until training moves them"
        )
    return finding("routing", summary, problems)


def check_readers(model: MoeModel, readers: Sequence[Reader]) -> Finding:
    """Whether anything loads the checkpoint."""
    if not readers:
        what = "a dense model" if not model.layers else f"the model_type {model.model_type!r}"
        return not_possible("readers", f"not known which programs load {what}")
    able = [reader.name for reader in readers if reader.loads]
    if able:
        return finding("readers", f"loads in {', '.join(able)}")
    problems = [f"{reader.name}: {'; '.join(reader.reasons)}" for reader in readers]
    return finding("readers", "", problems, "nothing loads it")


def check_logits(
    model: MoeModel,
    design: Design | Finding | None,
    against: Sequence[ModelPath],
    readers: Sequence[Reader],
    text: str,
) -> Finding:
    """What the checkpoint makes of a text, beside what its dense model makes of it."""
    if design is None and not against:
        return not_possible("logits", "needs the dense model to compare with (--against)")
    if isinstance(design, Finding):
        return not_possible("logits", design.summary)
    if design is None:
        reference = Path(against[0])
        reason: str | None = "there is no manifest that says how it was made"
    else:
        reference, reason = design.reference, design.reason_to_differ
    try:
        installed = installed_transformers()
        for reader in readers:
            if reader.name == installed and not reader.loads:
                return not_possible("logits", f"{installed} {'; '.join(reader.reasons)}")
        open_moe_model(reference)  # whatever reads it next, it has been checked
        tokens = tokens_of(text, model.path, reference)
    except (CheckpointError, ModuleNotFoundError) as error:
        return not_possible("logits", str(error))
    try:
        difference = compare_logits(reference, model.path, tokens)
    except CheckpointError as error:
        return finding("logits", "", error.problems, "cannot be compared")
    if reason is not None:
        return finding("logits", f"{difference}; need not be equal: {reason}")
    problems = []
    if not difference.relative <= ROUNDING:
        problems = [f"{model.path}: should compute what {reference} computes"]
    summary = f"{difference}; meant to be equal"
    return finding("logits", summary, problems, summary)
