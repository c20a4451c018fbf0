"""What `show_config` says, how a SIMD level is chosen, and that none is missing from a build."""

import os
import re
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from moe_fast import kernels, show_config
from moe_fast.kernels._processor import supports
from moe_fast.kernels.level import LEVELS, levels_available, levels_built, load

PLATFORM = sysconfig.get_platform()
HAS_LEVELS = (
    PLATFORM.endswith(("x86_64", "amd64"))
    and struct.calcsize("P") == 8
    and not PLATFORM.startswith("macosx")
)


def python(code, **environment):
    """Run `code` in a new process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_no_level_is_missing():
    assert levels_built() == (LEVELS if HAS_LEVELS else ("baseline",))


@pytest.mark.skipif(
    not (HAS_LEVELS and Path("/proc/cpuinfo").exists()), reason="needs Linux's list of features"
)
def test_the_processor_is_asked_what_the_system_knows():
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    v3 = {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"} <= flags
    v4 = v3 and {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags
    assert (supports("x86-64-v3"), supports("x86-64-v4")) == (v3, v4)


@pytest.mark.parametrize("level", levels_available())
def test_the_environment_forces_a_level(level):
    done = python("from moe_fast import kernels; print(kernels.level_in_use)", MOE_FAST_LEVEL=level)
    assert done.stdout.split() == [level], done.stderr


@pytest.mark.skipif(bool(os.environ.get("MOE_FAST_LEVEL")), reason="a level is forced")
def test_the_fastest_level_is_chosen():
    assert kernels.level_in_use == levels_available()[-1]


def test_an_unknown_level_is_named():
    done = python("import moe_fast", MOE_FAST_LEVEL="avx1024")
    assert done.returncode == 1
    assert "MOE_FAST_LEVEL must be one of baseline, x86-64-v3, x86-64-v4" in done.stderr
    assert "got 'avx1024'" in done.stderr


def test_a_level_the_processor_lacks_is_named(monkeypatch):
    monkeypatch.setattr("moe_fast.kernels.level.supports", lambda level: level == "baseline")
    with pytest.raises(ImportError, match=r"this (processor|build) lacks x86-64-v4; .*: baseline"):
        load("x86-64-v4")


def test_show_config(capsys):
    show_config()
    shown = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["level"] == kernels.level_in_use
    assert shown["levels built in"].split(", ") == list(levels_built())
    assert shown["threads"] == os.environ.get("MOE_FAST_NUM_THREADS", "1")
    assert shown["NumPy"] == np.__version__
    assert shown["moe_fast"]
