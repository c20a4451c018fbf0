"""Which build of the kernels this processor gets.

The wheel holds one module per SIMD level, all from the same definitions and all with the same
results, bit for bit. A module's own start-up code already holds its level's instructions, so it is
imported only after the processor was asked.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

try:
    from moe_fast.kernels._processor import supports
except ModuleNotFoundError as error:
    if error.name is None or not error.name.startswith("moe_fast.kernels."):
        raise
    raise ImportError(
        f"{Path(__file__).parent} holds no kernels compiled for this Python ({sys.version_info[0]}."
        f"{sys.version_info[1]} on {sys.platform}). In a checkout: make build, with the same "
        "Python. Otherwise: pip install --force-reinstall moe-fast"
    ) from None

LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")
ENVIRONMENT_VARIABLE = "MOE_FAST_LEVEL"


def module_name(level: str) -> str:
    return "moe_fast.kernels._" + level.replace("-", "_")


def levels_built() -> tuple[str, ...]:
    """The levels this installation was built with, slowest first."""
    return tuple(lv for lv in LEVELS if importlib.util.find_spec(module_name(lv)) is not None)


def levels_available() -> tuple[str, ...]:
    """The levels built in that this processor runs, slowest first."""
    return tuple(level for level in levels_built() if supports(level))


def load(level: str) -> ModuleType:
    """The kernels of `level`; `ImportError` where they are not built in or do not run here."""
    if level not in LEVELS:
        raise ImportError(
            f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(LEVELS)}, got {level!r}"
        )
    if level not in levels_available():
        reason = "this processor lacks" if level in levels_built() else "this build lacks"
        raise ImportError(f"{reason} {level}; available: {', '.join(levels_available())}")
    return importlib.import_module(module_name(level))


def chosen() -> str:
    """The level that `MOE_FAST_LEVEL` forces, or the fastest available."""
    return os.environ.get(ENVIRONMENT_VARIABLE) or levels_available()[-1]
