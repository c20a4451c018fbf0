"""The example scripts, as `moe-fast examples` hands them out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytest.importorskip("typer")

from command import run
from moe_fast.command.examples import PLACES


def test_they_are_copied_and_parse(tmp_path):
    done = run("examples", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = {Path(line).name for line in done.stdout.split()}
    assert written >= {"train_upcycled.py", "prune_scored.py", "route_by_kind.py", "kinds.yml"}
    for name in written:
        text = (tmp_path / "examples" / name).read_text("utf-8")
        assert any((place / name).is_file() for place in PLACES)
        if name.endswith(".py"):
            ast.parse(text)


def test_a_changed_copy_is_kept(tmp_path):
    assert run("examples", "mine", cwd=tmp_path).returncode == 0
    assert run("examples", "mine", cwd=tmp_path).returncode == 0
    file = tmp_path / "mine" / "train_upcycled.py"
    file.write_text("print('mine')\n")
    (tmp_path / "mine" / "kinds.yml").unlink()
    done = run("examples", "mine", cwd=tmp_path)
    assert done.returncode == 1
    assert "train_upcycled.py: differs from the example; choose another folder" in done.stderr
    assert file.read_text() == "print('mine')\n"
    assert not (tmp_path / "mine" / "kinds.yml").exists()
