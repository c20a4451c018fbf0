"""Reports for the eye: tables on standard output, warnings and problems on standard error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_fast.command.terminal import error_output, output
from moe_fast.wording import (
    brief,
    format_count,
    format_quantity,
    format_range,
    format_runs,
    name_layer,
)

if TYPE_CHECKING:
    from moe_fast.calibration.score import ScoreReport
    from moe_fast.checkpoint.build import BuildReport
    from moe_fast.checkpoint.check import CheckReport
    from moe_fast.checkpoint.compare import CompareReport
    from moe_fast.checkpoint.convert import ConvertReport
    from moe_fast.checkpoint.operation import OperationReport
    from moe_fast.command.doctor import Diagnosis
    from moe_fast.families.rules import Reader
    from moe_fast.models.inspection import ModelReport, Place, RouterReport
    from moe_fast.plan import MoeConstructionPlan, MoeReport
    from moe_fast.routing.health import RouterHealth
    from moe_fast.routing.statistics import RoutingStats


MOST_PROBLEMS = 10
MOST_LINES = 100
MOST_FILES = 12
LONGEST_NAME = 200  # of a family or a class that config.json names
STATUS_STYLES = {"passed": "green", "failed": "red", "not possible": "magenta"}


def say(text: str) -> None:
    output.print(text)


def warn(text: str) -> None:
    error_output.print(f"warning: {text}", label=(len("warning:"), "magenta"))


def complain(text: str) -> None:
    error_output.print(text, style="red")


def show_build(report: BuildReport) -> None:
    pairs = {
        "output": f"{report.output} ({report.target})",
        "experts": f"{report.num_experts} per layer{describe_split(report)}, "
        f"{report.num_experts_per_tok} per token",
        "layers": f"{report.num_layers}{name_layers(report)}",
        "parameters": f"{report.num_parameters:,}",
        "use of models": describe_use(report.load_balance),
        "router load": describe_prediction(report.routers),
        "bytes": f"{report.num_bytes:,} in {format_count(report.num_files, 'file')}",
        "seconds": f"{report.seconds:.2f}",
    }
    if len({model for models in report.experts for model in models}) == 1:
        del pairs["use of models"]
    show_pairs(pairs)
    if report.dry_run:
        show_layout(report)
        show_rejected(report)
        say("\ndry run: nothing is written")
    for warning in report.warnings:
        warn(warning)


def describe_split(report: BuildReport) -> str:
    if report.granularity == 1:
        return ""
    copies = report.num_experts // report.granularity
    what = "1 copy" if copies == 1 else f"{copies} copies"
    return f" ({what} split in {report.granularity})"


def name_layers(report: BuildReport) -> str:
    """Which layers have no experts."""
    bare = report.layers_without_ffn
    dense = [layer for layer in report.dense_layers if layer not in bare]
    kinds = (("dense", dense), ("without FFN", bare))
    return "".join(f", {kind}: {format_runs(layers)}" for kind, layers in kinds if layers)


def show_layout(report: BuildReport) -> None:
    """Where the experts come from, and what files there will be."""
    same: dict[tuple[str, ...], list[int]] = {}
    for expert, models in enumerate(report.experts):
        same.setdefault(models, []).append(expert)
    say("\nexperts of each layer")
    for models, experts in same.items():
        say(f"  {format_runs(experts)}  {', '.join(models)}")
    say("\nfiles")
    lines = [f"  {name}  {format_quantity(nbytes, 'B')}" for name, nbytes in report.files.items()]
    if len(lines) > MOST_FILES:
        lines[MOST_FILES - 2 : -1] = [f"  and {len(lines) - MOST_FILES + 1} more"]
    for line in lines:
        say(line)


def show_rejected(report: BuildReport) -> None:
    """Why the models fit no other target; one reason each, without the folder of the model."""
    if not report.rejected_targets:
        return
    say("\nother targets, and why they do not fit")
    folders = {model for models in report.experts for model in models}
    for target, (reason, *others) in report.rejected_targets.items():
        for folder in folders:
            reason = reason.removeprefix(f"{folder}{os.sep}")
        more = f" (and {len(others)} more)" if others else ""
        output.print(f"  {target}: {reason}{more}", indent=4)


def describe_use(load_balance: float) -> str:
    """How evenly experts are taken from the models: the reference's load balance of a plan."""
    if load_balance == 0:
        return "even: every model gives the same number of experts"
    return f"uneven: cv {load_balance:.4f} of the number of experts per model"


