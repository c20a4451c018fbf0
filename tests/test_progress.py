"""The argument `progress`: a bar, or a function of what is done and what there is to do."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from moe_fast import (
    ArgumentTypeError,
    MoeConfig,
    MoeConfigError,
    build_moe,
    check_moe,
    compare_moe,
    make_dense_model,
    prune_moe,
)

CONFIG = MoeConfig(num_experts=4, num_experts_per_tok=2)


@pytest.fixture
def dense(tmp_path):
    make_dense_model(tmp_path / "dense", seed=0)
    return tmp_path / "dense"


@pytest.fixture(params=["tqdm", "rich"])
def library(request, monkeypatch):
    """The one library that draws bars."""
    pytest.importorskip(request.param)
    other = {"tqdm": "rich.progress", "rich": "tqdm.auto"}[request.param]
    monkeypatch.setitem(sys.modules, other, None)
    if request.param == "rich":
        rich = import_module("rich.progress")
        console = import_module("rich.console").Console(stderr=True, force_terminal=True)
        monkeypatch.setattr(rich, "get_console", lambda: console)
    return request.param


def test_a_bar_shows_each_task_and_ends_full(dense, library, tmp_path, capfd):
    moe = tmp_path / "moe"
    for task, work in (
        ("writing", lambda: build_moe(dense, moe, CONFIG, progress=True)),
        ("writing", lambda: prune_moe(moe, tmp_path / "few", keep=[0, 1], progress=True)),
        ("comparing", lambda: check_moe(moe, progress=True)),
        ("comparing", lambda: compare_moe(moe, moe, progress=True)),
    ):
        work()
        shown = capfd.readouterr().err
        assert task in shown
        assert "100%" in shown


def test_false_is_none(dense, tmp_path, capfd):
    build_moe(dense, tmp_path / "moe", CONFIG, progress=False)
    assert capfd.readouterr().err == ""


def test_a_bar_without_a_library_names_one(dense, tmp_path, monkeypatch):
    for module in ("tqdm.auto", "rich.progress"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MoeConfigError, match=r"progress needs tqdm or rich to show a bar: pip install"
    ):
        build_moe(dense, tmp_path / "moe", CONFIG, progress=True)
    assert not (tmp_path / "moe").exists()


def test_anything_else_is_refused(dense, tmp_path):
    with pytest.raises(ArgumentTypeError, match=r"progress must be True or a function.*got 'bar'"):
        build_moe(dense, tmp_path / "moe", CONFIG, progress="bar")
