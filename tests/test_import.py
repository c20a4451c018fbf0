"""What `import moe_fast` brings along: nothing but names, until one of them is used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import moe_fast

NEW_MODULES = """
import json, sys
{before}
before = set(sys.modules)
{code}
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def new_modules(code: str, before: str = "") -> set[str]:
    """The modules that are loaded when `code` has run, those of `before` apart."""
    script = NEW_MODULES.format(code=code, before=before)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing():
    assert new_modules("import moe_fast") == {"moe_fast"}
    assert new_modules("import moe_fast; moe_fast.__version__") >= {"moe_fast", "moe_fast.version"}
    assert "numpy" not in new_modules("import moe_fast; dir(moe_fast), moe_fast.__version__")


@pytest.mark.parametrize("command", ["moe-fast", "-m"])
def test_the_version_of_the_command_needs_no_numpy(command):
    code = f"sys.argv = [{command!r}, '--version']; from moe_fast.__main__ import main; main()"
    assert {name.partition(".")[0] for name in new_modules(code)} == {"moe_fast"}


def test_the_version_is_the_same_from_both_places():
    from moe_fast.__main__ import main  # noqa: F401

    run = [sys.executable, "-m", "moe_fast"]
    alone = subprocess.run([*run, "--version"], capture_output=True, text=True)
    assert alone.stdout == f"moe-fast {moe_fast.__version__}\n"
    pytest.importorskip("typer")
    beside = subprocess.run([*run, "--version", "build"], capture_output=True, text=True)
    assert (beside.returncode, beside.stdout) == (0, alone.stdout)


def test_use_needs_numpy_alone():
    new = {name.partition(".")[0] for name in new_modules("from moe_fast import route")}
    others = {name for name in new - set(sys.stdlib_module_names) if "cython" not in name}
    assert others == {"moe_fast", "numpy"}


@pytest.mark.parametrize(
    "slow",
    ["asyncio", "concurrent", "importlib.metadata", "inspect", "multiprocessing", "subprocess"],
)
def test_nothing_slow_of_the_standard_library(slow):
    # NumPy may import these itself, so only what moe_fast adds counts.
    assert slow not in new_modules("from moe_fast import route", before="import numpy")


def test_every_public_name_exists():
    for name in moe_fast.__all__:
        if name != "__version__":
            assert getattr(moe_fast, name).__doc__


def test_dir_shows_the_public_names_and_no_others():
    assert moe_fast.MoeConfig is moe_fast.config.MoeConfig  # loads modules, which are no names
    assert dir(moe_fast) == sorted(moe_fast.__all__)
    namespace: dict[str, object] = {}
    exec("from moe_fast import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(moe_fast.__all__)


def test_type_checkers_see_the_same_names():
    import ast
    from pathlib import Path

    tree = ast.parse(Path(moe_fast.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found = {
        alias.name: node.module.removeprefix("moe_fast.")
        for node in imports
        for alias in node.names
        if alias.asname == alias.name
    }
    assert found == {name: module for module, names in moe_fast.HOMES.items() for name in names}


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert moe_fast.__version__ == version("moe-fast")


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'moe_fast' has no attribute 'build_mow'"):
        moe_fast.build_mow  # noqa: B018


def test_a_big_endian_processor_is_refused_before_anything_is_loaded():
    code = "import sys; sys.byteorder = 'big'; import moe_fast"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: moe_fast needs a little-endian processor: this one would write wrong bytes"
    )
