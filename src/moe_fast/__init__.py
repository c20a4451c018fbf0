"""Turn dense language models on disk into Mixture-of-Experts checkpoints, at the speed of memory.

See the README for what the package does and CONTRIBUTING.md for how its data flows.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy

if tuple(map(int, numpy.__version__.split(".")[:2])) < (1, 26):
    raise ImportError(
        f"moe_fast needs NumPy 1.26 or later, this is {numpy.__version__}: "
        "pip install --upgrade numpy"
    )

from moe_fast.config import GateMode, MoeConfig, RouterInit, RoutingMethod
from moe_fast.errors import (
    CheckpointError,
    MoeConfigError,
    MoeFastError,
    RecipeError,
    RoutingError,
)
from moe_fast.gates import compute_gate_weights, compute_router_weights
from moe_fast.health import RouterHealth, predict_load
from moe_fast.plan import (
    ExpertAssignment,
    MoeConstructionPlan,
    MoeReport,
    compute_expert_load_balance,
    plan_moe_construction,
)
from moe_fast.routing import Routing, route
from moe_fast.statistics import RoutingStats, plan_capacity, update_selection_bias

if TYPE_CHECKING:
    from moe_fast.checkpoint.build import build_moe as build_moe
    from moe_fast.checkpoint.check import check_moe as check_moe
    from moe_fast.checkpoint.convert import convert_moe as convert_moe
    from moe_fast.checkpoint.inspection import inspect_model as inspect_model
    from moe_fast.checkpoint.page import write_report as write_report
    from moe_fast.checkpoint.request import ExpertSource as ExpertSource
    from moe_fast.doctor import show_config as show_config
    from moe_fast.recipe import build_recipe as build_recipe
    from moe_fast.recipe import read_recipe as read_recipe

# What needs more than NumPy, or time to import, is fetched when first used.
LATER = {
    "ExpertSource": "moe_fast.checkpoint.request",
    "build_moe": "moe_fast.checkpoint.build",
    "build_recipe": "moe_fast.recipe",
    "check_moe": "moe_fast.checkpoint.check",
    "convert_moe": "moe_fast.checkpoint.convert",
    "inspect_model": "moe_fast.checkpoint.inspection",
    "read_recipe": "moe_fast.recipe",
    "show_config": "moe_fast.doctor",
    "write_report": "moe_fast.checkpoint.page",
}

__all__ = [
    "CheckpointError",
    "ExpertAssignment",
    "ExpertSource",
    "GateMode",
    "MoeConfig",
    "MoeConfigError",
    "MoeConstructionPlan",
    "MoeFastError",
    "MoeReport",
    "RecipeError",
    "RouterHealth",
    "RouterInit",
    "Routing",
    "RoutingError",
    "RoutingMethod",
    "RoutingStats",
    "build_moe",
    "build_recipe",
    "check_moe",
    "compute_expert_load_balance",
    "compute_gate_weights",
    "compute_router_weights",
    "convert_moe",
    "inspect_model",
    "plan_capacity",
    "plan_moe_construction",
    "predict_load",
    "read_recipe",
    "route",
    "show_config",
    "update_selection_bias",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("moe-fast")
    if name in LATER:
        return getattr(importlib.import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *LATER, "__version__"])
