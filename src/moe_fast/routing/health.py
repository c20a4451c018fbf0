"""Router health: how tokens would spread over experts, before anything is written or trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.config import MoeConfig
from moe_fast.errors import MoeConfigError, RoutingError
from moe_fast.reports import Report, pandas_frame
from moe_fast.routing.statistics import RoutingStats
from moe_fast.wording import format_numbers

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["RouterHealth", "predict_load"]
RANDOM_TOKENS = 1024
NUMBERS_AT_A_TIME = 2**22  # of hidden states, which may be a mapped file


@dataclass(frozen=True)
class RouterHealth(Report):
    """What routers would do with some hidden states, layer by layer.

    `hidden_states` says which they were. The coefficient of variation is that of the experts' load,
    0 where it is even; the entropy is that of a token's probabilities, in nats. `warnings` names
    the experts that would starve, and what to do.
    """

    hidden_states: str
    num_tokens: int
    coefficient_of_variation: tuple[float, ...]
    mean_entropy: tuple[float, ...]
    warnings: tuple[str, ...]

    def to_frame(self) -> DataFrame:
        """The prediction as a pandas data frame, one row a layer that has experts.

        Raises
        ------
        ModuleNotFoundError
            Without pandas.
        """
        columns = ("coefficient_of_variation", "mean_entropy")
        return pandas_frame({name: getattr(self, name) for name in columns})


def predict_load(
    routers: npt.ArrayLike | Sequence[npt.ArrayLike],
    hidden_states: npt.ArrayLike | None = None,
    *,
    num_experts_per_tok: int = 2,
) -> RoutingStats:
    """Route hidden states by the routers of all layers, top-k, and add up who gets them.

    Parameters
    ----------
    routers : array_like, shape (L, E, H)
        The routers' weights as checkpoints store them.
    hidden_states : array_like, shape (T, H) or (L, T, H), optional
        What the routers read: the same in every layer, or each layer's own; a mapped file is read a
        piece at a time. By default 1024 random tokens, standard normal, each router's drawn as it
        sees them.
    num_experts_per_tok : int
        Experts that each token is sent to.

    Raises
    ------
    MoeConfigError
        Shapes that do not fit each other, no token, or a number that is not finite.
    RoutingError
        Numbers so large that their logits are beyond float32.

    Examples
    --------
    >>> from moe_fast import compute_router_weights, predict_load
    >>> routers = compute_router_weights(2, 64, 8, transpose=True)
    >>> stats = predict_load(routers)
    >>> bool((stats.coefficient_of_variation < 0.2).all())
    True
    """
    weights = np.asarray(routers)
    if weights.ndim != 3:
        raise MoeConfigError(
            f"must have the shape (L, E, H), got {weights.shape}", argument="routers"
        )
    num_layers, num_experts, hidden_size = weights.shape
    stats = RoutingStats(MoeConfig(num_experts, num_experts_per_tok), num_layers)
    weights = weights.astype(np.float32)
    if not np.isfinite(weights).all():
        raise MoeConfigError("must be finite in float32", argument="routers")
    if hidden_states is None:
        for layer, router in enumerate(weights):
            stats.update(as_finite_logits(random_logits(router), layer), layer)
        return stats
    tokens = as_hidden_states(hidden_states, num_layers, hidden_size)
    tokens = np.broadcast_to(tokens, (num_layers, *tokens.shape[-2:]))
    step = max(1, NUMBERS_AT_A_TIME // max(hidden_size, num_experts))
    for layer, (router, inputs) in enumerate(zip(weights, tokens, strict=True)):
        # Experts with the same weights tie, whatever order a matrix product adds them up in.
        equals = first_equals(router)
        for start in range(0, len(inputs), step):
            some = inputs[start : start + step].astype(np.float32)
            if not np.isfinite(some).all():
                raise MoeConfigError(
                    "must be finite in float32; "
                    f"a token from {start} to {start + len(some) - 1} read in layer {layer} is not",
                    argument="hidden_states",
                )
            with np.errstate(over="ignore", invalid="ignore"):
                logits = (some @ router.T)[:, equals]
            stats.update(as_finite_logits(logits, layer), layer)
    return stats


def as_finite_logits(logits: npt.NDArray[Any], layer: int) -> npt.NDArray[Any]:
    if not np.isfinite(logits).all():
        raise RoutingError(f"logits of layer {layer} are beyond float32")
    return logits


def as_hidden_states(
    hidden_states: npt.ArrayLike, num_layers: int, hidden_size: int
) -> npt.NDArray[Any]:
    """The argument `hidden_states`, its dtype and shape checked; no number is looked at."""
    tokens = np.asarray(hidden_states)
    if tokens.dtype.kind not in "fiu" and tokens.dtype.name != "bfloat16":
        raise MoeConfigError(
            f"must hold real numbers, got dtype {tokens.dtype}", argument="hidden_states"
        )
    if tokens.ndim not in (2, 3) or tokens.shape[:-2] + tokens.shape[-1:] not in (
        (hidden_size,),
        (num_layers, hidden_size),
    ):
        raise MoeConfigError(
            f"must have the shape (T, {hidden_size}) or "
            f"({num_layers}, T, {hidden_size}), got {tokens.shape}",
            argument="hidden_states",
        )
    if tokens.shape[-2] == 0:
        raise MoeConfigError(
            f"hold no token: their shape is {tokens.shape}", argument="hidden_states"
        )
    return tokens


def router_health(
    routers: Iterable[npt.NDArray[Any]],
    hidden_states: npt.NDArray[Any] | None,
    num_experts_per_tok: int,
    *,
    layers: Sequence[int],
    source: str,
    remedy: str,
) -> RouterHealth:
    """`predict_load` with what to say of it; `source` names the hidden states.

    `layers` are the numbers of the layers that the routers belong to. Routers are taken one at a
    time: those of a large model need much memory together.
    """
    variation, entropy = [], []
    found: dict[str, list[int]] = {}
    for index, (layer, router) in enumerate(zip(layers, routers, strict=True)):
        states = hidden_states
        if states is not None and states.ndim == 3:
            states = states[index]
        stats = predict_load(router[np.newaxis], states, num_experts_per_tok=num_experts_per_tok)
        tokens = int(stats.num_tokens[0])
        variation += stats.coefficient_of_variation.tolist()
        entropy += stats.mean_entropy.tolist()
        text = complaint(router, stats.starving_experts()[0], f"{tokens} {source}")
        if text is not None:
            found.setdefault(text, []).append(layer)
    return RouterHealth(
        hidden_states=source,
        num_tokens=tokens,
        coefficient_of_variation=tuple(variation),
        mean_entropy=tuple(entropy),
        warnings=tuple(
            f"{format_numbers('layer', n)}: {text}; {remedy}" for text, n in found.items()
        ),
    )


def complaint(router: npt.NDArray[Any], starving: Sequence[int], source: str) -> str | None:
    """What is wrong with a layer's router: experts that tie, or else experts that starve."""
    equals = first_equals(router)
    tied = [expert for expert, first in enumerate(equals) if equals.count(first) > 1]
    if tied:
        return f"the router weights of {format_numbers('expert', tied)} are the same, and so tie"
    if starving:
        return (
            f"{format_numbers('expert', starving)} would get less than a quarter of an even load "
            f"of {source}"
        )
    return None


