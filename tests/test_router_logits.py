"""`moe-fast route`: statistics of saved router logits."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from command import run
from moe_fast import CheckpointError, MoeConfig, MoeConfigError, RoutingError, RoutingStats
from moe_fast.routing.logits_file import read_logits, statistics_of_file
from moe_fast.storage.safetensors_header import header_bytes

FACTORS = [1.0, 1.25, 1.5, 2.0]


def random_logits(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def write_safetensors(path, tensors):
    """Tensors as `(name, code, array)`, in this order, as the format has them."""
    entries = [(name, code, array.shape, array.nbytes) for name, code, array in tensors]
    data = b"".join(array.tobytes() for _, _, array in tensors)
    path.write_bytes(header_bytes(entries, {}) + data)
    return path


def expected_statistics(layers, *config, **options):
    stats = RoutingStats(MoeConfig(*config), len(layers), **options)
    for layer, logits in enumerate(layers):
        stats.update(logits, layer)
    return stats


def test_an_array_of_layers(tmp_path):
    logits = random_logits(3, 500, 8)
    np.save(tmp_path / "z.npy", logits)
    assert isinstance(read_logits(tmp_path / "z.npy")[0].logits, np.memmap)
    found = statistics_of_file(tmp_path / "z.npy", capacity_factors=FACTORS, threads=2)
    assert found == expected_statistics(logits, 8, 2, capacity_factors=FACTORS)
    np.save(tmp_path / "one.npy", logits[1])
    assert statistics_of_file(tmp_path / "one.npy") == expected_statistics(logits[1:2], 8, 2)


def test_options_reach_the_routing(tmp_path):
    logits = random_logits(2, 300, 8)
    np.save(tmp_path / "z.npy", logits)
    found = statistics_of_file(
        tmp_path / "z.npy", "top_k", 3, scores="sigmoid", n_group=4, topk_group=2,
        capacity_factor=1.0, drop_policy="position", tokens_per_batch=100,
    )  # fmt: skip
    stats = RoutingStats(
        MoeConfig(8, 3), 2, scores="sigmoid", n_group=4, topk_group=2, capacity_factor=1.0,
        drop_policy="position",
    )  # fmt: skip
    for layer in range(2):
        stats.update(logits[layer], layer, tokens_per_batch=100)
    assert (found.num_dropped > 0).all()
    for name in ("counts", "num_dropped", "num_unrouted", "z_loss"):
        mine, theirs = getattr(found, name), getattr(stats, name)
        np.testing.assert_array_equal(*(v() if callable(v) else v for v in (mine, theirs)))
    switch = statistics_of_file(tmp_path / "z.npy", "switch_transformer")
    assert switch == expected_statistics(logits, 8, 1, "switch_transformer")
    choice = statistics_of_file(tmp_path / "z.npy", "expert_choice", 2)
    assert choice == expected_statistics(logits, 8, 2, "expert_choice")


@pytest.mark.parametrize("code", ["F32", "F64", "F16", "BF16"])
def test_a_tensor_a_layer(tmp_path, code):
    dtype = {"F32": "float32", "F64": "float64", "F16": "float16"}.get(code)
    if dtype is None:
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    layers = [random_logits(11, 40, 4)[i].astype(dtype) for i in (0, 2, 10)]
    # By name, 10 stands before 2; the layers do not.
    order = [(f"model.layers.{n}.logits", code, z) for n, z in zip((0, 2, 10), layers, strict=True)]
    file = write_safetensors(tmp_path / "z.safetensors", [order[0], order[2], order[1]])
    assert statistics_of_file(file) == expected_statistics(layers, 4, 2)


def test_bfloat16_without_ml_dtypes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    words = random_logits(2, 40, 4).view(np.uint32) >> 16
    file = write_safetensors(tmp_path / "z.safetensors", [("z", "BF16", words.astype(np.uint16))])
    assert statistics_of_file(file) == expected_statistics((words << 16).view(np.float32), 4, 2)


def test_what_cannot_be_read_as_it_stands(tmp_path):
    logits = random_logits(200, 8)
    np.save(tmp_path / "big.npy", logits.astype(">f4"))
    np.save(tmp_path / "columns.npy", np.asfortranarray(logits))
    # One byte before it puts the second tensor where no float32 is aligned.
    odd = write_safetensors(
        tmp_path / "z.safetensors",
        [("a", "F16", logits[:25, :1].astype(np.float16).repeat(8, 1)), ("b", "F32", logits)],
    )
    expected = expected_statistics([logits], 8, 2)
    assert statistics_of_file(tmp_path / "big.npy") == expected
    assert statistics_of_file(tmp_path / "columns.npy") == expected
    np.testing.assert_array_equal(statistics_of_file(odd).counts[1], expected.counts[0])


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    np.save(tmp_path / "z.npy", np.array([[Evil()]], object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"z\.npy: cannot be read as a \.npy file"):
        statistics_of_file(tmp_path / "z.npy")
    assert not (tmp_path / "unpickled").exists()


def wrong_arrays():
    yield np.zeros(5), r"must have the shape \[T, E\] or \[L, T, E\], got \[5\]"
    yield np.zeros((1, 2, 3, 4)), r"got \[1, 2, 3, 4\]"
    yield np.zeros((0, 8)), r"is empty, its shape is \[0, 8\]"
    yield np.zeros((5, 0)), r"is empty, its shape is \[5, 0\]"
    yield np.zeros((3, 8), np.int64), "is int64; logits are float32"
    yield np.zeros((3, 8), np.complex64), "is complex64"
    yield np.zeros((3, 8), "U4"), "is <U4"
    yield np.zeros((3, 8), [("a", "f4")]), r"logits are float32"
    yield np.zeros((2**16 + 1, 1, 1), np.float16), "holds 65537 layers, at most 65536"


@pytest.mark.parametrize(("array", "message"), list(wrong_arrays()), ids=lambda v: str(v)[:20])
def test_wrong_arrays(tmp_path, array, message):
    np.save(tmp_path / "z.npy", array)
    with pytest.raises(CheckpointError, match=rf"z\.npy: .*{message}"):
        statistics_of_file(tmp_path / "z.npy")


def test_wrong_tensors(tmp_path):
    z = random_logits(5, 4)
    file = tmp_path / "z.safetensors"
    for tensors, message in [
        ([], r"z\.safetensors: holds no tensor"),
        ([("a", "F32", z), ("b", "F32", z[:, :3].copy())], r"'b' has 3 experts, the first tensor"),
        ([("a", "I32", z.view(np.int32))], r"tensor 'a' is I32; logits are F64, F32, BF16, F16"),
        ([("a", "F32", z[:0])], r"tensor 'a' is empty, its shape is \[0, 4\]"),
        ([("a", "F32", z[0])], r"tensor 'a' must have the shape \[T, E\]"),
    ]:
        write_safetensors(file, tensors)
        with pytest.raises(CheckpointError, match=message):
            statistics_of_file(file)
    write_safetensors(file, [("a", "F32", z)])
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"z\.safetensors: tensor 'a' has data_offsets"):
        statistics_of_file(file)


def test_a_nan_is_named_by_file_layer_and_token(tmp_path):
    logits = random_logits(2, 50, 4)
    logits[1, 33, 2] = np.nan
    np.save(tmp_path / "z.npy", logits)
    for options in ({}, {"tokens_per_batch": 10}):
        for method in ("top_k", "expert_choice"):
            with pytest.raises(
                RoutingError,
                match=r"z\.npy: cannot be routed: layer 1: logits of token 33 hold a NaN",
            ):
                statistics_of_file(tmp_path / "z.npy", method, **options)
    file = write_safetensors(tmp_path / "z.safetensors", [("b", "F32", logits[1])])
    with pytest.raises(
        RoutingError, match=r"z\.safetensors: tensor 'b' cannot be routed: logits of token 33 hold"
    ):
        statistics_of_file(file)


def test_a_large_file_takes_little_memory(tmp_path):
    # A hundred megabytes in the other byte order, so that a copy is made of whatever is read.
    logits = np.lib.format.open_memmap(tmp_path / "z.npy", "w+", ">f4", (8, 50_000, 64))
    logits[:] = random_logits(50_000, 64)
    logits.flush()
    del logits
    script = """
