"""A row of the benchmark: what it runs, against what, and how it is timed."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_fast import kernels
from moe_fast.kernels.level import load

Work = Callable[[], Any]

SAMPLES = 15
SECONDS_A_SAMPLE = 0.02


@dataclass
class Row:
    """One piece of work, ours and a peer's.

    `at_least` is the goal: how many times as fast as the peer, or, without a peer, the reciprocal
    of the seconds a call may take. Whole processes measure themselves: `returned` tells whether
    what the calls return is "seconds" or, of memory, "bytes". `samples` is for work that is long.
    """

    work: str
    ours: Work
    peer: str = ""
    theirs: Work | None = None
    at_least: float | None = None
    returned: str = ""
    samples: int | None = None


@dataclass
class Result:
    """Medians of a row in seconds, and the median and quartiles of the ratio."""

    row: Row
    ours: float
    theirs: float | None
    ratio: float
    low: float
    high: float

    @property
    def reached(self) -> bool:
        return self.row.at_least is None or self.ratio >= self.row.at_least


def at_level(level: str, work: Work) -> Work:
    """The same work by the kernels of a SIMD level."""
    here = load(level)

    def at_that_level() -> None:
        chosen, kernels.compiled = kernels.compiled, here
        work()
        kernels.compiled = chosen

    return at_that_level


def calls_a_sample(work: Work) -> int:
    work()
    calls = 1
    while (seconds := timed(work, calls)) < SECONDS_A_SAMPLE / 2:
        calls *= 2
    return max(1, round(calls * SECONDS_A_SAMPLE / seconds))


def timed(work: Work, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - begin


def measure(row: Row, samples: int = SAMPLES) -> Result:
    """Time both in turn, so that what else the machine does falls on both."""
    works = [row.ours] if row.theirs is None else [row.ours, row.theirs]
    samples = min(samples, row.samples or samples)
    gc.collect()
    gc.disable()
    try:
        if row.returned:
            for work in works:
                work()  # so that caches are warm
            rounds = [[float(work()) for work in works] for _ in range(samples)]
        else:
            calls = [calls_a_sample(work) for work in works]
            rounds = [
                [timed(work, n) / n for work, n in zip(works, calls, strict=True)]
                for _ in range(samples)
            ]
    finally:
        gc.enable()
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    if row.theirs is None:
        ratios = [1 / ours for (ours,) in rounds]
    else:
        ratios = [theirs / ours for ours, theirs in rounds]
    low, _, high = statistics.quantiles(ratios, n=4)
    theirs = medians[1] if row.theirs is not None else None
    ratio = theirs / medians[0] if theirs is not None else 1 / medians[0]
    return Result(row, medians[0], theirs, ratio, low, high)
