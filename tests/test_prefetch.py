"""Weights that another thread makes while those before are written."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import numpy as np
import pytest

from moe_fast.storage import writer
from moe_fast.storage.pieces import Converted, Given
from moe_fast.storage.prefetch import prefetch
from moe_fast.storage.tensors import OutputTensor, Shard, Weight
from moe_fast.storage.writer import write_shard


def running() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("moe_fast_prefetch")]


def test_the_same_items_in_order_made_by_one_other_thread():
    makers = set()

    def make():
        for number in range(100):
            makers.add(threading.get_ident())
            yield number

    assert list(prefetch(make(), 4)) == list(range(100))
    assert len(makers) == 1
    assert makers != {threading.get_ident()}
    assert not running()


def test_no_more_is_made_ahead_than_asked_for():
    made = []

    def make():
        for number in range(100):
            made.append(number)
            yield number

    with closing(prefetch(make(), 3)) as items:
        for number, _ in zip(range(10), items, strict=False):
            time.sleep(0.005)  # as long as it needs to run ahead
            assert len(made) <= number + 1 + 3
    assert len(made) < 20


def test_an_error_comes_after_the_items_before_it():
    def make():
        yield from range(5)
        raise OSError("no space")

    items = prefetch(make(), 3)
    assert [next(items) for _ in range(5)] == list(range(5))
    with pytest.raises(OSError, match="no space"):
        next(items)
    assert not running()


def test_closing_closes_the_items_in_the_thread_that_made_them():
    threads = {}

    def make():
        try:
            for number in range(100):
                threads["made"] = threading.get_ident()
                yield number
        finally:
            threads["closed"] = threading.get_ident()

    with closing(prefetch(make(), 3)) as items:
        assert next(items) == 0
    assert threads["closed"] == threads["made"]
    assert not running()


def large_shard(number: int) -> tuple[Shard, bytes]:
    """Tensors of 3 MB in float32, written in float16, in each of which some values overflow."""
    rng = np.random.default_rng(0)
    tensors, expected = [], b""
    for index in range(number):
        values = rng.standard_normal(750_000).astype(np.float32)
        values[:index] = 1e6
        piece = Converted(Given(values.tobytes()), "F32", "F16")
        tensors.append(OutputTensor(f"t{index}", Weight("F16", (values.size,), (piece,))))
        with np.errstate(over="ignore"):
            expected += values.astype(np.float16).tobytes()
    return Shard("model.safetensors", tuple(tensors)), expected


def test_the_writer_writes_what_was_made_ahead(tmp_path, monkeypatch):
    names = set()
    shard, expected = large_shard(6)
    to_dtype = Converted.chunks
    monkeypatch.setattr(
        Converted,
        "chunks",
        lambda self: names.add(threading.current_thread().name) or to_dtype(self),
    )
    record = write_shard(shard, tmp_path)
    assert names == {"moe_fast_prefetch_0"}
    data = (tmp_path / shard.file_name).read_bytes()
    assert data[len(shard.header) :] == expected
    assert record.overflow == {f"t{index}": index for index in range(1, 6)}


def test_small_shards_need_no_other_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "prefetch", None)
    shard, expected = large_shard(1)
    write_shard(shard, tmp_path)
    assert (tmp_path / shard.file_name).read_bytes().endswith(expected)


def test_who_stops_the_writer_stops_the_maker(tmp_path):
    shard, _ = large_shard(6)
    written = []

    def stop(count: int) -> None:
        written.append(count)
        if len(written) == 3:  # of which the first is the header
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        write_shard(shard, tmp_path, advance=stop)
    assert not running()
    assert not list(tmp_path.iterdir())
