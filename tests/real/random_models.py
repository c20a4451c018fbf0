"""Small models with random weights, of any family that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


def random_model(family: str, dtype: torch.dtype, **keys: Any) -> PreTrainedModel:
    """A model as transformers starts it, the same each time; `keys` of its configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | keys)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)
