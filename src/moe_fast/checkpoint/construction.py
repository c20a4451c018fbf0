"""What a target is built from: the base, the sources and the plan, as weights by role.

Whatever happens to a weight on its way happens here, so that a target only gives names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moe_fast.checkpoint.random_pieces import Perturbed, choose_stream
from moe_fast.checkpoint.routers import Routers
from moe_fast.checks import collect
from moe_fast.config import MoeConfig
from moe_fast.errors import CheckpointError
from moe_fast.families.dense import FFN, DenseModel
from moe_fast.models.dense import open_dense_model
from moe_fast.plan import MoeConstructionPlan, plan_moe_construction
from moe_fast.request import ExpertSource
from moe_fast.storage.pieces import FileRange, SideBySide
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.tensors import OutputTensor, Weight
from moe_fast.wording import ranges


@dataclass(frozen=True)
class Construction:
    """One MoE to build: where its attention, its experts and its routers come from."""

    base: DenseModel
    sources: Sequence[DenseModel]
    models: Sequence[ExpertSource]
    """What was asked of each of the sources."""
    plan: MoeConstructionPlan
    config: MoeConfig
    routers: Routers
    seed: int
    """Of the noise."""
    shared_sources: Sequence[DenseModel] = ()
    shared_experts: Sequence[ExpertSource] = ()
    """What was asked of each of the shared sources."""
    dense_layers: Sequence[int] = ()
    """Layers that keep the base's FFN; the plan's rows for them mean nothing."""
    converted_to: str | None = None
    """The dtype of every output tensor; `None` keeps those of the sources."""

    @property
    def num_layers(self) -> int:
        return self.plan.num_layers

    @property
    def num_experts(self) -> int:
        return self.plan.num_experts

    @property
    def dtype(self) -> str:
        """The dtype of experts and routers, as safetensors spells it."""
        return self.converted_to or self.base.expert_dtype

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        dense = frozenset(self.dense_layers)
        return tuple(layer for layer in range(self.plan.num_layers) if layer not in dense)

    def opened_models(self) -> list[DenseModel]:
        """The base and the sources, each folder once."""
        models = (self.base, *self.sources, *self.shared_sources)
        return list({model.path: model for model in models}.values())

    def keep(self, tensor: Tensor) -> Weight:
        """A tensor of a source as the output holds it."""
        return self.convert(Weight.of(tensor))

    def convert(self, weight: Weight) -> Weight:
        return weight if self.converted_to is None else weight.converted(self.converted_to)

    def perturb(self, tensor: Tensor, model: ExpertSource, name: str) -> Weight:
        """A source's tensor with its expert's noise and scale; `name` tells noise from noise."""
        weight = Weight.of(tensor)
        scale = model.residual_scale if name.endswith("down_proj") else 1.0
        if model.noise_scale != 0 or scale != 1:
            (source,) = weight.pieces
            assert isinstance(source, FileRange)
            stream = choose_stream(self.seed, name)
            piece = Perturbed(source, weight.dtype, model.noise_scale, scale, stream)
            weight = Weight(weight.dtype, weight.shape, (piece,))
        return self.convert(weight)

    def before_layers(self) -> Iterator[OutputTensor]:
        """The embedding."""
        for name, tensor in self.base.before_layers():
            yield OutputTensor(name, self.keep(tensor))

    def layer(self, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, under the base's names inside the layer."""
        for name, tensor in self.base.layer(layer):
            yield name, self.keep(tensor)

    def after_layers(self) -> Iterator[OutputTensor]:
        """The last norm and the head."""
        for name, tensor in self.base.after_layers():
            yield OutputTensor(name, self.keep(tensor))

    def expert(self, layer: int, expert: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of an expert."""
        model = self.plan.source_model[layer, expert]
        tensor = self.sources[model].ffn(int(self.plan.source_layer[layer, expert]), role)
        return self.perturb(tensor, self.models[model], f"{layer} {expert} {role}")

    def router(self, layer: int) -> Weight:
        """The router of a layer, `(num_experts, hidden_size)`."""
        shape = (self.num_experts, self.base.sizes.hidden_size)
        return Weight(self.dtype, shape, (self.routers.router(layer),))

    def dense_ffn(self, layer: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of a layer without experts."""
        return self.keep(self.base.ffn(layer, role))

    def shared_expert(self, layer: int, index: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of one shared expert."""
        model = self.shared_experts[index]
        source_layer = layer if model.source_layers is None else model.source_layers[layer]
        tensor = self.shared_sources[index].ffn(source_layer, role)
        return self.perturb(tensor, model, f"{layer} shared {index} {role}")

    def shared_ffn(self, layer: int, role: str) -> Weight:
        """All shared experts of a layer side by side, which is one FFN that adds up theirs."""
        weights = [self.shared_expert(layer, i, role) for i in range(len(self.shared_sources))]
        rows, columns = weights[0].shape
        if role != "down_proj":
            return Weight.stacked(weights, (rows * len(weights), columns))
        if len(weights) == 1:
            return weights[0]
        wide = SideBySide(rows, tuple(weight.pieces for weight in weights))
        return Weight(weights[0].dtype, (rows, columns * len(weights)), (wide,))

    def silent_ffn(self, layer: int, width: int, role: str) -> Weight:
        """A shared expert that adds nothing, for targets that must have one.

        Its down projection is zero. Gate and up are the first rows of the base's, so that training
        can wake it: with those zero as well, no gradient would ever reach it.
        """
        if role == "down_proj":
            return Weight.zeros(self.dtype, (self.base.sizes.hidden_size, width))
        return self.keep(self.base.ffn(layer, role).first_rows(width))

    def shared_gate(self, layer: int) -> Weight:
        """What the sigmoid that weighs the shared expert reads, `(1, hidden_size)`."""
        shape = (1, self.base.sizes.hidden_size)
        return Weight(self.dtype, shape, (self.routers.shared_gate(layer),))

    def problems(self) -> list[str]:
        """Why the sources do not fit the base; empty where they do."""
        problems: list[str] = []
        for source, model in self.all_sources():
            problems += find_misfits(source, self.base, model.source_layers)
            if self.converted_to is None:
                problems += find_foreign_dtypes(source, self.dtype)
        return list(dict.fromkeys(problems))

    def warnings(self) -> list[str]:
        """What can be built, and may not be meant."""
        warnings: list[str] = []
        for source, _ in self.all_sources():
            warnings += find_drifts(source, self.base)
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


def find_misfits(
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


def find_foreign_dtypes(source: DenseModel, dtype: str) -> Iterator[str]:
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


def find_drifts(source: DenseModel, base: DenseModel) -> Iterator[str]:
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


def plan_experts(
    models: Sequence[ExpertSource],
    shared_experts: Sequence[ExpertSource],
    dense_layers: Sequence[int],
    config: MoeConfig,
    num_layers: int,
) -> MoeConstructionPlan:
    """Round robin over the models, each from its own source layers."""
    absent = [layer for layer in dense_layers if not 0 <= layer < num_layers]
    problems = [
        f"dense_layers: there is no layer {ranges(absent)}, the base model has {num_layers}"
    ] * bool(absent)
    if len({*dense_layers}) == num_layers and not problems:
        problems.append("dense_layers: lists every layer; an MoE has experts in one at least")
    problems += [
        f"source_layers of {m.model}: lists {len(m.source_layers)} layers, the output has "
        f"{num_layers}; list one for each"
        for m in (*models, *shared_experts)
        if m.source_layers is not None and len(m.source_layers) != num_layers
    ]
    if problems:
        raise CheckpointError(*problems)
    plan = plan_moe_construction(len(models), num_layers, config)
    if all(model.source_layers is None for model in models):
        return plan
    layers = np.array([m.source_layers or range(num_layers) for m in models])
    return MoeConstructionPlan(
        plan.source_model, layers[plan.source_model[0]].T, num_models=plan.num_models
    )


def open_sources(models: Sequence[str], base: str) -> tuple[list[DenseModel], DenseModel]:
    """The source models and the base, each folder opened once; all their problems at once."""
    opened = collect(open_dense_model, (*models, base))
    return [opened[model] for model in models], opened[base]
