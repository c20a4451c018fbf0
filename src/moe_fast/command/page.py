"""A checkpoint as one HTML page: what it is, where its experts come from, what its routers do.

The page needs no script, no network and no other file. It calls models by the names of their
folders, never by whole paths: those who read a report need not know its author's home folder.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.inspection import inspect_model
from moe_fast.calibration.texts import TokenArrays
from moe_fast.checkpoint.build_request import BuildRequest, request_values
from moe_fast.checkpoint.card import (
    changes,
    describe_backbone,
    describe_experts,
    distinct_names,
)
from moe_fast.checkpoint.check import CheckReport, Status
from moe_fast.checkpoint.expand import ExpandRequest
from moe_fast.checkpoint.extract import ExtractRequest
from moe_fast.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from moe_fast.checkpoint.merge import MergeRequest
from moe_fast.checkpoint.prune import PruneRequest
from moe_fast.checkpoint.reroute import RerouteRequest
from moe_fast.checks import as_path
from moe_fast.drawing.html import plan_picture, shares_picture, table
from moe_fast.errors import CheckpointError
from moe_fast.families.readers import find_readers
from moe_fast.models.inspection import ModelReport
from moe_fast.models.moe import MoeModel, open_moe_model, part_of
from moe_fast.models.readers import contents_of_model
from moe_fast.plan import MoeConstructionPlan
from moe_fast.single_file import check_place, whole_file
from moe_fast.version import __version__
from moe_fast.wording import format_numbers, format_quantity, format_range, format_runs, name_layer

__all__ = ["write_report"]
MARK = b'<!doctype html>\n<html lang="en">\n<!-- moe_fast report -->\n'
# The other weights by the names of their tensors; the first that fits.
OTHER_PARTS = (
    ("shared experts", re.compile(r"shared_(?:expert|mlp)", re.ASCII)),
    ("attention", re.compile(r"\bself_attn\b", re.ASCII)),
    ("embeddings and head", re.compile(r"\b(?:embed_tokens|lm_head)\b", re.ASCII)),
    ("dense FFN", re.compile(r"\bmlp\b", re.ASCII)),
)
# What the other operations did to their model.
PAST = {
    "convert": "converted", "expand": "expanded", "extract": "extracted", "merge": "merged",
    "prune": "pruned", "reroute": "rerouted",
}  # fmt: skip
MOST_ROWS = 12  # of a table that is shown unfolded
STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 18%, Canvas);
  --soft: color-mix(in srgb, CanvasText 6%, Canvas) }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 58rem;
  background: Canvas; color: CanvasText }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere } h2 { margin: 2.2rem 0 .6rem }
p { margin: .5rem 0 } .lead { font-size: 1.1rem }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0; padding: 0 }
.facts div { background: var(--soft); border-radius: .5rem; padding: .5rem .6rem }
.facts dt { font-size: .85rem }
.facts dd { margin: 0; font-size: 1.05rem; font-weight: 600; white-space: nowrap }
.wide { overflow-x: auto; margin: .6rem 0 } table { border-collapse: collapse }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid var(--line) }
td:first-child, .number { white-space: nowrap }
.number { text-align: right; font-variant-numeric: tabular-nums }
.failed { border-left: .3rem solid #d55e00; padding-left: .8rem }
.passed { border-left: .3rem solid #009e73; padding-left: .8rem }
summary { cursor: pointer } code { overflow-wrap: anywhere }
footer { margin-top: 3rem; font-size: .85rem }
"""


def write_report(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    check: CheckReport | None = None,
    texts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
    device: str = "cpu",
) -> Path:
    """Write one HTML page about a checkpoint, MoE or dense, made by any tool.

    Headers and routers are read; experts only to run texts.

    Parameters
    ----------
    path : path
        The folder of the checkpoint.
    output : path, optional
        The file to write. By default in the working directory, named after the folder:
        `moe-report.html`. An earlier report is replaced, another file is not.
    check : CheckReport, optional
        The result of `check_moe`, to include in the page.
    texts, tokens, tokens_used, device
        Text to run the model on, to count the load of its experts, as in `inspect_model`; by
        default the load is predicted on random tokens.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    CheckpointError
        If the folder contains no model, or `output` exists and is not a report or cannot be
        written.
    OSError
        If the disk is full. An earlier report is then unchanged.

    Examples
    --------
    >>> from moe_fast import build_moe, make_dense_model, write_report
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe")
    >>> write_report(f"{folder}/moe", f"{folder}/report.html").name
    'report.html'
    """
    folder = as_path(path, "path")
    file = choose_file(folder) if output is None else as_path(output, "output")
    check_place(file, overwrite=True)
    if file.exists() and not is_report(file):
        raise CheckpointError("exists and is not a report; choose another file", file=file)
    found = inspect_model(
        folder, copies=False, texts=texts, tokens=tokens, tokens_used=tokens_used, device=device
    )
    page = make_page(folder, found, check).encode()
    with whole_file(file) as stream:
        stream.write(page)
    return file


