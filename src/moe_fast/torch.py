"""Routing that torch differentiates, on the CPU: `moe_fast.torch.route`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.errors import MoeConfigError
from moe_fast.routing.arrays import as_array
from moe_fast.routing.choose import drop_overflow
from moe_fast.routing.gradients import Choice, pull_back
from moe_fast.routing.options import RoutingOptions, Rule
from moe_fast.routing.result import Routing, Softmax
from moe_fast.routing.router import Router, make_router, without_capacity
from moe_fast.routing.statistics import divide, sum_probabilities
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
    """The result of `route` as tensors, and the losses of its router.

    The tensors share the memory of the arrays in `routing`, which has everything that is not here.
    All losses are scalars with the dtype of `weights`. Like those of the reference implementations,
    they are differentiable by probabilities and weights, and take counts as constants.

    Attributes
    ----------
    routing : Routing
        What `moe_fast.route` returns for the same logits: arrays, without gradients.
    weights : Tensor, shape (T, k), for expert choice (E, C)
        Differentiable by the logits, once. float64 for float64 logits, float32 for all others. 0.0
        where the expert was full.
    """

    routing: Routing
    weights: Tensor

    def __init__(self, logits: Tensor, router: Router, threads: int) -> None:
        self._rule = rule = router.rule
        array = as_array(logits, "logits")
        is_expert_choice = rule.method is RoutingMethod.EXPERT_CHOICE
        if not is_expert_choice:
            # What a capacity drops is taken out below: losses count it.
            router = without_capacity(router)
        self.routing = router(array, threads=threads)
        self._indices = torch.from_numpy(self.routing.indices)
        self._means = Means(array, rule, self.routing, threads)
        self._weights, self._mean_probabilities, self._balance, self._mean_square = (
            Differentiable.apply(logits, self._indices, self.routing.weights, self._means)
        )
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
        self._means.fill()
        return self._loss(alpha, self._balance)

    def z_loss(self, alpha: float = 1.0) -> Tensor:
        """`alpha` times the mean squared log-sum-exp of the logits (Zoph et al. 2022)."""
        self._means.fill()
        return self._loss(alpha, self._mean_square)

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

    def _loss(self, alpha: float, value: Tensor) -> Tensor:
        # New even where alpha is 1: whoever adds to a loss in place must not change the mean.
        return (alpha * value).to(self.weights.dtype)

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
        If an argument has the wrong type, is out of range, or means nothing for the method.
    RoutingError
        If the logits have the wrong shape, are on another device, or hold a NaN.

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

    Parameters
    ----------
    routings : sequence of RoutingTensors
        One for each layer, all to the same number of experts.
    alpha : float
        Multiplies the loss: `router_aux_loss_coef` in config.json.

    Returns
    -------
    Tensor
        A scalar, differentiable by the logits of all layers.

    Raises
    ------
    MoeConfigError
        If there is no routing, or if they are to different numbers of experts.

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
    for routing in routings:
        routing._means.fill()
    pooled = sum(r._mean_probabilities * (r.routing.num_tokens / tokens) for r in routings)
    return routings[0]._loss(alpha * sizes[0], (torch.from_numpy(counts / tokens) * pooled).sum())


class Means:
    """What losses are made of, computed when the first of them is asked for.

    It is filled into memory that tensors share, so that these can be results of `Differentiable`
    before anything is computed.

    Attributes
    ----------
    probabilities : float64 [E]
        The mean probability of each expert.
    load : float64 [E]
        The load of each expert, 1.0 where it is even.
    balance : [], with the dtype of weights
        The sum of their products.
    square : [], with the dtype of weights
        The mean squared log-sum-exp.
    softmax : Softmax, optional
        What the gradient needs of a softmax over all experts, kept once it is computed.
    """

    def __init__(self, array: npt.NDArray[Any], rule: Rule, routing: Routing, threads: int) -> None:
        self.array, self.rule, self.threads = array, rule, threads
        self.counts = routing.tokens_per_expert_before_drop
        self.dtype = routing.weights.dtype
        self.probabilities = np.empty(rule.num_experts)
        self.balance = np.empty((), self.dtype)
        self.square = np.empty((), self.dtype)
        self.load: npt.NDArray[np.float64] | None = None
        self.softmax: Softmax | None = None

    def fill(self) -> None:
        """Compute it, if that has not been done."""
        if self.load is not None:
            return
        if not self.rule.is_sigmoid:
            probabilities = np.empty(self.array.shape, self.dtype)
            self.softmax = Softmax(probabilities, np.empty(len(self.array)))
        sums = sum_probabilities(self.array, self.rule, self.threads, self.softmax)
        self.probabilities[:] = sums.mean_probabilities
        load = divide(self.counts, int(self.counts.sum())) * len(self.counts)
        self.balance[...] = (load * self.probabilities).sum()
        self.square[...] = sums.mean_square
        self.load = load


class Differentiable(torch.autograd.Function):
    """The weights of all choices, before any is dropped, and the `Means`.

    One function of the logits, so that one pass has the gradient by all of them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, indices: Tensor, weights: npt.NDArray[Any], means: Means
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, indices)
        ctx.means, ctx.dtype = means, logits.dtype
        ctx.set_materialize_grads(False)
        results = weights, means.probabilities, means.balance, means.square
        return tuple(map(torch.from_numpy, results))

    @staticmethod
    def backward(
        ctx: Any,
        of_weights: Tensor | None,
        of_probabilities: Tensor | None,
        of_balance: Tensor | None,
        of_square: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        means = ctx.means
        mean_gradient = None if of_probabilities is None else of_probabilities.numpy()
        if of_balance is not None:
            of_load = of_balance.item() * means.load
            mean_gradient = of_load if mean_gradient is None else mean_gradient + of_load
        choice = None
        if of_weights is not None or means.softmax is None:
            # Says if the logits were changed meanwhile; what a softmax needs of them is kept.
            _, indices = ctx.saved_tensors
        if of_weights is not None:
            choice = Choice(indices.numpy(), of_weights.contiguous().numpy())
        gradient = pull_back(
            means.array,
            means.rule,
            means.threads,
            choice=choice,
            mean_gradient=mean_gradient,
            square_gradient=0.0 if of_square is None else of_square.item(),
            softmax=means.softmax,
        )
        return as_gradient(gradient, ctx.dtype), None, None, None


def as_gradient(gradient: npt.NDArray[Any], dtype: torch.dtype) -> Tensor:
    """A gradient in the dtype of the logits."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gradients of moe_fast.torch have none themselves: create_graph must be False"
        )
    return torch.from_numpy(gradient).to(dtype)
