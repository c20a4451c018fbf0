"""A checkpoint on its way to disk: what stands in its way, and the order in which it is written."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_fast.checkpoint.manifest import MANIFEST
from moe_fast.errors import ArgumentTypeError, Problem
from moe_fast.progress import Progress, ShowsProgress, as_progress
from moe_fast.records import dataclass
from moe_fast.single_file import existing_parent, find_obstacle_above
from moe_fast.storage.block_order import BLOCK
from moe_fast.storage.files import SourceFile
from moe_fast.storage.pieces import FileRange
from moe_fast.storage.staging import is_around, on_disk, staged, unfinished, why_not
from moe_fast.storage.tensors import Shard
from moe_fast.storage.writer import FileRecord, copy_file, key_of, write_shards, write_text
from moe_fast.threads import as_threads

if TYPE_CHECKING:
    from concurrent.futures import Executor

# Any one of these makes a folder a model, which may be overwritten.
MARKS = ("config.json", MANIFEST)
FOLDERS = 4 * BLOCK  # what the folders themselves take


@dataclass(frozen=True)
class Writing:
    """How a checkpoint is written; nothing here changes its weights.

    Parameters
    ----------
    overwrite : bool
        Whether an existing output may be replaced; it stays until the new one is complete.
    threads : int, optional
        Shards written at a time; by default `MOE_FAST_NUM_THREADS`, or 1.
    executor : concurrent.futures.Executor, optional
        Writes the shards in place of threads. Its workers need the sources and the output under
        the same names.
    checksum : bool
        Whether the manifest gets the SHA-256 of every file.
    fsync : bool
        Whether to wait until the output would last through a power cut.
    dry_run : bool
        Whether to write nothing, and only find what would be in the way.
    progress : bool or callable, optional
        `True` shows a bar; a function is called many times with the bytes written so far and the
        bytes to write in all, from one thread at a time.
    """

    overwrite: bool = False
    threads: int | None = None
    executor: Executor | None = None
    checksum: bool = False
    fsync: bool = False
    dry_run: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", as_threads(self.threads))
        as_progress(self.progress, "")
        if self.executor is not None:
            from concurrent.futures import Executor  # loads logging, for a rare argument

            if not isinstance(self.executor, Executor):
                raise ArgumentTypeError(
                    f"must be a concurrent.futures.Executor, got {self.executor!r}",
                    argument="executor",
                )


def find_obstacles(
    output: Path,
    sources: Collection[SourceFile],
    writing: Writing,
    also_read: Collection[Path] = (),
) -> Iterator[str]:
    """Why a checkpoint from `sources` cannot be written to `output`.

    `also_read` are files that are not part of a model: a recipe, hidden states.
    """
    output = Path(os.path.realpath(output))
    models = sorted({Path(file.path).parent for file in sources})
    files = [*sorted(Path(file.path) for file in sources), *also_read]
    inside = [path for path in (*models, *files) if is_around(output, path)]
    around = [model for model in models if is_around(model, output)]
    if inside:
        yield Problem(
            f"would replace {inside[0]}, which it is made from; choose another output", file=output
        )
    elif around:
        yield Problem(
            f"lies in {around[0]}, which it is made from; choose another output", file=output
        )
    elif (problem := why_not(output, overwrite=writing.overwrite, marks=MARKS)) is not None:
        yield Problem(problem, file=output)
    if (problem := find_obstacle_above(output)) is not None:
        yield Problem(problem, file=output)


def find_lack_of_space(output: Path, sizes: Iterable[int]) -> Iterator[str]:
    """Whether the disk is too full for files of these sizes.

    What an unfinished build to `output` already takes counts as free.
    """
    output = Path(os.path.realpath(output))
    nbytes = sum(map(on_disk, sizes)) + FOLDERS
    free = shutil.disk_usage(existing_parent(output)).free + unfinished(output)
    if nbytes > free:
        yield Problem(
            f"needs {nbytes:,} bytes of disk, {free:,} are free; choose another disk or make room",
            file=output,
        )


def planned_records(
    shards: Sequence[Shard], texts: Mapping[str, str], companions: Mapping[str, Path]
) -> dict[str, FileRecord]:
    """What the records of an output's files will be at most: their sizes, and digests as long."""
    digest = "0" * 64
    records = {}
    for shard in shards:
        overflow = {
            name: weight.num_parameters
            for name, weight in shard.tensors
            if weight.dtype == "F16" and not all(isinstance(p, FileRange) for p in weight.pieces)
        }
        records[shard.file_name] = FileRecord(shard.nbytes, digest, digest, overflow or None)
    # An index may have megabytes, and mostly needs no copy to be measured.
    sizes = {n: len(text) if text.isascii() else len(text.encode()) for n, text in texts.items()}
    sizes |= {name: file.stat().st_size for name, file in companions.items()}
    return records | {name: FileRecord(size, sha256=digest) for name, size in sizes.items()}


def write_output(
    output: Path,
    shards: Sequence[Shard],
    texts: Mapping[str, str],
    companions: Mapping[str, Path],
    manifest: Callable[[dict[str, FileRecord]], str],
    writing: Writing,
) -> dict[str, FileRecord]:
    """Write all files of an output, the manifest last; `output` appears when it is complete.

    `manifest` gets the records of the other files, which are returned, and gives its text.
    """
    key = key_of(shards, writing.fsync)
    written = WrittenBytes(
        sum(shard.nbytes for shard in shards), as_progress(writing.progress, "writing")
    )
    with staged(
        output, key, overwrite=writing.overwrite, marks=MARKS, fsync=writing.fsync
    ) as folder:
        records = write_shards(
            shards,
            folder,
            threads=as_threads(writing.threads),
            executor=writing.executor,
            checksum=writing.checksum,
            fsync=writing.fsync,
            advance=written.add,
        )
        for name, text in texts.items():
            records[name] = write_text(
                text, folder / name, checksum=writing.checksum, fsync=writing.fsync
            )
        for name, source in companions.items():
            records[name] = copy_file(
                source, folder / name, checksum=writing.checksum, fsync=writing.fsync
            )
        write_text(manifest(records), folder / MANIFEST, fsync=writing.fsync)
    return records


def warn_of_overflow(records: Mapping[str, FileRecord]) -> list[str]:
    """One for each file with weights that its dtype does not hold."""
    return [
        f"{name}: {sum(counts.values())} weights of {len(counts)} tensors are beyond the dtype and "
        f"became infinite, the first of them in {next(iter(counts))!r}; bfloat16 and float32 reach "
        "further than float16"
        for name, record in records.items()
        if (counts := record.overflow)
    ]


class WrittenBytes:
    """Adds up what the shards report, from any thread, and passes it on."""

    def __init__(self, total: int, progress: ShowsProgress | None) -> None:
        self.count = 0
        self.total = total
        self.progress = progress
        self.lock = threading.Lock()

    def add(self, count: int) -> None:
        with self.lock:
            self.count += count
            if self.progress is not None:
                self.progress(self.count, self.total)