def choose_file(folder: Path) -> Path:
    return Path(f"{folder.resolve().name}-report.html")


def is_report(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(MARK)) == MARK


def make_page(folder: Path, found: ModelReport, check: CheckReport | None) -> str:
    """The whole page."""
    model = open_moe_model(folder)
    manifest = read_manifest(folder) if (folder / MANIFEST).exists() else None
    name = folder.resolve().name
    body = [
        f"<h1>{escape(name)}</h1>",
        *make_heading(found, manifest),
        *make_section("Problems", list_problems(found.problems, "failed")),
        *make_section("Check", describe_check(check)),
        *make_section("Where the experts come from", describe_origin(folder, manifest)),
        *make_section("What was done", describe_operation(manifest)),
        *make_section("What takes the space", describe_sizes(model)),
        *make_section("Routers", describe_routers(found, manifest)),
        *make_section("Who loads it", describe_readers(model)),
        *make_section("Files", describe_files(model, manifest)),
    ]
    made = f"moe_fast {manifest.moe_fast}" if manifest else "another tool"
    page = f"Model written by {made}, this page by moe_fast {__version__}."
    body.append(f"<footer>{escape(page)}</footer>")
    return (
        MARK.decode() + '<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"
    )


def make_section(title: str, content: Iterable[str]) -> Iterator[str]:
    """A heading and its content; nothing if there is no content."""
    lines = list(content)
    if lines:
        yield f"<h2>{escape(title)}</h2>"
        yield from lines


def make_heading(found: ModelReport, manifest: Manifest | None) -> Iterator[str]:
    family = found.architecture or found.model_type
    if found.unknown_experts is not None:
        text = f"{family}: experts in a layout that is not known here ({found.unknown_experts})"
    elif found.num_moe_layers:
        per_token = f", {found.num_experts_per_tok} per token" if found.num_experts_per_tok else ""
        text = f"{family}: {found.num_experts} experts per layer{per_token}"
        if manifest and isinstance(manifest.request, BuildRequest):
            count = len({source.model for source in manifest.request.models})
            text += f", from {'one dense model' if count == 1 else f'{count} dense models'}"
    else:
        text = f"{family}: a dense model, without experts"
    if manifest and (done := PAST.get(manifest.request.operation)):
        (name,) = distinct_names(manifest.request.folders()).values()
        text += f", {done} from {name}"
    yield f'<p class="lead">{escape(text)}.</p>'
    facts = {
        "parameters": format_quantity(found.num_parameters),
        "active per token": "–"
        if found.active_parameters is None
        else format_quantity(found.active_parameters),
        "on disk": format_quantity(found.num_bytes, "B"),
        "layers": (
            str(found.num_layers)
            if found.num_moe_layers in (0, found.num_layers)
            else f"{found.num_layers}, {found.num_moe_layers} with experts"
        )
        + (f", and {found.num_mtp_layers} for multi-token prediction" * bool(found.num_mtp_layers)),
        "dtype": ", ".join(found.bytes_by_dtype),
        "layout": found.layout,
    }
    cards = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    yield f'<dl class="facts">{cards}</dl>'


def list_problems(problems: Sequence[str], kind: str) -> Iterator[str]:
    if problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
        yield f'<ul class="{kind}">{items}</ul>'


def describe_check(check: CheckReport | None) -> Iterator[str]:
    if check is None:
        return
    verdict = "passed" if check.passed else "failed"
    text = "Every check passed" if check.passed else "Some checks failed"
    yield f'<p class="{verdict}">{text}.</p>'
    marks = {Status.PASSED: "✓", Status.FAILED: "✗", Status.NOT_POSSIBLE: "–"}
    rows = [(f"{marks[f.status]} {f.status}", f.check, f.summary) for f in check.findings]
    yield table(("result", "check", "found"), rows)
    yield from list_problems(check.problems, "failed")


