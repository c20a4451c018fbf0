"""What the built modules hold and how they see the processor."""

import sys
from pathlib import Path

import pytest

from moe_fast import kernels
from moe_fast.kernels.level import levels_available, levels_built

CPUINFO = Path("/proc/cpuinfo")
FLAGS = {
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "fma"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not list the flags")
def test_the_levels_available_are_what_the_system_says_of_the_processor():
    lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    expected = ["baseline"]
    for level, needed in FLAGS.items():
        if level in levels_built() and needed <= flags:
            expected.append(level)
    assert list(levels_available()) == expected


def test_compiled_modules_have_no_abi_of_numpy():
    """They take buffers, so one wheel works with every NumPy."""
    folder = Path(kernels.__file__).parent
    modules = [path for path in folder.iterdir() if path.suffix in (".so", ".pyd")]
    assert len(modules) >= 3
    for module in modules:
        content = module.read_bytes()
        assert b"_ARRAY_API" not in content
        assert b"multiarray" not in content
