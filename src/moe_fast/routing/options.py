"""The options of a router: what they may be, and what they mean together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Literal, ParamSpec, TypedDict, cast

import numpy as np
import numpy.typing as npt

from moe_fast.checks import as_index, as_number
from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import ArgumentTypeError, MoeConfigError
from moe_fast.routing.arrays import as_array, find_encoding, widen_bfloat16

__all__ = ["DropPolicy", "RoutingOptions", "Scores"]
Scores = Literal["softmax", "sigmoid"]
Arguments = ParamSpec("Arguments")
DropPolicy = Literal["position", "probs"]

# Expert choice has no use for these: each of its experts takes the same number of tokens.
TOKEN_CHOICE_ONLY = ("norm_topk_prob", "selection_bias", "n_group", "topk_group", "drop_policy")
SWITCH_CAPACITY_FACTOR = 1.25


class RoutingOptions(TypedDict, total=False):
    """The options of `Router` and `route`, for functions that pass them on. All may be left out.

    `route` describes each of them.

    Attributes
    ----------
    scores : "softmax" or "sigmoid"
        The function that turns logits into scores.
    norm_topk_prob : bool, optional
        Divide the weights of a token by their sum.
    routed_scaling_factor : float
        Multiplies the weights.
    selection_bias : array_like, shape (E,), optional
        Added to the scores for the choice alone.
    n_group, topk_group, experts_per_group_score : int, optional
        The number of groups of experts, of groups that a token chooses from, and of experts whose
        scores are added up to a group's score.
    capacity_factor : float, optional
        Limits the tokens of an expert to `ceil(T * k / E * capacity_factor)`.
    drop_policy : "position" or "probs", optional
        Which tokens a full expert keeps.
    sorted : bool
        For expert choice: return the tokens of an expert by descending weight.

    Examples
    --------
    >>> from moe_fast import MoeConfig, Router, RoutingOptions
    >>> deepseek: RoutingOptions = {"scores": "sigmoid", "n_group": 8, "topk_group": 4}
    >>> Router(MoeConfig(num_experts=256, num_experts_per_tok=8), **deepseek).options["n_group"]
    8
    """

    scores: Scores
    norm_topk_prob: bool | None
    routed_scaling_factor: float
    selection_bias: npt.ArrayLike | None
    n_group: int
    topk_group: int | None
    experts_per_group_score: int | None
    capacity_factor: float | None
    drop_policy: DropPolicy | None
    sorted: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A configuration and its options after checking, the selection bias left out."""

    method: RoutingMethod
    num_experts: int
    num_experts_per_tok: int
    is_sigmoid: bool
    norm_topk_prob: bool
    by_score: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    experts_per_group_score: int
    capacity_factor: float
    drop_policy: DropPolicy
    sorted: bool

    def compute_capacity(self, num_tokens: int, capacity_factor: float | None = None) -> int | None:
        """Pairs that an expert takes at most; None if nothing limits them.

        `ceil(T * k / E * capacity_factor)` in floating point, as Megatron-LM computes it: if the
        product rounds up, one more than by exact arithmetic. The factor is the rule's unless given.
        """
        factor = self.capacity_factor if capacity_factor is None else capacity_factor
        if factor == math.inf:
            return None
        return math.ceil(num_tokens * self.num_experts_per_tok / self.num_experts * factor)

    def as_kernel_arguments(self) -> tuple[bool, bool, bool, int, int, int, float]:
        """How tokens choose, as the kernels take it."""
        return (
            self.is_sigmoid, self.norm_topk_prob, self.by_score,
            self.n_group, self.topk_group, self.experts_per_group_score,
            self.routed_scaling_factor,
        )  # fmt: skip


def remember(make: Callable[Arguments, Rule]) -> Callable[Arguments, Rule]:
    """`make`, called once for the same arguments, if they can be hashed."""
    # 1 and True are equal, and only one of them is an integer here.
    remembered = cast(Callable[Arguments, Rule], lru_cache(maxsize=256, typed=True)(make))

    @wraps(make)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Rule:
        try:
            return remembered(*args, **kwargs)
        except TypeError:  # An argument that cannot be hashed, or that `make` finds wrong.
            return make(*args, **kwargs)

    return call


