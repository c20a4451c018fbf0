"""Turn dense language models on disk into Mixture-of-Experts checkpoints, at the speed of memory.

See the README for what the package does and docs/architecture.md for how its data flows.
"""

import sys

if sys.byteorder != "little":
    raise ImportError("moe_fast needs a little-endian processor: this one would write wrong bytes")

TYPE_CHECKING = False  # type checkers take it for typing's, which takes time to import
if TYPE_CHECKING:
    from typing import Any

    from moe_fast.calibration.inspection import inspect_model as inspect_model
    from moe_fast.calibration.score import ScoreReport as ScoreReport
    from moe_fast.calibration.score import score_experts as score_experts
    from moe_fast.checkpoint.build import BuildReport as BuildReport
    from moe_fast.checkpoint.build import build_moe as build_moe
    from moe_fast.checkpoint.build import design_moe as design_moe
    from moe_fast.checkpoint.check import CheckReport as CheckReport
    from moe_fast.checkpoint.check import Finding as Finding
    from moe_fast.checkpoint.check import Status as Status
    from moe_fast.checkpoint.check import check_moe as check_moe
    from moe_fast.checkpoint.compare import CompareReport as CompareReport
    from moe_fast.checkpoint.compare import WeightDifference as WeightDifference
    from moe_fast.checkpoint.compare import compare_moe as compare_moe
    from moe_fast.checkpoint.convert import ConvertReport as ConvertReport
    from moe_fast.checkpoint.convert import convert_moe as convert_moe
    from moe_fast.checkpoint.design import Design as Design
    from moe_fast.checkpoint.expand import expand_moe as expand_moe
    from moe_fast.checkpoint.extract import extract_dense as extract_dense
    from moe_fast.checkpoint.merge import merge_experts as merge_experts
    from moe_fast.checkpoint.operation import OperationReport as OperationReport
    from moe_fast.checkpoint.prune import prune_moe as prune_moe
    from moe_fast.checkpoint.reroute import reroute_moe as reroute_moe
    from moe_fast.command.doctor import Diagnosis as Diagnosis
    from moe_fast.command.doctor import diagnose as diagnose
    from moe_fast.command.doctor import show_config as show_config
    from moe_fast.command.page import write_report as write_report
    from moe_fast.config import Dtype as Dtype
    from moe_fast.config import Layout as Layout
    from moe_fast.config import MoeConfig as MoeConfig
    from moe_fast.config import RouterInit as RouterInit
    from moe_fast.config import RoutingMethod as RoutingMethod
    from moe_fast.demo import make_demo as make_demo
    from moe_fast.demo import make_dense_model as make_dense_model
    from moe_fast.drawing.plotting import compute_router_similarity as compute_router_similarity
    from moe_fast.drawing.plotting import plot_curves as plot_curves
    from moe_fast.drawing.plotting import plot_load as plot_load
    from moe_fast.drawing.plotting import plot_plan as plot_plan
    from moe_fast.drawing.plotting import plot_router_similarity as plot_router_similarity
    from moe_fast.errors import ArgumentTypeError as ArgumentTypeError
    from moe_fast.errors import CheckpointError as CheckpointError
    from moe_fast.errors import MoeConfigError as MoeConfigError
    from moe_fast.errors import MoeFastError as MoeFastError
    from moe_fast.errors import Problem as Problem
    from moe_fast.errors import RecipeError as RecipeError
    from moe_fast.errors import RoutingError as RoutingError
    from moe_fast.families.rules import Reader as Reader
    from moe_fast.models.inspection import ModelReport as ModelReport
    from moe_fast.models.inspection import RouterReport as RouterReport
    from moe_fast.plan import ExpertAssignment as ExpertAssignment
    from moe_fast.plan import MoeConstructionPlan as MoeConstructionPlan
    from moe_fast.plan import MoeReport as MoeReport
    from moe_fast.plan import compute_expert_load_balance as compute_expert_load_balance
    from moe_fast.plan import plan_moe_construction as plan_moe_construction
    from moe_fast.recipes.recipe import Recipe as Recipe
    from moe_fast.recipes.recipe import build_recipe as build_recipe
    from moe_fast.recipes.recipe import read_recipe as read_recipe
    from moe_fast.reports import Report as Report
    from moe_fast.request import ExpertSource as ExpertSource
    from moe_fast.request import RouterStart as RouterStart
    from moe_fast.routing.health import RouterHealth as RouterHealth
    from moe_fast.routing.health import predict_load as predict_load
    from moe_fast.routing.logits_file import statistics_of_file as statistics_of_file
    from moe_fast.routing.options import RoutingOptions as RoutingOptions
    from moe_fast.routing.result import Routing as Routing
    from moe_fast.routing.router import Router as Router
    from moe_fast.routing.router import route as route
    from moe_fast.routing.statistics import RoutingStats as RoutingStats
    from moe_fast.routing.statistics import plan_capacity as plan_capacity
    from moe_fast.routing.statistics import update_selection_bias as update_selection_bias
    from moe_fast.routing.weights import compute_gate_weights as compute_gate_weights
    from moe_fast.routing.weights import compute_router_weights as compute_router_weights
    from moe_fast.routing.weights_file import write_router_weights as write_router_weights
    from moe_fast.version import __version__ as __version__

