"""What starting takes: processor time of whole processes, above that of Python or NumPy alone."""

from __future__ import annotations

import atexit
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.checkpoint import BUILD, smollm2
from benchmarks.measure import Row
from benchmarks.process import measured
from benchmarks.reference import Reference

PROCESSES = 9  # of each kind, for one figure
NOTHING, NUMPY = "pass", "import numpy"


def rows(reference: Reference | None) -> Iterator[Row]:
    if not hasattr(os, "wait4"):
        return
    temporary = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    dry_run = [*BUILD, str(smollm2(folder)), "-o", str(folder / "moe"), "--dry-run"]
    version = [sys.executable, "-m", "moe_fast", "--version"]
    load = [sys.executable, "-c", "import numpy, moe_fast"]
    for work, command, alone, goal in (
        ("`moe-fast --version`, above Python", version, NOTHING, 0.06),
        ("`import moe_fast`, above `import numpy`", load, NUMPY, 0.012),
        ("`moe-fast build --dry-run`, SmolLM2-135M, above `import numpy`", dry_run, NUMPY, 0.12),
    ):
        call = above(command, [sys.executable, "-c", alone])
        yield Row(f"{work}, processor time", call, "", None, 1 / goal, "seconds", 5)


def above(command: list[str], other: list[str]) -> Callable[[], float]:
    """How much more processor time a command takes than another."""

    def call() -> float:
        pairs = [(measured(command)["cpu"], measured(other)["cpu"]) for _ in range(PROCESSES)]
        ours, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
        return max(ours - theirs, 1e-6)

    return call
