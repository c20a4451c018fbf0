"""HunYuan 1, dense and with experts, whose queries and keys are normalised after they are rotated.

And HY 3, which Qwen3 becomes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.config import Layout
from moe_fast.families.config import Sizes
from moe_fast.families.dense import FFN, QKVO
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import (
    DEFAULTS_OF_MOE,
    LayerLists,
    Parts,
    as_count,
    biases_of,
    ffn_shapes,
    shared_or_silent,
)
from moe_fast.families.moe import Shapes as MoeShapes
from moe_fast.families.rules import LLAMA_CPP, TRANSFORMERS_4, TRANSFORMERS_5, VLLM, Rules
from moe_fast.families.twins import OwnBlocks, Shapes, Twin, attention_shapes
from moe_fast.storage.tensors import Weight

NORMS = "norms on rotated queries and keys"


class HunYuan(OwnBlocks):
    """HunYuan 1 (Tencent 2025)."""

    def layer_shapes(self, sizes: Sizes, config: Mapping[str, Any], layer: int) -> Shapes:
        norms = ("query_layernorm", "key_layernorm")
        shapes = attention_shapes(sizes, bias=config["attention_bias"], norms=norms)
        hidden = (sizes.hidden_size,)
        return shapes | {f"{n}_layernorm.weight": hidden for n in ("input", "post_attention")}


class HunYuanMoe(Twin):
    """HunYuan-Large (Sun et al. 2024): every token goes through a shared FFN besides its experts.

    That one adds nothing here.
    """

    name = "hunyuan_v1_moe"
    title = "HunYuan-MoE"
    architecture = "HunYuanMoEV1ForCausalLM"
    auto_rank = 11
    rules = Rules(
        "num_experts",
        1,
        1e4,
        natively=(TRANSFORMERS_4, TRANSFORMERS_5, VLLM, LLAMA_CPP),  # vLLM by transformers' classes
    )
    defaults: Mapping[str, Any] = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eod_token_id": 3,
        "eos_token_id": 2,
        "head_dim": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "moe_topk": 1,
        "num_experts": 1,
        "num_key_value_heads": None,
        "output_router_logits": False,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "sep_token_id": 4,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    types: Mapping[str, str] = {"num_key_value_heads": "int | None"}
    dense_twin = "hunyuan_v1_dense"
    blocks = NORMS
    own_expert_width = False

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.mlp.gate.wg.weight"

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        for role in FFN:
            weight = parts.silent_ffn(layer, parts.expert_width, role)
            yield f"mlp.shared_mlp.{role}.weight", weight

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> MoeShapes:
        return ffn_shapes("mlp.shared_mlp", as_count(config, "intermediate_size"), hidden)

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        if reader == LLAMA_CPP:
            yield f"wants moe_topk of a {self.name} as a list, with keys that transformers has not"

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            "head_dim": parts.base.sizes.head_dim,
            "intermediate_size": parts.expert_width,
            "num_experts": parts.num_experts,
            "moe_topk": parts.config.num_experts_per_tok,
        }


class HyV3(LayerLists):
    """HY 3 (Tencent 2026): sigmoid scores, a bias for selection, a shared expert.

    That one adds nothing where none is asked for.
    """

    name = "hy_v3"
    title = "HY 3"
    architecture = "HYV3ForCausalLM"
    auto_rank = 21
    rules = Rules(
        "num_experts",
        192,
        11_158_840.0,
        natively=(TRANSFORMERS_5, VLLM, LLAMA_CPP),
        llama_cpp_output_bias=False,
    )
    defaults: Mapping[str, Any] = DEFAULTS_OF_MOE | {
        "attention_bias": False,
        "enable_moe_fp32_combine": True,
        "head_dim": 128,
        "initializer_range": 0.006,
        "intermediate_size": 13312,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "mlp_layer_types": None,
        "moe_intermediate_size": 1536,
        "num_experts": 192,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 8,
        "num_shared_experts": 1,
        "rms_norm_eps": 1e-5,
        "router_scaling_factor": 2.826,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float",
        "head_dim": "int",
        "mlp_layer_types": "list[str] | None",
        "num_experts": "int | None",
        "num_experts_per_tok": "int | None",
        "num_shared_experts": "int | None",
    }
    dense_twin = "qwen3"
    qk_norms = ("head",)
    attention_biases = ((), QKVO)
    sliding_window = False
    shared_experts = True
    scaling_key = "router_scaling_factor"
    first_is_dense = counts_first = True

    def reader_problems(self, reader: str, config: Mapping[str, Any]) -> Iterator[str]:
        yield from super().reader_problems(reader, config)
        if reader == VLLM and config.get("attention_bias"):
            yield f"leaves the biases of attention out of a {self.name}"

    def router_name(self, layer: int, layout: Layout) -> str:
        return f"model.layers.{layer}.mlp.router.gate.weight"

    def shared(self, parts: Parts, layer: int) -> Iterator[tuple[str, Weight]]:
        yield "mlp.expert_bias", Weight.zeros("F32", (parts.num_experts,))
        for role, weight in shared_or_silent(parts, layer, parts.expert_width):
            yield f"mlp.shared_mlp.{role}.weight", weight

    def shared_shapes(self, config: Mapping[str, Any], hidden: int) -> MoeShapes:
        experts = as_count(config, "num_experts", minimum=1)
        width = as_count(config, "num_shared_experts", 1) * as_count(
            config, "moe_intermediate_size"
        )
        shapes = ffn_shapes("mlp.shared_mlp", width, hidden)
        biases = biases_of(shapes) if config.get("mlp_bias") else {}
        return {"mlp.expert_bias": (experts,)} | shapes | biases

    def own_config(self, parts: Parts) -> dict[str, Any]:
        shards = parts.granularity
        return {
            "num_experts": parts.num_experts,
            "moe_intermediate_size": parts.expert_width,
            "num_shared_experts": max(1, len(parts.shared_experts) * shards),
            "router_scaling_factor": float(shards),
            # What vLLM looks for.
            "expert_hidden_dim": parts.expert_width,
            "qk_norm": True,
            "route_norm": True,
            "attention_bias": bool(parts.base.attention_biases),
            "mlp_bias": False,
            **self.dense_keys(frozenset(parts.dense_layers), parts.num_layers),
        }


DENSE = (
    HunYuan(
        "hunyuan_v1_dense",
        {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eod_token_id": 3,
            "eos_token_id": 2,
            "head_dim": None,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "pad_token_id": 0,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_cache": True,
        },
        class_name="HunYuanDenseV1ForCausalLM",
        biases=(),
        blocks=NORMS,
    ),
)
MOE = (HunYuanMoe(), HyV3())
EXPERTS = (
    ExpertAxis(("hunyuan_v1_moe",), router="gate.wg.weight"),
    ExpertAxis(("hy_v3",), router="router.gate.weight", counted=("expert_bias",)),
)
