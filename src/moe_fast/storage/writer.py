"""Pieces become files: the writer moves bytes and knows no model.

A shard is a task of its own: its pieces say everything, and it appears under its name when it is
complete. So shards can be written one after the other, by threads, or by the workers of any
executor on any machine that sees the same files; and what an earlier build finished is kept.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_fast.errors import CheckpointError
from moe_fast.records import dataclass
from moe_fast.storage.block_order import BLOCK
from moe_fast.storage.files import OpenFiles, open_regular
from moe_fast.storage.pieces import FileRange, Given, Overflow, Zeros, overflow_counted
from moe_fast.storage.tensors import Shard

if TYPE_CHECKING:
    from concurrent.futures import Executor


@dataclass(frozen=True)
class FileRecord:
    """One file of the output: its bytes, and SHA-256 digests in hexadecimal.

    `header_sha256` is that of a safetensors file up to its data; `sha256`, of the whole file, is
    there where the build was asked for checksums. `overflow` counts by tensor the finite weights
    that became infinite in the output's dtype; where none did, it is not there.
    """

    size: int
    header_sha256: str | None = None
    sha256: str | None = None
    overflow: dict[str, int] | None = None


Advance = Callable[[int], None]
# Measured with tensors of 2 MB and warm caches: through one buffer of 512 kB to 4 MB, bytes move as
# fast as `cp` moves them. sendfile and copy_file_range take 1.4 times as long, for they go page by
# page; but where pages of the source fall on pages of the output, copy_file_range takes 0.85 times
# as long, and file systems that can share the blocks do. posix_fallocate would save another fifth,
# and write every file twice where the file system does not know it.
BUFFER = 1024 * 1024
COPIED_AT_ONCE = 64 * BUFFER  # in the kernel; then Ctrl-C and the progress have their turn


def key_of(shards: Sequence[Shard], *choices: object) -> str:
    """A digest of everything that decides the bytes of `shards`: a build that resumes has it too.

    The same pieces may be pickled differently by another version of Python; then the build starts
    afresh.
    """
    digest = hashlib.sha256(pickle.dumps(choices))
    for shard in shards:
        pieces = [tensor.weight.pieces for tensor in shard.tensors]
        digest.update(pickle.dumps((shard.file_name, shard.header, pieces)))
    return digest.hexdigest()


def write_shards(
    shards: Sequence[Shard],
    folder: Path,
    *,
    threads: int = 1,
    executor: Executor | None = None,
    checksum: bool = False,
    fsync: bool = False,
    advance: Advance,
) -> dict[str, FileRecord]:
    """Write into `folder` what is not complete there, and remove what is none of it.

    Shards are written here one after the other, or by `threads` threads, or by `executor`, whose
    workers must see the same files under the same names. `advance` is told the bytes written as
    they are, by an executor's workers once a shard.
    """
    done: dict[str, FileRecord] = {}
    for shard in shards:
        if is_complete(shard, folder):
            digest = sha256_of(folder / shard.file_name) if checksum else None
            done[shard.file_name] = record(shard, digest, overflow_in(shard))
            advance(shard.nbytes)
    remove_all_but(done, folder)
    left = [shard for shard in shards if shard.file_name not in done]
    attempt = os.urandom(8).hex()
    write = partial(write_shard, folder=folder, checksum=checksum, fsync=fsync, attempt=attempt)
    if executor is not None:
        done |= write_on(executor, write, left, lambda shard: advance(shard.nbytes))
    elif min(threads, len(left)) > 1:
        done |= write_on_threads(threads, write, left, advance)
    else:
        for shard in left:
            done[shard.file_name] = write(shard, advance=advance)
    remove_all_but(done, folder)  # a worker that was killed cannot clean up, and may be replaced
    return {shard.file_name: done[shard.file_name] for shard in shards}


def remove_all_but(names: Collection[str], folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name in names:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def write_on_threads(
    threads: int, write: Callable[..., FileRecord], shards: Sequence[Shard], advance: Advance
) -> dict[str, FileRecord]:
    """Write `shards` by threads of this process; where one fails, the others stop."""
    stopped = threading.Event()

    def advance_unless_stopped(count: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another thread failed")
        advance(count)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads, thread_name_prefix="moe_fast_writer") as pool:
        write = partial(write, advance=advance_unless_stopped)
        return write_on(pool, write, shards, stop=stopped.set)


def write_on(
    executor: Executor,
    write: Callable[[Shard], FileRecord],
    shards: Sequence[Shard],
    finished: Callable[[Shard], None] = lambda shard: None,
    stop: Callable[[], None] = lambda: None,
) -> dict[str, FileRecord]:
    """Write `shards` by an executor; where one fails, what has not begun is cancelled.

    `finished` is called for each shard that is written, `stop` where one fails.
    """
    from concurrent.futures import as_completed, wait

    tasks = {executor.submit(write, shard): shard for shard in shards}
    records = {}
    try:
        for task in as_completed(tasks):
            records[tasks[task].file_name] = task.result()
            finished(tasks[task])
    except BaseException as error:
        stop()
        running = [task for task in tasks if not task.cancel()]
        if isinstance(error, Exception):  # who presses Ctrl-C does not want to wait
            wait(running)
        raise
    return records


def write_shard(
    shard: Shard,
    folder: Path,
    *,
    checksum: bool = False,
    fsync: bool = False,
    advance: Advance = lambda count: None,
    attempt: str = "",
) -> FileRecord:
    """Write one file of the output; it appears in `folder` when it is complete.

    Executors that remember results and errors (Dask does) know by `attempt` to write it again.
    """
    growing = folder / f"{shard.file_name}.{os.urandom(8).hex()}"
    digest = hashlib.sha256() if checksum else None
    overflow = {}
    try:
        with named(growing), growing.open("xb", buffering=0) as stream, OpenFiles() as sources:
            out = Output(stream, digest, advance)
            out.write(shard.header)
            for tensor in shard.tensors:
                with overflow_counted() as overflow[tensor.name]:
                    for piece in tensor.weight.pieces:
                        if isinstance(piece, FileRange):
                            out.copy(sources[piece.file], piece)
                        else:
                            for chunk in piece.chunks():
                                out.write(chunk)
            sources.check_unchanged()
            if out.position != shard.nbytes:
                raise AssertionError(
                    f"{shard.file_name}: {out.position} bytes written, {shard.nbytes} planned"
                )
            if fsync:
                sync_file(stream)
        growing.replace(folder / shard.file_name)
    except BaseException:
        growing.unlink(missing_ok=True)
        raise
    return record(shard, None if digest is None else digest.hexdigest(), overflow)


def record(shard: Shard, sha256: str | None, overflow: Mapping[str, Overflow]) -> FileRecord:
    counts = {name: overflowed.count for name, overflowed in overflow.items() if overflowed.count}
    header_sha256 = hashlib.sha256(shard.header).hexdigest()
    return FileRecord(shard.nbytes, header_sha256, sha256, counts or None)


def overflow_in(shard: Shard) -> dict[str, Overflow]:
    """What an earlier build has counted, counted again; no weight is beyond other dtypes."""
    overflow = {}
    for name, weight in shard.tensors:
        if weight.dtype == "F16":
            with overflow_counted() as overflow[name]:
                for piece in weight.pieces:
                    if not isinstance(piece, (FileRange, Zeros, Given)):
                        for _ in piece.chunks():
                            pass
    return overflow


def is_complete(shard: Shard, folder: Path) -> bool:
    """Whether an earlier build has written `shard`; only what is complete gets its name."""
    try:
        with open_regular(folder / shard.file_name) as stream:
            size = os.fstat(stream.fileno()).st_size
            header = shard.header
            return size == shard.nbytes and stream.read(len(header)) == header
    except CheckpointError:
        return False


class Output:
    """A file being written: its bytes are counted, and hashed where that is asked for."""

    def __init__(self, stream: FileIO, digest: Any, advance: Advance) -> None:
        self.stream = stream
        self.digest = digest
        self.advance = advance
        self.position = 0
        self.buffer = memoryview(bytearray(BUFFER))
        # The kernel shows nobody what it copies.
        self.in_kernel = digest is None and hasattr(os, "copy_file_range")

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        if self.digest is not None:
            self.digest.update(view)
        while view:
            count = self.stream.write(view)
            view = view[count:]
            self.moved(count)

    def copy(self, source: FileIO, piece: FileRange) -> None:
        """Append a byte range of `source`."""
        start, end = piece.offset, piece.offset + piece.nbytes
        if self.in_kernel and (self.position - start) % BLOCK == 0:
            first, last = start + -start % BLOCK, end - end % BLOCK
            if first < last:
                self.copy_through_buffer(source, piece, start, first)
                start = self.copy_in_kernel(source, first, last)
        self.copy_through_buffer(source, piece, start, end)

    def copy_in_kernel(self, source: FileIO, start: int, end: int) -> int:
        """Copy what the system can copy by itself; returns where it stopped."""
        while start < end:
            try:
                count = os.copy_file_range(
                    source.fileno(), self.stream.fileno(), min(end - start, COPIED_AT_ONCE), start
                )
            except OSError:  # between file systems, or none that can; or an error to meet again
                count = 0
            if count == 0:
                self.in_kernel = False
                break
            start += count
            self.moved(count)
        return start

    def copy_through_buffer(self, source: FileIO, piece: FileRange, start: int, end: int) -> None:
        source.seek(start)
        while start < end:
            with named(piece.file.path):
                count = source.readinto(self.buffer[: end - start])
            if not count:
                raise CheckpointError(
                    f"ended at byte {start} while being read", file=piece.file.path
                )
            self.write(self.buffer[:count])
            start += count

    def moved(self, count: int) -> None:
        self.position += count
        self.advance(count)


def write_text(text: str, file: Path, *, checksum: bool = False, fsync: bool = False) -> FileRecord:
    """Write a small file beside the shards."""
    return write_chunks([text.encode()], file, checksum=checksum, fsync=fsync)


def copy_file(
    source: Path, file: Path, *, checksum: bool = False, fsync: bool = False
) -> FileRecord:
    """Copy a small file beside the shards, or into a folder there; links are followed."""
    file.parent.mkdir(exist_ok=True)
    with open_regular(source) as stream:
        chunks = iter(lambda: stream.read(BUFFER), b"")
        return write_chunks(chunks, file, checksum=checksum, fsync=fsync)


def write_chunks(chunks: Iterable[bytes], file: Path, *, checksum: bool, fsync: bool) -> FileRecord:
    digest = hashlib.sha256() if checksum else None
    with named(file), file.open("wb", buffering=0) as stream:
        out = Output(stream, digest, lambda count: None)
        for chunk in chunks:
            out.write(chunk)
        if fsync:
            sync_file(stream)
    return FileRecord(out.position, sha256=None if digest is None else digest.hexdigest())


def sha256_of(file: Path) -> str:
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_file(stream: FileIO) -> None:
    """Wait until the file would last through a power cut."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(stream, fcntl.F_FULLFSYNC)  # fsync leaves the drive's own cache as it is
    else:
        os.fsync(stream)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` last through a power cut, where the system can be asked to."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Tell which file an error of the system is about."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
