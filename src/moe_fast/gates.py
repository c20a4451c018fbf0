"""Router weights to start from, bit for bit the reference's."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moe_fast.config import RouterInit, as_member
from moe_fast.errors import as_index
from moe_fast.kernels import compiled

__all__ = ["compute_gate_weights"]

SEEDS = {RouterInit.RANDOM: 0x5DEECE66D1A4F681, RouterInit.BALANCED: 0xCAFEBABEDEADBEEF}


def compute_gate_weights(
    hidden_dim: int, num_experts: int, init: RouterInit | str = RouterInit.BALANCED
) -> npt.NDArray[np.float64]:
    """Router weights of shape `(hidden_dim, num_experts)`."""
    hidden_dim = as_index(hidden_dim, "hidden_dim")
    num_experts = as_index(num_experts, "num_experts")
    init = as_member(init, RouterInit, "init")
    weights = np.empty((hidden_dim, num_experts))
    if weights.size == 0:
        return weights
    if init is RouterInit.UNIFORM:
        weights.fill(1.0 / num_experts)
    elif init is RouterInit.RANDOM:
        compiled.fill(weights.reshape(-1), SEEDS[init], 0.0, 1.0 / math.sqrt(hidden_dim))
    else:
        compiled.fill(
            weights.reshape(-1), SEEDS[init], 1.0 / num_experts, 0.01 / math.sqrt(hidden_dim)
        )
    return weights
