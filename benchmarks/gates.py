"""Router weights."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks.measure import Row, Work, at_level
from benchmarks.reference import Reference
from moe_fast import compute_gate_weights, compute_router_weights
from moe_fast.kernels.level import levels_available

ROUTER = (7168, 256)  # of a large model
CACHED = (512, 64)
LARGE = (7168, 4102)  # 29.4 M values, 235 MB in float64
SMALL = (64, 8)


def making(size: tuple[int, int], dtype: str = "float64", **options: object) -> Work:
    """A call that makes random weights into an array made before."""
    out = compute_gate_weights(*size, "random", dtype=dtype)
    return lambda: compute_gate_weights(*size, "random", out=out, **options)


def named(dtype: str, size: tuple[int, int], more: str = ", `out=`") -> str:
    return f"{dtype}, {size[0]} × {size[1]}{more}"


def rows(reference: Reference | None) -> Iterator[Row]:
    yield Row(named("float64", SMALL) + ", a call", making(SMALL), at_least=1 / 3e-6)
    if reference is not None:
        ours, theirs = compute_gate_weights(*ROUTER), reference.weights(*ROUTER, "balanced")
        assert ours.tobytes() == theirs.tobytes(), "the reference gives other bits"
        peer = "the compiled reference"
        theirs = reference.making_weights(*ROUTER, "random")
        yield Row(named("float64", ROUTER), making(ROUTER), peer, theirs, 3.5)
        yield Row(
            named("float64", ROUTER, ""),
            lambda: compute_gate_weights(*ROUTER, "random"),
            peer,
            theirs,
        )
        theirs = reference.making_weights(*LARGE, "random")
        yield Row(named("float64", LARGE), making(LARGE), peer, theirs, 2.5)
        theirs = reference.making_weights(*CACHED, "random")
        goals = {"baseline": 1.2, "x86-64-v3": 2.0}
        for level in levels_available():
            work = named("float64", CACHED) + f", level {level}"
            yield Row(work, at_level(level, making(CACHED)), peer, theirs, goals.get(level))
    fill = np.ones(LARGE).fill
    yield Row(named("float64", LARGE), making(LARGE), "`ndarray.fill`", lambda: fill(1.0), 1 / 1.1)
    yield filling_by_two()
    for dtype in ("float64", "float32", "bfloat16"):
        yield Row(
            named(dtype, LARGE) + ", two threads",
            making(LARGE, dtype, threads=2),
            "one thread",
            making(LARGE, dtype, threads=1),
            1.6,
        )
    yield numpy_row()
    yield from torch_rows()


def filling_by_two() -> Row:
    """What two threads gain at most, where a thread does nothing but write."""
    out = np.ones(LARGE)
    halves = np.array_split(out, 2)
    pool = ThreadPoolExecutor(1)

    def by_two() -> None:
        other = pool.submit(halves[1].fill, 1.0)
        halves[0].fill(1.0)
        other.result()

    return Row(
        named("`ndarray.fill`", LARGE, ", two threads"),
        by_two,
        "one thread",
        lambda: out.fill(1.0),
    )


def numpy_row() -> Row:
    generator = np.random.Generator(np.random.PCG64(0))
    out = np.empty(ROUTER)
    scale = ROUTER[0] ** -0.5

    def theirs() -> None:
        generator.random(out=out)
        np.multiply(out, 2 * scale, out=out)
        np.subtract(out, scale, out=out)

    return Row(named("float64", ROUTER), making(ROUTER), "NumPy's PCG64, scaled", theirs, 6.0)


def torch_rows() -> Iterator[Row]:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)
    scale = ROUTER[0] ** -0.5
    goals = {"float32": 7.0, "bfloat16": 7.0}
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        weight = torch.empty(ROUTER, dtype=getattr(torch, dtype))
        yield Row(
            named(dtype, ROUTER),
            making(ROUTER, dtype),
            "`torch.nn.init.uniform_`",
            lambda weight=weight: torch.nn.init.uniform_(weight, -scale, scale),
            goals.get(dtype),
        )
    routers = torch.empty((32, 8, 4096), dtype=torch.bfloat16)
    yield Row(
        "bfloat16, 32 layers of 8 × 4096",
        lambda: compute_router_weights(32, 4096, 8, "random", dtype="bfloat16", transpose=True),
        "`torch.nn.init.uniform_`",
        lambda: torch.nn.init.uniform_(routers, -scale, scale),
    )
