"""The examples in the docstrings, and in the README, run and print what they say."""

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import moe_fast

MODULES = [
    module.name
    for module in pkgutil.walk_packages(moe_fast.__path__, "moe_fast.")
    if not module.name.rpartition(".")[2].startswith("_")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.startswith("moe_fast"):
            raise
        pytest.skip(f"{error.name} is not installed")
    monkeypatch.chdir(tmp_path)
    with np.printoptions(legacy=False):
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_the_examples_are_found():
    finder = doctest.DocTestFinder()
    with_examples = {t.name for t in finder.find(moe_fast.plan, "plan") if t.examples}
    assert "plan.plan_moe_construction" in with_examples


def test_every_public_function_has_an_example():
    for name in ("plan_moe_construction", "compute_gate_weights", "compute_expert_load_balance"):
        assert ">>> " in getattr(moe_fast, name).__doc__
