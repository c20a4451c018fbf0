"""Whole commands on file systems that share blocks, XFS and btrfs, each in a file of its own.

Mounting them takes root, `mkfs.xfs` and `mkfs.btrfs`; without, there are no rows.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.sparse import make_sparse_model

from benchmarks.checkpoint import smollm2
from benchmarks.measure import Row
from benchmarks.process import measured
from benchmarks.reference import Reference
from moe_fast import build_moe

MAKE = {"XFS": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
COMMAND = [sys.executable, "-m", "moe_fast"]
# Each on its model, and the options of it.
OPERATIONS = {
    "build": ("dense", ["--experts", "8"]),
    "prune": ("moe", ["--keep", "keep.json"]),
    "expand": ("moe", ["--experts", "16"]),
    "convert": ("moe", ["--layout", "fused"]),
}
KEEP = '{"layers": {%s}}'
# Shapes as in models: rows of 576 numbers, no whole blocks, and of 2048.
SMOLLM2, WHOLE_BLOCKS = "SmolLM2-135M", "1.3 GB of whole blocks"


def rows(reference: Reference | None) -> Iterator[Row]:
    for kind, make in MAKE.items():
        folder = mounted(make) if hasattr(os, "geteuid") and os.geteuid() == 0 else None
        if folder is None:
            continue
        for name in (SMOLLM2, WHOLE_BLOCKS):
            yield from rows_of_model(kind, name, folder / name.split()[0])


def rows_of_model(kind: str, name: str, folder: Path) -> Iterator[Row]:
    folder.mkdir()
    make_model(name, folder)
    build_moe(folder / "dense", folder / "moe")
    keep = ", ".join(f'"{layer}": [0, 2, 5, 7]' for layer in range(30))
    (folder / "keep.json").write_text(KEEP % keep)
    for operation, (model, options) in OPERATIONS.items():
        options = [str(folder / o) if o.endswith(".json") else o for o in options]
        command = [*COMMAND, operation, str(folder / model), *options]
        work = f"`moe-fast {operation}` on {kind}, {name}"
        goal = 1 / 0.5  # a tenth of a second, and the start of Python and NumPy
        yield Row(work, run(command, folder), "", None, goal, "seconds", 7)
        yield Row(f"{work}, new space", new_space(command, folder), "", None, None, "bytes", 3)
    shutil.rmtree(folder)


def make_model(name: str, folder: Path) -> None:
    if name == SMOLLM2:
        shutil.copytree(smollm2(folder), folder / "dense", dirs_exist_ok=True)
        return
    make_sparse_model(
        folder / "dense",
        num_hidden_layers=30,
        hidden_size=2048,
        intermediate_size=1024,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32768,
    )
    file = folder / "dense" / "model.safetensors"
    with file.open("r+b") as stream:  # a sparse file has no blocks to share
        size = file.stat().st_size
        start = 8 + int.from_bytes(stream.read(8), "little")
        stream.seek(start)
        for position in range(start, size, 1 << 20):
            stream.write(os.urandom(min(1 << 20, size - position)))


def run(command: list[str], folder: Path) -> Callable[[], float]:
    def call() -> float:
        shutil.rmtree(folder / "out", ignore_errors=True)
        return measured([*command, "-o", str(folder / "out")])["seconds"]

    return call


def new_space(command: list[str], folder: Path) -> Callable[[], float]:
    """Of outputs that stay: XFS frees what is removed later, and would count it in between."""
    names = itertools.count()

    def call() -> float:
        before = used(folder)
        measured([*command, "-o", str(folder / f"kept-{command[3]}-{next(names)}")])
        return max(1.0, used(folder) - before)

    return call


def used(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def mounted(make: list[str]) -> Path | None:
    """A folder with a new file system, which is unmounted at the end."""
    if shutil.which(make[0]) is None:
        return None
    folder = Path(tempfile.mkdtemp(prefix="moe_fast_benchmark"))
    image, place = folder / "image", folder / "mounted"
    place.mkdir()
    with image.open("wb") as stream:
        stream.truncate(12 * 10**9)
    subprocess.run([*make, str(image)], check=True, stdout=subprocess.DEVNULL)
    if subprocess.run(["mount", "-o", "loop", image, place], stderr=subprocess.DEVNULL).returncode:
        shutil.rmtree(folder)
        return None

    def unmount() -> None:
        subprocess.run(["umount", str(place)], check=True)
        shutil.rmtree(folder)

    atexit.register(unmount)
    return place
