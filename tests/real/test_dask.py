"""Files written by the workers of a Dask cluster: three processes over one file system."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

import dask
import pytest
from dask.distributed import Client, KilledWorker, LocalCluster

from folders import contents
from moe_fast import CheckpointError, MoeConfig, build_moe
from moe_fast.demo import make_dense_model
from moe_fast.storage.tensors import Shard
from moe_fast.storage.writer import FileRecord

SHARD = 100_000


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "dense"
    make_dense_model(folder, seed=0, num_hidden_layers=12)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that only the output is written to."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


@pytest.fixture(params=[3], ids="{} failures allowed".format)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """A cluster in which a task may lose as many workers as the parameter says."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": request.param}),
        LocalCluster(
            n_workers=3, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def build(dense: Path, output: Path, **how: object) -> None:
    build_moe(dense, output, MoeConfig(8), max_shard_size=f"{SHARD}B", checksum=True, **how)


def kill_or_write(marker: Path, write: Callable[[Shard], FileRecord], shard: Shard) -> FileRecord:
    """Write a shard, unless nobody has died yet: then half of it, and die."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return write(shard)
    folder = write.keywords["folder"]
    (folder / f"{shard.file_name}.{'0' * 16}").write_bytes(shard.header)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


class Killing(Executor):
    """The cluster's executor, which loses one worker at its third file."""

    def __init__(self, client: Client, marker: Path) -> None:
        self.executor = client.get_executor()
        self.marker = marker
        self.count = 0

    def submit(self, write, /, *shards):
        self.count += 1
        if self.count == 3:
            write = partial(kill_or_write, self.marker, write)
        return self.executor.submit(write, *shards)


def test_the_same_bytes_as_inline(dense, place, client):
    build(dense, place / "inline")
    build(dense, place / "moe", executor=client.get_executor())
    assert contents(place / "moe") == contents(place / "inline")
    assert len(list((place / "moe").glob("*.safetensors"))) > 30


def test_the_tasks_of_a_killed_worker_go_to_others(dense, place, client, tmp_path):
    build(dense, place / "inline")
    build(dense, place / "moe", executor=Killing(client, tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    assert contents(place / "moe") == contents(place / "inline")


@pytest.mark.parametrize("client", [0], indirect=True)
def test_a_killed_worker_ends_the_build_which_goes_on(dense, place, client, tmp_path):
    build(dense, place / "inline")
    executor = Killing(client, tmp_path / "killed")
    with pytest.raises(KilledWorker, match="all those workers died") as caught:
        build(dense, place / "moe", executor=executor)
    assert not (place / "moe").exists()
    (kept,) = place.glob(".moe.partial/*/")
    assert str(kept) in "".join(caught.value.__notes__)
    finished = {file.stat().st_ino for file in kept.glob("*.safetensors")}
    build(dense, place / "moe", executor=executor)
    assert contents(place / "moe") == contents(place / "inline")
    assert finished <= {file.stat().st_ino for file in (place / "moe").iterdir()}
    assert sorted(entry.name for entry in place.iterdir()) == ["inline", "moe"]


def test_a_workers_refusal_arrives(dense, place, client):
    """An error of the input, found by a worker: as it would be here, and nothing is left."""

    def touch(done: int, total: int) -> None:
        os.utime(dense / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed while it was being"):
        build(dense, place / "moe", executor=client.get_executor(), progress=touch)
    assert list(place.iterdir()) == []
