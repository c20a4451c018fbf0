"""How routers start: one class a method, which makes the router of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.routers import PromptRows, make_prompt_rows
from moe_fast.checkpoint.random_pieces import (
    RandomRouter,
    ReferenceRouter,
    SharpenedRouter,
    choose_stream,
)
from moe_fast.config import RouterInit
from moe_fast.dtypes import ITEM_SIZES
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.families.dense import DenseModel
from moe_fast.request import ExpertSource, RouterMethod, RouterStart
from moe_fast.routing.sharpness import sharpen
from moe_fast.storage.floats import decode, encode
from moe_fast.storage.pieces import Given, Piece, Remembered


@dataclass(frozen=True)
class RouterContext:
    """What a start may make its rows from.

    `experts` says what each expert is made from; `shared_experts` likewise. `layers` are the
    layers that have experts, `dtype` is the routers', as safetensors spells it.
    """

    base: DenseModel
    experts: Sequence[ExpertSource]
    shared_experts: Sequence[ExpertSource]
    layers: Sequence[int]
    dtype: str
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(num_experts, hidden_size)`."""
        return len(self.experts), self.base.sizes.hidden_size

    def encoded(self, rows: npt.NDArray[np.float32]) -> Given:
        """Rows as the piece to write."""
        return Given(encode(rows, self.dtype).tobytes())

    def stream(self, layer: int) -> int:
        """Where the draws of a layer's router begin."""
        return choose_stream(self.seed, f"{layer} router")


class Routers:
    """Base of the starts: the router of each layer, and what weighs its shared experts."""

    methods: ClassVar[tuple[RouterMethod, ...]] = ()
    remedy: str = "balancing in training helps"
    """What to do about experts that would starve."""
    repeatable: bool = True
    """Whether the same bytes can be made again with certainty; else their digests are kept."""

    def __init__(self, start: RouterStart, context: RouterContext) -> None:
        self.start = start
        self.context = context

    @property
    def hidden_states(self) -> npt.NDArray[np.float32] | None:
        """What the routers will read of some tokens, `(num_layers, T, hidden_size)`, if known."""
        return None

    def router(self, layer: int) -> Piece:
        """The router of a layer, `(num_experts, hidden_size)`."""
        raise NotImplementedError

    def shared_gate(self, layer: int) -> Piece:
        """What the sigmoid that weighs a layer's shared experts multiplies with, `(hidden_size,)`.

        It is small, so that the sigmoid is about one half, and not zero: llama.cpp computes it as
        `silu(x) / x`.
        """
        hidden_size, dtype = self.context.shape[1], self.context.dtype
        return ReferenceRouter(hidden_size, 1, layer, RouterInit.BALANCED, dtype, remove_base=True)

    @property
    def makes_gates(self) -> bool:
        """Whether the start makes what weighs the shared experts too."""
        return False

    def pieces(self) -> list[Piece]:
        """The router of each layer, then what weighs the shared experts where the start made it."""
        layers = self.context.layers
        gates = [self.shared_gate(layer) for layer in layers] if self.makes_gates else []
        return [*(self.router(layer) for layer in layers), *gates]


class ReferenceRouters(Routers):
    """The draws of `compute_gate_weights`."""

    methods: ClassVar[tuple[RouterMethod, ...]] = ("balanced", "random")

    def router(self, layer: int) -> Piece:
        num_experts, hidden_size = self.context.shape
        init = RouterInit(self.start.method)
        alone = self.start.logit_std is not None  # the base would be rounded away from the noise
        return ReferenceRouter(
            hidden_size, num_experts, layer, init, self.context.dtype, remove_base=alone
        )


class UniformRouters(ReferenceRouters):
    """The same weight everywhere."""

    methods = ("uniform",)
    remedy = "routers that start balanced or random tell experts apart"


class NormalRouters(Routers):
    """Draws from the standard normal distribution."""

    methods = ("normal",)

    def router(self, layer: int) -> Piece:
        return RandomRouter(*self.context.shape, self.context.dtype, self.context.stream(layer))


class LinearRouters(Routers):
    """Draws from `[-s, s]`, `s = 1 / sqrt(hidden_size)`, as `torch.nn.Linear` starts."""

    methods = ("linear",)

    def router(self, layer: int) -> Piece:
        shape, stream = self.context.shape, self.context.stream(layer)
        return RandomRouter(*shape, self.context.dtype, stream, bound=1 / math.sqrt(shape[1]))