@remember
def make_rule(
    config: MoeConfig,
    has_bias: bool,
    scores: str = "softmax",
    norm_topk_prob: bool | None = None,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int | None = None,
    experts_per_group_score: int | None = None,
    capacity_factor: float | None = None,
    drop_policy: str | None = None,
    sorted: bool = False,
) -> Rule:
    """Check each option, and fill in the defaults of the method.

    Raises
    ------
    TypeError, MoeConfigError
        If an option has the wrong type, is out of range, or means nothing for the method.
    """
    if not isinstance(config, MoeConfig):
        raise ArgumentTypeError(f"must be a MoeConfig, got {config!r}", argument="config")
    config.validate()
    method = config.routing_method
    k = config.num_experts_per_tok
    if scores not in ("softmax", "sigmoid"):
        raise MoeConfigError(f"must be 'softmax' or 'sigmoid', got {scores!r}", argument="scores")
    if drop_policy not in (None, "position", "probs"):
        raise MoeConfigError(
            f"must be 'position' or 'probs', got {drop_policy!r}", argument="drop_policy"
        )
    if method is RoutingMethod.EXPERT_CHOICE:
        given = (norm_topk_prob, has_bias or None, n_group > 1 or None, topk_group, drop_policy)
        for name, value in zip(TOKEN_CHOICE_ONLY, given, strict=True):
            if value is not None:
                raise MoeConfigError("has no meaning for expert_choice", argument=name)
    elif sorted:
        raise MoeConfigError(f"sorted has no meaning for {method}: its experts stand best first")
    if method is RoutingMethod.SWITCH_TRANSFORMER:
        if k != 1:
            raise MoeConfigError(
                f"must be 1 for switch_transformer, got {k}", argument="num_experts_per_tok"
            )
        if norm_topk_prob:
            raise MoeConfigError(
                "has no meaning for switch_transformer: one weight would become 1",
                argument="norm_topk_prob",
            )
    scale = as_number(routed_scaling_factor, "routed_scaling_factor")
    if not 0 < scale <= float(np.finfo(np.float32).max):
        raise MoeConfigError(
            f"must be a positive number, got {scale}", argument="routed_scaling_factor"
        )
    if capacity_factor is None:
        factor = {
            RoutingMethod.TOP_K: math.inf,
            RoutingMethod.SWITCH_TRANSFORMER: SWITCH_CAPACITY_FACTOR,
            RoutingMethod.EXPERT_CHOICE: 1.0,
        }[method]
    else:
        factor = as_number(capacity_factor, "capacity_factor")
        if not factor >= 0:
            raise MoeConfigError(f"must be at least 0, got {factor}", argument="capacity_factor")
    if drop_policy is None:
        drop_policy = "probs" if method is RoutingMethod.TOP_K else "position"
    groups = check_groups(config, n_group, topk_group, experts_per_group_score, scores)
    return Rule(
        method=method,
        num_experts=config.num_experts,
        num_experts_per_tok=k,
        is_sigmoid=scores == "sigmoid",
        norm_topk_prob=method is RoutingMethod.TOP_K and norm_topk_prob is not False,
        by_score=scores == "sigmoid" or has_bias or groups["n_group"] > 1,
        routed_scaling_factor=scale,
        capacity_factor=factor,
        drop_policy="probs" if drop_policy == "probs" else "position",
        sorted=sorted,
        **groups,
    )


def check_groups(
    config: MoeConfig,
    n_group: int,
    topk_group: int | None,
    experts_per_group_score: int | None,
    scores: str,
) -> dict[str, int]:
    """The options of group-limited routing; one group if all groups are kept."""
    n_group = as_index(n_group, "n_group", minimum=1)
    size = config.num_experts // n_group
    if size * n_group != config.num_experts:
        raise MoeConfigError(
            f"must divide {config.num_experts}, the number of experts, got {n_group}",
            argument="n_group",
        )
    topk_group = as_index(n_group if topk_group is None else topk_group, "topk_group", minimum=1)
    if topk_group > n_group:
        raise MoeConfigError(
            f"must be at most {n_group}, the number of groups, got {topk_group}",
            argument="topk_group",
        )
    if topk_group * size < config.num_experts_per_tok:
        raise MoeConfigError(
            f"must give a token at least {config.num_experts_per_tok} experts to choose from, "
            f"got {topk_group} of {size} experts each",
            argument="topk_group",
        )
    if experts_per_group_score is None:
        experts_per_group_score = min(size, 2 if scores == "sigmoid" else 1)
    best = as_index(experts_per_group_score, "experts_per_group_score", minimum=1)
    if best > size:
        raise MoeConfigError(
            f"must not exceed the {size} experts of a group, got {best}",
            argument="experts_per_group_score",
        )
    if topk_group == n_group:
        n_group = topk_group = 1
    return {"n_group": n_group, "topk_group": topk_group, "experts_per_group_score": best}


def as_bias(bias: npt.ArrayLike, num_experts: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The argument `selection_bias` in the dtype of the weights, checked."""
    array = widen_bfloat16(as_array(bias, "selection_bias"))
    if find_encoding(array.dtype)[1] is None and array.dtype.kind not in "iu":
        raise ArgumentTypeError(f"must hold numbers, got {array.dtype}", argument="selection_bias")
    if array.shape != (num_experts,):
        raise MoeConfigError(
            f"must have the shape (num_experts,) = ({num_experts},), got {array.shape}",
            argument="selection_bias",
        )
    array = np.ascontiguousarray(array, dtype)
    if not np.isfinite(array).all():
        raise MoeConfigError(f"must be finite in {dtype}", argument="selection_bias")
    return array
