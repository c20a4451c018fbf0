"""The command: parses, calls, prints. No logic of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from moe_fast.checkpoint.build import BuildReport, build_moe
from moe_fast.checkpoint.check import CheckReport, check_moe
from moe_fast.config import MoeConfig, RouterInit
from moe_fast.errors import MoeFastError

app = typer.Typer(
    name="moe-fast",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn dense language models on disk into Mixture-of-Experts checkpoints.",
)
output_console = Console()
error_console = Console(stderr=True)


@app.callback()
def commands() -> None:
    pass


@app.command()
def build(
    models: Annotated[list[Path], typer.Argument(help="Folders of dense models.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    experts_per_token: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Gives attention, embeddings, norms and tokenizer.", show_default="the first model"
        ),
    ] = None,
    router_init: Annotated[
        RouterInit, typer.Option(help="How routers start.")
    ] = RouterInit.BALANCED,
    max_shard_size: Annotated[
        int,
        typer.Option(
            parser=lambda text: parse_size(str(text)),
            metavar="SIZE",
            help="Bytes of weights per file, such as 500MB or 5GB.",
        ),
    ] = 5_000_000_000,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing output.")
    ] = False,
) -> None:
    """Build one Mixture-of-Experts checkpoint from dense models."""
    with reported_errors():
        config = MoeConfig(num_experts=experts, num_experts_per_tok=experts_per_token)
        with progress_bar() as progress:
            report = build_moe(
                models,
                output,
                config,
                base=base,
                router_init=router_init,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                progress=progress,
            )
    print_build(report)


@app.command()
def check(output: Annotated[Path, typer.Argument(help="A folder that build wrote.")]) -> None:
    """Compare every expert with its source, byte for byte."""
    with reported_errors():
        report = check_moe(output)
    print_check(report)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="A folder to create.")] = Path("demo"),
) -> None:
    """Make two small dense models, build an MoE from them, check it."""
    from moe_fast.demo import make_dense_model

    with reported_errors():
        models = [folder / "dense-a", folder / "dense-b"]
        for seed, model in enumerate(models):
            make_dense_model(model, seed=seed)
        print_build(build_moe(models, folder / "moe", overwrite=True))
        report = check_moe(folder / "moe")
    print_check(report)
    if not report.passed:
        raise typer.Exit(1)


def print_check(report: CheckReport) -> None:
    for problem in report.problems:
        error_console.print(problem, style="red", markup=False, soft_wrap=True)
    output_console.print(
        f"{report.num_tensors} tensors, {report.num_experts_compared} experts compared with their "
        f"sources: {'all equal' if report.passed else f'{len(report.problems)} problems'}",
        soft_wrap=True,
    )


def print_build(report: BuildReport) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "output": f"{report.output} ({report.target})",
        "experts": f"{report.num_experts} per layer, {report.num_experts_per_tok} per token",
        "layers": str(report.num_layers),
        "parameters": f"{report.num_parameters:,}",
        "load balance": f"{report.load_balance:.4f} (0 is even)",
        "bytes": f"{report.num_bytes:,} in {report.num_files} file{'s'[: report.num_files > 1]}",
        "seconds": f"{report.seconds:.2f}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    output_console.print(table)
    for warning in report.warnings:
        error_console.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)


@contextmanager
def reported_errors() -> Iterator[None]:
    """An error of this package or of the system: its message and exit code 1, no traceback."""
    try:
        yield
    except (MoeFastError, TypeError, MemoryError, OSError) as error:
        error_console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on a terminal, nothing in a pipe."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=error_console,
        disable=not error_console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("writing", total=None)
        yield lambda written, total: bar.update(task, completed=written, total=total)


def parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write 500MB or 5GB")
    number, unit = match.groups()
    return int(float(number) * 1000 ** " KMGT".index(unit.upper() or " "))
