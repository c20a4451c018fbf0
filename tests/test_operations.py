"""Every operation that writes takes the same options, and goes on where it was cut off."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from command import run
from folders import contents
from moe_fast import (
    MoeConfig,
    build_moe,
    check_moe,
    convert_moe,
    expand_moe,
    extract_dense,
    make_dense_model,
    merge_experts,
    prune_moe,
)

GROUPS = [[0, 1], [2, 3], [4, 5]]
# What each does to a model of six experts, in Python and in the command.
OPERATIONS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "prune": (prune_moe, {"keep": [0, 2, 5]}, ["--keep", "keep.json"]),
    "merge": (merge_experts, {"groups": GROUPS}, ["--groups", "groups.json"]),
    "expand": (expand_moe, {"num_experts": 12, "noise_scale": 0.1},
               ["--experts", "12", "--noise-scale", "0.1"]),
    "extract": (extract_dense, {"mean": True}, ["--mean"]),
    "convert": (convert_moe, {"layout": "fused", "dtype": "bfloat16"},
                ["--layout", "fused", "--dtype", "bfloat16"]),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("operations")
    make_dense_model(folder / "dense", seed=0)
    build_moe(folder / "dense", folder / "moe", MoeConfig(num_experts=6))
    (folder / "keep.json").write_text("[0, 2, 5]")
    (folder / "groups.json").write_text(json.dumps(GROUPS))
    return folder / "moe"


def perform(name: str, moe: Path, output: Path, **options: Any) -> Any:
    function, arguments, _ = OPERATIONS[name]
    return function(moe, output, max_shard_size="100kB", **arguments, **options)


@EACH
@pytest.mark.parametrize("way", ["threads", "executor"])
def test_files_are_the_same_however_they_are_written(moe, tmp_path, name, way):
    perform(name, moe, tmp_path / "plain")
    seen: list[tuple[int, int]] = []
    how: dict[str, Any] = {"checksum": True, "fsync": True}
    if way == "threads":
        how |= {"threads": 3, "progress": lambda *counts: seen.append(counts)}
        report = perform(name, moe, tmp_path / "other", **how)
        done, total = zip(*seen, strict=True)
        assert list(done) == sorted(done)
        assert done[-1] == total[-1] == total[0] > 0
    else:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as executor:
            report = perform(name, moe, tmp_path / "other", executor=executor, **how)
    assert report.num_files > 1
    plain, other = contents(tmp_path / "plain"), contents(tmp_path / "other")
    manifest = json.loads(other.pop("moe_fast.json"))
    plain.pop("moe_fast.json")
    assert plain == other
    assert all("sha256" in record for record in manifest["files"].values())
    assert check_moe(tmp_path / "other").passed


@EACH
def test_what_is_cut_off_goes_on(moe, tmp_path, name):
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        perform(name, moe, tmp_path / "output", progress=stop)
    assert not (tmp_path / "output").exists()
    written: list[int] = []
    perform(name, moe, tmp_path / "output", progress=lambda done, total: written.append(done))
    assert written[0] > 0  # what was whole is not written again
    perform(name, moe, tmp_path / "plain")
    cut, plain = contents(tmp_path / "output"), contents(tmp_path / "plain")
    assert cut == plain
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "plain"]


@EACH
def test_a_dry_run_writes_nothing_and_finds_everything(moe, tmp_path, name):
    report = perform(name, moe, tmp_path / "output", dry_run=True)
    assert report.dry_run
    assert list(tmp_path.iterdir()) == []
    written = perform(name, moe, tmp_path / "output")
    assert (report.num_bytes, report.num_files) == (written.num_bytes, written.num_files)


@EACH
def test_the_command_takes_them_too(moe, tmp_path, name):
    options = ["--checksum", "--fsync", "--threads", "2", "--max-shard-size", "100kB", "--json"]
    arguments = [name, moe, "-o", tmp_path / "output", *OPERATIONS[name][2], *options]
    done = run(*arguments, cwd=moe.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_files"] > 1
    done = run(*arguments, "--dry-run", cwd=moe.parent)
    assert done.returncode == 1
    assert "exists already" in done.stderr
    done = run(*arguments, "--dry-run", "--overwrite", cwd=moe.parent)
    assert json.loads(done.stdout)["dry_run"] is True
