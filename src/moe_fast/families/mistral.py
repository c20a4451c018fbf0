"""Mistral and Ministral, and Mixtral with experts in place of their FFNs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_fast.config import Layout
from moe_fast.families.config import ORIGINAL, Rope, Sizes, is_count
from moe_fast.families.dense import DEFAULTS, DenseFamily
from moe_fast.families.experts import mixtral_like
from moe_fast.families.moe import DEFAULTS_OF_MOE, ExpertTensor, MoeFamily, Parts, num_experts
from moe_fast.families.rules import Rules


class Mixtral(MoeFamily):
    """Mixtral (Jiang et al. 2024)."""

    name = "mixtral"
    title = "Mixtral"
    architecture = "MixtralForCausalLM"
    mergekit_name = "mixtral"
    auto_rank = 1
    rules = Rules(
        "num_local_experts",
        8,
        1e6,
        llama_cpp_ropes=("default", "linear", "yarn", "llama3"),
        llama_cpp_sentencepiece=True,
        either_count_key=True,
    )
    defaults = DEFAULTS_OF_MOE | {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }
    dense_twin = "mistral"
    own_expert_width = False
    expert_names = (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))

    def expert_tensors(self, layer: int, num_experts: int, layout: Layout) -> list[ExpertTensor]:
        tensors = super().expert_tensors(layer, num_experts, layout)
        return [t._replace(name=self.block_name(t.name, layout)) for t in tensors]

    def router_name(self, layer: int, layout: Layout) -> str:
        return self.block_name(super().router_name(layer, layout), layout)

    def block_name(self, name: str, layout: Layout) -> str:
        """transformers 5 renamed the block when it fused the experts."""
        return name if layout is Layout.FUSED else name.replace(".mlp.", ".block_sparse_moe.")

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **num_experts(parts),
            "sliding_window": parts.base.windows[0],
            "router_aux_loss_coef": 0.001,
            "router_jitter_noise": 0.0,
        }


BETA = "llama_4_scaling_beta"


class Ministral3(DenseFamily):
    """Ministral 3 (Liu et al. 2026): queries grow with their position, from a certain one on."""

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The context ends where queries begin to grow, which no MoE has."""
        found = super().with_defaults(config)
        start = start_of_growth(found)
        context = found["max_position_embeddings"]
        if start is not None and is_count(context):
            found["max_position_embeddings"] = min(start, context)
        return found

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        rope = config.get("rope_parameters")
        if isinstance(rope, dict):
            kept = {
                k: v for k, v in rope.items() if k not in (BETA, "max_position_embeddings", "type")
            }
            kept.setdefault("rope_type", rope.get("type", "default"))
            config = {**config, "rope_parameters": kept}
        return super().read_rope(config, sizes, file)

    def reservations(self, config: Mapping[str, Any], dtype: str) -> Iterator[str]:
        start = start_of_growth(config)
        if start is not None:
            yield (
                f"{BETA}: from position {start} on, queries are multiplied with more than 1, which "
                f"no MoE does; max_position_embeddings of the output is at most {start}"
            )


def start_of_growth(config: Mapping[str, Any]) -> int | None:
    """The position from which on queries grow, if they do."""
    rope = config.get("rope_parameters") or {}
    start = rope.get(ORIGINAL) if isinstance(rope, dict) else None
    return start if is_count(start) and rope.get(BETA) else None


DENSE = (
    DenseFamily(
        "mistral",
        {
            **DEFAULTS,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        biases=(),
        windows="all",
    ),
    DenseFamily(
        "ministral",
        {
            **DEFAULTS,
            "layer_types": None,
            "max_position_embeddings": 131072,
            "max_window_layers": 0,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        biases=(),
        windows="layer_types",
    ),
    Ministral3(
        "ministral3",
        {
            **DEFAULTS,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "pad_token_id": 11,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 16.0,
                ORIGINAL: 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                BETA: 0.1,
            },
            "sliding_window": None,
        },
        biases=(),
        windows="all",
    ),
)
MOE = (Mixtral(),)
EXPERTS = (mixtral_like("mixtral"),)
