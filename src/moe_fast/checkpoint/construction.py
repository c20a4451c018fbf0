"""What a target is built from: the base, the sources and the plan, as weights by role.

Whatever happens to a weight on its way (nothing, so far) happens here, so that a target only gives
names and shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_fast.checkpoint.pieces import Router
from moe_fast.checkpoint.source import FFN, DenseModel
from moe_fast.checkpoint.table import OutputTensor, Weight
from moe_fast.config import MoeConfig, RouterInit
from moe_fast.plan import MoeConstructionPlan


@dataclass(frozen=True)
class Construction:
    """One MoE to build: where its attention, its experts and its routers come from."""

    base: DenseModel
    sources: Sequence[DenseModel]
    plan: MoeConstructionPlan
    config: MoeConfig
    router_init: RouterInit

    @property
    def dtype(self) -> str:
        """The dtype of experts and routers, as safetensors spells it."""
        return self.base.expert_dtype

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
        source = self.sources[self.plan.source_model[layer, expert]]
        return Weight.of(source.ffn(int(self.plan.source_layer[layer, expert]), role))

    def router(self, layer: int) -> Weight:
        """The router of a layer, `(num_experts, hidden_size)`."""
        shape = (self.plan.num_experts, self.base.sizes.hidden_size)
        router = Router(shape[1], shape[0], layer, self.router_init, self.dtype)
        return Weight(self.dtype, shape, (router,))

    def problems(self) -> list[str]:
        """Why the sources do not fit the base; empty where they do."""
        problems: list[str] = []
        for source in {source.path: source for source in self.sources}.values():
            problems += misfits(source, self.base)
        return problems


def misfits(source: DenseModel, base: DenseModel) -> Iterator[str]:
    """Why experts of `source` cannot stand in `base`."""
    where = source.path / "config.json"
    for name, value in vars(source.sizes).items():
        if value != getattr(base.sizes, name):
            yield f"{where}: {name} is {value}, the base model has {getattr(base.sizes, name)}"
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
