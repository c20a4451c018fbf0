"""What a target is built from: the base, the sources and the plan, as weights by role.

Whatever happens to a weight on its way happens here, so that a target only gives names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.files import SourceFile
from moe_fast.checkpoint.header import DTYPE_NAMES, ITEM_SIZES, Tensor
from moe_fast.checkpoint.noise import Perturbed, RandomRouter, noise_stream
from moe_fast.checkpoint.pieces import (
    FileRange,
    Given,
    Piece,
    Remembered,
    Router,
    SideBySide,
)
from moe_fast.checkpoint.request import ExpertSource
from moe_fast.checkpoint.source import FFN, DenseModel
from moe_fast.checkpoint.table import OutputTensor, Weight
from moe_fast.config import PROMPT_MODES, GateMode, MoeConfig, RouterInit
from moe_fast.gates import as_dtype
from moe_fast.plan import MoeConstructionPlan


@dataclass(frozen=True)
class Construction:
    """One MoE to build: where its attention, its experts and its routers come from."""

    base: DenseModel
    sources: Sequence[DenseModel]
    models: Sequence[ExpertSource]
    """What was asked of each of the sources."""
    plan: MoeConstructionPlan
    config: MoeConfig
    router_init: RouterInit
    gate_mode: GateMode | None
    seed: int
    shared_sources: Sequence[DenseModel] = ()
    shared_experts: Sequence[ExpertSource] = ()
    """What was asked of each of the shared sources."""
    dense_layers: Sequence[int] = ()
    """Layers that keep the base's FFN; the plan's rows for them mean nothing."""
    converted_to: str | None = None
    """The dtype of every output tensor; `None` keeps those of the sources."""
    gates: npt.NDArray[np.float32] | None = None
    """Routers made from prompts, `(num_layers, num_experts, hidden_size)`."""
    shared_gates: npt.NDArray[np.float32] | None = None
    """What weighs the shared experts, made from their prompts, `(num_layers, 1, hidden_size)`."""
    gate_digests: Sequence[str] = ()
    """In place of both, what SHA-256 makes of each: those of `drawn_from_prompts`."""

    @property
    def dtype(self) -> str:
        """The dtype of experts and routers, as safetensors spells it."""
        return self.converted_to or self.base.expert_dtype

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        dense = frozenset(self.dense_layers)
        return tuple(layer for layer in range(self.plan.num_layers) if layer not in dense)

    def files(self) -> tuple[SourceFile, ...]:
        """Every safetensors file of the base and the sources."""
        models = {
            model.path: model for model in (self.base, *self.sources, *self.shared_sources)
        }.values()
        return tuple(dict.fromkeys(t.file for model in models for t in model.tensors.values()))

    def carried(self, tensor: Tensor) -> Weight:
        """A tensor of a source as the output holds it."""
        return self.converted(Weight.of(tensor))

    def converted(self, weight: Weight) -> Weight:
        return weight if self.converted_to is None else weight.converted(self.converted_to)

    def perturbed(self, tensor: Tensor, model: ExpertSource, name: str) -> Weight:
        """A source's tensor with its expert's noise and scale; `name` tells noise from noise."""
        weight = Weight.of(tensor)
        scale = model.residual_scale if name.endswith("down_proj") else 1.0
        if model.noise_scale != 0 or scale != 1:
            (source,) = weight.pieces
            assert isinstance(source, FileRange)
            stream = noise_stream(self.seed, name)
            piece = Perturbed(source, weight.dtype, model.noise_scale, scale, stream)
            weight = Weight(weight.dtype, weight.shape, (piece,))
        return self.converted(weight)

    def before_layers(self) -> Iterator[OutputTensor]:
        """The embedding."""
        for tensor in self.base.before_layers():
            yield OutputTensor(tensor.name, self.carried(tensor))

    def layer(self, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, under the base's names inside the layer."""
        for name, tensor in self.base.layer(layer):
            yield name, self.carried(tensor)

    def after_layers(self) -> Iterator[OutputTensor]:
        """The last norm and the head."""
        for tensor in self.base.after_layers():
            yield OutputTensor(tensor.name, self.carried(tensor))

    def expert(self, layer: int, expert: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of an expert."""
        model = self.plan.source_model[layer, expert]
        tensor = self.sources[model].ffn(int(self.plan.source_layer[layer, expert]), role)
        return self.perturbed(tensor, self.models[model], f"{layer} {expert} {role}")

    def router(self, layer: int) -> Weight:
        """The router of a layer, `(num_experts, hidden_size)`."""
        shape = (self.plan.num_experts, self.base.sizes.hidden_size)
        router: Piece
        if self.gate_digests:
            router = self.remembered(self.moe_layers.index(layer), shape)
        elif self.gates is not None:
            router = self.given(self.gates[layer])
        elif self.gate_mode is None:
            router = Router(shape[1], shape[0], layer, self.router_init, self.dtype)
        else:
            stream = noise_stream(self.seed, f"{layer} router")
            router = RandomRouter(*shape, self.dtype, self.gate_mode, stream)
        return Weight(self.dtype, shape, (router,))

    def given(self, gate: npt.NDArray[np.float32]) -> Given:
        return Given(gate.astype(as_dtype(DTYPE_NAMES[self.dtype])).tobytes())

    def remembered(self, index: int, shape: tuple[int, ...]) -> Remembered:
        return Remembered(math.prod(shape) * ITEM_SIZES[self.dtype], self.gate_digests[index])

    def routers(self) -> Iterator[npt.NDArray[np.float32]]:
        """The router of each layer that has one as it will be written, as float32."""
        dtype = as_dtype(DTYPE_NAMES[self.dtype])
        for layer in self.moe_layers:
            weight = self.router(layer)
            values = np.frombuffer(b"".join(weight.pieces[0].chunks()), dtype)
            yield values.reshape(weight.shape).astype(np.float32)

    def digests_to_keep(self) -> tuple[str, ...]:
        """Those of routers that took a run of a model, which may not give the same bytes again."""
        if self.gate_mode is not GateMode.HIDDEN:
            return ()
        return tuple(
            sha256(b"".join(weight.pieces[0].chunks())).hexdigest()
            for weight in self.drawn_from_prompts()
        )

    def drawn_from_prompts(self) -> Iterator[Weight]:
        """The routers, then what weighs the shared experts where prompts made that too."""
        for layer in self.moe_layers:
            yield self.router(layer)
        if self.prompts_of_shared():
            for layer in self.moe_layers:
                yield self.shared_gate(layer)

    def prompts_of_shared(self) -> bool:
        """Whether prompts make what weighs the shared experts."""
        prompted = any(expert.positive_prompts for expert in self.shared_experts)
        return prompted and self.gate_mode in PROMPT_MODES

    def dense_ffn(self, layer: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of a layer without experts."""
        return self.carried(self.base.ffn(layer, role))

    def shared_expert(self, layer: int, index: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of one shared expert."""
        model = self.shared_experts[index]
        source_layer = layer if model.source_layers is None else model.source_layers[layer]
        tensor = self.shared_sources[index].ffn(source_layer, role)
        return self.perturbed(tensor, model, f"{layer} shared {index} {role}")

    def shared(self, layer: int, role: str) -> Weight:
        """All shared experts of a layer side by side, which is one FFN that adds up theirs."""
        weights = [self.shared_expert(layer, i, role) for i in range(len(self.shared_sources))]
        rows, columns = weights[0].shape
        if role != "down_proj":
            return Weight.stacked(weights, (rows * len(weights), columns))
        if len(weights) == 1:
            return weights[0]
        wide = SideBySide(rows, tuple(weight.pieces for weight in weights))
        return Weight(weights[0].dtype, (rows, columns * len(weights)), (wide,))

    def silent(self, layer: int, width: int, role: str) -> Weight:
        """A shared expert that adds nothing, for targets that must have one.

        Its down projection is zero. Gate and up are the first rows of the base's, so that training
        can wake it: with those zero as well, no gradient would ever reach it.
        """
        if role == "down_proj":
            return Weight.zeros(self.dtype, (self.base.sizes.hidden_size, width))
        return self.carried(self.base.ffn(layer, role).first_rows(width))

    def shared_gate(self, layer: int) -> Weight:
        """What the sigmoid that weighs the shared expert reads, `(1, hidden_size)`.

        Where no prompts make it, it is small, so that the sigmoid is about one half, and not zero:
        llama.cpp computes it as `silu(x) / x`.
        """
        shape = (1, self.base.sizes.hidden_size)
        gate: Piece
        if self.gate_digests and self.prompts_of_shared():
            moe_layers = self.moe_layers
            gate = self.remembered(len(moe_layers) + moe_layers.index(layer), shape)
        elif self.shared_gates is not None:
            gate = self.given(self.shared_gates[layer])
        else:
            gate = Router(shape[1], 1, layer, RouterInit.BALANCED, self.dtype, remove_base=True)
        return Weight(self.dtype, shape, (gate,))

    def problems(self) -> list[str]:
        """Why the sources do not fit the base; empty where they do."""
        problems: list[str] = []
        for source, model in self.all_sources():
            problems += misfits(source, self.base, model.source_layers)
            if self.converted_to is None:
                problems += foreign_dtypes(source, self.dtype)
        return list(dict.fromkeys(problems))

    def warnings(self) -> list[str]:
        """What can be built, and may not be meant."""
        warnings: list[str] = []
        for source, _ in self.all_sources():
            warnings += drifts(source, self.base)
        return list(dict.fromkeys(warnings))

    def all_sources(self) -> Iterator[tuple[DenseModel, ExpertSource]]:
        """The models that give experts, with what was asked of each."""
        yield from zip(self.sources, self.models, strict=True)
        yield from zip(self.shared_sources, self.shared_experts, strict=True)


# Where each size shows: the tensor of a dense model whose shape it decides.
SEEN_IN = {
    "vocab_size": "model.embed_tokens.weight",
    "hidden_size": "model.embed_tokens.weight",
    "intermediate_size": "model.layers.0.mlp.gate_proj.weight",
    "num_attention_heads": "model.layers.0.self_attn.q_proj.weight",
    "num_key_value_heads": "model.layers.0.self_attn.k_proj.weight",
    "head_dim": "model.layers.0.self_attn.q_proj.weight",
}


def misfits(
    source: DenseModel, base: DenseModel, source_layers: Sequence[int] | None
) -> Iterator[str]:
    """Why experts of `source` cannot stand in `base`."""
    config = f"{source.path / 'config.json'}"
    num_layers = source.sizes.num_hidden_layers
    if source_layers is not None and max(source_layers, default=0) >= num_layers:
        yield f"{config}: has {num_layers} layers, source_layers names {max(source_layers)}"
    for name, value in vars(source.sizes).items():
        if name == "vocab_size" or (name == "num_hidden_layers" and source_layers is not None):
            continue
        if value != getattr(base.sizes, name):
            where = config
            if name in SEEN_IN:
                tensor = source.tensors[SEEN_IN[name]]
                where = f"{tensor.file.path}: tensor {tensor.name!r} {list(tensor.shape)}"
            yield f"{where}: {name} is {value}, the base model has {getattr(base.sizes, name)}"
    # A block of another form gives its FFN other inputs and does other things with the output.
    for what, (its, bases) in {
        "hidden_act": (source.config["hidden_act"], base.config["hidden_act"]),
        "FFN biases": (source.ffn_biases, base.ffn_biases),
        "attention biases": (source.attention_biases, base.attention_biases),
        "norms": (source.family.norms, base.family.norms),
        "norm of queries and keys": (source.family.qk_norm, base.family.qk_norm),
        "residual_multiplier": (
            source.multipliers.residual_multiplier,
            base.multipliers.residual_multiplier,
        ),
    }.items():
        if its != bases:
            yield f"{config}: {what}: {in_words(its)}, the base model has {in_words(bases)}"


def foreign_dtypes(source: DenseModel, dtype: str) -> Iterator[str]:
    """The FFN weights of `source` that have another dtype than the experts are to have."""
    layers = range(source.sizes.num_hidden_layers)
    tensors = [source.ffn(layer, role) for layer in layers for role in FFN]
    foreign = [tensor for tensor in tensors if tensor.dtype != dtype]
    if foreign:
        first, others = foreign[0], len(foreign) - 1
        yield (
            f"{first.file.path}: tensor {first.name!r}{f' and {others} others' * bool(others)}: "
            f"{first.dtype}, the base model's FFN is {dtype}; name a dtype to convert all to"
        )


def drifts(source: DenseModel, base: DenseModel) -> Iterator[str]:
    """What `source` was trained with otherwise, and the output takes from the base.

    None of it is seen by an FFN, and fine-tuning changes it (rope to read longer texts, the
    vocabulary for chats), so that it is no reason to refuse an expert.
    """
    if source.sizes.vocab_size != base.sizes.vocab_size:
        yield (
            f"{source.path / 'config.json'}: vocab_size is {source.sizes.vocab_size}, the base "
            f"model has {base.sizes.vocab_size}; only FFN weights are taken, which learnt from "
            "other tokens"
        )
    drifting = {
        "rope": (source.rope, base.rope),
        "multipliers": (source.multipliers, base.multipliers),
        "rms_norm_eps": (source.config["rms_norm_eps"], base.config["rms_norm_eps"]),
        "sliding windows": (source.windows, base.windows),
        "tie_word_embeddings": (
            source.config["tie_word_embeddings"],
            base.config["tie_word_embeddings"],
        ),
    }
    for what, (its, bases) in drifting.items():
        if its != bases:
            yield (
                f"{source.path / 'config.json'}: {what} differs from the base model's, "
                "which the output has"
            )


def in_words(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(value) or "none"
    return "none" if value is None or value is False else str(value)
