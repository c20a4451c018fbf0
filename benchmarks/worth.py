"""The tables and the picture of the page on what a start is worth, from the lines of `training`.

python -m benchmarks.worth RESULTS.jsonl [PICTURE.svg]
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

DEAD = 0.02  # of an even load
DENSE = "dense"
PEAK = 2e-4
DRAWN = ("dense", "balanced", "standard normal", "normal, 3", "calibrated, 3", "clustered, 3")
Line = Mapping[str, Any]


def variation(load: Any) -> np.ndarray:
    """The coefficient of variation of each layer's load."""
    counts = np.array(load, np.float64)
    return counts.std(axis=1) / counts.mean(axis=1)


def count_dead(load: Any) -> int:
    counts = np.array(load, np.float64)
    return int((counts < DEAD * counts.mean(axis=1, keepdims=True)).sum())


def spread(values: Iterable[float]) -> str:
    """The mean, and beside it the least and the greatest of several."""
    found = list(values)
    mean = f"{np.mean(found):.4f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):.4f} to {max(found):.4f})"


def table(lines: list[Line], dense_arm: str) -> str:
    """A row an arm: gains over the dense model's loss before, paired with dense runs by seed."""
    by_arm: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        by_arm[line["arm"]].append(line)
    dense = {line["seed"]: line["loss"][-1] for line in by_arm.get(dense_arm, ())}
    rows = [
        "| start | seeds | final loss | less than dense | load cv, start | load cv, end | dead "
        "| CPU seconds |",
        "|---|--:|---|---|---|---|---|--:|",
    ]
    for arm, runs in by_arm.items():
        less = [dense[run["seed"]] - run["loss"][-1] for run in runs if run["seed"] in dense]
        loads = ["–", "–", "–"]
        if runs[0]["load_start"]:
            for place, key in enumerate(("load_start", "load_end")):
                cv = np.concatenate([variation(run[key]) for run in runs])
                loads[place] = f"{cv.min():.2f}–{cv.max():.2f}"
            dead = [sum(count_dead(run[key]) for run in runs) for key in ("load_start", "load_end")]
            loads[2] = " / ".join(map(str, dead))
        seconds = np.mean([run["seconds"][-1] for run in runs])
        rows.append(
            f"| {arm} | {len(runs)} | {spread(run['loss'][-1] for run in runs)} | "
            f"{spread(less) if less and arm != dense_arm else '–'} | {' | '.join(loads)} | "
            f"{seconds:.0f} |"
        )
    return "\n".join(rows)


def draw(lines: list[Line], picture: Path) -> None:
    """Held-out loss by tokens and by CPU time, each the mean over the seeds that all have."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "worth"
    from matplotlib import pyplot

    from moe_fast import plot_curves

    seeds = set.intersection(
        *({line["seed"] for line in lines if line["arm"] == arm} for arm in DRAWN)
    )
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for ax, key, label in zip(
        panels, ("tokens", "seconds"), ("tokens", "CPU seconds"), strict=True
    ):
        curves = {}
        for arm in DRAWN:
            runs = [line for line in lines if line["arm"] == arm and line["seed"] in seeds]
            means = [np.mean([run[name] for run in runs], axis=0) for name in (key, "loss")]
            curves[arm] = np.array(means)
        plot_curves(curves, ax, xlabel=label)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.results.read_text().splitlines()]
    long = [line for line in lines if line["arm"].endswith("long")]
    short = [line for line in lines if line not in long]
    for peak in sorted({line["peak"] for line in short}):
        chosen = [line for line in short if line["peak"] == peak]
        print(f"\nPeak learning rate {peak:g}:\n\n{table(chosen, DENSE)}")
        if peak == PEAK and options.picture:
            draw(chosen, options.picture)
    if long:
        print(f"\nLonger:\n\n{table(long, f'{DENSE}, long')}")


if __name__ == "__main__":
    main()
