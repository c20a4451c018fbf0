"""Solar Open: GLM-4.5-MoE without norms on queries and keys, all layers with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fast.families.dense import QKV
from moe_fast.families.experts import BIAS, ExpertAxis
from moe_fast.families.glm import GroupedExperts
from moe_fast.families.moe import DEFAULTS_OF_MOE, MoeFamily, Parts
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules


class SolarOpen(GroupedExperts):
    """Solar Open (Upstage 2025)."""

    name = "solar_open"
    title = "Solar Open"
    architecture = "SolarOpenForCausalLM"
    auto_rank = 20
    rules = Rules(
        "n_routed_experts",
        128,
        1e6,
        llama_cpp_tokens=("<|startoftext|>", "<|endoftext|>", "<unk>"),
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),  # vLLM by transformers' classes
    )
    defaults: Mapping[str, Any] = {
        **{key: value for key, value in DEFAULTS_OF_MOE.items() if key != "intermediate_size"},
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1280,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
    }
    types: Mapping[str, str] = {"head_dim": "int"}
    dense_twin = "llama"
    attention_biases = ((), QKV)
    sliding_window = False
    dense_places = "has experts in every layer"

    def twin_name(self, config: Mapping[str, Any]) -> str:
        return "qwen2" if config.get("attention_bias") else "llama"

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        return MoeFamily.dense_keys(self, layers, num_layers)

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        return frozenset()

    def config(self, parts: Parts) -> dict[str, Any]:
        config = super().config(parts)
        # Without this, llama.cpp rotates half of each head.
        part = {"partial_rotary_factor": 1.0}
        return {**config, "rope_parameters": {**config["rope_parameters"], **part}, **part}

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **super().own_config(parts),
            "attention_bias": bool(parts.base.attention_biases),
        }


MOE = (SolarOpen(),)
EXPERTS = (ExpertAxis(("solar_open",), counted=(BIAS,), copies_share="if normalised"),)
