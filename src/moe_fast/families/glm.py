"""GLM-4-9B, and GLM-4.5 and later with experts.

Other dense models become GLM-4.5-MoE where groups of experts are wanted, or a part of each head is
rotated, and Youtu-LLM becomes GLM-4.7-Flash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.dense import DEFAULTS, FUSED_GATE_UP, QKV, DenseFamily
from moe_fast.families.experts import BIAS, ExpertAxis
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    LayerLists,
    MoeFamily,
    Parts,
    Shapes,
    as_count,
    ffn_shapes,
    shared_or_silent,
)
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import LATENT, Twin
from moe_fast.storage.tensors import Weight

GLM_TOKENS = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")


class GroupedExperts(MoeFamily):
    """Experts as in DeepSeek-V3: sigmoid scores, groups of experts, a bias for selection.

    Where no shared expert is asked for, the one that the family must have adds nothing.
    """

    shared_experts = True
    scaling_key = "routed_scaling_factor"
    has_groups = True
    dense_places = "can leave the first layers dense, and no others"

    def dense_keys(self, layers: frozenset[int], num_layers: int) -> dict[str, Any] | None:
        first = len(layers)
        return {"first_k_dense_replace": first} if layers == frozenset(range(first)) else None

    def dense_layers(self, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
        return frozenset(range(min(as_count(config, "first_k_dense_replace", 1), num_layers)))

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        bias = Weight.zeros("F32", (parts.num_experts,))
        yield "mlp.gate.e_score_correction_bias", bias
        for role, weight in shared_or_silent(parts, layer, parts.expert_width):
            yield f"mlp.shared_experts.{role}.weight", weight

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> Shapes:
        experts = as_count(config, "n_routed_experts", minimum=1)
        width = as_count(config, "n_shared_experts", 1) * as_count(config, "moe_intermediate_size")
        shapes: Shapes = {"mlp.gate.e_score_correction_bias": (experts,)}
        return shapes | ffn_shapes("mlp.shared_experts", width, hidden)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        chosen, shards = parts.config.num_experts_per_tok, parts.granularity
        whole_copies = shards > 1 and chosen % shards == 0 and not parts.mix_copies
        return {
            "n_routed_experts": parts.num_experts,
            "n_shared_experts": max(1, len(parts.shared_experts) * shards),
            "moe_intermediate_size": parts.expert_width,
            **(self.dense_keys(frozenset(parts.dense_layers), parts.num_layers) or {}),
            "n_group": parts.num_experts // shards if whole_copies else 1,
            "topk_group": chosen // shards if whole_copies else 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": float(shards),
            "num_nextn_predict_layers": 0,
        }


class Glm4Moe(GroupedExperts):
    """GLM-4.5-MoE (Zeng et al. 2025)."""

    name = "glm4_moe"
    title = "GLM-4.5-MoE"
    architecture = "Glm4MoeForCausalLM"
    auto_rank = 8
    rules = Rules(
        "n_routed_experts",
        128,
        1e4,
        llama_cpp_tokens=GLM_TOKENS,
        want_head=(VLLM,),
    )
    defaults = DEFAULTS_OF_MOE | {
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_mtp_layers": 1,
        "rms_norm_eps": 1e-5,
        "routed_scaling_factor": 1.0,
        "topk_group": 1,
        "use_qk_norm": False,
    }
    dense_twin = "llama"
    qk_norms = (None, "head")
    attention_biases = ((), QKV)
    sliding_window = False
    partial_rotary = True

    def twin_name(self, config: Mapping[str, Any]) -> str:
        if config.get("use_qk_norm"):
            return "qwen3"
        return "qwen2" if config.get("attention_bias") else "llama"

    def config(self, parts: Parts) -> dict[str, Any]:
        config = super().config(parts)
        # Without these, readers rotate half of each head.
        part = {"partial_rotary_factor": parts.base.rope.partial}
        return {**config, "rope_parameters": {**config["rope_parameters"], **part}, **part}

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **super().own_config(parts),
            "use_qk_norm": parts.base.family.qk_norm is not None,
            "attention_bias": bool(parts.base.attention_biases),
        }


class LatentExperts(GroupedExperts, Twin):
    """What the families with latent attention share: their dense twin is Youtu-LLM."""

    dense_twin = "youtu"
    blocks = LATENT
    dropped = ("embedding_initializer_range",)

    def own_config(self, parts: Parts) -> dict[str, Any]:
        spread = parts.base.config["initializer_range"]
        return {
            **super().own_config(parts),
            "num_experts_per_tok": parts.config.num_experts_per_tok,
            "initializer_range": 0.02 if spread is None else spread,
        }


class Glm4MoeLite(LayerLists, LatentExperts):
    """GLM-4.7-Flash (2026): the experts of GLM-4.5-MoE with latent attention."""

    name = "glm4_moe_lite"
    title = "GLM-4.7-Flash"
    architecture = "Glm4MoeLiteForCausalLM"
    auto_rank = 23
    rules = Rules(
        "n_routed_experts",
        64,
        1e4,
        llama_cpp_ropes=("default",),
        llama_cpp_tokens=GLM_TOKENS,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
    )
    defaults: Mapping[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 10240,
        "kv_lora_rank": 512,
        "max_position_embeddings": 202752,
        "mlp_layer_types": None,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 4,
        "num_key_value_heads": 20,
        "output_router_logits": False,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_interleave": True,
        "routed_scaling_factor": 1.8,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "v_head_dim": 256,
    }
    types: Mapping[str, str] = {
        "mlp_layer_types": "list[str] | None",
        "rope_interleave": "bool",
        "v_head_dim": "int",
    }
    first_is_dense = counts_first = True

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **super().own_config(parts),
            "partial_rotary_factor": 1.0,
            "scoring_func": "sigmoid",  # which llama.cpp looks for
        }


DENSE = (
    DenseFamily(
        "glm",
        {
            **DEFAULTS,
            "attention_bias": True,
            "bos_token_id": None,
            "eos_token_id": [151329, 151336, 151338],
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1.5625e-7,
        },
        bias_keys={"attention_bias": QKV},
        fused=(FUSED_GATE_UP,),
        interleaved=True,
        partial_rotary=True,
    ),
)
MOE = (Glm4Moe(), Glm4MoeLite())
EXPERTS = (
    ExpertAxis(
        ("glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4v_moe", "glm4v_moe_text"),
        counted=(BIAS,),
        copies_share="if normalised",
    ),
)