def describe_origin(folder: Path, manifest: Manifest | None) -> Iterator[str]:
    if manifest is None or not isinstance(manifest.request, BuildRequest):
        return
    request = manifest.request
    shared = [source.model for source in request.shared_experts]
    names = distinct_names(
        [*(f for source in request.models for f in source.folders), *shared, request.base]
    )
    labels = [names[source.model] for source in request.models]
    try:
        plan = MoeConstructionPlan(
            manifest.facts["source_model"],
            manifest.facts["source_layer"],
            num_models=len(request.models),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{error}", file=folder / MANIFEST) from None
    dense = frozenset(request.dense_layers)
    rows_with_experts = [layer for layer in range(plan.num_layers) if layer not in dense]
    plan = MoeConstructionPlan(
        plan.source_model[rows_with_experts],
        plan.source_layer[rows_with_experts],
        num_models=plan.num_models,
    )
    if len(labels) > 1 or not np.array_equal(plan.source_layer, own_layers(plan)):
        yield plan_picture(plan, labels)
    if dense:
        layers = format_numbers("layer", request.dense_layers)
        yield f"<p>Without experts: {layers}.</p>"
    rows = []
    for number, source in enumerate(request.models):
        layers, experts = (plan.source_model == number).nonzero()
        places = format_runs(sorted(set(experts.tolist()))) if len(experts) else "none"
        rows.append(
            (str(number), labels[number], places, f"{len(layers):,}", changes(source, names))
        )
    header = ("", "model", "experts", "total", "modifications")
    yield from folded_table(f"{len(rows)} models", header, rows)
    if shared:
        listed = ", ".join(dict.fromkeys(names[model] for model in shared))
        yield f"<p>Every token also goes through the FFN of {escape(listed)}.</p>"
    asked = request_values(request)
    if said := describe_experts(asked):
        yield f"<p>{escape(' '.join(said))}</p>"
    rest = escape(describe_backbone(asked, names[request.base]))
    yield (
        f"<p>Everything else {rest}. The routers start by the "
        f"method <code>{escape(request.routers.method)}</code>.</p>"
    )


def own_layers(plan: MoeConstructionPlan) -> npt.NDArray[np.int64]:
    """The source layers of experts that stay in the layer they come from."""
    return np.broadcast_to(np.arange(plan.num_layers)[:, np.newaxis], plan.source_layer.shape)


def describe_operation(manifest: Manifest | None) -> Iterator[str]:
    """What an operation on a finished MoE did to the experts of each layer."""
    if manifest is None:
        return
    request, facts = manifest.request, manifest.facts
    before = facts.get("num_experts_before")
    match request:
        case PruneRequest():
            best = f", the best by <code>{escape(request.by)}</code>" if request.by else ""
            yield f"<p>Of {before} experts in each layer, these are kept{best}.</p>"
            yield from layer_table("kept", runs_of(request.keep))
        case MergeRequest():
            aligned = ", after their neurons were matched" if request.align else ""
            yield f"<p>Each of these groups of {before} experts became its mean{aligned}.</p>"
            groups = {
                layer: ", ".join(" + ".join(map(str, group.experts)) for group in groups)
                for layer, groups in request.groups.items()
            }
            yield from layer_table("groups", groups)
        case ExpandRequest():
            noise = f", with noise of {request.noise_scale:g}" if request.noise_scale else ""
            yield f"<p>Of {before} experts in each layer, these are copies{noise}.</p>"
            yield from layer_table("each new expert is a copy of", runs_of(request.copies))
        case ExtractRequest():
            several = len(next(iter(request.experts.values()))) > 1
            how = " the mean of" * request.mean or " side by side" * several
            yield f"<p>Of {before} experts in each layer, the FFN is{how}:</p>"
            yield from layer_table("experts", runs_of(request.experts))
        case RerouteRequest():
            yield (
                f"<p>The routers were made anew: <code>{escape(request.routers.method)}</code>. "
                "Every other weight is unchanged.</p>"
            )


def layer_table(title: str, layers: Mapping[str, str]) -> Iterator[str]:
    """The experts of each layer; one row if all layers have the same."""
    rows = list(layers.items())
    if len(rows) > 1 and len({experts for _, experts in rows}) == 1:
        rows = [("all", rows[0][1])]
    yield from folded_table(f"{len(rows)} layers", ("layer", title), rows)


def runs_of(layers: Mapping[str, Sequence[int]]) -> dict[str, str]:
    return {layer: format_runs(experts) for layer, experts in layers.items()}


def folded_table(
    summary: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
) -> Iterator[str]:
    """A table; behind its `summary` if it is long."""
    whole = table(header, rows, numbers)
    if len(rows) > MOST_ROWS:
        whole = f"<details><summary>{escape(summary)}</summary>{whole}</details>"
    yield whole


def describe_sizes(model: MoeModel) -> Iterator[str]:
    sizes: dict[str, int] = {}
    counts: dict[str, int] = {}
    for name, tensor in model.tensors.items():
        part = find_part(name)
        sizes[part] = sizes.get(part, 0) + tensor.nbytes
        counts[part] = counts.get(part, 0) + math.prod(tensor.shape)
    parts = sorted(sizes, key=lambda part: -sizes[part])
    yield shares_picture({part: sizes[part] for part in parts})
    total = max(sum(sizes.values()), 1)
    rows = [
        (part, f"{counts[part]:,}", f"{sizes[part]:,}", f"{100 * sizes[part] / total:.1f} %")
        for part in parts
    ]
    yield table(("part", "parameters", "bytes", "share"), rows, numbers=(1, 2, 3))


def find_part(name: str) -> str:
    """The part of the model that a tensor belongs to, by its name."""
    part = part_of(name)
    if part != "other weights":
        return part
    fitting = (part for part, pattern in OTHER_PARTS if pattern.search(name))
    return next(fitting, "norms and the rest")


def describe_routers(found: ModelReport, manifest: Manifest | None) -> Iterator[str]:
    if not found.routers:
        return
    broken = [router.layer for router in found.routers if not router.finite]
    shared = sorted({r.row_repeats for r in found.routers if r.tied_experts and r.row_repeats})
    shared = [number for number in shared if number < (found.num_experts or 0)]
    tied = [r.layer for r in found.routers if r.tied_experts and r.row_repeats not in shared]
    copied = manifest is not None and isinstance(manifest.request, ExpandRequest)
    problems = []
    if broken:
        layers = format_numbers("layer", broken)
        problems.append(f"{layers}: the router has numbers that are not finite")
    if tied and not copied:
        layers = format_numbers("layer", tied)
        problems.append(f"{layers}: experts with the same row always tie")
    yield from list_problems(problems, "failed")
    if shared:
        listed = " or ".join(map(str, shared))
        yield (
            f'<p class="passed">Experts share rows, {listed} in a row, as the shards of a copy do: '
            "they are chosen together.</p>"
        )
    elif tied and copied:
        yield '<p class="passed">Copies share rows and are chosen together.</p>'
    elif not problems:
        yield '<p class="passed">All numbers are finite, and no two experts tie.</p>'
    variations = [v for r in found.routers if (v := r.coefficient_of_variation) is not None]
    if variations:
        yield (
            f"<p>Predicted on {escape(found.hidden_states or 'random tokens')}, the load’s "
            f"coefficient of variation is {format_range(variations)}, where 0 is even. "
            "Training will change it.</p>"
        )
    rows = [
        (
            name_layer(router.layer, found.num_layers),
            format_number(router.smallest_norm),
            format_number(router.greatest_norm),
            format_number(router.most_alike, 6),
            str(router.tied_experts),
            format_number(router.coefficient_of_variation),
            format_number(router.mean_entropy),
        )
        for router in found.routers
    ]
    header = (
        "layer", "shortest row", "longest row", "most alike (cosine)", "tied experts",
        "load’s variation", "entropy",
    )  # fmt: skip
    yield (
        f"<details><summary>{len(rows)} routers, layer by layer</summary>"
        f"{table(header, rows, numbers=range(7))}</details>"
    )


def format_number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:#.{digits}g}"


def describe_readers(model: MoeModel) -> Iterator[str]:
    if not model.layers:
        return
    readers = find_readers(model.config, contents_of_model(model))
    rows = [
        (f"{'✓' if r.loads else '✗'} {r.name}", "loads it" if r.loads else "; ".join(r.reasons))
        for r in readers
    ]
    yield table(("reader", ""), rows)


def describe_files(model: MoeModel, manifest: Manifest | None) -> Iterator[str]:
    sizes = {Path(t.file.path).name: t.file.size for t in model.tensors.values()}
    digests = {name: r.sha256 for name, r in manifest.files.items()} if manifest else {}
    rows = [(name, f"{size:,}", digests.get(name) or "") for name, size in sorted(sizes.items())]
    with_digests = any(row[2] for row in rows)
    header = ("file", "bytes", "SHA-256") if with_digests else ("file", "bytes")
    shown = [row[: len(header)] for row in rows]
    yield from folded_table(f"{len(rows):,} files", header, shown, numbers=(1,))
