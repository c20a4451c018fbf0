"""How many instructions the kernels take for a value or a token, counted by an emulator.

Where no processor of a kind is at hand that is what can be measured; how long an instruction takes
it does not say. `make count-arm` runs this by QEMU with the plugin next to it, as a program for Arm
and as one for x86-64, and then with the names of both counts, for the table.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moe_fast import MoeConfig, Router, RoutingStats, compute_gate_weights, kernels, route
from moe_fast.routing.gradients import Choice, pull_back
from moe_fast.routing.result import Softmax

MARK = 0x5EED5EED  # the plugin's
TOKENS = 512
VALUES = 16_384


def mark() -> None:
    with contextlib.suppress(OSError):
        os.close(MARK)


def rows() -> Iterator[tuple[str, int, Callable[[int], object]]]:
    """Name, the units of one size, and what computes that many."""
    for dtype in ("float64", "float32", "float16"):
        out = np.empty((2 * VALUES // 64, 64), dtype)
        yield (
            f"gate {dtype}",
            VALUES,
            lambda n, out=out, dtype=dtype: compute_gate_weights(
                n // 64, 64, "random", dtype=dtype, out=out[: n // 64]
            ),
        )
    normals = np.empty(2 * VALUES, np.float32)
    yield (
        "fill_normal",
        VALUES,
        lambda n: kernels.compiled.fill_normal(normals, 0, n, 1, 0, 1.0),
    )
    kernel = kernels.compiled
    words = (np.random.default_rng(0).integers(-(2**20), 2**20, 2 * VALUES) / 2**17).astype("f")
    wide, half = words.view(np.uint32), words.astype(np.float16).view(np.uint16)
    for convert, values, to in (
        (kernel.float32_to_bfloat16, wide, np.uint16),
        (kernel.float32_to_float16, wide, np.uint16),
        (kernel.float16_to_bfloat16, half, np.uint16),
        (kernel.bfloat16_to_float16, half, np.uint16),
        (kernel.float16_to_float32, half, np.uint32),
        (kernel.bfloat16_to_float32, half, np.uint32),
    ):
        out = np.empty(2 * VALUES, to)
        yield (
            convert.__name__,
            VALUES,
            lambda n, f=convert, v=values, o=out: f(v[:n], o[:n]),
        )
    for experts, k, dtype, options in (
        (8, 2, "float32", {}),
        (8, 2, "float32", {"scores": "sigmoid"}),
        (64, 8, "float32", {}),
        (64, 8, "float32", {"scores": "sigmoid"}),
        (128, 8, "float32", {}),
        (128, 8, "float32", {"scores": "sigmoid"}),
        (256, 8, "float32", {}),
        (256, 8, "float32", {"scores": "sigmoid"}),
        (512, 10, "float32", {}),
        (64, 8, "float64", {}),
    ):
        config = MoeConfig(experts, k)
        x = logits(experts, dtype)
        name = " ".join(["route", *options.values(), f"{experts}/{k}", dtype])
        yield name, TOKENS, lambda n, x=x, c=config, o=options: route(x[:n], c, **o)
    x = logits(64, "float32")
    switch = MoeConfig(64, 1, "switch_transformer")
    yield "switch 64", TOKENS, lambda n: route(x[:n], switch, capacity_factor=1.0)
    choice = MoeConfig(64, 8, "expert_choice")
    yield "expert choice 64/8", TOKENS, lambda n: route(x[:n], choice)
    stats = RoutingStats(MoeConfig(64, 8))
    yield "statistics 64/8", TOKENS, lambda n: stats.update(x[:n])
    router = Router(MoeConfig(64, 8), norm_topk_prob=False)
    softmax = Softmax(x, np.zeros(2 * TOKENS))
    chosen = Choice(router(x).indices, router(x).weights)
    yield (
        "gradient 64/8, of losses",
        TOKENS,
        lambda n: pull_back(
            x[:n],
            router.rule,
            1,
            mean_gradient=np.ones(64),
            square_gradient=1.0,
            softmax=Softmax(*(kept[:n] for kept in softmax)),
        ),
    )
    yield (
        "gradient 64/8, over all experts",
        TOKENS,
        lambda n: pull_back(x[:n], router.rule, 1, choice=Choice(*(array[:n] for array in chosen))),
    )
    few = logits(8, "float32")
    switch_8 = MoeConfig(8, 1, "switch_transformer")
    yield "switch 8, choice", TOKENS, lambda n: route(few[:n], switch_8, capacity_factor=math.inf)
    yield (
        "switch 8, choice, drop, permutation",
        TOKENS,
        lambda n: route(few[:n], switch_8).permutation,
    )


def logits(num_experts: int, dtype: str) -> np.ndarray:
    random = np.random.default_rng(num_experts)
    # A sum of integers is near enough to a normal, and the same on every processor.
    values = random.integers(-(2**20), 2**20, (4, 2 * TOKENS, num_experts)).sum(0) / 2**20
    return values.astype(dtype)


def count() -> None:
    for name, units, compute in rows():
        compute(units), compute(2 * units)
        mark()
        compute(units)
        mark()
        compute(2 * units)
        mark()
        print(units, name, flush=True)


def read(counts: str) -> dict[str, float]:
    """Instructions for one unit, by row, from COUNTS.rows and COUNTS.counts."""
    named = [line.split(" ", 1) for line in Path(f"{counts}.rows").read_text().splitlines()]
    marks = iter(int(line) for line in Path(f"{counts}.counts").read_text().split())
    # Of the larger call less the smaller: what does not grow with them is none of the kernel's.
    return {
        name: ((after - between) - (between - before)) / int(units)
        for (units, name), before, between, after in zip(named, marks, marks, marks, strict=True)
    }


def main() -> None:
    if not sys.argv[1:]:
        count()
        return
    columns = [read(counts) for counts in sys.argv[1:]]
    print("| |", " | ".join(Path(counts).name for counts in sys.argv[1:]), "|")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(f"{column[name]:.1f}" for column in columns), "|")


if __name__ == "__main__":
    main()