def complaint_on_random_tokens(router: npt.NDArray[Any], num_experts_per_tok: int) -> str | None:
    """The `complaint` about one router, `(E, H)`, that reads random tokens."""
    stats = predict_load(router[np.newaxis], num_experts_per_tok=num_experts_per_tok)
    return complaint(router, stats.starving_experts()[0], f"{RANDOM_TOKENS} random tokens")


def first_equals(rows: npt.NDArray[Any]) -> list[int]:
    """For each row, the number of the first one that is equal to it."""
    first: dict[bytes, int] = {}
    return [first.setdefault((row + 0).tobytes(), i) for i, row in enumerate(rows)]  # -0 is 0


def random_logits(router: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What `router`, `(E, H)`, makes of random tokens, `(RANDOM_TOKENS, E)`.

    Logits of standard normal tokens are normal, and `W W^T` is their covariance. With a root of
    that matrix they come from E numbers a token in place of H.
    """
    num_experts = len(router)
    numbers = np.empty(RANDOM_TOKENS * num_experts, np.float32)
    kernels.compiled.fill_normal(numbers, 0, numbers.size, 0, 0, 1.0)
    weights = router.astype(np.float64)
    covariance = weights @ weights.T
    # So that it has a root where rows depend on each other; in float32 nobody sees so little.
    np.fill_diagonal(covariance, covariance.diagonal() + 1e-12 * np.trace(covariance) + 1e-300)
    with np.errstate(over="ignore", invalid="ignore"):
        root = np.linalg.cholesky(covariance).astype(np.float32)
        logits: npt.NDArray[np.float32] = numbers.reshape(RANDOM_TOKENS, num_experts) @ root.T
    return logits[:, first_equals(router)]  # experts with the same weights tie
