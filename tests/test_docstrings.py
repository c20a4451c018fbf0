"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil
import re
from dataclasses import fields, is_dataclass
from inspect import isfunction

import pytest

import moe_fast

MODULES = [
    module.name
    for module in pkgutil.walk_packages(moe_fast.__path__, "moe_fast.")
    if not module.name.rpartition(".")[2].startswith("_")
]


def skip_without_an_extra(error):
    if not isinstance(error, ImportError) or (error.name or "moe_fast").startswith("moe_fast"):
        raise error
    pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
        doctest.testmod(module, optionflags=doctest.ELLIPSIS, raise_on_error=True)
    except ImportError as error:
        skip_without_an_extra(error)
    except doctest.UnexpectedException as error:
        skip_without_an_extra(error.exc_info[1])
        raise


def test_the_examples_are_found():
    finder = doctest.DocTestFinder()
    with_examples = {t.name for t in finder.find(moe_fast.plan, "plan") if t.examples}
    assert "plan.plan_moe_construction" in with_examples


def test_every_public_function_has_an_example():
    functions = [f for name in moe_fast.__all__ if isfunction(f := getattr(moe_fast, name))]
    assert len(functions) > 15
    for function in functions:
        assert ">>> " in function.__doc__, function


def test_public_reports_say_what_each_of_their_values_is():
    reports = [kind for name in moe_fast.__all__ if is_dataclass(kind := getattr(moe_fast, name))]
    reports = [kind for kind in reports if kind is not moe_fast.Design]
    assert len(reports) > 10
    for kind in reports:
        missing = [f.name for f in fields(kind) if not re.search(rf"\b{f.name}\b", kind.__doc__)]
        assert not missing, (kind, missing)
