"""What routers do to their experts: load, losses, collapse and capacity, over many batches."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.checks import as_index, as_number
from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import MoeConfigError, RoutingError
from moe_fast.plain import check_keys
from moe_fast.reports import pandas_frame
from moe_fast.routing.router import (
    LANES,
    LOGITS_PER_THREAD,
    Routing,
    RoutingOptions,
    as_bias,
    as_rule,
    raise_for_nan,
    readable,
    route,
    specialisation,
)
from moe_fast.threads import as_threads, share

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["RoutingStats", "plan_capacity", "update_selection_bias"]
Float64 = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
# Sums are kept as integers in these units, so that their order does not matter.
UNIT = 2.0**-32
ENTROPY_UNIT = 2.0**-24
# With more, the probabilities of one expert could add up to more than 64 bits.
MOST_TOKENS = 2**31
# What is routed and then added up while it is still in the cache; a kernel adds up to 2^20 tokens
# exactly.
LOGITS_AT_A_TIME = 2**20
TOKENS_AT_A_TIME = 2**20
# Experts starve below this part of an even load, and dominate above this multiple of it, or where
# nearly every token chooses them.
STARVING = 0.25
DOMINATING = 3.0
NEARLY_ALL = 0.9
SUMS = (
    "num_tokens",
    "counts",
    "num_dropped",
    "num_unrouted",
    "_dropped_by_factor",
    "_probability",
    "_importance",
    "_entropy",
    "_square",
)
KEYS = ("config", "options", "capacity_factors", "num_layers", "sums")
# What of a summary is no single number.
LISTS = ("load", "starving_experts", "dominating_experts", "description")


class RoutingStats:
    """Statistics of routers of the same kind, one a layer, over any number of batches.

    All are sums over tokens kept as integers: the result does not depend on how tokens are split
    into batches, files, threads or processes, nor on the order of merging. (What a capacity drops
    does depend on the batches, because a capacity is one of a batch.)

    Parameters
    ----------
    config : MoeConfig
        What is routed, and how; E is its number of experts, k its number of experts a token.
    num_layers : int
        L, the routers that are told apart.
    capacity_factors : sequence of float
        For each, what it would drop is counted too.
    **options
        Those of `route`.

    Attributes
    ----------
    num_tokens : int64 [L]
        Tokens added.
    counts : int64 [L, E]
        Tokens that chose each expert, before any was dropped.
    num_dropped : int64 [L]
        Pairs of a token and an expert that did not fit into the expert's capacity.
    num_unrouted : int64 [L]
        Tokens that no expert takes.

    Examples
    --------
    >>> import numpy as np
    >>> from moe_fast import MoeConfig, RoutingStats
    >>> stats = RoutingStats(MoeConfig(num_experts=4))
    >>> for seed in range(3):
    ...     stats.update(np.random.default_rng(seed).standard_normal((1000, 4)))
    >>> stats.load.round(2)
    array([[0.26, 0.25, 0.24, 0.25]])
    >>> print(stats.describe())
    layer 0: even load (coefficient of variation 0.02, works like 4.0 of 4 experts)
    """

    def __init__(
        self,
        config: MoeConfig,
        num_layers: int = 1,
        *,
        capacity_factors: Sequence[float] = (),
        **options: Unpack[RoutingOptions],
    ) -> None:
        self.config = config
        self.options = options
        bias = options.get("selection_bias")
        checked = {name: value for name, value in options.items() if name != "selection_bias"}
        self._rule = as_rule(config, bias is not None, **checked)
        as_bias(bias, config.num_experts, np.dtype(np.float64))
        self.capacity_factors = as_factors(capacity_factors)
        num_layers = as_index(num_layers, "num_layers", minimum=1)
        shape = (num_layers, config.num_experts)
        self.num_tokens = np.zeros(num_layers, np.int64)
        self.counts = np.zeros(shape, np.int64)
        self.num_dropped = np.zeros(num_layers, np.int64)
        self.num_unrouted = np.zeros(num_layers, np.int64)
        self._dropped_by_factor = np.zeros((num_layers, len(self.capacity_factors)), np.int64)
        self._probability = np.zeros(shape, np.uint64)
        self._importance = np.zeros(shape, np.uint64)
        # Python's integers, which do not overflow; a square may be infinite.
        self._entropy = np.zeros(num_layers, object)
        self._square = np.zeros(num_layers, object)

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return len(self.num_tokens)

    def update(
        self,
        logits: npt.ArrayLike,
        layer: int = 0,
        *,
        tokens_per_batch: int | None = None,
        threads: int | None = None,
    ) -> None:
        """Route tokens of one layer and add them up.

        Parameters
        ----------
        logits : array_like of float32, float64, bfloat16 or float16, shape (T, E)
            Memory-mapped arrays are read a piece at a time.
        layer : int
            Which of the layers these are of.
        tokens_per_batch : int, optional
            Tokens that share a capacity; by default all of this array.
        threads : int, optional
            By default `MOE_FAST_NUM_THREADS`, or 1. The result does not depend on it.

        Raises
        ------
        TypeError, MoeConfigError
            An argument of the wrong type or out of range.
        RoutingError
            As for `route`. Nothing has been added then.
        """
        layer = as_index(layer, "layer")
        if layer >= self.num_layers:
            raise MoeConfigError(f"layer must be below num_layers ({self.num_layers}), got {layer}")
        array = np.asarray(logits)
        if array.ndim == 3:
            raise RoutingError(
                f"logits {array.shape} are those of several layers; give one at a time, as in "
                "update(logits[2], layer=2)"
            )
        # What cannot be read as it stands is copied, and that only a piece at a time.
        readable(array[:0] if array.ndim == 2 else array, self.config.num_experts)
        num_tokens = len(array)
        if self.num_tokens[layer] + num_tokens > MOST_TOKENS:
            raise MoeConfigError(f"logits hold too many tokens: at most {MOST_TOKENS} to a layer")
        added = RoutingStats(self.config, capacity_factors=self.capacity_factors, **self.options)
        size = num_tokens if tokens_per_batch is None else tokens_per_batch
        size = max(1, as_index(size, "tokens_per_batch", minimum=0 if num_tokens == 0 else 1))
        for start in range(0, num_tokens, size):
            added._add_batch(array, start, min(start + size, num_tokens), as_threads(threads))
        for name in SUMS:
            getattr(self, name)[layer] += getattr(added, name)[0]

    def _add_batch(self, logits: npt.NDArray[Any], start: int, stop: int, threads: int) -> None:
        """Add one batch, which shares a capacity."""
        if self._rule.method is RoutingMethod.EXPERT_CHOICE:
            self._add_probabilities(logits, start, stop, threads)
            routing = route(logits[start:stop], self.config, threads=threads, **self.options)
            self._add_choice(routing)
            self.num_unrouted[0] += routing.num_unrouted
            self.num_tokens[0] += stop - start
            return
        before = self.counts[0].copy()
        unlimited: RoutingOptions = {**self.options, "capacity_factor": math.inf}
        size = max(1, LOGITS_AT_A_TIME // self.config.num_experts)
        out = None
        for first in range(start, stop, size):
            last = min(first + size, stop)
            self._add_probabilities(logits, first, last, threads)
            if last - first < size:
                out = None
            out = route(logits[first:last], self.config, out=out, threads=threads, **unlimited)
            self._add_choice(out)
        tokens = stop - start
        self.num_tokens[0] += tokens
        counts = self.counts[0] - before
        for i, factor in enumerate(self.capacity_factors):
            capacity = dataclasses.replace(self._rule, capacity_factor=factor).capacity(tokens)
            self._dropped_by_factor[0, i] += overflow(counts, capacity)
        dropped = overflow(counts, self._rule.capacity(tokens))
        self.num_dropped[0] += dropped
        if self._rule.num_experts_per_tok == 1:
            self.num_unrouted[0] += dropped
        elif dropped:
            routing = route(logits[start:stop], self.config, threads=threads, **self.options)
            self.num_unrouted[0] += routing.num_unrouted

    def _add_probabilities(
        self, logits: npt.NDArray[Any], start: int, stop: int, threads: int
    ) -> None:
        num_experts = self.config.num_experts
        rows, encoding, dtype = readable(logits[start:stop], num_experts)
        kernel = kernels.compiled.add_statistics[specialisation(dtype)]
        ends: list[tuple[int, Float64, Float64]] = []

        def add(first: int, start: int, stop: int) -> None:
            work = np.empty((2, LANES * num_experts), dtype)
            probability, totals = np.zeros(num_experts), np.zeros(3)
            bad = kernel(
                rows, encoding, num_experts, self._rule.is_sigmoid, work, probability, totals,
                first + start, first + stop,
            )  # fmt: skip
            ends.append((bad, probability, totals))

        for first in range(0, stop - start, TOKENS_AT_A_TIME):
            last = min(first + TOKENS_AT_A_TIME, stop - start)
            share(
                partial(add, first),
                last - first,
                threads,
                grain=LOGITS_PER_THREAD // num_experts + 1,
            )
        raise_for_nan(bad + start for bad, _, _ in ends if bad >= 0)
        for _, probability, (entropy, whole, rest) in ends:
            self._probability[0] += in_units(probability)
            self._entropy[0] += int(entropy / ENTROPY_UNIT)
            self._square[0] += whole if math.isinf(whole) else int(whole) * 2**32 + int(rest / UNIT)

    def _add_choice(self, routing: Routing) -> None:
        self.counts[0] += routing.tokens_per_expert_before_drop
        indices, weights = routing._indices, routing.weights
        if self._rule.method is RoutingMethod.EXPERT_CHOICE:
            indices = np.broadcast_to(
                np.arange(routing.num_experts, dtype=np.int32)[:, np.newaxis], weights.shape
            ).copy()
        kernel = kernels.compiled.add_weights[specialisation(weights.dtype)]
        for pairs in range(0, weights.size, TOKENS_AT_A_TIME):
            importance = np.zeros(routing.num_experts)
            kernel(
                indices.reshape(-1)[pairs : pairs + TOKENS_AT_A_TIME],
                weights.reshape(-1)[pairs : pairs + TOKENS_AT_A_TIME],
                self._rule.routed_scaling_factor,
                importance,
            )
            self._importance[0] += in_units(importance)

    @property
    def load(self) -> Float64:
        """`[L, E]`: the share of all choices that fell on each expert; 1 / E where even."""
        return quotient(self.counts, self.counts.sum(axis=1, keepdims=True))

    @property
    def mean_probabilities(self) -> Float64:
        """`[L, E]`: each expert's mean probability; sigmoid scores are divided by their sum."""
        return quotient(self._probability * UNIT, self.num_tokens[:, np.newaxis])

    @property
    def importance(self) -> Float64:
        """`[L, E]`: sums of weights before any was dropped (Shazeer et al. 2017, equation 6)."""
        return self._importance.astype(np.float64) * (UNIT * self._rule.routed_scaling_factor)

    @property
    def mean_entropy(self) -> Float64:
        """`[L]`: the mean entropy of a token's probabilities, in nats; ln E where undecided."""
        return quotient(self._entropy.astype(np.float64) * ENTROPY_UNIT, self.num_tokens)

    @property
    def coefficient_of_variation(self) -> Float64:
        """`[L]`: standard deviation over mean of the load; 0 where even."""
        return np.sqrt(squared_variation(self.counts))

    @property
    def effective_num_experts(self) -> Float64:
        """`[L]`: exponential of the load's entropy; E where even, 1 where one expert has it all."""
        load = self.load
        entropy = -(load * np.log(np.where(load > 0, load, 1.0))).sum(axis=1)
        result: Float64 = np.exp(entropy)
        return result

    @property
    def share_dropped(self) -> Float64:
        """`[L]`: the share of all choices that did not fit into their expert's capacity."""
        return quotient(self.num_dropped, self.counts.sum(axis=1))

    @property
    def share_unrouted(self) -> Float64:
        """`[L]`: the share of tokens that no expert takes."""
        return quotient(self.num_unrouted, self.num_tokens)

    @property
    def share_dropped_by_capacity_factor(self) -> Float64:
        """`[L, F]`: what each of `capacity_factors` would drop, as a share of all choices."""
        return quotient(self._dropped_by_factor, self.counts.sum(axis=1, keepdims=True))

    def load_balancing_loss(self, alpha: float = 1.0) -> Float64:
        """`[L]`: `alpha * E * sum(f * P)`, f the load and P the mean probabilities; alpha if even.

        The convention of the Switch Transformer (Fedus et al. 2022, equation 4) and Megatron-LM.
        """
        product: Float64 = (self.load * self.mean_probabilities).sum(axis=1)
        return alpha * self.config.num_experts * product

    def huggingface_load_balancing_loss(self, alpha: float = 1.0) -> float:
        """The same sum as transformers' models have it: all layers as one, f not divided by k.

        `alpha * k` where the load is even.
        """
        tokens = self.num_tokens.sum()
        f = quotient(self.counts.sum(axis=0), tokens)
        p = quotient((self._probability * UNIT).sum(axis=0), tokens)
        return float(alpha * self.config.num_experts * (f * p).sum())

    def z_loss(self, alpha: float = 1.0) -> Float64:
        """`[L]`: `alpha` times the mean squared log-sum-exp of the logits (Zoph et al. 2022).

        Infinite where a log-sum-exp exceeds 65536.
        """
        squares = np.array([square * UNIT for square in self._square.tolist()], np.float64)
        return alpha * quotient(squares, self.num_tokens)

    def importance_loss(self, alpha: float = 1.0) -> Float64:
        """`[L]`: `alpha` times the squared coefficient of variation of `importance`.

        Shazeer et al. 2017, equation 7.
        """
        return alpha * squared_variation(self._importance * UNIT)

    def starving_experts(self, below: float = STARVING) -> list[list[int]]:
        """For each layer, the experts with less than `below` times an even load."""
        return [np.flatnonzero(row < below).tolist() for row in self.load * self.config.num_experts]

    def dominating_experts(self, above: float = DOMINATING) -> list[list[int]]:
        """For each layer, the experts with more than `above` times an even load.

        Or those that 90 % of the tokens choose, where tokens do not choose all experts.
        """
        relative = self.load * self.config.num_experts
        dominates = relative > above
        if self.config.num_experts_per_tok < self.config.num_experts:
            dominates |= quotient(self.counts, self.num_tokens[:, np.newaxis]) >= NEARLY_ALL
        return [np.flatnonzero(row).tolist() for row in dominates]

    def describe(self) -> str:
        """The state of each layer in words: even or uneven, who starves, who dominates."""
        return "\n".join(f"layer {layer}: {words}" for layer, words in enumerate(self._words()))

    def _words(self) -> Iterator[str]:
        load, num_experts = self.load, self.config.num_experts
        numbers = zip(
            self.num_tokens.tolist(),
            self.coefficient_of_variation.tolist(),
            self.effective_num_experts.tolist(),
            self.share_dropped.tolist(),
            self.starving_experts(),
            self.dominating_experts(),
            strict=True,
        )
        for layer, (tokens, variation, effective, dropped, starving, dominating) in enumerate(
            numbers
        ):
            if tokens == 0:
                yield "no tokens yet"
                continue
            even = "even load" if not starving and not dominating else "uneven load"
            parts = [
                f"{even} (coefficient of variation {variation:.2f}, "
                f"works like {effective:.1f} of {num_experts} experts)"
            ]
            for experts, verb in ((dominating, "dominate"), (starving, "starve")):
                if experts:
                    of_load = 100 * load[layer, experts].sum()
                    parts.append(f"{named(experts, verb)} with {of_load:.1f} % of the load")
            if dropped:
                parts.append(f"{100 * dropped:.1f} % of the choices dropped")
            yield "; ".join(parts)

    def summary(self) -> list[dict[str, Any]]:
        """The statistics in plain values, a dict a layer; `None` where there is no number.

        Examples
        --------
        >>> import numpy as np
        >>> from moe_fast import MoeConfig, RoutingStats
        >>> stats = RoutingStats(MoeConfig(num_experts=2, num_experts_per_tok=1))
        >>> stats.update(np.array([[1.0, 0.0], [0.0, 1.0]]))
        >>> stats.summary()[0]["effective_num_experts"]
        2.0
        """
        columns: dict[str, Sequence[Any]] = {
            "num_tokens": self.num_tokens.tolist(),
            "coefficient_of_variation": numbers(self.coefficient_of_variation),
            "effective_num_experts": numbers(self.effective_num_experts),
            "mean_entropy": numbers(self.mean_entropy),
            "load_balancing_loss": numbers(self.load_balancing_loss()),
            "z_loss": numbers(self.z_loss()),
            "importance_loss": numbers(self.importance_loss()),
            "share_dropped": numbers(self.share_dropped),
            "share_unrouted": numbers(self.share_unrouted),
            "share_dropped_by_capacity_factor": [
                dict(zip(map(str, self.capacity_factors), numbers(row), strict=True))
                for row in self.share_dropped_by_capacity_factor
            ],
            "load": [numbers(row) for row in self.load],
            "starving_experts": self.starving_experts(),
            "dominating_experts": self.dominating_experts(),
            "description": list(self._words()),
        }
        return [
            {"layer": layer, **dict(zip(columns, row, strict=True))}
            for layer, row in enumerate(zip(*columns.values(), strict=True))
        ]

    def to_frame(self) -> DataFrame:
        """The numbers of `summary` as a pandas data frame, one row a layer.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        rows = self.summary()
        for row in rows:
            by_factor = row.pop("share_dropped_by_capacity_factor")
            row |= {f"share_dropped_at_{factor}": share for factor, share in by_factor.items()}
        return pandas_frame(
            {name: [row[name] for row in rows] for name in rows[0] if name not in LISTS}
        )

    def to_dict(self) -> dict[str, Any]:
        """All that was added up, in plain values as JSON has them: sums are exact integers.

        Examples
        --------
        >>> from moe_fast import MoeConfig, RoutingStats
        >>> stats = RoutingStats(MoeConfig(num_experts=4), capacity_factors=[1.0])
        >>> RoutingStats.from_dict(stats.to_dict()) == stats
        True
        """
        options = dict(self.options)
        if options.get("selection_bias") is not None:
            options["selection_bias"] = np.asarray(self.options["selection_bias"]).tolist()
        values = {
            "config": self.config.to_dict(),
            "options": options,
            "capacity_factors": list(self.capacity_factors),
            "num_layers": self.num_layers,
            "sums": {name.lstrip("_"): getattr(self, name).tolist() for name in SUMS},
        }
        plain: dict[str, Any] = without_infinity(values)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingStats:
        """The statistics that `to_dict` gave, or that `moe-fast route --json` printed.

        Raises
        ------
        TypeError, MoeConfigError
            A key that is missing or unknown, or values that make no statistics.
        """
        check_keys(values, (*KEYS, "layers"), KEYS, cls.__name__)
        known: dict[str, Any] = with_infinity({name: values[name] for name in KEYS})
        stats = cls(
            MoeConfig.from_dict(known["config"]),
            known["num_layers"],
            capacity_factors=known["capacity_factors"],
            **known["options"],
        )
        for name in SUMS:
            total = getattr(stats, name)
            total[...] = as_sums(known["sums"], name.lstrip("_"), total.shape)
        return stats

    def _repr_html_(self) -> str:
        from moe_fast.drawing.html import table

        header = ("layer", "tokens", "load")
        rows = [
            (str(row["layer"]), f"{row['num_tokens']:,}", row["description"])
            for row in self.summary()
        ]
        return table(header, rows, numbers=(0, 1))

    def __iadd__(self, other: RoutingStats) -> Self:
        if not isinstance(other, RoutingStats):
            return NotImplemented
        if self._kind() != other._kind():
            raise MoeConfigError(
                "statistics can only be added where config, options, capacity_factors and "
                f"num_layers are the same, got {self!r} and {other!r}"
            )
        if (self.num_tokens + other.num_tokens).max() > MOST_TOKENS:
            raise MoeConfigError(f"at most {MOST_TOKENS} tokens can be added up in a layer")
        for name in SUMS:
            getattr(self, name)[...] += getattr(other, name)
        return self

    def __add__(self, other: RoutingStats) -> RoutingStats:
        if not isinstance(other, RoutingStats):
            return NotImplemented
        total = copy.deepcopy(self)
        total += other
        return total

    def __radd__(self, other: object) -> RoutingStats:
        # sum() begins with 0.
        return copy.deepcopy(self) if other == 0 else NotImplemented

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RoutingStats):
            return NotImplemented
        return self._kind() == other._kind() and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in SUMS
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def _kind(self) -> tuple[Any, ...]:
        bias = self.options.get("selection_bias")
        bias = None if bias is None else np.asarray(bias, np.float64).tolist()
        return self._rule, bias, self.capacity_factors, self.num_layers

    def __repr__(self) -> str:
        return (
            f"RoutingStats(method={str(self._rule.method)!r}, num_layers={self.num_layers}, "
            f"num_experts={self.config.num_experts}, "
            f"num_experts_per_tok={self.config.num_experts_per_tok}, "
            f"num_tokens={self.num_tokens.tolist()})"
        )


def numbers(values: Float64) -> list[float | None]:
    """Plain numbers, `None` for those that JSON does not have."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def without_infinity(value: Any) -> Any:
    """Plain values in which infinity, which JSON does not have, is the string "inf"."""
    if isinstance(value, dict):
        return {name: without_infinity(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_infinity(item) for item in value]
    return "inf" if isinstance(value, float) and value == math.inf else value


def with_infinity(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: with_infinity(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_infinity(item) for item in value]
    return math.inf if isinstance(value, str) and value == "inf" else value


def as_sums(sums: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The integers `sums[name]`, of this shape; squares may be infinite."""
    try:
        found = np.array(sums[name], object).reshape(shape)
    except (KeyError, TypeError, ValueError):
        found = None
    if found is None or not all(
        (type(value) is int and 0 <= value < 2**63) or (name == "square" and value >= 0)
        for value in found.flat
    ):
        raise MoeConfigError(f"sums must hold {name!r} as integers of the shape {list(shape)}")
    return found


def named(experts: list[int], verb: str) -> str:
    """`expert 3 starves`, `experts 3, 4 starve`, and no more than five by number."""
    if len(experts) == 1:
        return f"expert {experts[0]} {verb}s"
    if len(experts) <= 5:
        return f"experts {', '.join(map(str, experts))} {verb}"
    return f"{len(experts)} experts ({', '.join(map(str, experts[:4]))}, ...) {verb}"


def quotient(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Float64:
    """Elementwise, NaN over 0: there is no share of nothing."""
    top, bottom = np.broadcast_arrays(np.asarray(numerator), np.asarray(denominator))
    result = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=result, where=bottom != 0)
    return result


def squared_variation(values: npt.NDArray[Any]) -> Float64:
    """The squared coefficient of variation of each row."""
    return quotient(values.var(axis=1), values.mean(axis=1) ** 2)


def in_units(exact: Float64) -> npt.NDArray[np.uint64]:
    return (exact / UNIT).astype(np.uint64)


def overflow(counts: Counts, capacity: int | None) -> int:
    return 0 if capacity is None else int(np.maximum(counts - capacity, 0).sum())


def as_factors(capacity_factors: Sequence[float]) -> tuple[float, ...]:
    factors = tuple(as_number(factor, "capacity_factors") for factor in capacity_factors)
    for factor in factors:
        if not factor >= 0:
            raise MoeConfigError(f"capacity_factors must be at least 0, got {factor}")
    return factors


def plan_capacity(
    source: npt.ArrayLike | RoutingStats,
    capacity_factors: Sequence[float],
    config: MoeConfig | None = None,
    *,
    tokens_per_batch: int | None = None,
    threads: int | None = None,
    **options: Unpack[RoutingOptions],
) -> Float64:
    """The share of choices that each capacity factor would drop.

    Parameters
    ----------
    source : array_like of shape (T, E), or RoutingStats
        Logits, routed once for all factors. Or statistics: then every layer counts as one batch of
        all its tokens, which is the least that can be dropped, since smaller batches vary more.
    capacity_factors : sequence of float
        F factors.
    config : MoeConfig
        How logits are routed: top-k or Switch. Not for statistics, which have their own.
    tokens_per_batch : int, optional
        Tokens that share a capacity; by default all. Only for logits.
    threads : int, optional
        As for `route`.
    **options
        Those of `route`; only for logits.

    Returns
    -------
    ndarray of float64, shape (F,), or (L, F) for statistics
        The share of the T * k choices; for Switch that is the share of tokens.

    Examples
    --------
    >>> import numpy as np
    >>> from moe_fast import MoeConfig, plan_capacity
    >>> logits = np.random.default_rng(0).standard_normal((4096, 8))
    >>> plan_capacity(logits, [1.0, 1.25, 2.0], MoeConfig(), tokens_per_batch=128).round(3)
    array([0.065, 0.003, 0.   ])
    """
    factors = as_factors(capacity_factors)
    if isinstance(source, RoutingStats):
        if config is not None or options or tokens_per_batch is not None:
            raise MoeConfigError(
                "config, tokens_per_batch and options are for logits: statistics have their own"
            )
        refuse_expert_choice(source.config)
        shares = np.empty((source.num_layers, len(factors)))
        for layer, counts in enumerate(source.counts):
            for i, factor in enumerate(factors):
                rule = dataclasses.replace(source._rule, capacity_factor=factor)
                dropped = overflow(counts, rule.capacity(int(source.num_tokens[layer])))
                shares[layer, i] = quotient(dropped, counts.sum())
        return shares
    if not isinstance(config, MoeConfig):
        raise TypeError(f"config must be a MoeConfig, got {config!r}")
    refuse_expert_choice(config)
    stats = RoutingStats(config, capacity_factors=factors, **options)
    stats.update(source, tokens_per_batch=tokens_per_batch, threads=threads)
    shares = stats.share_dropped_by_capacity_factor
    return shares.reshape(len(factors))


def refuse_expert_choice(config: MoeConfig) -> None:
    if config.routing_method is RoutingMethod.EXPERT_CHOICE:
        raise MoeConfigError("expert_choice drops nothing: each of its experts is exactly full")


def update_selection_bias(
    selection_bias: npt.ArrayLike, tokens_per_expert: npt.ArrayLike, update_rate: float = 1e-3
) -> Float64:
    """The bias for the next step: `b + u * sign(mean(counts) - counts)` (DeepSeek-V3).

    Parameters
    ----------
    selection_bias : array_like, shape (E,)
        The bias that was routed with.
    tokens_per_expert : array_like of int, shape (E,)
        How many tokens chose each expert, before any was dropped.
    update_rate : float
        u.

    Examples
    --------
    >>> from moe_fast import update_selection_bias
    >>> update_selection_bias([0.0, 0.0, 0.0], [10, 20, 30])
    array([ 0.001,  0.   , -0.001])
    """
    bias = np.asarray(selection_bias, np.float64)
    counts = np.asarray(tokens_per_expert)
    if bias.ndim != 1 or bias.shape != counts.shape:
        raise MoeConfigError(
            "selection_bias and tokens_per_expert must both have the shape (num_experts,), "
            f"got {bias.shape} and {counts.shape}"
        )
    too_few: Float64 = np.sign(counts.mean() - counts)
    return bias + as_number(update_rate, "update_rate") * too_few
