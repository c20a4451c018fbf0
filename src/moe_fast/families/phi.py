"""Phi-3, 3.5 and 4, and Phi-3.5-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fast.families.config import ORIGINAL, Rope, Sizes
from moe_fast.families.dense import DEFAULTS, FUSED_GATE_UP, FUSED_QKV, DenseFamily
from moe_fast.families.experts import mixtral_like


class Phi3(DenseFamily):
    """Phi-3 (Abdin et al. 2024) and its successors; Phi-4-mini rotates a part of each head."""

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        """LongRoPE had other names when the first of them came out."""
        config = dict(config)
        for key in ("rope_scaling", "rope_parameters"):
            rope = config.get(key)
            if isinstance(rope, dict):
                kind = rope.get("rope_type", rope.get("type"))
                if kind in ("su", "yarn"):
                    config[key] = {**rope, "rope_type": "longrope"}
        return super().read_rope(config, sizes, file)


DENSE = (
    Phi3(
        "phi3",
        {
            **DEFAULTS,
            "eos_token_id": 32000,
            "max_position_embeddings": 4096,
            ORIGINAL: 4096,
            "pad_token_id": 32000,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        biases=(),
        fused=(FUSED_QKV, FUSED_GATE_UP),
        partial_rotary=True,
        windows="all",
    ),
)
EXPERTS = (mixtral_like("phimoe", fused_router="router.weight", copies_share="never"),)