# Where each public name stands. It is fetched when it is first used, so that `import moe_fast`
# takes no time and needs no NumPy. Nothing runs before that: Ctrl-C would end in a traceback.
HOMES = {
    "calibration.inspection": ("inspect_model",),
    "calibration.score": ("ScoreReport", "score_experts"),
    "checkpoint.build": ("BuildReport", "build_moe", "design_moe"),
    "checkpoint.check": ("CheckReport", "Finding", "Status", "check_moe"),
    "checkpoint.compare": ("CompareReport", "WeightDifference", "compare_moe"),
    "checkpoint.convert": ("ConvertReport", "convert_moe"),
    "checkpoint.design": ("Design",),
    "checkpoint.expand": ("expand_moe",),
    "checkpoint.extract": ("extract_dense",),
    "checkpoint.merge": ("merge_experts",),
    "checkpoint.operation": ("OperationReport",),
    "checkpoint.prune": ("prune_moe",),
    "checkpoint.reroute": ("reroute_moe",),
    "command.doctor": ("Diagnosis", "diagnose", "show_config"),
    "command.page": ("write_report",),
    "config": ("Dtype", "Layout", "MoeConfig", "RouterInit", "RoutingMethod"),
    "demo": ("make_demo", "make_dense_model"),
    "drawing.plotting": (
        *("compute_router_similarity", "plot_curves", "plot_load", "plot_plan"),
        "plot_router_similarity",
    ),
    "errors": (
        *("ArgumentTypeError", "CheckpointError", "MoeConfigError", "MoeFastError", "Problem"),
        *("RecipeError", "RoutingError"),
    ),
    "families.rules": ("Reader",),
    "models.inspection": ("ModelReport", "RouterReport"),
    "plan": (
        *("ExpertAssignment", "MoeConstructionPlan", "MoeReport"),
        *("compute_expert_load_balance", "plan_moe_construction"),
    ),
    "recipes.recipe": ("Recipe", "build_recipe", "read_recipe"),
    "reports": ("Report",),
    "request": ("ExpertSource", "RouterStart"),
    "routing.health": ("RouterHealth", "predict_load"),
    "routing.logits_file": ("statistics_of_file",),
    "routing.options": ("RoutingOptions",),
    "routing.result": ("Routing",),
    "routing.router": ("Router", "route"),
    "routing.statistics": ("RoutingStats", "plan_capacity", "update_selection_bias"),
    "routing.weights": ("compute_gate_weights", "compute_router_weights"),
    "routing.weights_file": ("write_router_weights",),
    "version": ("__version__",),
}


def __getattr__(name: str) -> "Any":
    if name == "__all__":
        return sorted(each for names in HOMES.values() for each in names)
    home = next((module for module, names in HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name != "__version__":
        from moe_fast.requirements import require_numpy

        require_numpy()
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    names: list[str] = __getattr__("__all__")
    return names
