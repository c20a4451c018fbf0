"""Files that others made: opened without waiting, read whole, and the same as they were."""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path
from typing import IO, NamedTuple

from moe_fast.errors import CheckpointError


class SourceFile(NamedTuple):
    """A file as it was when its header was read; a different one later is another file."""

    path: str
    size: int
    mtime_ns: int
    header_sha256: str

    def check_unchanged(self, stream: IO[bytes]) -> None:
        """Raise `CheckpointError` unless the open `stream` is still the file described here."""
        status = os.fstat(stream.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise CheckpointError("changed while it was being read", file=self.path)


# Far below what systems let a process have open; models may stand in more files than that.
MOST_OPEN = 64
CHUNK = 1024 * 1024


class OpenFiles:
    """Files kept open, the same as when their headers were read, and closed together.

    Of more than MOST_OPEN the one used longest ago is closed, and opened again when asked for.
    """

    def __init__(self) -> None:
        self.streams: dict[SourceFile, FileIO] = {}

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()

    def __getitem__(self, file: SourceFile) -> FileIO:
        if file in self.streams:
            self.streams[file] = self.streams.pop(file)
            return self.streams[file]
        if len(self.streams) == MOST_OPEN:
            oldest = next(iter(self.streams))
            with self.streams.pop(oldest) as stream:
                oldest.check_unchanged(stream)
        self.streams[file] = open_regular(Path(file.path))
        file.check_unchanged(self.streams[file])
        return self.streams[file]

    def read(self, file: SourceFile, offset: int, count: int) -> bytearray:
        """Exactly `count` bytes from `offset`."""
        stream = self[file]
        stream.seek(offset)
        return read_exactly(stream, count, file.path)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` unless all are still the same."""
        for file, stream in self.streams.items():
            file.check_unchanged(stream)


def open_regular(path: Path) -> FileIO:
    """The file opened for reading bytes; a FIFO or a device, which could block, is refused."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            # Should it have become a FIFO since, opening it must not wait for a writer.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            stream = FileIO(os.open(path, flags), "rb")
            if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                return stream
            stream.close()
    except OSError as error:
        raise CheckpointError(f"{error.strerror}", file=path) from None
    raise CheckpointError("is not a regular file", file=path)


def read_exactly(stream: FileIO, count: int, path: str) -> bytearray:
    """The next `count` bytes of the file at `path`, however few of them the system gives at a time.

    Raises
    ------
    CheckpointError
        A file that ends before.
    """
    data = bytearray(count)
    fill(memoryview(data), stream, path)
    return data


def fill(buffer: memoryview, stream: FileIO, path: str) -> None:
    """Read the next bytes of the file at `path` until `buffer` is full, as `read_exactly`."""
    while buffer:
        count = stream.readinto(buffer)
        if not count:
            raise CheckpointError(f"ended at byte {stream.tell()} while being read", file=path)
        buffer = buffer[count:]


def is_plain_path(path: str) -> bool:
    """Whether `path`, parts separated by slashes, can only lead to a file below its folder."""
    return all(map(is_plain_name, path.split("/")))


def same_bytes(file: Path, other: Path) -> bool:
    """Whether two files are equal, read a chunk at a time and only as far as they are."""
    with open_regular(file) as left, open_regular(other) as right:
        if os.fstat(left.fileno()).st_size != os.fstat(right.fileno()).st_size:
            return False
        while chunk := left.read(CHUNK):
            if read_exactly(right, len(chunk), str(other)) != chunk:
                return False
    return True


def is_plain_name(name: str) -> bool:
    """Whether `name` can only be a file in the folder that it is looked up in, on any system."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & set('/\\:"<>|?*')


def is_absent(path: Path) -> bool:
    """Whether nothing stands at `path`; what is closed to us is there."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
