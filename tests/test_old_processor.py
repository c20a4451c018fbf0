"""Processors that this machine is not, emulated: the right level, no illegal instruction.

Needs qemu-x86_64, from Debian's qemu-user.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moe_fast
from moe_fast import compute_gate_weights
from moe_fast.kernels.level import levels_built

EMULATOR = shutil.which("qemu-x86_64")

pytestmark = pytest.mark.skipif(
    EMULATOR is None or "x86-64-v3" not in levels_built(),
    reason="needs qemu-x86_64, and the levels of x86-64",
)

PROGRAM = """
import hashlib, sys
from moe_fast import compute_gate_weights, compute_expert_load_balance, kernels
print(kernels.level_in_use)
digest = hashlib.sha256()
for dtype in ("float64", "float32", "float16"):
    for transpose in (False, True):
        weights = compute_gate_weights(67, 33, dtype=dtype, transpose=transpose, threads=2)
        digest.update(weights)
print(digest.hexdigest())
print(compute_expert_load_balance([0, 1, 1]))
"""


def emulated(processor, **environment):
    source = str(Path(moe_fast.__file__).parents[1])
    return subprocess.run(
        [EMULATOR, "-cpu", processor, sys.executable, "-c", PROGRAM],
        env={**os.environ, "MOE_FAST_LEVEL": "", "PYTHONPATH": source, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def digest():
    digest = hashlib.sha256()
    for dtype in ("float64", "float32", "float16"):
        for transpose in (False, True):
            digest.update(compute_gate_weights(67, 33, dtype=dtype, transpose=transpose))
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("processor", "level"),
    [
        ("Nehalem", "baseline"),
        ("SandyBridge", "baseline"),
        ("Haswell,-bmi2", "baseline"),
        ("Haswell,-movbe", "baseline"),
        ("Haswell", "x86-64-v3"),
    ],
)
def test_an_older_processor(processor, level):
    done = emulated(processor)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [level, digest(), "0.3333333333333333"]


def test_a_level_beyond_an_older_processor_is_refused():
    done = emulated("Nehalem", MOE_FAST_LEVEL="x86-64-v3")
    assert done.returncode == 1
    assert "this processor lacks x86-64-v3; available: baseline" in done.stderr
