"""What routers do to their experts: load, losses, collapse and capacity, over many batches."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.checks import as_index, as_number
from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import ArgumentTypeError, MoeConfigError, RoutingError
from moe_fast.plain import check_keys
from moe_fast.records import dataclass
from moe_fast.reports import pandas_frame, without_version
from moe_fast.routing.arrays import as_array, get_c_type, view_rows, widen_bfloat16
from moe_fast.routing.choose import get_tokens_per_thread, raise_for_nan
from moe_fast.routing.options import RoutingOptions, Rule
from moe_fast.routing.result import Counts, Routing, Softmax
from moe_fast.routing.router import Router, make_router, without_capacity
from moe_fast.threads import as_threads, share

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["RoutingStats", "plan_capacity", "update_selection_bias"]
Float64 = npt.NDArray[np.float64]
# Sums are kept as integers in these units, so that their order does not matter.
UNIT = 2.0**-32
ENTROPY_UNIT = 2.0**-24
# With more, the probabilities of one expert could add up to more than 64 bits.
MOST_TOKENS = 2**31
# So many logits are routed, then added up while they are in the cache. A kernel adds up to 2^20
# tokens exactly.
LOGITS_AT_A_TIME = 2**20
TOKENS_AT_A_TIME = 2**20
# Experts starve below this part of an even load, and dominate above this multiple of it, or where
# nearly every token chooses them. A load is called even up to this coefficient of variation.
STARVING = 0.25
DOMINATING = 3.0
NEARLY_ALL = 0.9
EVEN = 0.2
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
# The columns of a summary that hold more than a number.
LIST_COLUMNS = ("load", "starving_experts", "dominating_experts", "description")


@dataclass(frozen=True)
class ProbabilitySums:
    """Sums over tokens that depend on probabilities alone, not on a choice.

    The probabilities of each expert, uint64 `[E]`, and the squares of the log-sum-exp are in units
    of 2^-32; the entropies of tokens are in units of 2^-24.
    """

    num_tokens: int
    probability: npt.NDArray[np.uint64]
    entropy: int
    square: int | float

    @property
    def mean_probabilities(self) -> Float64:
        """`[E]`: each expert's mean probability."""
        return divide(self.probability * UNIT, self.num_tokens)

    @property
    def mean_square(self) -> Float64:
        """`[]`: the mean of the squared log-sum-exp."""
        return divide(self.square * UNIT, self.num_tokens)


def sum_probabilities(
    logits: npt.NDArray[Any],
    rule: Rule,
    threads: int,
    softmax: Softmax | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
) -> ProbabilitySums:
    """Add up the probabilities of the tokens from `start` to `stop`. Fills `softmax`, if given."""
    stop = len(logits) if stop is None else stop
    num_experts = rule.num_experts
    rows = view_rows(logits[start:stop], num_experts)
    kernel = kernels.compiled.add_statistics[get_c_type(rows.dtype)]
    probabilities, log_sums = softmax or (None, None)
    ends: list[tuple[int, Float64, Float64]] = []

    def add(first: int, start: int, stop: int) -> None:
        probability, totals = np.zeros(num_experts), np.zeros(3)
        bad = kernel(
            rows.bytes, rows.encoding, num_experts, rule.is_sigmoid, probability, totals,
            probabilities, log_sums, first + start, first + stop,
        )  # fmt: skip
        ends.append((bad, probability, totals))

    for first in range(0, stop - start, TOKENS_AT_A_TIME):
        size = min(TOKENS_AT_A_TIME, stop - start - first)
        share(partial(add, first), size, threads, grain=get_tokens_per_thread(num_experts))
    raise_for_nan(bad + start for bad, _, _ in ends if bad >= 0)
    total = np.zeros(num_experts, np.uint64)
    entropy = 0
    square: int | float = 0
    for _, probability, (entropies, whole, rest) in ends:
        total += to_units(probability)
        entropy += int(entropies / ENTROPY_UNIT)
        square += whole if math.isinf(whole) else int(whole) * 2**32 + int(rest / UNIT)
    return ProbabilitySums(stop - start, total, entropy, square)


