"""HunYuan 1, dense and with experts: queries and keys are normalised after they are rotated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moe_fast.config import Layout
from moe_fast.families.config import Sizes
from moe_fast.families.dense import FFN
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import Parts, as_count, ffn_shapes
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
MOE = (HunYuanMoe(),)
EXPERTS = (
    ExpertAxis(("hunyuan_v1_moe",), router="gate.wg.weight"),
    ExpertAxis(("hy_v3",), router="router.gate.weight", counted=("expert_bias",)),
)
