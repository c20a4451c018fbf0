"""Router health: how tokens would spread over experts, before anything is written or trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.config import MoeConfig
from moe_fast.errors import MoeConfigError, RoutingError
from moe_fast.matmul import matmul
from moe_fast.records import dataclass
from moe_fast.reports import Report, pandas_frame
from moe_fast.routing.arrays import BFLOAT16_BITS, as_array, widen_bfloat16
from moe_fast.routing.statistics import RoutingStats
from moe_fast.wording import format_numbers

if TYPE_CHECKING:
    from pandas import DataFrame


__all__ = ["RouterHealth", "predict_load"]
RANDOM_TOKENS = 1024
# Of hidden states, which may be a mapped file.
NUMBERS_AT_A_TIME = 2**22


@dataclass(frozen=True)
class RouterHealth(Report):
    """The load of the experts that is predicted from the routers and some hidden states.

    Attributes
    ----------
    hidden_states : str
        What the routers read.
    num_tokens : int
        The number of tokens they read.
    coefficient_of_variation : tuple of float
        Of the experts' load, one number per layer with experts; 0 is even.
    mean_entropy : tuple of float
        Of a token's probabilities, in nats, one number per layer with experts.
    warnings : tuple of str
        The experts that would get hardly any token, and what to do.
    coefficient_of_variation_before : tuple of float
        The same for the rows before their load was evened on text; empty for other routers.
    """

    hidden_states: str
    num_tokens: int
    coefficient_of_variation: tuple[float, ...]
    mean_entropy: tuple[float, ...]
    warnings: tuple[str, ...]
    coefficient_of_variation_before: tuple[float, ...] = ()

    def to_frame(self) -> DataFrame:
        """Return the prediction as a pandas data frame, one row per layer with experts.

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
    """Predict the load of each expert: route hidden states by the routers of all layers, top-k.

    Parameters
    ----------
    routers : array_like, shape (L, E, H)
        The routers' weights as checkpoints store them. Torch tensors on the CPU, or a list with one
        for each layer, are taken too.
    hidden_states : array_like or tensor, shape (T, H) or (L, T, H), optional
        What the routers read: the same in every layer, or each layer's own. A mapped file is read a
        piece at a time. By default 1024 random tokens, standard normal, for each router its own.
    num_experts_per_tok : int
        Experts that each token is sent to.

    Returns
    -------
    RoutingStats
        The statistics of the L layers; `load` has each expert's share.

    Raises
    ------
    MoeConfigError
        If the shapes do not fit each other, there is no token, or a number is not finite.
    RoutingError
        If numbers are so large that their logits are beyond float32.

    Examples
    --------
    >>> from moe_fast import compute_router_weights, predict_load
    >>> routers = compute_router_weights(2, 64, 8, transpose=True)
    >>> stats = predict_load(routers)
    >>> bool((stats.coefficient_of_variation < 0.2).all())
    True
    """
    weights = widen_bfloat16(as_array(routers, "routers"))
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
            logits = draw_random_logits(router)
            check_finite(logits, layer)
            stats.update(logits, layer)
        return stats
    tokens = as_hidden_states(hidden_states, num_layers, hidden_size)
    tokens = np.broadcast_to(tokens, (num_layers, *tokens.shape[-2:]))
    step = max(1, NUMBERS_AT_A_TIME // max(hidden_size, num_experts))
    for layer, (router, inputs) in enumerate(zip(weights, tokens, strict=True)):
        # Experts with the same weights tie, whatever order a matrix product adds them up in.
        columns = find_first_equal_rows(router)
        for start in range(0, len(inputs), step):
            piece = widen_bfloat16(inputs[start : start + step]).astype(np.float32)
            if not np.isfinite(piece).all():
                raise MoeConfigError(
                    f"must be finite in float32; a token from {start} to "
                    f"{start + len(piece) - 1} read in layer {layer} is not",
                    argument="hidden_states",
                )
            logits = matmul(piece, router.T)[:, columns]
            check_finite(logits, layer)
            stats.update(logits, layer)
    return stats


def check_finite(logits: npt.NDArray[Any], layer: int) -> None:
    """Raise if logits have overflowed."""
    if not np.isfinite(logits).all():
        raise RoutingError(f"logits of layer {layer} are beyond float32")


def as_hidden_states(
    hidden_states: npt.ArrayLike, num_layers: int, hidden_size: int
) -> npt.NDArray[Any]:
    """The argument `hidden_states`, its dtype and shape checked, its numbers not."""
    tokens = as_array(hidden_states, "hidden_states")
    is_bfloat16 = tokens.dtype == BFLOAT16_BITS or tokens.dtype.name == "bfloat16"
    if tokens.dtype.kind not in "fiu" and not is_bfloat16:
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
    """What `predict_load` predicts, and warnings that end with `remedy`.

    `source` names the hidden states, `layers` holds the numbers of the routers' layers. Routers are
    taken one at a time: those of a large model need much memory together.
    """
    record = HealthRecord(num_experts_per_tok, source=source, remedy=remedy)
    for index, (layer, router) in enumerate(zip(layers, routers, strict=True)):
        states = hidden_states
        if states is not None and states.ndim == 3:
            states = states[index]
        record.add(layer, router, states)
    return record.report()


class HealthRecord:
    """What `router_health` says, of one layer after the other."""

    def __init__(self, num_experts_per_tok: int, *, source: str, remedy: str) -> None:
        self.num_experts_per_tok = num_experts_per_tok
        self.source = source
        self.remedy = remedy
        self.num_tokens = 0
        self.variation: list[float] = []
        self.entropy: list[float] = []
        self.layers_by_problem: dict[str, list[int]] = {}

    def add(self, layer: int, router: npt.NDArray[Any], states: npt.NDArray[Any] | None) -> None:
        """Add the router of a layer, `(E, H)`, and what it reads, `(T, H)`."""
        top_k = self.num_experts_per_tok
        stats = predict_load(router[np.newaxis], states, num_experts_per_tok=top_k)
        self.num_tokens = int(stats.num_tokens[0])
        self.variation += stats.coefficient_of_variation.tolist()
        self.entropy += stats.mean_entropy.tolist()
        source = f"{self.num_tokens} {self.source}"
        text = find_problem(router, stats.starving_experts()[0], source)
        if text is not None:
            self.layers_by_problem.setdefault(text, []).append(layer)

    def report(self, before: Sequence[float] = ()) -> RouterHealth:
        """All layers together; `before` are the coefficients of variation from before."""
        return RouterHealth(
            hidden_states=self.source,
            num_tokens=self.num_tokens,
            coefficient_of_variation=tuple(self.variation),
            mean_entropy=tuple(self.entropy),
            warnings=tuple(
                f"{format_numbers('layer', numbers)}: {text}; {self.remedy}"
                for text, numbers in self.layers_by_problem.items()
            ),
            coefficient_of_variation_before=tuple(before),
        )


def find_problem(router: npt.NDArray[Any], starving: Sequence[int], source: str) -> str | None:
    """Say what is wrong with a layer's router: experts that tie, or else experts that starve."""
    first = find_first_equal_rows(router)
    tied = [expert for expert, row in enumerate(first) if first.count(row) > 1]
    if tied:
        return (
            f"the router weights of {format_numbers('expert', tied)} are equal, so their logits tie"
        )
    if starving:
        return (
            f"{format_numbers('expert', starving)} would get less than a quarter of an even load "
            f"of {source}"
        )
    return None


def complaint_on_random_tokens(router: npt.NDArray[Any], num_experts_per_tok: int) -> str | None:
    """Find the problem of one router, `(E, H)`, that reads random tokens."""
    stats = predict_load(router[np.newaxis], num_experts_per_tok=num_experts_per_tok)
    return find_problem(router, stats.starving_experts()[0], f"{RANDOM_TOKENS} random tokens")


def find_first_equal_rows(rows: npt.NDArray[Any]) -> list[int]:
    """For each row, the number of the first one that is equal to it."""
    first: dict[bytes, int] = {}
    return [first.setdefault((row + 0).tobytes(), i) for i, row in enumerate(rows)]  # -0 is 0


def draw_random_logits(router: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logits of random tokens, `(RANDOM_TOKENS, E)`, by the Cholesky factor of their covariance.

    Logits of standard normal tokens are normal, with the covariance `W W^T`, W being `router`,
    `(E, H)`. Its factor makes them of E numbers a token in place of H.
    """
    num_experts = len(router)
    numbers = np.empty(RANDOM_TOKENS * num_experts, np.float32)
    kernels.compiled.fill_normal(numbers, 0, numbers.size, 0, 0, 1.0)
    weights = router.astype(np.float64)
    covariance = matmul(weights, weights.T)
    # It has a factor then even if rows depend on each other. In float32 so little is lost.
    np.fill_diagonal(covariance, covariance.diagonal() + 1e-12 * np.trace(covariance) + 1e-300)
    with np.errstate(over="ignore", invalid="ignore"):
        factor = np.linalg.cholesky(covariance).astype(np.float32)
        logits = matmul(numbers.reshape(RANDOM_TOKENS, num_experts), factor.T)
    return logits[:, find_first_equal_rows(router)]  # Experts with the same weights tie.