def describe_prediction(health: RouterHealth) -> str:
    before = health.coefficient_of_variation_before
    was = f", {format_range(before, 4)} before it was evened" if before else ""
    return (
        f"cv {format_range(health.coefficient_of_variation, 4)} (0 is even){was}, "
        f"predicted on {health.num_tokens:,} {health.hidden_states}"
        f"{'; on real text it is less even' if health.hidden_states == 'random tokens' else ''}"
    )


def show_check(report: CheckReport) -> None:
    width = max(len(finding.check) for finding in report.findings)
    impossible = [f for f in report.findings if f.status == "not possible"]
    for (status, summary), same in groupby(report.findings, lambda f: (f.status, f.summary)):
        findings = list(same)
        names = ", ".join(finding.check for finding in findings)
        line = f"{status:<12}  {names:<{width}}{': ' if len(findings) > 1 else '  '}{summary}"
        output.print(line, indent=width + 16, label=(len(status), STATUS_STYLES[status]))
        problems = [problem for finding in findings for problem in finding.problems]
        for problem in problems[:MOST_PROBLEMS]:
            output.print(f"  {problem}", style="red")
        if len(problems) > MOST_PROBLEMS:
            say(f"  and {len(problems) - MOST_PROBLEMS} more, which --json lists")
    show_readers(reader for reader in report.readers if not reader.loads)
    failed = sum(finding.status == "failed" for finding in report.findings)
    verdict = f"{format_count(failed, 'check')} failed" if failed else "passed"
    if impossible:
        were = "was" if len(impossible) == 1 else "were"
        verdict += f"; {len(impossible)} of {len(report.findings)} checks {were} not possible"
    say(f"{report.path}: {verdict}")


def show_conversion(report: ConvertReport) -> None:
    dtypes = [", ".join(found) for found in (report.dtypes_before, report.dtypes)]
    show_pairs(
        {
            "output": f"{report.output} ({report.model_type})",
            "layout": " to ".join(dict.fromkeys((report.layout_before, report.layout))),
            "dtype": " to ".join(dict.fromkeys(dtypes)),
            "tensors": f"{report.num_tensors:,}",
            "bytes": f"{report.num_bytes:,} in {format_count(report.num_files, 'file')}",
            "seconds": f"{report.seconds:.2f}",
        }
    )
    show_readers(report.readers)
    if report.dry_run:
        say("\ndry run: nothing is written")
    for warning in report.warnings:
        warn(warning)


def show_comparison(report: CompareReport) -> None:
    lines = [str(difference) for difference in report.differences]
    for line in lines[:MOST_LINES]:
        say(line)
    if len(lines) > MOST_LINES:
        say(f"and {len(lines) - MOST_LINES} more, which --json lists")
    weights = format_count(report.num_weights, "weight")
    if report.equal:
        within = "" if not report.greatest else f", none apart by more than {report.greatest:.6g}"
        say(f"the same model: {weights}, {format_quantity(report.num_bytes, 'B')}{within}")
    else:
        say(f"not the same model: {format_count(len(lines), 'difference')} in {weights}")
    for warning in report.warnings:
        warn(warning)


def show_operation(report: OperationReport) -> None:
    def change(before: int | None, after: int | None) -> str:
        values = ("-" if value is None else f"{value:,}" for value in (before, after))
        return " to ".join(dict.fromkeys(values))

    pairs = {
        "output": f"{report.output} ({report.model_type})",
        "experts": f"{change(report.num_experts_before, report.num_experts)} per layer, "
        f"{change(report.num_experts_per_tok_before, report.num_experts_per_tok)} per token",
        "parameters": change(report.num_parameters_before, report.num_parameters),
        "bytes": f"{report.num_bytes:,} in {format_count(report.num_files, 'file')}",
        "seconds": f"{report.seconds:.2f}",
    }
    if not report.num_experts:
        pairs["experts"] = f"{report.num_experts_before} per layer to none: a dense model"
    if report.routers is not None:
        pairs["router load"] = describe_prediction(report.routers)
    show_pairs(pairs)
    show_readers(report.readers)
    if report.dry_run:
        say("\ndry run: nothing is written")
    for warning in report.warnings:
        warn(warning)


