"""Granite, and GraniteMoE with or without shared experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.config import Layout
from moe_fast.families.dense import DEFAULTS, QKVO, DenseFamily
from moe_fast.families.experts import GRANITE_STACKED, ExpertAxis
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    GATE_UP,
    ExpertTensor,
    MoeFamily,
    Parts,
    Shapes,
    as_count,
    num_experts,
    stacks,
)
from moe_fast.families.rules import READERS, VLLM, Rules
from moe_fast.storage.tensors import Weight


class GraniteMoe(MoeFamily):
    """GraniteMoE: experts fused on disk, multipliers on embedding, attention, residual, logits."""

    name = "granitemoe"
    title = "GraniteMoE"
    architecture = "GraniteMoeForCausalLM"
    auto_rank = 4
    rules = Rules(
        "num_local_experts",
        8,
        1e4,
        llama_cpp_sentencepiece=True,
        per_expert=(),
        fused=READERS,
    )
    defaults: Mapping[str, Any] = {
        **DEFAULTS_OF_MOE,
        "attention_bias": False,
        "attention_multiplier": 1.0,
        "bos_token_id": 1,
        "embedding_multiplier": 1.0,
        "eos_token_id": 2,
        "logits_scaling": 1.0,
        "num_local_experts": 8,
        "residual_multiplier": 1.0,
        "router_aux_loss_coef": 0.001,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float | int | None",
        "num_experts_per_tok": "int | None",
        "num_key_value_heads": "int | None",
        "num_local_experts": "int | None",
        "output_router_logits": "bool | None",
        "router_aux_loss_coef": "float | None",
    }
    dense_twin = "granite"
    layouts = (Layout.FUSED,)
    attention_biases = ((), QKVO)
    own_head_dim = False
    sliding_window = False
    multipliers = True
    block = "block_sparse_moe"
    own_expert_width = False

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        prefix = f"model.layers.{layer}.{self.block}"
        names = (f"{prefix}.input_linear.weight", f"{prefix}.output_linear.weight")
        return stacks(*names, range(num_experts))

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.{self.block}.router.layer.weight"

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **num_experts(parts),
            "attention_bias": bool(parts.base.attention_biases),
            **parts.base.multipliers._asdict(),
            "router_aux_loss_coef": 0.001,
        }

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader == VLLM and config.get("attention_bias"):
            yield f"leaves the biases of attention out of a {self.name}"


class GraniteMoeShared(GraniteMoe):
    """GraniteMoE with shared experts, whose outputs are added to the routed ones'."""

    name = "granitemoeshared"
    title = "GraniteMoE Shared"
    architecture = "GraniteMoeSharedForCausalLM"
    auto_rank = 6
    defaults: Mapping[str, Any] = {**GraniteMoe.defaults, "shared_intermediate_size": 0}
    shared_experts = True

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        if parts.shared_experts:
            gate, up = (parts.shared_ffn(layer, role) for role in GATE_UP)
            width, hidden = gate.shape
            yield "shared_mlp.input_linear.weight", Weight.stacked((gate, up), (2 * width, hidden))
            yield "shared_mlp.output_linear.weight", parts.shared_ffn(layer, "down_proj")

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        width = as_count(config, "shared_intermediate_size", 0)
        if not width:
            return {}
        return {
            "shared_mlp.input_linear.weight": (2 * width, hidden),
            "shared_mlp.output_linear.weight": (hidden, width),
        }

    def own_config(self, parts: Parts) -> dict[str, Any]:
        width = len(parts.shared_experts) * parts.base.sizes.intermediate_size
        return {**super().own_config(parts), "shared_intermediate_size": width}


DENSE = (
    DenseFamily(
        "granite",
        {
            **DEFAULTS,
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        mlp_bias=True,
        multipliers=True,
    ),
)
MOE = (GraniteMoe(), GraniteMoeShared())
EXPERTS = (
    ExpertAxis(
        ("granitemoe", "granitemoeshared", "granitemoehybrid"),
        block="block_sparse_moe",
        router="router.layer.weight",
        layouts=(Layout.FUSED,),
        stacked=GRANITE_STACKED,
    ),
    ExpertAxis(
        ("granitemoe_swa",),
        block="block_sparse_moe",
        router="router.weight",
        layouts=(Layout.FUSED,),
    ),
)
