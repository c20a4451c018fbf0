"""Routing that torch differentiates, on the CPU: `moe_fast.torch.route`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Unpack

import numpy.typing as npt

from moe_fast.config import MoeConfig, RoutingMethod
from moe_fast.dtypes import as_dtype
from moe_fast.errors import MoeConfigError, RoutingError
from moe_fast.routing import gradients
from moe_fast.routing import router as routing
from moe_fast.routing.router import Routing, RoutingOptions
from moe_fast.routing.statistics import RoutingStats
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

    def __init__(self, logits: Tensor, stats: RoutingStats, threads: int) -> None:
        self._logits = logits
        self._stats = stats
        self._threads = threads
        array = as_array(logits, "logits")
        rule, options = stats._rule, stats.options
        if rule.method is RoutingMethod.EXPERT_CHOICE:
            self.routing = routing.route(array, stats.config, threads=threads, **options)
        else:
            unlimited: RoutingOptions = {**options, "capacity_factor": math.inf}
            self.routing = routing.route(array, stats.config, threads=threads, **unlimited)
        self._chosen = torch.from_numpy(self.routing._indices)
        self._weights = Weights.apply(logits, self._chosen, self.routing, rule, threads)
        self.weights = self._weights
        if rule.method is not RoutingMethod.EXPERT_CHOICE:
            self._drop(rule.capacity(len(array)))

    def _drop(self, capacity: int | None) -> None:
        """Take out what overflows, but not of what losses count."""
        kept = self.routing
        kept.capacity = capacity
        if capacity is None or kept.tokens_per_expert.max(initial=0) <= capacity:
            return
        kept._indices = kept._indices.copy()
        kept.weights = kept.weights.copy()
        routing.drop(self._stats._rule, kept, capacity)
        self.weights = self._weights.masked_fill(torch.from_numpy(kept._indices) < 0, 0.0)
        kept.weights = self.weights.detach().numpy()

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
        load = torch.from_numpy(self._added.load[0])
        return self._loss(alpha * len(load) * (load * self._mean_probabilities()).sum())

    def z_loss(self, alpha: float = 1.0) -> Tensor:
        """`alpha` times the mean squared log-sum-exp of the logits (Zoph et al. 2022)."""
        return self._loss(alpha * MeanSquare.apply(self._logits, self._added, self._threads))

    def importance_loss(self, alpha: float = 1.0) -> Tensor:
        """`alpha` times the squared coefficient of variation of the experts' summed weights.

        Shazeer et al. 2017, equation 7.
        """
        weights = self._weights.double()
        if self.routing.method is RoutingMethod.EXPERT_CHOICE:
            importance = weights.sum(1)
        else:
            importance = weights.new_zeros(self.routing.num_experts).index_add(
                0, self._chosen.flatten(), weights.flatten()
            )
        return self._loss(alpha * importance.var(correction=0) / importance.mean() ** 2)

    @cached_property
    def _added(self) -> RoutingStats:
        """The statistics of this routing."""
        stats, num_tokens = self._stats, self.routing.num_tokens
        stats._add_probabilities(as_array(self._logits, "logits"), 0, num_tokens, self._threads)
        stats.counts[0] += self.routing.tokens_per_expert_before_drop
        stats.num_tokens[0] += num_tokens
        return stats

    def _mean_probabilities(self) -> Tensor:
        return MeanProbabilities.apply(self._logits, self._added, self._threads)

    def _loss(self, value: Tensor) -> Tensor:
        return value.to(self.weights.dtype)

    def __repr__(self) -> str:
        return repr(self.routing).replace("Routing", "RoutingTensors", 1)


def route(
    logits: Tensor,
    config: MoeConfig,
    *,
    threads: int | None = None,
    **options: Unpack[RoutingOptions],
) -> RoutingTensors:
    """`moe_fast.route` on a tensor: the same choice, and weights and losses with gradients.

    Parameters
    ----------
    logits : Tensor of float32, float64, bfloat16 or float16, shape (T, E)
        On the CPU. Read where they are, whatever the stride of their rows.
    config : MoeConfig
        As for `moe_fast.route`.
    threads : int, optional
        By default `MOE_FAST_NUM_THREADS`, or 1. Neither results nor gradients depend on it.
    **options
        Those of `moe_fast.route`; `selection_bias` may be a tensor and gets no gradient.

    Returns
    -------
    RoutingTensors

    Raises
    ------
    TypeError, MoeConfigError
        An argument of the wrong type, out of range, or without a meaning for the method.
    RoutingError
        Logits of the wrong shape, on another device, or a NaN among them.
    ModuleNotFoundError
        bfloat16 logits without ml_dtypes.

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
    bias = options.get("selection_bias")
    if isinstance(bias, torch.Tensor):
        options["selection_bias"] = as_array(bias, "selection_bias")
    return RoutingTensors(logits, RoutingStats(config, **options), as_threads(threads))


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
            f"routings must all be to the same number of experts, got routings to {sizes}"
        )
    tokens = sum(routing.routing.num_tokens for routing in routings)
    counts = sum(routing.routing.tokens_per_expert_before_drop for routing in routings)
    pooled = sum(r._mean_probabilities() * (r.routing.num_tokens / tokens) for r in routings)
    loss = alpha * sizes[0] * (torch.from_numpy(counts / tokens) * pooled).sum()
    return routings[0]._loss(loss)


