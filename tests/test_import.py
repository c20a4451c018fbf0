"""What `import moe_fast` brings along: NumPy, a little of the standard library, nothing else."""

import json
import subprocess
import sys

import pytest

import moe_fast

NEW_MODULES = """
import json, sys
import numpy
before = set(sys.modules)
import moe_fast
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""


def run(script):
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stderr == ""
    return result.stdout


def test_import_needs_numpy_alone():
    new = {name for name in json.loads(run(NEW_MODULES)) if "cython" not in name}
    assert new - set(sys.stdlib_module_names) - {"numpy"} == {"moe_fast"}


@pytest.mark.parametrize(
    "slow",
    ["asyncio", "concurrent", "importlib.metadata", "inspect", "multiprocessing", "subprocess"],
)
def test_nothing_slow_of_the_standard_library(slow):
    # NumPy may import these itself, so only what moe_fast adds counts.
    script = NEW_MODULES.replace('name.partition(".")[0]', "name")
    assert slow not in json.loads(run(script))


def test_every_public_name_exists():
    for name in moe_fast.__all__:
        assert getattr(moe_fast, name).__doc__
    assert set(moe_fast.__all__) <= set(dir(moe_fast))


def test_the_version_is_the_distributions():
    from importlib.metadata import version

    assert moe_fast.__version__ == version("moe-fast")


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'moe_fast' has no attribute 'build_mow'"):
        moe_fast.build_mow  # noqa: B018
