"""How routers start: one class a method, which makes the router of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.balancing import (
    Floats,
    balance,
    mean_input,
    remove_direction,
    remove_span,
    topic_directions,
)
from moe_fast.calibration.clustering import spherical_k_means, unit_rows
from moe_fast.calibration.kinds import mean_rows, ridge_rows
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
from moe_fast.records import dataclass
from moe_fast.request import ExpertSource, RouterMethod, RouterStart
from moe_fast.routing.health import HealthRecord, RouterHealth
from moe_fast.routing.sharpness import measure_logit_std, sharpen
from moe_fast.storage.floats import decode, encode
from moe_fast.storage.pieces import Given, Piece, Remembered

if TYPE_CHECKING:
    from moe_fast.calibration.routers import PromptRows
    from moe_fast.calibration.selection import Selection
    from moe_fast.calibration.texts import Tokens

BESIDE = 0.5  # how much of the spread of rows of kinds random rows beside them have


@dataclass(frozen=True)
class RouterContext:
    """What a start may make its rows from.

    `experts` says what each expert is made from; `shared_experts` likewise. `layers` are the
    layers that have experts, `dtype` is the routers', as safetensors spells it. `opened` are the
    models of the experts; a token goes to `num_experts_per_tok` of them.
    """

    base: DenseModel
    experts: Sequence[ExpertSource]
    shared_experts: Sequence[ExpertSource]
    layers: Sequence[int]
    dtype: str
    seed: int
    num_experts_per_tok: int = 1
    opened: Mapping[str, DenseModel] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """`(num_experts, hidden_size)`."""
        return len(self.experts), self.base.sizes.hidden_size

    @property
    def folder(self) -> Path:
        """The model that reads texts."""
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        """Its configuration."""
        return self.base.config

    def stream_inputs(
        self, texts: Sequence[Tokens], start: RouterStart, kind: ExpertSource | None
    ) -> Iterator[tuple[int, Floats]]:
        """What the routers will read of tokens, layer by layer; through the FFNs of a `kind`."""
        from moe_fast.calibration.activations import stream_router_inputs

        yield from stream_router_inputs(
            self.base,
            texts,
            experts=None if kind is None else self.opened[kind.origin],
            source_layers=None if kind is None else kind.source_layers,
            device=start.device,
            needed_by=f"routers={start.method!r}",
        )

    def use(self, layer: int, rows: Floats) -> Floats | None:
        """Take the rows that a layer gets; those that it had, if it had some."""
        return None

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

    @property
    def health(self) -> RouterHealth | None:
        """How they spread the tokens of a text, if they were made from one."""
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
    remedy = "choose other routers, such as auto or random"


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
        from moe_fast.calibration.routers import make_prompt_rows

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
        require_several(context)
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


class TextRouters(Routers):
    """Rows made from what the routers will read of texts, all layers in one pass."""

    repeatable = False
    remedy = "give more text, and more kinds of it"

    def make(
        self, layer: int, inputs: Sequence[Floats], experts: Sequence[Sequence[int]]
    ) -> tuple[Floats, Floats]:
        """The rows of a layer, and what they would be without being evened.

        `inputs` are what the router reads of the tokens of each kind of text, `experts` are those
        of each kind.
        """
        raise NotImplementedError

    def kinds(self) -> dict[ExpertSource, list[int]]:
        """Each kind of text, by an expert that is of it, and all experts of the kind."""
        (first, *_) = self.context.experts
        return {first: list(range(len(self.context.experts)))}

    def select(self, kinds: Mapping[ExpertSource, Sequence[int]]) -> list[Selection]:
        """The tokens of each kind."""
        return [self.select_from(self.start.texts or self.all_texts())]

    def all_texts(self) -> list[str]:
        """Those of all experts, each once."""
        return list(dict.fromkeys(text for e in self.context.experts for text in e.texts))

    def select_from(self, texts: Sequence[str], share: int = 1) -> Selection:
        """Tokens of these texts, for so many kinds."""
        from moe_fast.calibration.selection import select_tokens

        start, context = self.start, self.context
        if not texts and start.tokens is None:
            raise MoeConfigError(
                f"must be files of text, unless tokens are given: routers={start.method!r} are "
                "made from them",
                argument="texts",
            )
        num_experts = -(-context.shape[0] // share)
        used = None if start.tokens_used is None else max(1, start.tokens_used // share)
        return select_tokens(
            context.folder, context.config, num_experts,
            texts=texts, tokens=start.tokens, tokens_used=used,
        )  # fmt: skip

    @cached_property
    def made(self) -> tuple[dict[int, Given], RouterHealth]:
        """The router of each layer, and how it spreads the tokens."""
        context, start = self.context, self.start
        kinds = self.kinds()
        selections = self.select(kinds)
        held_out = all(each.num_held_out for each in selections)
        source = "held-out tokens of the texts" if held_out else "tokens of the texts"
        top_k = context.num_experts_per_tok
        health = HealthRecord(top_k, source=source, remedy=self.remedy)
        before = HealthRecord(top_k, source=source, remedy=self.remedy)
        streams = [
            context.stream_inputs(selection.sequences, start, kind if len(kinds) > 1 else None)
            for kind, selection in zip(kinds, selections, strict=True)
        ]
        pieces = {}
        for layers in zip(*streams, strict=True):
            number = layers[0][0]
            if number not in context.layers:
                continue
            pairs = list(zip(layers, selections, strict=True))
            used = [inputs[: chosen.num_used] for (_, inputs), chosen in pairs]
            judged = [inputs[chosen.num_used :] for (_, inputs), chosen in pairs]
            states = np.concatenate(judged if held_out else used)
            rows, plain = self.make(number, used, list(kinds.values()))
            assert start.logit_std is not None
            pieces[number] = context.encoded(sharpen(rows, start.logit_std, np.concatenate(used)))
            written = decode(pieces[number].data, context.dtype).reshape(context.shape)
            health.add(number, written, states)
            had = context.use(number, written)
            before.add(number, plain if had is None else had, states)
        return pieces, health.report(before.variation)

    @property
    def health(self) -> RouterHealth | None:
        return self.made[1]

    def router(self, layer: int) -> Piece:
        return self.made[0][layer]

    def draw(self, layer: int) -> Floats:
        """Standard normal rows."""
        router = RandomRouter(*self.context.shape, "F32", self.context.stream(layer))
        return decode(b"".join(router.chunks()), "F32").reshape(self.context.shape)


class CalibratedRouters(TextRouters):
    """Normal draws without the direction that all tokens share, nor topics; their load evened."""

    methods: ClassVar[tuple[RouterMethod, ...]] = ("calibrated",)

    def make(
        self, layer: int, inputs: Sequence[Floats], experts: Sequence[Sequence[int]]
    ) -> tuple[Floats, Floats]:
        rows, read = self.draw(layer), np.concatenate(inputs)
        without = remove_direction(rows, mean_input(read))
        without = remove_span(without, topic_directions(read))
        return balance(without, read, self.context.num_experts_per_tok), rows


class ClusteredRouters(TextRouters):
    """A row for each cluster of tokens, by spherical k-means around their mean, the load evened."""

    methods: ClassVar[tuple[RouterMethod, ...]] = ("clustered",)

    def make(
        self, layer: int, inputs: Sequence[Floats], experts: Sequence[Sequence[int]]
    ) -> tuple[Floats, Floats]:
        read = np.concatenate(inputs)
        mean = mean_input(read)
        vectors = unit_rows(read - mean)
        rows, _ = spherical_k_means(vectors, self.context.shape[0], self.context.stream(layer))
        without = remove_direction(rows, mean)
        return balance(without, read, self.context.num_experts_per_tok), rows


class KindRouters(TextRouters):
    """A row for each kind of text; of experts of one kind, random rows beside it tell them apart.

    The random rows are as `"calibrated"` ones of their kind, with logits of half of the spread that
    the rows of the kinds have.
    """

    methods: ClassVar[tuple[RouterMethod, ...]] = ("ridge", "means")
    remedy = "give texts of the kinds that differ more"

    def kinds(self) -> dict[ExpertSource, list[int]]:
        found: dict[tuple[Any, ...], list[int]] = {}
        for number, expert in enumerate(self.context.experts):
            found.setdefault((expert.origin, expert.source_layers, expert.texts), []).append(number)
        experts = {self.context.experts[numbers[0]]: numbers for numbers in found.values()}
        if len(experts) < 2:
            raise MoeConfigError(
                f"{self.start.method!r} tells the texts of several experts apart, and all "
                f"{len(self.context.experts)} are of one; 'calibrated' takes one text for all",
                argument="routers",
            )
        missing = [expert.origin for expert in experts if not expert.texts]
        if missing:
            raise MoeConfigError(
                f"{self.start.method!r} tells the texts of experts apart; give each of them texts "
                f"(recipes have the key, ExpertSource the argument): {', '.join(missing)} has none",
                argument="routers",
            )
        return experts

    def select(self, kinds: Mapping[ExpertSource, Sequence[int]]) -> list[Selection]:
        return [self.select_from(kind.texts, len(kinds)) for kind in kinds]

    def make(
        self, layer: int, inputs: Sequence[Floats], experts: Sequence[Sequence[int]]
    ) -> tuple[Floats, Floats]:
        of_kind = ridge_rows(inputs) if self.start.method == "ridge" else mean_rows(inputs)
        rows = np.empty(self.context.shape, np.float32)
        for row, numbers in zip(of_kind, experts, strict=True):
            rows[list(numbers)] = row
        if all(len(numbers) == 1 for numbers in experts):
            return rows, rows
        read = np.concatenate(inputs)
        spread = measure_logit_std(rows, read)
        draws = self.draw(layer)
        for numbers, own in zip(experts, inputs, strict=True):
            if len(numbers) > 1:
                own_rows = remove_direction(draws[list(numbers)], mean_input(own))
                scale = BESIDE * spread if spread > 0 else 1.0
                rows[list(numbers)] += sharpen(own_rows, scale, own)
        return balance(rows, read, self.context.num_experts_per_tok, experts), rows


class SharpenedByText(TextRouters):
    """Those of another start, scaled to the `logit_std` that is asked for on tokens of texts."""

    def __init__(self, start: RouterStart, context: RouterContext) -> None:
        super().__init__(start, context)
        require_several(context)
        self.source = STARTS[start.method](start, replace(context, dtype="F32"))
        self.remedy = self.source.remedy

    def make(
        self, layer: int, inputs: Sequence[Floats], experts: Sequence[Sequence[int]]
    ) -> tuple[Floats, Floats]:
        piece = self.source.router(layer)
        rows = decode(b"".join(piece.chunks()), "F32").reshape(self.context.shape)
        return rows, rows

    @property
    def makes_gates(self) -> bool:
        return self.source.makes_gates

    def shared_gate(self, layer: int) -> Piece:
        if not self.makes_gates:
            return super().shared_gate(layer)
        gate = self.source.shared_gate(layer)
        return self.context.encoded(decode(b"".join(gate.chunks()), "F32"))


def require_several(context: RouterContext) -> None:
    """Raise `MoeConfigError` unless there are experts to tell apart."""
    if context.shape[0] < 2:
        raise MoeConfigError(
            "is a standard deviation over experts, of which there is only 1", argument="logit_std"
        )


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
        *(CalibratedRouters, ClusteredRouters, KindRouters),
    )
    for method in start.methods
}


def make_routers(
    start: RouterStart, context: RouterContext, digests: Sequence[str] = ()
) -> Routers:
    """The routers of a build; with the digests of those that cannot be made again, these."""
    kind = STARTS[start.method]
    if digests and (start.from_text or not kind.repeatable):
        return RememberedRouters(start, context, digests)
    if issubclass(kind, TextRouters):
        require_several(context)
        return kind(start, context)
    if start.from_text:
        return SharpenedByText(start, context)
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
