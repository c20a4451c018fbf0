"""Mellum 2: Qwen3-MoE whose layers may differ in their sliding window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.config import ORIGINAL
from moe_fast.families.dense import QKVO
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.key_types import with_floats
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    LayerLists,
    Parts,
    num_experts,
    windows_as_qwen,
)
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules

KINDS = ("full_attention", "sliding_attention")


class Mellum(LayerLists):
    """Mellum 2 (JetBrains 2026)."""

    name = "mellum"
    title = "Mellum"
    architecture = "MellumForCausalLM"
    auto_rank = 22
    rules = Rules(
        "num_experts",
        64,
        1e4,
        either_count_key=True,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),  # vLLM by transformers' classes
        want_head=(LLAMA_CPP,),
        llama_cpp_windows=True,
        llama_cpp_output_bias=False,
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_MOE | {
        "attention_bias": False,
        "head_dim": 128,
        "intermediate_size": 7168,
        "layer_types": None,
        "max_position_embeddings": 131072,
        "mlp_layer_types": None,
        "moe_intermediate_size": 896,
        "mtp_layer_types": None,
        "mtp_mlp_layer_types": None,
        "norm_topk_prob": True,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "num_mtp_layers": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": 1024,
    }
    types: Mapping[str, str] = {
        "head_dim": "int",
        "mlp_layer_types": "list[str] | None",
        "num_mtp_layers": "int | None",
    }
    dense_twin = "qwen3"
    qk_norms = ("head",)
    attention_biases = ((), QKVO)
    unlike_windows = True
    rope_by_kind = True

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().reader_problems(reader, config)
        if reader != LLAMA_CPP:
            return
        rope = self.effective_config(config).get("rope_parameters") or {}
        kind = rope.get("rope_type", "default") if isinstance(rope, Mapping) else "default"
        if kind not in self.rules.llama_cpp_ropes:
            yield f"has no rope of type {kind} in a {self.name}"
        kinds = config.get("mlp_layer_types")
        if isinstance(kinds, list) and "dense" in kinds:
            yield f"wants experts in every layer of a {self.name}, some here are dense"

    def effective_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """With one rotary embedding in place of one for each kind of layer."""
        found = super().effective_config(config)
        ropes = found.get("rope_parameters")
        if isinstance(ropes, Mapping) and isinstance(ropes.get(KINDS[0]), Mapping):
            found["rope_parameters"] = dict(ropes[KINDS[0]])
        return found

    def kept_for_dense(self, config: Mapping[str, Any]) -> dict[str, Any]:
        ropes = {"rope_parameters": self.effective_config(config).get("rope_parameters")}
        return windows_as_qwen(config) | ropes

    def config(self, parts: Parts) -> dict[str, Any]:
        config = super().config(parts)
        rope = with_floats(config)["rope_parameters"]
        ropes = {"rope_parameters": {kind: dict(rope) for kind in KINDS}}
        left_out = ("rope_theta", "rope_scaling", ORIGINAL)
        return {key: value for key, value in config.items() if key not in left_out} | ropes

    def own_config(self, parts: Parts) -> dict[str, Any]:
        windows = parts.base.windows
        widths = [width for width in windows if width is not None]
        return {
            **num_experts(parts),
            "moe_intermediate_size": parts.expert_width,
            "attention_bias": bool(parts.base.attention_biases),
            "layer_types": [KINDS[1] if width else KINDS[0] for width in windows],
            "sliding_window": widths[0] if widths else None,
            **self.dense_keys(frozenset(parts.dense_layers), parts.num_layers),
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
        }


MOE = (Mellum(),)
EXPERTS = (ExpertAxis(("mellum",)),)
