"""Bytes into shards: by every path they can take, by threads and executors, with every fault."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import textwrap
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors", "hypothesis"):
    pytest.importorskip(extra)

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from moe_fast import CheckpointError, MoeConfig, build_moe
from moe_fast.demo import make_dense_model
from moe_fast.storage import writer
from moe_fast.storage.files import SourceFile
from moe_fast.storage.pieces import FileRange
from moe_fast.storage.tensors import BLOCK, OutputTensor, Shard, Weight
from moe_fast.storage.writer import write_shard, write_shards

needs_copy_file_range = pytest.mark.skipif(
    not hasattr(os, "copy_file_range"), reason="no copy_file_range on this system"
)


def source(folder: Path, nbytes: int, seed: int = 0) -> SourceFile:
    path = folder / f"source-{seed}"
    path.write_bytes(hashlib.shake_128(bytes([seed])).digest(nbytes))
    status = path.stat()
    return SourceFile(str(path), status.st_size, status.st_mtime_ns, "")


def shard_of(*pieces: FileRange, name: str = "model.safetensors") -> Shard:
    tensors = (
        OutputTensor(f"t{i}", Weight("U8", (piece.nbytes,), (piece,)))
        for i, piece in enumerate(pieces)
    )
    return Shard(name, tuple(tensors))


def expected_bytes(*pieces: FileRange) -> bytes:
    return b"".join(Path(p.file.path).read_bytes()[p.offset : p.offset + p.nbytes] for p in pieces)


def check(shard: Shard, folder: Path, *pieces: FileRange, **options: object) -> None:
    record = write_shard(shard, folder, **options)
    data = (folder / shard.file_name).read_bytes()
    assert data == shard.header + expected_bytes(*pieces)
    assert record.size == len(data)
    assert {n: t.tobytes() for n, t in load(data).items()} == {
        f"t{i}": expected_bytes(piece) for i, piece in enumerate(pieces)
    }


ranges = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 40_000), st.integers(0, 20_000)),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("checksum", [False, True], ids=["kernel", "buffer"])
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    deadline=None,
)
@given(ranges=ranges, buffer=st.sampled_from([1000, BLOCK, writer.BUFFER]))
def test_any_ranges_of_any_files(tmp_path_factory, monkeypatch, checksum, ranges, buffer):
    folder = tmp_path_factory.mktemp("ranges")
    files = [source(folder, 60_000, seed) for seed in range(4)]
    pieces = [FileRange(files[i], offset, nbytes) for i, offset, nbytes in ranges]
    monkeypatch.setattr(writer, "BUFFER", buffer)
    monkeypatch.setattr(writer, "COPIED_AT_ONCE", 2 * BLOCK)
    check(shard_of(*pieces), folder, *pieces, checksum=checksum)


def test_the_data_begins_where_most_bytes_lie_as_in_their_source(tmp_path):
    file = source(tmp_path, 100_000)
    most = FileRange(file, 2 * BLOCK + 24, 9 * BLOCK)
    some = FileRange(file, BLOCK + 16, 3 * BLOCK)
    shard = shard_of(some, most)
    assert len(shard.header) % BLOCK == 24
    assert len(shard_of(some).header) % BLOCK == 16
    odd = FileRange(file, BLOCK + 3, 30 * BLOCK)  # readers want the data at a multiple of 8
    assert len(shard_of(odd, some).header) % 8 == 0
    check(shard, tmp_path, some, most)


@needs_copy_file_range
def test_aligned_ranges_are_moved_in_the_kernel(tmp_path, monkeypatch):
    moved = []
    copy_file_range = os.copy_file_range

    def counting(source, target, count, offset):
        copied = copy_file_range(source, target, count, offset)
        moved.append((offset, copied))
        return copied

    monkeypatch.setattr(os, "copy_file_range", counting)
    piece = FileRange(source(tmp_path, 20 * BLOCK), 24, 10 * BLOCK)
    check(shard_of(piece), tmp_path, piece)
    assert moved == [(BLOCK, 9 * BLOCK)]  # whole blocks; the ends go through the buffer
    moved.clear()
    check(shard_of(piece), tmp_path, piece, checksum=True)
    assert moved == []


@needs_copy_file_range
@pytest.mark.parametrize("fault", ["refused", "nothing", "then refused", "short"])
def test_what_the_kernel_does_not_copy_goes_through_the_buffer(tmp_path, monkeypatch, fault):
    copy_file_range = os.copy_file_range
    calls = []

    def failing(source, target, count, offset):
        calls.append(count)
        if fault == "nothing":
            return 0
        if fault == "short" or (fault == "then refused" and len(calls) == 1):
            return copy_file_range(source, target, min(count, 1000), offset)
        raise OSError(errno.EXDEV, "other file system")

    monkeypatch.setattr(os, "copy_file_range", failing)
    file = source(tmp_path, 20 * BLOCK)
    pieces = [FileRange(file, 24, 3 * BLOCK), FileRange(file, 24 + 3 * BLOCK, 3 * BLOCK)]
    check(shard_of(*pieces), tmp_path, *pieces)
    assert len(calls) == {"refused": 1, "nothing": 1, "then refused": 2}.get(fault, len(calls))


def test_a_file_that_is_there_only_appears_when_it_is_complete(tmp_path):
    file = source(tmp_path, 1000)
    out = tmp_path / "out"
    out.mkdir()
    seen = []
    piece = FileRange(file, 0, 1000)
    write_shard(shard_of(piece), out, advance=lambda count: seen.append(sorted(out.iterdir())))
    assert len(seen) == 2
    assert all(name.name.startswith("model.safetensors.") for names in seen for name in names)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def stop(count: int) -> None:
    raise KeyboardInterrupt("stop")


def test_what_is_cut_off_is_removed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt, match="stop"):
        write_shard(shard_of(FileRange(source(tmp_path, 1000), 0, 1000)), out, advance=stop)
    assert list(out.iterdir()) == []


def test_a_source_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    file = source(tmp_path, 4000)
    path = Path(file.path)
    piece = FileRange(file, 0, 4000)

    def touch(count: int) -> None:
        os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="source-0: changed while it was being read"):
        write_shard(shard_of(piece), tmp_path, advance=touch)
    with pytest.raises(CheckpointError, match="source-0: changed while it was being read"):
        write_shard(shard_of(piece), tmp_path)

    path.write_bytes(path.read_bytes())
    file = source(tmp_path, 4000)

    def truncate(count: int) -> None:
        if count == 1000:
            os.truncate(path, 1000)

    monkeypatch.setattr(writer, "BUFFER", 1000)
    with pytest.raises(CheckpointError, match="source-0: ended at byte 1000 while being read"):
        write_shard(shard_of(FileRange(file, 0, 4000)), tmp_path, checksum=True, advance=truncate)
    assert [p.name for p in tmp_path.iterdir()] == ["source-0"]


def test_a_source_that_becomes_a_fifo_is_not_waited_for(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("no FIFOs on this system")
    file = source(tmp_path, 4000)
    Path(file.path).unlink()
    os.mkfifo(file.path)
    with pytest.raises(CheckpointError, match="source-0: is not a regular file"):
        write_shard(shard_of(FileRange(file, 0, 4000)), tmp_path)


def in_shards(folder: Path, number: int) -> list[Shard]:
    file = source(folder, number * 5000)
    return [
        shard_of(FileRange(file, i * 5000, 5000), name=f"model-{i}.safetensors")
        for i in range(number)
    ]


def die(shard: Shard, **_: object) -> None:
    os._exit(1)


def process_pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, mp_context=get_context("spawn"))


@pytest.fixture(params=["inline", "threads", "thread pool", "process pool"])
def means(request):
    """Every way to write shards on one machine, as the options of `write_shards`."""
    if request.param == "inline":
        yield {}
    elif request.param == "threads":
        yield {"threads": 3}
    else:
        pool = ThreadPoolExecutor(2) if request.param == "thread pool" else process_pool()
        with pool:
            yield {"executor": pool}


def test_every_means_writes_the_same(tmp_path, means):
    out = tmp_path / "out"
    out.mkdir()
    shards = in_shards(tmp_path, 7)
    counts = []
    records = write_shards(shards, out, checksum=True, advance=counts.append, **means)
    assert list(records) == [shard.file_name for shard in shards]
    for i, shard in enumerate(shards):
        data = (out / shard.file_name).read_bytes()
        assert data == shard.header + Path(tmp_path / "source-0").read_bytes()[i * 5000 :][:5000]
        assert records[shard.file_name].sha256 == hashlib.sha256(data).hexdigest()
    assert sum(counts) == sum(shard.nbytes for shard in shards)


def test_a_fault_in_one_shard_is_raised_and_others_stop(tmp_path, means):
    out = tmp_path / "out"
    out.mkdir()
    shards = in_shards(tmp_path, 7)
    broken = FileRange(SourceFile(str(tmp_path / "absent"), 5000, 0, ""), 0, 5000)
    shards[2] = shard_of(broken, name=shards[2].file_name)
    with pytest.raises(CheckpointError, match="absent: No such file or directory"):
        write_shards(shards, out, advance=lambda count: None, **means)
    whole = {shard.file_name: shard.header for shard in shards}
    assert all(p.read_bytes().startswith(whole[p.name]) for p in out.iterdir())
    assert shards[2].file_name not in {p.name for p in out.iterdir()}


def test_a_worker_that_dies_is_an_error_and_the_rest_can_be_written(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    shards = in_shards(tmp_path, 7)
    with monkeypatch.context() as patch, process_pool() as pool:
        patch.setattr(writer, "write_shard", die)
        with pytest.raises(BrokenProcessPool, match="terminated abruptly"):
            write_shards(shards, out, executor=pool, advance=lambda count: None)
    with process_pool() as pool:
        write_shards(shards, out, executor=pool, advance=lambda count: None)
    assert len(list(out.iterdir())) == 7


class Remembering(ThreadPoolExecutor):
    """Takes calls with the same arguments for the same call, as Dask does."""

    def __init__(self) -> None:
        super().__init__(1)
        self.results: dict[bytes, Future[object]] = {}

    def submit(self, function, /, *args):
        key = pickle.dumps((function, args))
        if key not in self.results:
            self.results[key] = super().submit(function, *args)
        return self.results[key]


def test_an_executor_that_remembers_results_writes_again(tmp_path):
    shards = in_shards(tmp_path, 3)
    with Remembering() as executor:
        for name in ("first", "second"):
            out = tmp_path / "out"
            out.mkdir()
            write_shards(shards, out, executor=executor, advance=lambda count: None)
            assert len(list(out.iterdir())) == 3
            out.rename(tmp_path / name)


def test_what_a_killed_worker_left_is_removed(tmp_path):
    """Where an executor gives a dead worker's file to another one, nobody else would."""
    out = tmp_path / "out"
    out.mkdir()

    def killed_first(count: int) -> None:
        (out / "model-00001-of-00003.safetensors.0123456789abcdef").write_bytes(b"half")

    shards = in_shards(tmp_path, 3)
    with ThreadPoolExecutor(1) as pool:
        write_shards(shards, out, executor=pool, advance=killed_first)
    assert {file.name for file in out.iterdir()} == {shard.file_name for shard in shards}


