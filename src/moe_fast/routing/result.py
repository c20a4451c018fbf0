"""Where tokens go: the result of routing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.checks import as_index
from moe_fast.config import RoutingMethod
from moe_fast.errors import MoeConfigError
from moe_fast.reports import pandas_frame

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["Routing"]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Indices = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


class Softmax(NamedTuple):
    """The softmax of logits, `[T, E]`, and the log-sum-exp of each token, float64 `[T]`."""

    probabilities: Floats
    log_sums: npt.NDArray[np.float64]


class Routing:
    """Which experts T tokens go to: k of E experts per token, or C tokens per expert.

    Top-k and Switch hold the experts of each token, expert choice the tokens of each expert.
    `by_token` and `by_expert` give either form of any routing.

    Attributes
    ----------
    expert_indices : int32 [T, k]
        Experts of each token, best first; -1 if the expert was full. Not for expert choice.
    token_indices : int32 [E, C]
        Tokens of each expert, in token order, or best first if `sorted`. Only for expert choice.
    indices : int32 [T, k] or [E, C]
        `expert_indices` or `token_indices`, whichever the method gives.
    weights : float32 or float64, shape of the indices
        Factors of the experts' outputs; 0.0 if the expert was full. float64 for float64 logits,
        float32 for all others.
    tokens_per_expert : int64 [E]
        Tokens that each expert receives.
    tokens_per_expert_before_drop : int64 [E]
        Tokens that chose each expert, before its capacity dropped any: what losses count.
    capacity : int or None
        The most tokens that an expert takes; `None` means no limit.
    num_dropped : int
        Pairs of a token and an expert that did not fit into the expert's capacity.
    """

    __slots__ = (
        "_is_sorted",
        "_offsets",
        "_permutation",
        "capacity",
        "indices",
        "last_call",
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
    indices: Indices
    weights: Floats
    tokens_per_expert: Counts
    tokens_per_expert_before_drop: Counts
    # The call that wrote this, if another token can be routed in the same way: see `route_again`.
    last_call: tuple[Any, ...] | None
    _offsets: Counts
    _permutation: Indices
    _is_sorted: bool

    def __init__(
        self,
        method: RoutingMethod,
        num_tokens: int,
        num_experts: int,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        capacity: int | None,
    ) -> None:
        self.last_call = None
        self.method = method
        self.num_tokens = num_tokens
        self.capacity = capacity
        self.indices = np.empty(shape, np.int32)
        self.weights = np.empty(shape, dtype)
        self.tokens_per_expert_before_drop = np.zeros(num_experts, np.int64)
        self.set_counts(self.tokens_per_expert_before_drop, 0)

    def set_counts(self, tokens_per_expert: Counts, num_dropped: int) -> None:
        """Set what the experts receive, after the indices have changed."""
        self.tokens_per_expert = tokens_per_expert
        self.num_dropped = num_dropped
        self._is_sorted = False

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
        return self.indices

    @property
    def token_indices(self) -> Indices:
        """int32 `[E, C]`: the tokens of each expert."""
        if self.method is not RoutingMethod.EXPERT_CHOICE:
            raise AttributeError(
                f"{self.method} gives expert_indices of shape (num_tokens, num_experts_per_tok); "
                "by_expert() gives token_indices"
            )
        return self.indices

    @property
    def num_unrouted(self) -> int:
        """Number of tokens that no expert takes; only the residual stream carries them on."""
        if self.method is RoutingMethod.EXPERT_CHOICE:
            return self.num_tokens - len(np.unique(self.indices))
        return int((self.indices < 0).all(axis=1).sum()) if self.num_dropped else 0

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
        inverse = np.full(self.indices.size, -1, np.int32)
        inverse[self.permutation] = np.arange(len(self.permutation), dtype=np.int32)
        return inverse

    def _sort(self) -> None:
        if self._is_sorted:
            return
        pairs = self.indices.size
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
                self.indices.reshape(-1), self.tokens_per_expert, self._offsets, self._permutation
            )
        self._is_sorted = True

    def by_token(self) -> tuple[Indices, Floats]:
        """Return `(expert_indices, weights)` with one row per token.

        For expert choice, the experts of a row ascend. Tokens then have different numbers of
        experts: rows are as wide as the longest, and end with -1 and weight 0.0.
        """
        if self.method is not RoutingMethod.EXPERT_CHOICE:
            return self.indices, self.weights
        experts = np.repeat(np.arange(self.num_experts, dtype=np.int32), self.tokens_per_expert)
        return fill_rows(self.indices.reshape(-1), experts, self.weights, self.num_tokens)

    def by_expert(self, width: int | None = None) -> tuple[Indices, Floats]:
        """Return `(token_indices, weights)` with one row per expert.

        For top-k and Switch, the tokens of a row ascend. Rows are filled with -1 and weight 0.0 up
        to `width`, by default the capacity, or without one the largest of `tokens_per_expert`.
        """
        if self.method is RoutingMethod.EXPERT_CHOICE:
            if width is not None:
                raise MoeConfigError(
                    "is for top-k and Switch: expert choice is full", argument="width"
                )
            return self.indices, self.weights
        fullest = int(self.tokens_per_expert.max())
        if width is None:
            width = fullest if self.capacity is None else self.capacity
        if as_index(width, "width") < fullest:
            raise MoeConfigError(
                f"must be at least {fullest}, the tokens of the fullest expert, got {width}",
                argument="width",
            )
        k = self.indices.shape[1]
        pairs = self.permutation
        experts = np.repeat(np.arange(self.num_experts), self.tokens_per_expert)
        return fill_rows(
            experts, pairs // np.int32(k), self.weights.reshape(-1)[pairs], self.num_experts, width
        )

    def to_frame(self) -> DataFrame:
        """Return the kept pairs as a pandas data frame: `token`, `expert`, `weight`, by token.

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
        arrays = ("indices", "weights", "tokens_per_expert", "tokens_per_expert_before_drop")
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
            parts.append(f"num_experts_per_tok={self.indices.shape[1]}")
        if self.capacity is not None:
            parts += [f"capacity={self.capacity}", f"num_dropped={self.num_dropped}"]
        return f"Routing({', '.join(parts)})"


def fill_rows(
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