def show_scores(report: ScoreReport) -> None:
    def range_of(numbers: Sequence[float], form: str) -> str:
        ends = (min(numbers), max(numbers))
        return " to ".join(dict.fromkeys(format(number, form) for number in ends))

    layers = list(report.layers.items())[:MOST_LINES]
    show_columns(
        {
            "layer": [key for key, _ in layers],
            "tokens per expert": [range_of(scores["frequency"], ",.0f") for _, scores in layers],
            "reap": [range_of(scores["reap"], ".3g") for _, scores in layers],
            "mean norm": [range_of(scores["ean_mean"], ".3g") for _, scores in layers],
        }
    )
    say("")
    pairs = {
        "output": str(report.output),
        "experts": f"{report.num_experts} per layer",
        "tokens": f"{report.num_tokens:,}",
        "seconds": f"{report.seconds:.2f}",
    }
    if report.arrays is not None:
        pairs["matrices"] = str(report.arrays)
    show_pairs(pairs)
    for warning in report.warnings:
        warn(warning)


def show_readers(readers: Iterable[Reader]) -> None:
    for reader in readers:
        why = "" if reader.loads else f" does not load it: {'; '.join(reader.reasons)}"
        say(f"{reader.name}{why or ' loads it'}")


def show_plan(plan: MoeConstructionPlan, report: MoeReport) -> None:
    pairs = {
        "layers": f"{plan.num_layers:,}",
        "experts": f"{plan.num_experts:,} per layer",
        "models": f"{plan.num_models:,}",
        "use of models": describe_use(report.load_balance),
    }
    if plan.num_models == 1:
        del pairs["use of models"]
    if report.total_params_estimate:
        pairs["parameters"] = f"{report.total_params_estimate:,} in experts and routers"
    if report.unused_models:
        pairs["unused"] = f"{format_count(len(report.unused_models), 'model')}, without an expert"
    show_pairs(pairs)
    say("\nexperts of each layer, each from the same layer of its model")
    experts = plan.source_model[0]
    for model in range(min(plan.num_models, plan.num_experts, MOST_LINES)):
        numbers = np.flatnonzero(experts == model).tolist()
        say(f"  model {model}: {format_runs(numbers)}")
    if min(plan.num_models, plan.num_experts) > MOST_LINES:
        say("  ...")


def show_model(report: ModelReport) -> None:
    pairs = {
        "model": f"{report.path}",
        "family": f"{plainly(report.model_type)} "
        f"({plainly(report.architecture or 'no architecture named')})",
        "parameters": f"{report.num_parameters:,}",
        "dtypes": ", ".join(
            f"{d} {format_quantity(n, 'B')}" for d, n in report.bytes_by_dtype.items()
        ),
        "bytes": f"{report.num_bytes:,} in {format_count(report.num_files, 'file')}",
        "layers": f"{report.num_layers}",
    }
    if report.num_mtp_layers:
        pairs["prediction"] = (
            f"{format_count(report.num_mtp_layers, 'layer')} for multi-token prediction besides, "
            f"of {report.num_mtp_parameters:,} parameters"
        )
    per_token = report.num_experts_per_tok
    chosen = f"{per_token if per_token is not None else 'an unknown number'} per token"
    if report.layout == "dense":
        pairs["experts"] = "none: a dense model"
    else:
        active = report.active_parameters
        pairs |= {
            "active": "unknown" if active is None else f"{active:,} per token",
            "layers": f"{report.num_layers}, "
            + ("all" if report.num_moe_layers == report.num_layers else f"{report.num_moe_layers}")
            + " with experts",
        }
    if report.unknown_experts is not None:
        number = "an unknown number" if report.num_experts is None else report.num_experts
        pairs |= {
            "experts": f"{number} per layer, {chosen}",
            "layout": f"not known here: {report.unknown_experts}",
        }
    elif report.layout != "dense":
        pairs |= {
            "experts": f"{report.num_experts} per layer, {chosen}, "
            f"{report.parameters_per_expert:,} parameters each",
            "layout": report.layout,
        }
    if report.quantization is not None:
        pairs["quantised"] = (
            f"{brief(report.quantization)}; how it packs numbers is not known here, and parameters "
            "are counted as stored"
        )
    show_pairs(pairs)
    if report.routers:
        show_routers(report)
    if report.copies is not None:
        show_copies(report.copies, report.num_layers)
    for problem in report.problems[:MOST_LINES]:
        complain(problem)
    if len(report.problems) > MOST_LINES:
        complain(f"and {len(report.problems) - MOST_LINES:,} more like these")


