"""Experts that are made on the way: split, drawn anew, with adapters folded in; warm caches.

The dense model is SmolLM2-135M, which MOE_FAST_MODELS names a folder of, as `smollm2`; without it,
a random model of its shape stands in.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from tests.adapters import make_adapter

from benchmarks.checkpoint import BUILD, MOST_MEMORY, smollm2
from benchmarks.measure import Row
from benchmarks.process import measured
from benchmarks.reference import Reference
from moe_fast import MoeConfig, build_moe

COPIES = 4
RANK = 16
BUFFER = 1024 * 1024


def rows(reference: Reference | None) -> Iterator[Row]:
    if not hasattr(os, "wait4"):
        return
    temporary = tempfile.TemporaryDirectory(prefix="moe_fast_benchmark")
    atexit.register(temporary.cleanup)
    folder = Path(temporary.name)
    output = folder / "output"
    model = cache(lambda: str(smollm2(folder)))

    def build(options: Callable[[], list[str]], figure: str = "seconds") -> Callable[[], float]:
        def work() -> float:
            shutil.rmtree(output, ignore_errors=True)
            return measured([*BUILD, *options(), "-o", str(output)])[figure]

        return work

    def copied(options: Callable[[], list[str]], target: Path = folder / "copy") -> float:
        """The seconds that `cp` takes for what is built."""
        build(options)()
        shutil.rmtree(target, ignore_errors=True)
        seconds = measured(["cp", "-r", str(output), str(target)])["seconds"]
        shutil.rmtree(target)
        return seconds + 0.5

    def read_and_write() -> None:
        """As many bytes as an output of `COPIES` experts has."""
        if not (folder / "plain").exists():
            build_moe(model(), folder / "plain", MoeConfig(COPIES))
        buffer = memoryview(bytearray(BUFFER))
        (folder / "bytes").unlink(missing_ok=True)
        with (
            (folder / "plain" / "model.safetensors").open("rb", buffering=0) as source,
            (folder / "bytes").open("wb", buffering=0) as out,
        ):
            while count := source.readinto(buffer):
                out.write(buffer[:count])

    def fine() -> list[str]:
        return [model(), "--experts", "32", "--granularity", "4"]

    work = "`moe-fast build --granularity 4`, SmolLM2-135M × 8"
    peer = "`cp -r` of the output, and 0.5 s"
    yield Row(work, build(fine), peer, lambda: copied(fine), 1 / 1.5, "seconds", 7)
    yield Row(f"{work}, memory", build(fine, "peak"), "", None, 1 / MOST_MEMORY, "bytes", 3)

    @cache
    def adapter() -> str:
        adapter = make_adapter(folder / "adapter", Path(model()), rank=RANK)
        return f"{model()}+{adapter}"

    def drawn() -> None:
        shutil.rmtree(output, ignore_errors=True)
        build_moe(model(), output, MoeConfig(COPIES), reinit=0.5)

    def folded() -> None:
        shutil.rmtree(output, ignore_errors=True)
        build_moe([adapter()], output, MoeConfig(COPIES), base=model())

    def drawn_command() -> list[str]:
        return [model(), "--experts", str(COPIES), "--reinit", "0.5"]

    def folded_command() -> list[str]:
        return [adapter(), "--experts", str(COPIES), "--base", model()]

    peer = "reading and writing the bytes"
    for work, call, command in (
        (f"`build_moe`, `reinit=0.5`, SmolLM2-135M × {COPIES}", drawn, drawn_command),
        (f"`build_moe` of a LoRA adapter of rank {RANK}, SmolLM2-135M × {COPIES}", folded,
         folded_command),
    ):  # fmt: skip
        yield Row(work, call, peer, read_and_write, 1 / 2, samples=9)
        yield Row(f"{work}, memory", build(command, "peak"), "", None, 1 / MOST_MEMORY, "bytes", 3)
