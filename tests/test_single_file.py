"""Files beside checkpoints (scores, reports, pictures, routers): whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

for extra in ("safetensors", "ml_dtypes", "typer", "matplotlib"):
    pytest.importorskip(extra)

import numpy as np

import moe_fast
from command import run
from moe_fast import CheckpointError, make_dense_model, score_experts, write_report
from moe_fast.command.examples import copy_examples
from moe_fast.command.outcome import describe_os_error
from moe_fast.demo import make_demo
from moe_fast.drawing.plotting import save_load_picture
from moe_fast.routing.weights_file import write_router_weights
from moe_fast.single_file import check_place, map_new_file, whole_file

SOURCE = Path(moe_fast.__file__).parent
LOAD = np.array([[1, 2], [2, 1]])
ROUTERS = np.zeros((1, 8, 2))
# By name of the file: what writes it, over what is there.
WRITERS = {
    "gates.npy": lambda file: write_router_weights(file, ROUTERS, overwrite=True),
    "gates.safetensors": lambda file: write_router_weights(file, ROUTERS, overwrite=True),
    "load.png": lambda file: save_load_picture(LOAD, file),
    "kinds.yml": lambda file: list(copy_examples(file.parent)),
    "report.html": lambda file: write_report("nowhere", file),
    "scores.json": lambda file: score_experts("nowhere", file, overwrite=True),
}


@pytest.fixture(params=WRITERS)
def written(request, tmp_path):
    return tmp_path / request.param, WRITERS[request.param]


def refused(written, problem: str) -> None:
    file, write = written
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}: {problem}$"):
        write(file)


def test_a_folder_is_not_a_file(written):
    written[0].mkdir()
    refused(written, "is a folder, and a file is to be written; name a file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no FIFOs")
def test_what_is_no_file_stays(written):
    os.mkfifo(written[0])
    refused(written, "exists already and is not a regular file; choose another file")


def test_a_file_is_not_a_folder(written):
    file, write = written
    (file.parent / "file").write_text("mine")
    refused((file.parent / "file" / "new" / file.name, write), r".*file is not a folder")
    assert (file.parent / "file").read_text() == "mine"


def test_a_closed_folder_is_named_before_anything_is_read(written, monkeypatch):
    file, write = written
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file.parent)
    refused((file.parent / "new" / file.name, write), r"the folder .* is not writable")
    assert not (file.parent / "new").exists()


def test_what_stood_there_stays_until_the_new_file_is_whole(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(file)

    def break_off(path: Path, error: BaseException) -> None:
        with whole_file(path) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(OSError, match="No space") as told:
        break_off(link, OSError(errno.ENOSPC, "No space"))
    assert told.value.filename == str(link)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        break_off(file, KeyboardInterrupt("stopped"))
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        break_off(tmp_path / "new" / "folder" / "file", KeyboardInterrupt("stopped"))
    assert file.read_text() == "mine"
    with whole_file(link) as stream:
        stream.write(b"new")
    assert file.read_text() == "new"
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    check_place(file, overwrite=True)


LIMITED = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
runpy.run_module("moe_fast", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of a process")
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("gates 64 8 --overwrite -o", "out/gates.npy"),
        ("gates 64 8 --overwrite -o", "out/gates.safetensors"),
        ("route logits.npy --plot", "out/load.svg"),
        ("report demo/moe -o", "out/report.html"),
    ],
)
def test_a_failed_write_is_one_line_and_loses_nothing(tmp_path, line, name):
    """A limit on the size of files fails the writing as a full disk does."""
    np.save(tmp_path / "logits.npy", np.zeros((4, 2), np.float32))
    if "demo" in line:
        make_demo(tmp_path / "demo")
    command = [*line.split(), name]
    assert run(*command, cwd=tmp_path).returncode == 0
    before = (tmp_path / name).read_bytes()
    limited = subprocess.run(
        [sys.executable, "-c", LIMITED, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(SOURCE.parent), "NO_COLOR": "1", "COLUMNS": "200"},
        check=False,
    )
    assert limited.returncode == 1
    assert limited.stderr.splitlines()[-1] == f"error: {name}: {os.strerror(errno.EFBIG)}"
    assert "Traceback" not in limited.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [Path(name).name]
    assert (tmp_path / name).read_bytes() == before


def test_models_and_examples_are_written_whole(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(errno.ENOSPC, "No space", str(self), None, str(target))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space") as told:
        make_dense_model(tmp_path, seed=0)
    assert told.value.filename == str(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="No space") as told:
        list(copy_examples(tmp_path))
    assert told.value.filename == str(tmp_path / "kinds.yml")
    assert not list(tmp_path.iterdir())


def test_errors_of_the_system_are_told_by_file():
    full = OSError(errno.ENOSPC, "No space", "a", None, "b")
    assert describe_os_error(full) == "a -> b: No space; make room, or choose another disk"
    assert describe_os_error(OSError(errno.EACCES, "Closed", "a")) == "a: Closed"
    assert describe_os_error(OSError(errno.EACCES, "Closed")) == "Closed"
    assert describe_os_error(OSError("of its own kind")) == "of its own kind"


@pytest.mark.skipif(sys.platform != "linux", reason="counts the blocks of files")
@pytest.mark.parametrize("reserves", [True, False])
def test_a_mapped_file_has_its_place_on_the_disk(tmp_path, monkeypatch, reserves):
    """Else a full disk ends the process by a signal when a page is written."""
    if not reserves:  # as file systems answer that cannot

        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "Not supported")

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    array = map_new_file(tmp_path / "array", np.float32, (1000, 500))
    assert array.shape == (1000, 500)
    assert not array.any()
    assert (tmp_path / "array").stat().st_blocks * 512 >= array.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="reserves in another way")
def test_a_mapped_file_that_does_not_fit_is_named_and_gone(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space") as told:
        map_new_file(tmp_path / "array", np.float32, (1000, 500))
    assert told.value.filename == str(tmp_path / "array")
    assert not list(tmp_path.iterdir())


def test_no_file_is_mapped_for_writing_without_its_place():
    mapped = [path for path in SOURCE.rglob("*.py") if '"w+"' in path.read_text("utf-8")]
    assert not mapped
