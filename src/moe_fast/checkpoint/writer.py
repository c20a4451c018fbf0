"""Pieces become files: bytes of the sources move in the kernel, the rest is made on the way.

The output folder appears whole or not at all: everything is written into a folder beside it, which
is renamed at the end.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moe_fast.checkpoint.header import SourceFile
from moe_fast.checkpoint.pieces import FileRange
from moe_fast.checkpoint.table import Shard
from moe_fast.errors import CheckpointError

Advance = Callable[[int], None]
CHUNK = 8 * 1024 * 1024


@contextmanager
def appearing(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes `output` on success and vanishes on any error."""
    if output.exists() and not overwrite:
        raise CheckpointError(
            f"{output}: exists already; choose another output, or allow overwriting it"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(
        tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent)
    )
    try:
        yield partial
        partial.chmod(0o777 & ~current_umask())
        if overwrite and output.exists():
            shutil.rmtree(output)
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_shard(shard: Shard, folder: Path, advance: Advance) -> None:
    """Write one file of the output, telling `advance` the bytes written as they are."""
    with (folder / shard.file_name).open("xb", buffering=0) as out, OpenSources() as sources:
        write_all(out, shard.header, advance)
        for tensor in shard.tensors:
            for piece in tensor.weight.pieces:
                if isinstance(piece, FileRange):
                    copy_range(sources[piece.file], out, piece, advance)
                else:
                    for chunk in piece.chunks():
                        write_all(out, chunk, advance)
        sources.check_unchanged()
        if out.tell() != shard.nbytes:
            raise CheckpointError(
                f"{shard.file_name}: {out.tell()} bytes written where {shard.nbytes} were planned"
            )


class OpenSources:
    """The source files of one shard, each opened once, and the same at the end as planned."""

    def __init__(self) -> None:
        self.streams: dict[SourceFile, BinaryIO] = {}

    def __enter__(self) -> OpenSources:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()

    def __getitem__(self, file: SourceFile) -> BinaryIO:
        if file not in self.streams:
            self.streams[file] = open(file.path, "rb", buffering=0)  # noqa: PTH123, SIM115
            self.check_unchanged()
        return self.streams[file]

    def check_unchanged(self) -> None:
        for file, stream in self.streams.items():
            status = os.fstat(stream.fileno())
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(f"{file.path}: changed while it was being read")


def copy_range(source: BinaryIO, out: BinaryIO, piece: FileRange, advance: Advance) -> None:
    """Copy a byte range to the end of `out`; on Linux the bytes never leave the kernel."""
    position, end = piece.offset, piece.offset + piece.nbytes
    while position < end:
        if sys.platform == "linux":
            count = os.sendfile(
                out.fileno(), source.fileno(), position, min(end - position, 16 * CHUNK)
            )
        else:
            source.seek(position)
            chunk = source.read(min(end - position, CHUNK))
            write_all(out, chunk, lambda _: None)
            count = len(chunk)
        if count == 0:
            raise CheckpointError(f"{piece.file.path}: ended at byte {position} while being read")
        position += count
        advance(count)


def write_all(out: BinaryIO, data: bytes | memoryview, advance: Advance) -> None:
    view = memoryview(data)
    while view:
        count = out.write(view)
        advance(count)
        view = view[count:]
