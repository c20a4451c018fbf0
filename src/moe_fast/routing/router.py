"""Which experts every token goes to: top-k, Switch and expert choice, over arrays of logits."""

from __future__ import annotations

import math
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from numpy import ndarray

from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import ArgumentTypeError, MoeConfigError, RoutingError
from moe_fast.routing.arrays import as_array, view_rows, widen_bfloat16
from moe_fast.routing.choose import choose_experts, choose_tokens, drop_overflow, route_again
from moe_fast.routing.options import (
    DropPolicy,
    RoutingOptions,
    Rule,
    Scores,
    as_bias,
    make_rule,
)
from moe_fast.routing.result import Routing
from moe_fast.threads import as_threads

__all__ = ["Router", "route"]
# Indices and permutations are int32.
MOST_PAIRS = 2**31 - 1


class Router:
    """Routes tokens to experts; its options are checked once, as `re.compile` checks a pattern.

    `router(logits)` is `route(logits, config, **options)`. Routers are equal if they route alike.

    Parameters
    ----------
    config : MoeConfig
        The number of experts, the experts per token, and the method.
    **options
        Those of `route`, which `RoutingOptions` lists. A `selection_bias` is copied.

    Attributes
    ----------
    config : MoeConfig
        The configuration.
    options : RoutingOptions
        The options that were given.

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type, is out of range, or has no meaning for the method.

    Examples
    --------
    >>> import numpy as np
    >>> from moe_fast import MoeConfig, Router
    >>> router = Router(MoeConfig(num_experts=4), scores="sigmoid", norm_topk_prob=False)
    >>> routing = router(np.array([[0.0, 2.0, 1.0, -1.0]], dtype=np.float32))
    >>> routing.expert_indices
    array([[1, 2]], dtype=int32)
    >>> routing = router(np.array([[3.0, 0.0, 0.0, 4.0]], dtype=np.float32), out=routing)
    >>> routing.expert_indices
    array([[3, 0]], dtype=int32)
    """

    __slots__ = ("config", "options", "rule", "selection_bias")

    config: MoeConfig
    options: RoutingOptions
    # What configuration and options mean together, for the rest of the package.
    rule: Rule
    selection_bias: npt.NDArray[Any] | None

    def __init__(self, config: MoeConfig, **options: Unpack[RoutingOptions]) -> None:
        known = RoutingOptions.__annotations__
        for name in options:
            if name not in known:
                raise TypeError(
                    f"Router got an unexpected keyword argument {name!r}; its options are "
                    + ", ".join(known)
                )
        values: dict[str, Any] = {**options}
        bias = values.pop("selection_bias", None)
        self.rule = make_rule(config, bias is not None, **values)
        self.config = config
        self.options = options
        self.selection_bias = None
        if bias is not None:
            bias = widen_bfloat16(as_array(bias, "selection_bias")).copy()
            as_bias(bias, config.num_experts, np.dtype(np.float64))
            options["selection_bias"] = self.selection_bias = bias

    def __call__(
        self,
        logits: npt.ArrayLike,
        *,
        out: Routing | None = None,
        threads: int | None = None,
    ) -> Routing:
        """Route tokens by their logits; the arguments, results and errors are those of `route`."""
        if type(logits) is not ndarray:
            logits = as_array(logits, "logits")
        call = (self, threads)
        if out is not None and route_again(logits, call, out):
            return out
        return route_tokens(logits, self.rule, self.selection_bias, out, threads, call)

    def replace(self, **options: Unpack[RoutingOptions]) -> Router:
        """A router with some options changed.

        Examples
        --------
        >>> from moe_fast import MoeConfig, Router
        >>> router = Router(MoeConfig(num_experts=4), scores="sigmoid")
        >>> router.replace(capacity_factor=1.25).options
        {'scores': 'sigmoid', 'capacity_factor': 1.25}
        """
        changed: RoutingOptions = {**self.options, **options}
        return Router(self.config, **changed)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Router):
            return NotImplemented
        if self.rule != other.rule:
            return False
        if self.selection_bias is None or other.selection_bias is None:
            return self.selection_bias is other.selection_bias
        return np.array_equal(self.selection_bias, other.selection_bias)

    def __hash__(self) -> int:
        return hash(self.rule)

    def __repr__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"Router({self.config!r}{options})"


