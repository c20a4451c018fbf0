"""Files that are written whole or not at all, and what stands in the way of one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moe_fast.errors import CheckpointError

CHUNK = 1024 * 1024
NO_RESERVE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def check_place(file: Path, *, overwrite: bool) -> None:
    """Raise `CheckpointError` if `file` cannot be written, before the work that it is for."""
    problem = find_obstacle(Path(os.path.realpath(file)), overwrite=overwrite)
    if problem is not None:
        raise CheckpointError(problem, file=file)


def find_obstacle(file: Path, *, overwrite: bool) -> str | None:
    if file.is_dir():
        return "is a folder, and a file is to be written; name a file"
    if os.path.lexists(file):
        if not file.is_file():
            return "exists already and is not a regular file; choose another file"
        if not overwrite:
            return (
                "exists already; choose another file, or replace it: --overwrite, "
                "in Python overwrite=True"
            )
    return find_obstacle_above(file)


def find_obstacle_above(path: Path) -> str | None:
    """Why nothing can be made at `path`, whose parents need not be there."""
    parent = existing_parent(path)
    if not parent.is_dir():
        return f"{parent} is not a folder"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"the folder {parent} is not writable"
    return None


def existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if os.path.lexists(parent))


@contextmanager
def whole_file(file: Path) -> Iterator[IO[bytes]]:
    """A stream of bytes that becomes `file` when all are written; its folder is made if need be.

    On any error, what stood at `file` stays, and nothing else. An error of the system names `file`.
    """
    place = Path(os.path.realpath(file))
    there = existing_parent(place)
    growing = place.with_name(f".{place.name}.{os.urandom(8).hex()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with growing.open("xb") as stream:
            yield stream
        growing.replace(place)
    except BaseException as error:
        with suppress(OSError):
            growing.unlink(missing_ok=True)
            for folder in place.parents[: place.parents.index(there)]:
                folder.rmdir()
        if isinstance(error, OSError) and error.filename in (None, os.fspath(growing)):
            error.filename, error.filename2 = os.fspath(file), None
        raise


def map_new_file(
    path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> np.memmap[Any, np.dtype[Any]]:
    """A new array in a file, mapped into memory; all its bytes have their place on the disk.

    Where a page of a mapped file finds the disk full, the system ends the process.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        with path.open("wb", buffering=0) as stream:
            reserve(stream, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        error.filename = os.fspath(path)
        raise
    return np.memmap(path, dtype, "r+", shape=shape)


def reserve(stream: FileIO, size: int) -> None:
    """Take `size` bytes of the disk for an empty file."""
    if sys.platform == "linux":
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno not in NO_RESERVE:
                raise
        else:
            return
    zeros = memoryview(bytes(min(size, CHUNK)))
    while size:
        size -= stream.write(zeros[:size])
