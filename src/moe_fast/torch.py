"""Routing that torch differentiates, on the CPU: `moe_fast.torch.route`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt

from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import MoeConfigError
from moe_fast.routing import gradients
from moe_fast.routing.arrays import as_array
from moe_fast.routing.choose import drop_overflow
from moe_fast.routing.options import RoutingOptions, Rule
from moe_fast.routing.result import Routing
from moe_fast.routing.router import Router, make_router
from moe_fast.routing.statistics import ProbabilitySums, divide, sum_probabilities
from moe_fast.threads import as_threads

try:
    import torch
    from torch import Tensor

    from moe_fast.loading.model import load_into
    from moe_fast.loading.tensors import read
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"moe_fast.torch needs {error.name}: pip install torch", name=error.name
    ) from None

__all__ = ["RoutingTensors", "huggingface_load_balancing_loss", "load_into", "read", "route"]


class RoutingTensors:
    """A routing as tensors, and the losses of its router. `route` makes it.

    The tensors share the memory of the arrays in `routing`, which has everything that is not here.
    All losses are scalars with the dtype of `weights`. Like those of the reference implementations,
    they are differentiable by probabilities and weights, and take counts as constants.

    Attributes
    ----------
    routing : Routing
        The same without gradients.
    weights : Tensor, shape (T, k), for expert choice (E, C)
        Differentiable by the logits, once. float64 for float64 logits, float32 for all others. 0.0
        where the expert was full.
    """

    routing: Routing
    weights: Tensor

    def __init__(self, logits: Tensor, router: Router, threads: int) -> None:
        self._logits = logits
        self._rule = rule = router.rule
        self._threads = threads
        self._array = array = as_array(logits, "logits")
        is_expert_choice = rule.method is RoutingMethod.EXPERT_CHOICE
        if not is_expert_choice and rule.compute_capacity(len(array)) is not None:
            # What a capacity drops is taken out below: losses count it.
            router = router.replace(capacity_factor=math.inf)
        self.routing = router(array, threads=threads)
        self._indices = torch.from_numpy(self.routing.indices)
        self._weights = Weights.apply(logits, array, self._indices, self.routing, rule, threads)
        self.weights = self._weights
        if not is_expert_choice:
            self._drop(rule.compute_capacity(len(array)))

    def _drop(self, capacity: int | None) -> None:
        """Take out what overflows, of copies of the indices and weights that losses count."""
        routing = self.routing
        routing.capacity = capacity
        if capacity is None or routing.tokens_per_expert.max(initial=0) <= capacity:
            return
        routing.indices = routing.indices.copy()
        routing.weights = routing.weights.copy()
        drop_overflow(self._rule, routing, capacity)
        self.weights = self._weights.masked_fill(torch.from_numpy(routing.indices) < 0, 0.0)
        routing.weights = self.weights.detach().numpy()

    @property
    def expert_indices(self) -> Tensor:
        """int32 `[T, k]`: the experts of each token, best first; -1 where the expert was full."""
        return torch.from_numpy(self.routing.expert_indices)

    @property
    def token_indices(self) -> Tensor:
        """int32 `[E, C]`: the tokens of each expert, for expert choice."""
        return torch.from_numpy(self.routing.token_indices)

    @property
    def tokens_per_expert(self) -> Tensor:
        """int64 `[E]`: tokens that each expert receives."""
        return torch.from_numpy(self.routing.tokens_per_expert)

    @property
    def offsets(self) -> Tensor:
        """int64 `[E + 1]`: expert e has the rows `offsets[e]:offsets[e + 1]` of the permutation."""
        return torch.from_numpy(self.routing.offsets)

    @property
    def permutation(self) -> Tensor:
        """int32 `[N]`: the N kept pairs, flattened `token * k + slot`, sorted by expert."""
        return torch.from_numpy(self.routing.permutation)

    @property
    def inverse_permutation(self) -> Tensor:
        """int32 `[T * k]`: where each flattened pair stands in `permutation`; -1 if dropped."""
        return torch.from_numpy(self.routing.inverse_permutation)

    def load_balancing_loss(self, alpha: float = 1.0) -> Tensor:
        """`alpha * E * sum(f * P)`, f the load and P the mean probabilities; alpha if even.

        The convention of the Switch Transformer (Fedus et al. 2022, equation 4) and Megatron-LM.
        """
        if self._rule.is_sigmoid:
            balance = (torch.from_numpy(self._even_load) * self._mean_probabilities()).sum()
        else:
            balance = self._means.balance
        return self._loss(alpha, balance)

    def z_loss(self, alpha: float = 1.0) -> Tensor:
        """`alpha` times the mean squared log-sum-exp of the logits (Zoph et al. 2022)."""
        return self._loss(alpha, self._mean_square())

    def importance_loss(self, alpha: float = 1.0) -> Tensor:
        """`alpha` times the squared coefficient of variation of the experts' summed weights.

        Shazeer et al. 2017, equation 7.
        """
        weights = self._weights.double()
        if self.routing.method is RoutingMethod.EXPERT_CHOICE:
            importance = weights.sum(1)
        else:
            importance = weights.new_zeros(self.routing.num_experts).index_add(
                0, self._indices.flatten(), weights.flatten()
            )
        return self._loss(alpha, importance.var(correction=0) / importance.mean() ** 2)

    @cached_property
    def _sums(self) -> ProbabilitySums:
        return sum_probabilities(self._array, self._rule, self._threads)

    @cached_property
    def _means(self) -> MeansOfSoftmax:
        """Of softmax, in one pass, whose probabilities are kept for the gradient."""
        return MeansOfSoftmax(
            *Means.apply(self._logits, self._array, self._even_load, self._rule, self._threads)
        )

    @property
    def _even_load(self) -> npt.NDArray[np.float64]:
        """`[E]`: the load of each expert, 1.0 where it is even."""
        counts = self.routing.tokens_per_expert_before_drop
        return divide(counts, int(counts.sum())) * len(counts)

    def _mean_probabilities(self) -> Tensor:
        if not self._rule.is_sigmoid:
            return self._means.probabilities
        return MeanProbabilities.apply(self._logits, self._sums, self._rule, self._threads)

    def _mean_square(self) -> Tensor:
        if not self._rule.is_sigmoid:
            return self._means.square
        return MeanSquare.apply(self._logits, self._sums, self._threads)

    def _loss(self, alpha: float, value: Tensor) -> Tensor:
        # A copy: whoever adds to a loss in place must not change the mean that others are made of.
        scaled = value if alpha == 1.0 else alpha * value
        return scaled.to(self.weights.dtype, copy=True)

    def __repr__(self) -> str:
        return repr(self.routing).replace("Routing", "RoutingTensors", 1)


def route(
    logits: Tensor,
    config: MoeConfig | Router,
    *,
    threads: int | None = None,
    **options: Unpack[RoutingOptions],
) -> RoutingTensors:
    """`moe_fast.route` on a tensor: the same choice, and weights and losses with gradients.

    Parameters
    ----------
    logits : Tensor of float32, float64, bfloat16 or float16, shape (T, E)
        On the CPU. Read where they are, whatever the stride of their rows.
    config : MoeConfig or Router
        As for `moe_fast.route`; a `Router` has its options checked already.
    threads : int, optional
        By default `MOE_FAST_NUM_THREADS`, or 1. Neither results nor gradients depend on it.
    **options
        Those of `moe_fast.route`, not for a `Router`; `selection_bias` may be a tensor and gets no
        gradient.

    Returns
    -------
    RoutingTensors

    Raises
    ------
    TypeError, MoeConfigError
        An argument of the wrong type, out of range, or without a meaning for the method.
    RoutingError
        Logits of the wrong shape, on another device, or a NaN among them.

    Notes
    -----
    The choice of experts, and what a capacity drops, has no gradient. With a softmax over all
    experts every logit of a token has one; renormalised, or with sigmoid scores, only those of the
    experts chosen.

    Examples
    --------
    >>> import torch
    >>> import moe_fast.torch
    >>> from moe_fast import MoeConfig
    >>> logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, -1.0]], requires_grad=True)
    >>> routing = moe_fast.torch.route(logits, MoeConfig(num_experts=3))
    >>> routing.expert_indices
    tensor([[1, 2],
            [0, 1]], dtype=torch.int32)
    >>> routing.weights[:, 0].sum().backward()
    >>> logits.grad
    tensor([[ 0.0000,  0.1966, -0.1966],
            [ 0.1966, -0.1966,  0.0000]])
    """
    router = make_router(config, options)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"logits must be a torch.Tensor, got {type(logits).__name__}; "
            "moe_fast.route takes arrays"
        )
    return RoutingTensors(logits, router, as_threads(threads))


def huggingface_load_balancing_loss(
    routings: Sequence[RoutingTensors], alpha: float = 1.0
) -> Tensor:
    """`alpha * E * sum(f * P)` as transformers' models have it, of the routings of all layers.

    All layers are pooled as one, and f is not divided by k: `alpha * k` where the load is even.

    Raises
    ------
    MoeConfigError
        No routing, or routings to different numbers of experts.

    Examples
    --------
    >>> import torch
    >>> from moe_fast import MoeConfig
    >>> from moe_fast.torch import huggingface_load_balancing_loss, route
    >>> layers = [torch.eye(4), 2 * torch.eye(4)]
    >>> routings = [route(logits, MoeConfig(num_experts=4, num_experts_per_tok=1))
    ...             for logits in layers]
    >>> huggingface_load_balancing_loss(routings)
    tensor(1.)
    """
    sizes = sorted({routing.routing.num_experts for routing in routings})
    if len(sizes) != 1:
        raise MoeConfigError(
            f"must all be to the same number of experts, got routings to {sizes}",
            argument="routings",
        )
    tokens = sum(routing.routing.num_tokens for routing in routings)
    counts = sum(routing.routing.tokens_per_expert_before_drop for routing in routings)
    pooled = sum(r._mean_probabilities() * (r.routing.num_tokens / tokens) for r in routings)
    return routings[0]._loss(alpha * sizes[0], (torch.from_numpy(counts / tokens) * pooled).sum())


class Weights(torch.autograd.Function):
    """The weights of all choices, before any is dropped."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        array: npt.NDArray[Any],
        indices: Tensor,
        routing: Routing,
        rule: Rule,
        threads: int,
    ) -> Tensor:
        ctx.save_for_backward(logits, indices)
        ctx.arguments = array, rule, threads
        return torch.from_numpy(routing.weights)

    @staticmethod
    def backward(ctx: Any, weight_gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, indices = ctx.saved_tensors
        array, rule, threads = ctx.arguments
        if rule.method is RoutingMethod.EXPERT_CHOICE:
            pull_back = gradients.pull_back_choice
        else:
            pull_back = gradients.pull_back_weights
        gradient = pull_back(
            array,
            rule,
            indices.numpy(),
            weight_gradient.contiguous().numpy(),
            threads,
        )
        return as_gradient(gradient, logits.dtype), None, None, None, None, None


class MeansOfSoftmax(NamedTuple):
    """float64, `[E]`, `[]` and `[]`: the mean probability of each expert, the sum of these times
    the experts' load, and the mean squared log-sum-exp.
    """

    probabilities: Tensor
    balance: Tensor
    square: Tensor


class Means(torch.autograd.Function):
    """`MeansOfSoftmax`. What one pass keeps is all that their gradients need."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        array: npt.NDArray[Any],
        load: npt.NDArray[np.float64],
        rule: Rule,
        threads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = np.empty(array.shape, np.float64 if array.itemsize == 8 else np.float32)
        log_sums = np.empty(len(array))
        sums = sum_probabilities(
            array, rule, threads, probabilities=probabilities, log_sums=log_sums
        )
        # Not saved as tensors, which backward of one loss would free before that of the other.
        ctx.kept = probabilities, log_sums, load
        ctx.arguments = logits.dtype, threads
        ctx.set_materialize_grads(False)
        means = sums.mean_probabilities
        return (
            torch.from_numpy(means),
            torch.from_numpy(np.asarray((load * means).sum())),
            torch.from_numpy(sums.mean_square),
        )

    @staticmethod
    def backward(
        ctx: Any,
        of_means: Tensor | None,
        of_balance: Tensor | None,
        of_square: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        probabilities, log_sums, load = ctx.kept
        dtype, threads = ctx.arguments
        mean_gradient = np.zeros(len(load)) if of_means is None else of_means.numpy()
        if of_balance is not None:
            mean_gradient = mean_gradient + of_balance.item() * load
        square_gradient = 0.0 if of_square is None else of_square.item()
        gradient = gradients.pull_back_means(
            probabilities, log_sums, mean_gradient, square_gradient, threads
        )
        return as_gradient(gradient, dtype), None, None, None, None


class MeanProbabilities(torch.autograd.Function):
    """float64 `[E]`: the mean probability of each expert."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, sums: ProbabilitySums, rule: Rule, threads: int
    ) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.arguments = rule, threads
        return torch.from_numpy(sums.mean_probabilities)

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        rule, threads = ctx.arguments
        gradient = gradients.pull_back_probabilities(
            as_array(logits, "logits"), rule, mean_gradient.numpy(), threads
        )
        return as_gradient(gradient, logits.dtype), None, None, None


class MeanSquare(torch.autograd.Function):
    """float64: the mean squared log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, sums: ProbabilitySums, threads: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.threads = threads
        return torch.from_numpy(sums.mean_square)

    @staticmethod
    def backward(ctx: Any, mean_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        gradient = gradients.pull_back_squares(
            as_array(logits, "logits"), mean_gradient.item(), ctx.threads
        )
        return as_gradient(gradient, logits.dtype), None, None


def as_gradient(gradient: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A gradient in the dtype of the logits."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gradients of moe_fast.torch have none themselves: create_graph must be False"
        )
    return torch.from_numpy(gradient).to(dtype)
