"""SmolLM3: Llama, every fourth layer without rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.families.config import Rope, Sizes, is_count
from moe_fast.families.dense import DEFAULTS, DenseFamily
from moe_fast.storage.strict_json import brief


class SmolLm3(DenseFamily):
    """SmolLM3 (Bakouch et al. 2025)."""

    def read_rope(self, config: Mapping[str, Any], sizes: Sizes, file: Path) -> Rope:
        """`no_rope_layers` is 1 for a layer that has the embedding, 0 for one that has none."""
        rope = super().read_rope(config, sizes, file)
        layers, listed = range(sizes.num_hidden_layers), config["no_rope_layers"]
        if listed is None:
            step = config["no_rope_layer_interval"]
            if not is_count(step):
                raise CheckpointError(
                    f"no_rope_layer_interval is {brief(step)}; it must be an integer of at least 1",
                    file=file,
                )
            listed = [int((layer + 1) % step != 0) for layer in layers]
        if (
            not isinstance(listed, list)
            or len(listed) != len(layers)
            or not all(value in (0, 1) for value in listed)
        ):
            raise CheckpointError(
                f"no_rope_layers is {brief(listed)}; it must list {len(layers)} of 0 and 1",
                file=file,
            )
        if all(listed):
            return rope
        return replace(rope, layer_thetas=tuple(rope.theta if has else 0.0 for has in listed))


DENSE = (
    SmolLm3(
        "smollm3",
        {
            **DEFAULTS,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "layer_types": None,
            "max_position_embeddings": 32768,
            "max_window_layers": 0,
            "no_rope_layer_interval": 4,
            "no_rope_layers": None,
            "num_key_value_heads": 4,
            "pad_token_id": 128004,
            "rope_theta": 2e6,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
        mlp_bias=True,
        windows="layer_types",
        class_name="SmolLM3ForCausalLM",
    ),
)
