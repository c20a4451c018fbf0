"""HyperCLOVA X: Granite whose logits are multiplied, not divided."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.config import Multipliers, Sizes
from moe_fast.families.dense import DEFAULTS, DenseFamily


class HyperClovaX(DenseFamily):
    """HyperCLOVA X SEED Think (NAVER 2025)."""

    def read_sizes(self, config: Mapping[str, Any], file: Path) -> Sizes:
        if config["use_post_norm"]:
            raise CheckpointError(
                "use_post_norm is true: no MoE has norms before and after attention and FFN, "
                "with multipliers",
                file=file,
            )
        return super().read_sizes(config, file)

    def read_multipliers(self, config: Mapping[str, Any], sizes: Sizes) -> Multipliers:
        found = dict(config)
        if found["attention_multiplier"] is None:
            found["attention_multiplier"] = sizes.head_dim**-0.5
        return super().read_multipliers(
            found | {"logits_scaling": 1 / found["logits_scaling"]}, sizes
        )


DENSE = (
    HyperClovaX(
        "hyperclovax",
        {
            **DEFAULTS,
            "attention_multiplier": None,
            "embedding_multiplier": 1.0,
            "head_dim": None,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "use_post_norm": True,
        },
        mlp_bias=True,
        multipliers=True,
        class_name="HyperCLOVAXForCausalLM",
    ),
)
