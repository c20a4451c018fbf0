"""Qwen: Qwen2 and Qwen3, and the MoE families Qwen2-MoE and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.config import Layout
from moe_fast.errors import CheckpointError
from moe_fast.families.dense import DEFAULTS, FFN, QKV, QKVO, DenseFamily
from moe_fast.families.experts import WHOLE, ExpertAxis
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    MoeFamily,
    Parts,
    Shapes,
    as_count,
    ffn_shapes,
    num_experts,
)
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.storage.strict_json import brief
from moe_fast.storage.tensors import Weight

QWEN_FUSED = (TRANSFORMERS_5, VLLM, LLAMA_CPP)


DEFAULTS_OF_QWEN_MOE: dict[str, Any] = {
    **DEFAULTS_OF_MOE,
    "decoder_sparse_step": 1,
    "max_position_embeddings": 32768,
    "mlp_only_layers": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
    "sliding_window": 4096,
    "use_sliding_window": False,
}


class Qwen(MoeFamily):
    """What Qwen2-MoE and Qwen3-MoE share."""

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": sorted(layers)}

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        step = as_count(config, "decoder_sparse_step", 1, minimum=1)
        listed = config.get("mlp_only_layers") or []
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            raise CheckpointError(
                f"mlp_only_layers is {brief(listed)}; it must list layers", file="config.json"
            )
        between = (layer for layer in range(num_layers) if (layer + 1) % step)
        return frozenset(between) | (frozenset(listed) & frozenset(range(num_layers)))

    def own_config(self, parts: Parts) -> dict[str, Any]:
        sizes, window = parts.base.sizes, parts.base.windows[0]
        return {
            **num_experts(parts),
            "moe_intermediate_size": parts.expert_width,
            **self.dense_keys(frozenset(parts.dense_layers), sizes.num_hidden_layers),
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.001,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": sizes.num_hidden_layers if window is None else 0,
        }


class Qwen3Moe(Qwen):
    """Qwen3-MoE (Yang et al. 2025): norms on each head's queries and keys."""

    name = "qwen3_moe"
    title = "Qwen3-MoE"
    architecture = "Qwen3MoeForCausalLM"
    mergekit_name = "qwen3 moe"
    auto_rank = 2
    rules = Rules(
        "num_experts",
        128,
        1e4,
        llama_cpp_normalises=True,
        either_count_key=True,
        fused=QWEN_FUSED,
    )
    defaults = DEFAULTS_OF_QWEN_MOE | {
        "attention_bias": False,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
    }
    dense_twin = "qwen3"
    qk_norms = ("head",)
    attention_biases = ((), QKVO)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        biased = bool(parts.base.attention_biases)
        return {**super().own_config(parts), "attention_bias": biased}

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if config.get("attention_bias"):
            if reader == VLLM:
                yield f"leaves the bias of o_proj out of a {self.name}"
            if reader == LLAMA_CPP:
                yield f"has no place for the bias of o_proj in a {self.name}"


class Qwen2Moe(Qwen):
    """Qwen2-MoE (Yang et al. 2024): biases on queries, keys and values, one gated shared FFN.

    A source without those biases gets zeros. Where no shared expert is asked for, the one that the
    family must have adds nothing.
    """

    name = "qwen2_moe"
    title = "Qwen2-MoE"
    architecture = "Qwen2MoeForCausalLM"
    mergekit_name = "qwen moe"
    auto_rank = 3
    rules = Rules(
        "num_experts",
        60,
        1e4,
        llama_cpp_normalises=False,
        want_head=(LLAMA_CPP,),
        fused=QWEN_FUSED,
    )
    defaults = DEFAULTS_OF_QWEN_MOE | {
        "intermediate_size": 5632,
        "layer_types": None,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 16,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
    }
    types: Mapping[str, str] = {"num_key_value_heads": "int | None"}
    dense_twin = "qwen2"
    attention_biases = ((), QKV)
    own_head_dim = False
    shared_experts = True
    shared_gate = True
    # Divides among tensor-parallel ranks and fills a block of llama.cpp's quantisation.
    silent_width = 256

    def twin_name(self, config: Mapping[str, Any]) -> str:
        return "qwen2" if config.get("qkv_bias", True) else "mistral"  # which has no biases

    def attention(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        for name, weight in parts.layer(layer):
            yield name, weight
            projection = name.removeprefix("self_attn.").removesuffix(".weight")
            if projection in QKV and not parts.base.attention_biases:
                bias = Weight.zeros(weight.dtype, weight.shape[:1])
                yield f"self_attn.{projection}.bias", bias

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        for role in FFN:
            if parts.shared_experts:
                weight = parts.shared_ffn(layer, role)
            else:
                weight = parts.silent_ffn(layer, self.shared_width(parts), role)
            yield f"mlp.shared_expert.{role}.weight", weight
        yield "mlp.shared_expert_gate.weight", parts.shared_gate(layer)

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        width = as_count(config, "shared_expert_intermediate_size")
        shapes = ffn_shapes("mlp.shared_expert", width, hidden)
        return shapes | {"mlp.shared_expert_gate.weight": (1, hidden)}

    def shared_width(self, parts: Parts) -> int:
        width = parts.base.sizes.intermediate_size
        return len(parts.shared_experts) * width or min(self.silent_width, width)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        windows = parts.base.windows
        kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return {
            **super().own_config(parts),
            "shared_expert_intermediate_size": self.shared_width(parts),
            "qkv_bias": True,
            "layer_types": kinds,
        }


DEFAULTS_OF_QWEN: dict[str, Any] = {
    **DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DENSE = (
    DenseFamily("qwen2", DEFAULTS_OF_QWEN, biases=QKV, windows="layer_types"),
    DenseFamily(
        "qwen3", {**DEFAULTS_OF_QWEN, "head_dim": 128}, qk_norm="head", windows="layer_types"
    ),
)
MOE = (Qwen3Moe(), Qwen2Moe())
EXPERTS = (
    ExpertAxis((*("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"),)),
    # Its checkpoints hold each expert's matrices transposed.
    ExpertAxis(("qwen3_vl_moe", "qwen3_vl_moe_text"), layouts=(Layout.FUSED,), stacked=WHOLE),
)