class RoutingStats:
    """Statistics of the routers of L layers over any number of batches.

    `update` adds tokens; `stats + other` and `stats += other` merge statistics of different tokens.
    All sums are kept as integers, so the result does not depend on how tokens are split into
    batches, files, threads or processes. Only what a capacity drops depends on the batches, because
    the tokens of a batch share it.

    Parameters
    ----------
    config : MoeConfig or Router
        How tokens are routed; E is its number of experts, k its number of experts per token.
    num_layers : int
        L, the number of layers, each with a router.
    capacity_factors : sequence of float
        F factors; what each of them would drop is counted too.
    **options
        Those of `route`; not for a `Router`, which has its own.

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range.

    Attributes
    ----------
    router : Router
        The router of every layer.
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
    layer 0: even load (coefficient of variation 0.02, 4.0 effective experts of 4)
    """

    def __init__(
        self,
        config: MoeConfig | Router,
        num_layers: int = 1,
        *,
        capacity_factors: Sequence[float] = (),
        **options: Unpack[RoutingOptions],
    ) -> None:
        self.router = make_router(config, options)
        self.capacity_factors = check_factors(capacity_factors)
        num_layers = as_index(num_layers, "num_layers", minimum=1)
        shape = (num_layers, self.config.num_experts)
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
    def config(self) -> MoeConfig:
        """The configuration of the router."""
        return self.router.config

    @property
    def options(self) -> RoutingOptions:
        """The options that the router was given."""
        return self.router.options

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
        """Route tokens of one layer and add them to the statistics.

        Parameters
        ----------
        logits : array_like of float32, float64, bfloat16 or float16, shape (T, E)
            Memory-mapped arrays are read a piece at a time. Torch tensors are taken as by `route`.
        layer : int
            The layer that the logits belong to.
        tokens_per_batch : int, optional
            Tokens that share a capacity; by default all of this array.
        threads : int, optional
            By default `MOE_FAST_NUM_THREADS`, or 1. The result does not depend on it.

        Raises
        ------
        TypeError, MoeConfigError
            If an argument has the wrong type or is out of range.
        RoutingError
            As for `route`. Nothing has been added then.
        """
        layer = as_index(layer, "layer")
        if layer >= self.num_layers:
            raise MoeConfigError(
                f"must be below {self.num_layers}, the number of layers, got {layer}",
                argument="layer",
            )
        array = as_array(logits, "logits")
        if array.ndim == 3:
            raise RoutingError(
                f"logits {array.shape} are those of several layers; give one at a time, as in "
                "update(logits[2], layer=2)"
            )
        # Logits that cannot be read in place are copied, a piece at a time.
        view_rows(array[:0] if array.ndim == 2 else array, self.config.num_experts)
        num_tokens = len(array)
        if self.num_tokens[layer] + num_tokens > MOST_TOKENS:
            raise MoeConfigError(f"logits hold too many tokens: at most {MOST_TOKENS} to a layer")
        size = num_tokens if tokens_per_batch is None else tokens_per_batch
        size = max(1, as_index(size, "tokens_per_batch", minimum=0 if num_tokens == 0 else 1))
        added = RoutingStats(self.router, capacity_factors=self.capacity_factors)
        by_expert = self.router.rule.method is RoutingMethod.EXPERT_CHOICE
        unlimited = self.router if by_expert else without_capacity(self.router)
        for start in range(0, num_tokens, size):
            stop = min(start + size, num_tokens)
            if by_expert:
                added._add_expert_choice(array, start, stop, as_threads(threads))
            else:
                added._add_batch(array, start, stop, as_threads(threads), unlimited)
        for name in SUMS:
            getattr(self, name)[layer] += getattr(added, name)[0]

    def _add_expert_choice(
        self, logits: npt.NDArray[Any], start: int, stop: int, threads: int
    ) -> None:
        """Add one batch, which shares a capacity, routed by expert choice."""
        self._add_probabilities(
            sum_probabilities(logits, self.router.rule, threads, start=start, stop=stop)
        )
        routing = self.router(logits[start:stop], threads=threads)
        self._add_choice(routing)
        self.num_unrouted[0] += routing.num_unrouted

    def _add_batch(
        self, logits: npt.NDArray[Any], start: int, stop: int, threads: int, unlimited: Router
    ) -> None:
        """Add one batch, which shares a capacity, routed by top-k or Switch.

        What the capacity drops follows from the counts of `unlimited`, which routes without one.
        """
        rule = self.router.rule
        before = self.counts[0].copy()
        size = max(1, LOGITS_AT_A_TIME // rule.num_experts)
        out = None
        for first in range(start, stop, size):
            last = min(first + size, stop)
            self._add_probabilities(
                sum_probabilities(logits, rule, threads, start=first, stop=last)
            )
            if last - first < size:
                out = None
            out = unlimited(logits[first:last], out=out, threads=threads)
            self._add_choice(out)
        tokens = stop - start
        counts = self.counts[0] - before
        for i, factor in enumerate(self.capacity_factors):
            capacity = rule.compute_capacity(tokens, factor)
            self._dropped_by_factor[0, i] += count_overflow(counts, capacity)
        dropped = count_overflow(counts, rule.compute_capacity(tokens))
        self.num_dropped[0] += dropped
        if rule.num_experts_per_tok == 1:
            self.num_unrouted[0] += dropped
        elif dropped:
            routing = self.router(logits[start:stop], threads=threads)
            self.num_unrouted[0] += routing.num_unrouted

    def _add_probabilities(self, sums: ProbabilitySums) -> None:
        self.num_tokens[0] += sums.num_tokens
        self._probability[0] += sums.probability
        self._entropy[0] += sums.entropy
        self._square[0] += sums.square

    def _add_choice(self, routing: Routing) -> None:
        self.counts[0] += routing.tokens_per_expert_before_drop
        indices, weights = routing.indices, routing.weights
        if routing.method is RoutingMethod.EXPERT_CHOICE:
            indices = np.broadcast_to(
                np.arange(routing.num_experts, dtype=np.int32)[:, np.newaxis], weights.shape
            ).copy()
        kernel = kernels.compiled.add_weights[get_c_type(weights.dtype)]
        for pairs in range(0, weights.size, TOKENS_AT_A_TIME):
            importance = np.zeros(routing.num_experts)
            kernel(
                indices.reshape(-1)[pairs : pairs + TOKENS_AT_A_TIME],
                weights.reshape(-1)[pairs : pairs + TOKENS_AT_A_TIME],
                self.router.rule.routed_scaling_factor,
                importance,
            )
            self._importance[0] += to_units(importance)

    @property
    def load(self) -> Float64:
        """`[L, E]`: the share of all choices that fell on each expert; 1 / E where even."""
        return divide(self.counts, self.counts.sum(axis=1, keepdims=True))

    @property
    def mean_probabilities(self) -> Float64:
        """`[L, E]`: each expert's mean probability; sigmoid scores are divided by their sum."""
        return divide(self._probability * UNIT, self.num_tokens[:, np.newaxis])

    @property
    def importance(self) -> Float64:
        """`[L, E]`: sums of weights before any was dropped (Shazeer et al. 2017, equation 6)."""
        return self._importance.astype(np.float64) * (UNIT * self.router.rule.routed_scaling_factor)

    @property
    def mean_entropy(self) -> Float64:
        """`[L]`: the mean entropy of a token's probabilities, in nats; ln E where undecided."""
        return divide(self._entropy.astype(np.float64) * ENTROPY_UNIT, self.num_tokens)

    @property
    def coefficient_of_variation(self) -> Float64:
        """`[L]`: standard deviation over mean of the load; 0 where even."""
        return np.sqrt(compute_squared_variation(self.counts))

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
        return divide(self.num_dropped, self.counts.sum(axis=1))

    @property
    def share_unrouted(self) -> Float64:
        """`[L]`: the share of tokens that no expert takes."""
        return divide(self.num_unrouted, self.num_tokens)

    @property
    def share_dropped_by_capacity_factor(self) -> Float64:
        """`[L, F]`: what each of `capacity_factors` would drop, as a share of all choices."""
        return divide(self._dropped_by_factor, self.counts.sum(axis=1, keepdims=True))

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
        f = divide(self.counts.sum(axis=0), tokens)
        p = divide((self._probability * UNIT).sum(axis=0), tokens)
        return float(alpha * self.config.num_experts * (f * p).sum())

    def z_loss(self, alpha: float = 1.0) -> Float64:
        """`[L]`: `alpha` times the mean squared log-sum-exp of the logits (Zoph et al. 2022).

        Infinite where a log-sum-exp exceeds 65536.
        """
        squares = np.array([square * UNIT for square in self._square.tolist()], np.float64)
        return alpha * divide(squares, self.num_tokens)

    def importance_loss(self, alpha: float = 1.0) -> Float64:
        """`[L]`: `alpha` times the squared coefficient of variation of `importance`.

        Shazeer et al. 2017, equation 7.
        """
        return alpha * compute_squared_variation(self._importance * UNIT)

    def starving_experts(self, below: float = STARVING) -> list[list[int]]:
        """Return for each layer the experts with less than `below` times an even load."""
        return [np.flatnonzero(row < below).tolist() for row in self.load * self.config.num_experts]

    def dominating_experts(self, above: float = DOMINATING) -> list[list[int]]:
        """Return for each layer the experts with more than `above` times an even load.

        Experts that 90 % of the tokens choose count too, unless tokens choose all experts.
        """
        relative = self.load * self.config.num_experts
        dominates = relative > above
        if self.config.num_experts_per_tok < self.config.num_experts:
            dominates |= divide(self.counts, self.num_tokens[:, np.newaxis]) >= NEARLY_ALL
        return [np.flatnonzero(row).tolist() for row in dominates]

    def describe(self) -> str:
        """Describe each layer in words: how even its load is, which experts starve or dominate.

        An expert starves with less than a quarter of an even load, and dominates with more than
        three times as much or if 90 % of the tokens choose it.
        """
        layers = enumerate(self._describe_layers())
        return "\n".join(f"layer {layer}: {words}" for layer, words in layers)

    def _describe_layers(self) -> Iterator[str]:
        load, num_experts = self.load, self.config.num_experts
        columns = zip(
            self.num_tokens.tolist(),
            self.coefficient_of_variation.tolist(),
            self.effective_num_experts.tolist(),
            self.share_dropped.tolist(),
            self.starving_experts(),
            self.dominating_experts(),
            strict=True,
        )
        for layer, (tokens, variation, effective, dropped, starving, dominating) in enumerate(
            columns
        ):
            if tokens == 0:
                yield "no tokens yet"
                continue
            if starving or dominating:
                evenness = "uneven load"
            else:
                evenness = "even load" if variation <= EVEN else "no expert starves or dominates"
            parts = [
                f"{evenness} (coefficient of variation {variation:.2f}, "
                f"{effective:.1f} effective experts of {num_experts})"
            ]
            for experts, verb in ((dominating, "dominate"), (starving, "starve")):
                if experts:
                    percent = 100 * load[layer, experts].sum()
                    parts.append(f"{name_experts(experts, verb)} with {percent:.1f} % of the load")
            if dropped:
                parts.append(f"{100 * dropped:.1f} % of the choices dropped")
            yield "; ".join(parts)

    def summary(self) -> list[dict[str, Any]]:
        """Return the statistics as plain values, one dict per layer; `None` for no number.

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
            "coefficient_of_variation": to_plain_numbers(self.coefficient_of_variation),
            "effective_num_experts": to_plain_numbers(self.effective_num_experts),
            "mean_entropy": to_plain_numbers(self.mean_entropy),
            "load_balancing_loss": to_plain_numbers(self.load_balancing_loss()),
            "z_loss": to_plain_numbers(self.z_loss()),
            "importance_loss": to_plain_numbers(self.importance_loss()),
            "share_dropped": to_plain_numbers(self.share_dropped),
            "share_unrouted": to_plain_numbers(self.share_unrouted),
            "share_dropped_by_capacity_factor": [
                dict(zip(map(str, self.capacity_factors), to_plain_numbers(row), strict=True))
                for row in self.share_dropped_by_capacity_factor
            ],
            "load": [to_plain_numbers(row) for row in self.load],
            "starving_experts": self.starving_experts(),
            "dominating_experts": self.dominating_experts(),
            "description": list(self._describe_layers()),
        }
        return [
            {"layer": layer, **dict(zip(columns, row, strict=True))}
            for layer, row in enumerate(zip(*columns.values(), strict=True))
        ]

    def to_frame(self) -> DataFrame:
        """Return the numbers of `summary` as a pandas data frame, one row per layer.

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
            {name: [row[name] for row in rows] for name in rows[0] if name not in LIST_COLUMNS}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the statistics as plain values that JSON can hold; sums are exact integers.

        Examples
        --------
        >>> from moe_fast import MoeConfig, RoutingStats
        >>> stats = RoutingStats(MoeConfig(num_experts=4), capacity_factors=[1.0])
        >>> RoutingStats.from_dict(stats.to_dict()) == stats
        True
        """
        options: dict[str, Any] = {**self.options}
        if options.get("selection_bias") is not None:
            options["selection_bias"] = options["selection_bias"].tolist()
        values = {
            "config": self.config.to_dict(),
            "options": options,
            "capacity_factors": list(self.capacity_factors),
            "num_layers": self.num_layers,
            "sums": {name.lstrip("_"): getattr(self, name).tolist() for name in SUMS},
        }
        plain: dict[str, Any] = encode_infinity(values)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingStats:
        """Create statistics from the result of `to_dict`, or from what `route --json` printed.

        Raises
        ------
        TypeError, MoeConfigError
            If a key is missing or unknown, or the values are not those of statistics.
        """
        values = without_version(values)
        check_keys(values, (*KEYS, "layers"), KEYS, cls.__name__)
        known: dict[str, Any] = decode_infinity({name: values[name] for name in KEYS})
        stats = cls(
            MoeConfig.from_dict(known["config"]),
            known["num_layers"],
            capacity_factors=known["capacity_factors"],
            **known["options"],
        )
        for name in SUMS:
            total = getattr(stats, name)
            total[...] = read_sums(known["sums"], name.lstrip("_"), total.shape)
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
        if not self._adds_up_with(other):
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
        return self._adds_up_with(other) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in SUMS
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays

    def _adds_up_with(self, other: RoutingStats) -> bool:
        mine = self.router, self.capacity_factors, self.num_layers
        return mine == (other.router, other.capacity_factors, other.num_layers)

    def __repr__(self) -> str:
        return (
            f"RoutingStats(method={str(self.config.routing_method)!r}, "
            f"num_layers={self.num_layers}, num_experts={self.config.num_experts}, "
            f"num_experts_per_tok={self.config.num_experts_per_tok}, "
            f"num_tokens={self.num_tokens.tolist()})"
        )


def to_plain_numbers(values: Float64) -> list[float | None]:
    """Plain numbers, `None` for those that JSON does not have."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def encode_infinity(value: Any) -> Any:
    """Plain values in which infinity, which JSON does not have, is the string "inf"."""
    if isinstance(value, dict):
        return {name: encode_infinity(item) for name, item in value.items()}
    if isinstance(value, list):
        return [encode_infinity(item) for item in value]
    return "inf" if isinstance(value, float) and value == math.inf else value


def decode_infinity(value: Any) -> Any:
    """Plain values in which the string "inf" is infinity again."""
    if isinstance(value, Mapping):
        return {name: decode_infinity(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [decode_infinity(item) for item in value]
    return math.inf if isinstance(value, str) and value == "inf" else value


def read_sums(sums: Any, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The integers `sums[name]`, of this shape; squares may be infinite."""
    try:
        found = np.array(sums[name], object).reshape(shape)
    except (KeyError, TypeError, ValueError):
        found = None
    if found is None or not all(
        (type(value) is int and 0 <= value < 2**63) or (name == "square" and value >= 0)
        for value in found.flat
    ):
        raise MoeConfigError(
            f"must hold {name!r} as integers of the shape {list(shape)}", argument="sums"
        )
    return found


def name_experts(experts: list[int], verb: str) -> str:
    """`expert 3 starves`, `experts 3, 4 starve`, and no more than five by number."""
    if len(experts) == 1:
        return f"expert {experts[0]} {verb}s"
    if len(experts) <= 5:
        return f"experts {', '.join(map(str, experts))} {verb}"
    return f"{len(experts)} experts ({', '.join(map(str, experts[:4]))}, ...) {verb}"


def divide(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Float64:
    """Elementwise, NaN over 0: there is no share of nothing."""
    if isinstance(denominator, int):  # in a third of the time
        return np.asarray(np.asarray(numerator) / (denominator or np.nan), np.float64)
    top, bottom = np.broadcast_arrays(np.asarray(numerator), np.asarray(denominator))
    result = np.full(top.shape, np.nan)
    np.divide(top, bottom, out=result, where=bottom != 0)
    return result


def compute_squared_variation(values: npt.NDArray[Any]) -> Float64:
    """The squared coefficient of variation of each row."""
    return divide(values.var(axis=1), values.mean(axis=1) ** 2)


def to_units(exact: Float64) -> npt.NDArray[np.uint64]:
    """Sums of multiples of 2^-32, exact in float64, as integers."""
    return (exact / UNIT).astype(np.uint64)


def count_overflow(counts: Counts, capacity: int | None) -> int:
    """Pairs that exceed the capacity of their expert."""
    return 0 if capacity is None else int(np.maximum(counts - capacity, 0).sum())


def check_factors(capacity_factors: Sequence[float]) -> tuple[float, ...]:
    """The argument `capacity_factors` as floats."""
    factors = tuple(as_number(factor, "capacity_factors") for factor in capacity_factors)
    for factor in factors:
        if not factor >= 0:
            raise MoeConfigError(f"must be at least 0, got {factor}", argument="capacity_factors")
    return factors


def plan_capacity(
    source: npt.ArrayLike | RoutingStats,
    capacity_factors: Sequence[float],
    config: MoeConfig | Router | None = None,
    *,
    tokens_per_batch: int | None = None,
    threads: int | None = None,
    **options: Unpack[RoutingOptions],
) -> Float64:
    """Compute the share of choices that each capacity factor would drop.

    Parameters
    ----------
    source : array_like of shape (T, E), or RoutingStats
        Logits, which are routed once for all factors, or statistics. With statistics, each layer
        counts as one batch of all its tokens. Smaller batches mostly drop more, as their loads vary
        more.
    capacity_factors : sequence of float
        F factors.
    config : MoeConfig or Router
        How logits are routed: top-k or Switch. Not for statistics, which have their own.
    tokens_per_batch : int, optional
        Tokens that share a capacity; by default all. Only for logits.
    threads : int, optional
        As for `route`.
    **options
        Those of `route`; only for logits, and not for a `Router`, which has its own.

    Returns
    -------
    ndarray of float64, shape (F,), or (L, F) for statistics
        The share of the T * k choices; for Switch that is the share of tokens.

    Raises
    ------
    TypeError, MoeConfigError
        If an argument has the wrong type or is out of range, or tokens are routed by expert choice,
        which drops nothing.
    RoutingError
        As for `route`.

    Examples
    --------
    >>> import numpy as np
    >>> from moe_fast import MoeConfig, plan_capacity
    >>> logits = np.random.default_rng(0).standard_normal((4096, 8))
    >>> plan_capacity(logits, [1.0, 1.25, 2.0], MoeConfig(), tokens_per_batch=128).round(3)
    array([0.065, 0.003, 0.   ])
    """
    factors = check_factors(capacity_factors)
    if isinstance(source, RoutingStats):
        if config is not None or options or tokens_per_batch is not None:
            raise MoeConfigError(
                "config, tokens_per_batch and options are for logits: statistics have their own"
            )
        refuse_expert_choice(source.config)
        shares = np.empty((source.num_layers, len(factors)))
        for layer, counts in enumerate(source.counts):
            for i, factor in enumerate(factors):
                num_tokens = int(source.num_tokens[layer])
                capacity = source.router.rule.compute_capacity(num_tokens, factor)
                dropped = count_overflow(counts, capacity)
                shares[layer, i] = divide(dropped, counts.sum())
        return shares
    if config is None:
        raise ArgumentTypeError(
            "must be a MoeConfig, got None: logits do not say how to route them", argument="config"
        )
    stats = RoutingStats(config, capacity_factors=factors, **options)
    refuse_expert_choice(stats.config)
    stats.update(source, tokens_per_batch=tokens_per_batch, threads=threads)
    shares = stats.share_dropped_by_capacity_factor
    return shares.reshape(len(factors))


def refuse_expert_choice(config: MoeConfig) -> None:
    if config.routing_method is RoutingMethod.EXPERT_CHOICE:
        raise MoeConfigError("expert_choice drops nothing: each of its experts is exactly full")


def update_selection_bias(
    selection_bias: npt.ArrayLike, tokens_per_expert: npt.ArrayLike, update_rate: float = 1e-3
) -> Float64:
    """Compute the selection bias of the next step from the load of this one.

    The result is `b + u * sign(mean(counts) - counts)`, the loss-free balancing of Wang et al. 2024
    (arXiv 2408.15664) and DeepSeek-V3 (arXiv 2412.19437).

    Parameters
    ----------
    selection_bias : array_like, shape (E,)
        b, the bias of this step. Torch tensors on the CPU are accepted too.
    tokens_per_expert : array_like of int, shape (E,)
        The number of tokens that chose each expert, before any was dropped.
    update_rate : float
        u, at least 0.

    Returns
    -------
    ndarray of float64, shape (E,)

    Raises
    ------
    TypeError, MoeConfigError
        If the arrays do not hold numbers or differ in shape, or `update_rate` is negative.

    Examples
    --------
    >>> from moe_fast import update_selection_bias
    >>> update_selection_bias([0.0, 0.0, 0.0], [10, 20, 30])
    array([ 0.001,  0.   , -0.001])
    """
    bias = as_real(selection_bias, "selection_bias").astype(np.float64)
    counts = as_real(tokens_per_expert, "tokens_per_expert")
    if bias.ndim != 1 or bias.shape != counts.shape:
        raise MoeConfigError(
            "selection_bias and tokens_per_expert must both have the shape (num_experts,), "
            f"got {bias.shape} and {counts.shape}"
        )
    rate = as_number(update_rate, "update_rate")
    if not 0 <= rate < math.inf:
        raise MoeConfigError(f"must be at least 0 and finite, got {rate}", argument="update_rate")
    too_few: Float64 = np.sign(counts.mean() - counts)
    return bias + rate * too_few


def as_real(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """The argument `name` as an array of integers or floats."""
    array = widen_bfloat16(as_array(values, name))
    if array.dtype.kind not in "iuf":
        raise ArgumentTypeError(f"must be numbers, got the dtype {array.dtype}", argument=name)
    return array
