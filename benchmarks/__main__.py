"""Measures moe_fast against what is installed and prints a Markdown table.

    python -m benchmarks [--reference FILE] [--samples N] [WORD ...]

Rows are named by the modules in `TOPICS`. Words choose the rows whose text holds all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from benchmarks import (
    calibration,
    checkpoint,
    conversion,
    experts,
    gates,
    gradients,
    loading,
    operations,
    plan,
    routing,
)
from benchmarks.measure import SAMPLES, Result, Row, measure
from benchmarks.reference import Reference
from moe_fast import show_config

TOPICS = [
    *(gates, plan, conversion, routing, gradients, checkpoint, operations, experts, loading),
    calibration,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows with all of these words")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="timings of each side")
    parser.add_argument(
        "--reference",
        type=Path,
        default=os.environ.get("MOE_FAST_REFERENCE"),
        help="the reference's moe_construction.rs; by default $MOE_FAST_REFERENCE",
    )
    options = parser.parse_args()
    reference = Reference(Path(options.reference)) if options.reference else None
    print(f"{processor()}, {os.cpu_count()} processors, {platform.platform()}")
    show_config()
    print()
    print("| work | ours | against | theirs | ratio (quartiles) | goal | |")
    print("|---|--:|---|--:|--:|--:|---|")
    for row in chosen(reference, options.words):
        print(line(measure(row, options.samples)), flush=True)
    if reference is None:
        print("\nWithout the reference: give its source file with --reference.")


def chosen(reference: Reference | None, words: list[str]) -> Iterator[Row]:
    for topic in TOPICS:
        for row in topic.rows(reference):
            if all(word in f"{row.work} {row.peer}" for word in words):
                yield row


def line(result: Result) -> str:
    row = result.row
    shown = memory if row.returned == "bytes" else duration
    if result.theirs is None:
        goal = f"{shown(1 / row.at_least)}" if row.at_least else ""
        columns = [row.work, shown(result.ours), "", "", "", goal]
    else:
        goal = f"{row.at_least:.2g} ×" if row.at_least else ""
        ratio = f"{result.ratio:.2f} × ({result.low:.2f} – {result.high:.2f})"
        columns = [row.work, shown(result.ours), row.peer, shown(result.theirs), ratio, goal]
    verdict = "" if row.at_least is None else "reached" if result.reached else "missed"
    return "| " + " | ".join([*columns, verdict]) + " |"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def memory(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f} MB" if nbytes >= 1e9 else f"{nbytes / 1e6:.3g} MB"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [entry.partition(":")[2].strip() for entry in lines if entry.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
