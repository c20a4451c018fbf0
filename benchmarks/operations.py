"""Operations on finished MoEs, most of them as whole processes, with warm caches.

The MoE is SmolLM2-135M with 8 experts. MOE_FAST_MODELS names a folder that holds the dense model as
`smollm2`; without it, a random model of its shape stands in. MOE_FAST_REFLINK names an empty folder
on a file system that shares blocks, such as XFS; without it, those rows are left out.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tests.sparse import WITH_ROOM
from tests.sparse_moe import make_sparse_moe

from benchmarks.checkpoint import MOST_MEMORY, NUM_EXPERTS, smollm2
from benchmarks.measure import Row
from benchmarks.process import measured
from benchmarks.reference import Reference
from moe_fast import MoeConfig, build_moe, compare_moe, convert_moe
from moe_fast.demo import make_dense_model

COMMAND = [sys.executable, "-m", "moe_fast"]
WITH_ROOM_COMMAND = [
    sys.executable, "-c", f"{WITH_ROOM}from moe_fast.__main__ import main; main()",
]  # fmt: skip
HALF = "[0, 2, 5, 7]"
NUM_SEQUENCES, LENGTH = 32, 500
BUFFER = 1024 * 1024
# The peer's own code path: all of the model in memory, its tensors sliced, all of it saved.
SLICE = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
keep = [0, 2, 5, 7]
for layer in model.model.layers:
    moe = layer.mlp
    for module, name in (
        (moe.gate, "weight"), (moe.experts, "gate_up_proj"), (moe.experts, "down_proj")
    ):
        parameter = getattr(module, name)
        parameter.data = parameter.data[keep].clone()
    moe.gate.num_experts = moe.experts.num_experts = len(keep)
model.config.num_local_experts = len(keep)
model.save_pretrained(sys.argv[2])
"""
FORWARD = """
import sys
import numpy as np
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.inference_mode():
    for tokens in torch.from_numpy(np.load(sys.argv[2])).split(4):
        model(tokens, use_cache=False, logits_to_keep=1)
"""


def rows(reference: Reference | None) -> Iterator[Row]:
    if not hasattr(os, "wait4"):
        return
    temporary = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    yield from rows_of_a_gigabyte(folder)
    yield from rows_of_a_terabyte(folder)
    yield from rows_of_shared_blocks()
    yield from rows_of_comparing(folder)
    if find_spec("transformers") is not None:
        yield from rows_of_transformers(folder)


@cache
def upcycled(folder: Path) -> Path:
    """SmolLM2 with 8 experts."""
    moe = folder / "upcycled"
    build_moe(smollm2(folder), moe, MoeConfig(NUM_EXPERTS))
    return moe


def commands(model: Path, folder: Path) -> dict[str, list[str]]:
    """Pruning to half, expanding to twice as many, and storing in the other layout."""
    keep = folder / "keep.json"
    keep.write_text(HALF)
    return {
        "prune": ["prune", str(model), "--keep", str(keep)],
        "expand": ["expand", str(model), "--experts", str(2 * NUM_EXPERTS)],
        "convert": ["convert", str(model), "--layout", "fused"],
    }


def run(
    folder: Path, command: Callable[[], list[str]], figure: str = "seconds"
) -> Callable[[], float]:
    """A command that writes `folder/output`, which is removed before."""

    def work() -> float:
        shutil.rmtree(folder / "output", ignore_errors=True)
        return measured([*COMMAND, *command(), "-o", str(folder / "output")])[figure]

    return work


def rows_of_a_gigabyte(folder: Path) -> Iterator[Row]:
    for name in ("prune", "expand", "convert"):

        def command(name: str = name) -> list[str]:
            return commands(upcycled(folder), folder)[name]

        def copy(command: Callable[[], list[str]] = command) -> float:
            run(folder, command)()
            shutil.rmtree(folder / "copy", ignore_errors=True)
            copying = ["cp", "-r", str(folder / "output"), str(folder / "copy")]
            seconds = measured(copying)["seconds"]
            shutil.rmtree(folder / "copy")
            return seconds + 0.5

        work = f"`moe-fast {name}`, SmolLM2-135M × {NUM_EXPERTS}"
        peer = "`cp -r` of the output, and 0.5 s"
        yield Row(work, run(folder, command), peer, copy, 1 / 1.5, "seconds", 7)
        peak = run(folder, command, "peak")
        yield Row(f"{work}, memory", peak, "", None, 1 / MOST_MEMORY, "bytes", 3)


def rows_of_a_terabyte(folder: Path) -> Iterator[Row]:
    @cache
    def sparse(fp8: bool) -> Path:
        model = folder / f"sparse-{fp8}"
        make_sparse_moe(model, fp8=fp8)
        return model

    def dry(name: str, fp8: bool, figure: str) -> Callable[[], float]:
        def work() -> float:
            keep = folder / "keep-128.json"
            keep.write_text(json.dumps([e for e in range(256) if e % 2 == 0]))
            options = {
                "prune": ["--keep", str(keep)],
                "expand": ["--experts", "512"],
                "convert": ["--dtype", "bfloat16"] if fp8 else ["--layout", "fused"],
            }
            command = [*WITH_ROOM_COMMAND, name, str(sparse(fp8)), *options[name]]
            return measured([*command, "-o", str(folder / "nothing"), "--dry-run"])[figure]

        return work

    for fp8 in (False, True):
        for name in ("prune", "expand", "convert"):
            kind = "FP8 with block scales" if fp8 else "bfloat16"
            work = f"`moe-fast {name} --dry-run`, 61 layers × 256 experts, {kind}"
            yield Row(work, dry(name, fp8, "seconds"), "", None, 1 / 5, "seconds", 5)
            peak = dry(name, fp8, "peak")
            yield Row(f"{work}, memory", peak, "", None, 1 / MOST_MEMORY, "bytes", 3)