def test_a_fault_is_raised_where_cancelled_tasks_are_never_heard_of_again(tmp_path):
    class Silent(ThreadPoolExecutor):
        """Runs the first task and loses the others, as a cluster does that loses its workers."""

        def submit(self, function, /, *args):
            if self._work_queue.empty() and not self._threads:
                return super().submit(function, *args)
            return Future()

    out = tmp_path / "out"
    out.mkdir()
    shards = in_shards(tmp_path, 3)
    broken = FileRange(SourceFile(str(tmp_path / "absent"), 5000, 0, ""), 0, 5000)
    shards[0] = shard_of(broken, name=shards[0].file_name)
    with Silent(1) as pool, pytest.raises(CheckpointError, match="absent: No such file"):
        write_shards(shards, out, executor=pool, advance=lambda count: None)


def test_a_shard_is_a_small_task(tmp_path):
    make_dense_model(tmp_path / "dense", seed=0, num_hidden_layers=4)
    kept = []

    class Recording(ThreadPoolExecutor):
        def submit(self, function, /, *args):
            kept.append(pickle.dumps((function, args)))
            return super().submit(function, *args)

    with Recording(1) as pool:
        build_moe(
            tmp_path / "dense",
            tmp_path / "moe",
            MoeConfig(16),
            executor=pool,
            max_shard_size=10**6,
        )
    assert len(kept) > 5
    assert max(map(len, kept)) < 20_000


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
def test_a_write_that_fails_halfway_is_named_and_gone_on_from(tmp_path):
    """A limit on the size of files fails the second file's writing as a full disk does."""
    make_dense_model(tmp_path / "dense", seed=0)
    code = textwrap.dedent(
        f"""
        import resource, sys
        from moe_fast import MoeConfig, build_moe
        try:
            limit = int(sys.argv[1])
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            build_moe({str(tmp_path / "dense")!r}, {str(tmp_path / "moe")!r}, MoeConfig(3),
                      max_shard_size="200kB")
        except OSError as error:
            print(error.errno, error.filename, *error.__notes__)
        """
    )

    def run(limit: int) -> str:
        command = [sys.executable, "-c", code, str(limit)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    told = run(190_000)
    assert told.startswith(f"{errno.EFBIG} {tmp_path}/.moe.partial/")
    assert "model-00002-of-00004.safetensors" in told
    assert "do the same again to resume" in told
    assert not (tmp_path / "moe").exists()
    assert run(10**9) == ""
    assert (tmp_path / "moe" / "config.json").exists()
    assert not (tmp_path / ".moe.partial").exists()
