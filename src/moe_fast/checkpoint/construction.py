"""What a target is built from: the base, the sources and the plan, as weights by role.

Whatever happens to a weight on its way happens here, so that a target only gives names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_fast.checkpoint.header import SourceFile, Tensor
from moe_fast.checkpoint.noise import Perturbed, RandomRouter, noise_stream
from moe_fast.checkpoint.pieces import FileRange, Piece, Router
from moe_fast.checkpoint.request import ExpertSource
from moe_fast.checkpoint.source import FFN, DenseModel
from moe_fast.checkpoint.table import OutputTensor, Weight
from moe_fast.config import GateMode, MoeConfig, RouterInit
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

    @property
    def dtype(self) -> str:
        """The dtype of experts and routers, as safetensors spells it."""
        return self.base.expert_dtype

    def files(self) -> tuple[SourceFile, ...]:
        """Every safetensors file of the base and the sources."""
        models = {model.path: model for model in (self.base, *self.sources)}.values()
        return tuple(dict.fromkeys(t.file for model in models for t in model.tensors.values()))

    def before_layers(self) -> Iterator[OutputTensor]:
        """The embedding."""
        for tensor in self.base.before_layers():
            yield OutputTensor(tensor.name, Weight.of(tensor))

    def layer(self, layer: int) -> Iterator[tuple[str, Weight]]:
        """Attention and norms of a layer, under the base's names inside the layer."""
        for name, tensor in self.base.layer(layer):
            yield name, Weight.of(tensor)

    def after_layers(self) -> Iterator[OutputTensor]:
        """The last norm and the head."""
        for tensor in self.base.after_layers():
            yield OutputTensor(tensor.name, Weight.of(tensor))

    def expert(self, layer: int, expert: int, role: str) -> Weight:
        """The `gate_proj`, `up_proj` or `down_proj` of an expert."""
        model = self.plan.source_model[layer, expert]
        tensor = self.sources[model].ffn(int(self.plan.source_layer[layer, expert]), role)
        return self.perturbed(tensor, self.models[model], f"{layer} {expert} {role}")

    def perturbed(self, tensor: Tensor, model: ExpertSource, name: str) -> Weight:
        """A source's tensor with its expert's noise and scale; `name` tells noise from noise."""
        weight = Weight.of(tensor)
        scale = model.residual_scale if name.endswith("down_proj") else 1.0
        if model.noise_scale == 0 and scale == 1:
            return weight
        (source,) = weight.pieces
        assert isinstance(source, FileRange)
        stream = noise_stream(self.seed, name)
        piece = Perturbed(source, weight.dtype, model.noise_scale, scale, stream)
        return Weight(weight.dtype, weight.shape, (piece,))

    def router(self, layer: int) -> Weight:
        """The router of a layer, `(num_experts, hidden_size)`."""
        shape = (self.plan.num_experts, self.base.sizes.hidden_size)
        router: Piece
        if self.gate_mode is None:
            router = Router(shape[1], shape[0], layer, self.router_init, self.dtype)
        else:
            stream = noise_stream(self.seed, f"{layer} router")
            router = RandomRouter(*shape, self.dtype, self.gate_mode, stream)
        return Weight(self.dtype, shape, (router,))

    def problems(self) -> list[str]:
        """Why the sources do not fit the base; empty where they do."""
        problems: list[str] = []
        for source, model in zip(self.sources, self.models, strict=True):
            problems += misfits(source, self.base, model.source_layers)
        return list(dict.fromkeys(problems))

    def warnings(self) -> list[str]:
        """What can be built, and may not be meant."""
        vocabulary = self.base.sizes.vocab_size
        return [
            f"{source.path / 'config.json'}: vocab_size is {source.sizes.vocab_size}, the base "
            f"model has {vocabulary}; only FFN weights are taken, which learnt from other tokens"
            for source in {source.path: source for source in self.sources}.values()
            if source.sizes.vocab_size != vocabulary
        ]


def misfits(
    source: DenseModel, base: DenseModel, source_layers: Sequence[int] | None
) -> Iterator[str]:
    """Why experts of `source` cannot stand in `base`."""
    where = source.path / "config.json"
    num_layers = source.sizes.num_hidden_layers
    names = ["hidden_size", "intermediate_size"]
    if source_layers is None:
        names.append("num_hidden_layers")
    elif max(source_layers, default=0) >= num_layers:
        yield f"{where}: has {num_layers} layers, source_layers names {max(source_layers)}"
    for name in names:
        value, expected = getattr(source.sizes, name), getattr(base.sizes, name)
        if value != expected:
            yield f"{where}: {name} is {value}, the base model has {expected}"
    for key in ("model_type", "hidden_act", "mlp_bias"):
        if source.config[key] != base.config[key]:
            yield (
                f"{where}: {key} is {source.config[key]!r}, the base model has {base.config[key]!r}"
            )
    for layer in range(source.sizes.num_hidden_layers):
        for role in FFN:
            tensor = source.ffn(layer, role)
            if tensor.dtype != base.expert_dtype:
                yield (
                    f"{tensor.file.path}: tensor {tensor.name!r} is {tensor.dtype}, "
                    f"the base model's FFN is {base.expert_dtype}"
                )
