"""Builds in another dtype, against reading the same bytes and writing as many."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.measure import Row
from benchmarks.reference import Reference
from moe_fast import MoeConfig, build_moe, kernels
from moe_fast.demo import make_dense_model

NUM_EXPERTS = 8
BUFFER = 1024 * 1024
VALUES = 2**18


def rows(reference: Reference | None) -> Iterator[Row]:
    folder = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(folder.cleanup)
    dense, moe = Path(folder.name, "dense"), Path(folder.name, "moe")
    make_dense_model(dense, seed=0, hidden_size=576, intermediate_size=1536, num_hidden_layers=10)
    file = dense / "model.safetensors"
    config = MoeConfig(num_experts=NUM_EXPERTS)

    def read_and_write() -> None:
        buffer = memoryview(bytearray(BUFFER))
        with Path(folder.name, "bytes").open("wb", buffering=0) as out:
            for _ in range(NUM_EXPERTS):
                with file.open("rb", buffering=0) as source:
                    while count := source.readinto(buffer):
                        out.write(buffer[: count // 2])

    yield Row(
        f"build {NUM_EXPERTS} experts, float32 to bfloat16",
        lambda: build_moe(dense, moe, config, dtype="bfloat16", overwrite=True),
        "reading and writing the bytes",
        read_and_write,
        0.5,
    )
    values = np.random.default_rng(0).normal(size=VALUES).astype(np.float32)
    bits, out = values.view(np.uint32), np.empty(VALUES, np.uint16)
    for dtype, kernel in (
        ("bfloat16", kernels.compiled.float32_to_bfloat16),
        ("float16", kernels.compiled.float32_to_float16),
    ):
        try:
            import ml_dtypes
        except ImportError:
            return
        theirs = np.dtype(getattr(ml_dtypes, dtype, dtype))
        peer = "ml_dtypes" if dtype == "bfloat16" else "NumPy"
        yield Row(
            f"{VALUES:,} float32 to {dtype}",
            lambda kernel=kernel: kernel(bits, out),
            peer,
            lambda theirs=theirs: values.astype(theirs),
        )