def plainly(text: str) -> str:
    """A name out of a file for the terminal, however long it is and whatever is in it."""
    return text if text.isprintable() and len(text) < LONGEST_NAME else brief(text)


def show_routers(report: ModelReport) -> None:
    routers = report.routers

    def of_rows(values: Sequence[float | None]) -> list[str]:
        cells = align_numbers(values)
        return [
            cell if router.finite else "not finite"
            for cell, router in zip(cells, routers, strict=True)
        ]

    columns = {
        "layer": [name_layer(router.layer, report.num_layers) for router in routers],
        "smallest row": of_rows([router.smallest_norm for router in routers]),
        "greatest row": of_rows([router.greatest_norm for router in routers]),
        "most alike": of_rows([router.most_alike for router in routers]),
        "tied experts": [describe_ties(router) for router in routers],
        "load cv": align_numbers([router.coefficient_of_variation for router in routers]),
        "entropy": align_numbers([router.mean_entropy for router in routers]),
    }
    say(
        "\nrouters (norms of the experts' rows; the greatest cosine between two; load and entropy "
        f"of a token's choice, predicted on {report.hidden_states})"
    )
    show_columns(columns)


def describe_ties(router: RouterReport) -> str:
    if router.row_repeats is not None and 1 < router.row_repeats < router.tied_experts:
        return f"{router.tied_experts}, in {router.row_repeats}s"
    return str(router.tied_experts)


def show_copies(copies: Iterable[tuple[Place, ...]], num_layers: int) -> None:
    """Groups of equal experts, those that look the same in every layer in one line."""
    lines: dict[str, list[int]] = {}
    for group in copies:
        layers = {layer for layer, _ in group}
        if len(layers) == 1:
            experts = format_runs(expert for _, expert in group)
            lines.setdefault(f"experts {experts}", []).append(layers.pop())
        else:
            names = [(expert, name_layer(layer, num_layers)) for layer, expert in group]
            places = ", ".join(f"{expert} of layer {layer}" for expert, layer in names)
            lines.setdefault(f"experts {places}", [])
    say("\ncopies (equal bytes)" if lines else "\ncopies: none, all experts differ")
    for experts, where in lines.items():
        own = format_runs(layer for layer in where if layer < num_layers)
        ahead = [name_layer(layer, num_layers) for layer in where if layer >= num_layers]
        listed = ", ".join([*([own] if own else []), *ahead])
        say(f"  {experts}" + (f" in layers {listed}" if listed else ""))


def show_routing(stats: RoutingStats) -> None:
    config = stats.config
    show_pairs(
        {
            "method": f"{config.routing_method}",
            "experts": f"{config.num_experts} per layer, {config.num_experts_per_tok} per token",
            "layers": f"{stats.num_layers}",
            "tokens": f"{int(stats.num_tokens.sum()):,}",
            "loss": f"{stats.huggingface_load_balancing_loss():.4f}, of all layers as transformers "
            f"computes it ({config.num_experts_per_tok} is even)",
        }
    )
    rows = stats.summary()
    columns = {
        "layer": [str(row["layer"]) for row in rows],
        "tokens": [f"{row['num_tokens']:,}" for row in rows],
    }
    for title, name in {
        "load cv": "coefficient_of_variation",
        "effective experts": "effective_num_experts",
        "entropy": "mean_entropy",
        "Switch loss": "load_balancing_loss",
        "z-loss": "z_loss",
        "importance": "importance_loss",
    }.items():
        columns[title] = align_numbers([row[name] for row in rows])
    columns["dropped"] = [format_percent(row["share_dropped"]) for row in rows]
    columns["no expert"] = [format_percent(row["share_unrouted"]) for row in rows]
    for factor in stats.capacity_factors:
        columns[f"at {factor:g}"] = [
            format_percent(row["share_dropped_by_capacity_factor"][str(factor)]) for row in rows
        ]
    say("\nlayers (load cv and importance: 0 is even; Switch loss: 1 is even; entropy in nats)")
    if stats.capacity_factors:
        factors = ", ".join(f"{factor:g}" for factor in stats.capacity_factors)
        say(f"dropped: share of the choices; at {factors}: with this capacity factor")
    show_columns(columns)
    say("")
    for row in rows:
        say(f"layer {row['layer']}: {row['description']}")


