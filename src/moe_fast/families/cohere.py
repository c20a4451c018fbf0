"""Cohere2, dense and with experts: attention and FFN side by side, LayerNorm without bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.families.config import Sizes, is_count
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import LayerLists, Parts, as_count, ffn_shapes
from moe_fast.families.moe import Shapes as MoeShapes
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import OwnBlocks, Shapes, Twin, attention_shapes, read_kinds

PARALLEL = "attention and FFN side by side"
KINDS = ("sliding_attention", "full_attention")


def kinds_of(config: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """Which layers have the sliding window; by default all but every fourth."""
    every = config.get("sliding_window_pattern", 4)
    every = every if is_count(every) else 4
    default = [KINDS[0] if (n + 1) % every else KINDS[1] for n in range(sizes.num_hidden_layers)]
    return read_kinds(config, sizes, default, {kind: kind for kind in KINDS})


class Cohere2(OwnBlocks):
    """Command R7B and Command A (Cohere 2025)."""

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        shapes = attention_shapes(sizes, bias=config["attention_bias"])
        return shapes | {"input_layernorm.weight": (sizes.hidden_size,)}


class Cohere2Moe(LayerLists, Twin):
    """Command A+ (Cohere 2026)."""

    name = "cohere2_moe"
    title = "Cohere2-MoE"
    architecture = "Cohere2MoeForCausalLM"
    auto_rank = 12
    rules = Rules(
        "num_experts",
        8,
        1e4,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
        llama_cpp_ropes=("default",),
        llama_cpp_windows=True,
    )
    defaults: Mapping[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 5,
        "eos_token_id": 255001,
        "expert_selection_fn": "softmax",
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 22528,
        "layer_norm_eps": 1e-5,
        "layer_types": None,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "mlp_layer_types": None,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_key_value_heads": None,
        "num_shared_experts": 0,
        "output_router_logits": False,
        "pad_token_id": 0,
        "prefix_dense_intermediate_size": None,
        "prefix_dense_sliding_window_pattern": 1,
        "rms_norm_eps": None,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "shared_expert_combination_strategy": "average",
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float",
        "head_dim": "int",
        "num_key_value_heads": "int | None",
        "rms_norm_eps": "float | None",
    }
    dense_twin = "cohere2"
    blocks = PARALLEL
    own_expert_width = False
    dropped = ("sliding_window_pattern",)

    def dense_width(self, config: Mapping[str, Any]) -> int:
        own = config.get("prefix_dense_intermediate_size")
        return (
            super().dense_width(config)
            if own is None
            else as_count(config, "prefix_dense_intermediate_size", minimum=1)
        )

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> MoeShapes:
        number = as_count(config, "num_shared_experts", 0)
        width = number * as_count(config, "intermediate_size")
        return ffn_shapes("mlp.shared_experts", width, hidden) if number else {}

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        window, context = config.get("sliding_window"), config.get("max_position_embeddings")
        short = isinstance(window, int) and isinstance(context, int) and window < context
        if reader == VLLM and short and "sliding_attention" in (config.get("layer_types") or ()):
            yield f"takes the sliding window of a {self.name} to be one token wider"

    def own_config(self, parts: Parts) -> dict[str, Any]:
        base = parts.base
        return {
            "head_dim": base.sizes.head_dim,
            "intermediate_size": parts.expert_width,
            "layer_types": kinds_of(base.config, base.sizes),
            **self.dense_keys(frozenset(parts.dense_layers), parts.num_layers),
            "prefix_dense_intermediate_size": base.sizes.intermediate_size,
            "num_experts": parts.num_experts,
            "num_experts_per_tok": parts.config.num_experts_per_tok,
            "num_shared_experts": 0,
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "rms_norm_eps": None,
        }


DENSE = (
    Cohere2(
        "cohere2",
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 5,
            "eos_token_id": 255001,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-5,
            "layer_types": None,
            "logit_scale": 0.0625,
            "max_position_embeddings": 8192,
            "num_key_value_heads": None,
            "pad_token_id": 0,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "use_cache": True,
        },
        biases=(),
        blocks=PARALLEL,
    ),
)
MOE = (Cohere2Moe(),)
EXPERTS = (ExpertAxis(("cohere2_moe",)),)
