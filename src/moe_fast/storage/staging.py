"""The folder in which an output grows until it is whole, and how it takes its place.

Beside `OUT` stands `.OUT.partial` while a build runs, and after one that was cut off:

    lock     held by the build that runs; the system drops it when the process ends, however it does
    KEY/     the output so far; KEY is a digest of everything that decides the output's bytes
    old/     the output that is being replaced, between the two renames that replace it

A build with the same KEY goes on where the last one stopped; another one starts afresh.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moe_fast.errors import CheckpointError
from moe_fast.storage.tensors import BLOCK
from moe_fast.storage.writer import sync_folder

# How many workers may each be making a file in a folder at the moment it is removed.
WORKERS_NOT_TOLD = 256
# What a file system without locks answers. Builds there do not refuse each other; they still never
# mix, for each writes what only its own KEY names and one rename comes last.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# A process's own locks do not stop it, so it remembers them; not those of the one it forked from.
held_here: set[tuple[int, Path]] = set()
held_here_lock = threading.Lock()


@contextmanager
def staged(
    output: Path,
    key: str,
    *,
    overwrite: bool = False,
    marks: Collection[str] = (),
    fsync: bool = False,
) -> Iterator[Path]:
    """A folder to fill, which becomes `output` on success.

    With `overwrite`, a folder that holds a file of one of the names `marks` is replaced.
    On an error of the input (`CheckpointError`) everything in it is removed; on any other it stays
    where it holds files, for the same build to go on from.
    """
    output = Path(os.path.realpath(output))
    work = work_folder(output)
    old, growing = work / "old", work / key
    with locked(work / "lock", output):
        if old.exists() and is_vacant(output):
            # A replacement was cut off between its two renames, and a folder made there since.
            make_room(output)
            old.rename(output)
        problem = why_not(output, overwrite=overwrite, marks=marks)
        if problem is not None:
            raise CheckpointError(problem, file=output)
        remove_all_but(key, work)
        try:
            growing.mkdir(exist_ok=True)
            yield growing
            if fsync:
                for folder in (*filter(Path.is_dir, growing.rglob("*")), growing):
                    sync_folder(folder)
            take_place(growing, output, old, overwrite=overwrite)
            if fsync:
                sync_folder(output.parent)
        except CheckpointError:
            remove_all_but(None, work)
            raise
        except BaseException as error:
            if growing.exists() and any(growing.iterdir()):
                error.add_note(
                    f"what is finished is kept in {growing}; do the same again to resume"
                )
            else:
                remove_all_but(None, work)
            raise
        remove_all_but(None, work)


def take_place(growing: Path, output: Path, old: Path, *, overwrite: bool) -> None:
    """Rename `growing` to `output`, and what stands there to `old`.

    Unless it is to be overwritten, only an empty folder may stand there; it gives its permissions.
    """
    try:
        if output.exists():
            shutil.copymode(output, growing)
        if not overwrite:
            make_room(output)
        elif output.exists():
            output.rename(old)
        growing.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise


def is_around(folder: Path, path: str | os.PathLike[str]) -> bool:
    """Whether `path` is `folder` or lies in it, all links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_vacant(output: Path) -> bool:
    """Whether there is nothing of that name, or a folder with nothing in it."""
    return not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir()))


def make_room(output: Path) -> None:
    """Remove an empty folder; one that holds something by now is an error and stays."""
    with suppress(FileNotFoundError):
        output.rmdir()


def work_folder(output: Path) -> Path:
    return output.parent / f".{output.name}.partial"


def unfinished(output: Path) -> int:
    """Bytes of disk that an unfinished build takes, for the next one to use or to remove."""
    work = work_folder(output)
    files = (path for path in work.glob("*/**/*") if path.relative_to(work).parts[0] != "old")
    return sum(on_disk(file.stat().st_size) for file in files if file.is_file())


def on_disk(size: int) -> int:
    """The bytes that a file of `size` bytes takes: whole blocks."""
    return size + -size % BLOCK


def why_not(output: Path, *, overwrite: bool, marks: Collection[str]) -> str | None:
    """Why `output` may not be written, or `None` if it may.

    Only a folder with a file of one of the names `marks` is a model, and may be overwritten.
    """
    if not os.path.lexists(output):
        return None
    if not output.is_dir():
        return "exists already and is not a folder; choose another output"
    if os.path.ismount(output):
        return "is a mount point, and cannot be replaced; choose a new folder in it"
    if is_around(output, os.curdir):
        # The rename would leave whoever works there in a folder that is gone.
        return "is where this runs, and is not replaced; choose a new folder in it"
    if not os.access(output, os.R_OK | os.W_OK | os.X_OK):
        return "exists already and may not be changed; choose another output"
    if is_vacant(output):
        return None
    names = {entry.name for entry in output.iterdir()}
    if names.isdisjoint(marks):
        return (
            "exists already, holds no model, and is not overwritten; "
            "choose another output, or empty it yourself if you mean it"
        )
    if not overwrite:
        return (
            "exists already; choose another output, or replace it: --overwrite, "
            "in Python overwrite=True"
        )
    return None


def remove_all_but(key: str | None, work: Path) -> None:
    """Remove what builds leave in `work`, apart from the lock and the folder named `key`."""
    for entry in list(work.iterdir()):
        if entry.name == "old" or (len(entry.name) == 64 and entry.name != key):
            # Under another name first: a worker elsewhere that was not told yet finds no folder to
            # make more files in. One that it was just making may still appear after the listing and
            # keep the folder, so look again, as often as there may be such workers.
            with suppress(OSError):
                entry = entry.rename(work / secrets.token_hex(32))
            for _ in range(WORKERS_NOT_TOLD):
                shutil.rmtree(entry, ignore_errors=True)
                if not entry.exists():
                    break


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Hold the lock file at `path`, or say that another build writes `output`."""
    ours = (os.getpid(), path)
    with held_here_lock:
        if ours in held_here:
            raise busy(output)
        held_here.add(ours)
    try:
        lock = take(path, output)
        try:
            yield
        finally:
            drop(lock, path)
    finally:
        held_here.discard(ours)


def take(path: Path, output: Path) -> int:
    """The file at `path`, open and locked."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another build has just ended and removed the folder
            continue
        try:
            lock_file(lock)
            with suppress(FileNotFoundError):
                if sys.platform == "win32" or os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
        except OSError as error:
            os.close(lock)
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise busy(output) from None
            raise
        os.close(lock)  # that file was removed between opening and locking it


def drop(lock: int, path: Path) -> None:
    """Remove the lock file and, where nothing else is left, its folder."""
    if sys.platform == "win32":  # an open file cannot be removed there
        os.close(lock)
    with suppress(OSError):
        if not any(entry != path for entry in path.parent.iterdir()):
            path.unlink()
            path.parent.rmdir()
    if sys.platform != "win32":
        os.close(lock)


def busy(output: Path) -> CheckpointError:
    return CheckpointError("another build is writing it", file=output)


lock_file: Callable[[int], None]


if sys.platform == "win32":
    import msvcrt

    def lock_file(file: int) -> None:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def lock_file(file: int) -> None:
        # Not flock: a child that outlives this process would go on holding that.
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
