"""The command `moe-fast build` as a whole process, on SmolLM2-135M with 8 experts, warm caches.

MOE_FAST_MODELS names a folder that holds the model as `smollm2`; without it, a model of its shape
with random weights stands in. MOE_FAST_MERGEKIT names a Python with mergekit 0.1.5 to compare with.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tests.sparse import WITH_ROOM, make_sparse_model

from benchmarks.measure import Row
from benchmarks.process import measured
from benchmarks.reference import Reference
from moe_fast.demo import byte_tokenizer

NUM_EXPERTS = 8
BUILD = [sys.executable, "-m", "moe_fast", "build"]
MOST_MEMORY = 200e6
BUILD_WITH_ROOM = f"{WITH_ROOM}from moe_fast.__main__ import main; main()"


def rows(reference: Reference | None) -> Iterator[Row]:
    if not hasattr(os, "wait4"):
        return
    temporary = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    model = smollm2(folder)
    work = f"`moe-fast build`, SmolLM2-135M × {NUM_EXPERTS}"

    def build(*options: str, figure: str = "seconds") -> Callable[[], float]:
        return written([*BUILD, str(model), "-o", str(folder / "moe"), *options], figure)

    def written(command: list[str], figure: str) -> Callable[[], float]:
        """A command that writes the output, which is removed before."""

        def run() -> float:
            shutil.rmtree(folder / "moe", ignore_errors=True)
            return measured(command)[figure]

        return run

    python = os.environ.get("MOE_FAST_MERGEKIT")
    if python:
        recipe = folder / "recipe.yml"
        experts = [{"source_model": str(model), "positive_prompts": [""]}] * NUM_EXPERTS
        recipe.write_text(
            json.dumps(
                {
                    "base_model": str(model),
                    "gate_mode": "random",
                    "dtype": "bfloat16",
                    "experts": experts,
                }
            )
        )
        theirs = [
            "env", "-u", "PYTHONPATH", python, "-m", "mergekit.scripts.moe",
            str(recipe), str(folder / "moe"), "--quiet",
            "--i-understand-this-is-not-useful-without-training",
        ]  # fmt: skip
        peer = "mergekit-moe 0.1.5"
        yield Row(work, build(), peer, written(theirs, "seconds"), 8.0, "seconds", 3)
        yield Row(
            f"{work}, memory",
            build(figure="peak"),
            peer,
            written(theirs, "peak"),
            10.0,
            "bytes",
            3,
        )

    def copy() -> float:
        build()()
        shutil.rmtree(folder / "copy", ignore_errors=True)
        taken = measured(["cp", "-r", str(folder / "moe"), str(folder / "copy")])["seconds"]
        shutil.rmtree(folder / "copy")
        return taken + 0.5

    yield Row(work, build(), "`cp -r` of the output, and 0.5 s", copy, 1 / 1.5, "seconds", 7)
    yield Row(f"{work}, memory", build(figure="peak"), "", None, 1 / MOST_MEMORY, "bytes", 3)
    for option in ("--checksum", "--fsync"):
        yield Row(f"{work}, `{option}`", build(option), "without", build(), None, "seconds", 5)

    prompts = folder / "prompts.yml"
    experts = [
        {"source_model": str(model), "positive_prompts": [f"What is {i} times {i}?", f"Topic {i}"]}
        for i in range(NUM_EXPERTS)
    ]
    asked = {"base_model": str(model), "gate_mode": "cheap_embed", "experts": experts}
    prompts.write_text(json.dumps(asked))
    recipe_build = [*BUILD, str(prompts), "-o", str(folder / "moe")]
    work = f"`moe-fast build RECIPE`, `cheap_embed`, SmolLM2-135M × {NUM_EXPERTS}"
    yield Row(work, written(recipe_build, "seconds"), "", None, 1 / 2.0, "seconds", 7)

    models = [folder / f"large-{i}" for i in range(8)]
    for large in models:
        make_sparse_model(large, num_files=30, num_hidden_layers=80)
    command = [sys.executable, "-c", BUILD_WITH_ROOM, "build", *map(str, models), "-o"]
    command += [str(folder / "moe"), "--dry-run"]
    work = "`--dry-run` of 8 models, 80 layers in 30 files each"
    yield Row(work, written(command, "seconds"), "", None, 1.0, "seconds", 7)
    yield Row(f"{work}, memory", written(command, "peak"), "", None, 1 / MOST_MEMORY, "bytes", 3)


def smollm2(folder: Path) -> Path:
    """The model, or one of its shape."""
    kept = Path(os.environ.get("MOE_FAST_MODELS", ""), "smollm2")
    if (kept / "model.safetensors").exists():
        return kept
    model = folder / "smollm2"
    nbytes = make_sparse_model(
        model,
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )
    weights = np.random.default_rng(0).normal(scale=0.05, size=nbytes // 2).astype(np.float32)
    file = model / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size - nbytes)
        stream.write(weights.view(np.uint16)[1::2].tobytes())
    (model / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return model
