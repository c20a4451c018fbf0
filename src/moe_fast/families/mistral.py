"""Mistral, and Mixtral with experts in place of its FFNs."""

from __future__ import annotations

from typing import Any

from moe_fast.config import Layout
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
)
MOE = (Mixtral(),)
EXPERTS = (mixtral_like("mixtral"),)