import sys, tracemalloc
from moe_fast.routing.logits_file import statistics_of_file
tracemalloc.start()
statistics_of_file(sys.argv[1])
print(tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "z.npy")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000_000


def test_statistics_of_files_add_up_over_processes_and_dask(tmp_path):
    logits = random_logits(4, 2, 100, 8)
    files = [tmp_path / f"{number}.npy" for number in range(4)]
    for file, part in zip(files, logits, strict=True):
        np.save(file, part)
    joined = logits.swapaxes(0, 1).reshape(2, 400, 8)
    expected = expected_statistics(joined, 8, 2)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert sum(pool.map(statistics_of_file, files)) == expected
    bag = pytest.importorskip("dask.bag")
    parts = bag.from_sequence(files).map(statistics_of_file)
    assert sum(parts.compute(scheduler="threads")) == expected


def test_the_command(tmp_path):
    for extra in ("typer", "rich", "ml_dtypes"):
        pytest.importorskip(extra)
    logits = random_logits(3, 400, 4)
    logits[2, :, 1] += 100
    np.save(tmp_path / "z.npy", logits)
    done = run("route", tmp_path / "z.npy", "--experts-per-token", 1, "--capacity-factors", "1,2")
    assert (done.returncode, done.stderr) == (0, "")
    stats = statistics_of_file(tmp_path / "z.npy", "top_k", 1, capacity_factors=[1, 2])
    for line in stats.describe().splitlines():
        assert line in done.stdout
    assert "expert 1 dominates with 100.0 % of the load" in done.stdout
    assert "75.00 %" in done.stdout  # of the choices, at factor 1
    assert "50.00 %" in done.stdout
    done = run("route", tmp_path / "z.npy", "--experts-per-token", 1, "--capacity-factors", "1,2",
               "--json")  # fmt: skip
    values = json.loads(done.stdout)
    assert values["layers"] == stats.summary()
    assert RoutingStats.from_dict(values) == stats
    done = run("route", tmp_path / "z.npy", "--method", "expert_choice", "--tokens-per-batch", 100)
    assert done.returncode == 0, done.stderr
    done = run("route", tmp_path / "z.npy", "--capacity-factors", "many")
    assert done.returncode == 2
    assert "must be numbers with commas between, such as 1,1.25,2, got 'many'" in done.stderr


