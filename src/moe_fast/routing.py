"""Which experts every token goes to: top-k, Switch and expert choice, over arrays of logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import MoeConfigError, RoutingError, as_index, as_number
from moe_fast.reports import pandas_frame
from moe_fast.threads import as_threads, share

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Routing", "RoutingOptions", "route"]

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

# Indices and permutations are int32.
MOST_PAIRS = 2**31 - 1
# Waking a thread takes about as long as routing a quarter of these logits.
LOGITS_PER_THREAD = 2**16
# How the kernels read a row: as what it is, or as these 16-bit floats.
ENCODINGS = {"float32": 0, "float64": 0, "bfloat16": 1, "float16": 2}
# The kernels' rows are multiples of this, and experts choose so many at a time.
LANES = 16
# Tokens from which expert choice guesses how good a token must be.
SAMPLE = 512
# What expert choice has no use for: each of its experts takes the same number of tokens.
TOKEN_CHOICE_ONLY = ("norm_topk_prob", "selection_bias", "n_group", "topk_group", "drop_policy")
SWITCH_CAPACITY_FACTOR = 1.25


class RoutingOptions(TypedDict, total=False):
    """The options of `route`, for functions that pass them on."""

    scores: Literal["softmax", "sigmoid"]
    norm_topk_prob: bool | None
    routed_scaling_factor: float
    selection_bias: npt.ArrayLike | None
    n_group: int
    topk_group: int | None
    experts_per_group_score: int | None
    capacity_factor: float | None
    drop_policy: Literal["position", "probs"] | None
    sorted: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """A configuration and its options after checking."""

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
    drop_policy: str
    sorted: bool

    def capacity(self, num_tokens: int) -> int | None:
        """Pairs an expert takes at most; None where nothing limits them.

        `ceil(T * k / E * capacity_factor)` in floating point, as Megatron-LM computes it: where
        the product rounds up, one more than by exact arithmetic.
        """
        if self.capacity_factor == math.inf:
            return None
        share_of_expert = num_tokens * self.num_experts_per_tok / self.num_experts
        return math.ceil(share_of_expert * self.capacity_factor)


class Routing:
    """Where tokens go: T tokens, E experts, k experts a token, or C tokens an expert.

    Top-k and Switch hold, for each token, its experts; expert choice holds, for each expert, its
    tokens. `by_token` and `by_expert` give either form of either.

    Attributes
    ----------
    expert_indices : int32 [T, k]
        Experts of each token, best first; -1 where the expert was full. Not for expert choice.
    token_indices : int32 [E, C]
        Tokens of each expert, in token order, or best first if `sorted`. Only for expert choice.
    weights : float32 or float64, shape of the indices
        What to multiply an expert's output by; 0.0 where the expert was full. float64 for float64
        logits, float32 for all others.
    tokens_per_expert : int64 [E]
        Tokens that each expert receives.
    tokens_per_expert_before_drop : int64 [E]
        Tokens that chose each expert, before its capacity dropped any: what losses count.
    capacity : int or None
        Tokens an expert takes at most.
    num_dropped : int
        Pairs of a token and an expert that did not fit into the expert's capacity.
    """

    __slots__ = (
        "_asked",
        "_indices",
        "_offsets",
        "_permutation",
        "_sorted",
        "capacity",
        "method",
        "num_dropped",
        "num_tokens",
        "tokens_per_expert",
        "tokens_per_expert_before_drop",
        "weights",
    )

    method: RoutingMethod
    num_tokens: int
    capacity: int | None
    num_dropped: int
    weights: Floats
    tokens_per_expert: Counts
    tokens_per_expert_before_drop: Counts
    # What `route` was asked for and how it went about it, where it can do the same again.
    _asked: tuple[Any, ...] | None
    _indices: Indices
    _offsets: Counts
    _permutation: Indices
    _sorted: bool

    def __init__(
        self,
        method: RoutingMethod,
        num_tokens: int,
        num_experts: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        capacity: int | None,
    ) -> None:
        self._asked = None
        self.method = method
        self.num_tokens = num_tokens
        self.capacity = capacity
        self.num_dropped = 0
        self._indices = np.empty(shape, np.int32)
        self.weights = np.empty(shape, dtype)
        self.tokens_per_expert_before_drop = np.zeros(num_experts, np.int64)
        self.tokens_per_expert = self.tokens_per_expert_before_drop
        self._sorted = False

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return len(self.tokens_per_expert)

    @property
    def expert_indices(self) -> Indices:
        """int32 `[T, k]`: the experts of each token, best first; -1 where the expert was full."""
        if self.method is RoutingMethod.EXPERT_CHOICE:
            raise AttributeError(
                "expert choice gives token_indices of shape (num_experts, capacity); "
                "by_token() gives expert_indices"
            )
        return self._indices

    @property
    def token_indices(self) -> Indices:
        """int32 `[E, C]`: the tokens of each expert."""
        if self.method is not RoutingMethod.EXPERT_CHOICE:
            raise AttributeError(
                f"{self.method} gives expert_indices of shape (num_tokens, num_experts_per_tok); "
                "by_expert() gives token_indices"
            )
        return self._indices

    @property
    def num_unrouted(self) -> int:
        """Tokens that no expert takes: only the residual stream carries them on."""
        if self.method is RoutingMethod.EXPERT_CHOICE:
            return self.num_tokens - len(np.unique(self._indices))
        return int((self._indices < 0).all(axis=1).sum()) if self.num_dropped else 0

    @property
    def offsets(self) -> Counts:
        """int64 `[E + 1]`: expert e has the rows `offsets[e]:offsets[e + 1]` of the permutation."""
        self._sort()
        return self._offsets

    @property
    def permutation(self) -> Indices:
        """int32 `[N]`: the N kept pairs, flattened `token * k + slot`, sorted by expert, stably.

        `hidden_states[permutation // k]` are the rows for a grouped matrix multiplication.
        """
        self._sort()
        return self._permutation

    @property
    def inverse_permutation(self) -> Indices:
        """int32 `[T * k]`: where each flattened pair stands in `permutation`; -1 if dropped."""
        inverse = np.full(self._indices.size, -1, np.int32)
        inverse[self.permutation] = np.arange(len(self.permutation), dtype=np.int32)
        return inverse

    def _sort(self) -> None:
        if self._sorted:
            return
        pairs = self._indices.size
        if not hasattr(self, "_offsets"):
            self._offsets = np.zeros(self.num_experts + 1, np.int64)
            self._permutation = np.empty(pairs, np.int32)
        kept = pairs - self.num_dropped
        if len(self._permutation) != kept:
            self._permutation = np.empty(kept, np.int32)
        if self.method is RoutingMethod.EXPERT_CHOICE:
            np.cumsum(self.tokens_per_expert, out=self._offsets[1:])
            self._permutation[:] = np.arange(pairs, dtype=np.int32)
        else:
            kernels.compiled.sort_by_expert(
                self._indices.reshape(-1), self.tokens_per_expert, self._offsets, self._permutation
            )
        self._sorted = True

    def by_token(self) -> tuple[Indices, Floats]:
        """`(expert_indices, weights)`, a row a token: experts ascending for expert choice.

        Expert choice gives tokens different numbers of experts: rows are as wide as the longest,
        and end with -1 and weight 0.0.
        """
        if self.method is not RoutingMethod.EXPERT_CHOICE:
            return self._indices, self.weights
        experts = np.repeat(np.arange(self.num_experts, dtype=np.int32), self.tokens_per_expert)
        return ragged_rows(self._indices.reshape(-1), experts, self.weights, self.num_tokens)

    def by_expert(self, width: int | None = None) -> tuple[Indices, Floats]:
        """`(token_indices, weights)`, a row an expert: tokens ascending for top-k and Switch.

        Rows end with -1 and weight 0.0 up to `width`, by default the capacity, or without one the
        largest of `tokens_per_expert`.
        """
        if self.method is RoutingMethod.EXPERT_CHOICE:
            if width is not None:
                raise MoeConfigError("width is for top-k and Switch: expert choice is full")
            return self._indices, self.weights
        fullest = int(self.tokens_per_expert.max())
        if width is None:
            width = fullest if self.capacity is None else self.capacity
        if as_index(width, "width") < fullest:
            raise MoeConfigError(
                f"width must be at least {fullest}, the tokens of the fullest expert, got {width}"
            )
        k = self._indices.shape[1]
        pairs = self.permutation
        experts = np.repeat(np.arange(self.num_experts), self.tokens_per_expert)
        return ragged_rows(
            experts, pairs // np.int32(k), self.weights.reshape(-1)[pairs], self.num_experts, width
        )

    def to_frame(self) -> DataFrame:
        """The kept pairs as a pandas data frame: `token`, `expert`, `weight`, by token.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        experts, weights = self.by_token()
        kept = np.nonzero(experts >= 0)
        return pandas_frame({"token": kept[0], "expert": experts[kept], "weight": weights[kept]})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Routing):
            return NotImplemented
        same = ("method", "num_tokens", "capacity")
        arrays = ("_indices", "weights", "tokens_per_expert", "tokens_per_expert_before_drop")
        return all(getattr(self, name) == getattr(other, name) for name in same) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in arrays
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def __repr__(self) -> str:
        parts = [
            f"method={str(self.method)!r}",
            f"num_tokens={self.num_tokens}",
            f"num_experts={self.num_experts}",
        ]
        if self.method is not RoutingMethod.EXPERT_CHOICE:
            parts.append(f"num_experts_per_tok={self._indices.shape[1]}")
        if self.capacity is not None:
            parts += [f"capacity={self.capacity}", f"num_dropped={self.num_dropped}"]
        return f"Routing({', '.join(parts)})"