def rows_of_shared_blocks() -> Iterator[Row]:
    """Where the source's blocks can be shared, on a file system that does that."""
    shared = os.environ.get("MOE_FAST_REFLINK")
    if not shared:
        return
    folder = Path(shared)

    @cache
    def aligned() -> Path:
        """A model whose matrices are whole numbers of blocks, 1.7 GB with its experts."""
        make_dense_model(
            folder / "dense", seed=0, hidden_size=1024, intermediate_size=4096,
            num_hidden_layers=8,
        )  # fmt: skip
        build_moe(folder / "dense", folder / "aligned", MoeConfig(NUM_EXPERTS), dtype="bfloat16")
        atexit.register(remove, folder)
        return folder / "aligned"

    def remove(folder: Path) -> None:
        for name in ("dense", "aligned", "output"):
            shutil.rmtree(folder / name, ignore_errors=True)

    for name in ("prune", "expand", "convert"):

        def command(name: str = name) -> list[str]:
            return commands(aligned(), folder)[name]

        def beside_start(name: str = name, command: Callable[[], list[str]] = command) -> float:
            taken = run(folder, command)()
            return taken - measured([*COMMAND, name, "--help"])["seconds"]

        def new_space(command: Callable[[], list[str]] = command) -> float:
            shutil.rmtree(folder / "output", ignore_errors=True)
            before = used(folder)
            run(folder, command)()
            return max(used(folder) - before, 1.0)

        def size(command: Callable[[], list[str]] = command) -> float:
            return float(sum(f.stat().st_size for f in (folder / "output").iterdir()))

        work = f"`moe-fast {name}`, 1.6 GB, sharing blocks on XFS"
        yield Row(f"{work}, besides start-up", beside_start, "", None, 1 / 0.3, "seconds", 7)
        peer = "the output's size"
        yield Row(f"{work}, new space", new_space, peer, size, 100.0, "bytes", 3)


def used(folder: Path) -> float:
    os.sync()
    status = os.statvfs(folder)
    return float((status.f_blocks - status.f_bfree) * status.f_frsize)


def rows_of_comparing(folder: Path) -> Iterator[Row]:
    @cache
    def fused() -> Path:
        convert_moe(upcycled(folder), folder / "fused", layout="fused")
        return folder / "fused"

    def read_both() -> None:
        buffer = memoryview(bytearray(BUFFER))
        for model in (upcycled(folder), fused()):
            for file in model.glob("*.safetensors"):
                with file.open("rb", buffering=0) as stream:
                    while stream.readinto(buffer):
                        pass

    yield Row(
        f"`compare_moe`, SmolLM2-135M × {NUM_EXPERTS} in both layouts",
        lambda: compare_moe(upcycled(folder), fused()),
        "reading both",
        read_both,
        1 / 1.3,
    )


def rows_of_transformers(folder: Path) -> Iterator[Row]:
    def prune() -> list[str]:
        return commands(upcycled(folder), folder)["prune"]

    def sliced(figure: str) -> Callable[[], float]:
        def work() -> float:
            shutil.rmtree(folder / "sliced", ignore_errors=True)
            command = [sys.executable, "-c", SLICE, str(upcycled(folder)), str(folder / "sliced")]
            return measured(command)[figure]

        return work

    peer = "transformers: load, slice, `save_pretrained`"
    work = f"`moe-fast prune`, half of SmolLM2-135M × {NUM_EXPERTS}"
    yield Row(work, run(folder, prune), peer, sliced("seconds"), 5.0, "seconds", 5)
    peak = run(folder, prune, "peak")
    yield Row(f"{work}, memory", peak, peer, sliced("peak"), 10.0, "bytes", 3)

    @cache
    def tokens() -> Path:
        drawn = np.random.default_rng(0).integers(1, 49_152, (NUM_SEQUENCES, LENGTH))
        np.save(folder / "tokens.npy", drawn)
        return folder / "tokens.npy"

    def score(figure: str) -> Callable[[], float]:
        def work() -> float:
            shutil.rmtree(folder / ".scores.json.partial", ignore_errors=True)
            command = ["score", str(upcycled(folder)), "--tokens", str(tokens())]
            command += ["-o", str(folder / "scores.json"), "--overwrite"]
            return measured([*COMMAND, *command])[figure]

        return work

    def forward(figure: str) -> Callable[[], float]:
        def work() -> float:
            command = [sys.executable, "-c", FORWARD, str(upcycled(folder)), str(tokens())]
            return measured(command)[figure]

        return work

    work = f"`moe-fast score`, SmolLM2-135M × {NUM_EXPERTS}, {NUM_SEQUENCES * LENGTH:,} tokens"
    peer = "transformers' forward in float32"
    yield Row(work, score("seconds"), peer, forward("seconds"), 1 / 1.2, "seconds", 2)
    yield Row(f"{work}, memory", score("peak"), peer, forward("peak"), 3.0, "bytes", 2)