def test_the_command_refuses(tmp_path):
    for extra in ("typer", "rich", "ml_dtypes"):
        pytest.importorskip(extra)
    np.save(tmp_path / "z.npy", random_logits(10, 4))
    (tmp_path / "z.pt").write_bytes(b"PK")
    file = tmp_path / "z.npy"
    for arguments, code, message in [
        ((tmp_path / "absent.npy",), 1, "absent.npy: No such file"),
        ((tmp_path / "absent.safetensors",), 1, "absent.safetensors: No such file"),
        ((tmp_path / "z.pt",), 2, "LOGITS must end in .npy or .safetensors, got"),
        ((tmp_path,), 2, "LOGITS must end in .npy or .safetensors, got"),
        ((file, "--experts-per-token", 5), 2, "--experts-per-token must be at most 4, the number"),
        ((file, "--scores", "tanh"), 2, "--scores must be 'softmax' or 'sigmoid'"),
        ((file, "--tokens-per-batch", 0), 2, "--tokens-per-batch must be at least 1"),
        ((file, "--capacity-factors", "-1"), 2, "--capacity-factors must be at least 0"),
    ]:
        done = run("route", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), done
        assert message in done.stderr


def test_the_picture(tmp_path):
    for extra in ("typer", "rich", "ml_dtypes", "matplotlib"):
        pytest.importorskip(extra)
    np.save(tmp_path / "z.npy", random_logits(3, 400, 4))
    done = run("route", tmp_path / "z.npy", "--plot", tmp_path / "load.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    done = run("route", tmp_path / "z.npy", "--plot", tmp_path / "load.abc")
    assert done.returncode == 2
    assert re.match(r"error: --plot '.*load\.abc' cannot be written: ", done.stderr)


def test_statistics_become_plain_values():
    stats = RoutingStats(
        MoeConfig(4, 1, "switch_transformer"), 2, capacity_factors=[1.0, np.inf],
        selection_bias=np.array([0.1, 0, 0, 0]),
    )  # fmt: skip
    logits = random_logits(100, 4)
    logits[3, 0] = np.inf
    stats.update(logits, 1)
    values = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    again = RoutingStats.from_dict(values)
    assert again == stats
    assert (again + stats).counts.sum() == 200
    rows = stats.summary()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert rows[0]["coefficient_of_variation"] is None
    assert rows[0]["description"] == "no tokens yet"
    assert rows[1]["z_loss"] is None  # infinite
    assert rows[1]["load"] == stats.load[1].tolist()
    assert rows[1]["description"] in stats._repr_html_()
    for change, message in [
        ({"sums": {}}, "sums must hold 'num_tokens' as integers"),
        ({"sums": {**values["sums"], "counts": [[1, 2]]}}, r"'counts' .* shape \[2, 4\]"),
        ({"sums": {**values["sums"], "num_tokens": [1, 2.5]}}, "'num_tokens' as integers"),
        ({"sums": {**values["sums"], "num_tokens": [1, -2]}}, "'num_tokens' as integers"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ]:
        with pytest.raises(MoeConfigError, match=message):
            RoutingStats.from_dict({**values, **change})
    del values["config"]
    with pytest.raises(MoeConfigError, match=r"^RoutingStats: the key 'config' is missing$"):
        RoutingStats.from_dict(values)
    with pytest.raises(MoeConfigError, match=r"Stats\.optoins: unknown key; did you mean opt"):
        RoutingStats.from_dict({**values, "optoins": {}})


def test_statistics_become_a_frame():
    pytest.importorskip("pandas")
    stats = RoutingStats(MoeConfig(4), 3, capacity_factors=[1.0])
    for layer in range(3):
        stats.update(random_logits(50, 4), layer)
    frame = stats.to_frame()
    assert frame["layer"].tolist() == [0, 1, 2]
    assert frame["z_loss"].tolist() == stats.z_loss().tolist()
    shares = stats.share_dropped_by_capacity_factor[:, 0].tolist()
    assert frame["share_dropped_at_1.0"].tolist() == shares
