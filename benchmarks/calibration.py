"""Routers made from text, against the forward pass that they cannot do without, on SmolLM2-135M."""

from __future__ import annotations

import atexit
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoint import NUM_EXPERTS, smollm2
from benchmarks.measure import Row
from benchmarks.process import measured
from benchmarks.reference import Reference
from moe_fast import MoeConfig, design_moe

TOKENS = 8192
OURS = """
import sys, torch, moe_fast
torch.set_num_threads(1)
moe_fast.design_moe(sys.argv[1], moe_fast.MoeConfig(8), routers="calibrated", tokens=sys.argv[2])
"""
THEIRS = """
import sys, numpy, torch, transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.inference_mode():
    for batch in torch.from_numpy(numpy.load(sys.argv[2])).split(8):
        model(batch, use_cache=False, logits_to_keep=1)
"""


def rows(reference: Reference | None) -> Iterator[Row]:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return
    temporary = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    dense = smollm2(folder)
    tokens = np.random.default_rng(0).integers(0, 49_000, (TOKENS // 256, 256))
    np.save(folder / "tokens.npy", tokens)

    def seconds(
        work: Callable[[Any], Any], make: Callable[[], Any] = lambda: None
    ) -> Callable[[], float]:
        def run() -> float:
            torch.set_num_threads(1)
            made = make()
            begin = time.perf_counter()
            work(made)
            return time.perf_counter() - begin

        return run

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)

    def forward(model: Any) -> None:
        with torch.inference_mode():
            for batch in torch.from_numpy(tokens).split(8):
                model(batch, use_cache=False, logits_to_keep=1)

    def calibrate(_: Any) -> None:
        config = MoeConfig(NUM_EXPERTS)
        design_moe(dense, config, routers="calibrated", tokens=tokens)

    work = f"`calibrated` routers on {TOKENS:,} tokens, SmolLM2-135M × {NUM_EXPERTS}"
    peer = "transformers' forward pass in float32"
    yield Row(work, seconds(calibrate), peer, seconds(forward, model), 1 / 1.2, "seconds", 3)

    def peak(program: str) -> Callable[[], float]:
        command = [sys.executable, "-c", program, str(dense), str(folder / "tokens.npy")]
        return lambda: measured(command)["peak"]

    yield Row(f"{work}, memory", peak(OURS), peer, peak(THEIRS), 3.0, "bytes", 2)