def ragged_rows(
    row: npt.NDArray[Any],
    index: Indices,
    weights: Floats,
    num_rows: int,
    width: int | None = None,
) -> tuple[Indices, Floats]:
    """Pairs as rows, each in the order of the pairs, ended by -1 and weight 0.0."""
    counts = np.bincount(row, minlength=num_rows)
    if width is None:
        width = int(counts.max(initial=0))
    order = np.argsort(row, kind="stable")
    row = row[order]
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    indices = np.full((num_rows, width), -1, np.int32)
    indices[row, place] = index[order]
    padded = np.zeros((num_rows, width), weights.dtype)
    padded[row, place] = weights.reshape(-1)[order]
    return indices, padded


def route(
    logits: npt.ArrayLike,
    config: MoeConfig,
    *,
    scores: Literal["softmax", "sigmoid"] = "softmax",
    norm_topk_prob: bool | None = None,
    routed_scaling_factor: float = 1.0,
    selection_bias: npt.ArrayLike | None = None,
    n_group: int = 1,
    topk_group: int | None = None,
    experts_per_group_score: int | None = None,
    capacity_factor: float | None = None,
    drop_policy: Literal["position", "probs"] | None = None,
    sorted: bool = False,
    out: Routing | None = None,
    threads: int | None = None,
) -> Routing:
    """Route tokens to experts by their router logits.

    Parameters
    ----------
    logits : array_like of float32, float64, bfloat16 or float16, shape (T, E)
        Rows may have any stride. 16-bit logits are computed with as float32.
    config : MoeConfig
        `num_experts` is E. `num_experts_per_tok` is k: the experts of a token, for expert choice
        on average. Switch takes 1.
    scores : "softmax" or "sigmoid"
        What a logit becomes. Softmax is over the experts (Shazeer et al. 2017), sigmoid is each
        expert's own (DeepSeek-V3).
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
        limit for top-k, 1.25 for Switch; `math.inf` is no limit. Expert choice takes exactly that
        many, or T if that is less, by default with a factor of 1.
    drop_policy : "position" or "probs", optional
        Who stays where an expert is full: the first tokens (the default for Switch), or those with
        the largest weights (for top-k), ties to the lower token.
    sorted : bool
        For expert choice: the tokens of an expert by falling weight, not in token order.
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
        An argument of the wrong type, out of range, or without a meaning for the method.
    RoutingError
        Logits of the wrong shape, or a NaN among them: the message names the first token that has
        one.

    Notes
    -----
    Among equals the lower expert wins, and between tokens the lower token. Softmax chooses by the
    logits themselves unless there is a bias or a group score of several experts. Logits may be
    infinite: infinity counts as the limit of one large number, so experts at +inf share the whole
    softmax, and where all are -inf they share it evenly. Softmax terms below the smallest normal
    number are 0.0. The same logits give the same bits at every number of threads and SIMD level.

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
    asked = (
        config, selection_bias is not None, scores, norm_topk_prob, routed_scaling_factor,
        n_group, topk_group, experts_per_group_score, capacity_factor, drop_policy, sorted,
    )  # fmt: skip
    if out is not None and routed_again(logits, (*asked, threads), out):
        return out
    rule = as_rule(*asked)
    rows, encoding, dtype = readable(logits, rule.num_experts)
    num_tokens = len(rows)
    workers = as_threads(threads)
    capacity = rule.capacity(num_tokens)
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
        out = Routing(rule.method, num_tokens, rule.num_experts, shape, dtype, capacity)
    else:
        reuse(out, rule, num_tokens, shape, dtype, capacity)
    if rule.method is RoutingMethod.EXPERT_CHOICE:
        experts_choose(rows, encoding, rule, out, workers)
    else:
        tokens_choose(
            rows, encoding, rule, as_bias(selection_bias, rule.num_experts, dtype), out, workers
        )
        if capacity is not None:
            drop(rule, out, capacity)
        if num_tokens == 1 and selection_bias is None and capacity != 0:
            again = (*asked, threads), *choice(rule)
            out._asked = *again, rule.num_experts, rule.num_experts_per_tok
    return out


def routed_again(logits: npt.ArrayLike, asked: tuple[Any, ...], out: Routing) -> bool:
    """Route one token into `out`, where nothing but the logits is new; tells whether it was so."""
    if not isinstance(out, Routing) or out._asked is None:
        return False
    bad = kernels.compiled.route_next_token(
        logits, out._indices, out.weights, out.tokens_per_expert_before_drop, asked, *out._asked
    )
    if bad is None:
        return False
    out.tokens_per_expert = out.tokens_per_expert_before_drop
    out._sorted = False
    if bad >= 0:
        raise_for_nan([bad])
    return True


def as_rule(*arguments: Any, **options: Any) -> Rule:
    """`checked_rule`, which remembers what it was asked, also for what cannot be remembered."""
    try:
        return remembered_rule(*arguments, **options)
    except TypeError:
        return checked_rule(*arguments, **options)


def checked_rule(
    config: MoeConfig,
    biased: bool,
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
    """The options, defaults filled in by method, each checked."""
    if not isinstance(config, MoeConfig):
        raise TypeError(f"config must be a MoeConfig, got {config!r}")
    config.validate()
    method = config.routing_method
    k = config.num_experts_per_tok
    if scores not in ("softmax", "sigmoid"):
        raise MoeConfigError(f"scores must be 'softmax' or 'sigmoid', got {scores!r}")
    if drop_policy not in (None, "position", "probs"):
        raise MoeConfigError(f"drop_policy must be 'position' or 'probs', got {drop_policy!r}")
    if method is RoutingMethod.EXPERT_CHOICE:
        given = (norm_topk_prob, biased or None, n_group > 1 or None, topk_group, drop_policy)
        for name, value in zip(TOKEN_CHOICE_ONLY, given, strict=True):
            if value is not None:
                raise MoeConfigError(f"{name} has no meaning for expert_choice")
    elif sorted:
        raise MoeConfigError(f"sorted has no meaning for {method}: its experts stand best first")
    if method is RoutingMethod.SWITCH_TRANSFORMER:
        if k != 1:
            raise MoeConfigError(
                "switch_transformer sends a token to one expert: "
                f"num_experts_per_tok must be 1, got {k}"
            )
        if norm_topk_prob:
            raise MoeConfigError(
                "norm_topk_prob has no meaning for switch_transformer: one weight would become 1"
            )
    scale = as_number(routed_scaling_factor, "routed_scaling_factor")
    if not 0 < scale <= float(np.finfo(np.float32).max):
        raise MoeConfigError(f"routed_scaling_factor must be a positive number, got {scale}")
    if capacity_factor is None:
        factor = {
            RoutingMethod.TOP_K: math.inf,
            RoutingMethod.SWITCH_TRANSFORMER: SWITCH_CAPACITY_FACTOR,
            RoutingMethod.EXPERT_CHOICE: 1.0,
        }[method]
    else:
        factor = as_number(capacity_factor, "capacity_factor")
        if not factor >= 0:
            raise MoeConfigError(f"capacity_factor must be at least 0, got {factor}")
    groups = checked_groups(config, n_group, topk_group, experts_per_group_score, scores)
    by_score = scores == "sigmoid" or biased or groups["n_group"] > 1
    return Rule(
        method=method,
        num_experts=config.num_experts,
        num_experts_per_tok=k,
        is_sigmoid=scores == "sigmoid",
        norm_topk_prob=method is RoutingMethod.TOP_K and norm_topk_prob is not False,
        routed_scaling_factor=scale,
        capacity_factor=factor,
        drop_policy=drop_policy or ("probs" if method is RoutingMethod.TOP_K else "position"),
        sorted=sorted,
        by_score=by_score,
        **groups,
    )


# 1 and True are equal, and only one of them is an integer here.
remembered_rule = lru_cache(maxsize=256, typed=True)(checked_rule)


def checked_groups(
    config: MoeConfig,
    n_group: int,
    topk_group: int | None,
    experts_per_group_score: int | None,
    scores: str,
) -> dict[str, int]:
    n_group = as_index(n_group, "n_group", minimum=1)
    size = config.num_experts // n_group
    if size * n_group != config.num_experts:
        raise MoeConfigError(
            f"n_group must divide num_experts ({config.num_experts}), got {n_group}"
        )
    topk_group = as_index(n_group if topk_group is None else topk_group, "topk_group", minimum=1)
    if topk_group > n_group:
        raise MoeConfigError(f"topk_group must not exceed n_group ({n_group}), got {topk_group}")
    if topk_group * size < config.num_experts_per_tok:
        raise MoeConfigError(
            f"topk_group ({topk_group}) groups of {size} experts hold fewer than "
            f"num_experts_per_tok ({config.num_experts_per_tok})"
        )
    if experts_per_group_score is None:
        experts_per_group_score = min(size, 2 if scores == "sigmoid" else 1)
    best = as_index(experts_per_group_score, "experts_per_group_score", minimum=1)
    if best > size:
        raise MoeConfigError(
            f"experts_per_group_score must not exceed the {size} experts of a group, got {best}"
        )
    if topk_group == n_group:
        n_group = topk_group = 1
    return {"n_group": n_group, "topk_group": topk_group, "experts_per_group_score": best}


def readable(
    logits: npt.ArrayLike, num_experts: int
) -> tuple[npt.NDArray[np.uint8], int, np.dtype[Any]]:
    """The bytes of each row, how to read them, and the dtype to compute in."""
    array = np.asarray(logits)
    encoding, dtype = reading(array.dtype)
    if dtype is None:
        raise TypeError(f"logits must be float32, float64, bfloat16 or float16, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] != num_experts:
        raise RoutingError(
            f"logits must have the shape (num_tokens, num_experts = {num_experts}), "
            f"got {array.shape}"
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.strides[1] != array.itemsize or not array.flags.aligned:
        array = array.copy()
    return array.view(np.uint8), encoding, dtype


@lru_cache(maxsize=64)  # NumPy works out the name of a dtype whenever it is asked for
def reading(dtype: np.dtype[Any]) -> tuple[int, np.dtype[Any] | None]:
    """How the kernels read a dtype and what they compute in; `None` where they do not."""
    encoding = ENCODINGS.get(dtype.name)
    if encoding is None:
        return 0, None
    return encoding, np.dtype(np.float64 if dtype.itemsize == 8 else np.float32)


def as_bias(
    bias: npt.ArrayLike | None, num_experts: int, dtype: np.dtype[Any]
) -> npt.NDArray[Any] | None:
    if bias is None:
        return None
    array = np.asarray(bias)
    if reading(array.dtype)[1] is None and array.dtype.kind not in "iu":
        raise TypeError(f"selection_bias must hold numbers, got {array.dtype}")
    if array.shape != (num_experts,):
        raise MoeConfigError(
            f"selection_bias must have the shape (num_experts,) = ({num_experts},), "
            f"got {array.shape}"
        )
    array = np.ascontiguousarray(array, dtype)
    if not np.isfinite(array).all():
        raise MoeConfigError("selection_bias must be finite")
    return array


def reuse(
    out: Routing,
    rule: Rule,
    num_tokens: int,
    shape: tuple[int, int],
    dtype: np.dtype[Any],
    capacity: int | None,
) -> None:
    """Make `out` ready to be written over; an error says where it does not fit."""
    if not isinstance(out, Routing):
        raise TypeError(f"out must be a Routing, got {type(out).__name__}")
    found = (out.method, out.num_tokens, out.num_experts, out.weights.shape, out.weights.dtype)
    if found != (rule.method, num_tokens, rule.num_experts, shape, dtype):
        raise MoeConfigError(
            f"out must be a routing by {rule.method} of {num_tokens} tokens to "
            f"{rule.num_experts} experts with {dtype} weights of shape {shape}, got {out!r} "
            f"with {out.weights.dtype} weights of shape {out.weights.shape}"
        )
    out._asked = None
    out.capacity = capacity
    out.num_dropped = 0
    out.tokens_per_expert = out.tokens_per_expert_before_drop
    out.tokens_per_expert.fill(0)
    out._sorted = False


def tokens_choose(
    rows: npt.NDArray[np.uint8],
    encoding: int,
    rule: Rule,
    bias: npt.NDArray[Any] | None,
    out: Routing,
    threads: int,
) -> None:
    """Fill the indices, the weights and the counts before anything is dropped."""
    kernel = kernels.compiled.route_tokens[specialisation(out.weights.dtype)]
    input = rows, encoding, bias, *choice(rule)
    if threads == 1:
        bad = kernel(
            *input, out._indices, out.weights, out.tokens_per_expert_before_drop, 0, len(rows)
        )
        if bad >= 0:
            raise_for_nan([bad])
        return
    ends: list[tuple[int, Counts]] = []

    def choose(start: int, stop: int) -> None:
        counts = np.zeros(rule.num_experts, np.int64)
        bad = kernel(*input, out._indices, out.weights, counts, start, stop)
        ends.append((bad, counts))

    share(choose, len(rows), threads, grain=LOGITS_PER_THREAD // rule.num_experts + 1)
    raise_for_nan(bad for bad, _ in ends)
    for _, counts in ends:
        out.tokens_per_expert_before_drop += counts


def choice(rule: Rule) -> tuple[bool, bool, bool, int, int, int, float]:
    """How tokens choose, as the kernels take it."""
    return (
        rule.is_sigmoid, rule.norm_topk_prob, rule.by_score,
        rule.n_group, rule.topk_group, rule.experts_per_group_score, rule.routed_scaling_factor,
    )  # fmt: skip


def drop(rule: Rule, out: Routing, capacity: int) -> None:
    """Take out what overflows."""
    fullest = int(out.tokens_per_expert_before_drop.max(initial=0))
    if fullest <= capacity:
        return
    kind = specialisation(out.weights.dtype)
    indices, weights = out._indices.reshape(-1), out.weights.reshape(-1)
    kept = np.zeros(rule.num_experts, np.int64)
    if rule.drop_policy == "position":
        out.num_dropped = kernels.compiled.drop_by_position[kind](indices, weights, capacity, kept)
    else:
        out._sort()
        out.num_dropped = kernels.compiled.drop_by_probability[kind](
            indices, weights, capacity, out._offsets, out._permutation, fullest, kept
        )
        out._sorted = False
    out.tokens_per_expert = kept


def experts_choose(
    rows: npt.NDArray[np.uint8], encoding: int, rule: Rule, out: Routing, threads: int
) -> None:
    """Fill the indices and the weights of expert choice."""
    num_tokens, capacity = len(rows), out.weights.shape[1]
    dtype, kind = out.weights.dtype, specialisation(out.weights.dtype)
    compiled = kernels.compiled
    input = rows, encoding, rule.num_experts, rule.is_sigmoid
    grain = LOGITS_PER_THREAD // rule.num_experts + 1
    pieces = max(1, min(threads, num_tokens // grain))

    def choose(first: int, bounds: npt.NDArray[Any], share_heard: float) -> list[int]:
        """Choose for the experts from `first` on; tells for which the bounds were no good."""
        most = -(-num_tokens // pieces)
        room = min(most, int(most * share_heard * 1.5) + 64)
        shape = pieces, len(bounds), room + LANES
        found, value = np.empty(shape, np.int32), np.empty(shape, dtype)
        count = np.zeros(shape[:2], np.int64)
        last = first + len(bounds)
        bad: list[int] = []

        def hear(start: int, stop: int) -> None:
            for i in range(start, stop):
                part = num_tokens * i // pieces, num_tokens * (i + 1) // pieces
                bad.append(
                    compiled.collect_candidates[kind](
                        *input, first, bounds, found[i], value[i], count[i], *part
                    )
                )

        def keep(start: int, stop: int) -> None:
            compiled.select_candidates[kind](
                bounds, found, value, count,
                out._indices[first:last], out.weights[first:last], start, stop,
            )  # fmt: skip

        share(hear, pieces, threads)
        raise_for_nan(bad)
        if capacity:
            share(keep, len(bounds), threads)
        missed: list[int] = (count[0] < 0).nonzero()[0].tolist()
        return missed

    out.tokens_per_expert_before_drop.fill(capacity)
    bounds = np.zeros(rule.num_experts, dtype)
    # Four standard deviations more than the sample's share.
    rank = capacity * SAMPLE // max(num_tokens, 1)
    rank += 4 * math.isqrt(rank) + 4
    if num_tokens < 4 * SAMPLE or rank > SAMPLE // 2:
        choose(0, bounds, 1.0)
    else:
        compiled.sample_thresholds[kind](rows, encoding, rule.is_sigmoid, SAMPLE, rank, bounds)
        for expert in choose(0, bounds, rank / SAMPLE):
            choose(expert, bounds[:1] * 0, 1.0)
    if rule.routed_scaling_factor != 1.0:
        out.weights *= rule.routed_scaling_factor
    if rule.sorted:
        order = np.argsort(-out.weights, axis=1, kind="stable")
        out._indices[:] = np.take_along_axis(out._indices, order, axis=1)
        out.weights[:] = np.take_along_axis(out.weights, order, axis=1)


def raise_for_nan(first_bad: Iterable[int]) -> None:
    bad = [token for token in first_bad if token >= 0]
    if bad:
        raise RoutingError(f"logits of token {min(bad)} hold a NaN")


def specialisation(dtype: np.dtype[Any]) -> str:
    """Which of a kernel's two forms computes in `dtype`."""
    return "double" if dtype == np.float64 else "float"
