"""The reference library, compiled from its source file and called through a C interface."""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
LIBRARIES = ["libreference_library.so", "libreference_library.dylib", "reference_library.dll"]
INITS = {"random": 0, "uniform": 1, "balanced": 2}


class Reference:
    """Built from `source`, the Rust module, with cargo's release profile."""

    def __init__(self, source: Path) -> None:
        subprocess.run(
            ["cargo", "build", "--release", "--offline", "--quiet"],
            cwd=HERE / "reference_library",
            env={**os.environ, "MOE_FAST_REFERENCE": str(source.resolve(strict=True))},
            check=True,
        )
        built = HERE / "reference_library" / "target" / "release"
        library = ctypes.CDLL(str(next(built / n for n in LIBRARIES if (built / n).exists())))
        size = ctypes.c_size_t
        library.gate_weights.argtypes = [size, size, ctypes.c_uint32, ctypes.c_void_p]
        library.gate_weights.restype = None
        library.plan.argtypes = library.kept_plan.argtypes = [size] * 3
        library.plan.restype = None
        library.kept_plan.restype = ctypes.c_void_p
        library.load_balance.argtypes = [ctypes.c_void_p]
        library.load_balance.restype = ctypes.c_double
        self._library = library

    def weights(self, hidden_dim: int, num_experts: int, init: str) -> np.ndarray:
        """Its router weights, copied out."""
        weights = np.empty((hidden_dim, num_experts))
        self._library.gate_weights(hidden_dim, num_experts, INITS[init], weights.ctypes.data)
        return weights

    def making_weights(self, hidden_dim: int, num_experts: int, init: str) -> partial[None]:
        """A call that makes router weights in a buffer of its own, which it is given again."""
        return partial(self._library.gate_weights, hidden_dim, num_experts, INITS[init], None)

    def making_plan(self, num_models: int, num_layers: int, num_experts: int) -> partial[None]:
        """A call that makes a plan."""
        return partial(self._library.plan, num_models, num_layers, num_experts)

    def balancing(self, num_models: int, num_layers: int, num_experts: int) -> partial[float]:
        """A call that computes the load balance of a plan made before."""
        plan = self._library.kept_plan(num_models, num_layers, num_experts)
        return partial(self._library.load_balance, plan)