class Weights(torch.autograd.Function):
    """The weights of all choices, before any is dropped."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, chosen: Tensor, routing: Routing, rule: Any, threads: int
    ) -> Tensor:
        ctx.save_for_backward(logits, chosen)
        ctx.how = rule, threads
        return torch.from_numpy(routing.weights)

    @staticmethod
    def backward(ctx: Any, of_weights: Tensor) -> tuple[Tensor | None, ...]:
        logits, chosen = ctx.saved_tensors
        rule, threads = ctx.how
        if rule.method is RoutingMethod.EXPERT_CHOICE:
            pull_back = gradients.pull_back_choice
        else:
            pull_back = gradients.pull_back_weights
        gradient = pull_back(
            as_array(logits, "logits"),
            rule,
            chosen.numpy(),
            of_weights.contiguous().numpy(),
            threads,
        )
        return as_gradient(gradient, logits), None, None, None, None


class MeanProbabilities(torch.autograd.Function):
    """float64 `[E]`: the mean probability of each expert."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, stats: RoutingStats, threads: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.how = stats._rule, threads
        return torch.from_numpy(stats.mean_probabilities[0])

    @staticmethod
    def backward(ctx: Any, of_means: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        rule, threads = ctx.how
        gradient = gradients.pull_back_probabilities(
            as_array(logits, "logits"), rule, of_means.numpy(), threads
        )
        return as_gradient(gradient, logits), None, None


class MeanSquare(torch.autograd.Function):
    """float64: the mean squared log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, stats: RoutingStats, threads: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.threads = threads
        return torch.from_numpy(stats.z_loss()).squeeze(0)

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor) -> tuple[Tensor | None, ...]:
        (logits,) = ctx.saved_tensors
        gradient = gradients.pull_back_squares(
            as_array(logits, "logits"), of_mean.item(), ctx.threads
        )
        return as_gradient(gradient, logits), None, None


def as_array(tensor: Tensor, name: str) -> npt.NDArray[Any]:
    """The same memory as an array."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(tensor).__name__}; "
            "moe_fast.route takes arrays"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {tensor.layout}; {name}.to_dense() is")
    if tensor.device.type != "cpu":
        raise RoutingError(
            f"{name} must be on the CPU, got a tensor on {tensor.device}; route {name}.cpu(), "
            "through which gradients flow back"
        )
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(as_dtype("bfloat16"))  # type: ignore[no-any-return]
    return tensor.numpy()  # type: ignore[no-any-return]


def as_gradient(gradient: npt.NDArray[Any], logits: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "gradients of moe_fast.torch have none themselves: create_graph must be False"
        )
    return torch.from_numpy(gradient).to(logits.dtype)