def without_capacity(router: Router) -> Router:
    """A router that drops nothing; itself if it does not. Not for expert choice."""
    if router.rule.capacity_factor == math.inf:
        return router
    return router.replace(capacity_factor=math.inf)


def make_router(config: MoeConfig | Router, options: RoutingOptions) -> Router:
    """The argument `config`, a `Router` already or the configuration of one."""
    if not isinstance(config, Router):
        return Router(config, **options)
    if options:
        name = next(iter(options))
        raise MoeConfigError(
            f"is an option of the router that is given as config: use router.replace({name}=...)",
            argument=name,
        )
    return config


def route(
    logits: npt.ArrayLike,
    config: MoeConfig,
    *,
    scores: Scores = "softmax",
    norm_topk_prob: bool | None = None,
    routed_scaling_factor: float = 1.0,
    selection_bias: npt.ArrayLike | None = None,
    n_group: int = 1,
    topk_group: int | None = None,
    experts_per_group_score: int | None = None,
    capacity_factor: float | None = None,
    drop_policy: DropPolicy | None = None,
    sorted: bool = False,
    out: Routing | None = None,
    threads: int | None = None,
) -> Routing:
    """Route tokens to experts by their router logits.

    Parameters
    ----------
    logits : array_like of float32, float64, bfloat16 or float16, shape (T, E)
        Rows may have any stride. 16-bit logits are computed with as float32. Torch tensors on the
        CPU are read where they are, whether they require gradients or not.
    config : MoeConfig
        `num_experts` is E. `num_experts_per_tok` is k: the experts of a token, for expert choice
        on average. Switch requires 1.
    scores : "softmax" or "sigmoid"
        The function that turns logits into scores: softmax over the experts (Shazeer et al. 2017)
        or sigmoid of each logit (DeepSeek-V3, arXiv 2412.19437).
    norm_topk_prob : bool, optional
        Divide the weights of a token by their sum, before anything is dropped. By default True
        for top-k; Switch never does, since one weight would always be 1 and its router learn
        nothing (Fedus et al. 2022).
    routed_scaling_factor : float
        Multiplies the weights.
    selection_bias : array_like, shape (E,), optional
        Added to the scores for the choice alone, not for the weights (DeepSeek-V3's
        `e_score_correction_bias`).
    n_group, topk_group, experts_per_group_score : int, optional
        Experts stand in `n_group` groups of equal size, and a token chooses among the
        `topk_group` best. A group's score is the sum of its `experts_per_group_score` best
        experts': by default 1 for softmax (DeepSeek-V2), 2 for sigmoid (DeepSeek-V3).
    capacity_factor : float, optional
        Each expert takes at most `ceil(T * k / E * capacity_factor)` tokens. By default without
        limit for top-k, 1.25 for Switch; `math.inf` means no limit. Expert choice takes exactly
        that many, or T if that is less, by default with a factor of 1.
    drop_policy : "position" or "probs", optional
        Which tokens a full expert keeps: the first ones (the default for Switch), or those with the
        largest weights (the default for top-k); among equal weights, the first tokens.
    sorted : bool
        For expert choice: return the tokens of an expert by descending weight, not in token order.
    out : Routing, optional
        A routing of the same shape, dtype and method, whose arrays are written over.
    threads : int, optional
        By default `MOE_FAST_NUM_THREADS`, or 1. The result does not depend on it.

    Returns
    -------
    Routing

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type, is out of range, or has no meaning for the method.
    RoutingError
        If logits have the wrong shape, are on another device, or contain a NaN; the message names
        the first token that has one.

    See Also
    --------
    Router : The same with options that are checked once, for many calls.
    moe_fast.torch.route : Tensors in, tensors out, with gradients.

    Notes
    -----
    Among equal scores the lower expert wins, and among tokens the lower token. Softmax chooses by
    the logits themselves unless there is a bias or a group score of several experts. Logits may be
    infinite: infinity counts as the limit of one large number, so experts at +inf share the whole
    softmax, and where all are -inf they share it evenly. Softmax terms below the smallest normal
    number are 0.0. The result does not depend on the number of threads or the SIMD level.

    Examples
    --------
    >>> import numpy as np
    >>> from moe_fast import MoeConfig, route
    >>> logits = np.array([[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]], dtype=np.float32)
    >>> routing = route(logits, MoeConfig(num_experts=3))
    >>> routing.expert_indices
    array([[1, 2],
           [0, 1]], dtype=int32)
    >>> routing.weights.round(4)
    array([[0.7311, 0.2689],
           [0.5   , 0.5   ]], dtype=float32)
    >>> routing.offsets
    array([0, 1, 3, 4])
    """
    if type(logits) is not ndarray:  # Calling as_array takes a tenth of one token's time.
        logits = as_array(logits, "logits")
    call = (
        config, selection_bias is not None, scores, norm_topk_prob, routed_scaling_factor,
        n_group, topk_group, experts_per_group_score, capacity_factor, drop_policy, sorted,
        threads,
    )  # fmt: skip
    if out is not None and route_again(logits, call, out):
        return out
    # What a Router does, less the copy of the bias.
    return route_tokens(logits, make_rule(*call[:-1]), selection_bias, out, threads, call)


