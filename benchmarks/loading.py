"""A model in the training script: from a design, and by a build on disk, on SmolLM2-135M × 8."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import NUM_EXPERTS, smollm2
from benchmarks.measure import Row
from benchmarks.reference import Reference
from moe_fast import MoeConfig, build_moe, design_moe


def rows(reference: Reference | None) -> Iterator[Row]:
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        return
    from moe_fast.torch import load_into

    temporary = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    dense = smollm2(folder)
    config = MoeConfig(NUM_EXPERTS)

    def from_design() -> Any:
        design = design_moe(dense, config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**design.config))
        load_into(model, design)
        return model

    def by_a_build() -> Any:
        build_moe(dense, folder / "moe", config)
        return AutoModelForCausalLM.from_pretrained(folder / "moe")

    def seconds(work: Callable[[], Any]) -> Callable[[], float]:
        """How long it takes, each time in a clean folder."""

        def run() -> float:
            shutil.rmtree(folder / "moe", ignore_errors=True)
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin

        return run

    yield Row(
        f"`load_into`, SmolLM2-135M × {NUM_EXPERTS}, bfloat16",
        seconds(from_design),
        "`build_moe` and `from_pretrained`",
        seconds(by_a_build),
        2.0,
        "seconds",
        7,
    )
