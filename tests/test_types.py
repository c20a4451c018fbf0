"""What type checkers see: annotations that fit the package's use, stubs that fit the kernels."""

import importlib.resources
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed: pip install --group types")


def run(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout


def test_examples(tmp_path):
    # In refused.py every expected error is ignored by name, and an ignored line without one is an
    # error itself.
    told = run(
        "mypy", "--strict", "--cache-dir", tmp_path, "typing/accepted.py", "typing/refused.py"
    )
    assert told.startswith("Success: no issues found in 2 source files"), told


def test_stubs_have_the_kernels_signatures():
    told = run("mypy.stubtest", "moe_fast.kernels._baseline", "moe_fast.kernels._processor")
    assert told.startswith("Success: no issues found in 2 modules"), told


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("moe_fast").joinpath("py.typed").is_file()