def route_tokens(
    logits: npt.NDArray[Any],
    rule: Rule,
    selection_bias: npt.ArrayLike | None,
    out: Routing | None,
    threads: int | None,
    call: tuple[object, ...],
) -> Routing:
    """Route by a rule; remember `call` in the result if `route_again` can repeat it."""
    rows = view_rows(logits, rule.num_experts)
    num_tokens = len(logits)
    workers = as_threads(threads)
    capacity = rule.compute_capacity(num_tokens)
    if rule.method is RoutingMethod.EXPERT_CHOICE:
        capacity = num_tokens if capacity is None else min(capacity, num_tokens)
        shape = (rule.num_experts, capacity)
    else:
        shape = (num_tokens, rule.num_experts_per_tok)
    if out is None:
        if shape[0] * shape[1] > MOST_PAIRS:
            raise RoutingError(
                f"{shape[0]} x {shape[1]} pairs do not fit into int32 indices; route in batches"
            )
        out = Routing(rule.method, num_tokens, rule.num_experts, shape, rows.dtype, capacity)
    else:
        check_out(out, rule, num_tokens, shape, rows.dtype)
        out.last_call = None
        out.capacity = capacity
        out.tokens_per_expert_before_drop.fill(0)
        out.set_counts(out.tokens_per_expert_before_drop, 0)
    if rule.method is RoutingMethod.EXPERT_CHOICE:
        choose_tokens(rows, rule, out, workers)
        return out
    bias = None
    if selection_bias is not None:
        bias = as_bias(selection_bias, rule.num_experts, rows.dtype)
    choose_experts(rows, rule, bias, out, workers)
    if capacity is not None:
        drop_overflow(rule, out, capacity)
    if num_tokens == 1 and bias is None and capacity != 0:
        arguments = rule.as_kernel_arguments()
        out.last_call = (call, *arguments, rule.num_experts, rule.num_experts_per_tok)
    return out


def check_out(
    out: Routing, rule: Rule, num_tokens: int, shape: tuple[int, int], dtype: np.dtype[Any]
) -> None:
    """Raise if `out` is not a routing by this rule, of this shape and dtype."""
    if not isinstance(out, Routing):
        raise ArgumentTypeError(f"must be a Routing, got {type(out).__name__}", argument="out")
    found = (out.method, out.num_tokens, out.num_experts, out.weights.shape, out.weights.dtype)
    if found != (rule.method, num_tokens, rule.num_experts, shape, dtype):
        raise MoeConfigError(
            f"must be a routing by {rule.method} of {num_tokens} tokens to "
            f"{rule.num_experts} experts with {dtype} weights of shape {shape}, got {out!r} "
            f"with {out.weights.dtype} weights of shape {out.weights.shape}",
            argument="out",
        )