class PromptRouters(Routers):
    """Each expert's row from its prompts, and so the shared experts' gate where they have some."""

    methods: ClassVar[tuple[RouterMethod, ...]] = ("cheap_embed",)
    remedy = "give experts prompts that differ more, and more of them"

    @property
    def makes_gates(self) -> bool:
        return any(expert.positive_prompts for expert in self.context.shared_experts)

    @cached_property
    def rows(self) -> PromptRows:
        """Those of the experts, and after them that of the shared experts' gate."""
        context = self.context
        shared = [combine_prompts(context.shared_experts)] if self.makes_gates else []
        return make_prompt_rows(self.start.method, context.base, context.experts, shared)

    @property
    def hidden_states(self) -> npt.NDArray[np.float32] | None:
        return self.rows.hidden_states

    def router(self, layer: int) -> Piece:
        return self.context.encoded(self.rows.weights[layer, : len(self.context.experts)])

    def shared_gate(self, layer: int) -> Piece:
        if not self.makes_gates:
            return super().shared_gate(layer)
        return self.context.encoded(self.rows.weights[layer, len(self.context.experts) :])


class HiddenRouters(PromptRouters):
    """Rows from what the router will read of the prompts, which a run of the base model says."""

    methods = ("hidden",)
    repeatable = False


class SharpenedRouters(Routers):
    """Those of another start, scaled to the `logit_std` that is asked for."""

    def __init__(self, start: RouterStart, context: RouterContext) -> None:
        super().__init__(start, context)
        if context.shape[0] < 2:
            raise MoeConfigError(
                "is a standard deviation over experts, of which there is only 1",
                argument="logit_std",
            )
        kind = STARTS[start.method]
        self.source = kind(start, replace(context, dtype="F32"))
        self.remedy, self.repeatable = kind.remedy, kind.repeatable

    @property
    def hidden_states(self) -> npt.NDArray[np.float32] | None:
        return self.source.hidden_states

    def router(self, layer: int) -> Piece:
        piece, logit_std = self.source.router(layer), self.start.logit_std
        assert logit_std is not None
        num_experts, dtype = self.context.shape[0], self.context.dtype
        if self.hidden_states is None:
            return SharpenedRouter(piece, num_experts, dtype, logit_std)
        rows = decode(b"".join(piece.chunks()), "F32").reshape(num_experts, -1)
        return self.context.encoded(sharpen(rows, logit_std, self.hidden_states[layer]))

    @property
    def makes_gates(self) -> bool:
        return self.source.makes_gates

    def shared_gate(self, layer: int) -> Piece:
        if not self.makes_gates:
            return super().shared_gate(layer)
        gate = self.source.shared_gate(layer)
        return self.context.encoded(decode(b"".join(gate.chunks()), "F32"))


class RememberedRouters(Routers):
    """Routers that were made once: their digests tell them from others."""

    def __init__(self, start: RouterStart, context: RouterContext, digests: Sequence[str]) -> None:
        super().__init__(start, context)
        gates = start.from_prompts and any(e.positive_prompts for e in context.shared_experts)
        self.digest_of_router = dict(zip(context.layers, digests, strict=False))
        self.digest_of_gate: Mapping[int, str] = {}
        if gates:
            rest = digests[len(context.layers) :]
            self.digest_of_gate = dict(zip(context.layers, rest, strict=False))
        expected = len(context.layers) * (2 if gates else 1)
        if len(digests) != expected:
            raise CheckpointError(
                f"router_sha256 has {len(digests)} digests for {expected} routers and gates"
            )

    def router(self, layer: int) -> Piece:
        return self.remembered(self.context.shape[0], self.digest_of_router[layer])

    def shared_gate(self, layer: int) -> Piece:
        if layer not in self.digest_of_gate:
            return super().shared_gate(layer)
        return self.remembered(1, self.digest_of_gate[layer])

    def remembered(self, rows: int, digest: str) -> Remembered:
        nbytes = rows * self.context.shape[1] * ITEM_SIZES[self.context.dtype]
        return Remembered(nbytes, digest)


STARTS: Mapping[RouterMethod, type[Routers]] = {
    method: start
    for start in (
        *(ReferenceRouters, UniformRouters, NormalRouters, LinearRouters),
        *(PromptRouters, HiddenRouters),
    )
    for method in start.methods
}


def make_routers(
    start: RouterStart, context: RouterContext, digests: Sequence[str] = ()
) -> Routers:
    """The routers of a build; with the digests of those that cannot be made again, these."""
    kind = STARTS[start.method]
    if digests and not kind.repeatable:
        return RememberedRouters(start, context, digests)
    if start.logit_std is not None:
        return SharpenedRouters(start, context)
    return kind(start, context)


def digest_routers(routers: Routers) -> dict[str, list[str]]:
    """What a manifest keeps of routers that cannot be made again with certainty."""
    if isinstance(routers, RememberedRouters) or routers.repeatable:
        return {}
    return {"router_sha256": [sha256(b"".join(p.chunks())).hexdigest() for p in routers.pieces()]}


def combine_prompts(experts: Sequence[ExpertSource]) -> ExpertSource:
    """One expert with the prompts of all."""
    return replace(
        experts[0],
        positive_prompts=tuple(p for expert in experts for p in expert.positive_prompts),
        negative_prompts=tuple(p for expert in experts for p in expert.negative_prompts),
    )
