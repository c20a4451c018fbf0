"""OLMo2 and OLMo 3, and FlexOlmo with experts in place of its FFNs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.config import Rope, Sizes
from moe_fast.families.dense import DEFAULTS, NORMS_AFTER, QKVO, DenseFamily
from moe_fast.families.experts import ExpertAxis
from moe_fast.families.moe import DEFAULTS_OF_MOE, MoeFamily, Parts, num_experts
from moe_fast.families.rules import TRANSFORMERS_4, TRANSFORMERS_5, VLLM, Rules
from moe_fast.storage.strict_json import brief

SLIDING = "sliding_attention"


class FlexOlmo(MoeFamily):
    """FlexOlmo (Shi et al. 2025): OLMo2 with experts in place of each FFN."""

    name = "flex_olmo"
    title = "FlexOlmo"
    architecture = "FlexOlmoForCausalLM"
    auto_rank = 5
    rules = Rules(
        "num_experts",
        7,
        5e5,
        either_count_key=True,
        natively=(TRANSFORMERS_4, TRANSFORMERS_5, VLLM),  # vLLM by transformers' classes
        fused=(TRANSFORMERS_5, VLLM),
    )
    defaults = DEFAULTS_OF_MOE | {
        "attention_bias": False,
        "eos_token_id": 100257,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "pad_token_id": 100277,
        "router_aux_loss_coef": 0.01,
    }
    types: Mapping[str, str] = {
        "attention_dropout": "float | None",
        "num_key_value_heads": "int | None",
    }
    dense_twin = "olmo2"
    norms = NORMS_AFTER
    qk_norms = ("width",)
    attention_biases = ((), QKVO)
    sliding_window = False
    own_expert_width = False

    def own_config(self, parts: Parts) -> dict[str, Any]:
        return {
            **num_experts(parts),
            "attention_bias": bool(parts.base.attention_biases),
            "norm_topk_prob": True,
            "router_aux_loss_coef": 0.01,
        }


class Olmo3(DenseFamily):
    """OLMo 3 (2025): OLMo2 with sliding windows, and a rotary embedding for each kind of layer."""

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        kinds = config.get("rope_parameters")
        if not isinstance(kinds, dict) or not kinds.keys() & {"full_attention", SLIDING}:
            return super().read_rope(config, sizes, file)
        types = config["layer_types"]
        present = set(types) if isinstance(types, list) else {"full_attention", SLIDING}
        ropes = [
            super(Olmo3, self).read_rope({**config, "rope_parameters": rope}, sizes, file)
            for kind, rope in kinds.items()
            if kind in present
        ]
        if not ropes or any(rope != ropes[0] for rope in ropes):
            raise CheckpointError(
                f"rope_parameters is {brief(kinds)}; FlexOlmo, which OLMo 3 becomes, has one "
                "rotary embedding for all layers",
                file=file,
            )
        return ropes[0]


DEFAULTS_OF_OLMO = {
    **DEFAULTS,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 50279,
}
DENSE = (
    DenseFamily("olmo2", DEFAULTS_OF_OLMO, norms=NORMS_AFTER, qk_norm="width"),
    Olmo3(
        "olmo3",
        {**DEFAULTS_OF_OLMO, "layer_types": None, "rope_theta": 5e5, "sliding_window": 4096},
        norms=NORMS_AFTER,
        qk_norm="width",
        windows="layer_types",
        full_attention=(4, 3),
    ),
)
MOE = (FlexOlmo(),)
EXPERTS = (ExpertAxis(("flex_olmo", "olmoe")),)