def format_percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def show_diagnosis(diagnosis: Diagnosis) -> None:
    show_pairs(
        {
            "moe_fast": diagnosis.moe_fast,
            "python": diagnosis.python,
            "numpy": diagnosis.numpy,
            "platform": diagnosis.platform,
            "kernels": f"{diagnosis.level} (built in: {', '.join(diagnosis.levels_built)}; "
            f"this processor runs: {', '.join(diagnosis.levels_available)})",
            "threads": f"{diagnosis.threads}",
        }
    )
    rows = []
    for extra in diagnosis.extras:
        there = [f"{p.name} {p.installed}" for p in extra.packages if p.fits]
        absent = [
            f"{p.name}>={p.minimum}" if p.minimum else p.name for p in extra.packages if not p.fits
        ]
        rows.append((extra.name, extra.purpose, ", ".join(there), ", ".join(absent)))
    say("")
    output.print_table(("extra", "for", "installed", "missing"), rows)
    for extra in diagnosis.extras:
        if not extra.complete:
            say(f"for {extra.purpose or extra.name}: {extra.install_command}")
    for problem in diagnosis.problems:
        warn(problem)


def show_families(
    becomes: Mapping[str, Sequence[str]],
    readers: Mapping[str, Sequence[str]],
    unfit: Mapping[str, str],
) -> None:
    for heading, pairs in (
        ("dense models, and the MoEs they can become (the first is the default)", becomes),
        ("MoEs, and the programs known to load them", readers),
    ):
        say(heading)
        show_pairs({name: ", ".join(listed) for name, listed in pairs.items()})
        say("")
    say("dense models that fit no MoE, and why")
    show_pairs(unfit)


def show_pairs(pairs: Mapping[str, str]) -> None:
    width = max(map(len, pairs))
    for name, value in pairs.items():
        line = f"{name:<{width}}  {value}"
        output.print(line, indent=width + 2, label=(len(name), "bold"))


def align_numbers(values: Sequence[float | None]) -> list[str]:
    """Numbers with as many decimals as the greatest needs for four digits; `-` for `None`."""
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    greatest = max(finite, default=0.0)
    decimals = min(max(3 - math.floor(math.log10(greatest)), 0), 9) if greatest else 4
    return ["-" if value is None else f"{value:.{decimals}f}" for value in values]


def show_columns(columns: Mapping[str, Sequence[str]]) -> None:
    """A table of numbers; columns that do not fit go below, beside the first one again."""
    widths = {name: max(len(name), *map(len, cells), 0) for name, cells in columns.items()}
    first, *rest = columns
    blocks = [[first]]
    for name in rest:
        if sum(widths[each] + 2 for each in blocks[-1]) + widths[name] > output.width:
            blocks.append([first])
        blocks[-1].append(name)
    for number, names in enumerate(blocks):
        if number:
            say("")
        header = "  ".join(f"{name:>{widths[name]}}" for name in names)
        output.write(header, style="bold")
        for cells in zip(*(columns[name] for name in names), strict=True):
            line = "  ".join(
                f"{cell:>{widths[name]}}" for cell, name in zip(cells, names, strict=True)
            )
            output.write(line)


@contextmanager
def progress_bar(task: str = "writing") -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on a terminal, from the first bytes on; nothing in a pipe."""
    if not error_output.is_terminal or output.quiet:
        yield lambda done, total: None
        return
    started: list[Any] = []

    def show_progress(done: int, total: int) -> None:
        if not started:
            started.append(start_bar(task))
        bar = started[0]
        bar.update(bar.task_ids[0], completed=done, total=total)

    try:
        yield show_progress
    finally:
        for bar in started:
            bar.stop()


def start_bar(task: str) -> Any:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=error_output.console,
        transient=True,
    )
    bar.add_task(task, total=None)
    bar.start()
    return bar
