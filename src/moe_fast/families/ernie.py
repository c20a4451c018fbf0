"""ERNIE 4.5, dense and with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_fast.families.dense import DEFAULTS, FFN, QKVO, DenseFamily
from moe_fast.families.experts import ExpertAxis


class Ernie(DenseFamily):
    """ERNIE 4.5 (Baidu 2025): Llama whose rotary embedding turns neighbours."""

    def ffn_bias_names(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return FFN if config["use_bias"] else ()


DENSE = (
    Ernie(
        "ernie4_5",
        {
            **DEFAULTS,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "tie_word_embeddings": True,
            "use_bias": False,
        },
        class_name="Ernie4_5ForCausalLM",
        bias_keys={"use_bias": QKVO},
        interleaved=True,
    ),
)
EXPERTS = (
    ExpertAxis(
        ("ernie4_5_moe",), counted=("moe_statics.e_score_correction_bias",), copies_share="never"
    ),
)
